"""Latent Direction (Li et al., Self-Discovering Interpretable Diffusion Latent Directions, CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Sampler
from diffusion_lens.methods.draws import Draws, check_examples, class_means, examples, mean_differences
from diffusion_lens.methods.edits import ClassDraw, DirectionEdit
from diffusion_lens.methods.noise import (
    Group,
    add_noise,
    clean_latents,
    frozen,
    join_groups,
    need_ddim,
    pick,
    prediction_loss,
    rows_where,
)
from diffusion_lens.methods.prompts import name_class
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Preset, Task
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.hooks import edit_output


class LatentDirectionOptions(MethodOptions):
    """How the vector is found."""

    form: Literal["learned", "mean difference"] = Field("learned", title="Form")
    examples: Literal["probe", "prompt"] = Field(
        "probe", title="Examples", description="Images of a class: as the probe reads them, or by naming it."
    )
    template: str = Field("", title="Prompt template", description="With {prompt} and {label}; empty: our own rule.")
    iterations: int = Field(150, ge=1, le=20_000, title="Iterations")
    batch_size: int = Field(8, ge=1, le=256, title="Batch size")
    lr: float = Field(0.1, gt=0, title="Learning rate", description="Of Adam; 0.1 in the paper.")
    seed: int = Field(0, ge=0, title="Seed of the training")
    sampler: Sampler = Field("symmetric", title="Sampler", description="Asymmetric moves the predicted image alone.")


class LatentDirection(Method):
    """One vector per class, constant over time."""

    key = "latent-direction"
    name = "Latent Direction"
    kind = "direction"
    source = "Li et al. 2024, Self-Discovering Interpretable Diffusion Latent Directions, CVPR"
    explanation = (
        "One vector per class in the bottleneck, constant over time, added to h. It is learned with the whole model "
        "frozen: images of a class are noised, and the vector alone is trained so that the model, told the plain "
        "prompt, predicts their noise. The other form takes the mean bottleneck of a class minus that of the others. "
        "For fairness each image is given a class drawn from the target shares. Reading a class with the lens's probe "
        "instead of naming it in the prompt is our working form (Li et al., CVPR 2024)."
    )
    options = LatentDirectionOptions
    presets: ClassVar[Mapping[str, Preset]] = {
        "as published": Preset(
            {"form": "learned", "examples": "prompt", "lr": 0.1, "iterations": 1000, "batch_size": 1},
            "1,000 images of the named class, Adam at 0.1; the paper's epochs over them are iterations here.",
        ),
    }
    strengths = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)

    def learn(self, task: Task) -> Learned:
        """One direction per wanted class, ``[class, 1, c, y, x]``."""
        if task.options.form == "mean difference":
            means, counts = class_means(task.draws.batches(task.progress), task.probe)
            check_examples(counts, task.attribute, task.wanted)
            directions = mean_differences(means, counts).mean(1, keepdim=True)
            return Learned({"directions": directions}, {"examples": counts.tolist()})
        need_ddim(task.model, self.name)
        directions = torch.zeros(len(task.shares), 1, *task.model.hook_shape)
        losses: dict[str, list[float]] = {}
        groups, training = _examples_by_class(task)
        for label, part in zip(task.wanted, training.parts(len(task.wanted)), strict=True):
            direction, curve = train_direction(task, groups[label], part)
            directions[label, 0] = direction.cpu()
            losses[task.attribute.classes[label]] = curve
        return Learned({"directions": directions}, {"loss": losses})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """``h + strength · c``."""
        draw = ClassDraw(fitted.attribute, fitted.record.target, fitted.options.draw_seed)
        directions = fitted.tensors["directions"]
        return DirectionEdit(directions, strength, draw, fitted.options.sampler, None, fitted.spec(strength))


def train_direction(task: Task, groups: list[Group], progress: Progress) -> tuple[Tensor, list[float]]:
    """``argmin_c E ‖target − model(x_t, t, plain prompt; h + c)‖²`` by Adam (Li et al.) → ``[c, y, x]``, losses."""
    model, options = task.model, task.options
    scheduler = model.scheduler(task.draws.n_steps)
    generator = torch.Generator().manual_seed(options.seed)
    curve = []
    with model.lock, frozen(model.denoiser), torch.enable_grad():
        direction = torch.zeros(model.hook_shape, device=model.device, dtype=model.dtype, requires_grad=True)
        optimiser = torch.optim.Adam([direction], lr=options.lr)
        for _ in progress.each(range(options.iterations)):
            prompt, clean = pick(groups, options.batch_size, generator)
            noised = add_noise(scheduler, clean, generator)
            with edit_output(model.port, lambda h: h + direction):
                loss = prediction_loss(model, noised, model.condition(prompt, len(clean), 1.0))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(float(loss.detach()))
    return direction.detach(), curve


def _examples_by_class(task: Task) -> tuple[dict[int, list[Group]], Progress]:
    """Clean latents of every wanted class under the plain prompts, and the bar of the training."""
    iterations = task.options.iterations * len(task.wanted)
    if task.options.examples == "probe":
        drawing, training = task.parts(iterations)
        batches = task.draws.batches(drawing)
        read = list(examples(batches, task.probe))
        counts = np.bincount(np.concatenate([labels for _, labels in read]), minlength=len(task.shares))
        check_examples(counts, task.attribute, task.wanted)
        clean = [clean_latents(task.model, batch, task.draws.guidance_scale) for batch in batches]
        parts = [(batch.prompt, labels, x) for (batch, labels), x in zip(read, clean, strict=True)]
        return {
            label: join_groups([(prompt, x[rows_where(labels, label)]) for prompt, labels, x in parts])
            for label in task.wanted
        }, training
    # A named prompt is drawn, the plain one is what the model is told in training.
    plain = task.draws.prompts
    named = {label: _named_draws(task, task.attribute.classes[label]) for label in task.wanted}
    *bars, training = task.progress.parts((*(draws.steps_left for draws in named.values()), iterations))
    found = {}
    for (label, draws), bar in zip(named.items(), bars, strict=True):
        told = dict(zip(draws.prompts, plain, strict=True))
        found[label] = join_groups([
            (told[batch.prompt], clean_latents(task.model, batch, task.draws.guidance_scale))
            for batch in draws.batches(bar)
        ])  # fmt: skip
    return found, training


def _named_draws(task: Task, label: str) -> Draws:
    template = task.options.template
    prompts = [name_class(prompt, task.attribute, label, template=template) for prompt in task.draws.prompts]
    return Draws(task.model, prompts, task.draws.seeds, task.draws.n_steps, task.draws.guidance_scale)
