"""DiT: image tokens alone, told a class of ImageNet; guidance by a doubled batch, the half with the class first."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_lens.base.types import LensError
from diffusion_lens.model.families.base import Encoded, Family, Settings
from diffusion_lens.model.families.pixart import BLOCKS
from diffusion_lens.model.sites import Layout


class DiT(Family):
    """``DiTPipeline``. A prompt is the name of a class, or its number; the empty one is no class."""

    kind = "dit"
    pipelines = ("DiTPipeline",)
    flow = False
    conditional_first = True
    arguments: ClassVar[Mapping[str, str]] = {"class": "class_labels"}
    layouts: ClassVar[Mapping[str, Layout]] = BLOCKS
    defaults = (50, 4.0)

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """One size."""
        if settings.size is not None:
            raise LensError("This model draws images of one size; leave the size out.")
        return super().latent_size(pipe, settings)

    def check_prompt(self, model: Any, prompt: str) -> None:
        """Raise ``LensError`` for what is no class, naming some like it."""
        self._class(model, prompt)

    def _class(self, model: Any, prompt: str) -> int:
        names, n = model.pipeline.labels, model.denoiser.config.num_embeds_ada_norm
        if prompt == "":
            return int(n)
        if prompt in names:
            return int(names[prompt])
        if prompt.isdecimal() and int(prompt) < n:
            return int(prompt)
        like = difflib.get_close_matches(prompt, names, n=3) or list(names)[:3]
        known = f", e.g. {', '.join(like)}" if like else ""
        raise LensError(
            f"“{prompt[:60]}” is no class of this model: give a class's name{known}, or a number below {n}."
        )

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Numbers of classes."""
        return {
            "class": torch.tensor([self._class(model, prompt)]),
            "negative_class": torch.tensor([self._class(model, "")]),
        }

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The prediction of noise."""
        return self.prediction_channels(model, super().forward(model, sample, t, kwargs))

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Scaled back and decoded, in the stock call's own order of operations."""
        return pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents, return_dict=False)[0]
