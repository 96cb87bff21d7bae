"""What the bench measures and how it was asked to: plain records, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import Attribute, LogRatio, Share, SweepResult

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


@dataclass(frozen=True)
class MethodRow:
    """One method at its best setting, on seeds that were not used to choose it.

    Attributes:
        goal: the class or shares it was fitted to. strength: chosen by ``RULE`` on ``n_tune`` images per strength.
        fd: from counts of decided images, against the target; ``fd_floor`` the 95 % point of its null.
        fid, inception: in the features and over the heads that their labels name (``labels``), FID against the
            unedited images of the same seeds; inception is the mean over the other attributes' heads.
        image_likeness, prompt_likeness: CLIP-I and CLIP-T, or their stand-ins, as ``labels`` says.
        spd: largest difference between the shares of two classes.
        subgroup_entropy: class → mean entropy of the reading, in nats, among the images read as that class.
        agreement: other attribute → share of images that kept their class; ``kept`` their mean.
        certain: share of images that the classifier decides.
        activation_ratio: mean ``|h'| / |h|``; ``flagged`` beyond ``NORM_FLAG``.
        note: why there are no numbers, where there are none.
    """

    method: str
    name: str
    kind: str
    is_control: bool
    goal: str
    strength: float
    strength_name: str
    n: int
    n_tune: int
    n_uncertain: int
    shares: tuple[Share, ...] = ()
    log_ratio: LogRatio | None = None
    log_ratio_corrected: LogRatio | None = None
    fd: Measured | None = None
    fd_floor: float | None = None
    fid: float | None = None
    inception: float | None = None
    image_likeness: Measured | None = None
    prompt_likeness: Measured | None = None
    spd: Measured | None = None
    subgroup_entropy: dict[str, float] | None = None
    agreement: dict[str, float] | None = None
    kept: float | None = None
    certain: float | None = None
    activation_ratio: float | None = None
    flagged: bool | None = None
    seconds_to_fit: float | None = None
    seconds_per_image: float | None = None
    note: str = ""


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


@dataclass(frozen=True)
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

    def row(self, method: str) -> MethodRow | None:
        """The row of a method; ``None`` where the table has none."""
        return next((row for row in self.rows if row.method == method), None)
