"""Edits by plain functions, and the stock pipeline's own images, for the tests of drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from diffusion_lens.base.types import EditSpec, GenerationRequest, Sampler
from diffusion_lens.model.generate import StepContext, request
from diffusion_lens.model.pipelines import DiffusionModel, seed_generators

STEPS = 4
SAMPLERS: tuple[Sampler, ...] = ("symmetric", "asymmetric")


@dataclass
class Turn:
    """An edit by a plain function of ``(h, context)``; notes every context it saw."""

    fn: Callable[[Tensor, StepContext], Tensor]
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None
    seen: list[StepContext] = field(default_factory=list)

    @property
    def spec(self) -> EditSpec:
        return EditSpec.of_custom("turn")

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        self.seen.append(context)
        return self.fn(h, context)


def bend(h: Tensor, context: StepContext) -> Tensor:
    """An edit that depends on content and step."""
    return 1.3 * h + 0.4 * (context.index + 1)


def nothing(h: Tensor, context: StepContext) -> Tensor:
    """The identity, as a new tensor."""
    return h + 0.0


def ask(model: DiffusionModel, seeds: Sequence[int] = (3, 1, 2), scale: float = 4.0) -> GenerationRequest:
    """A guided request where the model can be guided."""
    return request(model, "a portrait of a nurse" if model.is_text else None, seeds, STEPS, scale)


def stock(pipe: Any, asked: GenerationRequest) -> np.ndarray:
    """The images of the stock pipeline's own call."""
    kwargs: dict[str, Any] = {"batch_size": len(asked.seeds)}
    if asked.prompt is not None:
        kwargs = {"prompt": asked.prompt, "num_images_per_prompt": len(asked.seeds)}
        kwargs["guidance_scale"] = asked.guidance_scale
    generators = seed_generators(asked.seeds)
    images = pipe(num_inference_steps=asked.n_steps, generator=generators, output_type="pil", **kwargs).images
    return np.stack([np.array(image) for image in images])


def hooks_in(model: DiffusionModel) -> int:
    """Hooks left anywhere inside the U-Net."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.denoiser.modules())
