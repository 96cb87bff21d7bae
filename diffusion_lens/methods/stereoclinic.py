"""StereoClinic-style (Zhou et al., ACM MM 2025): relevance finds a stereotype's neurons, damping quietens them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion_lens.base.types import EditSpec, GenerationRequest, LensError, Sampler
from diffusion_lens.methods.draws import Drawn, examples
from diffusion_lens.methods.edits import NoEdit, RequestEdit, WeightEdit
from diffusion_lens.methods.protocol import SINCE_0_5, Fitted, Learned, Method, MethodOptions, Preset, Task
from diffusion_lens.methods.relevance.lrp import Rule
from diffusion_lens.methods.relevance.lrp_mid import check_mid_block, mid_block_relevance, record
from diffusion_lens.methods.relevance.lrp_sae import encoder_relevance, feature_relevance, logit_relevance
from diffusion_lens.model.denoise import Edit, StepContext
from diffusion_lens.model.pipelines import DiffusionModel

BOTTLENECK = "bottleneck"
MAX_STRENGTH = 4.0
TIMES, GROUPS, SEPARATOR = "times", "groups", "|"
"""Names of a fit's tensors beside its relevance: timesteps that were read, and each prompt's group."""


class StereoClinicOptions(MethodOptions):
    """Where relevance goes, whose stereotype it is, and how many neurons are damped."""

    neurons: Literal["mid-block", "bottleneck"] = Field(
        "mid-block", title="Neurons", description="Hidden channels of the mid-block, or the bottleneck's own."
    )
    top: float = Field(5.0, gt=0, le=100, title="Damped, %", description="Share of the neurons, most relevant first.")
    rule: Rule = Field("zplus", title="Rule", description="z⁺ of deep Taylor decomposition, or the ε-rule.")
    through_sae: bool = Field(True, title="Through the SAE", description="Relevance passes decoder and encoder.")
    n_steps: int = Field(5, ge=1, title="Steps read", description="Spread evenly over the denoising.")
    poles: Literal["prompt", "majority", "pooled"] = Field(
        "prompt",
        title="Stereotype of",
        description="Each prompt; all prompts of one majority together; or everything pooled.",
        json_schema_extra=SINCE_0_5,
    )
    per_step: bool = Field(
        False,
        title="Neurons per step",
        description="Chosen anew at every step that was read; else once for all.",
        json_schema_extra=SINCE_0_5,
    )


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


def prompt_groups(counts: Sequence[np.ndarray], poles: str) -> list[int]:
    """The group of each prompt, from the classes ``[class]`` counted under each; groups number from 0."""
    if poles == "pooled":
        return [0] * len(counts)
    if poles == "prompt":
        return list(range(len(counts)))
    majorities = [int(own.argmax()) for own in counts]
    order = sorted(set(majorities))
    return [order.index(majority) for majority in majorities]


class StereoClinic(Method):
    """Damping by relevance."""

    key = "stereoclinic"
    name = "StereoClinic-style"
    kind = "neurons"
    source = (
        "Zhou et al. 2025, Mitigating Stereotypes in Text-to-Image Generation: A Novel Perspective of Selective Neural "
        "Suppression, ACM Multimedia (abstract); LRP rules by Bach et al. 2015, Montavon et al. 2017"
    )
    explanation = (
        "Starts from a stereotype score, the probe's logits of the classes that a prompt shows too often minus those "
        "that it shows too seldom, and passes it back as relevance through probe, SAE and mid-block with the rules of "
        "deep Taylor decomposition; none is lost on the way. The neurons with the most of it, the top r %, are damped: "
        "a ← γ a. Strength is 1 − γ; beyond 1 they are turned round. A stereotype is of a prompt, so every prompt has "
        "its own poles and neurons. Only the paper's abstract is public: score, path, splitting at sums and the choice "
        "of neurons are our working form (StereoClinic: Zhou et al., ACM MM 2025)."
    )
    options = StereoClinicOptions
    strengths = (0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
    strength_name = "1 − γ"
    limit = MAX_STRENGTH
    aim = "distribution"
    presets: ClassVar[Mapping[str, Preset]] = {
        "as the abstract says": Preset(
            {"top": 5.0, "poles": "prompt"},
            "The abstract names neither r nor γ: r = 5 % is ours, and γ lies from 0 up to 1, a strength of 1 at most.",
        ),
        "pooled poles (0.4)": Preset(
            {"poles": "pooled"}, "One stereotype for all prompts, which damps the minority of half of them; to compare."
        ),
    }

    def learn(self, task: Task) -> Learned:
        """Relevance per group of prompts and neuron: ``group|layer`` → ``[step read, channel]``.

        Averaged over images of the classes that are over-represented in the group. A group whose images have the
        target shares has no stereotype and is left alone; raises ``LensError`` where that is so for all of them.
        """
        options, target = task.options, np.array(task.shares)
        if options.neurons == "mid-block":
            check_mid_block(task.model.hook_module)
        steps = np.unique(np.linspace(0, task.draws.n_steps - 1, options.n_steps).round().astype(int)).tolist()
        drawing, reading = task.parts(len(task.draws.plan()) * len(steps))
        read = list(examples(task.draws.batches(drawing), task.probe))
        counts = counts_by_prompt(task, read)
        groups = prompt_groups(counts, options.poles)
        poles = group_poles(counts, groups, target)
        total: dict[str, Tensor] = {}
        seen: dict[int, int] = {}
        lost = 0.0
        for (batch, own), part in zip(read, reading.parts(len(read)), strict=True):
            group = groups[task.draws.prompts.index(batch.prompt)]
            weights = poles.get(group)
            over = np.array([]) if weights is None else np.flatnonzero(weights > 0)
            rows = torch.from_numpy(np.flatnonzero(np.isin(own, over)))
            if weights is None or not len(rows):
                continue
            seen[group] = seen.get(group, 0) + len(rows)
            for place, step in enumerate(part.each(steps)):
                found, gap = neuron_relevance(task, batch, rows, step, torch.from_numpy(weights).float())
                lost = max(lost, gap)
                for layer, relevance in found.items():
                    name = f"{group}{SEPARATOR}{layer}"
                    total.setdefault(name, torch.zeros(len(steps), len(relevance)))[place] += relevance
        times = task.model.scheduler(task.draws.n_steps).timesteps[steps].float()
        mean = {name: r / seen[int(name.partition(SEPARATOR)[0])] for name, r in total.items()}
        return Learned(
            {**mean, TIMES: times, GROUPS: torch.tensor(groups)},
            {
                "examples": np.sum(counts, axis=0).tolist(),
                "by prompt": [own.tolist() for own in counts],
                "poles": {str(group): weights.tolist() for group, weights in poles.items()},
                "relevance lost": lost,
            },
        )

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Damp by γ = 1 − ``strength``, from 0 to 4; prompts that were not fitted get an only group's damping."""
        if not 0 <= strength <= MAX_STRENGTH:
            raise LensError(f"Damping takes a strength from 0 to {MAX_STRENGTH:g}; it is {strength:g}.")
        spec = fitted.spec(strength)
        if strength == 0:
            return NoEdit(spec)
        edits = {
            group: _damping_edit(fitted, relevance, strength, spec) for group, relevance in by_group(fitted).items()
        }
        groups = fitted.tensors[GROUPS].tolist() if GROUPS in fitted.tensors else [0] * len(fitted.record.prompts)
        if len(set(groups)) == 1:
            return edits[groups[0]]
        of = dict(zip(fitted.record.prompts, groups, strict=True))

        def choose(request: GenerationRequest) -> Edit:
            if request.prompt not in of:
                raise LensError(
                    f"A stereotype is of a prompt: fit {self.name} to '{request.prompt}', or choose a fitted prompt."
                )
            return edits.get(of[request.prompt], NoEdit(spec))

        return RequestEdit(choose, spec)


def counts_by_prompt(task: Task, read: Sequence[tuple[Drawn, np.ndarray]]) -> list[np.ndarray]:
    """Images per class as the probe reads them, ``[class]`` for each of the fit's prompts."""
    counts = [np.zeros(len(task.shares), dtype=np.int64) for _ in task.draws.prompts]
    for batch, own in read:
        counts[task.draws.prompts.index(batch.prompt)] += np.bincount(own, minlength=len(task.shares))
    return counts


def group_poles(counts: Sequence[np.ndarray], groups: Sequence[int], target: np.ndarray) -> dict[int, np.ndarray]:
    """Group → its poles, of the groups that have a stereotype; raises ``LensError`` where none has."""
    found, refusal = {}, None
    for group in sorted(set(groups)):
        together = np.sum([own for own, g in zip(counts, groups, strict=True) if g == group], axis=0)
        try:
            found[group] = stereotype_poles(together, target)
        except LensError as error:
            refusal = error
    if refusal is not None and not found:
        raise refusal
    return found


def by_group(fitted: Fitted) -> dict[int, dict[str, Tensor]]:
    """Group → layer → relevance ``[step read, channel]``; fits of version 0.4 have one group and one step."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, relevance in fitted.tensors.items():
        if name in (TIMES, GROUPS):
            continue
        group, _, layer = name.rpartition(SEPARATOR)
        table = relevance if relevance.ndim == 2 else relevance[None]
        found.setdefault(int(group or 0), {})[layer] = table
    return found


def step_gains(relevance: Mapping[str, Tensor], top: float, gamma: float, per_step: bool) -> dict[str, Tensor]:
    """Layer → gains ``[step, channel]``; one row for all steps, or with ``per_step`` one for each that was read."""
    steps = range(len(next(iter(relevance.values()))))
    if not per_step:
        relevance = {layer: table.mean(0, keepdim=True) for layer, table in relevance.items()}
        steps = range(1)
    rows = [damping({layer: table[step] for layer, table in relevance.items()}, top, gamma) for step in steps]
    return {layer: torch.stack([row[layer] for row in rows]) for layer in relevance}


def nearest_row(times: Tensor, n_rows: int, t: float) -> int:
    """The row of gains for timestep ``t``: the only one, or that of the nearest of ``times [row]``."""
    return 0 if n_rows == 1 else int((times - t).abs().argmin())


def _damping_edit(fitted: Fitted, relevance: Mapping[str, Tensor], strength: float, spec: EditSpec) -> Edit:
    gains = step_gains(relevance, fitted.options.top, 1 - strength, fitted.options.per_step)
    times = fitted.tensors.get(TIMES, torch.zeros(1))
    if fitted.options.neurons == BOTTLENECK:
        return BottleneckDamping(gains[BOTTLENECK], times, spec)
    return WeightEdit(partial(damped, gains=gains, times=times), spec)


@dataclass(frozen=True, eq=False)
class BottleneckDamping:
    """``h'_c = gain[step, c] · h_c`` with ``gains [step, channel]``, of steps that begin near ``times [step]``."""

    gains: Tensor
    times: Tensor
    spec: EditSpec
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``."""
        gain = self.gains[nearest_row(self.times, len(self.gains), context.timestep)]
        return h * gain.to(h)[:, None, None]


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
def damped(model: DiffusionModel, gains: Mapping[str, Tensor], times: Tensor) -> Iterator[None]:
    """Multiply what enters the named layers of the hooked block, channel by channel, in both halves of a batch.

    ``gains``: layer → ``[step, channel]``; of several rows the one whose timestep (``times [step]``) is nearest acts.
    """
    now = [0.0]

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        now[0] = float(torch.as_tensor(t).flatten()[0])

    def scale(rows: Tensor) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            first, gain = args[0], rows[nearest_row(times, len(rows), now[0])]
            shape = (1, -1, 1, 1) if first.ndim == 4 else (1, 1, -1)
            return (first * gain.to(first).reshape(shape), *args[1:])

        return hook

    handles = [model.denoiser.register_forward_pre_hook(look, with_kwargs=True)]
    try:
        for name, rows in gains.items():
            if bool((rows != 1).any()):
                layer = model.hook_module.get_submodule(name)
                handles.append(layer.register_forward_pre_hook(scale(rows)))  # type: ignore[arg-type]
        yield
    finally:
        for handle in handles:
            handle.remove()
