"""Debiasing Diffusion Model, DDM (arXiv 2503.12536): LoRA with an indicator of target against non-target images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.methods.draws import check_examples, examples
from diffusion_lens.methods.fine_tuning import adapter_edit
from diffusion_lens.methods.lora import Adapters, LoraShape, adapters, encode
from diffusion_lens.methods.noise import add_noise, clean_latents, denoised, frozen, need_ddim
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Task
from diffusion_lens.model.denoise import Edit
from diffusion_lens.results import metrics

TARGET, NON_TARGET = 1, 0


class DDMOptions(MethodOptions):
    """Weights of the two losses, and what the indicator reads."""

    alpha: float = Field(0.1, ge=0, title="α", description="Weight of the indicator's loss; quality falls as it rises.")
    indicator_on: Literal["denoised latent", "predicted noise"] = Field(
        "denoised latent", title="Indicator reads", description="The paper reads the latent, its code the noise."
    )
    majority: float = Field(0.8, ge=0, le=1, title="Majority's share", description="Of the target set.")
    n_other: int = Field(100, ge=2, le=10_000, title="Non-target images", description="100 in the paper.")
    rank: int = Field(8, ge=1, le=512, title="Rank")
    lora_alpha: float = Field(32.0, gt=0, title="LoRA α")
    lr: float = Field(1e-4, gt=0, title="Learning rate", description="1e-5 in the paper, over many more steps.")
    iterations: int = Field(150, ge=1, le=100_000, title="Iterations")
    batch_size: int = Field(8, ge=1, le=256, title="Batch size", description="Of each of the two sets.")
    seed: int = Field(0, ge=0, title="Seed of the training")


def make_indicator(n_inputs: int, seed: int) -> nn.Sequential:
    """flatten → 1024 → 512 → 2 with ReLU (DDM), weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(n_inputs, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 2)
        )


def target_rows(labels: np.ndarray, majority: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Rows of the target set: all they allow with ``share`` of class ``majority``, the rest drawn from the others."""
    first, rest = np.flatnonzero(labels == majority), np.flatnonzero(labels != majority)
    total = min(len(first) / share if share else np.inf, len(rest) / (1 - share) if share < 1 else np.inf)
    n_first = round(total * share)
    return np.sort(np.concatenate([rng.permutation(first)[:n_first], rng.permutation(rest)[: round(total) - n_first]]))


def shuffled(latents: Tensor, generator: torch.Generator, *, patch: int = 2) -> Tensor:
    """Latents with their patches in random order: the colours and textures of the target set without its subjects."""
    n, c, y, x = latents.shape
    if y % patch or x % patch:
        raise LensError(f"Latents of {y} × {x} cannot be cut into patches of {patch}.")
    tiles = F.unfold(latents, patch, stride=patch)
    orders = torch.stack([torch.randperm(tiles.shape[2], generator=generator) for _ in range(n)]).to(latents.device)
    mixed = tiles.gather(2, orders[:, None].expand_as(tiles))
    return F.fold(mixed, (y, x), patch, stride=patch).reshape(n, c, y, x)


@dataclass(frozen=True)
class TrainingSets:
    """Clean latents: ``target`` by prompt with class indices, and ``other``."""

    target: Tensor
    prompts: tuple[str | None, ...]
    labels: np.ndarray
    other: Tensor


class DDM(Method):
    """LoRA with an indicator."""

    key = "ddm"
    name = "DDM"
    kind = "weights"
    source = "Debiasing Diffusion Model: Enhancing Fairness through Latent Representation Learning, arXiv 2503.12536"
    explanation = (
        "Fine-tunes low-rank adapters with the diffusion loss on a biased target set (80/20 by group), plus α times an "
        "indicator's loss: three layers that tell target from non-target images by the denoised latent (the paper) or "
        "the predicted noise (its code), trained together with the adapters. No group labels enter the loss, and "
        "nothing in it asks for balance; the bench shows what it does. The paper's 100 ImageNet images are replaced by "
        "latents of the model itself with their patches in random order, which is our working form. Strength is the "
        "adapter's scale (arXiv 2503.12536)."
    )
    options = DDMOptions
    strengths = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    strength_name = "adapter scale"
    aim = "none"

    def learn(self, task: Task) -> Learned:
        """The adapter's weights; the indicator's mean entropy per subgroup goes to the notes."""
        need_ddim(task.model, self.name)
        drawing, training = task.parts(task.options.iterations)
        sets = training_sets(task, drawing)
        tensors, notes = train_ddm(task, sets, training)
        return Learned(tensors, {"rank": task.options.rank, "alpha": task.options.lora_alpha, **notes})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """The adapter scaled by ``strength``."""
        return adapter_edit(fitted, strength)


def training_sets(task: Task, progress: Progress) -> TrainingSets:
    """Target images by the probe's reading with the commonest class at ``majority``; non-target ones from the rest."""
    batches = task.draws.batches(progress)
    read = list(examples(batches, task.probe))
    labels = np.concatenate([labels for _, labels in read])
    prompts = [batch.prompt for batch in batches for _ in batch.seeds]
    clean = torch.cat([clean_latents(task.model, batch, task.draws.guidance_scale) for batch in batches])
    counts = np.bincount(labels, minlength=len(task.shares))
    majority = int(counts.argmax())
    check_examples(counts, task.attribute, (majority,))
    rng = np.random.default_rng(task.options.seed)
    rows = target_rows(labels, majority, task.options.majority, rng)
    generator = torch.Generator().manual_seed(task.options.seed)
    others = torch.from_numpy(rng.integers(len(clean), size=task.options.n_other))
    return TrainingSets(clean[rows], tuple(prompts[i] for i in rows), labels[rows], shuffled(clean[others], generator))


def train_ddm(task: Task, sets: TrainingSets, progress: Progress) -> tuple[dict[str, Tensor], dict[str, object]]:
    """``MSE(target set) + α · CE(indicator)`` → adapter tensors, and notes: losses and entropy per subgroup."""
    model, options = task.model, task.options
    shape = LoraShape(options.rank, options.lora_alpha, ("to_q", "to_v"), ("q_proj", "v_proj"))
    scheduler = model.scheduler(task.draws.n_steps)
    generator = torch.Generator().manual_seed(options.seed)
    indicator = make_indicator(int(np.prod(model.latent_shape)), options.seed).to(model.device)
    encoder = getattr(model.pipeline, "text_encoder", None)
    curve: list[float] = []
    with model.lock, frozen(model.denoiser, encoder), adapters(model, shape, seed=options.seed) as adapted:
        optimiser = torch.optim.AdamW([*adapted.parameters, *indicator.parameters()], lr=options.lr)
        with torch.enable_grad():
            for _ in progress.each(range(options.iterations)):
                loss = ddm_loss(task, sets, adapted, indicator, scheduler, generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                curve.append(float(loss.detach()))
            entropies = indicator_entropy(task, sets, adapted, indicator, scheduler, generator)
        tensors = adapted.tensors()
    named = zip(task.attribute.classes, entropies, strict=True)
    by_class = {label: float(value) for label, value in named if np.isfinite(value)}
    return tensors, {"loss": curve, "indicator entropy": by_class}


def ddm_loss(
    task: Task,
    sets: TrainingSets,
    adapted: Adapters,
    indicator: nn.Module,
    scheduler: Any,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch: target images with their prompts, non-target ones with the target's prompt."""
    options = task.options
    rows = torch.randint(len(sets.target), (options.batch_size,), generator=generator)
    prompt = sets.prompts[int(rows[0])]
    rows = torch.tensor([r for r in rows.tolist() if sets.prompts[r] == prompt])
    others = torch.randint(len(sets.other), (len(rows),), generator=generator)
    reading, loss = _read(task, sets.target[rows], prompt, adapted, scheduler, generator)
    other, _ = _read(task, sets.other[others], prompt, adapted, scheduler, generator)
    told = torch.tensor([TARGET] * len(reading) + [NON_TARGET] * len(other), device=reading.device)
    return loss + options.alpha * F.cross_entropy(indicator(torch.cat([reading, other])), told)


def _read(
    task: Task, clean: Tensor, prompt: str | None, adapted: Adapters, scheduler: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the indicator reads of noised latents ``[n, c, y, x]``, and their diffusion loss."""
    noised = add_noise(scheduler, clean, generator)
    prediction = task.model.predict(noised.x, noised.t, encode(task.model, prompt, len(clean), adapted))
    x0, noise = denoised(scheduler, prediction, noised.x, noised.t.cpu())
    reading = x0 if task.options.indicator_on == "denoised latent" else noise
    return reading, F.mse_loss(prediction, noised.target)


@torch.no_grad()
def indicator_entropy(
    task: Task,
    sets: TrainingSets,
    adapted: Adapters,
    indicator: nn.Module,
    scheduler: Any,
    generator: torch.Generator,
) -> np.ndarray:
    """DDM's subgroup entropy: mean entropy of the indicator's answer per class of the target set, ``[class]``."""
    probs: list[np.ndarray] = []
    for rows in _by_prompt(sets.prompts):
        reading, _ = _read(task, sets.target[rows], sets.prompts[rows[0]], adapted, scheduler, generator)
        probs.append(indicator(reading).softmax(1).cpu().numpy())
    order = np.concatenate(_by_prompt(sets.prompts))
    return metrics.subgroup_entropy(np.concatenate(probs), sets.labels[order], len(task.shares))


def _by_prompt(prompts: Sequence[str | None]) -> list[np.ndarray]:
    return [np.array([i for i, own in enumerate(prompts) if own == p]) for p in dict.fromkeys(prompts)]
