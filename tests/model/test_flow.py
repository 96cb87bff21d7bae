"""Steps along a straight path: the asymmetric edit against a slow form, and against DDIM's on the same path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from edits import STEPS, Turn, bend
from tiny_transformers import make_sd3
from torch import Tensor

from diffusion_lens.base.types import LensError
from diffusion_lens.model.generate import StepContext, generate, request
from diffusion_lens.model.hooks import edit_output
from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline
from diffusion_lens.model.samplers import choose_sampler, flow_shift, signal_share

SEEDS = (3, 1)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    """Tiny Stable Diffusion 3."""
    return wrap_pipeline(make_sd3(), "tiny-sd3")


def slow_asymmetric(model: DiffusionModel, prompt: str, scale: float) -> np.ndarray:
    """Two full passes a step, everything spelt out: x' = (1 - s') x0(v edited) + s' e(v)."""
    n, scheduler = len(SEEDS), model.scheduler(STEPS)
    conditioning, x = model.condition(prompt, n, scale), model.noise(SEEDS)
    for index, t in enumerate(scheduler.timesteps):

        def turn(h: Tensor, index: int = index) -> Tensor:
            context = StepContext(index, STEPS, 0, SEEDS, None, 0.0, h)
            return torch.cat([h[:-n], bend(h[-n:], context)])

        with torch.no_grad():
            plain = model.predict(x, t, conditioning)
            with edit_output(model.port, turn):
                edited = model.predict(x, t, conditioning)
        v, v_edited = (p[:n] + scale * (p[n:] - p[:n]) if conditioning.guided else p for p in (plain, edited))
        sigma, following = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        x = (1 - following) * (x - sigma * v_edited) + following * (x + (1 - sigma) * v)
    return model.decode(x)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_asymmetric_edits_equal_two_full_passes(model: DiffusionModel, scale: float) -> None:
    asked = request(model, "a man", SEEDS, STEPS, scale)
    fast = generate(model, asked, edit=Turn(bend, "asymmetric")).images
    assert np.abs(fast.astype(int) - slow_asymmetric(model, "a man", scale)).max() <= 1
    assert not np.array_equal(fast, generate(model, asked, edit=Turn(bend, "symmetric")).images)


def test_the_asymmetric_step_is_ddims_on_the_same_path() -> None:
    """x_s = (1 - s) x0 + s e is DDIM's x_t over a(t) + b(t), where b / a = s / (1 - s)."""
    flow = FlowMatchEulerDiscreteScheduler(shift=2.0)
    flow.set_timesteps(4)
    g = torch.Generator().manual_seed(0)
    x, v, v_edited = (torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    for index in range(1, 4):
        sigma, following = (float(s) for s in flow.sigmas[index : index + 2])
        flow._step_index = index
        step = flow.step(v, flow.timesteps[index], x).prev_sample
        mine = step + flow_shift(flow, index, v, v_edited)
        alpha, alpha_next = signal_share(flow, index), (1 - following) ** 2 / ((1 - following) ** 2 + following**2)
        ddim = DDIMScheduler(clip_sample=False, num_train_timesteps=2, set_alpha_to_one=False)
        ddim.alphas_cumprod = torch.tensor([alpha_next, alpha], dtype=torch.float64)
        ddim.final_alpha_cumprod = ddim.alphas_cumprod[0]
        ddim.set_timesteps(2)
        norm, norm_next = (np.hypot(1 - s, s) for s in (sigma, following))
        eps, eps_edited = x + (1 - sigma) * v, x + (1 - sigma) * v_edited
        there = ddim.step(eps, 1, x / norm)
        clean = ddim.step(eps_edited, 1, x / norm).pred_original_sample
        theirs = there.prev_sample + alpha_next**0.5 * (clean - there.pred_original_sample)
        torch.testing.assert_close(mine.double(), theirs * norm_next, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "own",
    [
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
        UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda own: type(own).__name__,
)
def test_other_solvers_of_the_flow_become_euler_steps_and_say_so(own: Any) -> None:
    chosen, notes = choose_sampler(own, latents=True, flow=True)
    assert type(chosen) is FlowMatchEulerDiscreteScheduler and chosen.config.shift == 3.0
    assert not chosen.config.stochastic_sampling
    assert len(notes) == 1 and "shift 3" in notes[0]
    with pytest.raises(LensError, match="is not supported as it is"):
        choose_sampler(own, latents=True, flow=True, keep=True)


def test_samplers_that_follow_no_flow_are_refused_and_euler_steps_stay() -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert choose_sampler(own, latents=True, flow=True) == (own, ())
    for other in (DDIMScheduler(), DPMSolverMultistepScheduler()):
        with pytest.raises(LensError, match="follows a flow"):
            choose_sampler(other, latents=True, flow=True)
    with pytest.raises(LensError, match="invert_sigmas"):
        choose_sampler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), latents=True, flow=True)
