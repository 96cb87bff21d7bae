"""The curve under the slider: shares and log ratios against β, of the edit on screen or plainly of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from diffusion_lens.base.types import EditSpec, LensError, beta_of, strength_of
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.sweeps import SweepPoint, SweepResult
from diffusion_lens.studio import state
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio

Of = Literal["this", "recommended"]
"""Whose curve it is: of exactly the edit on screen, or of the recommended steer of the same prompt and class."""


@dataclass(frozen=True)
class CurvePoint:
    """What was counted at one strength, corrected for the classifier's error.

    Attributes:
        share: of the class steered towards, with its 95 % interval ``low`` to ``high``.
        ratio: ``ln(share / other class's share)`` with its interval, whose ends may be infinite; NaN for more classes
            than two. adjusted: the ratio stands in for that of a zero count.
    """

    beta: float
    share: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    adjusted: bool
    n: int
    n_uncertain: int


@dataclass(frozen=True)
class Curve:
    """Points in rising β, those of as many random features (``control``), and whose curve it is."""

    points: tuple[CurvePoint, ...]
    control: tuple[CurvePoint, ...]
    of: Of
    setting: str


def curve_for(studio: Studio, view: View) -> Curve | None:
    """The curve that belongs to a view; ``None`` where nothing was measured that it could be compared with.

    The view's own mix, measured in this app, goes before a stored sweep of the recommended steer; the latter is
    marked ``recommended`` where the view steers something else.
    """
    mix = studio.mixes.get(mix_key(studio.lens, view))
    if mix is not None:
        return of_results(studio.lens, mix, view, "this")
    own: Of = "this" if state.is_recommended(studio.lens, view) else "recommended"
    return of_results(studio.lens, studio.sweeps(view.prompt, view.attribute), view, own)


def mix_key(lens: DiffusionLens, view: View) -> View:
    """A view but for its strength and seeds: what a sweep over β measures."""
    return replace(view, beta=state.scale(lens.setting(view.attribute)).identity, n_seeds=8, first_seed=0)


def of_results(lens: DiffusionLens, results: Sequence[SweepResult], view: View, of: Of) -> Curve | None:
    """Some sweeps of one steer as the curve of ``view``'s class; ``None`` where they lead elsewhere."""
    mine = [(r, told) for r in results if (told := told_betas(lens, r, view.target)) is not None]
    main = next(((r, told) for r, told in mine if not r.is_control), None)
    if main is None or len(main[0].points) < 2:
        return None
    control = next(((r, told) for r, told in mine if r.control == "random" or r.is_control), None)
    return Curve(
        _points(*main, view.target), () if control is None else _points(*control, view.target), of, main[0].setting
    )


def told_betas(lens: DiffusionLens, result: SweepResult, target: str) -> tuple[float, ...] | None:
    """The strengths of a sweep as they count towards ``target``; ``None`` where it does not lead there.

    Of two classes with a pole each, a steer towards one is the same edit as towards the other at the mirrored strength.
    """
    if result.target == target:
        return result.betas
    setting = lens.settings.get(result.attribute.name)
    if setting is None or result.attribute.opposite(result.target) != target:
        return None
    told = tuple(beta_of(setting.mode, -strength_of(setting.mode, beta)) for beta in result.betas)
    ends = state.scale(setting)
    furthest = max(range(len(told)), key=lambda i: abs(told[i] - setting.identity))
    try:
        there = EditSpec((lens.intervention(setting.attribute, target, told[furthest]),))
        here = EditSpec((lens.intervention(setting.attribute, result.target, result.betas[furthest]),))
    except LensError:
        return None
    inside = all(ends.low - 1e-9 <= beta <= ends.high + 1e-9 for beta in told)
    return told if inside and there == here else None


def share_at(curve: Curve, beta: float) -> float:
    """The share between measured strengths, by straight lines."""
    return float(np.interp(beta, [p.beta for p in curve.points], [p.share for p in curve.points]))


def _points(result: SweepResult, told: Sequence[float], target: str) -> tuple[CurvePoint, ...]:
    made = [_point(point, beta, target) for point, beta in zip(result.points, told, strict=True)]
    return tuple(sorted((p for p in made if np.isfinite(p.share)), key=lambda p: p.beta))


def _point(point: SweepPoint, beta: float, target: str) -> CurvePoint:
    share = point.shares[point.attribute.index(target)]
    low, high = share.corrected_interval
    ratio = point.log_ratio_corrected
    if ratio is None:
        nan = float("nan")
        return CurvePoint(beta, share.corrected, low, high, nan, nan, nan, False, share.n, share.n_uncertain)
    value, ends = ratio.value, ratio.interval
    if ratio.numerator != target:
        value, ends = -value, (-ends[1], -ends[0])
    return CurvePoint(
        beta, share.corrected, low, high, value, *ends, ratio.haldane, share.n, share.n_uncertain
    )  # fmt: skip
