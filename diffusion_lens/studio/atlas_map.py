"""The map of features: an island for every class, made of the features that stand for it, and where each one lies.

A feature stands for the class that moved most when it alone was steered, where that is significant; else for the class
that its strongest images share (its label); a feature without a label lies at the rim of the island whose images it
fires on most. So places mean something by construction, and nothing else: distances within an island do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import Dissection, FeatureEffect, groups

Confidence = Literal["confirmed", "guess", "none", "dead"]
LEVELS: tuple[Confidence, ...] = ("dead", "none", "guess", "confirmed")
GOLDEN = np.pi * (3 - 5**0.5)
"""The angle between two neighbours in a sunflower."""

GAP = 2.2
"""Between islands, in distances of two features."""

PRIOR = 60.0
"""Images by which a region is doubted: one feature's eight do not make a region that draws many."""

ASPECT = 1.35
SILENT = "never fire"


@dataclass(frozen=True)
class Region:
    """An island: the features of one class. ``x, y, r``: where it lies; ``n``: features in it."""

    attribute: str
    label: str
    x: float
    y: float
    r: float
    n: int

    @property
    def name(self) -> str:
        """What stands over it."""
        return self.label if self.attribute in self.label else f"{self.attribute}: {self.label}"


@dataclass(frozen=True, eq=False)
class AtlasMap:
    """Where every feature lies.

    Attributes:
        xy: ``[d_sae, 2]``. home: the region of each feature ``[d_sae]``. confidence: into ``LEVELS`` ``[d_sae]``.
        regions: the islands. width, height: of the map, from 0.
    """

    xy: np.ndarray
    home: np.ndarray
    confidence: np.ndarray
    regions: tuple[Region, ...]
    width: float
    height: float


def atlas_map(lens: DiffusionLens) -> AtlasMap:
    """The map of a lens; the same every time."""
    homes, names, confidence = _homes(lens)
    strength = _strengths(lens)
    n = len(homes)
    xy = np.zeros((n, 2))
    members = [np.flatnonzero(homes == k) for k in range(len(names))]
    radii = [np.sqrt(len(own)) * 0.5 + 0.5 if len(own) else 0.0 for own in members]
    centres = _pack(radii, [attribute for attribute, _ in names])
    regions = []
    for (attribute, label), own, r, centre in zip(names, members, radii, centres, strict=True):
        if not len(own):
            continue
        order = own[np.lexsort((-strength[own], -confidence[own]))]  # the surest at the centre
        steps = np.arange(len(order))
        angle, distance = steps * GOLDEN, 0.5 * np.sqrt(steps)
        xy[order] = centre + np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)
        regions.append(Region(attribute, label, float(centre[0]), float(centre[1]), float(r), len(own)))
    low = np.array([[r.x - r.r, r.y - r.r] for r in regions]).min(axis=0) - 1
    high = np.array([[r.x + r.r, r.y + r.r] for r in regions]).max(axis=0) + 1
    moved = tuple(Region(r.attribute, r.label, r.x - low[0], r.y - low[1], r.r, r.n) for r in regions)
    return AtlasMap(xy - low, homes, confidence, moved, *(float(side) for side in high - low))


def confidence_of(lens: DiffusionLens, feature: int) -> Confidence:
    """What a feature's name rests on."""
    if lens.atlas.dead[feature]:
        return "dead"
    if lens.dissection is not None and feature in _confirmed(lens.dissection):
        return "confirmed"
    return "guess" if lens.atlas.labels[feature] else "none"


def _confirmed(found: Dissection) -> dict[int, FeatureEffect]:
    return {effect.feature: effect for own in groups(found).values() for effect in own}


def stands_for(found: Dissection, effect: FeatureEffect) -> tuple[str, str]:
    """Attribute and class of an effect: turned down, a feature stands for the class that it took away."""
    if (effect.difference > 0) == (effect.beta > 0):
        return effect.attribute, effect.label
    turns = list(zip(found.features, found.betas, strict=True))
    row = turns.index((effect.feature, effect.beta))
    moves = found.effects[effect.attribute][row] * (1 if effect.beta > 0 else -1)
    return effect.attribute, found.classes[effect.attribute][int(np.nan_to_num(moves).argmax())]


def _homes(lens: DiffusionLens) -> tuple[np.ndarray, list[tuple[str, str]], np.ndarray]:
    """The region of each feature, the regions' (attribute, class), and each feature's confidence."""
    atlas = lens.atlas
    n = len(atlas.density)
    attributes = [*lens.attributes, *(a.attribute() for a in lens.manifest.nuisances)]
    names = [(a.name, label) for a in attributes for label in a.classes]
    place = {name: k for k, name in enumerate(names)}
    home, confidence = np.full(n, -1), np.ones(n, int)
    for i, text in enumerate(atlas.labels):
        attribute, _, label = text.partition(": ")
        if (attribute, label) in place:
            home[i], confidence[i] = place[attribute, label], 2
    for i, effect in _confirmed(lens.dissection).items() if lens.dissection is not None else ():
        name = stands_for(lens.dissection, effect)  # type: ignore[arg-type]
        home[i], confidence[i] = place.get(name, -1), 3
    confidence[atlas.dead] = 0
    _join_nearest(home, atlas.top_images, len(names), np.flatnonzero((home < 0) & ~atlas.dead))
    names.append((SILENT, SILENT))
    home[atlas.dead] = len(names) - 1
    return home, names, confidence


def _join_nearest(home: np.ndarray, images: np.ndarray, n_regions: int, lonely: np.ndarray) -> None:
    """Give each lonely feature the region whose own strongest images it shares most, region size set aside."""
    n_images = int(images.max(initial=0)) + 1
    shown = np.zeros((len(home), n_images))
    rows, columns = np.nonzero(images >= 0)
    shown[rows, images[rows, columns]] = 1
    profile = np.stack([shown[home == k].sum(axis=0) for k in range(n_regions)])
    profile /= profile.sum(axis=1, keepdims=True) + PRIOR
    score = shown[lonely] @ profile.T
    if n_regions:
        home[lonely] = score.argmax(axis=1)


def _strengths(lens: DiffusionLens) -> np.ndarray:
    """What puts a feature nearer to the centre of its island: its largest effect, then how often it fires."""
    values = np.asarray(lens.atlas.density, dtype=np.float64).copy()
    for i, effect in _confirmed(lens.dissection).items() if lens.dissection is not None else ():
        values[i] = 1 + abs(effect.difference)
    return values


def _pack(radii: list[float], attributes: list[str]) -> np.ndarray:
    """Centres of circles that do not overlap, those of one attribute beside each other: each as near to its
    attribute's direction and to the middle as there is room."""
    kinds = list(dict.fromkeys(attributes))
    angles = {kind: 2 * np.pi * k / len(kinds) - np.pi / 2 for k, kind in enumerate(kinds)}
    centres = np.zeros((len(radii), 2))
    placed: list[int] = []
    reach = float(sum(radii)) + GAP * len(radii)
    turns, distances = np.meshgrid(np.linspace(-0.5, 0.5, 41), np.linspace(0, reach, 240))
    for k in sorted(range(len(radii)), key=lambda k: -radii[k]):
        if not radii[k]:
            continue
        angle = angles[attributes[k]] + 2 * np.pi * turns.ravel() / len(kinds) * 1.6
        spots = np.stack([ASPECT * distances.ravel() * np.cos(angle), distances.ravel() * np.sin(angle)], axis=1)
        free = np.ones(len(spots), bool)
        for other in placed:
            free &= np.hypot(*(spots - centres[other]).T) >= radii[k] + radii[other] + GAP
        room = spots[free]
        spot = room[np.hypot(room[:, 0] / ASPECT, room[:, 1]).argmin()] if len(room) else np.array([reach, 0.0])
        centres[k] = spot
        placed.append(k)
    return centres
