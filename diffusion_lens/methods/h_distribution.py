"""H-Distribution guidance (Parihar et al., Balancing Act, CVPR 2024): the batch's reading pushed to a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion_lens.base.types import EditSpec, LensError, Sampler
from diffusion_lens.features.probes import Probe
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Preset, Task, probe_of
from diffusion_lens.model.denoise import Edit, StepContext

Divergence = Literal["chi2", "kl"]
FLOOR = 1e-6


class HDistributionOptions(MethodOptions):
    """Which distance, and how often its gradient is followed."""

    divergence: Divergence = Field("chi2", title="Distance", description="χ² or Kullback–Leibler to the target.")
    n_inner: int = Field(1, ge=1, le=20, title="Inner steps", description="Gradient steps per denoising step.")
    sampler: Sampler = Field("symmetric", title="Sampler", description="Asymmetric moves the predicted image alone.")


def divergence_gradient(mean: Tensor, target: Tensor, divergence: Divergence) -> Tensor:
    """``∂L/∂p̄ [class]`` for ``L = Σ (p̄ − q)² / q`` (χ²) or ``Σ p̄ ln(p̄ / q)`` (KL); q not below a small floor."""
    q = target.clamp_min(FLOOR)
    return 2 * (mean - q) / q if divergence == "chi2" else (mean.clamp_min(FLOOR) / q).log() + 1


def batch_gradient(probe: Probe, h: Tensor, step: int, target: Tensor, divergence: Divergence) -> Tensor:
    """``n ∂L/∂h`` of the batch's mean softmax ``p̄``, ``[n, c, y, x]``, in closed form (the probe is linear).

    The factor n takes the mean's own ``1/n`` back, so that a step does not shrink with the batch (our working form).
    """
    p = probe.probs(h, step)
    slope = divergence_gradient(p.mean(0), target.to(p), divergence)
    at_logits = p * (slope - (p * slope).sum(1, keepdim=True)) / probe.temperature
    return (at_logits @ probe.weight[step].to(h)).reshape(h.shape)


@dataclass(frozen=True, eq=False)
class HDistributionEdit:
    """``h ← h − γ_t ∇_h L`` on the batch at hand.

    The one edit here whose rows depend on each other: what a batch is pushed to depends on who is in it. It keeps
    its meaning only where every batch is large.
    """

    probe: Probe
    target: Tensor
    strength: float
    options: HDistributionOptions
    spec: EditSpec
    sampler: Sampler
    window: tuple[int, int] | None = None

    @torch.no_grad()
    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``."""
        if self.strength == 0:
            return h
        if context.n_steps != self.probe.n_steps:
            raise LensError(f"The probe has {self.probe.n_steps} steps; draw with {self.probe.n_steps} steps.")
        step, guided = context.index, h
        for _ in range(self.options.n_inner):
            gradient = batch_gradient(self.probe, guided, step, self.target, self.options.divergence)
            guided = guided - self.strength / self.options.n_inner * self._scale(step) * gradient
        return guided

    def _scale(self, step: int) -> float:
        """``γ_t`` for strength 1: one unit of gradient at the logits moves a logit by about one (our working form)."""
        weight = self.probe.weight[step]
        spread = (weight - weight.mean(0)).square().sum(1).mean()
        return float(self.probe.temperature**2 / spread.clamp_min(1e-12))


class HDistribution(Method):
    """Distribution guidance on the bottleneck."""

    key = "h-distribution"
    name = "H-Distribution"
    kind = "guidance"
    source = "Parihar et al. 2024, Balancing Act: Distribution-Guided Debiasing in Diffusion Models, CVPR"
    explanation = (
        "At every step a linear probe reads the bottleneck of the whole batch; the distance of its mean softmax from "
        "the target shares gives a gradient, and h moves against it. Needs no features and no training beyond the "
        "lens's probes. Its result depends on the batch an image rides in, and it trusts the probe without correcting "
        "for its error. Step sizes are scaled so that strength 1 moves a logit by about one, which is our working "
        "form (Parihar et al., CVPR 2024)."
    )
    options = HDistributionOptions
    strengths = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    strength_name = "γ"
    aim = "distribution"
    presets: ClassVar[Mapping[str, Preset]] = {
        "as published": Preset(
            {"divergence": "chi2", "n_inner": 1, "sampler": "symmetric"},
            "χ² on the mean softmax of a batch; the paper's γ is in units of its own probe, ours moves a logit by one.",
        ),
    }

    def learn(self, task: Task) -> Learned:
        """Nothing: the lens's probes are the guidance."""
        return Learned(notes={"probes": "shipped with the lens; their fitting time is not counted"})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """``strength`` is γ; rows of one batch depend on each other."""
        options = fitted.options
        return HDistributionEdit(
            probe_of(fitted.lens, fitted.record.attribute), torch.tensor(fitted.record.target), strength, options,
            fitted.spec(strength), options.sampler,
        )  # fmt: skip
