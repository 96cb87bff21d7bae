"""Lumina 2: one joined sequence, text first; guidance by a call of its own, its result brought back to its length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_lens.model.families.base import Encoded, Family, Settings
from diffusion_lens.model.families.packing import SIDE, even_sigmas, token_shift
from diffusion_lens.model.prompts import token_ids
from diffusion_lens.model.sites import Layout


class Lumina2(Family):
    """``Lumina2Pipeline``; what the network predicts is the other way round."""

    kind = "lumina2"
    pipelines = ("Lumina2Pipeline",)
    encoders = ("text_encoder",)
    guidance = "apart"
    text_varies = True
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states", "mask": "encoder_attention_mask"}
    layouts: ClassVar[Mapping[str, Layout]] = {
        r"layers\.\d+": Layout(("text", "image"), joined=True, updates=True, mask=1),
        r"noise_refiner\.\d+": Layout(("image",), updates=True),
    }
    defaults = (30, 4.0)

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """The pipeline's own size, or another."""
        side = pipe.default_sample_size
        return (side, side) if settings.size is None else super().latent_size(pipe, settings)

    def patch(self, pipe: Any) -> int:
        """A token is 2 × 2 latents."""
        return SIDE

    def schedule(self, model: Any, n_steps: int) -> dict[str, Any]:
        """Even noise levels, shifted by what the stock call takes for the number of tokens: that of channels."""
        return {"sigmas": even_sigmas(n_steps), "mu": token_shift(model.pipeline.scheduler, model.latent_shape[0])}

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """What the system's prompt leaves of the sequence."""
        around = len(token_ids(f"{pipe.system_prompt} <Prompt Start> ", pipe.tokenizer, special=True))
        return {"tokenizer": self.length(pipe, settings) - around}

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Tokens of the language model and which of them are words."""
        pipe = model.pipeline
        embeds, mask, negative, negative_mask = pipe.encode_prompt(
            prompt, True, device=pipe._execution_device, max_sequence_length=self.length(pipe, model.settings)
        )
        return {"embeds": embeds, "mask": mask, "negative_embeds": negative, "negative_mask": negative_mask}

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """At times from noise to image; the sign turned, as the stock call does after guidance, which is the same."""
        t = (1 - t.to(sample.device) / model.pipeline.scheduler.config.num_train_timesteps).expand(len(sample))
        return -model.denoiser(hidden_states=sample, timestep=t, return_dict=False, **kwargs)[0]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Guided, then each row of latents brought to the length of the prediction with the prompt."""
        both = unconditional + scale * (conditional - unconditional)
        norm, made = torch.norm(conditional, dim=-1, keepdim=True), torch.norm(both, dim=-1, keepdim=True)
        return both * (norm / made)

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Scaled and shifted back, and decoded."""
        latents = (latents / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
        return pipe.vae.decode(latents, return_dict=False)[0]
