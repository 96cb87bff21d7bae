"""From logits to an answer with a known error: temperature, certainty threshold, confusion counts. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from diffusion_lens.base.types import Attribute, LensError, Predictions

UNKNOWN = -1
"""Label of an image whose class is not known; such images are left out of losses and confusion counts."""


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The divisor of ``logits [n, class]`` with the least negative log likelihood of ``labels [n]``, in [0.5, 20].

    The lower bound keeps a perfectly separable attribute from calling every image certain.
    """
    z = logits.astype(np.float64)

    def nll(log_t: float) -> float:
        scaled = z / np.exp(log_t)
        top = scaled.max(axis=1)
        log_sum = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((log_sum - scaled[np.arange(len(z)), labels]).mean())

    return float(np.exp(minimize_scalar(nll, bounds=(np.log(0.5), np.log(20.0)), method="bounded").x))


def choose_threshold(probs: np.ndarray, *, max_uncertain: float, ceiling: float = 0.9) -> float:
    """The highest threshold, at most ``ceiling``, that leaves at most a share ``max_uncertain`` uncertain.

    ``probs [n, class]`` are calibrated. The ceiling keeps an easy attribute from calling sure images uncertain.
    """
    if not 0 <= max_uncertain < 1:
        raise LensError(f"max_uncertain is a share from 0 to below 1; it is {max_uncertain}.")
    top = np.sort(probs.max(axis=1))
    return float(min(ceiling, top[int(max_uncertain * len(top))]))


def confusion_counts(truth: np.ndarray, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Counts ``[true, predicted]`` of certain images and undecided images per true class ``[class]``.

    ``truth int [n]``; images labelled −1 are left out.
    """
    n = predictions.probs.shape[1]
    known = truth != UNKNOWN
    sure = known & predictions.certain
    table = np.bincount(truth[sure] * n + predictions.labels[sure], minlength=n * n).reshape(n, n)
    return table, np.bincount(truth[known & ~predictions.certain], minlength=n)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Float64 softmax over the last axis of ``logits / temperature``."""
    z = logits.astype(np.float64) / temperature
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def fit_rules(
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    attributes: Sequence[Attribute],
    *,
    max_uncertain: float,
    ceiling: float = 0.9,
) -> tuple[dict[str, float], dict[str, float]]:
    """Temperature and certainty threshold of every attribute from ``logits[name] [n, class], labels [n, attribute]``.

    Raises:
        LensError: an attribute has no labelled image.
    """
    temperatures: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    for column, attribute in enumerate(attributes):
        known = labels[:, column] != UNKNOWN
        if not known.any():
            raise LensError(f"Too few images are labelled for {attribute.name}; label more held-out images.")
        z = logits[attribute.name][known]
        temperatures[attribute.name] = fit_temperature(z, labels[known, column])
        probs = softmax(z, temperatures[attribute.name])
        thresholds[attribute.name] = choose_threshold(probs, max_uncertain=max_uncertain, ceiling=ceiling)
    return temperatures, thresholds


Measured = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""Attribute → confusion ``[true, predicted]``, and attribute → undecided images per true class ``[class]``."""


def measure(predictions: Mapping[str, Predictions], labels: np.ndarray, attributes: Sequence[Attribute]) -> Measured:
    """Confusion and undecided counts of every attribute against ``labels [n, attribute]`` (−1 = unknown).

    Raises:
        LensError: an attribute has no labelled image.
    """
    confusion: dict[str, np.ndarray] = {}
    uncertain: dict[str, np.ndarray] = {}
    for column, attribute in enumerate(attributes):
        if not (labels[:, column] != UNKNOWN).any():
            raise LensError(f"Too few images are labelled for {attribute.name}; label more held-out images.")
        confusion[attribute.name], uncertain[attribute.name] = confusion_counts(
            labels[:, column], predictions[attribute.name]
        )
    return confusion, uncertain
