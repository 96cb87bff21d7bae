"""Weights under which images or drawings have stated shares of several attributes at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 50

LARGEST_WEIGHT = 10.0
"""No image counts more than this, where the mean is 1: a few rare ones would otherwise speak for their whole class."""


def rake(labels: np.ndarray, targets: Sequence[np.ndarray]) -> np.ndarray:
    """Weights ``[row]`` of mean 1 under which every attribute has its target shares (iterative proportional fitting:
    Deming and Stephan, 1940).

    ``labels [row, attribute]``, ``targets`` one ``[class]`` an attribute. A class that no row has is left out.
    """
    weights = weigh(labels, rake_factors(labels, targets))
    return weights / weights.mean()


def rake_factors(labels: np.ndarray, targets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What each class counts for in ``rake``, one ``[class]`` an attribute; 1 for a class that no row has."""
    factors = [np.ones(len(target)) for target in targets]
    weights = np.ones(len(labels))
    for _ in range(ROUNDS):
        for column, target, own in zip(labels.T, targets, factors, strict=True):
            now = np.bincount(column, weights, len(target))
            aim = np.where(now > 0, target, 0.0)
            factor = np.divide(aim / aim.sum() * now.sum(), now, out=np.ones_like(now), where=now > 0)
            own *= factor
            weights = weights * factor[column]
    return factors


def weigh(labels: np.ndarray, factors: Sequence[np.ndarray]) -> np.ndarray:
    """Product over attributes of what each row's class counts for, ``[row]``."""
    return np.prod([own[column] for column, own in zip(labels.T, factors, strict=True)], axis=0)


def even_weights(own: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Weights ``[row]``, at most ``LARGEST_WEIGHT``, under which the classes of ``own`` are as frequent as each other
    and each of them has the same shares of every other attribute (our working form).

    Where prompts draw old men and young women, what tells men from women in h also tells old from young. Under these
    weights that is no help. ``own [row]`` and each of ``others [row]`` are class indices; a negative one ("uncertain")
    counts as a class of its own.
    """
    n_own = int(own.max()) + 1
    pairs, targets = [own], [np.full(n_own, 1 / n_own)]
    balanced = (1 / np.bincount(own, minlength=n_own).clip(1))[own]
    for other in others:
        shifted = other - min(int(other.min()), 0)
        n_other = int(shifted.max()) + 1
        shares = np.bincount(shifted, balanced, n_other)
        pairs.append(own * n_other + shifted)
        targets.append(np.tile(shares / shares.sum(), n_own) / n_own)
    return rake(np.stack(pairs, axis=1), targets).clip(max=LARGEST_WEIGHT)
