"""Prompts to embeddings and latents to pixels, exactly as the stock pipelines do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def decode_pixels(pipe: Any, latents: Tensor) -> np.ndarray:
    """Images ``uint8 [n, H, W, 3]`` of final latents; a grey channel is shown three times."""
    if getattr(pipe, "vqvae", None) is not None:
        image = pipe.vqvae.decode(latents / pipe.vqvae.config.scaling_factor).sample
    elif getattr(pipe, "vae", None) is not None:
        image = _decode_vae(pipe, latents)
    else:
        image = latents
    return _to_pixels(image)


def decode_preview(pipe: Any, network: Any, latents: Tensor) -> np.ndarray:
    """The same by a tiny autoencoder, as the stock pipelines decode when it takes their own autoencoder's place.

    Its latents are the pipeline's own, scaled ones (its ``scaling_factor`` is 1). What the pipeline's safety checker
    refuses is black here too.
    """
    latents = (latents / network.config.scaling_factor).to(network.dtype)
    return _to_pixels(_censor(pipe, network.decode(latents, return_dict=False)[0]))


def _to_pixels(image: Tensor) -> np.ndarray:
    image = (image / 2 + 0.5).clamp(0, 1)
    pixels = (image.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else np.ascontiguousarray(pixels)


def _decode_vae(pipe: Any, latents: Tensor) -> Tensor:
    """``[n, 3, H, W]`` in -1..1; float16 VAEs that overflow are run in float32, images refused by the pipeline's
    own safety checker are black, both as in the stock pipelines."""
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
        image = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return _censor(pipe, image)
    vae.to(torch.float32)
    try:
        return _censor(pipe, vae.decode(latents.float(), return_dict=False)[0])
    finally:
        vae.to(torch.float16)


def _censor(pipe: Any, image: Tensor) -> Tensor:
    if getattr(pipe, "safety_checker", None) is None:
        return image
    _, flagged = pipe.run_safety_checker(image, image.device, image.dtype)
    keep = torch.tensor([not f for f in flagged], device=image.device).view(-1, 1, 1, 1)
    return torch.where(keep, image, torch.full_like(image, -1.0))
