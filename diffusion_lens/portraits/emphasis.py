"""Which drawings to show more often, so that a trained model's own shares come to the planted ones.

A small denoiser draws what is rare, or hard to tell in noise, too seldom. Its shares are measured per prompt, and it
is trained further on the same drawings, each weighted by how much too seldom its kind is drawn (our working form).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_lens.portraits import world

Shares = Mapping[str, np.ndarray]
"""Attribute name → class shares ``[class]``."""

SMOOTHING = 0.02
"""Added to both shares before one is divided by the other, so that chance among rare classes weighs little."""

LARGEST = 2.5
"""No class is shown more than this many times as often as it was planted, nor less than one time in as many."""

ROUNDS = 50


@dataclass(frozen=True, eq=False)
class Emphasis:
    """How often each drawing is shown, ``float64[drawing]``, up to a factor.

    Attributes:
        named: with its caption. unnamed: under the empty prompt, whose shares are off in their own way.
    """

    named: np.ndarray
    unnamed: np.ndarray


def emphasise(labels: np.ndarray, captions: Sequence[str], drawn: Mapping[str, Shares]) -> Emphasis:
    """Weights of drawings (``labels [n, attribute]`` in ``world.ATTRIBUTES`` order) for a model's measured shares.

    ``drawn``: every prompt of ``world.PROMPTS`` → the shares that the model draws. Under each prompt the weighted
    drawings have the shares ``wanted`` of every attribute at once.
    """
    nouns = np.array([world.parse_prompt(caption)[0] for caption in captions])
    named = np.ones(len(labels))
    for noun in world.PROFILES:
        rows = np.flatnonzero(nouns == noun)
        if not len(rows):
            continue
        prompt = world.caption(noun)
        weights = rake(labels[rows], [wanted(prompt, drawn[prompt], a.name) for a in world.ATTRIBUTES])
        named[rows] = weights / weights.mean()
    return Emphasis(named, rake(labels, [wanted("", drawn[""], a.name) for a in world.ATTRIBUTES]))


def wanted(prompt: str, drawn: Shares, attribute: str) -> np.ndarray:
    """The shares to train on, ``[class]``: the planted ones, each times how much too small its drawn one is.

    Where none could be measured (NaN), the planted ones.
    """
    planted, measured = world.planted_shares(prompt)[attribute], np.asarray(drawn[attribute], float)
    factor = (planted + SMOOTHING) / (np.where(np.isfinite(measured), measured, planted) + SMOOTHING)
    target = planted * factor.clip(1 / LARGEST, LARGEST)
    return target / target.sum()


def rake(labels: np.ndarray, targets: Sequence[np.ndarray]) -> np.ndarray:
    """Weights ``[row]`` of mean 1 under which every attribute has its target shares (iterative proportional fitting).

    ``labels [row, attribute]``, ``targets`` one ``[class]`` an attribute. A class that no row has is left out.
    """
    weights = np.ones(len(labels))
    for _ in range(ROUNDS):
        for column, target in zip(labels.T, targets, strict=True):
            now = np.bincount(column, weights, len(target))
            aim = np.where(now > 0, target, 0.0)
            factor = np.divide(aim / aim.sum() * now.sum(), now, out=np.ones_like(now), where=now > 0)
            weights = weights * factor[column]
    return weights / weights.mean()
