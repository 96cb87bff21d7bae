"""Evidence about single features: what a set does with them, what steering them did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion_lens.base.types import Examples, FeatureCard
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import Dissection, FeatureEffect, effects_of, is_sure
from diffusion_lens.studio.pictures import spotlight
from diffusion_lens.studio.state import View, poles

LEAST_CHANGE = 0.005
"""Changes of a share below half a point are not worth a line."""

Role = Literal["target", "opposite", "apart"]


@dataclass(frozen=True)
class Example:
    """An image of a feature, lit where it fires (``uint8 [H, W, 3]``), and where that is, in words or ``""``."""

    image: np.ndarray
    where: str


@dataclass(frozen=True)
class TestedEffects:
    """What steering a feature alone changed in paired images, tested against chance.

    Attributes:
        sure: effects that are no chance, largest first. every: all measured, ``sure`` first.
        quiet: attributes of which nothing is sure. fires: whether it was active in these images at all.
    """

    sure: tuple[FeatureEffect, ...]
    every: tuple[FeatureEffect, ...]
    n_measured: int
    quiet: tuple[str, ...]
    fires: bool
    n: int
    source: str
    alpha: float


@dataclass(frozen=True)
class UntestedEffects:
    """What a fit measured without a test: (attribute, class, change of its share), and how.

    ``measured``: whether anything was; ``n_others``: other features that were dissected, ``None`` where none was.
    """

    changes: tuple[tuple[str, str, float], ...]
    source: str
    measured: bool
    n_others: int | None


def role(lens: DiffusionLens, view: View, feature: int) -> Role:
    """What the set does with a feature: steers it towards the target or away from it, or leaves it alone."""
    features, opposite = poles(lens, view)
    if feature in features.ids:
        return "target"
    return "opposite" if opposite and feature in opposite.ids else "apart"


def lit(examples: Examples, n: int) -> Iterator[Example]:
    """The first ``n`` images, lit where the feature fires."""
    known = len(examples.heatmaps) == len(examples.images)
    for i, image in enumerate(examples.images[:n]):
        if known:
            yield Example(spotlight(image, examples.heatmaps[i]), where(examples.heatmaps[i]))
        else:
            yield Example(image, "")


def where(heat: np.ndarray) -> str:
    """In words, where a heatmap is highest; ``""`` where it is nowhere."""
    heat = np.nan_to_num(np.asarray(heat, dtype=np.float32))
    if heat.max(initial=0) <= 0:
        return ""
    y, x = np.unravel_index(int(heat.argmax()), heat.shape)
    rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
    return f"{rows[int(3 * y / heat.shape[0])]} {columns[int(3 * x / heat.shape[1])]}"


def effects(lens: DiffusionLens, card: FeatureCard) -> TestedEffects | UntestedEffects:
    """What steering this feature alone changes, attribute by attribute."""
    dissection = lens.dissection
    measured = effects_of(dissection, card.id) if dissection is not None else ()
    if dissection is None or not measured:
        return _untested(lens, card)
    sure = sure_effects(dissection, card.id)
    rest = [e for e in measured if e not in sure and np.isfinite(e.difference)]
    return TestedEffects(
        sure=sure,
        every=_largest_first([*sure, *rest]),
        n_measured=len(measured),
        quiet=tuple(name for name in dissection.classes if name not in {e.attribute for e in sure}),
        fires=bool(np.isfinite([e.q_value for e in measured]).any()),
        n=dissection.n,
        source=dissection.source,
        alpha=dissection.alpha,
    )


def sure_effects(found: Dissection, feature: int) -> tuple[FeatureEffect, ...]:
    """The significant effects of a feature steered alone, largest first."""
    return _largest_first([e for e in effects_of(found, feature) if is_sure(found, e)])


def _largest_first(some: Iterator[FeatureEffect] | list[FeatureEffect]) -> tuple[FeatureEffect, ...]:
    return tuple(sorted(some, key=lambda e: -abs(np.nan_to_num(e.difference))))


def _untested(lens: DiffusionLens, card: FeatureCard) -> UntestedEffects:
    dissection = lens.dissection
    changes = tuple(
        (attribute, label, change)
        for attribute, by_class in card.effects.items()
        for label, change in by_class.items()
        if np.isfinite(change) and abs(change) >= LEAST_CHANGE
    )
    n_others = None if dissection is None else len(dissection.ids())
    return UntestedEffects(changes, card.effect_source, bool(card.effects), n_others)
