"""What is dissected, and how: the turn, the images, and how features are chosen."""

from __future__ import annotations

from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import Mode, Sampler
from diffusion_lens.results import stats

DENSITY = "density"


class DissectConfig(StrictConfig):
    """How far each feature is turned, and on what.

    Attributes:
        prompt: the prompt drawn (``None``: unconditional). n, first_seed: paired seeds, the same for every feature.
        mode, betas, sampler: the turns, as in ``Intervention``; every feature is turned to each of ``betas``, for a
            feature at rest where its subject is drawn can only be seen by turning it down, and the reverse.
        features: ids; ``None`` takes those that fire on at least ``min_density`` of the atlas's samples.
        by, top: the ``top`` of these, strongest first in turn by ``density`` or by attribute (``dissect_choose``).
        choice_images: images, of seeds after the measured ones, that a choice by attribute may draw.
        alpha: false discovery rate at which an effect counts (Benjamini–Hochberg over all features and classes).
    """

    prompt: str | None
    n: int = Field(default=48, ge=stats.MIN_PAIRS)
    first_seed: int = 10_000_000
    mode: Mode = "scale"
    betas: tuple[float, ...] = Field(default=(10.0, -4.0), min_length=1)
    sampler: Sampler = "asymmetric"
    features: tuple[int, ...] | None = None
    min_density: float = Field(default=1e-3, ge=0, le=1)
    by: tuple[str, ...] = (DENSITY,)
    top: int | None = Field(default=None, ge=1)
    choice_images: int = Field(default=256, ge=2)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    batch_size: int = Field(default=16, ge=1)
