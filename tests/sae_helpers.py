"""A small random SAE and probe that the tests of codes, attributions and edits share."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_lens.base.types import Attribute
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SAEConfig, SparseAutoencoder

GENDER = Attribute("gender", ("female", "male"))
AGE = Attribute("age", ("young", "adult", "old"))
CHANNELS, SPATIAL = 5, (3, 2)


def random_sae(layout: str = "position", *, seed: int = 0, **changes: Any) -> SparseAutoencoder:
    """Random weights on maps ``[n, 5, 3, 2]``: 12 features, 4 kept."""
    width = CHANNELS if layout == "position" else CHANNELS * SPATIAL[0] * SPATIAL[1]
    values: dict[str, Any] = {
        "d_in": width, "d_sae": 12, "k": 4, "layout": layout, "hook_name": "mid_block", "model_id": "tiny",
        "spatial": SPATIAL, **changes,
    }  # fmt: skip
    sae = SparseAutoencoder(SAEConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae.requires_grad_(False)


def random_maps(*shape: int, seed: int = 1) -> torch.Tensor:
    """Maps ``[*shape, 5, 3, 2]``."""
    return torch.randn(*shape, CHANNELS, *SPATIAL, generator=torch.Generator().manual_seed(seed))


def random_probe(
    attribute: Attribute = GENDER, *, n_steps: int = 3, size: float = 0.3, temperature: float = 1.3
) -> Probe:
    """A probe on those maps with logits of order ``size``."""
    generator = torch.Generator().manual_seed(2)
    classes, width = len(attribute.classes), CHANNELS * SPATIAL[0] * SPATIAL[1]
    return Probe(
        attribute,
        size * torch.randn(n_steps, classes, width, generator=generator),
        torch.randn(n_steps, classes, generator=generator),
        torch.full((n_steps,), 0.9),
        temperature,
    )
