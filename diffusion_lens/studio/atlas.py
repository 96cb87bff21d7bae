"""The atlas of one lens: what its map can be coloured by, and how features are found among all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from diffusion_lens.base.types import FeatureSet, Intervention, strength_of
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import (
    FeatureEffect,
    effects_of,
    evidence,
    groups,
    is_sure,
)
from diffusion_lens.studio import state
from diffusion_lens.studio.atlas_map import Confidence, confidence_of, stands_for
from diffusion_lens.studio.studio import Studio, import_engine

MAX_HITS = 200
EVIDENCE = "how sure its name is"
DENSITY = "how often it fires"
MAX_SEARCH = 80
N_SEEDS = 4
"""Seeds that a feature's card draws at three strengths."""


@dataclass(frozen=True)
class Hit:
    """A feature that a search found, and why.

    Attributes:
        effect: its largest significant effect that fits; ``None`` where only its label does. label: a guess, or ``""``.
        confidence: what its name rests on. density: share of positions that it fires on.
    """

    feature: int
    effect: FeatureEffect | None
    label: str
    confidence: Confidence
    density: float

    @property
    def size(self) -> float:
        """How far the effect moved its class; 0 without one."""
        return 0.0 if self.effect is None else abs(self.effect.difference)


@dataclass(frozen=True, eq=False)
class Strip:
    """The same seeds at several strengths of one feature: ``images [strength, seed, H, W, 3]``."""

    feature: int
    prompt: str | None
    seeds: tuple[int, ...]
    betas: tuple[float, ...]
    identity: float
    images: np.ndarray


def colourings(lens: DiffusionLens) -> list[str]:
    """What the map can be coloured by: what names rest on, how often features fire, attribution to every class."""
    known = [f"{a.name}: {c}" for a in lens.attributes if a.name in lens.attributions for c in a.classes]
    return [EVIDENCE, DENSITY, *known]


def scores(lens: DiffusionLens, colour: str) -> np.ndarray | None:
    """The numbers behind a colouring, ``[d_sae]`` from 0 to 1; ``None`` for the one by evidence.

    Attribution against a class counts as none to it.
    """
    name, _, label = colour.partition(": ")
    if colour == DENSITY:
        values = np.asarray(lens.atlas.density, dtype=np.float64)
    elif name in lens.attributions and label in lens.attribute_named(name).classes:
        values = np.maximum(lens.attributions[name].total(label), 0)
    else:
        return None
    return values / (float(values.max(initial=0)) or 1.0)


def search(lens: DiffusionLens, text: str, named: Callable[[FeatureEffect], str]) -> list[Hit]:
    """Features by number or by words of their label or their significant effects (as ``named``), over all of them.

    Confirmed ones first, the largest effect first; then guesses, the most active first. Nothing for an empty text.
    """
    words = str(text)[:MAX_SEARCH].lower().replace("#", " ").split()
    if not words:
        return []
    d_sae = len(lens.atlas.density)
    if len(words) == 1 and words[0].isdigit():
        known = [i for i in range(d_sae) if str(i).startswith(words[0])]
        return [_hit(lens, i, None) for i in sorted(known, key=lambda i: (str(i) != words[0], i))[:MAX_HITS]]
    found: dict[int, FeatureEffect | None] = {}
    for effect in _sure_effects(lens):
        if _fits(words, f"{named(effect)} {_stood_for(lens, effect)}"):
            before = found.get(effect.feature)
            if before is None or abs(effect.difference) > abs(before.difference):
                found[effect.feature] = effect
    for i, label in enumerate(lens.atlas.labels):
        if label and i not in found and _fits(words, label):
            found[i] = None
    hits = [_hit(lens, i, effect) for i, effect in found.items()]
    return sorted(hits, key=lambda hit: (-hit.size, -hit.density))[:MAX_HITS]


def strongest(lens: DiffusionLens) -> list[Hit]:
    """What stands in the list before anybody searches: confirmed features, else the most active."""
    confirmed = groups(lens.dissection).values() if lens.dissection is not None else ()
    if sure := [_hit(lens, effect.feature, effect) for own in confirmed for effect in own]:
        return sorted(sure, key=lambda hit: -hit.size)[:MAX_HITS]
    order = np.argsort(-lens.atlas.density, kind="stable")[:30]
    return [_hit(lens, int(i), None) for i in order]


def _fits(words: Sequence[str], text: str) -> bool:
    """Whether every word begins a word of the text: "male" is not found in "female"."""
    known = text.lower().replace(":", " ").split()
    return all(any(own.startswith(word) for own in known) for word in words)


@lru_cache(maxsize=4)
def _sure_effects(lens: DiffusionLens) -> tuple[FeatureEffect, ...]:
    """Every significant effect; of a class that shrinks because another of its attribute grows, the one that grows."""
    found = lens.dissection
    if found is None:
        return ()
    sure = [e for i in found.ids(tested=True) for e in effects_of(found, i) if is_sure(found, e)]
    grown = {(e.feature, e.beta, e.attribute) for e in sure if e.difference > 0}
    return tuple(e for e in sure if e.difference > 0 or (e.feature, e.beta, e.attribute) not in grown)


def told_effects(lens: DiffusionLens, feature: int) -> tuple[FeatureEffect, ...]:
    """The significant effects of one feature that are worth a bar, largest first."""
    own = [effect for effect in _sure_effects(lens) if effect.feature == feature]
    return tuple(sorted(own, key=lambda effect: -abs(effect.difference)))


def main_effect(lens: DiffusionLens, feature: int) -> FeatureEffect | None:
    """The largest significant effect of a feature steered alone; ``None`` where there is none."""
    return _main_effects(lens).get(feature)


@lru_cache(maxsize=4)
def _main_effects(lens: DiffusionLens) -> dict[int, FeatureEffect]:
    largest: dict[int, FeatureEffect] = {}
    for effect in _sure_effects(lens):
        before = largest.get(effect.feature)
        if before is None or _rank(effect) > _rank(before):
            largest[effect.feature] = effect
    return largest


def _rank(effect: FeatureEffect) -> tuple[bool, float]:
    """A class that grows names a feature better than one that shrinks."""
    return effect.difference > 0, abs(effect.difference)


def _stood_for(lens: DiffusionLens, effect: FeatureEffect) -> str:
    return stands_for(lens.dissection, effect)[1] if lens.dissection is not None else effect.label


def _hit(lens: DiffusionLens, feature: int, effect: FeatureEffect | None) -> Hit:
    effect = effect or main_effect(lens, feature)
    label = lens.atlas.labels[feature]
    return Hit(feature, effect, label, confidence_of(lens, feature), float(lens.atlas.density[feature]))


def peak(lens: DiffusionLens, feature: int) -> tuple[float, float]:
    """Two strengths far from the identity on which a feature alone is drawn: those dissected, else the slider's."""
    found = lens.dissection
    own = sorted({b for i, b in zip(found.features, found.betas, strict=True) if i == feature}) if found else []
    ends = state.scale(lens.setting(state.steerable(lens)[0]))
    return (own[0], own[-1]) if len(own) > 1 else (ends.low, ends.high)


def strip(studio: Studio, visitor: str, feature: int, n: int = N_SEEDS) -> Strip:
    """Draw the same seeds with one feature turned down, as it is, and turned up; the unedited run is kept.

    Raises ``Cancelled`` when the visitor chose another feature meanwhile.
    """
    import_engine()
    lens = studio.lens
    view = state.default_view(lens)
    setting = lens.setting(view.attribute)
    low, high = peak(lens, feature)
    seeds = range(view.first_seed, view.first_seed + n)
    request = lens.request(view.prompt, seeds)
    rows = []
    owner = f"{visitor}:atlas"
    with studio.work(owner, urgent=True, flag=studio.stops.start(owner)) as progress:
        for beta in (low, setting.identity, high):
            strength = strength_of(setting.mode, beta)
            alone = FeatureSet((feature,), (0.0,), view.attribute, view.target, lens.manifest.sae_id)
            edit = Intervention(alone, setting.mode, strength=strength, sampler=setting.sampler) if strength else None
            made = lens.generate(request, *(() if edit is None else (edit,)), batch_size=n, progress=progress)
            rows.append(made.images)
    return Strip(feature, view.prompt, tuple(seeds), (low, setting.identity, high), setting.identity, np.stack(rows))


def evidence_for(lens: DiffusionLens, text: str) -> str | None:
    """What the evidence is on an attribute that a search names; ``None`` where it names none that was dissected."""
    found, word = lens.dissection, str(text).strip().lower()
    return evidence(found, word) if found is not None and word in found.classes else None


def valid_feature(lens: DiffusionLens, feature: Any) -> int | None:
    """A feature's number, or ``None``: what comes from a page is not to be trusted."""
    if isinstance(feature, bool) or not isinstance(feature, int | float):
        return None
    if not np.isfinite(feature) or feature != int(feature):
        return None
    return int(feature) if 0 <= feature < lens.atlas.density.size else None
