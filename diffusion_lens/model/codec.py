"""Prompts to embeddings and latents to pixels, exactly as the stock pipelines do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.types import Fault
from diffusion_lens.base.validity import find_constant


@dataclass(frozen=True)
class Decoded:
    """Images ``uint8 [n, H, W, 3]`` and, per image, why it shows nobody (``None``: nothing speaks against it).

    Images that are not finite or that the safety checker refused are black.
    """

    images: np.ndarray
    faults: tuple[Fault | None, ...]


def encode_text(pipe: Any, prompt: str) -> dict[str, Tensor]:
    """Embeddings ``[1, tokens, c]`` of a prompt and of the empty one (``negative_embeds``), Stable Diffusion."""
    embeds, negative = pipe.encode_prompt(prompt, pipe._execution_device, 1, True)
    return {"embeds": embeds, "negative_embeds": negative}


def encode_xl(pipe: Any, prompt: str) -> dict[str, Tensor]:
    """The same for SDXL, with pooled embeddings ``[1, c]`` and size conditioning ``time_ids [1, 6]``."""
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    size = pipe.unet.config.sample_size
    y, x = (size, size) if isinstance(size, int) else size
    size = (y * pipe.vae_scale_factor, x * pipe.vae_scale_factor)
    encoder = pipe.text_encoder_2
    width = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=embeds.dtype, text_encoder_projection_dim=width)
    return {
        "embeds": embeds, "negative_embeds": negative, "pooled": pooled, "negative_pooled": negative_pooled,
        "time_ids": ids,
    }  # fmt: skip


def decode_pixels(pipe: Any, latents: Tensor) -> Decoded:
    """Images of final latents ``[n, c, y, x]``; a grey channel is shown three times."""
    flagged: list[bool] = []
    if getattr(pipe, "vqvae", None) is not None:
        image = pipe.vqvae.decode(latents / pipe.vqvae.config.scaling_factor).sample
    elif getattr(pipe, "vae", None) is not None:
        image = _decode_vae(pipe, latents)
        flagged = _flagged(pipe, image)
    else:
        image = latents
    return _to_pixels(image, latents, flagged)


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


def _decode_vae(pipe: Any, latents: Tensor) -> Tensor:
    """``[n, 3, H, W]`` in -1..1; float16 VAEs that overflow are run in float32, as in the stock pipelines."""
    vae = pipe.vae
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False) and hasattr(pipe, "upcast_vae")
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        centre, spread = (
            torch.tensor(v, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1) for v in (mean, std)
        )
        latents = latents * spread / vae.config.scaling_factor + centre
    else:
        latents = latents / vae.config.scaling_factor
    if not upcast:
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    vae.to(torch.float32)
    try:
        return vae.decode(latents.float(), return_dict=False)[0]
    finally:
        vae.to(torch.float16)


def _flagged(pipe: Any, image: Tensor) -> list[bool]:
    """Which images the pipeline's own safety checker refuses, ``[n]``; empty where it has none."""
    if getattr(pipe, "safety_checker", None) is None:
        return []
    _, flagged = pipe.run_safety_checker(image, image.device, image.dtype)
    return [bool(refused) for refused in flagged]
