"""FLUX.2-klein: two streams, then one joined sequence, text first; guidance by a call of its own, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from diffusion_lens.model.families.base import Encoded, Family, Settings, call_default, chat_length
from diffusion_lens.model.families.packing import SIDE, even_sigmas
from diffusion_lens.model.sites import Layout


class Flux2Klein(Family):
    """``Flux2KleinPipeline``. What is denoised holds 2 × 2 latents in its channels; a distilled one is not guided."""

    kind = "flux2-klein"
    pipelines = ("Flux2KleinPipeline",)
    encoders = ("text_encoder",)
    guidance = "apart"
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states", "ids": "txt_ids"}
    layouts: ClassVar[Mapping[str, Layout]] = {
        r"transformer_blocks\.\d+": Layout(("text", "image"), updates=True),
        r"transformer_blocks\.\d+\.attn": Layout(("image", "text")),
        r"transformer_blocks\.\d+\.ff": Layout(("image",)),
        r"transformer_blocks\.\d+\.ff_context": Layout(("text",)),
        r"single_transformer_blocks\.\d+": Layout(
            ("text", "image"), joined=True, updates=True,
            arguments=(("image", (0, "hidden_states")), ("text", (0, "hidden_states"))),
        ),
    }  # fmt: skip
    defaults = (50, 4.0)

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """In tokens."""
        y, x = (pipe.default_sample_size,) * 2 if settings.size is None else super().latent_size(pipe, settings)
        return y // SIDE, x // SIDE

    def patch(self, pipe: Any) -> int:
        """Sizes are multiples of 2 × 2 latents."""
        return SIDE

    def grid(self, model: Any) -> tuple[int, int]:
        """One token each."""
        return model.latent_shape[1], model.latent_shape[2]

    def guided(self, model: Any, scale: float) -> bool:
        """Unless distilled."""
        return scale > 1 and not model.pipeline.config.is_distilled

    def schedule(self, model: Any, n_steps: int) -> dict[str, Any]:
        """Even noise levels, shifted by the number of tokens and of steps."""
        y, x = self.grid(model)
        return {"sigmas": even_sigmas(n_steps), "mu": compute_empirical_mu(image_seq_len=y * x, num_steps=n_steps)}

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """What the chat template leaves of the sequence."""
        return {"tokenizer": self.length(pipe, settings) - chat_length(pipe.tokenizer, enable_thinking=False)}

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Layers of the language model side by side, and the tokens' places."""
        pipe, length = model.pipeline, self.length(model.pipeline, model.settings)
        layers = call_default(pipe, "text_encoder_out_layers")
        found: Encoded = {}
        for prefix, text in (("", prompt), ("negative_", "")):
            embeds, ids = pipe.encode_prompt(
                text, device=pipe._execution_device, max_sequence_length=length, text_encoder_out_layers=layers
            )
            found |= {f"{prefix}embeds": embeds, f"{prefix}ids": ids}
        return found

    def each(self, model: Any, rows: int, scale: float) -> dict[str, Any]:
        """The image tokens' places."""
        y, x = self.grid(model)
        ids = model.pipeline._prepare_latent_ids(torch.empty(rows, 1, y, x))
        return {"img_ids": ids.to(model.device), "guidance": None}

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """On tokens, at times from 0 to 1."""
        t = t.to(sample.device).expand(len(sample)).to(sample.dtype) / 1000
        tokens = sample.flatten(2).permute(0, 2, 1).to(model.denoiser.dtype)
        output = model.denoiser(hidden_states=tokens, timestep=t, return_dict=False, **kwargs)[0]
        return output.permute(0, 2, 1).reshape(sample.shape)

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Each channel scaled back by the autoencoder's running mean and spread, then taken apart."""
        norm = pipe.vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        spread = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
        latents = latents * spread.to(latents.device, latents.dtype) + mean
        return pipe.vae.decode(pipe._unpatchify_latents(latents), return_dict=False)[0]
