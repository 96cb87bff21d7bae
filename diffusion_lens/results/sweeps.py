"""A sweep: strength → ``Measurement`` on the same seeds; and the strength at which it meets a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffusion_lens.base.types import Attribute, Control, GenerationRequest, LensError
from diffusion_lens.results import display
from diffusion_lens.results.measurement import Figures

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SweepPoint(Figures):
    """The steered attribute's figures at one strength β."""

    beta: float

    def __repr__(self) -> str:
        return f"β = {self.beta:g}: {super().__repr__()}"


@dataclass(frozen=True, eq=False)
class SweepResult:
    """Strength × seeds: one point per β in rising order, plus what made them.

    Attributes:
        target: the class towards which the sweep leads.
        setting: what was steered, in words for a person; as data it stands in the points' edits.
        is_control: whether something else was steered in place of the attribute's own features: ``control`` says what,
            ``control_seed`` with which draw (sweeps of version 0.4 do not tell it).
        provenance: what else decided it: lens and SAE, or the fitted method.
    """

    points: tuple[SweepPoint, ...]
    attribute: Attribute
    target: str
    request: GenerationRequest
    setting: str
    classifier_id: str
    is_control: bool = False
    provenance: dict[str, str] = field(default_factory=dict)
    control: Control | None = None
    control_seed: int = 0

    def __repr__(self) -> str:
        ends = f"β {self.betas[0]:g} to {self.betas[-1]:g}" if self.points else "no points"
        control = ", control" if self.is_control else ""
        n = len(self.request.seeds)
        return f"SweepResult({self.attribute.name} of {self.request.prompt!r}, {ends}, {n} images each{control})"

    def to_frame(self) -> pd.DataFrame:
        """A row per strength and class, with n, undecided images, intervals and the log ratio."""
        return display.frame([
            {"beta": p.beta, **display.share_row(share), "FD": p.fd, "noise floor": p.fd_floor, "others kept": p.kept,
             **display.ratio_row(p.log_ratio_corrected)}
            for p in self.points for share in p.shares
        ])  # fmt: skip

    def plot(self) -> go.Figure:
        """The log ratio (the target's share, for more than two classes) against β."""
        return display.plot(self)

    def _repr_html_(self) -> str:
        column = self.attribute.index(self.target)
        rows = [{"β": p.beta, **display.share_row(p.shares[column]), "FD": p.fd} for p in self.points]
        pictures = [(f"β = {p.beta:g}", p.examples) for p in self.points]
        return display.page(repr(self), rows, pictures, self.setting)

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
    control: Control | None = None,
    control_seed: int = 0,
) -> SweepResult:
    """All points as one result, in rising β; a cancelled sweep's points may be collected too."""
    rising = tuple(sorted(points, key=lambda p: p.beta))
    if not rising:
        raise LensError("This sweep has no points; let it measure at least one beta.")
    first = rising[0]
    return SweepResult(
        rising, first.attribute, target, first.request, setting, first.classifier_id,
        is_control or control is not None, dict(provenance or {}), control, control_seed,
    )  # fmt: skip


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
