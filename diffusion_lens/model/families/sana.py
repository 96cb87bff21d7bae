"""Sana: image tokens alone, text by cross-attention, guidance by a doubled batch; a flow on highly packed latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion_lens.model.families.base import Encoded, Family, Settings, call_default
from diffusion_lens.model.families.pixart import BLOCKS
from diffusion_lens.model.sites import Layout


class Sana(Family):
    """``SanaPipeline``, with the instruction that its own call gives the language model; latents are float32."""

    kind = "sana"
    pipelines = ("SanaPipeline",)
    encoders = ("text_encoder",)
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states", "mask": "encoder_attention_mask"}
    layouts: ClassVar[Mapping[str, Layout]] = BLOCKS
    defaults = (20, 4.5)

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """The stock call's own size, whatever the transformer was trained on, or another."""
        usual = call_default(pipe, "height"), call_default(pipe, "width")
        return super().latent_size(pipe, replace(settings, size=settings.size or usual))

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """As the call cuts off."""
        return {"tokenizer": self.length(pipe, settings)}

    def noise(self, model: Any, generators: list[torch.Generator]) -> Tensor:
        """In float32 whatever the transformer's dtype."""
        shape = (len(generators), *model.latent_shape)
        return randn_tensor(shape, generator=generators, device=model.device, dtype=torch.float32)

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Tokens of the language model and which of them are words."""
        pipe = model.pipeline
        embeds, mask, negative, negative_mask = pipe.encode_prompt(
            prompt, True, negative_prompt="", device=pipe._execution_device, clean_caption=False,
            max_sequence_length=self.length(pipe, model.settings),
            complex_human_instruction=call_default(pipe, "complex_human_instruction"),
        )  # fmt: skip
        return {"embeds": embeds, "mask": mask, "negative_embeds": negative, "negative_mask": negative_mask}

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """In the transformer's dtype; the prediction in float32."""
        t = t * model.denoiser.config.timestep_scale
        output = super().forward(model, sample.to(model.denoiser.dtype), t, kwargs).float()
        return self.prediction_channels(model, output)

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Scaled back and decoded."""
        return pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
