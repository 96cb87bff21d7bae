"""The rows of features beside a view: which they are, what they do in it, and how they are found among all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from diffusion_lens.base.types import FeatureCard
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import FeatureEffect, effects_of, is_sure
from diffusion_lens.studio import state
from diffusion_lens.studio.cards import role
from diffusion_lens.studio.pictures import spotlight
from diffusion_lens.studio.state import View

SHOWN = 6
MORE = 18
FOUND = 12
THUMBS = 3


@dataclass(frozen=True)
class FeatureRow:
    """A feature beside a view.

    Attributes:
        role: what the set does with it: steers it towards the target, away from it, or leaves it alone ("apart").
        pushes: the class that the set's strength of it speaks for; ``against`` it where there are three classes or
            more. effect: the largest that is no chance when it alone is steered, where that was measured.
        thumbs: its strongest images, lit where it fires, ``uint8 [H, W, 3]``.
    """

    card: FeatureCard
    role: str
    pushes: str
    against: bool
    effect: FeatureEffect | None
    thumbs: tuple[np.ndarray, ...]


def members(lens: DiffusionLens, view: View) -> tuple[int, ...]:
    """Every feature of the set, the strongest of each pole in turn."""
    features, opposite = state.poles(lens, view)
    pairs = zip_longest(features.ids, opposite.ids if opposite else ())
    return tuple(i for i in chain.from_iterable(pairs) if i is not None)


def shown(lens: DiffusionLens, view: View, n: int = SHOWN) -> tuple[int, ...]:
    """The features to show: those added to the set, its ``n`` strongest, and the others with a strength of their own.

    A row keeps its place when its feature is given a strength, so that nothing moves away under a pointer.
    """
    every = members(lens, view)
    own = dict.fromkeys([*(i for i, _ in view.own), *view.solo])
    added = [i for i in own if i not in every]
    first = every[:n]
    return (*added, *first, *(i for i in own if i in every and i not in first))


def feature_row(lens: DiffusionLens, view: View, feature: int) -> FeatureRow:
    """One feature as it stands beside a view."""
    card = lens.card(feature)
    part = role(lens, view, feature)
    other = lens.attribute_named(view.attribute).opposite(view.target)
    pushes = other if part == "opposite" and other else view.target
    return FeatureRow(
        card, part, pushes, part == "opposite" and other is None, largest_effect(lens, feature), tuple(_thumbs(card))
    )


def largest_effect(lens: DiffusionLens, feature: int) -> FeatureEffect | None:
    """The largest effect of a feature alone that is no chance; ``None`` where none was measured."""
    found = lens.dissection
    if found is None:
        return None
    sure = [e for e in effects_of(found, feature) if is_sure(found, e) and e.difference > 0]
    return max(sure, key=lambda e: e.difference, default=None)


@dataclass(frozen=True)
class Line:
    """A line that a search looks into: a feature's label, or one of its measured effects in words (lower case)."""

    feature: int
    text: str
    effect: FeatureEffect | None


def search(lens: DiffusionLens, lines: Sequence[Line], text: str, limit: int = FOUND) -> tuple[Line, ...]:
    """Features by number or by words: the largest measured effect first, then labels, the most active first."""
    words = text.lower().replace("#", " ").split()
    if not words:
        return ()
    d_sae = len(lens.atlas.density)
    if len(words) == 1 and words[0].isdigit():
        exact = [int(words[0])] if int(words[0]) < d_sae else []
        begins = [i for i in range(d_sae) if str(i).startswith(words[0]) and i not in exact]
        return tuple(Line(i, "", largest_effect(lens, i)) for i in [*exact, *begins][:limit])

    def order(line: Line) -> tuple[float, float]:
        return (-line.effect.difference if line.effect else 0.0, -float(lens.atlas.density[line.feature]))

    best: dict[int, Line] = {}
    for line in sorted((x for x in lines if all(word in x.text for word in words)), key=order):
        best.setdefault(line.feature, line)
    return tuple(list(best.values())[:limit])


def _thumbs(card: FeatureCard) -> Iterator[np.ndarray]:
    known = len(card.top.heatmaps) == len(card.top.images)
    for i, image in enumerate(card.top.images[:THUMBS]):
        yield spotlight(image, card.top.heatmaps[i], least_side=64) if known else image
