"""A fit of a second or two, for tests of fitting."""

from __future__ import annotations

from typing import Any

from lens_fixtures import tiny_config

from diffusion_lens.features.train_sae import SAETrainConfig
from diffusion_lens.fit.config import FitConfig
from diffusion_lens.results.manifest import Setting

SETTING = Setting(
    attribute="gender", target="male", n_features=2, poles="both", mode="scale", sampler="asymmetric",
    betas=(0.0, 1.0, 5.0),
)  # fmt: skip


def quick(**changes: Any) -> FitConfig:
    """One attribute, no effects, one short sweep."""
    values = {
        "attributes": ("gender",), "settings": (SETTING,), "n_images": 48, "per_class": 12, "effect_features": 0,
        "sweep_images": 12, "sweep_controls": False, "pool_images": 12, "attribution_images": 8,
        "sae": SAETrainConfig(d_sae=16, k=2, n_steps=20, batch_size=128), **changes,
    }  # fmt: skip
    return tiny_config(**values)
