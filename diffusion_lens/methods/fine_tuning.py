"""Fine-tuning for fairness (Shen et al., ICLR 2024): LoRA with a distributional alignment loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffusion_lens.base.types import LensError
from diffusion_lens.methods.draws import Drawn
from diffusion_lens.methods.edits import NoEdit, WeightEdit
from diffusion_lens.methods.lora import (
    TEXT_TARGETS,
    UNET_TARGETS,
    Adapters,
    LoraShape,
    adapters,
    applied,
    encode,
    read_adapter,
    targets_of,
)
from diffusion_lens.methods.noise import denoised, frozen, need_ddim, read_bottleneck
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Preset, Task
from diffusion_lens.model.denoise import Edit


class FineTuningOptions(MethodOptions):
    """How the adapter is trained, or which file it is read from."""

    adapter: str = Field("", title="Adapter file", description="A LoRA as safetensors; empty: train one here.")
    parts: Literal["unet", "text encoder", "both"] = Field("unet", title="Adapted")
    rank: int = Field(50, ge=1, le=512, title="Rank", description="50 in the paper.")
    lr: float = Field(1e-3, gt=0, title="Learning rate", description="Of AdamW.")
    iterations: int = Field(150, ge=1, le=100_000, title="Iterations")
    batch_size: int = Field(16, ge=2, le=256, title="Batch size")
    jump: int = Field(4, ge=1, title="Steps looked ahead", description="From the adapted step to the reading.")
    keep: float = Field(1.0, ge=0, title="Preservation weight", description="Of the unadapted prediction.")
    n_assignments: int = Field(32, ge=1, le=1000, title="Target draws", description="Averaged into each target.")
    confidence: float = Field(0.6, ge=0, le=1, title="Least agreement of the draws")
    seed: int = Field(0, ge=0, title="Seed of the training")


def aligned_targets(
    probs: np.ndarray, shares: np.ndarray, n_assignments: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Distributional alignment (Shen et al., eq. 3–5): the class each image is asked for.

    Draw one class per image from ``shares [class]``, hand the drawn classes out so that the summed distance to
    ``probs [n, class]`` is least (optimal transport), and average over draws. → classes ``[n]``, agreement ``[n]``.
    """
    n, n_classes = probs.shape
    votes = np.zeros((n, n_classes))
    for _ in range(n_assignments):
        drawn = np.eye(n_classes)[rng.choice(n_classes, size=n, p=shares)]
        cost = np.linalg.norm(probs[:, None] - drawn[None], axis=2)
        rows, columns = linear_sum_assignment(cost)
        votes[rows] += drawn[columns]
    return votes.argmax(axis=1), votes.max(axis=1) / n_assignments


class FineTuning(Method):
    """LoRA, aligned to a distribution."""

    key = "fine-tuning"
    name = "Fine-tuning"
    kind = "weights"
    source = "Shen et al. 2024, Finetuning Text-to-Image Diffusion Models for Fairness, ICLR"
    explanation = (
        "Trains low-rank adapters so that a batch's readings match the target shares: classes drawn from the target "
        "are handed out to the images that are nearest to them (optimal transport), and every image is pulled to its "
        "class, while a second term keeps the prediction near the unadapted one. The paper backpropagates through "
        "the last steps and reads faces with a classifier; here the adapted step's result is carried a few steps "
        "ahead in closed form and read by the lens's probe on the frozen network, which is our working form. Strength "
        "is the adapter's scale. For large models load a trained adapter (Shen et al., ICLR 2024)."
    )
    options = FineTuningOptions
    strengths = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    strength_name = "adapter scale"
    aim = "distribution"
    presets: ClassVar[Mapping[str, Preset]] = {
        "as published": Preset(
            {"parts": "text encoder", "rank": 50, "lr": 5e-5, "iterations": 10_000, "confidence": 0.8},
            "Learning rate, steps and threshold of its public settings; there the loss passes through the last steps "
            "and reads faces, with terms for image and face; here a step's result is read by the lens's probe.",
        ),
    }

    def learn(self, task: Task) -> Learned:
        """The adapter's weights."""
        if task.options.adapter:
            tensors, rank, alpha = read_adapter(task.options.adapter)
            return Learned(tensors, {"rank": rank, "alpha": alpha, "adapter": "read from a file"})
        need_ddim(task.model, self.name)
        tensors, curve = train_aligned(task)
        return Learned(tensors, {"rank": task.options.rank, "alpha": float(task.options.rank), "loss": curve})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """The adapter scaled by ``strength``."""
        return adapter_edit(fitted, strength)


def adapter_edit(fitted: Fitted, strength: float) -> Edit:
    """The fitted adapter at a scale; 0 leaves the model alone."""
    spec = fitted.spec(strength)
    if strength == 0:
        return NoEdit(spec)
    notes = fitted.record.notes
    unet, text_layers = (targets_of(fitted.tensors, part) for part in ("unet", "text"))
    shape = LoraShape(int(notes["rank"]), float(notes["alpha"]), unet, text_layers)
    return WeightEdit(partial(applied, shape=shape, tensors=fitted.tensors, scale=strength), spec)


def train_aligned(task: Task) -> tuple[dict[str, Tensor], list[float]]:
    """Train on recorded runs → adapter tensors and the loss curve."""
    model, options = task.model, task.options
    shape = LoraShape(
        options.rank, float(options.rank),
        () if options.parts == "text encoder" else UNET_TARGETS, () if options.parts == "unet" else TEXT_TARGETS,
    )  # fmt: skip
    if shape.text and model.kind != "text":
        raise LensError("This model has no single text encoder to adapt; choose the U-Net.")
    drawing, training = task.parts(options.iterations)
    batches = task.draws.batches(drawing)
    generator, rng = torch.Generator().manual_seed(options.seed), np.random.default_rng(options.seed)
    curve: list[float] = []
    encoder = getattr(model.pipeline, "text_encoder", None)
    with model.lock, frozen(model.denoiser, encoder), adapters(model, shape, seed=options.seed) as adapted:
        optimiser = torch.optim.AdamW(adapted.parameters, lr=options.lr, weight_decay=0.0)
        with torch.enable_grad():
            for _ in training.each(range(options.iterations)):
                loss = alignment_loss(task, adapted, batches, generator, rng)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(adapted.parameters, 1.0)
                optimiser.step()
                curve.append(float(loss.detach()))
        tensors = adapted.tensors()
    return tensors, curve


def alignment_loss(
    task: Task, adapted: Adapters, batches: tuple[Drawn, ...], generator: torch.Generator, rng: np.random.Generator
) -> Tensor:
    """``CE(probe(frozen h at step s + jump), assigned class) + keep · ‖ε_adapted − ε_frozen‖²`` for one batch."""
    model, options, n_steps = task.model, task.options, task.draws.n_steps
    scheduler = model.scheduler(n_steps)
    batch = batches[int(torch.randint(len(batches), (1,), generator=generator))]
    rows = torch.randperm(len(batch.seeds), generator=generator)[: options.batch_size]
    step = int(torch.randint(max(1, n_steps - options.jump), (1,), generator=generator))
    later = min(step + options.jump, n_steps - 1)
    x, t, t_later = batch.states[step][rows].to(model.device), scheduler.timesteps[step], scheduler.timesteps[later]
    prediction = model.predict(x, t, encode(model, batch.prompt, len(rows), adapted))
    with adapted.off():
        plain = model.condition(batch.prompt, len(rows), 1.0)
        with torch.no_grad():
            unadapted = model.predict(x, t, plain)
        x0, noise = denoised(scheduler, prediction, x, t)
        alpha = scheduler.alphas_cumprod[int(t_later)].to(x)
        ahead = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        logits = task.probe.logits(read_bottleneck(model, ahead, t_later, plain), later) / task.probe.temperature
    probs = logits.detach().softmax(1).double().cpu().numpy()
    asked, agreement = aligned_targets(probs, np.array(task.shares), options.n_assignments, rng)
    sure = torch.from_numpy(agreement >= options.confidence).to(logits.device)
    pull = F.cross_entropy(logits, torch.from_numpy(asked).to(logits.device), reduction="none")
    aligned = (pull * sure).sum() / sure.sum().clamp_min(1)
    return aligned + options.keep * F.mse_loss(prediction, unadapted)
