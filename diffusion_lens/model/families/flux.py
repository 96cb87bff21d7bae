"""FLUX.1: two streams, then one in two parts; the guidance scale is embedded (dev) or there is none (schnell)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_lens.model.families.base import Encoded, Family, Settings
from diffusion_lens.model.families.packing import SIDE, even_sigmas, pack, token_shift, unpack
from diffusion_lens.model.sites import Layout

PAIR = Layout(("text", "image"), updates=True)
"""Blocks of both kinds return the text first."""


class Packed(Family):
    """What FLUX.1 and Qwen-Image share: latents packed into tokens, noise levels shifted by their number."""

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """The pipeline's own size, or another."""
        side = pipe.default_sample_size
        return (side, side) if settings.size is None else super().latent_size(pipe, settings)

    def latent_shape(self, pipe: Any, settings: Settings) -> tuple[int, int, int]:
        """``(c, y, x)`` before packing."""
        return pipe.transformer.config.in_channels // SIDE**2, *self.latent_size(pipe, settings)

    def patch(self, pipe: Any) -> int:
        """A token is 2 × 2 latents."""
        return SIDE

    def schedule(self, model: Any, n_steps: int) -> dict[str, Any]:
        """Even noise levels, shifted."""
        y, x = self.grid(model)
        return {"sigmas": even_sigmas(n_steps), "mu": token_shift(model.pipeline.scheduler, y * x)}

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """On tokens, at times from 0 to 1."""
        t = t.to(sample.device).expand(len(sample)).to(sample.dtype) / 1000
        tokens = model.denoiser(hidden_states=pack(sample), timestep=t, return_dict=False, **kwargs)[0]
        return unpack(tokens, model.latent_shape[1:])


class Flux(Packed):
    """``FluxPipeline``: dev takes the guidance scale as a number; schnell takes none, and it changes nothing."""

    kind = "flux"
    pipelines = ("FluxPipeline",)
    encoders = ("text_encoder", "text_encoder_2")
    guidance = "none"
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states", "pooled": "pooled_projections"}
    layouts: ClassVar[Mapping[str, Layout]] = {
        r"(single_)?transformer_blocks\.\d+": PAIR,
        r"transformer_blocks\.\d+\.attn": Layout(("image", "text")),
        r"transformer_blocks\.\d+\.ff": Layout(("image",)),
        r"transformer_blocks\.\d+\.ff_context": Layout(("text",)),
    }
    defaults = (28, 3.5)

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """The second tokenizer reads the prompt; the first only its gist."""
        return {"tokenizer": 0, "tokenizer_2": self.length(pipe, settings)}

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Tokens of T5, and one text as CLIP reads it."""
        pipe = model.pipeline
        embeds, pooled, _ = pipe.encode_prompt(
            prompt, None, device=pipe._execution_device, max_sequence_length=self.length(pipe, model.settings)
        )
        return {"embeds": embeds, "pooled": pooled}

    def each(self, model: Any, rows: int, scale: float) -> dict[str, Any]:
        """The guidance scale, where the model was distilled with it."""
        if not model.denoiser.config.guidance_embeds:
            return {"guidance": None}
        return {"guidance": torch.full([rows], scale, device=model.device, dtype=torch.float32)}

    def shared(self, model: Any, scale: float) -> dict[str, Any]:
        """Places of the text's tokens and of the image's."""
        length = self.length(model.pipeline, model.settings)
        y, x = self.grid(model)
        ids = model.pipeline._prepare_latent_image_ids(1, y, x, model.device, model.dtype)
        text = torch.zeros(length, 3, device=model.device, dtype=model.dtype)
        return {"txt_ids": text, "img_ids": ids}

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Scaled and shifted back, and decoded."""
        latents = (latents / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
        return pipe.vae.decode(latents, return_dict=False)[0]
