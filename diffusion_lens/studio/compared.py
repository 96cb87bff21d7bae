"""What a stored comparison of methods says: a row a method before and after, curves on one scale, one headline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion_lens.results.comparison import UNSTEERED, Comparison, Measured, MethodRow
from diffusion_lens.results.measurement import Figures
from diffusion_lens.results.sweeps import SweepPoint

DISTANCE = "distance from the target"
"""The measure that every attribute has: fairness discrepancy."""

SHARE = "share "
REWRITING = "control-prompt"
Band = Literal["methods", "outside", "controls"]
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Axis:
    """The scale of one measure.

    Attributes:
        low, high: its ends. goal: the value of the target.
        noise: where values lie, 95 % of times, of ``n`` images that truly follow the target.
    """

    measure: str
    low: float
    high: float
    goal: float
    noise: tuple[float, float]
    n: int
    is_share: bool


@dataclass(frozen=True)
class Result:
    """One method at its best setting.

    Attributes:
        before, after: its measure without it and with it, with the 95 % interval of ``after``.
        moved: whether any strength was better than none. reaches: whether it is at the target within noise.
        kept: share of the other attributes' readings that stayed, averaged, with its interval over images.
        lost: the attribute that changed in most images, and in what share of them.
        starred: whether it keeps more than every other method that reaches the target, beyond the paired 95 %
            interval of the difference.
    """

    row: MethodRow
    band: Band
    before: float
    after: float
    interval: tuple[float, float]
    moved: bool
    reaches: bool
    kept: Measured | None
    lost: tuple[str, float] | None
    starred: bool


@dataclass(frozen=True)
class CurvePoint:
    """One strength tried while tuning."""

    strength: float
    value: float
    n: int
    n_uncertain: int


@dataclass(frozen=True)
class Curve:
    """A method's measure along its own strengths; ``chosen``: the strength of its best setting."""

    name: str
    band: Band
    strength_name: str
    points: tuple[CurvePoint, ...]
    chosen: float


@dataclass(frozen=True)
class Shown:
    """A comparison in one measure: results in bands, curves with a noise band of their own number of images."""

    comparison: Comparison
    axis: Axis
    results: tuple[Result, ...]
    curves: tuple[Curve, ...]
    curve_axis: Axis
    headline: str


def measures(comparison: Comparison, target: str | None = None) -> list[str]:
    """What can be shown, the most telling first: the share of ``target`` of two classes, else the distance."""
    labels = list(comparison.attribute.classes)
    if target in labels:
        labels.sort(key=lambda label: label != target)
    if len(labels) == 2:
        return [SHARE + labels[0], DISTANCE]
    return [DISTANCE, *(SHARE + label for label in labels)]


def shown(comparison: Comparison, measure: str) -> Shown:
    """The comparison in one of its ``measures``; of another, the first of them."""
    known = [DISTANCE, *(SHARE + label for label in comparison.attribute.classes)]
    measure = measure if measure in known else measures(comparison)[0]
    base = comparison.row(UNSTEERED)
    others = [row for row in comparison.rows if row.method != UNSTEERED]
    reaching = [row for row in others if reaches(row)]
    results = tuple(_result(row, base, comparison, measure, reaching) for row in others)
    curves = tuple(
        Curve(row.name, band(row), row.strength_name, _points(comparison, row, measure), row.strength)
        for row in others
        if row.method in comparison.curves
    )
    drawn = [value for r in results for value in (r.before, r.after, *r.interval)]
    on_curves = [point.value for curve in curves for point in curve.points]
    return Shown(
        comparison,
        axis(comparison, measure, comparison.config.n, drawn),
        results,
        curves,
        axis(comparison, measure, comparison.config.n_tune, on_curves),
        headline(comparison),
    )


def band(row: MethodRow) -> Band:
    """Where a row stands: methods, what works without opening the model, controls that should do nothing."""
    if row.method == REWRITING:
        return "outside"
    return "controls" if row.is_control else "methods"


def reaches(row: MethodRow) -> bool:
    """Whether a method is at the target: its FD lies within what chance alone gives at this number of images."""
    return bool(row.strength and not row.note and row.fd and row.fd_floor and row.fd.value <= row.fd_floor)


def kept_per_image(figures: Figures) -> np.ndarray | None:
    """Share of the other attributes that kept their class, image by image ``[n]``; ``None`` where that is not kept."""
    from diffusion_lens.results.metrics import decided_labels

    now, reference = figures.measurement, figures.measurement.reference
    if reference is None:
        return None
    names = [name for name in now.readings if name != figures.attribute.name and name in reference.readings]
    if not names:
        return None
    same = [decided_labels(reference.readings[name]) == decided_labels(now.readings[name]) for name in names]
    return np.mean(same, axis=0)


def axis(comparison: Comparison, measure: str, n: int, values: list[float]) -> Axis:
    """The scale of a measure: 0 to 1 for shares, 0 to a bit beyond all ``values`` for distances."""
    from diffusion_lens.results.metrics import fd_null_floor

    goal = np.array(comparison.target)
    if not measure.startswith(SHARE):
        known = [value for value in values if np.isfinite(value)]
        high = max(0.2, np.ceil(10 * max(known, default=1.0)) / 10)
        return Axis(measure, 0.0, float(high), 0.0, (0.0, fd_null_floor(n, goal)), n, False)
    from scipy.stats import binom

    share = float(goal[comparison.attribute.index(measure.removeprefix(SHARE))])
    low, high = (float(binom.ppf(q, n, share)) / n for q in (0.025, 0.975))
    return Axis(measure, 0.0, 1.0, share, (low, high), n, True)


def headline(comparison: Comparison) -> str:
    """Who reaches the target, and at which cost to everything else, in one or two sentences."""
    others = [row for row in comparison.rows if row.method != UNSTEERED and not row.note]
    reaching = [row for row in others if reaches(row)]
    subject = f"On {subject_of(comparison.config.prompt)}"
    goal = "balance" if len(set(comparison.target)) == 1 else "the target"
    by_band = {name: [row for row in reaching if band(row) == name] for name in ("methods", "outside", "controls")}
    n_methods = sum(band(row) == "methods" for row in others)
    if not reaching:
        return f"{subject}, none of {count(n_methods)} methods reaches {goal}, nor does anything else that was tried."
    who = []
    if by_band["methods"]:
        many = len(by_band["methods"])
        only = by_band["methods"][0].name + (f" alone of {count(n_methods)} methods" if n_methods > 1 else "")
        who.append(f"{count(many)} of {count(n_methods)} methods" if many > 1 else only)
    who += ["rewriting the prompt"] * bool(by_band["outside"])
    verb = "reach" if len(by_band["methods"]) > 1 or len(who) > 1 else "reaches"
    said = f"{subject}, {' and '.join(who) or 'no method'} {verb if who else 'reaches'} {goal}"
    if by_band["controls"]:
        said += f"; so does {listed([row.name.removeprefix('Control: ') for row in by_band['controls']])}, a control"
    return f"{said}. {_cheapest([row for row in reaching if band(row) != 'controls'])}".strip()


def _cheapest(rows: list[MethodRow]) -> str:
    """Which of the rows keeps most of everything else, and whether that is sure."""
    ranked = sorted((row for row in rows if row.kept is not None), key=lambda row: -(row.kept or 0))
    if len(ranked) < 2:
        return f"It keeps {ranked[0].kept:.0%} of everything else." if ranked else ""
    first, second = ranked[:2]
    name, other = (plain_name(row) for row in (first, second))
    told = f"({first.kept:.0%} of other attributes kept; {other} {second.kept:.0%})"
    if not _keeps_more(first, second):
        return f"Which costs least cannot be told: {name} and {other} change about as much besides {told}."
    return f"{name[:1].upper()}{name[1:]} costs least {told}."


def plain_name(row: MethodRow) -> str:
    """A method as a sentence names it."""
    return "rewriting the prompt" if row.method == REWRITING else row.name


def subject_of(prompt: str | None) -> str:
    """What was drawn, in words: ``“a portrait of a nurse”``."""
    return "images without a prompt" if prompt is None else f"“{prompt}”" if prompt else "images of the empty prompt"


def count(n: int) -> str:
    """A small number in words."""
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def listed(names: list[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _result(
    row: MethodRow, base: MethodRow | None, comparison: Comparison, measure: str, reaching: list[MethodRow]
) -> Result:
    before = float("nan") if base is None else _value(base, comparison, measure)[0]
    after, interval = _value(row, comparison, measure)
    moved = bool(row.strength) and not row.note
    lost = min((row.agreement or {}).items(), key=lambda pair: pair[1], default=None)
    rivals = [other for other in reaching if other is not row]
    starred = row in reaching and bool(rivals) and all(_keeps_more(row, other) for other in rivals)
    return Result(
        row, band(row), before, after, interval, moved, row in reaching, kept(row),
        None if lost is None or not moved else (lost[0], 1 - lost[1]), starred,
    )  # fmt: skip


def _value(row: MethodRow, comparison: Comparison, measure: str) -> tuple[float, tuple[float, float]]:
    """The measure of a row, and its interval; NaN where it was not measured."""
    missing = float("nan"), (float("nan"), float("nan"))
    if row.figures is None:
        return missing
    if measure.startswith(SHARE):
        share = row.shares[comparison.attribute.index(measure.removeprefix(SHARE))]
        return share.corrected, share.corrected_interval
    return missing if row.fd is None else (row.fd.value, row.fd.interval)


def _points(comparison: Comparison, row: MethodRow, measure: str) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(point.beta, _point_value(comparison, point, measure), first.n, first.n_uncertain)
        for point in comparison.curves[row.method].points
        for first in point.shares[:1]
    )


def _point_value(comparison: Comparison, point: SweepPoint, measure: str) -> float:
    if not measure.startswith(SHARE):
        return float(point.fd)
    return float(point.shares[comparison.attribute.index(measure.removeprefix(SHARE))].corrected)


def kept(row: MethodRow) -> Measured | None:
    """Share of the other attributes' readings that stayed, with its 95 % interval over images (normal approximation).

    Where a table of version 0.4 kept no single images, the interval is that of attributes that all change together:
    the widest it can be.
    """
    if row.figures is None or row.kept is None:
        return None
    found = kept_per_image(row.figures)
    if found is not None and len(found) > 1:
        return _around(float(found.mean()), float(found.std(ddof=1)) / len(found) ** 0.5)
    return _around(row.kept, _widest_error(row))


def _widest_error(row: MethodRow) -> float:
    shares = np.array(list((row.agreement or {}).values()))
    return float(np.sqrt(shares * (1 - shares) / max(1, row.n)).mean()) if shares.size else 0.0


def _around(mean: float, error: float) -> Measured:
    return Measured(mean, (max(-1.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error)))


def _keeps_more(first: MethodRow, second: MethodRow) -> bool:
    """Whether the first keeps more than the second beyond chance: image by image on the same seeds where it is known.

    Without single images the two are taken as independent, with the widest intervals: nothing is sure too soon.
    """
    if first.figures is None or second.figures is None or first.kept is None or second.kept is None:
        return False
    pair = kept_per_image(first.figures), kept_per_image(second.figures)
    if pair[0] is not None and pair[1] is not None and len(pair[0]) == len(pair[1]) > 1:
        gaps = pair[0] - pair[1]
        return bool(gaps.mean() > 1.96 * gaps.std(ddof=1) / len(gaps) ** 0.5)
    error = float(np.hypot(_widest_error(first), _widest_error(second)))
    return first.kept - second.kept > 1.96 * error


def stars(comparison: Comparison) -> dict[str, str]:
    """Column → the one method whose value is best beyond its interval; columns where none stands apart are left out.

    The unsteered model and methods that did not surely move anything take no part: whoever changes nothing keeps
    everything.
    """
    from diffusion_lens.results.comparison_tables import BEST, movers, number

    playing, found = movers(comparison), {}
    for field, cost in BEST.items():
        ranked = sorted(
            (row for row in playing if number(row, field) is not None),
            key=lambda row, field=field, cost=cost: cost(number(row, field)),  # type: ignore[misc]
        )
        if len(ranked) > 1 and all(_stand_apart(ranked[0], other, field) for other in ranked[1:]):
            found[field] = ranked[0].method
    return found


def _stand_apart(first: MethodRow, second: MethodRow, field: str) -> bool:
    if field == "kept":
        return _keeps_more(first, second)
    own, other = (getattr(getattr(row, field), "interval", None) for row in (first, second))
    return own is not None and other is not None and (own[1] < other[0] or other[1] < own[0])
