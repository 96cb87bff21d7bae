"""What is dissected, and how: the turn, the images, and which features are worth the time."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from pydantic import Field

from diffusion_lens import stats
from diffusion_lens.compare import JudgedLens
from diffusion_lens.config import StrictConfig
from diffusion_lens.types import Attribution, LensError, Mode, Sampler

DENSITY = "density"


class DissectConfig(StrictConfig):
    """How far each feature is turned, and on what.

    Attributes:
        prompt: the prompt drawn (``None``: unconditional). n, first_seed: paired seeds, the same for every feature.
        mode, beta, sampler: the turn, as in ``Intervention``.
        features: ids; ``None`` takes those that fire on at least ``min_density`` of the atlas's samples.
        by, top: the ``top`` of these, strongest first in turn by ``density`` or by attribute (``candidates``).
        alpha: false discovery rate at which an effect counts (Benjamini–Hochberg over all features and classes).
    """

    prompt: str | None
    n: int = Field(default=48, ge=stats.MIN_PAIRS)
    first_seed: int = 10_000_000
    mode: Mode = "scale"
    beta: float = 5.0
    sampler: Sampler = "symmetric"
    features: tuple[int, ...] | None = None
    min_density: float = Field(default=1e-3, ge=0, le=1)
    by: tuple[str, ...] = (DENSITY,)
    top: int | None = Field(default=None, ge=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    batch_size: int = Field(default=16, ge=1)


class DissectedLens(JudgedLens, Protocol):
    """A lens with the images of its atlas."""

    @property
    def pool(self) -> np.ndarray:
        """Images of the atlas, ``uint8 [n, H, W, 3]``."""


def choose_features(lens: DissectedLens, config: DissectConfig) -> tuple[int, ...]:
    """The features to measure; raises ``LensError`` for ids outside the dictionary, or where none is left."""
    atlas = lens.atlas
    if config.features is not None:
        chosen = tuple(dict.fromkeys(config.features))
    else:
        live = np.flatnonzero(atlas.density >= max(config.min_density, 1e-12))
        chosen = tuple(int(i) for i in live)
        if config.top is not None:
            orders = [live[np.argsort(-candidates(lens, name)[live], kind="stable")] for name in config.by]
            in_turn = dict.fromkeys(int(i) for row in zip(*orders, strict=True) for i in row)
            chosen = tuple(in_turn)[: config.top]
    if not chosen or min(chosen) < 0 or max(chosen) >= len(atlas.density):
        raise LensError(f"Name features from 0 to {len(atlas.density) - 1}, at least one that fires.")
    return chosen


def candidates(lens: DissectedLens, name: str) -> np.ndarray:
    """How promising each feature is, ``[d_sae]``, by ``density`` or for one attribute.

    A steered attribute: its largest attribution to any class, over the largest of that class. Another one that the
    classifier reads (our working form): how much commoner its class is among the feature's strongest images than in
    the atlas's pool. Only for choosing; nothing is concluded from it.
    """
    if name == DENSITY:
        return np.asarray(lens.atlas.density, dtype=np.float64)
    if name in lens.attributions:
        return _attributed(lens.attributions[name])
    read = {a.name: a for a in lens.classifier.attributes}
    if name not in read:
        raise LensError(f"Choose features by {DENSITY} or by {', '.join(read)}; '{name}' is none of these.")
    labels = lens.classifier.predict(lens.pool)[name].labels
    one_hot = np.eye(len(read[name].classes))[labels]
    top = lens.atlas.top_images
    present = (top >= 0)[..., None]
    among = (one_hot[np.maximum(top, 0)] * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    return np.where(present.any(axis=(1, 2)), (among - one_hot.mean(axis=0)).max(axis=1), -1.0)


def _attributed(attribution: Attribution) -> np.ndarray:
    totals = np.stack([attribution.total(label) for label in attribution.attribute.classes])
    return np.asarray((totals / np.maximum(np.abs(totals).max(axis=1, keepdims=True), 1e-12)).max(axis=0))
