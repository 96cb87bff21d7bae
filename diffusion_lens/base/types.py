"""The frozen results that flow along the one path of Diffusion Lens.

Every type carries what is needed to make it again. Arrays are numpy, so that a
result can be kept, compared and plotted without torch. The ordered tuple
``Attribute.classes`` is the only source of label order in the whole project.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal, Protocol, get_args

import numpy as np

Mode = Literal["scale", "add", "suppress"]
Sampler = Literal["asymmetric", "symmetric"]
GuidanceBranch = Literal["conditional", "both"]
Control = Literal["random", "flip"]
"""What a control steers: features drawn at random among those as active, or the poles exchanged."""
Plain = str | int | float | bool | None
"""What an option of a method may be."""
Fault = Literal["not finite", "censored", "constant"]
"""Why a picture shows nobody: its numbers overflowed, the model's safety checker blacked it out, or it is one flat
colour. See ``base.validity``."""

FAULTS: tuple[Fault, ...] = get_args(Fault)

Seeds = int | Iterable[int]
"""One seed or several: a number, a range, a list, or a vector of numpy or torch; see ``as_seeds``."""
MAX_SEED = 2**63 - 1
ASSUMED = 1_000_000
"""Images per class of a confusion matrix that was assumed, not measured; see ``is_assumed``."""
ADJUSTED = "* zero count adjusted: ½ was added, and the ratio itself may lie further out"
"""Explains the mark of a log ratio's ``text``; see ``LogRatio.haldane``."""
MAX_IMAGES = 20_000
MAX_STEPS = 1_000
MAX_SIDE = 256
"""Positions a side of a map that an edit may be painted on; tokens count downwards."""
TURNED, LEFT = "#", "."
"""A position of ``Intervention.where`` that is turned, and one that is left as it is."""
MAX_BETA = 100.0


class LensError(ValueError):
    """A mistake a person can mend; its message is one clear sentence that says how."""


def as_whole(value: object, what: str) -> int:
    """A whole number as a plain ``int``, also from numpy, torch or a float such as ``3.0``; else a ``LensError``."""
    number = as_number(value, what)
    if number != int(number):
        raise LensError(f"{what} must be a whole number; it is {value!r}.")
    return int(value) if isinstance(value, numbers.Integral) else int(number)


def as_number(value: object, what: str, *, finite: bool = True) -> float:
    """A number as a plain ``float``, also from numpy or torch; anything else is a ``LensError``."""
    if hasattr(value, "ndim") and hasattr(value, "item") and value.ndim == 0:
        value = value.item()  # of numpy or torch
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise LensError(f"{what} must be a number; it is {_shown(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if finite and not math.isfinite(number):
        raise LensError(f"{what} must be a finite number; it is {_shown(value)}.")
    return number


def as_seeds(value: object) -> tuple[int, ...]:
    """Seeds as plain ``int``: from one number, a range, a list, or a numpy or torch vector.

    Raises ``LensError`` for none, more than ``MAX_IMAGES``, or anything but whole numbers from 0 to ``MAX_SEED``.
    """
    rule = "Seeds are whole numbers from 0 to 2^63 - 1"
    if isinstance(value, str | bytes | dict) or value is None:
        raise LensError(f"{rule}, e.g. range(16); these are {_shown(value)}.")
    if hasattr(value, "tolist"):
        value = value.tolist()  # of numpy or torch
    items = list(islice(value, MAX_IMAGES + 1)) if isinstance(value, Iterable) else [value]
    n = len(value) if isinstance(value, range | list | tuple) else len(items)
    if not 1 <= n <= MAX_IMAGES:
        raise LensError(f"Ask for 1 to {MAX_IMAGES:,} images; this request has {n:,}.")
    try:
        seeds = tuple(as_whole(item, "A seed") for item in items)
    except LensError as error:
        raise LensError(f"{rule}. {error}") from None
    if not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise LensError(f"{rule}.")
    return seeds


def _shown(value: object) -> str:
    """What was given, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Short:
    """Base of results that hold arrays: their ``repr`` gives shapes, and they are equal only to themselves."""

    def __repr__(self) -> str:
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={short(value)}' for name, value in own.items())})"


def short(value: object) -> str:
    """A value in a few words: arrays by type and shape, long texts, lists and mappings by their beginning and size."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        shown = ", ".join(f"{key!r}: {short(own)}" for key, own in list(value.items())[:3])
        return f"{{{shown}{f', … {len(value)} in all' if len(value) > 3 else ''}}}"
    if isinstance(value, tuple) and len(value) > 6:
        return f"({value[0]!r}, …, {value[-1]!r}; {len(value)} in all)"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


@dataclass(frozen=True)
class Attribute:
    """A perceived attribute and its ordered classes, e.g. ``gender: (female, male)``."""

    name: str
    classes: tuple[str, ...]

    def index(self, label: str) -> int:
        """Position of ``label`` in ``classes``; raises ``LensError`` naming the known ones."""
        if label not in self.classes:
            raise LensError(f"'{label}' is no class of {self.name}; choose one of {', '.join(self.classes)}.")
        return self.classes.index(label)

    def opposite(self, label: str) -> str | None:
        """The other class of a two-class attribute; ``None`` where there are more than two."""
        self.index(label)
        return next(c for c in self.classes if c != label) if len(self.classes) == 2 else None


@dataclass(frozen=True)
class GenerationRequest:
    """What to draw: one image per seed. ``prompt`` is ``None`` for unconditional models.

    ``seeds`` may be given as anything that ``as_seeds`` takes; numbers of numpy become plain ones.
    """

    prompt: str | None
    seeds: tuple[int, ...]
    n_steps: int
    guidance_scale: float
    model_id: str

    def __post_init__(self) -> None:
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise LensError(f"A request has one prompt, a text; draw several one by one. It is {_shown(self.prompt)}.")
        if not isinstance(self.model_id, str):
            raise LensError(f"A request names its model by a text; it is {_shown(self.model_id)}.")
        object.__setattr__(self, "seeds", as_seeds(self.seeds))
        object.__setattr__(self, "n_steps", as_whole(self.n_steps, "n_steps"))
        object.__setattr__(self, "guidance_scale", as_number(self.guidance_scale, "guidance_scale", finite=False))
        if not 1 <= self.n_steps <= MAX_STEPS:
            raise LensError(f"n_steps must lie between 1 and {MAX_STEPS}; it is {self.n_steps}.")
        if not 0 <= self.guidance_scale <= 50:
            raise LensError(f"guidance_scale must lie between 0 and 50; it is {self.guidance_scale:g}.")


class Requested(Protocol):
    """Whatever was drawn from a request: a ``Generation``, or what was measured in one."""

    @property
    def request(self) -> GenerationRequest:
        """What was asked for."""
        ...


def same_request_but_edit(a: Requested, b: Requested) -> None:
    """Raise ``LensError`` that names what differs, unless ``a`` and ``b`` were drawn from the same request.

    Only then do images of the same seed differ by the edit alone, and only then may they be compared in pairs.
    """
    for name, words in _REQUEST_WORDS.items():
        mine, other = getattr(a.request, name), getattr(b.request, name)
        if mine != other:
            shown = "" if name == "seeds" else f" ({_shown(other)} and not {_shown(mine)})"
            raise LensError(f"The reference has {words}{shown}; draw it from the same request, without the edit.")


_REQUEST_WORDS = {
    "model_id": "another model",
    "prompt": "another prompt",
    "n_steps": "another number of steps",
    "guidance_scale": "another guidance scale",
    "seeds": "other seeds",
}


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Short):
    """Bottleneck activations.

    Attributes:
        h: float array ``[n, step, d_in, y, x]``.
        timesteps: the scheduler's timestep of every step, ``[step]``.
        seeds: one per image, ``[n]``.
        hook_name: the module read, relative to the U-Net, e.g. ``mid_block``.
        guidance_branch: which half of a guided batch was read.
    """

    h: np.ndarray
    timesteps: tuple[int, ...]
    seeds: tuple[int, ...]
    hook_name: str
    guidance_branch: GuidanceBranch = "conditional"


@dataclass(frozen=True, eq=False, repr=False)
class FeatureActs(Short):
    """Sparse SAE codes: ``values, indices [n, step, y, x, k]`` into a dictionary of ``d_sae``."""

    values: np.ndarray
    indices: np.ndarray
    d_sae: int
    sae_id: str


@dataclass(frozen=True)
class FeatureSet:
    """SAE features chosen for one class; refused by any SAE but the one of ``sae_id``."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]
    attribute: str
    target: str
    sae_id: str

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.scores):
            raise LensError(
                f"A feature set needs one score per feature; got {len(self.ids)} ids and {len(self.scores)} scores."
            )
        if len(set(self.ids)) != len(self.ids):
            raise LensError("A feature set must not name a feature twice.")


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Short):
    """Features' attribution to every class of an attribute.

    Attributes:
        scores: ``[class, step, d_sae]``, mean over images, summed over positions.
        completeness_gap: largest ``|sum S - (F(s) - F(s'))|`` over images and classes (probability units).
        method: how it was computed, e.g. ``integrated_gradients``.
        baseline: the path's start, e.g. ``zero``.
        n_images: images averaged over.
    """

    scores: np.ndarray
    completeness_gap: float
    attribute: Attribute
    method: str
    baseline: str
    sae_id: str
    n_images: int

    def top_k(self, k: int, *, target: str, window: tuple[int, int] | None = None) -> FeatureSet:
        """The ``k`` features whose summed score for class ``target`` is largest (positive scores only).

        ``window`` is a half-open range of step indices; the default sums over all steps.
        """
        total = self.total(target, window=window)
        if not 1 <= k <= total.size:
            raise LensError(f"Choose between 1 and {total.size} features; you asked for {k}.")
        order = np.argsort(-total, kind="stable")[:k]
        order = order[total[order] > 0]
        return FeatureSet(
            tuple(int(i) for i in order),
            tuple(float(total[i]) for i in order),
            self.attribute.name,
            target,
            self.sae_id,
        )

    def total(self, target: str, *, window: tuple[int, int] | None = None) -> np.ndarray:
        """Scores for ``target`` summed over steps, ``[d_sae]``."""
        first, stop = window or (0, self.scores.shape[1])
        return self.scores[self.attribute.index(target), first:stop].sum(axis=0)


def identity_beta(mode: Mode) -> float:
    """The β that changes nothing: 1 for ``scale``, 0 for ``add`` and ``suppress``."""
    return 1.0 if mode == "scale" else 0.0


def beta_of(mode: Mode, strength: float) -> float:
    """The β that people read for a strength."""
    return _rounded(identity_beta(mode) + strength)


def strength_of(mode: Mode, beta: float) -> float:
    """The strength of a β; 0 changes nothing in every mode."""
    return _rounded(as_number(beta, "beta", finite=False) - identity_beta(mode))


def _rounded(number: float) -> float:
    """12 decimals, so that β 0.1 and strength -0.9 are each other's to the last bit; -0 becomes 0."""
    return round(float(number), 12) + 0.0


@dataclass(frozen=True)
class Intervention:
    """One edit of SAE features: which, how, how far, when. Mode and strength have no default.

    ``scale``: ``s_i <- (1 + strength) * s_i``; ``add``: ``s_i <- s_i + strength``; ``suppress``:
    ``s_i <- (1 - strength) * s_i``, off at 1. Strength 0 changes nothing in every mode. People are shown β, which is
    ``1 + strength`` for ``scale`` and ``strength`` for the others; ``at_beta`` takes it (DiffLens, Intervene(s)).

    Attributes:
        opposite: features of the mirror pole, steered by ``-strength``. Our working form; ``None`` steers one pole.
        overrides: ``(feature id, strength)`` pairs that replace the common strength for single features.
        window: half-open range of step indices that are edited; ``None`` is every step.
        sampler: ``asymmetric`` lets the edit move the predicted x0 alone (as in Asyrp), ``symmetric`` both terms.
        only_seeds: steer these images alone; ``None`` is every image.
        hold: attributes to leave alone: what their probes would read of the edit is taken out of it (``hold.Hold``).
            An attribute that the same edit steers is not held.
        where: the positions of the site's map that are turned, a text per row with ``#`` for those and ``.`` for the
            others, which stay bit for bit as they are; ``None`` is every position.
    """

    features: FeatureSet
    mode: Mode
    _: KW_ONLY
    strength: float
    opposite: FeatureSet | None = None
    overrides: tuple[tuple[int, float], ...] = ()
    window: tuple[int, int] | None = None
    sampler: Sampler = "asymmetric"
    only_seeds: frozenset[int] | None = None
    hold: tuple[str, ...] = ()
    where: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("scale", "add", "suppress"):
            raise LensError(f"mode must be scale, add or suppress; it is '{self.mode}'.")
        object.__setattr__(self, "strength", self._checked(self.strength))
        object.__setattr__(self, "overrides", tuple((int(i), self._checked(s)) for i, s in self.overrides))
        if not self.features.ids:
            raise LensError("The feature set is empty; choose at least one feature.")
        if self.opposite is not None and set(self.opposite.ids) & set(self.features.ids):
            raise LensError("A feature stands in both poles of this intervention; give it to one of them.")
        if self.window is not None and not 0 <= self.window[0] < self.window[1]:
            raise LensError(f"The step window {self.window} is empty; it runs from a first step to a later one.")
        if self.where is not None:
            check_where(self.where)

    def _checked(self, strength: float) -> float:
        number = _rounded(as_number(strength, "strength", finite=False))
        beta = beta_of(self.mode, number)
        if not abs(beta) <= MAX_BETA:
            raise LensError(f"beta must be a finite number between -{MAX_BETA:g} and {MAX_BETA:g}; it is {beta}.")
        return number

    @classmethod
    def at_beta(
        cls,
        features: FeatureSet,
        mode: Mode,
        beta: float,
        *,
        opposite: FeatureSet | None = None,
        overrides: Iterable[tuple[int, float]] = (),
        window: tuple[int, int] | None = None,
        sampler: Sampler = "asymmetric",
        only_seeds: frozenset[int] | None = None,
        hold: tuple[str, ...] = (),
        where: tuple[str, ...] | None = None,
    ) -> Intervention:
        """The same with β for the strength, and ``(feature id, β)`` for ``overrides``."""
        return cls(
            features, mode, strength=strength_of(mode, beta), opposite=opposite,
            overrides=tuple((i, strength_of(mode, b)) for i, b in overrides), window=window, sampler=sampler,
            only_seeds=only_seeds, hold=hold, where=where,
        )  # fmt: skip

    @property
    def beta(self) -> float:
        """The strength as people read it."""
        return beta_of(self.mode, self.strength)

    @property
    def everywhere(self) -> bool:
        """Whether every position is turned."""
        return self.where is None or not any(LEFT in row for row in self.where)

    def coefficients(self) -> Iterator[tuple[int, float, float]]:
        """``(feature, scale, shift)`` for both poles: ``s`` becomes ``scale · s + shift``.

        An override replaces the strength before the opposite pole mirrors it.
        """
        apart = dict(self.overrides)
        for features, sign in ((self.features, 1), (self.opposite, -1)):
            for feature in features.ids if features is not None else ():
                strength = sign * apart.get(feature, self.strength)
                if self.mode == "add":
                    yield feature, 1.0, strength + 0.0
                else:
                    yield feature, _rounded(1 + strength if self.mode == "scale" else 1 - strength), 0.0


def check_where(where: tuple[str, ...]) -> None:
    """Raise ``LensError`` unless these are rows of one length of ``#`` and ``.``, at most ``MAX_SIDE`` a side."""
    shape = f"rows of {TURNED} (turned) and {LEFT} (left as it is), all of one length, like '..##/..##'"
    if isinstance(where, str) or not where or len({len(row) for row in where}) > 1 or not where[0]:
        raise LensError(f"Where features are turned is told in {shape}.")
    if max(len(where), len(where[0])) > MAX_SIDE:
        raise LensError(f"Where features are turned has at most {MAX_SIDE} rows and columns.")
    if set("".join(where)) - {TURNED, LEFT}:
        raise LensError(f"Where features are turned is told in {shape}.")


@dataclass(frozen=True)
class FittedMethod:
    """Which method was fitted, to what and on what: all that decides its edits but their strength.

    Attributes:
        key, name: the method's, as typed and as shown. lens_key: of the lens that it was fitted to.
        target: the share aimed at of each of ``classes``.
        options: ``(name, value)`` of every option. prompts, seeds: the images that the fit drew.
        digest: 12 hex digits over all this and the fitted tensors, which are kept elsewhere.
    """

    key: str
    name: str
    lens_key: str
    attribute: str
    classes: tuple[str, ...]
    target: tuple[float, ...]
    options: tuple[tuple[str, Plain], ...]
    prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class CustomEdit:
    """An edit that only the program that made it can make again; ``digest`` tells it from others of its name."""

    name: str
    digest: str


@dataclass(frozen=True, eq=False, repr=False)
class EditSpec:
    """An edit as data: what makes it again, names it in a cache, and says where a result comes from.

    It is one of three: interventions on SAE features, a fitted method at a strength, or an edit of one's own. Two are
    equal where they edit alike: order of features within a pole, scores and names of classes do not count.
    ``edits.describe`` makes the sentence for a person.

    Attributes:
        interventions: of a feature edit, in the order in which they act.
        hold_digest: of the probes that the edit holds still (``holds`` names them); empty for none.
        method: fitted, with ``strength`` (0 is the identity).
        custom: an edit that cannot be made again from this.
    """

    interventions: tuple[Intervention, ...] = ()
    hold_digest: str = ""
    method: FittedMethod | None = None
    strength: float = 0.0
    custom: CustomEdit | None = None

    def __post_init__(self) -> None:
        if bool(self.interventions) + (self.method is not None) + (self.custom is not None) != 1:
            raise LensError("An edit is made of interventions, or is one of a fitted method, or one of your own.")

    @classmethod
    def of_custom(cls, name: str, *decisive: object) -> EditSpec:
        """The spec of an edit of one's own: a name, and the JSON values that tell it from others of that name."""
        return cls(custom=CustomEdit(name, hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]))

    @property
    def sae_id(self) -> str | None:
        """The SAE whose features are edited; ``None`` for other edits."""
        return self.interventions[0].features.sae_id if self.interventions else None

    @property
    def holds(self) -> tuple[str, ...]:
        """Attributes that the edit holds still, sorted: what any intervention holds, but for those it steers."""
        steered = {i.features.attribute for i in self.interventions}
        return tuple(sorted({name for i in self.interventions for name in i.hold} - steered))

    @cached_property
    def digest(self) -> str:
        """12 hex digits over everything that decides the edit; the same in every process."""
        return hashlib.sha256(self._decisive.encode()).hexdigest()[:12]

    @cached_property
    def _decisive(self) -> str:
        """Everything that decides the edit, as one text."""
        if self.method is not None:
            return json.dumps(["method", self.method.digest, float(self.strength)])
        if self.custom is not None:
            return json.dumps(["custom", self.custom.name, self.custom.digest])
        details = [
            [
                sorted(i.coefficients()), i.window, i.sampler, None if i.only_seeds is None else sorted(i.only_seeds),
                *([] if i.everywhere else [i.where]),
            ]
            for i in self.interventions
        ]  # fmt: skip
        saes = [i.features.sae_id for i in self.interventions]
        which = saes if len(set(saes)) > 1 else self.sae_id
        return json.dumps(["features", which, details, self.hold_digest])

    def __eq__(self, other: object) -> bool:
        return self._decisive == other._decisive if isinstance(other, EditSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._decisive)

    def __repr__(self) -> str:
        if self.method is not None:
            kind = f"{self.method.key}, strength {self.strength:g}"
        elif self.custom is not None:
            kind = self.custom.name
        else:
            kind = f"{len(self.interventions)} intervention{'s' * (len(self.interventions) > 1)}"
        return f"EditSpec({kind} · {self.digest})"


class Reproducible(Protocol):
    """What can be drawn again: a ``Generation``, a ``Measurement``, or anything that says what was drawn and how."""

    @property
    def request(self) -> GenerationRequest:
        """What was drawn."""
        ...

    @property
    def edit(self) -> EditSpec | None:
        """How it was edited; ``None`` for unedited images."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Generation(Short):
    """Images ``uint8[n, H, W, 3]`` with everything needed to make them again (``DiffusionLens.reproduce``).

    Attributes:
        edit: ``None`` for unedited images.
        activation_ratio: mean ``|h'| / |h|`` over edited images and steps; ``None`` where nothing was edited.
        faults: per image, why it shows nobody, or ``None`` where nothing speaks against it; empty: not looked at.
    """

    images: np.ndarray
    request: GenerationRequest
    edit: EditSpec | None = None
    activations: Activations | None = None
    activation_ratio: float | None = None
    faults: tuple[Fault | None, ...] = ()

    def __post_init__(self) -> None:
        if self.faults and len(self.faults) != len(self.images):
            raise LensError(f"Give a fault or None per image; got {len(self.faults)} for {len(self.images)} images.")

    @property
    def valid(self) -> np.ndarray:
        """Which images may be read at all, bool ``[n]``."""
        faults = self.faults or (None,) * len(self.images)
        return np.array([fault is None for fault in faults], dtype=bool)


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Short):
    """An image classifier's reading: ``probs [n, class]``, ``certain [n]`` (False counts as "uncertain")."""

    probs: np.ndarray
    certain: np.ndarray
    attribute: Attribute
    classifier_id: str

    @classmethod
    def from_labels(
        cls, labels: np.ndarray, certain: np.ndarray, attribute: Attribute, classifier_id: str
    ) -> Predictions:
        """A reading of which labels ``[n]`` and certainty alone were kept; its probabilities are 0 and 1."""
        probs = np.eye(len(attribute.classes), dtype=np.float32)[np.asarray(labels, dtype=np.int64)]
        return cls(probs, np.asarray(certain, dtype=bool), attribute, classifier_id)

    @property
    def labels(self) -> np.ndarray:
        """Most probable class index per image, ``[n]`` (uncertain images included)."""
        return self.probs.argmax(axis=1)

    @property
    def counts(self) -> np.ndarray:
        """Certain images per class, ``[class]``."""
        return np.bincount(self.labels[self.certain], minlength=self.probs.shape[1])

    @property
    def n_uncertain(self) -> int:
        """Images the classifier would not decide."""
        return int((~self.certain).sum())


@dataclass(frozen=True, eq=False, repr=False)
class Reading(Short):
    """What a classifier reads in ``n`` images: attribute → predictions, and features ``[n, d]`` where it has any."""

    predictions: dict[str, Predictions]
    features: np.ndarray | None


@dataclass(frozen=True)
class Share:
    """A share with its uncertainty: raw and classifier-error-corrected, with 95 % intervals."""

    label: str
    count: int
    n: int
    n_uncertain: int
    raw: float
    raw_interval: tuple[float, float]
    corrected: float
    corrected_interval: tuple[float, float]


@dataclass(frozen=True)
class LogRatio:
    """``ln(share a / share b)`` with a 95 % interval.

    Attributes:
        interval: an end is infinite where the images cannot bound the ratio on that side (a zero count).
        haldane: the value is a stand-in: a count of zero with ½ added, or a corrected share moved off 0 or 1. Wherever
            the value is shown, so is this: ``text`` has a mark, which ``note`` explains.
    """

    value: float
    interval: tuple[float, float]
    numerator: str
    denominator: str
    haldane: bool

    @property
    def text(self) -> str:
        """``+0.42 (+0.10 to +0.74)``; ``+3.47* (above +1.20)`` after a zero count."""
        low, high = self.interval
        if math.isinf(low) and math.isinf(high):
            span = "not bounded"
        elif math.isinf(low):
            span = f"below {high:+.2f}"
        else:
            span = f"above {low:+.2f}" if math.isinf(high) else f"{low:+.2f} to {high:+.2f}"
        return f"{self.value:+.2f}{'*' if self.haldane else ''} ({span})"

    @property
    def note(self) -> str:
        """What the mark in ``text`` means; empty where there is none."""
        return ADJUSTED if self.haldane else ""


@dataclass(frozen=True)
class Change:
    """How one class's share moved between unedited and edited images of the same seeds.

    Attributes:
        before, after: shares among the ``n`` images that were decided both times.
        difference: ``after - before``; ``interval`` its paired 95 % interval.
    """

    attribute: str
    label: str
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True, eq=False, repr=False)
class Atlas(Short):
    """What every SAE feature looks like, read on one pool of images.

    Attributes:
        xy: place of each decoder direction on the map, float32 ``[d_sae, 2]``.
        density: share of samples (image × step × position) on which the feature fires, ``[d_sae]``.
        step_profile: mean activation at each step read, ``[d_sae, step]``; ``steps``: those steps' indices.
        top_images: images that excite the feature most, indices into the pool, ``[d_sae, m]`` (-1: none).
        heatmaps: mean activation over steps at each position of those images, float16 ``[d_sae, m, y, x]``.
        random_images: images drawn at random among all on which it fires, ``[d_sae, r]`` (-1: none).
        random_heatmaps: as ``heatmaps``, ``[d_sae, r, y, x]``.
        near_images: images on which it nearly fired: never among the k, highest before the cut ``[d_sae, r]``.
        labels: one short text per feature (``""``: none), made as ``label_source`` says.
        layout: how ``xy`` was made, e.g. ``umap``.
        effects: attribute → change of its class shares when this feature alone is steered, ``[d_sae, class]``,
            NaN where not measured; ``effect_source`` says how far it was steered, and on what.
    """

    xy: np.ndarray
    density: np.ndarray
    step_profile: np.ndarray
    steps: tuple[int, ...]
    top_images: np.ndarray
    heatmaps: np.ndarray
    random_images: np.ndarray
    random_heatmaps: np.ndarray
    near_images: np.ndarray
    labels: tuple[str, ...]
    label_source: str
    layout: str
    sae_id: str
    effects: dict[str, np.ndarray] = field(default_factory=dict)
    effect_source: str = ""

    @property
    def dead(self) -> np.ndarray:
        """Features that never fire on the pool, bool ``[d_sae]``."""
        return self.density == 0

    @property
    def activity(self) -> np.ndarray:
        """Mean activation over all steps and images of the pool, ``[d_sae]``; 0 where dead."""
        return self.step_profile.mean(1)


@dataclass(frozen=True, eq=False, repr=False)
class Examples(Short):
    """Images of one kind on an evidence card: ``images uint8 [m, H, W, 3]``, ``heatmaps [m, y, x]``, pool rows."""

    images: np.ndarray
    heatmaps: np.ndarray
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class FeatureCard(Short):
    """Everything a lens knows of one feature.

    Attributes:
        attribution: attribute → class → score summed over steps; ``rank``: attribute → class → place (1 is first).
        effects: attribute → class → change of share when this feature alone is steered (empty: not measured).
    """

    id: int
    density: float
    dead: bool
    step_profile: np.ndarray
    steps: tuple[int, ...]
    attribution: dict[str, dict[str, float]]
    rank: dict[str, dict[str, int]]
    effects: dict[str, dict[str, float]]
    top: Examples
    random: Examples
    near: Examples
    label: str
    label_source: str
    effect_source: str
    sae_id: str


def is_assumed(counts: np.ndarray) -> bool:
    """Whether a confusion matrix ``[true, read]`` says that no error was ever measured, only taken to be none."""
    return bool(np.array_equal(counts, ASSUMED * np.eye(len(counts), dtype=np.int64)))
