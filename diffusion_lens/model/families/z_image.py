"""Z-Image: one joined sequence, image first; guidance by a doubled batch, the half with the prompt first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusion_lens.model.families.base import Encoded, Family, Settings, chat_length
from diffusion_lens.model.families.packing import SIDE, token_shift
from diffusion_lens.model.hooks import PerImage
from diffusion_lens.model.sites import Layout

FIRST = Layout(("image", "text"), joined=True, updates=True, arguments=(("image", (0, "x")),))
STOCK_SIDE = 1024
"""Pixels a side of the stock call."""


class ZImage(Family):
    """``ZImagePipeline``; latents are float32, and what the network predicts is the other way round."""

    kind = "z-image"
    pipelines = ("ZImagePipeline",)
    encoders = ("text_encoder",)
    conditional_first = True
    text_varies = True
    layouts: ClassVar[Mapping[str, Layout]] = {r"(layers|noise_refiner)\.\d+": FIRST}
    defaults = (50, 5.0)

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """The stock call's own size, or another."""
        usual = (STOCK_SIDE // pipe.vae_scale_factor,) * 2
        return usual if settings.size is None else super().latent_size(pipe, settings)

    def patch(self, pipe: Any) -> int:
        """A token is 2 × 2 latents."""
        return SIDE

    def noise(self, model: Any, generators: list[torch.Generator]) -> Tensor:
        """In float32 whatever the transformer's dtype."""
        shape = (len(generators), *model.latent_shape)
        return randn_tensor(shape, generator=generators, device=model.device, dtype=torch.float32)

    def schedule(self, model: Any, n_steps: int) -> dict[str, Any]:
        """Even noise levels, shifted."""
        y, x = self.grid(model)
        return {"sigmas": get_default_z_image_sigmas(n_steps), "mu": token_shift(model.pipeline.scheduler, y * x)}

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """What the chat template leaves of the sequence."""
        return {"tokenizer": self.length(pipe, settings) - chat_length(pipe.tokenizer, enable_thinking=True)}

    def encode(self, model: Any, prompt: str) -> Encoded:
        """As many tokens as the prompt has."""
        pipe = model.pipeline
        own, empty = pipe.encode_prompt(
            prompt, device=pipe._execution_device, do_classifier_free_guidance=True,
            max_sequence_length=self.length(pipe, model.settings),
        )  # fmt: skip
        return {"embeds": own[0], "negative_embeds": empty[0]}

    def each(self, model: Any, rows: int, scale: float) -> dict[str, Any]:
        """Nothing besides the texts."""
        return {}

    def guided(self, model: Any, scale: float) -> bool:
        """On above 0: a scale of 0 is what 1 is elsewhere."""
        return scale > 0

    def rows(self, encoded: Encoded, prefix: str, n: int) -> dict[str, Any]:
        """One text per image, each of its own length."""
        return {"cap_feats": PerImage([encoded[f"{prefix}embeds"]] * n)}

    def both(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        """One list after the other."""
        return {name: PerImage([*first[name], *second[name]]) for name in first}

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """At times from noise to image; the sign turned, as the stock call does after guidance, which is the same."""
        t = (1000 - t.to(sample.device).expand(len(sample))) / 1000
        images = list(sample.to(model.denoiser.dtype).unsqueeze(2).unbind(dim=0))
        output = model.denoiser(images, t, list(kwargs["cap_feats"]), return_dict=False)[0]
        return -torch.stack([one.float() for one in output], dim=0).squeeze(2)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """From the prediction with the prompt on, not from that without."""
        return conditional + scale * (conditional - unconditional)

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Scaled and shifted back, and decoded."""
        latents = (latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
        return pipe.vae.decode(latents, return_dict=False)[0]
