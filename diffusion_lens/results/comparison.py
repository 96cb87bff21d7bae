"""What the bench measures and how it was asked to: plain records, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

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

Interval = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval; ``None`` stands for "too few images"."""

    value: float
    interval: Interval


@dataclass(frozen=True, eq=False)
class MethodRow:
    """One method at its best setting, on seeds that were not used to choose it.

    Attributes:
        goal: the class or shares it was fitted to. strength: chosen by ``RULE`` on ``n_tune`` images per strength.
        figures: what was measured, FD from the target; ``None`` where the method could not run.
        inception: over the heads that ``Comparison.labels`` names, the mean over the other attributes' heads.
        image_likeness, prompt_likeness: CLIP-I and CLIP-T, or their stand-ins, as ``labels`` says.
        subgroup_entropy: class → mean entropy of the reading, in nats, among the images read as that class.
        norm_ratio: mean ``|h'| / |h|`` where an edit changes the model and not h itself, measured apart.
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


CSV_FIELDS = (
    "method", "name", "kind", "is_control", "goal", "strength", "strength_name", "n", "n_tune", "n_uncertain", "shares",
    "log_ratio", "log_ratio_corrected", "fd", "fd_floor", "fid", "inception", "image_likeness", "prompt_likeness",
    "spd", "subgroup_entropy", "agreement", "kept", "certain", "activation_ratio", "flagged", "seconds_to_fit",
    "seconds_per_image", "note",
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


class CompareConfig(StrictConfig):
    """One table: an attribute, a prompt, and how much is drawn for each purpose.

    Attributes:
        methods: keys, or ``all``. n: images of the final row; ``n_tune``: images per strength of the curve, on which
            the best setting is chosen; ``n_fit``: images a method may be fitted on. The three use seeds of their own.
        fit_prompts: prompts of the fitting images; ``None``: the lens's suggested ones.
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
    fit_prompts: tuple[str | None, ...] | None = None
    approach: Literal["auto", "draw", "shift"] = "auto"
    target: dict[str, float] | None = None
    options: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"difflens": {"attribution": "fitted"}})
    batch_size: int = Field(default=64, ge=1)
    n_examples: int = Field(default=8, ge=0)

    @model_validator(mode="after")
    def _separate(self) -> CompareConfig:
        spans = sorted(
            ((self.first_seed, self.n), (self.first_tune_seed, self.n_tune), (self.first_fit_seed, self.n_fit))
        )
        if any(start + n > spans[i + 1][0] for i, (start, n) in enumerate(spans[:-1])):
            raise ValueError("final, tuning and fitting seeds must not overlap")
        return self

    def seeds(self, purpose: Literal["final", "tune", "fit"]) -> range:
        """The seeds of one purpose."""
        first, n = {
            "final": (self.first_seed, self.n),
            "tune": (self.first_tune_seed, self.n_tune),
            "fit": (self.first_fit_seed, self.n_fit),
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
