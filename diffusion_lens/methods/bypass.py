"""Mid-block bypass (Hakemi et al., Deeper Diffusion Models Amplify Bias, arXiv 2505.17560)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from diffusion_lens.base.types import EditSpec, LensError, Sampler
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Task
from diffusion_lens.model.denoise import Edit, StepContext

Ramp = Literal["linear", "cosine", "constant"]


class BypassOptions(MethodOptions):
    """When, and how fast, the mid-block is passed by."""

    first: float = Field(0.0, ge=0, lt=1, title="Begins", description="Share of the steps before the window.")
    last: float = Field(0.6, gt=0, le=1, title="Ends", description="Share of the steps at which the window ends.")
    ramp: Ramp = Field("linear", title="Ramp", description="How λ grows to its maximum inside the window.")

    @model_validator(mode="after")
    def _ordered(self) -> BypassOptions:
        if self.first >= self.last:
            raise ValueError("first must lie before last")
        return self


def schedule(n_steps: int, options: BypassOptions) -> np.ndarray:
    """``λ_t / λ_max`` for every step ``[n_steps]``: ramps to 1 inside the window, 0 elsewhere (our working form)."""
    start, stop = int(options.first * n_steps), max(int(options.first * n_steps) + 1, round(options.last * n_steps))
    place = np.arange(1, stop - start + 1) / (stop - start)
    shape = {"linear": place, "cosine": (1 - np.cos(np.pi * place)) / 2, "constant": np.ones_like(place)}[options.ramp]
    values = np.zeros(n_steps)
    values[start:stop] = shape
    return values


@dataclass(frozen=True, eq=False)
class BypassEdit:
    """``h' = (1 − λ_t) mid(h_in) + λ_t h_in``, by difference; λ = 0 returns ``h`` itself."""

    strength: float
    options: BypassOptions
    spec: EditSpec
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``; raises ``LensError`` where input and output have different shapes."""
        share = self.strength * float(schedule(context.n_steps, self.options)[context.index])
        if share == 0:
            return h
        if context.h_in is None or context.h_in.shape != h.shape:
            raise LensError("A bypass needs a module whose input and output have one shape; hook the mid-block.")
        return h + share * (context.h_in - h)


class Bypass(Method):
    """Mid-block bypass."""

    key = "bypass"
    name = "Mid-block bypass"
    kind = "bypass"
    source = "Hakemi, Akhtar, Hassan and Mian 2025, Deeper Diffusion Models Amplify Bias, arXiv 2505.17560"
    explanation = (
        "Lets the image pass by the deepest block in part: h' = (1 − λ_t) mid(h) + λ_t h, where λ_t ramps up to a "
        "maximum inside a window of steps and is 0 elsewhere. It needs no training and aims at no group: the paper's "
        "point is that depth amplifies the training set's bias, and that passing by the mid-block raises variance. The "
        "paper does not publish its schedule, so window and ramp are our working form; under guidance the conditional "
        "half alone is changed (Hakemi et al., arXiv 2505.17560)."
    )
    options = BypassOptions
    strengths = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    strength_name = "λ max"
    limit = 1.0
    aim = "none"

    def learn(self, task: Task) -> Learned:
        """Nothing to learn."""
        return Learned()

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """``strength`` is λ_max, from 0 to 1."""
        if not 0 <= strength <= 1:
            raise LensError(f"λ lies between 0 and 1; it is {strength:g}.")
        return BypassEdit(strength, fitted.options, fitted.spec(strength))
