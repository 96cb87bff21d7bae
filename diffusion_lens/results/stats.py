"""Intervals: counts, pairs, prompts, and correction for the classifier's error.

scipy and statsmodels do the standard things. Written here is what no library has: the Lang–Reiczigel
interval, shares of several classes corrected on the simplex, and the bootstrap over prompts and seeds.
Intervals are ``(low, high)`` at 95 % unless ``level`` says otherwise. Random draws come from ``seed`` alone.

What an interval promises is tested: ``tests/results/test_coverage.py`` simulates 8 to 1,000 images of two to four
classes with shares from 0 to 1, and fails where fewer than 93 % of the nominal 95 % intervals hold the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtri

from diffusion_lens.base.types import Attribute, LensError, LogRatio, Share

Interval = tuple[float, float]

MIN_LABELLED = 10
"""Labelled images per true class below which a classifier's error is not estimated."""

MAX_CONDITION = 10.0
"""Largest 2-norm condition number of ``P(read | true)`` that is inverted; 10 is a two-class reading with
sensitivity + specificity of about 1.1, hardly better than a coin."""

MIN_PAIRS = 10
"""Images below which nothing is bootstrapped."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class CorrectedShares:
    """Shares ``[class]`` on the simplex, their intervals ``[class, 2]`` and the condition of what was inverted."""

    values: np.ndarray
    intervals: np.ndarray
    condition: float


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of paired answers: ``gained`` turned true, ``lost`` turned false."""

    gained: int
    lost: int
    p_value: float


def share_interval(k: int, n: int, *, level: float = 0.95) -> Interval:
    """Exact interval of a share ``k / n`` (Clopper and Pearson, 1934): covers at least ``level`` for any n and share.

    Wilson's is narrower, but for rare classes it holds as little as 84 % (85 % at n = 8 and a share of .02).
    """
    _check_count(k, n)
    tail = (1 - level) / 2
    low = betaincinv(k, n - k + 1, tail) if k > 0 else 0.0
    high = betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0
    return float(low), float(high)


def imprecise_interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    counts: np.ndarray,
    *,
    more: Sequence[int] | None = None,
    level: float = 0.95,
    n_draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ``statistic``, a function of shares ``[draw, class] → [draw]``, from ``counts [class]``.

    Shares are drawn from a Dirichlet distribution of the counts plus one more image, of the class that moves each end
    furthest outwards (one of ``more``, if given): the imprecise Dirichlet model (Walley 1996) with s = 1. For one share
    this is the exact interval of ``share_interval``. Its low end is not for a distance, which no draw puts at 0: see
    ``metrics.fd_interval``.
    """
    rng = np.random.default_rng(seed)
    gammas = rng.standard_gamma(np.asarray(counts, dtype=np.float64), size=(n_draws, len(counts)))
    one = rng.standard_exponential(n_draws)[:, None]
    total = gammas.sum(axis=1, keepdims=True) + one
    tails = (1 - level) / 2, (1 + level) / 2
    places = np.eye(len(counts))[slice(None) if more is None else list(more)]
    ends = [np.quantile(statistic((gammas + one * place) / total), tails) for place in places]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def mcnemar(before: np.ndarray, after: np.ndarray) -> McNemar:
    """Exact McNemar test of boolean ``before, after [n]`` read on the same seeds."""
    before, after = _pair(before, after)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    table = [[int((before & after).sum()), lost], [gained, int((~before & ~after).sum())]]
    from statsmodels.stats import contingency_tables  # late: it takes longer than all that is shown first

    return McNemar(gained, lost, float(contingency_tables.mcnemar(table, exact=True).pvalue))


def paired_difference(before: np.ndarray, after: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Change of a share between boolean ``before, after [n]`` read on the same seeds; interval: ``agresti_min``."""
    before, after = _pair(before, after)
    n, gained, lost = before.size, int((~before & after).sum()), int((before & ~after).sum())
    return Estimate((gained - lost) / n, agresti_min(gained, lost, n, level=level))


def agresti_min(a: int, b: int, n: int, *, level: float = 0.95) -> Interval:
    """Interval of the difference of two shares ``(a - b) / n`` of the same ``n`` images.

    Adjusted Wald (Agresti and Min 2005): ½ is added to each of the four cells of the paired table.
    """
    shift = (a - b) / (n + 2)
    half = _z(level) * np.sqrt((a + b + 1) / (n + 2) - shift**2) / np.sqrt(n + 2)
    return max(-1.0, float(shift - half)), min(1.0, float(shift + half))


def log_ratio_interval(k_a: int, k_b: int, *, numerator: str, denominator: str, level: float = 0.95) -> LogRatio:
    """``ln(k_a / k_b)`` of two classes' counts; its interval is the log odds of the share's exact interval.

    Where a count is zero, the interval is open towards it (an infinite end), and ½ is added to both counts for the
    value (Haldane–Anscombe), which ``haldane`` says.
    """
    if k_a < 0 or k_b < 0 or k_a + k_b == 0:
        raise LensError(f"A log ratio needs >= 1 counted image; the counts are {k_a} and {k_b}.")
    haldane = k_a == 0 or k_b == 0
    value = float(np.log((k_a + 0.5 * haldane) / (k_b + 0.5 * haldane)))
    low, high = (_logit(p) for p in share_interval(k_a, k_a + k_b, level=level))
    return LogRatio(value, (low, high), numerator, denominator, haldane)


def share_log_ratio(share: Estimate, n: int, *, numerator: str, denominator: str) -> LogRatio:
    """``ln(p / (1 - p))`` of a corrected share over ``n`` images, interval carried through.

    Where the share's interval reaches 0 or 1, the ratio's has an infinite end there. The value alone is kept at least
    ``½ / (n + 1)`` from 0 and 1, where a Haldane-adjusted zero count would stand; ``haldane`` says that this moved it.
    """
    edge = 0.5 / (n + 1)
    held = float(np.clip(share.value, edge, 1 - edge))
    value, low, high = (_logit(p) for p in (held, *share.interval))
    return LogRatio(value, (min(low, value), max(high, value)), numerator, denominator, held != share.value)


def error_rates(confusion: np.ndarray) -> np.ndarray:
    """``P(read | true)`` as ``[true, read]`` from counts; refuses tables too small or too muddled to invert."""
    counts = np.asarray(confusion, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.shape[0] < 2 or (counts < 0).any():
        raise LensError(f"A confusion matrix is square, [true, read] counts; this one has shape {counts.shape}.")
    if counts.sum(axis=1).min() < MIN_LABELLED:
        raise LensError(
            f"Correcting for the classifier's error needs >= {MIN_LABELLED} labelled images of every class; "
            f"the rarest has {counts.sum(axis=1).min():g}."
        )
    rates = counts / counts.sum(axis=1, keepdims=True)
    condition = float(np.linalg.cond(rates))
    if condition > MAX_CONDITION or (len(rates) == 2 and np.trace(rates) <= 1):
        raise LensError(
            f"The classifier mixes up these classes too often to correct for (condition number {condition:.3g}, "
            f"limit {MAX_CONDITION:g}); use a better classifier or merge classes."
        )
    return rates


def rogan_gladen(k: int, n: int, confusion: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Share of class 1 after correction for a two-class classifier's error.

    Value: Rogan and Gladen (1978), ``(k/n + Sp - 1) / (Se + Sp - 1)``, cut to [0, 1]. Interval: Lang and
    Reiczigel (2014), which counts the uncertainty of Se and Sp too, widened where need be to hold the exact interval
    of ``k / n`` corrected alike (with few images and a well-known classifier theirs alone falls to 92 %).

    Args:
        k: images read as class 1, of ``n`` decided ones.
        confusion: counts ``[true, read]`` of labelled held-out images, ``[2, 2]``.
    """
    _check_count(k, n)
    rates = error_rates(confusion)
    if len(rates) != 2:
        raise LensError(f"Rogan-Gladen corrects two classes; this confusion has {len(rates)}: use correct_shares.")
    value, *exact = (_corrected(q, rates) for q in (k / n, *share_interval(k, n, level=level)))
    (tn, fp), (fn, tp) = np.asarray(confusion, dtype=np.float64)
    z = _z(level)
    n_read, n_se, n_sp = n + z**2, tp + fn + 2, tn + fp + 2
    read, se, sp = (k + z**2 / 2) / n_read, (tp + 1) / n_se, (tn + 1) / n_sp
    gain = se + sp - 1
    if gain <= 0:
        raise LensError("The classifier reads these classes no better than a coin; use a better one.")
    p = (read + sp - 1) / gain
    var_se, var_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    centre = p + 2 * z**2 * (p * var_se - (1 - p) * var_sp)
    half = z * np.sqrt(read * (1 - read) / n_read + p**2 * var_se + (1 - p) ** 2 * var_sp) / gain
    low, high = np.clip((centre - half, centre + half), 0, 1)
    return Estimate(value, (min(exact[0], float(low)), max(exact[1], float(high))))


def _corrected(q: float, rates: np.ndarray) -> float:
    """Rogan and Gladen's share of class 1 where ``q`` is read as class 1, cut to [0, 1]."""
    return float(np.clip((q + rates[0, 0] - 1) / (rates[1, 1] + rates[0, 0] - 1), 0, 1))


def simplex_least_squares(rates: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The ``p`` on the simplex that minimises ``|ratesᵀ p - shares|``; ``rates [true, read], shares [read]``."""
    weight = 1e4  # a heavy row that makes the entries sum to one
    system = np.vstack([rates.T, np.full(len(rates), weight)])
    from scipy.optimize import nnls  # late: the app's first view needs no solver

    p, _ = nnls(system, np.append(shares, weight))
    return p / p.sum()


def draw_shares(counts: np.ndarray, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Parametric bootstrap of rows of counts ``[..., class]`` → shares ``[n_draws, ..., class]``.

    Dirichlet with ``1 / class`` added to every cell (Jeffreys' ½ for two classes), so that a zero count does
    not pretend to be certain.
    """
    alpha = np.asarray(counts, dtype=np.float64) + 1 / counts.shape[-1]
    draws = rng.standard_gamma(alpha, size=(n_draws, *alpha.shape))
    return draws / draws.sum(axis=-1, keepdims=True)


def invert_errors(rates: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Solve ``ratesᵀ p = shares`` on the simplex, row by row: ``[b, C, C], [b, C] → [b, C]``."""
    p = np.linalg.solve(np.swapaxes(rates, -1, -2), shares[..., None])[..., 0]
    for row in np.flatnonzero((p < 0).any(axis=-1)):
        p[row] = simplex_least_squares(rates[row], shares[row])
    return p


def correct_shares(counts: np.ndarray, confusion: np.ndarray, *, level: float = 0.95) -> CorrectedShares:
    """Shares of several classes after correction for the classifier's error.

    Values: constrained least squares on ``ratesᵀ p = q`` over the simplex. Intervals, one class at a time (our working
    form): with ``w`` the row of the inverse that reads this class out of ``q``, a share ``θ`` is kept if ``w·q - θ``
    lies within the error of ``w·q`` and of each true class's ``w·rates``, weighted with its share; errors are added as
    squares, each towards its own side (MOVER: Zou and Donner 2008; in two classes Fieller's ratio). Where the
    classifier makes no error, these are the exact intervals of ``share_interval``.

    Args:
        counts: decided images per class, ``[class]``.
        confusion: counts ``[true, read]`` of labelled held-out images.
    """
    counts = np.asarray(counts)
    rates = error_rates(confusion)
    if counts.shape != (len(rates),) or counts.min() < 0 or counts.sum() < 1:
        raise LensError(f"Correcting shares needs >= 1 image and {len(rates)} counts; got {counts.tolist()}.")
    shares = counts / counts.sum()
    values = simplex_least_squares(rates, shares)
    intervals = np.empty((len(counts), 2))
    for column, weights in enumerate(np.linalg.inv(rates.T)):
        others = np.delete(values, column)
        others = others / others.sum() if others.sum() > 0 else np.full(len(others), 1 / len(others))
        raw = float(weights @ shares)
        drop, rise = _margins(weights, counts, level)
        sinks, lifts = _margins(weights, np.asarray(confusion), level)
        # The share lies lower if the reading overstates it, or if the true rates lie above the measured ones.
        lifted, sunk = (np.linalg.norm(others * np.delete(m, column)) for m in (lifts, sinks))
        low = _least(raw, np.array([drop, lifts[column], lifted]))
        high = 1 - _least(1 - raw, np.array([rise, sunk, sinks[column]]))
        intervals[column] = min(low, values[column]), max(high, values[column])
    return CorrectedShares(values, intervals, float(np.linalg.cond(rates)))


def _margins(weights: np.ndarray, counts: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """How far ``weights · shares`` of rows of counts ``[..., class]`` may lie below and above what is seen, ``[...]``.

    As in ``imprecise_interval``, with the Beta distribution of equal mean and variance in the place of draws: exact
    where the weights have two values.
    """
    least, span = weights.min(), np.ptp(weights)
    place = (weights - least) / span
    seen = counts @ place / counts.sum(axis=-1)
    ends = []
    for extreme, tail in ((place.argmin(), (1 - level) / 2), (place.argmax(), (1 + level) / 2)):
        alpha = counts + np.eye(len(weights))[extreme]
        total = alpha.sum(axis=-1)
        mean = alpha @ place / total
        spread = (alpha @ place**2 / total - mean**2) / (total + 1)
        known = spread <= 1e-15  # every image at one end of the range, as is the one more
        size = mean * (1 - mean) / np.where(known, 1, spread) - 1
        a, b = np.where(known, 1, mean * size), np.where(known, 1, (1 - mean) * size)
        ends.append(np.where(known, mean, betaincinv(a, b, tail)))
    return span * (seen - ends[0]), span * (ends[1] - seen)


def _least(raw: float, errors: np.ndarray) -> float:
    """The least ``θ`` in [0, 1] with ``raw - θ <= |errors · (1, θ, 1 - θ)|``: own error, of hits, of misses."""

    def beyond(theta: float) -> float:
        return raw - theta - float(np.linalg.norm(errors * (1, theta, 1 - theta)))

    if beyond(0) <= 0:
        return 0.0
    from scipy.optimize import brentq  # late: as above

    return 1.0 if beyond(1) > 0 else float(brentq(beyond, 0, 1))


def shares(counts: np.ndarray, n_uncertain: int, attribute: Attribute, confusion: np.ndarray) -> tuple[Share, ...]:
    """One ``Share`` per class, among the decided images, in class order.

    As read: ``share_interval``. Corrected: ``rogan_gladen`` for two classes, ``correct_shares`` for more. With no
    decided image the shares are NaN and the intervals (0, 1).
    """
    n = int(counts.sum())
    if n == 0:
        nothing = (float("nan"), (0.0, 1.0))
        return tuple(Share(label, 0, 0, n_uncertain, *nothing, *nothing) for label in attribute.classes)
    if len(attribute.classes) == 2:
        p = rogan_gladen(int(counts[1]), n, confusion)
        corrected = [Estimate(1 - p.value, (1 - p.interval[1], 1 - p.interval[0])), p]
    else:
        many = correct_shares(counts, confusion)
        corrected = [
            Estimate(float(v), (float(low), float(high)))
            for v, (low, high) in zip(many.values, many.intervals, strict=True)
        ]
    return tuple(
        Share(label, int(k), n, n_uncertain, int(k) / n, share_interval(int(k), n), c.value, c.interval)
        for label, k, c in zip(attribute.classes, counts, corrected, strict=True)
    )


def log_ratios(classes: Sequence[Share]) -> tuple[LogRatio | None, LogRatio | None]:
    """Raw and corrected ``ln(second class / first class)`` of a two-class attribute's shares.

    ``(None, None)`` with more classes or without a decided image. With classes ``(female, male)`` this is the
    log gender ratio of DiffLens, ``ln(male / female)``.
    """
    if len(classes) != 2 or classes[0].n == 0:
        return None, None
    first, second = classes
    corrected = Estimate(second.corrected, second.corrected_interval)
    return (
        log_ratio_interval(second.count, first.count, numerator=second.label, denominator=first.label),
        share_log_ratio(corrected, second.n, numerator=second.label, denominator=first.label),
    )


def paired_bootstrap(
    statistic: Callable[..., np.ndarray],
    *samples: np.ndarray,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Percentile bootstrap of ``statistic(*samples, axis=...)``; every ``[n]`` sample is redrawn alike."""
    n = len(samples[0])
    if n < MIN_PAIRS or any(len(s) != n for s in samples):
        raise LensError(f"A paired bootstrap needs >= {MIN_PAIRS} images in samples of one length; got {n}.")
    from scipy.stats import bootstrap  # late: as above

    result = bootstrap(
        samples,
        statistic,
        n_resamples=n_boot,
        batch=256,
        vectorized=True,
        paired=True,
        axis=0,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    value = float(statistic(*samples, axis=0))
    return Estimate(value, (float(result.confidence_interval.low), float(result.confidence_interval.high)))


def cluster_bootstrap(
    prompts: Sequence[np.ndarray],
    *,
    paired_seeds: bool,
    fixed_prompts: bool = False,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean over prompts of each prompt's mean, with a bootstrap over prompts and seeds.

    Args:
        prompts: per prompt, one value per image (1.0/0.0 for a class; NaN for undecided images).
        paired_seeds: the prompts share their seeds in order, which are then drawn together.
        fixed_prompts: speak of these prompts alone instead of prompts like them; with a handful of prompts
            the bootstrap over prompts is too narrow, and this is the honest reading.
    """
    sizes = {len(values) for values in prompts}
    if paired_seeds and len(sizes) != 1:
        raise LensError("Prompts that share their seeds have equally many images; these do not.")
    if not prompts or min(int(np.isfinite(v).sum()) for v in prompts) < MIN_PAIRS:
        raise LensError(f"A bootstrap over prompts and seeds needs >= {MIN_PAIRS} decided images for every prompt.")
    if len(prompts) < 2 and not fixed_prompts:
        raise LensError("A bootstrap over prompts needs >= 2 prompts; set fixed_prompts to speak of this one alone.")
    rng = np.random.default_rng(seed)
    shared = _resample_weights(rng, n_boot, len(prompts[0])) if paired_seeds else None
    means = np.empty((n_boot, len(prompts)))
    for column, values in enumerate(prompts):
        weights = shared if shared is not None else _resample_weights(rng, n_boot, len(values))
        seen = np.isfinite(values)
        means[:, column] = weights @ np.where(seen, values, 0) / np.maximum(weights @ seen, 1)
    if not fixed_prompts:
        means = means * _resample_weights(rng, n_boot, len(prompts))
    low, high = np.quantile(means.sum(axis=1) / len(prompts), ((1 - level) / 2, (1 + level) / 2))
    return Estimate(float(np.mean([np.nanmean(v) for v in prompts])), (float(low), float(high)))


def pooled_share(prompts: Sequence[np.ndarray], *, n_draws: int = 2000, seed: int = 0, level: float = 0.95) -> Estimate:
    """Mean over these prompts of a class's share in each, drawn on the same seeds, with its interval.

    Seeds are drawn together, with one more whose images are all of the class (for the high end) or none (for the low
    one), as in ``imprecise_interval``: where all images are of one class the interval still has a width, and for one
    prompt it is ``share_interval``'s. ``prompts`` hold 1.0 or 0.0 for every seed, NaN where undecided.
    """
    values = (
        np.array([np.asarray(v, dtype=np.float64) for v in prompts]) if len({len(v) for v in prompts}) == 1 else None
    )
    if values is None or not np.isfinite(values).any(axis=1).all():
        raise LensError("Pooled prompts share their seeds in order, and each has >= 1 decided image.")
    seen = np.isfinite(values)
    hits = np.where(seen, values, 0)
    rng = np.random.default_rng(seed)
    weights, one = rng.standard_exponential((n_draws, values.shape[1])), rng.standard_exponential((n_draws, 1))
    sizes = weights @ seen.T + one
    low, high = (((weights @ hits.T + one * end) / sizes).mean(axis=1) for end in (0, 1))
    tails = (1 - level) / 2, (1 + level) / 2
    return Estimate(
        float((hits.sum(axis=1) / seen.sum(axis=1)).mean()),
        (float(np.quantile(low, tails[0])), min(1.0, float(np.quantile(high, tails[1])))),
    )


def _resample_weights(rng: np.random.Generator, n_boot: int, n: int) -> np.ndarray:
    """How often each of ``n`` things is drawn in each bootstrap round, ``[n_boot, n]``."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.float64)


def _check_count(k: int, n: int) -> None:
    if n < 1:
        raise LensError("A share needs >= 1 image that the classifier decides; there is none.")
    if not 0 <= k <= n:
        raise LensError(f"A count lies between 0 and n = {n}; it is {k}.")


def _pair(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if before.shape != after.shape or before.ndim != 1 or before.size < 1:
        raise LensError(f"Paired answers need >= 1 image and equal shapes; got {before.shape} and {after.shape}.")
    return before.astype(bool), after.astype(bool)


def _z(level: float) -> float:
    return float(ndtri((1 + level) / 2))


def _logit(p: float) -> float:
    if not 0 < p < 1:
        return float("-inf") if p <= 0 else float("inf")
    return float(np.log(p / (1 - p)))
