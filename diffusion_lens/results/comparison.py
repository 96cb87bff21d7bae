"""What the bench measures and how it was asked to: plain records, readable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import Attribute, LogRatio, Share
from diffusion_lens.results import display
from diffusion_lens.results.measurement import Figures
from diffusion_lens.results.sweeps import SweepResult

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

UNSTEERED = "unsteered"
NORM_FLAG = 1.25
"""``|h'| / |h|`` beyond which, up or down, an edit is flagged as leaving the data's range (our working form)."""

RULE = (
    "Among the strengths tried on the tuning seeds, the one with the least FD; where several lie within FD's noise "
    "floor, the one of them that changes the other attributes least."
)

BALANCE_RULE = (
    "At balance: the curve of the tuning seeds is read where its corrected shares, linear between strengths, come "
    "nearest to the target; where it meets the target twice, at the place that changes the other attributes less. That "
    "place is measured anew on the tuning seeds and read again; a curve that has not met the target at its last "
    "strength is drawn further. The strength so found is drawn on new seeds."
)
RANDOM = "control-random"
"""The control that every method is held against: what a push of that size does in any direction."""
NEAR = 0.02
"""Distance of shares from the target up to which a curve counts as having met it."""

Interval = tuple[float, float]
Protocol = Literal["balance", "points"]


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval; ``None`` stands for "too few images"."""

    value: float
    interval: Interval


@dataclass(frozen=True, eq=False)
class MethodRow:
    """One method at its best setting, on seeds that were not used to choose it.

    Attributes:
        goal: the class or shares it was fitted to. strength: chosen by the comparison's rule on ``n_tune`` images per
            strength. reached: whether the curve meets the target there; ``None`` for an older rule.
        figures: what was measured, FD from the target; ``None`` where the method could not run.
        inception: over the heads that ``Comparison.labels`` names, the mean over the other attributes' heads.
        image_likeness, prompt_likeness: CLIP-I and CLIP-T, or their stand-ins, as ``labels`` says.
        subgroup_entropy: class → mean entropy of the reading, in nats, among the images read as that class.
        norm_ratio: mean ``|h'| / |h|`` where an edit changes the model and not h itself, measured apart.
        explicit: share of images of prompts that name a class (one per class) which show it, with the method on; with
            its gate they are the unedited ones.
        quality: Fréchet distance to drawings of the prompt with the target shares, where the world is known.
        margin: what is kept above random features at their balance, paired over seeds.
        rank: 1 + the methods that surely keep more; of those that reach balance.
        note: why there are no numbers, where there are none.
    """

    method: str
    name: str
    kind: str
    is_control: bool
    goal: str
    strength: float
    strength_name: str
    n_tune: int
    figures: Figures | None = None
    inception: float | None = None
    image_likeness: Measured | None = None
    prompt_likeness: Measured | None = None
    subgroup_entropy: dict[str, float] | None = None
    norm_ratio: float | None = None
    seconds_to_fit: float | None = None
    seconds_per_image: float | None = None
    reached: bool | None = None
    explicit: Measured | None = None
    quality: float | None = None
    margin: Measured | None = None
    rank: int | None = None
    note: str = ""

    @property
    def n(self) -> int:
        """Images drawn."""
        return self.figures.measurement.n if self.figures else 0

    @property
    def n_uncertain(self) -> int:
        """Images left undecided."""
        return self.figures.n_uncertain if self.figures else 0

    @property
    def shares(self) -> tuple[Share, ...]:
        """One per class, corrected and raw; empty where nothing was measured."""
        return self.figures.shares if self.figures else ()

    @property
    def log_ratio(self) -> LogRatio | None:
        """As counted; two classes alone."""
        return self.figures.log_ratio if self.figures else None

    @property
    def log_ratio_corrected(self) -> LogRatio | None:
        """After correction for the classifier's error; two classes alone."""
        return self.figures.log_ratio_corrected if self.figures else None

    @cached_property
    def _distances(self) -> tuple[Measured | None, Measured | None]:
        from diffusion_lens.results.metrics import share_distances

        if self.figures is None:
            return None, None
        found = share_distances(self.figures.labels, self.figures.certain, self.figures.goal)
        fd, spd = (None if e is None else Measured(e.value, e.interval) for e in found)
        return fd, spd

    @property
    def fd(self) -> Measured | None:
        """Fairness discrepancy of decided images from the target; ``None`` without any."""
        return self._distances[0]

    @property
    def spd(self) -> Measured | None:
        """Largest difference between the shares of two classes; ``None`` without a decided image."""
        return self._distances[1]

    @property
    def fd_floor(self) -> float | None:
        """The 95 % point of FD's null."""
        return self.figures.fd_floor if self.figures else None

    @property
    def fid(self) -> float | None:
        """Fréchet distance to the unedited images of the same seeds, in the features that ``labels`` names."""
        return self.figures.fid if self.figures else None

    @property
    def agreement(self) -> dict[str, float] | None:
        """Other attribute → share of images that kept their class."""
        return self.figures.agreement if self.figures else None

    @property
    def kept(self) -> float | None:
        """Mean of ``agreement``."""
        return self.figures.kept if self.figures else None

    @cached_property
    def kept_measured(self) -> Measured | None:
        """``kept`` with its interval over images; ``None`` where the readings were not kept."""
        from diffusion_lens.results import stats

        each = None if self.figures is None else kept_by_image(self.figures)
        if each is None or len(each) < stats.MIN_PAIRS:
            return None
        found = stats.paired_bootstrap(np.mean, each)
        return Measured(found.value, found.interval)

    @property
    def certain(self) -> float | None:
        """Share of images that the classifier decides."""
        return float(self.figures.certain.mean()) if self.figures else None

    @property
    def activation_ratio(self) -> float | None:
        """Mean ``|h'| / |h|``."""
        return self.norm_ratio or (self.figures.activation_ratio if self.figures else None)

    @property
    def flagged(self) -> bool | None:
        """Whether ``activation_ratio`` lies beyond ``NORM_FLAG``."""
        ratio = self.activation_ratio
        return None if ratio is None else not 1 / NORM_FLAG <= ratio <= NORM_FLAG


def kept_by_image(figures: Figures) -> np.ndarray | None:
    """Share of the other attributes that each image kept, ``float [n]``; ``None`` where a reading is missing."""
    from diffusion_lens.results.metrics import decided_labels

    measured = figures.measurement
    if measured.reference is None or measured.recorded is not None:
        return None
    before = measured.reference.readings
    same = [
        decided_labels(p) == decided_labels(before[name])
        for name, p in measured.readings.items()
        if name != figures.attribute.name and name in before
    ]
    return np.mean(same, axis=0) if same else None


def kept_difference(row: MethodRow, other: MethodRow) -> Measured | None:
    """What ``row`` keeps above ``other``, paired over their images; ``None`` where they are not of the same seeds."""
    from diffusion_lens.results import stats

    if row.figures is None or other.figures is None or row.figures.request.seeds != other.figures.request.seeds:
        return None
    own, theirs = kept_by_image(row.figures), kept_by_image(other.figures)
    if own is None or theirs is None or len(own) < stats.MIN_PAIRS:
        return None
    found = stats.paired_bootstrap(np.mean, own - theirs)
    return Measured(found.value, found.interval)


def ranked(rows: Sequence[MethodRow]) -> tuple[MethodRow, ...]:
    """The rows with ``margin`` and ``rank``: ties within the interval are ties.

    Ranked are those that reach balance at some strength, controls among them; the rest have no rank.
    """
    random = next((row for row in rows if row.method == RANDOM and not row.note), None)
    playing = [row for row in rows if row.reached and row.strength and not row.note]
    found = []
    for row in rows:
        steered = row.method not in (UNSTEERED, RANDOM) and row.strength and not row.note
        margin = kept_difference(row, random) if steered and random is not None else None
        rank = None
        if row in playing:
            ahead = [kept_difference(other, row) for other in playing if other is not row]
            rank = 1 + sum(found is not None and found.interval[0] > 0 for found in ahead)
        found.append(replace(row, margin=margin, rank=rank))
    return tuple(found)


CSV_FIELDS = (
    "method", "name", "kind", "is_control", "goal", "strength", "strength_name", "n", "n_tune", "n_uncertain", "shares",
    "log_ratio", "log_ratio_corrected", "fd", "fd_floor", "fid", "inception", "image_likeness", "prompt_likeness",
    "spd", "subgroup_entropy", "agreement", "kept", "certain", "activation_ratio", "flagged", "seconds_to_fit",
    "seconds_per_image", "reached", "kept_measured", "margin", "rank", "explicit", "quality", "note",
)  # fmt: skip
"""Fields of a row in the order of the CSV's columns."""


def flat_row(row: MethodRow) -> dict[str, Any]:
    """A row's numbers by column name; intervals, shares and entropies in columns of their own."""
    flat: dict[str, Any] = {}
    for name in CSV_FIELDS:
        value = getattr(row, name)
        if name == "shares":
            for share in value:
                flat[f"share {share.label}"], flat[f"share {share.label} corrected"] = share.raw, share.corrected
                flat[f"share {share.label} low"], flat[f"share {share.label} high"] = share.corrected_interval
        elif isinstance(value, Measured | LogRatio):
            flat[name], (flat[f"{name} low"], flat[f"{name} high"]) = value.value, value.interval
            if isinstance(value, LogRatio):
                flat[f"{name} zero count"] = value.haldane
        elif isinstance(value, dict):
            flat.update({f"{name} {key}": number for key, number in value.items()})
        else:
            flat[name] = value
    return flat


ATTRIBUTED = ("difflens", "difflens-hold", "control-random", "control-flip", "control-noise")
"""Methods that steer the features of one attribution: the same for all of them, fitted on the same images."""
FITTED = {"attribution": "fitted"}


class CompareConfig(StrictConfig):
    """One table: an attribute, a prompt, and how much is drawn for each purpose.

    Attributes:
        methods: keys, or ``all``. n: images of the final row; ``n_tune``: images per strength of the curve, on which
            the best setting is chosen; ``n_fit``: images a method may be fitted on. The three use seeds of their own.
        fit_on: what every method may see while fitting: images of the prompt that is compared, or of all the lens's
            suggested ones (as in version 0.4). fit_prompts: a group of prompts stated in its place.
        protocol: ``balance`` reads every curve where it meets the target and draws there; ``points`` compares the best
            of the strengths tried, as version 0.4 did. n_refine: how often the place is measured anew; n_further: how
            many strengths a curve may be drawn further.
        n_explicit: images of prompts that name a class, for all classes together; 0 draws none.
        approach: ``draw`` gives each image a class drawn from the target shares; ``shift`` pushes all images towards
            the rarest class and lets the strength find the balance; ``auto`` shifts two classes and draws among more.
            Methods that aim at shares, or at nothing, get the target shares either way.
        target: class → share that FD is measured from; ``None`` is uniform.
        options: method key → options, in place of its defaults.
    """

    attribute: str
    prompt: str | None
    methods: tuple[str, ...] = ("all",)
    n: int = Field(default=500, ge=10, le=20_000)
    first_seed: int = 7_000_000
    n_tune: int = Field(default=48, ge=10, le=20_000)
    first_tune_seed: int = 8_000_000
    n_fit: int = Field(default=128, ge=4, le=20_000)
    first_fit_seed: int = 9_000_000
    fit_on: Literal["prompt", "lens"] = "prompt"
    fit_prompts: tuple[str | None, ...] | None = None
    protocol: Protocol = "balance"
    n_refine: int = Field(default=2, ge=0, le=10)
    n_further: int = Field(default=3, ge=0, le=10)
    n_explicit: int = Field(default=48, ge=0, le=20_000)
    first_explicit_seed: int = 10_000_000
    approach: Literal["auto", "draw", "shift"] = "auto"
    target: dict[str, float] | None = None
    options: dict[str, dict[str, Any]] = Field(default_factory=lambda: {k: dict(FITTED) for k in ATTRIBUTED})
    batch_size: int = Field(default=64, ge=1)
    n_examples: int = Field(default=8, ge=0)

    @model_validator(mode="after")
    def _separate(self) -> CompareConfig:
        spans = sorted(
            (
                (self.first_seed, self.n), (self.first_tune_seed, self.n_tune), (self.first_fit_seed, self.n_fit),
                (self.first_explicit_seed, self.n_explicit),
            )
        )  # fmt: skip
        if any(start + n > spans[i + 1][0] for i, (start, n) in enumerate(spans[:-1])):
            raise ValueError("final, tuning, fitting and explicit prompts' seeds must not overlap")
        return self

    @property
    def seen(self) -> str:
        """Which prompts a method may see while fitting, in words."""
        if self.fit_prompts is not None:
            return ", ".join("no prompt" if p is None else f"'{p}'" for p in self.fit_prompts)
        return "this prompt alone" if self.fit_on == "prompt" else "all the lens's suggested prompts"

    def seeds(self, purpose: Literal["final", "tune", "fit", "explicit"]) -> range:
        """The seeds of one purpose."""
        first, n = {
            "final": (self.first_seed, self.n),
            "tune": (self.first_tune_seed, self.n_tune),
            "fit": (self.first_fit_seed, self.n_fit),
            "explicit": (self.first_explicit_seed, self.n_explicit),
        }[purpose]
        return range(first, first + n)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """A finished table: the unsteered row first, then a row per method; curves are the tuning sweeps by method key.

    ``labels`` name the features and stand-ins behind FID, IS and the two likenesses. ``lens_key``, ``sae_id``,
    ``model_id`` and ``classifier_id`` say what was measured, and by which judge.
    """

    config: CompareConfig
    attribute: Attribute
    target: tuple[float, ...]
    rows: tuple[MethodRow, ...]
    curves: dict[str, SweepResult]
    labels: dict[str, str]
    rule: str
    lens_key: str
    sae_id: str
    model_id: str
    classifier_id: str

    def __repr__(self) -> str:
        of = f"{self.attribute.name} of {self.config.prompt!r}"
        return f"Comparison({of}, {len(self.rows)} methods, n = {self.config.n})"

    def to_frame(self) -> pd.DataFrame:
        """A row per method, with every number; intervals in columns of their own."""
        return display.frame([flat_row(row) for row in self.rows])

    def plot(self) -> go.Figure:
        """FD against what else was lost, every method's strengths."""
        return display.plot(self)

    def _repr_html_(self) -> str:
        names = ("name", "strength", "fd", "fd low", "fd high", "fd_floor", "kept", "certain", "n", "n_uncertain")
        rows = [{name: flat_row(row).get(name, "") for name in names} for row in self.rows]
        return display.page(repr(self), rows, note=self.rule)

    def row(self, method: str) -> MethodRow | None:
        """The row of a method; ``None`` where the table has none."""
        return next((row for row in self.rows if row.method == method), None)
