"""The atlas of one lens: what its map can be coloured by, which features a filter lets through, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import (
    Dissection,
    FeatureEffect,
    evidence,
    groups,
    moved_beside,
    name_of,
    summary,
)

MAX_ROWS = 200
DENSITY = "how often it fires"
CONTROLS = "what turning it alone changes"
EVERY = ""
"""The filter that lets every feature through; any other is an attribute's name, or ``NOTHING``."""

NOTHING = "(nothing sure)"


@dataclass(frozen=True)
class FeatureRow:
    """A line of the table: a feature, its name, its score in the chosen colouring, the share of positions it fires on.

    ``score`` has three digits.
    """

    feature: int
    name: str
    score: float
    density: float


def colourings(lens: DiffusionLens) -> list[str]:
    """What the map can be coloured by: every class's attribution, density, and measured effects where there are."""
    known = [f"{a.name}: {c}" for a in lens.attributes if a.name in lens.attributions for c in a.classes]
    return [*known, DENSITY, *([CONTROLS] if lens.dissection is not None else [])]


def filters(lens: DiffusionLens) -> list[tuple[str, str]]:
    """(text, value) of what can be shown: all features, those that control one thing, those that control nothing."""
    dissection = lens.dissection
    if dissection is None:
        return [("all features", EVERY)]
    controlled = [(_filter_name(dissection, name), name) for name in dissection.classes]
    idle = len(members(lens, NOTHING) or ())
    return [("all features", EVERY), *controlled, (f"tested, nothing sure ({idle})", NOTHING)]


def members(lens: DiffusionLens, show: str) -> list[int] | None:
    """The features that a filter lets through, largest effect first; ``None``: all of them."""
    dissection = lens.dissection
    if dissection is None or show == EVERY:
        return None
    if show == NOTHING:
        sure = {e.feature for some in groups(dissection).values() for e in some}
        return [i for i in dissection.ids(tested=True) if i not in sure]
    return [effect.feature for effect in _effects_shown(dissection, show)]


def groups_shown(lens: DiffusionLens, show: str) -> dict[str, list[int]] | None:
    """Group → its features, where the map is coloured by what they control; ``None`` where nothing was dissected."""
    if lens.dissection is None:
        return None
    if show == NOTHING:
        return {"nothing sure": members(lens, show) or []}
    if show != EVERY:
        return {show: members(lens, show) or []}
    return {name: [e.feature for e in effects] for name, effects in groups(lens.dissection).items()}


def _effects_shown(dissection: Dissection, show: str) -> tuple[FeatureEffect, ...]:
    """The effects behind a filter by attribute: of the features that control it, else of those that move it at all."""
    if show not in dissection.classes:
        return ()
    return groups(dissection)[show] or moved_beside(dissection, show)


def _filter_name(dissection: Dissection, name: str) -> str:
    above_all, beside = groups(dissection)[name], moved_beside(dissection, name)
    if beside and not above_all:
        return f"moves {name} beside others ({len(beside)})"
    return f"controls {name} ({len(above_all)})"


def evidence_for(lens: DiffusionLens, show: str) -> str | None:
    """What the evidence is behind a filter, in words; ``None`` where nothing was dissected."""
    dissection = lens.dissection
    if dissection is None:
        return None
    if show in dissection.classes:
        return evidence(dissection, show)
    if show == NOTHING:
        return (
            f"These {len(members(lens, show) or ())} features were turned alone on {dissection.n} images, and nothing "
            "that the classifier reads moved for sure. They may act together, or on what nobody reads."
        )
    return summary(dissection)


def scores(lens: DiffusionLens, colour: str) -> tuple[np.ndarray, str]:
    """The numbers behind a colouring ``[d_sae]``, and their name."""
    name, _, label = colour.partition(": ")
    if colour == CONTROLS and lens.dissection is not None:
        return _largest_effects(lens.dissection, len(lens.atlas.density)), "points moved for sure"
    if colour == DENSITY or name not in lens.attributions:
        return np.asarray(lens.atlas.density, dtype=np.float64), "density"
    return lens.attributions[name].total(label), f"attribution to {label}"


def _largest_effects(dissection: Dissection, d_sae: int) -> np.ndarray:
    values = np.zeros(d_sae)
    for some in groups(dissection).values():
        for effect in some:
            values[effect.feature] = 100 * abs(effect.difference)
    return values


def table(lens: DiffusionLens, colour: str, show: str = EVERY) -> list[FeatureRow]:
    """The strongest features in a colouring, strongest first, among those that the filter lets through."""
    atlas, dissection = lens.atlas, lens.dissection
    if colour == CONTROLS and dissection is not None and (some := _effects_shown(dissection, show)):
        named = [(e.feature, name_of(e), 100 * abs(e.difference)) for e in some[:MAX_ROWS]]
    else:
        values, _ = scores(lens, colour)
        order, only = np.argsort(-values, kind="stable"), members(lens, show)
        if only is not None:
            order = order[np.isin(order, only)]
        named = [(int(i), atlas.labels[i] or "–", float(values[i])) for i in order[:MAX_ROWS]]
    return [FeatureRow(i, name, float(f"{score:.3g}"), float(atlas.density[i])) for i, name, score in named]


def valid_feature(lens: DiffusionLens, feature: Any) -> int | None:
    """A feature's number, or ``None``: what comes from a page is not to be trusted."""
    if isinstance(feature, bool) or not isinstance(feature, int | float):
        return None
    if not np.isfinite(feature) or feature != int(feature):
        return None
    return int(feature) if 0 <= feature < lens.atlas.density.size else None
