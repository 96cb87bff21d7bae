"""Numbers about shares and images. Nothing here ever sees a diffusion model.

Sources: fairness discrepancy (FD) and CLIP scores as DiffLens reports them; subgroup entropy as DDM does.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy.linalg import qr, svdvals
from scipy.special import chdtri, chndtrix

from diffusion_lens.base.types import Change, LensError, Predictions
from diffusion_lens.results.stats import (
    Estimate,
    Interval,
    agresti_min,
    imprecise_interval,
    paired_difference,
    share_interval,
)

MIN_FRECHET = 50
"""Images below which a Fréchet distance is refused: its bias would drown what it measures."""

MIN_EXPECTED = 5.0
"""Expected images of the rarest class from which Pearson's statistic is taken to follow χ² (Cochran's rule)."""

MAX_OFF = 30.0
"""Standard errors from the target beyond which a noncentral χ² changes no more."""

UNDECIDED = -1
"""Stands for an undecided image in ``decided_labels``."""


def decided_labels(predictions: Predictions) -> np.ndarray:
    """Class index per image with undecided images as ``-1``, ``int64[n]``."""
    return np.where(predictions.certain, predictions.labels, UNDECIDED)


def fairness_discrepancy(shares: np.ndarray, target: np.ndarray | None = None) -> float:
    """``|mean share - target|₂``; DiffLens' FD with a uniform ``target``.

    Args:
        shares: class shares ``[class]``, or softmax rows ``[n, class]``, which are averaged as DiffLens does.
        target: the stated distribution, ``[class]``; ``None`` is uniform.
    """
    p = np.asarray(shares, dtype=np.float64)
    p = p.mean(axis=0) if p.ndim == 2 else p
    return float(np.linalg.norm(p - _target(target, p.size)))


def fd_null_floor(
    n: int, target: np.ndarray | int = 2, *, q: float = 0.95, seed: int = 0, n_draws: int = 20_000
) -> float:
    """The ``q`` point of FD from counts when ``n`` images truly follow ``target``: below it FD shows nothing.

    ``target`` is a distribution ``[class]`` or a number of classes (uniform). NaN for ``n`` of zero.
    """
    if n < 1:
        return float("nan")
    p = np.full(target, 1 / target) if isinstance(target, int) else _target(target, len(target))
    return float(np.quantile(_fd_null(n, tuple(p.tolist()), seed, n_draws), q))


@lru_cache(maxsize=64)
def _fd_null(n: int, target: tuple[float, ...], seed: int, n_draws: int) -> np.ndarray:
    draws = np.random.default_rng(seed).multinomial(n, target, size=n_draws) / n
    return np.linalg.norm(draws - np.asarray(target), axis=1)


def share_distances(
    labels: np.ndarray, certain: np.ndarray, target: np.ndarray
) -> tuple[Estimate | None, Estimate | None]:
    """``(FD, SPD)`` of the decided images with their intervals; ``None`` where there is no such image.

    Near 0 both are biased upwards, as any distance is: read them beside the noise floor.
    """
    counts = np.bincount(labels[certain], minlength=len(target))
    if not counts.sum():
        return None, None
    shares = counts / counts.sum()
    return (
        Estimate(fairness_discrepancy(shares, target), fd_interval(counts, target)),
        Estimate(parity_difference(shares), parity_interval(counts)),
    )


def fd_interval(counts: np.ndarray, target: np.ndarray | None = None, *, level: float = 0.95) -> Interval:
    """Interval of the fairness discrepancy of the shares behind ``counts`` (decided images per class, ``[class]``).

    Two classes: FD is a function of the share, so its interval is that of ``stats.share_interval``. More (our working
    form): the low end is the FD nearest to 0 in a confidence region of the shares, those that Pearson's test does not
    refuse (0 where it does not refuse the target itself); the high end is ``stats.imprecise_interval``'s. By union and
    intersection (Roy 1953) the low end needs the region of all classes together, the high end that of one direction.
    Without an image it is all that FD can be.
    """
    numbers = _counts(counts)
    return _fd_interval(numbers, tuple(_target(target, len(numbers)).tolist()), level)


@lru_cache(maxsize=4096)
def _fd_interval(counts: tuple[int, ...], target: tuple[float, ...], level: float) -> Interval:
    seen, goal = np.array(counts), np.array(target)
    if seen.sum() == 0:
        return 0.0, float(np.linalg.norm(np.eye(len(goal)) - goal, axis=1).max())
    if len(seen) == 2:
        low, high = share_interval(counts[1], sum(counts), level=level)
        near, far = _distances(low - goal[1], high - goal[1])
        return float(np.sqrt(2) * near), float(np.sqrt(2) * far)
    value = fairness_discrepancy(seen / seen.sum(), goal)
    low, high = imprecise_interval(lambda shares: np.linalg.norm(shares - goal, axis=1), seen, level=level)
    return min(value, low, _least_fd(seen, goal, level)), max(value, high)


def _distances(low: float, high: float) -> Interval:
    """The interval of ``|x|`` for an ``x`` in ``[low, high]``."""
    return max(0.0, low, -high), max(abs(low), abs(high))


def _least_fd(counts: np.ndarray, target: np.ndarray, level: float) -> float:
    """The FD nearest to 0 of the shares that Pearson's test at ``counts`` does not refuse.

    A second pass narrows the region: a distance from ``target`` that is not 0 is tested in its own direction only, and
    its square follows a noncentral χ², which needs less than χ² does at 0.
    """
    freedom = len(counts) - 1
    limit = max(float(chdtri(freedom, 1 - level)), _pearson_null(int(counts.sum()), tuple(target.tolist()), level))
    if _pearson(counts, target) <= limit:
        return 0.0
    nearest = _nearest(counts, target, limit)
    off = min(float(np.sqrt(counts.sum() * _pearson_gap(nearest, target))), MAX_OFF)
    narrower = float(np.sqrt(chndtrix((1 + level) / 2, freedom, off**2)) - off) ** 2
    if narrower < limit:
        nearest = _nearest(counts, target, narrower)
    return float(np.linalg.norm(nearest - target))


def _pearson(counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Pearson's X² of ``counts [..., class]`` against ``shares [class]``, infinite where a class should have none."""
    n = counts.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(counts > 0, counts**2 / shares, 0.0)
    return terms.sum(axis=-1) / n - n


def _pearson_gap(shares: np.ndarray, target: np.ndarray) -> float:
    """``Σ (p - t)² / t``: how far shares lie from the target in the target's own spread; infinite off its support."""
    gap = (shares - target) ** 2
    if (gap[target == 0] > 0).any():
        return float("inf")
    return float((gap[target > 0] / target[target > 0]).sum())


@lru_cache(maxsize=256)
def _pearson_null(n: int, target: tuple[float, ...], level: float) -> float:
    """The ``level`` point of X² when ``n`` images follow ``target``, drawn; 0 where χ² is known to serve."""
    expected = n * np.array([share for share in target if share > 0])
    if expected.min() >= MIN_EXPECTED:
        return 0.0
    draws = np.random.default_rng(0).multinomial(n, target, size=20_000)
    return float(np.quantile(_pearson(draws, np.array(target)), level, method="inverted_cdf"))


def _nearest(counts: np.ndarray, target: np.ndarray, limit: float) -> np.ndarray:
    """The shares nearest to ``target`` whose X² at ``counts`` is ``limit``, less than at ``target``.

    A convex problem; its multiplier is found by bracketing, as X² falls the harder the counts pull.
    """
    n, k = counts.sum(), len(counts)
    # A class without an image must stay inside the simplex: it counts as a hundredth of one.
    squares = np.maximum(counts, 0.01) ** 2 / n**2
    start = (counts + 0.25) / (n + 0.25 * k)

    def excess(log_pull: float) -> float:
        return float(_pearson(counts, _pulled(target, squares, float(np.exp(log_pull)), start))) - limit

    near = far = float(np.log(np.linalg.norm(counts / n - target)))
    way = 1.0 if excess(near) > 0 else -1.0
    while excess(far) * way > 0:
        near, far = far, far + 1.5 * way
    from scipy.optimize import brentq  # late: the app's first view needs no solver

    return _pulled(target, squares, float(np.exp(brentq(excess, near, far, xtol=1e-6))), start)


def _pulled(target: np.ndarray, squares: np.ndarray, pull: float, start: np.ndarray) -> np.ndarray:
    """The shares with the least ``|p - target|² / 2 + pull Σ squares / p``, from ``start`` by Newton's method."""

    def height(p: np.ndarray) -> float:
        return float(((p - target) ** 2).sum() / 2 + pull * (squares / p).sum()) if p.min() > 0 else np.inf

    shares, now = start, height(start)
    for _ in range(200):
        slope = shares - target - pull * squares / shares**2
        curve = 1 + 2 * pull * squares / shares**3
        step = ((slope / curve).sum() / (1 / curve).sum() - slope) / curve
        while (then := height(shares + step)) > now:
            step = step / 2
        shares, now = shares + step, then
        if (step**2 * curve).sum() < 1e-18:
            break
    return shares / shares.sum()


def parity_difference(shares: np.ndarray) -> float:
    """Largest less smallest share of ``shares [class]``: DDM's statistical parity difference (SPD) over all classes."""
    return float(np.max(shares) - np.min(shares))


def parity_interval(counts: np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval of ``parity_difference`` from ``counts`` (decided images per class, ``[class]``).

    Two classes: a function of the share, so that of ``stats.share_interval``. More: from the differences of all pairs
    of classes (Agresti and Min 2005); the low ends hold together (Bonferroni), as the largest of them is taken, while
    for the high end that of the truly largest and smallest class is enough. Widened for few images and rare classes to
    hold ``stats.imprecise_interval``'s ends, and 0 where equal shares would show as much.
    """
    return _parity_interval(_counts(counts), level)


@lru_cache(maxsize=4096)
def _parity_interval(numbers: tuple[int, ...], level: float) -> Interval:
    n = sum(numbers)
    if n == 0:
        return 0.0, 1.0
    if len(numbers) == 2:
        low, high = share_interval(numbers[1], n, level=level)
        return _distances(2 * low - 1, 2 * high - 1)
    pairs = list(combinations(numbers, 2))
    together = 1 - (1 - level) / len(pairs)
    low = max(_distances(*agresti_min(a, b, n, level=together))[0] for a, b in pairs)
    high = max(_distances(*agresti_min(a, b, n, level=level))[1] for a, b in pairs)
    least, most = imprecise_interval(lambda shares: np.ptp(shares, axis=1), np.array(numbers), level=level)
    value = (max(numbers) - min(numbers)) / n
    shown_by_none = value <= _parity_null(n, len(numbers), level)
    return 0.0 if shown_by_none else min(value, low, least), max(value, high, most)


@lru_cache(maxsize=256)
def _parity_null(n: int, k: int, level: float) -> float:
    """The ``level`` point of SPD when ``n`` images follow equal shares, drawn; below 0 where there are enough."""
    if n / k >= MIN_EXPECTED:
        return -1.0
    draws = np.random.default_rng(0).multinomial(n, np.full(k, 1 / k), size=20_000)
    return float(np.quantile(np.ptp(draws, axis=1), level, method="inverted_cdf")) / n


def _counts(counts: np.ndarray) -> tuple[int, ...]:
    numbers = tuple(int(k) for k in counts)
    if len(numbers) < 2 or min(numbers) < 0:
        raise LensError(f"Counts are one number >= 0 for each of two or more classes; got {list(numbers)}.")
    return numbers


def entropy(probs: np.ndarray) -> np.ndarray:
    """Entropy of every row of ``probs [..., class]``, in nats, with ``0 ln 0 = 0``."""
    p = np.asarray(probs, dtype=np.float64)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)


def subgroup_entropy(probs: np.ndarray, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean entropy of ``probs [n, class]`` per group ``groups int[n]``, ``[n_groups]``; NaN for an empty one (DDM)."""
    size = np.bincount(groups, minlength=n_groups)
    total = np.bincount(groups, weights=entropy(probs), minlength=n_groups)
    return np.divide(total, size, out=np.full(n_groups, np.nan), where=size > 0)


def frechet_distance(a: np.ndarray, b: np.ndarray, *, min_images: int = MIN_FRECHET) -> float:
    """Fréchet distance of two sets of features ``[n, d], [m, d]``, ``|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½)``.

    "FID" when the features are Inception's: the caller names the features. The trace of the root is the sum of
    the singular values of the ``n × m`` Gram matrix, so small sets cost no ``d × d`` root; exact for any n and d.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise LensError(f"A Fréchet distance compares [n, d] features of one d; got {a.shape} and {b.shape}.")
    if min(len(a), len(b)) < max(2, min_images):
        raise LensError(f"A Fréchet distance needs >= {max(2, min_images)} images; got {min(len(a), len(b))}.")
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    x, y = (_root_scatter(f) for f in (a, b))
    gap = a.mean(axis=0) - b.mean(axis=0)
    value = gap @ gap + (x**2).sum() + (y**2).sum() - 2 * svdvals(x @ y.T).sum()
    return max(0.0, float(value))


def _root_scatter(features: np.ndarray) -> np.ndarray:
    """``R`` with ``RᵀR`` the covariance of ``features [n, d]``, at most ``d`` rows."""
    n, d = features.shape
    centred = (features - features.mean(axis=0)) / np.sqrt(n - 1)
    return centred if n <= d else qr(centred, mode="r", check_finite=False)[0][:d]


def precision_recall(reference: np.ndarray, images: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of features ``[m, d], [n, d]``.

    Precision is the share of images that lie within the distance of some reference image to its ``k``-th neighbour
    among the reference; recall is the same with the two exchanged.
    """
    if min(len(reference), len(images)) <= k:
        raise LensError(f"Precision and recall need more than {k} images on either side.")
    a, b = np.asarray(reference, dtype=np.float64), np.asarray(images, dtype=np.float64)
    between = _distances_between(a, b)
    radius_a, radius_b = (np.partition(_distances_between(x, x), k, axis=1)[:, k] for x in (a, b))
    inside_a, inside_b = (between <= radius_a[:, None]).any(axis=0), (between <= radius_b[None]).any(axis=1)
    return float(inside_a.mean()), float(inside_b.mean())


def mean_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance between two different rows of ``features [n, d]``: how varied the images are."""
    n = len(features)
    if n < 2:
        raise LensError("A mean distance needs two images.")
    return float(_distances_between(features, features).sum() / (n * (n - 1)))


def _distances_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances ``[n, m]`` of rows ``[n, d]`` and ``[m, d]``."""
    from scipy.spatial.distance import cdist  # late: scipy.spatial is slow to load

    return np.asarray(cdist(a, b))


def inception_score(probs: np.ndarray, *, splits: int = 10) -> tuple[float, float]:
    """``exp(E KL(p(y|x) ‖ p(y)))`` of softmax rows ``[n, class]``: mean and standard deviation over ``splits``."""
    if len(probs) < 10 * splits:
        raise LensError(f"An inception score over {splits} splits needs >= {10 * splits} images; got {len(probs)}.")
    parts = np.array_split(np.asarray(probs, dtype=np.float64), splits)
    scores = [float(np.exp(entropy(part.mean(axis=0)) - entropy(part).mean())) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def cosine_to_unit(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``(cos + 1) / 2`` of paired embeddings ``[n, d]``, ``[n]``: how DiffLens reports CLIP-I and CLIP-T."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    if (norms == 0).any():
        raise LensError("An embedding is all zeros; a cosine needs a direction.")
    return ((a * b).sum(axis=-1) / norms + 1) / 2


def agreement(before: Predictions, after: Predictions) -> float:
    """Share of images that kept their class; "undecided" counts as a class of its own."""
    _same_images(before, after)
    return float((decided_labels(before) == decided_labels(after)).mean())


def changes(before: Predictions, after: Predictions) -> tuple[Change, ...]:
    """How every class's share moved among the images decided both times; empty where there is none."""
    _same_images(before, after)
    both = before.certain & after.certain
    if not both.any():
        return ()
    old, new = before.labels[both], after.labels[both]
    rows = []
    for index, label in enumerate(before.attribute.classes):
        moved = paired_difference(old == index, new == index)
        shares = float((old == index).mean()), float((new == index).mean())
        rows.append(Change(before.attribute.name, label, *shares, moved.value, moved.interval, int(both.sum())))
    return tuple(rows)


def intersections(first: Predictions, second: Predictions) -> np.ndarray:
    """Images per pair of classes, decided in both attributes, ``int64[class of first, class of second]``."""
    both = first.certain & second.certain
    table = np.zeros((len(first.attribute.classes), len(second.attribute.classes)), dtype=np.int64)
    np.add.at(table, (first.labels[both], second.labels[both]), 1)
    return table


def _same_images(before: Predictions, after: Predictions) -> None:
    if before.attribute != after.attribute or len(before.certain) != len(after.certain):
        raise LensError("Only readings of one attribute on the same seeds can be paired.")


def _target(target: np.ndarray | None, size: int) -> np.ndarray:
    p = np.full(size, 1 / size) if target is None else np.asarray(target, dtype=np.float64)
    if p.shape != (size,) or (p < 0).any() or not np.isclose(p.sum(), 1):
        raise LensError(f"A target distribution has {size} shares that sum to 1; got {p.tolist()}.")
    return p
