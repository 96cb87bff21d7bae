"""Latents to pixels, exactly as the stock pipelines do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.types import Fault
from diffusion_lens.base.validity import find_constant
from diffusion_lens.model.families.base import Family


@dataclass(frozen=True)
class Decoded:
    """Images ``uint8 [n, H, W, 3]`` and, per image, why it shows nobody (``None``: nothing speaks against it).

    Images that are not finite or that the safety checker refused are black.
    """

    images: np.ndarray
    faults: tuple[Fault | None, ...]


def decode_pixels(family: Family, pipe: Any, latents: Tensor) -> Decoded:
    """Images of final latents ``[n, c, y, x]``; a grey channel is shown three times."""
    image = family.to_image(pipe, latents)
    return _to_pixels(image, latents, _flagged(pipe, image))


def decode_preview(pipe: Any, network: Any, latents: Tensor) -> Decoded:
    """The same by a tiny autoencoder, as the stock pipelines decode when it takes their own autoencoder's place.

    Its latents are the pipeline's own, scaled ones (its ``scaling_factor`` is 1). What the pipeline's safety checker
    refuses is black here too.
    """
    latents = (latents / network.config.scaling_factor).to(network.dtype)
    image = network.decode(latents, return_dict=False)[0]
    return _to_pixels(image, latents, _flagged(pipe, image))


def _to_pixels(image: Tensor, latents: Tensor, flagged: list[bool]) -> Decoded:
    """``image [n, 3 or 1, H, W]`` in -1..1 as pixels. Some decoders hide latents that are not finite (a tiny one
    clamps them, a codebook takes its first entry), so those are looked at too."""
    finite = _finite(image) & _finite(latents)
    shown = finite if not flagged else finite & ~torch.tensor(flagged, device=image.device)
    image = torch.where(shown.view(-1, 1, 1, 1), image, torch.full_like(image, -1.0))
    image = (image / 2 + 0.5).clamp(0, 1)
    pixels = (image.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else np.ascontiguousarray(pixels)
    faults = list(find_constant(pixels))
    for row, good in enumerate(finite.tolist()):
        if not good:
            faults[row] = "not finite"
        elif flagged and flagged[row]:
            faults[row] = "censored"
    return Decoded(pixels, tuple(faults))


def _finite(x: Tensor) -> Tensor:
    """Whether every number of each row is finite, bool ``[n]``."""
    return torch.isfinite(x).flatten(1).all(1)


def _flagged(pipe: Any, image: Tensor) -> list[bool]:
    """Which images the pipeline's own safety checker refuses, ``[n]``; empty where it has none."""
    if getattr(pipe, "safety_checker", None) is None:
        return []
    _, flagged = pipe.run_safety_checker(image, image.device, image.dtype)
    return [bool(refused) for refused in flagged]
