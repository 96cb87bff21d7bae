"""Stable Diffusion 3 and 3.5: two streams of tokens, guidance by a doubled batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from diffusion_lens.base.types import LensError
from diffusion_lens.model.families.base import Encoded, Family, Settings
from diffusion_lens.model.prompts import tokenizers_of
from diffusion_lens.model.sites import Layout


class StableDiffusion3(Family):
    """``StableDiffusion3Pipeline``, with or without its third text encoder."""

    kind = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    encoders = ("text_encoder", "text_encoder_2")
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states", "pooled": "pooled_projections"}
    layouts: ClassVar[Mapping[str, Layout]] = {
        r"transformer_blocks\.\d+": Layout(("text", "image"), updates=True),
        r"transformer_blocks\.\d+\.attn": Layout(("image", "text")),
        r"transformer_blocks\.\d+\.(attn2|ff)": Layout(("image",)),
        r"transformer_blocks\.\d+\.ff_context": Layout(("text",)),
    }
    defaults = (28, 7.0)

    def check(self, pipe: Any) -> None:
        """The transformer's latents and text are those of its autoencoder and encoders."""
        config = pipe.transformer.config
        if config.in_channels != pipe.vae.config.latent_channels:
            raise LensError(
                f"This transformer takes latents of {config.in_channels} channels and the autoencoder makes "
                f"{pipe.vae.config.latent_channels}; choose a text-to-image model, or parts that belong together."
            )
        width = sum(getattr(pipe, part).config.projection_dim for part in self.encoders)
        if config.pooled_projection_dim != width:
            raise LensError(
                f"The text encoders give pooled texts of {width} and this transformer reads "
                f"{config.pooled_projection_dim}; the parts belong to different models."
            )

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """The third tokenizer reads as far as its sequence goes."""
        known = tokenizers_of(pipe)
        lengths = {name: pipe.tokenizer_max_length for name in known}
        if "tokenizer_3" in known:
            lengths["tokenizer_3"] = self.length(pipe, settings)
        return lengths

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Without a third encoder, as many tokens of zeros stand in its place."""
        pipe = model.pipeline
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            prompt, None, None, device=pipe._execution_device, do_classifier_free_guidance=True,
            max_sequence_length=self.length(pipe, model.settings),
        )  # fmt: skip
        return {
            "embeds": embeds, "negative_embeds": negative, "pooled": pooled, "negative_pooled": negative_pooled,
        }  # fmt: skip

    def schedule(self, model: Any, n_steps: int) -> dict[str, Any]:
        """Shifted by the image's size where the scheduler says so."""
        config = model.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", None):
            return {}
        y, x = self.grid(model)
        shapes = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.16))
        return {"mu": calculate_shift(y * x, *(config.get(name, usual) for name, usual in shapes))}

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Scaled and shifted back, and decoded."""
        latents = (latents / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
        return pipe.vae.decode(latents, return_dict=False)[0]
