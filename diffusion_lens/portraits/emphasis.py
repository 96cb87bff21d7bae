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

SMOOTHING = 0.01
"""Added to both shares before one is divided by the other, so that chance among rare classes weighs little."""

SHARED = 1000
"""As many images' worth of evidence on each prompt is what is off under all prompts together."""

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


def emphasise(labels: np.ndarray, captions: Sequence[str], drawn: Mapping[str, Shares], n_images: int) -> Emphasis:
    """Weights of drawings (``labels [n, attribute]`` in ``world.ATTRIBUTES`` order) for a model's measured shares.

    ``drawn``: every prompt of ``world.PROMPTS`` → the shares that the model draws, among ``n_images`` each. Under each
    prompt the weighted drawings have the shares ``wanted`` of every attribute at once.
    """
    own = pooled(drawn, n_images)
    nouns = np.array([world.parse_prompt(caption)[0] for caption in captions])
    named = np.ones(len(labels))
    for noun in world.PROFILES:
        rows = np.flatnonzero(nouns == noun)
        if not len(rows):
            continue
        prompt = world.caption(noun)
        weights = rake(labels[rows], [wanted(prompt, own[prompt], a.name) for a in world.ATTRIBUTES])
        named[rows] = weights / weights.mean()
    return Emphasis(named, rake(labels, [wanted("", own[""], a.name) for a in world.ATTRIBUTES]))


def pooled(drawn: Mapping[str, Shares], n_images: int) -> dict[str, dict[str, np.ndarray]]:
    """The same shares, each drawn towards the planted ones times what is off in their class under all prompts.

    What a model draws too seldom it mostly draws too seldom everywhere, and that is known better than one prompt's
    share. An attribute without a measured share (NaN) has nothing but that.
    """
    found: dict[str, dict[str, np.ndarray]] = {prompt: {} for prompt in drawn}
    for attribute in (a.name for a in world.ATTRIBUTES):
        planted = np.array([world.planted_shares(prompt)[attribute] for prompt in drawn])
        measured = np.array([own[attribute] for own in drawn.values()], float)
        known = np.isfinite(measured).all(axis=1)
        totals = planted[known].sum(axis=0)
        off = np.divide(measured[known].sum(axis=0), totals, out=np.ones_like(totals), where=totals > 0)
        expected = planted * off / (planted * off).sum(axis=1, keepdims=True)
        both = (n_images * measured + SHARED * expected) / (n_images + SHARED)
        for prompt, row in zip(drawn, np.where(known[:, None], both, expected), strict=True):
            found[prompt][attribute] = row
    return found


def wanted(prompt: str, drawn: Shares, attribute: str) -> np.ndarray:
    """The shares to train on, ``[class]``: the planted ones, each times how much too small its drawn one is."""
    planted = world.planted_shares(prompt)[attribute]
    factor = (planted + SMOOTHING) / (drawn[attribute] + SMOOTHING)
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
