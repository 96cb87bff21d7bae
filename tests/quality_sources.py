"""Feature sources that tests measure image quality with."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_lens.measuring.quality import (
    FeatureSource,
)


def mean_colour(images: np.ndarray) -> np.ndarray:
    return images.mean(axis=(1, 2)) / 50


COLOUR = FeatureSource("colour", mean_colour)


class PretendInception(torch.nn.Module):
    """torch-fidelity's interface on two weights: features are mean red and green, logits their tenfold."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        pooled = x.float().mean(dim=(2, 3))[:, :2] / 255 * self.scale
        return pooled, 10 * pooled
