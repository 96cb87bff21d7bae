"""Controls: what a steering method has to beat. Random features, exchanged poles, noise, and plainly asking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffusion_lens.base.types import EditSpec, GenerationRequest, Intervention, LensError, Sampler
from diffusion_lens.methods.edits import ClassDraw, NoEdit
from diffusion_lens.methods.prompts import name_class
from diffusion_lens.methods.protocol import SINCE_0_5, Fitted, Learned, Method, MethodOptions, Task
from diffusion_lens.methods.sae_features import (
    STRENGTHS,
    AttributedOptions,
    Change,
    attribution_of,
    feature_edit,
    learn_attribution,
    setting_with,
)
from diffusion_lens.model.denoise import Edit, StepContext
from diffusion_lens.steering.settings import control_intervention, opposite_set


class ControlOptions(AttributedOptions):
    """As DiffLens', which the control imitates."""

    attribution: Literal["shipped", "fitted"] = Field(
        "shipped",
        title="Attribution",
        description="The lens's own, or one on the images drawn for this fit, as for DiffLens.",
        json_schema_extra=SINCE_0_5,
    )
    control_seed: int = Field(0, ge=0, title="Seed of the control")


class _SaeControl(Method):
    """A control that imitates DiffLens' edit with the same attribution."""

    kind = "control"
    options: ClassVar[type[MethodOptions]] = ControlOptions
    strengths = STRENGTHS
    strength_name = "β − 1"
    is_control = True

    def learn(self, task: Task) -> Learned:
        """What DiffLens learns."""
        return learn_attribution(task)

    def _edit(self, fitted: Fitted, strength: float, change: Change | None) -> Edit:
        return feature_edit(fitted, attribution_of(fitted), strength, change)


class RandomFeatures(_SaeControl):
    """Live features drawn at random."""

    key = "control-random"
    name = "Control: random features"
    source = "ours"
    explanation = (
        "Steers as many SAE features as DiffLens does, drawn at random among those as active, just as far. What this "
        "moves, any push of that size would move: the chosen features' effect is what goes beyond it (our control)."
    )

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each class's features replaced by random ones."""
        activity, seed = fitted.lens.atlas.activity, fitted.options.control_seed
        return self._edit(fitted, strength, lambda own: control_intervention(own, "random", activity, seed))


class SignFlip(_SaeControl):
    """The poles exchanged."""

    key = "control-flip"
    name = "Control: poles exchanged"
    source = "ours"
    explanation = (
        "Steers the features of the opposite pole instead of the target's, so the share should move the other way. If "
        "it does not, the features carry no direction (our control)."
    )

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each intervention with its poles exchanged; one of a single pole steers by the opposite's features."""
        attribution = attribution_of(fitted)
        setting = setting_with(fitted.lens, fitted.record.attribute, fitted.options)

        def flip(own: Intervention) -> Intervention:
            if own.opposite is not None:
                return replace(own, features=own.opposite, opposite=own.features)
            other = opposite_set(attribution, own.features, setting.n_features, setting.window)
            if other is None:
                raise LensError(f"No feature speaks against {own.features.target}; there is nothing to exchange.")
            return replace(own, features=other)

        return self._edit(fitted, strength, flip)


@dataclass(frozen=True, eq=False)
class NoiseEdit:
    """``h' = h + ‖δ‖ z / ‖z‖`` where δ is what ``inner`` would add to that image at that step, and z is noise.

    Noise comes from the image's seed and the step alone.
    """

    inner: Edit
    seed: int
    spec: EditSpec
    sampler: Sampler
    window: tuple[int, int] | None

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``; images that ``inner`` leaves alone stay as they are."""
        delta = (self.inner.apply(h, context) - h).flatten(1).norm(dim=1)
        if not bool((delta > 0).any()):
            return h
        noise = torch.from_numpy(np.stack([self._noise(s, context.index, tuple(h.shape[1:])) for s in context.seeds]))
        noise = noise.to(h)
        size = delta / noise.flatten(1).norm(dim=1)
        moved = h + size[:, None, None, None] * noise
        return torch.where((delta > 0)[:, None, None, None], moved, h)

    def _noise(self, image: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng([self.seed, image, step]).standard_normal(shape, dtype=np.float32)


class MatchedNoise(_SaeControl):
    """Noise as large as the edit."""

    key = "control-noise"
    name = "Control: matched noise"
    source = "ours"
    explanation = (
        "Adds noise to the bottleneck, in every image and at every step exactly as large as DiffLens' edit would be "
        "there. Tells what comes of pushing h at all from what comes of pushing it in the right direction (our "
        "control)."
    )

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Noise of the size of the feature edit at ``strength``."""
        inner = self._edit(fitted, strength, None)
        return NoiseEdit(inner, fitted.options.control_seed, fitted.spec(strength), inner.sampler, inner.window)


class PromptOptions(MethodOptions):
    """How a class is said."""

    template: str = Field("", title="Prompt template", description="With {prompt} and {label}; empty: our own rule.")


@dataclass(frozen=True, eq=False)
class PromptEdit:
    """Tells a ``share`` of the images a prompt that names the class drawn for each; the bottleneck is left alone."""

    draw: ClassDraw
    share: float
    template: str
    spec: EditSpec
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """``h`` itself."""
        return h

    def prompts(self, request: GenerationRequest) -> Sequence[str | None]:
        """One prompt per image; those of images without a class stay the request's."""
        classes = self.classes(request.seeds)
        return [
            name_class(request.prompt, self.draw.attribute, classes[seed], template=self.template)
            if seed in classes
            else request.prompt
            for seed in request.seeds
        ]

    def classes(self, seeds: tuple[int, ...]) -> dict[int, str]:
        """Seed → class, of the images whose prompt is rewritten."""
        drawn = zip(seeds, self.draw.rows(seeds).tolist(), strict=True)
        return {
            seed: self.draw.attribute.classes[label]
            for seed, label in drawn
            if np.random.default_rng([self.draw.seed, seed, 1]).random() < self.share
        }


class PromptRewriting(Method):
    """Asking for it."""

    key = "control-prompt"
    name = "Control: prompt rewriting"
    kind = "control"
    source = "ours"
    explanation = (
        'Names a class in the prompt ("a portrait of a female firefighter"), drawn for each image from the target '
        "shares, and leaves the model alone. The obvious remedy, which any method has to be compared with; it works "
        "only for models that take prompts and know the word. Strength is the share of images that are rewritten (our "
        "control)."
    )
    options = PromptOptions
    strengths = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
    strength_name = "share rewritten"
    limit = 1.0
    is_control = True

    def learn(self, task: Task) -> Learned:
        """Nothing; refuses models without prompts."""
        if not task.model.is_text:
            raise LensError("This model takes no prompt, so a class cannot be named in it.")
        return Learned()

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Rewrite for the images whose own draw lies below ``strength``, from 0 to 1."""
        if not 0 <= strength <= 1:
            raise LensError(f"The share of rewritten prompts lies from 0 to 1; it is {strength:g}.")
        if strength == 0:
            return NoEdit(fitted.spec(strength))
        draw = ClassDraw(fitted.attribute, fitted.record.target, fitted.options.draw_seed)
        return PromptEdit(draw, strength, fitted.options.template, fitted.spec(strength))
