"""Agreement of raters beyond chance: Cohen's κ of two, Fleiss' κ of several, with intervals that hold in small samples.

The usual intervals are of normal shape and have no width where all agree. These are ``stats.imprecise_interval``'s:
ratings drawn around those seen and one more item, rated as it moves each end furthest.
"""

from __future__ import annotations

import numpy as np

from diffusion_lens.base.types import LensError
from diffusion_lens.results.stats import Estimate, imprecise_interval


def cohen_kappa(table: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Cohen's (1960) κ ``= (p_o - p_e) / (1 - p_e)`` of two raters with its interval.

    ``table`` counts items ``[class by the first, class by the second]``. The value is NaN where both named one and the
    same class throughout: chance alone would agree as well.
    """
    counts = np.asarray(table)
    if counts.ndim != 2 or len(counts) != counts.shape[1] or len(counts) < 2 or counts.min() < 0 or counts.sum() < 1:
        raise LensError(f"Two raters' table is square, with >= 2 classes and >= 1 item; this one is {counts.tolist()}.")
    k = len(counts)

    def kappa(shares: np.ndarray) -> np.ndarray:
        cells = shares.reshape(-1, k, k)
        seen = np.trace(cells, axis1=1, axis2=2)
        return _beyond_chance(seen, (cells.sum(axis=2) * cells.sum(axis=1)).sum(axis=1), undefined=1.0)

    seen = counts / counts.sum()
    value = _beyond_chance(np.trace(seen), seen.sum(axis=1) @ seen.sum(axis=0), undefined=np.nan)
    return _estimate(value, imprecise_interval(kappa, counts.ravel(), level=level))


def fleiss_kappa(ratings: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Fleiss' (1971) κ of several raters with its interval.

    ``ratings`` counts, for every item, how many raters named each class, ``[item, class]``; every item has equally many
    raters, who need not be the same. NaN where only one class was ever named.
    """
    counts = np.asarray(ratings)
    raters = counts.sum(axis=1) if counts.ndim == 2 else np.zeros(1)
    if counts.ndim != 2 or counts.shape[1] < 2 or len(counts) < 1 or counts.min() < 0 or raters.min() < 2:
        raise LensError("Fleiss' kappa needs >= 1 item, rated by >= 2 raters, in >= 2 classes.")
    if len(set(raters.tolist())) != 1:
        raise LensError("Fleiss' kappa needs equally many raters for every item; leave the others out.")
    m, k = int(raters[0]), counts.shape[1]
    # What one more item could be rated: by all alike, or as evenly as m raters can be split over the classes.
    even = np.array([[m // k + (step < m % k) for step in range(k)]])
    extremes = np.concatenate([m * np.eye(k, dtype=counts.dtype), *(np.roll(even, turn, axis=1) for turn in range(k))])
    kinds, place = np.unique(np.concatenate([counts, extremes]), axis=0, return_inverse=True)
    place = place.ravel()
    alike = (kinds * (kinds - 1)).sum(axis=1) / (m * (m - 1))

    def kappa(shares: np.ndarray) -> np.ndarray:
        return _beyond_chance(shares @ alike, ((shares @ kinds / m) ** 2).sum(axis=-1), undefined=1.0)

    numbers = np.bincount(place[: len(counts)], minlength=len(kinds))
    seen = numbers / numbers.sum()
    value = _beyond_chance(seen @ alike, ((seen @ kinds / m) ** 2).sum(), undefined=np.nan)
    more = sorted(set(place[len(counts) :].tolist()))
    return _estimate(value, imprecise_interval(kappa, numbers, more=more, level=level))


def _beyond_chance(seen: np.ndarray, chance: np.ndarray, *, undefined: float) -> np.ndarray:
    """``(seen - chance) / (1 - chance)``; ``undefined`` where chance agrees always."""
    room = 1 - np.asarray(chance)
    sure = room < 1e-12
    return np.where(sure, undefined, (seen - chance) / np.where(sure, 1, room))


def _estimate(value: np.ndarray, interval: tuple[float, float]) -> Estimate:
    kappa, low, high = float(value), max(-1.0, interval[0]), min(1.0, interval[1])
    return Estimate(kappa, (low, high) if np.isnan(kappa) else (min(low, kappa), max(high, kappa)))
