"""Samplers: DDIM stands in by proof alone, what is replaced is said, and what cannot run is refused when opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import make_pixel_pipeline, make_text_pipeline, make_xl_pipeline
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from diffusion_lens.base.types import LensError
from diffusion_lens.model.pipelines import DiffusionModel, load_model, wrap_pipeline
from diffusion_lens.model.samplers import REPLACED, choose_sampler

SHAPES: tuple[dict[str, Any], ...] = (
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"trained_betas": torch.linspace(1e-4, 0.5, 1000).tolist(), "prediction_type": "v_prediction"},
)


def slow_signal_shares(config: Any) -> torch.Tensor:
    """Cumulative products by a loop, from the definition of each schedule (float64 ``[1000]``)."""
    n, betas = config.num_train_timesteps, []
    for i in range(n):
        if config.trained_betas is not None:
            betas.append(config.trained_betas[i])
        elif config.beta_schedule == "scaled_linear":
            a, b = config.beta_start**0.5, config.beta_end**0.5
            betas.append((a + (b - a) * i / (n - 1)) ** 2)
        else:
            bar = [torch.cos(torch.tensor((t / n + 0.008) / 1.008 * torch.pi / 2)).item() ** 2 for t in (i, i + 1)]
            betas.append(min(1 - bar[1] / bar[0], 0.999))
    share, shares = 1.0, []
    for beta in betas:
        share *= 1 - beta
        shares.append(share)
    return torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.get("beta_schedule", "trained"))
@pytest.mark.parametrize("name", [name for name in REPLACED if name != "DPMSolverSDEScheduler"])
def test_what_becomes_ddim_keeps_its_noise_levels_and_lists_the_steps_it_takes(name: str, shape: Any) -> None:
    own = getattr(diffusers, name)(**shape)
    chosen, notes = choose_sampler(own, latents=True)
    assert type(chosen) is DDIMScheduler
    assert chosen.config.prediction_type == own.config.prediction_type
    torch.testing.assert_close(chosen.alphas_cumprod.double(), slow_signal_shares(own.config), rtol=1e-3, atol=1e-6)
    assert len(notes) == 1 and name in notes[0] and "DDIM" in notes[0]
    for n in (4, 10, 16):
        chosen.set_timesteps(n)
        landed = [int(t) - 1000 // n for t in chosen.timesteps[:-1]]
        assert max(abs(a - int(b)) for a, b in zip(landed, chosen.timesteps[1:], strict=True)) <= 1


def test_evenly_spread_steps_become_trailing_and_others_stay() -> None:
    for asked, got in (("linspace", "trailing"), ("leading", "leading"), ("trailing", "trailing")):
        own = DPMSolverMultistepScheduler(timestep_spacing=asked, steps_offset=1)
        chosen, _ = choose_sampler(own, latents=True)
        assert (chosen.config.timestep_spacing, chosen.config.steps_offset) == (got, 1)
    chosen.set_timesteps(10)
    assert int(chosen.timesteps[0]) == 999  # as the model's own first step


def test_ddim_stays_as_it_is_and_an_odd_spacing_is_said() -> None:
    for spacing, n in (("leading", 0), ("trailing", 0), ("linspace", 1)):
        own = DDIMScheduler(timestep_spacing=spacing)
        chosen, notes = choose_sampler(own, latents=False)
        assert chosen is own and len(notes) == n


def test_pixels_are_clipped_and_latents_are_not() -> None:
    assert choose_sampler(DDPMScheduler(), latents=False)[0].config.clip_sample
    assert not choose_sampler(DDPMScheduler(clip_sample=False), latents=False)[0].config.clip_sample
    assert not choose_sampler(PNDMScheduler(skip_prk_steps=True), latents=True)[0].config.clip_sample


def test_few_step_samplers_stay(tiny_models: dict[str, DiffusionModel]) -> None:
    assert type(tiny_models["lcm"].pipeline.scheduler).__name__ == "LCMScheduler" and tiny_models["lcm"].notes == ()
    pipe = make_xl_pipeline()
    pipe.scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    assert not wrap_pipeline(pipe, "turbo").is_ddim
    pipe.scheduler = EulerDiscreteScheduler()
    assert wrap_pipeline(pipe, "base").is_ddim
    assert not wrap_pipeline(pipe, "base", keep_scheduler=True).is_ddim
    for own in (LCMScheduler(), TCDScheduler(), EulerAncestralDiscreteScheduler(timestep_spacing="trailing")):
        assert choose_sampler(own, latents=True) == (own, ())


def test_the_callers_pipeline_keeps_its_sampler_and_what_was_replaced_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make_pixel_pipeline()
    model = wrap_pipeline(pipe, "x")
    assert type(pipe.scheduler).__name__ == "DDPMScheduler" and model.is_ddim
    assert model.scheduler(5) is not model.scheduler(5)
    assert ["DDPMScheduler" in note for note in model.notes] == [True]
    pipe.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", offline=True)
    assert loaded.notes == model.notes
    assert any(record.getMessage() == f"m: {model.notes[0]}" for record in caplog.records)


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler", "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler", "IPNDMScheduler",
        "UnCLIPScheduler", "RePaintScheduler", "CogVideoXDDIMScheduler", "DDIMInverseScheduler", "KarrasVeScheduler",
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", [False, True])
def test_other_kinds_of_noise_are_refused_by_name(name: str, keep: bool) -> None:
    with pytest.raises(LensError, match=f"{name} is not supported"):
        choose_sampler(getattr(diffusers, name)(), latents=True, keep=keep)


def test_a_class_of_the_same_name_is_not_trusted() -> None:
    class DDPMScheduler(diffusers.DDPMScheduler):
        pass

    with pytest.raises(LensError, match="DDPMScheduler is not supported"):
        choose_sampler(DDPMScheduler(), latents=True)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "continuous"),
        (lambda: EulerDiscreteScheduler(timestep_type="continuous", timestep_spacing="trailing"), "continuous"),
        (lambda: UniPCMultistepScheduler(use_flow_sigmas=True), "continuous"),
        (lambda: DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow_prediction"),
        (lambda: DDPMScheduler(beta_schedule="sigmoid"), "'sigmoid'"),
        (lambda: DDPMScheduler(beta_schedule="laplace"), "'laplace'"),
        (lambda: DDIMScheduler(prediction_type="score"), "'score'"),
        (lambda: EulerAncestralDiscreteScheduler(timestep_spacing="trailing", prediction_type="sample"), "take a step"),
        (lambda: DDIMScheduler(timestep_spacing="wild"), "cannot take a step"),
        (lambda: DDIMScheduler(trained_betas=[0.1] * 10), "10 noise levels for 1000"),
        (lambda: DDPMScheduler(trained_betas=[0.1] * 10), "10 noise levels for 1000"),
        (lambda: DDIMScheduler(trained_betas=[1.5] * 1000), "do not rise"),
        (lambda: DDIMScheduler(trained_betas=[-0.1] * 1000), "do not rise"),
        (lambda: DDIMScheduler(trained_betas=[float("nan")] * 1000), "do not rise"),
        (lambda: DDIMScheduler(rescale_betas_zero_snr=True), "ends in pure noise"),
        (lambda: HeunDiscreteScheduler(beta_schedule="exp"), "'exp'"),
    ],
)
def test_noise_levels_and_predictions_that_cannot_be_sampled_are_refused(own: Any, words: str) -> None:
    with pytest.raises(LensError, match=words) as caught:
        choose_sampler(own(), latents=True)
    assert "\n" not in str(caught.value)


def test_noise_levels_that_only_look_alike_are_refused() -> None:
    own = DDPMScheduler()
    own.alphas_cumprod = own.alphas_cumprod * 0.99
    with pytest.raises(LensError, match="does not share"):
        choose_sampler(own, latents=True)


def test_zero_terminal_signal_is_kept() -> None:
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for own in (DDPMScheduler(**settings), EulerDiscreteScheduler(**settings), DPMSolverMultistepScheduler(**settings)):
        chosen, _ = choose_sampler(own, latents=True)
        assert chosen.config.rescale_betas_zero_snr and float(chosen.alphas_cumprod[-1]) < 1e-6


def test_kept_samplers_are_those_that_runs_know() -> None:
    pipe = make_text_pipeline()
    pipe.scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True)
    with pytest.raises(LensError, match="PNDMScheduler is not supported; leave keep_scheduler off"):
        wrap_pipeline(pipe, "x", keep_scheduler=True)
    with pytest.raises(LensError, match="cannot take a step"):
        choose_sampler(DDPMScheduler(variance_type="learned_range"), latents=False, keep=True)


def test_choosing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    for own in (DDPMScheduler(), LCMScheduler(), EulerAncestralDiscreteScheduler(timestep_spacing="trailing")):
        choose_sampler(own, latents=True, keep=True)
    assert torch.equal(before, torch.get_rng_state())
