"""The edits that methods make: nothing, a direction, a gain per channel, a change of weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffusion_lens.base.types import Attribute, EditSpec, GenerationRequest, LensError, Sampler
from diffusion_lens.methods.prompts import said_classes
from diffusion_lens.model.denoise import Edit, StepContext
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.steering.intervene import draw_classes


@dataclass(frozen=True)
class ClassDraw:
    """Which class each image is steered to: drawn from ``shares [class]`` by the image's own seed alone."""

    attribute: Attribute
    shares: tuple[float, ...]
    seed: int

    def rows(self, seeds: tuple[int, ...]) -> Tensor:
        """Class index per seed, ``int64[n]``."""
        return torch.tensor(_draw(self, seeds), dtype=torch.long)


@lru_cache(maxsize=256)
def _draw(draw: ClassDraw, seeds: tuple[int, ...]) -> tuple[int, ...]:
    target = dict(zip(draw.attribute.classes, draw.shares, strict=True))
    drawn = draw_classes(draw.attribute, target, seeds, draw.seed)
    of = {seed: draw.attribute.index(label) for label, group in drawn.items() for seed in group}
    return tuple(of[seed] for seed in seeds)


def at_step(table: Tensor, context: StepContext) -> Tensor:
    """Entry of this step of ``table [class, step or 1, …]`` → ``[class, …]``; refuses runs of another length."""
    if table.shape[1] == 1:
        return table[:, 0]
    if table.shape[1] != context.n_steps:
        raise LensError(f"This edit was fitted on {table.shape[1]} steps; draw with {table.shape[1]} steps.")
    return table[:, context.index]


@dataclass(frozen=True, eq=False)
class NoEdit:
    """Changes nothing."""

    spec: EditSpec
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """``h`` itself."""
        return h


@dataclass(frozen=True, eq=False)
class DirectionEdit:
    """``h' = h + strength · d[class of the image, step]`` with ``directions [class, step or 1, c, y, x]``."""

    directions: Tensor
    strength: float
    draw: ClassDraw
    sampler: Sampler
    window: tuple[int, int] | None
    spec: EditSpec

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``."""
        if self.strength == 0:
            return h
        chosen = at_step(self.directions, context)[self.draw.rows(context.seeds)]
        return h + self.strength * chosen.to(h)


@dataclass(frozen=True, eq=False)
class ChannelEdit:
    """``h'_c = gain[class of the image, c] · h_c`` with ``gains [class, c]``; a gain of 1 is the identity."""

    gains: Tensor
    draw: ClassDraw
    sampler: Sampler
    window: tuple[int, int] | None
    spec: EditSpec

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``."""
        return h * self.gains[self.draw.rows(context.seeds)].to(h)[:, :, None, None]


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """A change of the model itself while a batch is drawn; the bottleneck is left as the changed model makes it."""

    model_context: Callable[[DiffusionModel], AbstractContextManager[object]]
    spec: EditSpec
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """``h`` itself."""
        return h


@dataclass(frozen=True, eq=False)
class RequestEdit:
    """An edit that is another one for another batch: ``choose`` makes it from the batch's request."""

    choose: Callable[[GenerationRequest], Edit]
    spec: EditSpec
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None

    def for_request(self, request: GenerationRequest) -> Edit:
        """The edit of one batch."""
        return self.choose(request)

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """Nothing: whoever draws asks ``for_request`` first."""
        raise LensError("This edit depends on the prompt; draw with it, or ask it for the edit of a request.")


def gated(edit: Edit, attribute: Attribute) -> RequestEdit:
    """``edit``, but nothing for prompts that name a class of ``attribute`` themselves: what was asked for stays."""

    def choose(request: GenerationRequest) -> Edit:
        return NoEdit(edit.spec) if said_classes(request.prompt, attribute) else chosen(edit, request)

    return RequestEdit(choose, edit.spec, edit.sampler, edit.window)


def chosen(edit: Edit, request: GenerationRequest) -> Edit:
    """The edit of one batch, for edits of every kind."""
    choose: Callable[[GenerationRequest], Edit] | None = getattr(edit, "for_request", None)
    return edit if choose is None else choose(request)
