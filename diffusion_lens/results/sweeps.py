"""A sweep: strength → ``Measurement`` on the same seeds; and the strength at which it meets a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from diffusion_lens.base.types import Attribute, GenerationRequest, LensError
from diffusion_lens.results.measurement import Figures


@dataclass(frozen=True, eq=False, kw_only=True)
class SweepPoint(Figures):
    """The steered attribute's figures at one strength β."""

    beta: float


@dataclass(frozen=True, eq=False)
class SweepResult:
    """Strength × seeds: one point per β in rising order, plus what made them.

    Attributes:
        target: the class towards which the sweep leads. setting: what was steered, in words for a person.
        is_control: whether random features or exchanged poles were steered in place of the attribute's own.
        provenance: what else decided it: lens, SAE, control.
    """

    points: tuple[SweepPoint, ...]
    attribute: Attribute
    target: str
    request: GenerationRequest
    setting: str
    classifier_id: str
    is_control: bool = False
    provenance: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        ends = f"β {self.betas[0]:g} to {self.betas[-1]:g}" if self.points else "no points"
        control = ", control" if self.is_control else ""
        n = len(self.request.seeds)
        return f"SweepResult({self.attribute.name} of {self.request.prompt!r}, {ends}, {n} images each{control})"

    @property
    def betas(self) -> tuple[float, ...]:
        """The strengths measured, rising."""
        return tuple(p.beta for p in self.points)


def collect(
    points: Iterable[SweepPoint],
    *,
    target: str,
    setting: str,
    is_control: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> SweepResult:
    """All points as one result, in rising β; a cancelled sweep's points may be collected too."""
    rising = tuple(sorted(points, key=lambda p: p.beta))
    if not rising:
        raise LensError("This sweep has no points; let it measure at least one beta.")
    first = rising[0]
    return SweepResult(
        rising, first.attribute, target, first.request, setting, first.classifier_id, is_control, dict(provenance or {})
    )


@dataclass(frozen=True)
class Balance:
    """The strength that meets a target share, read off a measured sweep.

    Attributes:
        beta: where the monotone curve meets the target; the nearest measured strength if it never does.
        interval: 95 % interval of ``beta``, cut to the measured range; ``open_below``/``open_above`` say that
            it runs past that end.
        reached: whether the target lies within the measured range.
        share: corrected share of ``label`` on the curve at ``beta``, with its interval.
        off_curve: largest distance of a measured share from the monotone curve (over-steering shows here).
        note: one sentence that says all this.
    """

    beta: float
    interval: tuple[float, float]
    reached: bool
    open_below: bool
    open_above: bool
    label: str
    target_share: float
    share: float
    share_interval: tuple[float, float]
    off_curve: float
    note: str
