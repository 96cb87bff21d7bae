"""Which sampler a pipeline runs with: its own where it is one we know, DDIM where both share the noise schedule.

A sampler is replaced by proof alone: a list of those trained on discrete noise levels, then equal cumulative signal
shares. EDM, variance exploding and consistency models mean other things by a time step; DDIM would draw noise from
them without a word. Models of flow matching run by Euler steps along their straight path, x_σ = (1 − σ) x₀ + σ ε.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusion_lens.base.types import LensError

FEW_STEP = ("LCMScheduler", "TCDScheduler")
"""Of models distilled to a few steps: they stay."""
KNOWN = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", *FEW_STEP)
"""Those that a run may use as they are."""
REPLACED = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler",
)  # fmt: skip
"""Those that solve the same discrete-time model as DDIM."""
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_REPLACED = ("FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Those that solve the same flow as Euler steps, as far as they are set to."""
FLOW_SETTINGS = (
    "num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift", "shift_terminal",
)  # fmt: skip
"""What Euler steps keep of them besides the shift."""
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing")
"""Where DDIM's ``step`` lands on the time steps that it lists (``trailing``: within one)."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TOLERANCE = 1e-6
"""Largest difference of two cumulative signal shares that are the same: some end a little above zero."""


def choose_sampler(
    scheduler: Any, *, latents: bool, keep: bool = False, flow: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """The scheduler to run with, and a sentence for everything about it that a person should know.

    Args:
        latents: whether latents are denoised, whose x0 must not be clipped to -1..1 as that of pixels.
        flow: whether the model was trained on the straight path of flow matching.
        keep: keep any of ``KNOWN``; by default those that are not for few steps become DDIM.

    Raises:
        LensError: names the scheduler whose noise levels, predictions or steps DDIM does not share, or that cannot run.
    """
    name = type(scheduler).__name__
    ours = type(scheduler).__module__.startswith("diffusers.")
    if flow:
        return _choose_flow(scheduler, keep)
    few = name in FEW_STEP or (name.startswith("Euler") and scheduler.config.get("timestep_spacing") == "trailing")
    if keep and name not in KNOWN:
        raise LensError(f"{name} is not supported; leave keep_scheduler off to sample with DDIM.")
    if not ours or name not in (*KNOWN, *REPLACED):
        raise LensError(
            f"{name} is not supported: it is no sampler of discrete noise levels that DDIM shares; choose a model "
            "with a DDIM, DDPM, PNDM, Euler, DPM-Solver or UniPC sampler, or one distilled for LCM or TCD."
        )
    _check_settings(scheduler)
    stays = name == "DDIMScheduler" or (name in KNOWN and (keep or few))
    chosen = scheduler if stays else _as_ddim(scheduler, latents)
    _check_levels(chosen)
    _check_step(chosen)
    return chosen, _notes(scheduler, chosen)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler that ``choose_sampler`` chose follows a flow."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def splits_step(scheduler: Any) -> bool:
    """Whether its step is made of a predicted clean image and a predicted noise, so that an edit may move one alone."""
    return isinstance(scheduler, (DDIMScheduler, FlowMatchEulerDiscreteScheduler))


def scaled_input(scheduler: Any, latents: Tensor, t: Tensor) -> Tensor:
    """What the network is given for ``latents`` at a step: on a flow the latents themselves."""
    return latents if is_flow(scheduler) else scheduler.scale_model_input(latents, t)


def signal_share(scheduler: Any, index: int) -> float:
    """The share of signal power at step ``index``: alpha-bar, or (1 − σ)² / ((1 − σ)² + σ²) on a flow."""
    if is_flow(scheduler):
        sigma = float(scheduler.sigmas[index])
        return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    return float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])


def flow_shift(scheduler: Any, index: int, prediction: Tensor, edited: Tensor) -> Tensor:
    """What the asymmetric step of a flow adds to the plain one: ``(1 − σ') (x₀(edited) − x₀(prediction))``.

    With x₀ = x − σ v and ε = x + (1 − σ) v this is x' = (1 − σ') x₀(v_edited) + σ' ε(v) by difference, which leaves
    unedited rows bit-identical (our working form of Asyrp's step on a straight path).
    """
    sigma, following = scheduler.sigmas[index], scheduler.sigmas[index + 1]
    return (1 - following) * sigma * (prediction.float() - edited.float())


def _choose_flow(scheduler: Any, keep: bool) -> tuple[Any, tuple[str, ...]]:
    """Euler steps on the same flow; raises ``LensError`` for steps that are no such flow."""
    name, config = type(scheduler).__name__, scheduler.config
    ours = type(scheduler).__module__.startswith("diffusers.")
    follows = name == FLOW or (name in FLOW_REPLACED and config.get("use_flow_sigmas", name.startswith("FlowMatch")))
    if not ours or not follows:
        raise LensError(
            f"{name} is not supported: this model follows a flow, which {FLOW} samples; write that into its "
            "scheduler_config.json."
        )
    if config.get("invert_sigmas", False):
        raise LensError(f"This model's {name} runs from image to noise (invert_sigmas), which cannot be sampled here.")
    if name == FLOW and not config.get("stochastic_sampling", False):
        return scheduler, ()
    if keep:
        raise LensError(f"{name} is not supported as it is; leave keep_scheduler off to sample with Euler steps.")
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise LensError(
            f"The model predicts '{config.prediction_type}' by its {name}, which is no flow to be sampled here."
        )
    shift = config.get("shift", config.get("flow_shift", 1.0))
    kept = {key: config[key] for key in FLOW_SETTINGS if config.get(key) is not None}
    made = FlowMatchEulerDiscreteScheduler(**{**kept, "shift": shift})
    what = "its fresh noise at every step left out" if name == FLOW else f"{name} replaced by Euler steps"
    return made, (
        f"The model's own sampler was changed: {what}, on the same flow (shift {shift:g}); images of a seed differ "
        "from those of the model's own sampler.",
    )


def _check_settings(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise LensError(
            f"The model predicts '{prediction}' by its {name}; only {', '.join(PREDICTIONS)} can be sampled here."
        )
    schedule = config.get("beta_schedule")
    if config.get("trained_betas") is None and schedule not in SCHEDULES:
        raise LensError(
            f"The noise schedule '{schedule}' of this model's {name} is none that DDIM has "
            f"({', '.join(SCHEDULES)}); choose another model."
        )
    if config.get("timestep_type", "discrete") != "discrete" or config.get("use_flow_sigmas", False):
        raise LensError(f"This model's {name} runs through continuous noise levels, which cannot be sampled here.")


def _as_ddim(scheduler: Any, latents: bool) -> DDIMScheduler:
    """DDIM on the same noise levels; raises ``LensError`` where they are not the same."""
    changes: dict[str, Any] = {"clip_sample": False} if latents else {}
    # Those that list evenly spread steps begin at the last time step, as "trailing" does.
    if scheduler.config.get("timestep_spacing") not in SPACINGS:
        changes["timestep_spacing"] = "trailing"
    try:
        made = DDIMScheduler.from_config(scheduler.config, **changes)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise LensError(f"This model's {type(scheduler).__name__} cannot become DDIM: {error}") from None
    own = getattr(scheduler, "alphas_cumprod", None)
    theirs = made.alphas_cumprod.double()
    if own is None or own.shape != theirs.shape or float((own.double() - theirs).abs().max()) > TOLERANCE:
        raise LensError(f"This model's {type(scheduler).__name__} has noise levels that DDIM does not share.")
    return made


def _check_levels(scheduler: Any) -> None:
    """Signal shares fall from at most 1, one for each time step, and are not zero where that divides by zero."""
    alphas, config, name = scheduler.alphas_cumprod, scheduler.config, type(scheduler).__name__
    if len(alphas) != config.num_train_timesteps:
        raise LensError(
            f"This model's {name} has {len(alphas)} noise levels for {config.num_train_timesteps} time steps; "
            "mend its scheduler_config.json."
        )
    falling = bool((alphas.diff() <= 0).all()) and bool(((alphas >= 0) & (alphas <= 1)).all())
    if not falling or not bool(torch.isfinite(alphas).all()):
        raise LensError(f"The noise levels of this model's {name} do not rise from 0 to 1; mend its trained_betas.")
    if float(alphas[-1]) == 0 and config.get("prediction_type", "epsilon") == "epsilon":
        raise LensError(
            "This model's noise schedule ends in pure noise, from which a prediction of noise (epsilon) tells "
            "nothing; its scheduler_config.json needs another prediction_type or rescale_betas_zero_snr off."
        )


def _check_step(scheduler: Any) -> None:
    """Take one step with a copy: what a scheduler refuses, it often refuses only then."""
    trial = copy.deepcopy(scheduler)
    try:
        trial.set_timesteps(2)  # the last one of a run is often easier
        t, x = trial.timesteps[0], torch.zeros(1, 1, 2, 2)
        noise = {"generator": torch.Generator()} if "generator" in inspect.signature(trial.step).parameters else {}
        trial.step(torch.zeros_like(trial.scale_model_input(x, t)), t, x, **noise)
    except (ValueError, NotImplementedError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LensError(f"This model's {type(scheduler).__name__} cannot take a step: {reason}") from None


def _notes(scheduler: Any, chosen: Any) -> tuple[str, ...]:
    spacing = chosen.config.get("timestep_spacing")
    if chosen is not scheduler:
        return (
            f"The model's own sampler, {type(scheduler).__name__}, was replaced by DDIM on the same noise levels "
            f"({spacing} steps): images of a seed differ from those of the model's own sampler.",
        )
    if type(chosen) is DDIMScheduler and spacing not in SPACINGS:
        return (
            f"The model's own DDIM lists {spacing} steps and lands on others; its images are those of the stock "
            "pipeline, and timestep_spacing 'trailing' in its scheduler_config.json would mend them.",
        )
    return ()
