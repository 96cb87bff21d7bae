"""The β at which a measured curve meets a target share, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import isotonic_regression

from diffusion_lens.base.types import LensError
from diffusion_lens.results import stats
from diffusion_lens.results.sweeps import Balance, SweepPoint, SweepResult


def balance(
    result: SweepResult,
    confusion: np.ndarray,
    *,
    target_share: float = 0.5,
    label: str | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Balance:
    """The β at which the corrected share of ``label`` (default: the sweep's target) meets ``target_share``.

    Our working form: isotonic regression of the corrected shares over the measured β, linear between them. The
    interval redraws seeds, the same ones at every β, and the confusion's rows. Points with fewer than
    ``stats.MIN_PAIRS`` decided images are left out.
    """
    label = label or result.target
    column = result.attribute.index(label)
    if not 0 < target_share < 1:
        raise LensError(f"A target share lies between 0 and 1, both excluded; it is {target_share}.")
    usable = [p for p in result.points if int(p.certain.sum()) >= stats.MIN_PAIRS]
    if len(usable) < 2:
        raise LensError(f"Finding a balance needs >= 2 betas with >= {stats.MIN_PAIRS} decided images each.")
    betas = np.array([p.beta for p in usable])
    curves = _corrected_curves(usable, len(result.attribute.classes), confusion, n_boot, seed)[..., column]
    rising = bool(_misfit(curves[0], True) <= _misfit(curves[0], False))
    fits = np.stack([isotonic_regression(c, increasing=rising).x for c in curves])
    draws = np.array([crossing(betas, fit, target_share, rising=rising) for fit in fits])
    reached = bool(np.isfinite(draws[0]))
    beta = float(np.clip(draws[0], betas[0], betas[-1]))
    tails = ((1 - level) / 2, (1 + level) / 2)
    # An actual draw at each end: between a finite β and an infinite one there is nothing to interpolate.
    low, high = (float(q) for q in np.quantile(draws[1:], tails, method="inverted_cdf"))
    at_beta = np.array([np.interp(beta, betas, fit) for fit in fits])
    share_low, share_high = (float(q) for q in np.quantile(at_beta[1:], tails))
    found = Balance(
        beta=beta,
        interval=(min(beta, max(low, float(betas[0]))), max(beta, min(high, float(betas[-1])))),
        reached=reached,
        open_below=bool(low < betas[0]),
        open_above=bool(high > betas[-1]),
        label=label,
        target_share=target_share,
        share=float(at_beta[0]),
        share_interval=(min(share_low, float(at_beta[0])), max(share_high, float(at_beta[0]))),
        off_curve=float(np.abs(curves[0] - fits[0]).max()),
        note="",
    )
    return replace(found, note=_say(found, betas))


def crossing(betas: np.ndarray, fit: np.ndarray, target: float, *, rising: bool) -> float:
    """Where the monotone, piecewise linear ``fit`` over rising ``betas`` meets ``target``.

    The middle of a plateau that lies at the target; ``-inf`` or ``inf`` where the curve would meet it below or
    above the measured range.
    """
    y, goal = (fit, target) if rising else (-fit, -target)
    if goal < y[0]:
        return float("-inf")
    if goal > y[-1]:
        return float("inf")
    first = int(np.searchsorted(y, goal, side="left"))
    last = int(np.searchsorted(y, goal, side="right")) - 1
    return (_meet(betas, y, goal, first - 1) + _meet(betas, y, goal, last)) / 2


def _meet(betas: np.ndarray, y: np.ndarray, goal: float, left: int) -> float:
    """β at which the segment right of point ``left`` meets ``goal``; the curve's end where there is none."""
    if left < 0 or left + 1 == len(betas):
        return float(betas[max(left, 0)])
    share = (goal - y[left]) / (y[left + 1] - y[left])
    return float(betas[left] + share * (betas[left + 1] - betas[left]))


def _corrected_curves(
    points: Sequence[SweepPoint], n_classes: int, confusion: np.ndarray, n_boot: int, seed: int
) -> np.ndarray:
    """Corrected shares ``[1 + n_boot, β, class]``: the measured ones, then bootstrap rounds."""
    rates = stats.error_rates(confusion)
    if len({len(p.labels) for p in points}) != 1:
        raise LensError("The points of this sweep have different seeds; measure them on the same ones.")
    answers = np.stack([np.eye(n_classes)[p.labels] * p.certain[:, None] for p in points], axis=1)  # [seed, β, class]
    rng = np.random.default_rng(seed)
    n = len(answers)
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=n_boot)])
    counts = np.tensordot(weights, answers, axes=1)
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    drawn = np.concatenate([rates[None], stats.draw_shares(np.asarray(confusion), n_boot, rng)])
    spread = np.broadcast_to(drawn[:, None], (*shares.shape, n_classes)).reshape(-1, n_classes, n_classes)
    return stats.invert_errors(spread, shares.reshape(-1, n_classes)).reshape(shares.shape)


def _misfit(curve: np.ndarray, rising: bool) -> float:
    return float(((curve - isotonic_regression(curve, increasing=rising).x) ** 2).sum())


def _say(found: Balance, betas: np.ndarray) -> str:
    goal = f"{found.target_share * 100:.0f} % {found.label}"
    if not found.reached:
        return (
            f"A share of {goal} is not reached between β = {betas[0]:g} and {betas[-1]:g}; "
            f"the nearest is {found.share * 100:.0f} % at β = {found.beta:g}."
        )
    low, high = found.interval
    span = f"{'below ' if found.open_below else ''}{low:.2f} to {'above ' if found.open_above else ''}{high:.2f}"
    return f"A share of {goal} is met at β = {found.beta:.2f} (95 % interval {span})."
