"""Training against the diffusion loss with most of the model frozen: clean latents, noising, the bottleneck alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.methods.draws import Drawn
from diffusion_lens.model.families.base import Conditioning
from diffusion_lens.model.hooks import intercept
from diffusion_lens.model.pipelines import DiffusionModel


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """No parameter of these modules takes a gradient inside; their flags return on the way out."""
    flags = [(p, p.requires_grad) for module in modules if module is not None for p in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def need_ddim(model: DiffusionModel, name: str) -> None:
    """Raise ``LensError`` where the model does not sample with DDIM, which training on its trajectories needs."""
    if not model.is_ddim:
        raise LensError(f"{name} is trained on DDIM trajectories; this model samples otherwise.")


@torch.no_grad()
def clean_latents(model: DiffusionModel, batch: Drawn, guidance_scale: float) -> Tensor:
    """Final latents ``[n, c, y, x]`` of a drawn batch: the last step, taken once more."""
    n_steps = len(batch.states)
    scheduler = model.scheduler(n_steps)
    t, x = scheduler.timesteps[-1], batch.states[-1].to(model.device)
    with model.lock:
        conditioning = model.condition(batch.prompt, len(x), guidance_scale)
        prediction = model.predict(scheduler.scale_model_input(x, t), t, conditioning)
    if conditioning.guided:
        empty, own = prediction.chunk(2)
        prediction = empty + guidance_scale * (own - empty)
    return scheduler.step(prediction, t, x, eta=0.0).prev_sample


@dataclass(frozen=True)
class Noised:
    """``x_t`` at timesteps ``t [n]``, and what the model should predict there (noise, x0 or v): ``[n, c, y, x]``."""

    x: Tensor
    t: Tensor
    target: Tensor


def add_noise(scheduler: Any, clean: Tensor, generator: torch.Generator) -> Noised:
    """Noise drawn on the CPU at timesteps drawn evenly, and the target of the model's own prediction type."""
    t = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    x = scheduler.add_noise(clean, noise, t)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(clean, noise, t)
    else:
        target = clean
    return Noised(x, t.to(clean.device), target)


def denoised(scheduler: Any, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``(x0, noise)`` that a raw prediction at ``x_t`` implies, differentiable, for timesteps ``t [n]`` or a scalar."""
    alpha = scheduler.alphas_cumprod.to(x.device)[t].to(x).reshape(-1, 1, 1, 1)
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (x - spread * prediction) / signal, prediction
    if kind == "v_prediction":
        return signal * x - spread * prediction, signal * prediction + spread * x
    return prediction, (x - signal * prediction) / spread.clamp_min(1e-12)


def prediction_loss(model: DiffusionModel, noised: Noised, conditioning: Conditioning) -> Tensor:
    """Mean squared error of the model's prediction, as in its own training."""
    return F.mse_loss(model.predict(noised.x, noised.t, conditioning), noised.target)


class _Reached(Exception):
    """Ends a forward pass at the bottleneck; never leaves this module."""


def read_bottleneck(model: DiffusionModel, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """``h [n, c, y, x]`` of an unguided forward that stops there; gradients flow back to ``x``."""
    found: list[Tensor] = []

    def stop(h: Tensor, h_in: Tensor | None) -> None:
        found.append(h)
        raise _Reached

    try:
        with intercept(model.port, stop):
            model.predict(x, t, conditioning)
    except _Reached:
        pass
    if not found:
        raise LensError("The hooked module did not run in this model's forward pass; choose another hook name.")
    return found[0]


@dataclass(frozen=True)
class Group:
    """Clean latents ``[n, c, y, x]`` of one prompt."""

    prompt: str | None
    latents: Tensor


def pick(groups: Sequence[Group], batch_size: int, generator: torch.Generator) -> tuple[str | None, Tensor]:
    """A batch of one prompt, prompts drawn by their number of images, rows with replacement."""
    sizes = torch.tensor([len(group.latents) for group in groups], dtype=torch.float64)
    group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
    rows = torch.randint(len(group.latents), (min(batch_size, len(group.latents)),), generator=generator)
    return group.prompt, group.latents[rows.to(group.latents.device)]


def join_groups(parts: Sequence[tuple[str | None, Tensor]]) -> list[Group]:
    """Latents by prompt; prompts without any are left out."""
    found: dict[str | None, list[Tensor]] = {}
    for prompt, latents in parts:
        if len(latents):
            found.setdefault(prompt, []).append(latents)
    return [Group(prompt, torch.cat(latents)) for prompt, latents in found.items()]


def rows_where(labels: np.ndarray, index: int) -> Tensor:
    """Row numbers of one class."""
    return torch.from_numpy(np.flatnonzero(labels == index))
