"""Which drawings to show more often, so that a trained model's own shares come to the planted ones.

A small denoiser draws what is rare, or hard to tell in noise, too seldom. Its shares are measured per prompt, and it
is trained further on the same drawings, each weighted by how much too seldom its kind is drawn (our working form).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_lens.features.raking import rake, rake_factors, weigh
from diffusion_lens.portraits import world

Shares = Mapping[str, np.ndarray]
"""Attribute name → class shares ``[class]``."""

SMOOTHING = 0.01
"""Added to both shares before one is divided by the other, so that chance among rare classes weighs little."""

SHARED = 1000
"""As many images' worth of evidence on each prompt is what is off under all prompts together."""

LARGEST = 2.5
"""No class is taught more than about this many times as often as it was planted, nor less than one time in as many."""


@dataclass(frozen=True, eq=False)
class Emphasis:
    """How often each drawing is shown, ``float64[drawing]``, up to a factor.

    Attributes:
        named: with its caption. unnamed: under the empty prompt, whose shares are off in their own way.
    """

    named: np.ndarray
    unnamed: np.ndarray


def emphasise(labels: np.ndarray, captions: Sequence[str], taught: Mapping[str, Shares]) -> Emphasis:
    """Weights of drawings under which they have the shares ``taught`` under every prompt, of all attributes at once.

    ``labels [n, attribute]`` in ``world.ATTRIBUTES`` order. Nouns whose prompt ``taught`` does not hold, or which no
    drawing has for its whole caption, are left even. The prompts name a noun and nothing else, so the shares hold among
    drawings with such a caption (glasses that a caption would name are rarer there, and so are the old); captions that
    say more are weighted by the same factors of classes. Neither kind is shown more often for it.
    """
    told = np.array(captions)
    nouns = np.array([world.parse_prompt(caption)[0] for caption in captions])
    named = np.ones(len(labels))
    for noun in world.PROFILES:
        prompt = world.caption(noun)
        bare, more = np.flatnonzero(told == prompt), np.flatnonzero((nouns == noun) & (told != prompt))
        if len(bare) and prompt in taught:
            factors = rake_factors(labels[bare], [taught[prompt][a.name] for a in world.ATTRIBUTES])
            for rows in filter(len, (bare, more)):
                weights = weigh(labels[rows], factors)
                named[rows] = weights / weights.mean()
    return Emphasis(named, rake(labels, [taught[""][a.name] for a in world.ATTRIBUTES]))


def teach(
    drawn: Mapping[str, Shares], n_images: int, before: Mapping[str, Shares] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """The shares to train on: those taught so far, each times how much too small its drawn share is.

    Args:
        drawn: every prompt of ``world.PROMPTS`` → the shares that the model draws, among ``n_images`` each; of a model
            without prompts, the empty one alone.
        before: what the model was taught to draw them; the planted shares by default.
    """
    own = pooled(drawn, n_images)
    taught: dict[str, dict[str, np.ndarray]] = {prompt: {} for prompt in drawn}
    for prompt in drawn:
        for attribute, planted in world.planted_shares(prompt).items():
            so_far = planted if before is None or prompt not in before else np.asarray(before[prompt][attribute])
            target = so_far * (planted + SMOOTHING) / (own[prompt][attribute] + SMOOTHING)
            target = target.clip(planted / LARGEST, planted * LARGEST)
            taught[prompt][attribute] = target / target.sum()
    return taught


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
