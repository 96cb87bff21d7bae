"""StereoClinic-style (ACM MM 2025): relevance finds the neurons behind a stereotype, damping quietens them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.methods.draws import Drawn, check_examples, examples
from diffusion_lens.methods.edits import ChannelEdit, ClassDraw, NoEdit, WeightEdit
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Task
from diffusion_lens.methods.relevance.lrp import Rule
from diffusion_lens.methods.relevance.lrp_mid import check_mid_block, mid_block_relevance, record
from diffusion_lens.methods.relevance.lrp_sae import encoder_relevance, feature_relevance, logit_relevance
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.pipelines import DiffusionModel

BOTTLENECK = "bottleneck"


class StereoClinicOptions(MethodOptions):
    """Where relevance goes, and how many neurons are damped."""

    neurons: Literal["mid-block", "bottleneck"] = Field(
        "mid-block", title="Neurons", description="Hidden channels of the mid-block, or the bottleneck's own."
    )
    top: float = Field(5.0, gt=0, le=100, title="Damped, %", description="Share of the neurons, most relevant first.")
    rule: Rule = Field("zplus", title="Rule", description="z⁺ of deep Taylor decomposition, or the ε-rule.")
    through_sae: bool = Field(True, title="Through the SAE", description="Relevance passes decoder and encoder.")
    n_steps: int = Field(5, ge=1, title="Steps read", description="Spread evenly over the denoising.")


def stereotype_poles(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights of the logits ``[class]``: over-represented classes against under-represented ones, 1 on either side.

    The gap between the shares read in the model's images and the target shares (our working form). Raises
    ``LensError`` where there is no gap.
    """
    gap = counts / max(1, counts.sum()) - target
    over, under = gap.clip(min=0), (-gap).clip(min=0)
    if over.sum() <= 1e-9:
        raise LensError("These images already have the target shares; there is no stereotype to damp.")
    return over / over.sum() - under / under.sum()


class StereoClinic(Method):
    """Damping by relevance."""

    key = "stereoclinic"
    name = "StereoClinic-style"
    kind = "neurons"
    source = "StereoClinic, ACM Multimedia 2025 (abstract); LRP rules by Bach et al. 2015, Montavon et al. 2017"
    explanation = (
        "Starts from a stereotype score, the probe's logits of the over-represented classes minus the "
        "under-represented ones, and passes it back as relevance through probe, SAE and mid-block with the rules of "
        "deep Taylor decomposition; none is lost on the way. The neurons with the most of it, the top r %, are damped: "
        "a ← γ a. Strength is 1 − γ. Only the paper's abstract is public: score, path, splitting at sums and the "
        "choice of neurons are our working form (StereoClinic, ACM MM 2025)."
    )
    options = StereoClinicOptions
    strengths = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
    strength_name = "1 − γ"
    aim = "distribution"

    def learn(self, task: Task) -> Learned:
        """Relevance per neuron: layer → ``[channel]``, averaged over images of over-represented classes and steps."""
        options = task.options
        if options.neurons == "mid-block":
            check_mid_block(task.model.hook_module)
        steps = np.unique(np.linspace(0, task.draws.n_steps - 1, options.n_steps).round().astype(int)).tolist()
        drawing, reading = task.parts(len(task.draws.plan()) * len(steps))
        batches = task.draws.batches(drawing)
        read = list(examples(batches, task.probe))
        labels = np.concatenate([labels for _, labels in read])
        counts = np.bincount(labels, minlength=len(task.shares))
        poles = stereotype_poles(counts, np.array(task.shares))
        over = np.flatnonzero(poles > 0)
        check_examples(counts, task.attribute, [int(counts.argmax())])
        total: dict[str, Tensor] = {}
        lost, n = 0.0, 0
        for (batch, own), part in zip(read, reading.parts(len(read)), strict=True):
            rows = torch.from_numpy(np.flatnonzero(np.isin(own, over)))
            n += len(rows)
            for step in part.each(steps):
                if len(rows):
                    found, gap = neuron_relevance(task, batch, rows, step, torch.from_numpy(poles).float())
                    lost = max(lost, gap)
                    for layer, relevance in found.items():
                        total[layer] = total.get(layer, torch.zeros_like(relevance)) + relevance
        return Learned(
            {layer: relevance / (n * len(steps)) for layer, relevance in total.items()},
            {"examples": counts.tolist(), "poles": poles.tolist(), "relevance lost": lost},
        )

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Damp by γ = 1 − ``strength``, from 0 to 1."""
        if not 0 <= strength <= 1:
            raise LensError(f"Damping takes a strength from 0 to 1; it is {strength:g}.")
        spec = fitted.spec(strength)
        if strength == 0:
            return NoEdit(spec)
        gains = damping(fitted.tensors, fitted.options.top, 1 - strength)
        if fitted.options.neurons == BOTTLENECK:
            rows = gains[BOTTLENECK].expand(len(fitted.record.classes), -1)
            draw = ClassDraw(fitted.attribute, fitted.record.target, 0)
            return ChannelEdit(rows, draw, "symmetric", None, spec)
        return WeightEdit(partial(damped, gains=gains), spec)


def neuron_relevance(
    task: Task, batch: Drawn, rows: Tensor, step: int, poles: Tensor
) -> tuple[dict[str, Tensor], float]:
    """Relevance summed over images ``rows``: layer → ``[channel]``; and the largest share of it that went missing."""
    model, options = task.model, task.options
    conditioning = model.condition(batch.prompt, len(rows), 1.0)
    t = model.scheduler(task.draws.n_steps).timesteps[step]
    with torch.no_grad(), model.lock, record(model.hook_module) as tape:
        model.predict(batch.states[step][rows].to(model.device), t, conditioning)
    h = tape.outputs[model.hook_module]
    with torch.no_grad():
        if options.through_sae:
            at_features, start = feature_relevance(task.lens.sae, task.probe, h, step, poles, options.rule)
            samples = encoder_relevance(task.lens.sae, task.lens.sae.to_samples(h), at_features, options.rule)
            at_h = task.lens.sae.from_samples(samples, (h.shape[2], h.shape[3]))
        else:
            at_h, start = logit_relevance(task.probe, step, h, poles, options.rule)
        if options.neurons == BOTTLENECK:
            return {BOTTLENECK: at_h.sum((0, 2, 3)).cpu()}, _missing(start, at_h.flatten(1).sum(1))
        inside = mid_block_relevance(model.hook_module, tape, at_h, options.rule)
    channels = {name: (r.sum((0, 2, 3)) if r.ndim == 4 else r.sum((0, 1))).cpu() for name, r in inside.neurons.items()}
    return channels, _missing(start, inside.at_input.flatten(1).sum(1) + inside.at_prompt)


def _missing(start: Tensor, end: Tensor) -> float:
    return float(((start - end).abs() / start.abs().clamp_min(1e-6)).max())


def damping(relevance: Mapping[str, Tensor], top: float, gamma: float) -> dict[str, Tensor]:
    """Layer → gains ``[channel]``: ``gamma`` for the ``top`` percent most relevant of all neurons together, else 1.

    Only neurons of positive relevance are damped.
    """
    names = sorted(relevance)
    everything = torch.cat([relevance[name] for name in names])
    count = max(1, round(top / 100 * len(everything)))
    least = everything.topk(count).values[-1].clamp_min(0)
    return {name: torch.where((relevance[name] >= least) & (relevance[name] > 0), gamma, 1.0) for name in names}


@contextmanager
def damped(model: DiffusionModel, gains: dict[str, Tensor]) -> Iterator[None]:
    """Multiply what enters the named layers of the hooked block, channel by channel, in both halves of a batch."""

    def scale(gain: Tensor) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            first = args[0]
            shape = (1, -1, 1, 1) if first.ndim == 4 else (1, 1, -1)
            return (first * gain.to(first).reshape(shape), *args[1:])

        return hook

    handles = []
    try:
        for name, gain in gains.items():
            if bool((gain != 1).any()):
                layer = model.hook_module.get_submodule(name)
                handles.append(layer.register_forward_pre_hook(scale(gain)))  # type: ignore[arg-type]
        yield
    finally:
        for handle in handles:
            handle.remove()
