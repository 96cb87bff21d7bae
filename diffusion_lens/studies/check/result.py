"""What ``check`` finds: rows with a bar, a value, its interval and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from scipy.stats import norm

from diffusion_lens.results.counted import CountedShares
from diffusion_lens.results.sweeps import SweepResult

Interval = tuple[float, float]
Verdict = Literal["holds", "open", "fails", "not applicable", "information"]
Unit = Literal["share", "points", "number", "gap"]
SEVERITY: dict[Verdict, int] = {"fails": 0, "open": 1, "holds": 2, "information": 3, "not applicable": 4}


@dataclass(frozen=True)
class Row:
    """One thing measured against one bar.

    Attributes:
        part: the group it belongs to, 1 to 5.
        verdict: ``holds``: the value meets the bar; ``open``: it does not, but its interval reaches the bar;
            ``fails``: the whole interval lies beyond. ``information`` has no bar.
        margin: how far inside the bar the value lies (negative: beyond it), in the value's own unit.
        n: images (or drawings) behind the value.
    """

    part: int
    name: str
    bar: str
    verdict: Verdict
    value: float | None = None
    interval: Interval | None = None
    unit: Unit = "number"
    n: int = 0
    margin: float = 0.0
    note: str = ""


def at_least(
    part: int, name: str, value: float, interval: Interval | None, bar: float, unit: Unit, n: int, note: str = ""
) -> Row:
    """A row whose value should be ``bar`` or more; without an interval the value decides."""
    verdict: Verdict = "holds" if value >= bar else "open" if interval is not None and interval[1] >= bar else "fails"
    return Row(part, name, f"≥ {show(bar, unit)}", verdict, value, interval, unit, n, value - bar, note)


def at_most(
    part: int, name: str, value: float, interval: Interval | None, bar: float, unit: Unit, n: int, note: str = ""
) -> Row:
    """A row whose value should be ``bar`` or less; without an interval the value decides."""
    verdict: Verdict = "holds" if value <= bar else "open" if interval is not None and interval[0] <= bar else "fails"
    return Row(part, name, f"≤ {show(bar, unit)}", verdict, value, interval, unit, n, bar - value, note)


def not_applicable(part: int, name: str, why: str) -> Row:
    """A row that this lens cannot be measured on."""
    return Row(part, name, "–", "not applicable", note=why)


def worst(rows: Sequence[Row]) -> Row:
    """The row with the gravest verdict; among equals, the one with the least margin."""
    return min(rows, key=lambda row: (SEVERITY[row.verdict], row.margin))


def show(value: float, unit: Unit) -> str:
    """A value as text in its unit."""
    if unit == "share":
        return f"{value * 100:.1f} %"
    if unit == "points":
        return f"{value * 100:.1f} points"
    return f"{value:.1e}" if unit == "gap" else f"{value:.3g}"


def stretch(value: float, interval: Interval, comparisons: int) -> Interval:
    """A 95 % interval widened so that ``comparisons`` of them hold together (Bonferroni; our working form)."""
    factor = float(norm.ppf(1 - 0.025 / comparisons) / norm.ppf(0.975))
    return value - (value - interval[0]) * factor, value + (interval[1] - value) * factor


def visible(n: int, comparisons: int, bar: float, *, power: float = 0.8) -> float:
    """How far off a share near a half must be to fail with probability ``power`` on ``n`` images.

    To fail, its whole interval, which holds together with ``comparisons`` others, must lie beyond ``bar``: the bar,
    plus as many standard errors as interval and power ask for (normal approximation; our working form).
    """
    errors = norm.ppf(1 - 0.025 / comparisons) + norm.ppf(power)
    return float(bar + errors * 0.5 / n**0.5)


def distance(interval: Interval) -> Interval:
    """The interval of ``|x|`` for an ``x`` in ``interval``."""
    low, high = interval
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


@dataclass(frozen=True)
class CheckReport:
    """All rows of one check and what they were measured on.

    Attributes:
        full: every row must hold; otherwise (quick) none may fail.
        by_prompt: part 5's rows of every prompt that was swept; ``rows`` has the worst of the best professions.
        sweeps: the sweeps measured on the way, controls included.
        counted: the shares measured on the way; ``None`` where neither part 1 nor part 2 was asked for.
        sees: how far off a share must be for part 1 to see it, in one sentence; empty where it was not asked for.
    """

    rows: tuple[Row, ...]
    full: bool
    lens: str
    lens_id: str
    classifier_id: str
    first_seed: int
    device: str
    seconds: float
    by_prompt: tuple[Row, ...] = field(default=(), repr=False)
    sweeps: tuple[SweepResult, ...] = field(default=(), repr=False)
    counted: CountedShares | None = field(default=None, repr=False)
    sees: str = ""

    @property
    def holds(self) -> bool:
        """Whether the check is passed."""
        beyond: set[Verdict] = {"fails", "open"} if self.full else {"fails"}
        return not any(row.verdict in beyond for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: passed or not, and how many rows stand how."""
        counted = [row.verdict for row in self.rows]
        parts = [f"{counted.count(v)} {v}" for v in ("holds", "open", "fails", "not applicable") if v in counted]
        kind = "full check" if self.full else "quick check"
        outcome = "passed" if self.holds else "not passed"
        said = f"{kind} {outcome}: {', '.join(parts)} (lens {self.lens_id}, {self.seconds:.0f} s)"
        return f"{said}. {self.sees}" if self.sees else said
