"""Numbers about shares and images. Nothing here ever sees a diffusion model.

Sources: fairness discrepancy (FD) and CLIP scores as DiffLens reports them; subgroup entropy as DDM does.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.linalg import qr, svdvals

from diffusion_lens.base.types import Change, LensError, Predictions
from diffusion_lens.results.stats import MIN_PAIRS, Estimate, paired_bootstrap, paired_difference

MIN_FRECHET = 50
"""Images below which a Fréchet distance is refused: its bias would drown what it measures."""

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
    """``(FD, SPD)`` with bootstrap intervals over decided images; ``None`` below ``stats.MIN_PAIRS`` of them.

    Near 0 both are biased upwards, as any distance is: read them beside the noise floor.
    """
    decided = labels[certain]
    if len(decided) < MIN_PAIRS:
        return None, None
    columns = [(decided == index).astype(float) for index in range(len(target))]

    def fd(*classes: np.ndarray, axis: int) -> np.ndarray:
        gaps = [c.mean(axis=axis) - t for c, t in zip(classes, target, strict=True)]
        return np.sqrt(sum(gap**2 for gap in gaps))

    def spd(*classes: np.ndarray, axis: int) -> np.ndarray:
        means = np.stack([c.mean(axis=axis) for c in classes])
        return means.max(axis=0) - means.min(axis=0)

    return paired_bootstrap(fd, *columns), paired_bootstrap(spd, *columns)


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
