"""Qwen-Image: two streams; guidance by a call of its own, its result brought back to the length it had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_lens.model.families.base import Encoded, Settings
from diffusion_lens.model.families.flux import PAIR, Packed
from diffusion_lens.model.families.packing import pack, unpack
from diffusion_lens.model.prompts import token_ids
from diffusion_lens.model.sites import Layout


class QwenImage(Packed):
    """``QwenImagePipeline``; a guidance scale is its ``true_cfg_scale``, against the empty prompt."""

    kind = "qwen-image"
    pipelines = ("QwenImagePipeline",)
    encoders = ("text_encoder",)
    guidance = "apart"
    text_varies = True
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states"}
    layouts: ClassVar[Mapping[str, Layout]] = {
        r"transformer_blocks\.\d+": PAIR,
        r"transformer_blocks\.\d+\.attn": Layout(("image", "text")),
        r"transformer_blocks\.\d+\.img_mlp": Layout(("image",)),
    }
    defaults = (50, 4.0)

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """What is left of the sequence beside the template's end."""
        around = len(token_ids(pipe.prompt_template_encode.format(""), pipe.tokenizer))
        return {"tokenizer": self.length(pipe, settings) - (around - pipe.prompt_template_encode_start_idx)}

    def encode(self, model: Any, prompt: str) -> Encoded:
        """As many tokens as the prompt has."""
        pipe, length = model.pipeline, self.length(model.pipeline, model.settings)
        device = pipe._execution_device
        told = {
            p: pipe.encode_prompt(p, device=device, max_sequence_length=length)[0] for p in dict.fromkeys((prompt, ""))
        }
        return {"embeds": told[prompt], "negative_embeds": told[""]}

    def shared(self, model: Any, scale: float) -> dict[str, Any]:
        """The image's grid; one prompt has no padding to be masked."""
        guidance = None
        if model.denoiser.config.guidance_embeds:
            guidance = torch.full([1], scale, device=model.device, dtype=torch.float32)
        grid = [[(1, *self.grid(model))]]
        return {
            "img_shapes": grid, "encoder_hidden_states_mask": None, "guidance": guidance, "attention_kwargs": {},
        }  # fmt: skip

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Guided, then each token brought to the length of the prediction with the prompt."""
        size = conditional.shape[2], conditional.shape[3]
        empty, own = pack(unconditional), pack(conditional)
        both = empty + scale * (own - empty)
        norm, made = torch.norm(own, dim=-1, keepdim=True), torch.norm(both, dim=-1, keepdim=True)
        return unpack(both * (norm / made), size)

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Each channel scaled back by its own mean and spread; one frame of a film decoder."""
        config, latents = pipe.vae.config, latents.to(pipe.vae.dtype)[:, :, None]
        mean, std = (torch.tensor(v).view(1, config.z_dim, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        spread = 1.0 / std.to(latents.device, latents.dtype)
        latents = latents / spread + mean.to(latents.device, latents.dtype)
        return pipe.vae.decode(latents, return_dict=False)[0][:, :, 0]
