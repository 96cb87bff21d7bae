"""From logits to an answer with a known error: temperature, certainty threshold, confusion counts. Pure numpy."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from diffusion_lens.types import LensError, Predictions

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
