"""PixArt-α and -Σ: image tokens alone, text by cross-attention, guidance by a doubled batch; trained on noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_lens.model.families.base import Encoded, Family, Settings
from diffusion_lens.model.sites import Layout

BLOCKS: Mapping[str, Layout] = {
    r"transformer_blocks\.\d+": Layout(("image",), updates=True),
    r"transformer_blocks\.\d+\.(attn1|attn2|ff)": Layout(("image",)),
}
"""Blocks of models with one stream, and the layers in them."""
MICRO = 128
"""``sample_size`` of PixArt-α models that are also told the image's size."""


class PixArt(Family):
    """``PixArtSigmaPipeline``, ``PixArtAlphaPipeline``; other sizes are drawn as they are, not cut from others."""

    kind = "pixart"
    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    encoders = ("text_encoder",)
    flow = False
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states", "mask": "encoder_attention_mask"}
    layouts: ClassVar[Mapping[str, Layout]] = BLOCKS
    defaults = (20, 4.5)

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """As the call cuts off."""
        return {"tokenizer": self.length(pipe, settings)}

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Tokens of T5 and which of them are words."""
        pipe = model.pipeline
        embeds, mask, negative, negative_mask = pipe.encode_prompt(
            prompt, True, negative_prompt="", device=pipe._execution_device, clean_caption=True,
            max_sequence_length=self.length(pipe, model.settings),
        )  # fmt: skip
        return {"embeds": embeds, "mask": mask, "negative_embeds": negative, "negative_mask": negative_mask}

    def each(self, model: Any, rows: int, scale: float) -> dict[str, Any]:
        """The image's size, where the model was trained with it."""
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        config = model.denoiser.config
        if type(model.pipeline).__name__ == "PixArtAlphaPipeline" and config.sample_size == MICRO:
            scale_up = model.pipeline.vae_scale_factor
            height, width = (side * scale_up for side in model.latent_shape[1:])
            options = {"device": model.device, "dtype": model.dtype}
            told = {
                "resolution": torch.tensor([height, width]).to(**options).repeat(rows, 1),
                "aspect_ratio": torch.tensor([height / width]).to(**options).repeat(rows, 1),
            }
        return {"added_cond_kwargs": told}

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The prediction of noise."""
        return self.prediction_channels(model, super().forward(model, sample, t, kwargs))

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Scaled back and decoded."""
        return pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
