"""Debiasing Diffusion Model, DDM (Huang et al., arXiv 2503.12536): LoRA beside an indicator of target images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.methods.draws import check_examples, examples
from diffusion_lens.methods.fine_tuning import adapter_edit
from diffusion_lens.methods.lora import Adapters, LoraShape, adapters, encode_each
from diffusion_lens.methods.noise import add_noise, clean_latents, denoised, frozen, need_ddim
from diffusion_lens.methods.protocol import SINCE_0_5, Fitted, Learned, Method, MethodOptions, Preset, Task
from diffusion_lens.model.denoise import Edit
from diffusion_lens.results import metrics

TARGET, NON_TARGET = 1, 0
READ_AT_ONCE = 64


class DDMOptions(MethodOptions):
    """Weights of the two losses, what the indicator reads, and the set that is trained on."""

    alpha: float = Field(
        0.05, ge=0, title="α", description="Weight of the indicator's loss; 0 is plain LoRA, quality falls as it rises."
    )
    mse_weight: float = Field(
        0.95,
        gt=0,
        title="Weight of the MSE",
        description="0.95 beside α = 0.05 in the code.",
        json_schema_extra=SINCE_0_5,
    )
    indicator_on: Literal["denoised latent", "predicted noise"] = Field(
        "denoised latent", title="Indicator reads", description="The paper reads the latent, its code the noise."
    )
    target_set: Literal["target shares", "majority"] = Field(
        "target shares",
        title="Target set",
        description="Shows the target shares, or the majority's share as in the paper.",
        json_schema_extra=SINCE_0_5,
    )
    majority: float = Field(0.8, ge=0, le=1, title="Majority's share", description="Of a target set with a majority.")
    n_other: int = Field(100, ge=2, le=10_000, title="Non-target images", description="100 in the paper.")
    rank: int = Field(8, ge=1, le=512, title="Rank")
    lora_alpha: float = Field(32.0, gt=0, title="LoRA α")
    lr: float = Field(1e-3, gt=0, title="Learning rate", description="1e-5 in the paper, over many more steps.")
    clip: float = Field(
        1.0,
        gt=0,
        title="Gradient clipped at",
        description="Value by value, as the code does.",
        json_schema_extra=SINCE_0_5,
    )
    iterations: int = Field(200, ge=1, le=100_000, title="Iterations")
    batch_size: int = Field(8, ge=1, le=256, title="Batch size", description="Of both sets together.")
    seed: int = Field(0, ge=0, title="Seed of the training")


def make_indicator(n_inputs: int, seed: int) -> nn.Sequential:
    """flatten → 1024 → 512 → 2 with ReLU (DDM), weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(n_inputs, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 2)
        )


def set_shares(labels: np.ndarray, shares: Sequence[float], options: DDMOptions) -> np.ndarray:
    """Class shares ``[class]`` that the target set shows: the target's, or ``majority`` of the commonest class.

    The other classes keep their proportions in the latter. Raises ``LensError`` where a class that it needs has fewer
    than two images.
    """
    counts = np.bincount(labels, minlength=len(shares)).astype(np.float64)
    if options.target_set == "target shares":
        wanted = np.array(shares, dtype=np.float64)
    else:
        first = int(counts.argmax())
        rest = np.where(np.arange(len(counts)) == first, 0.0, counts)
        wanted = (1 - options.majority) * rest / max(1.0, rest.sum())
        wanted[first] = options.majority if rest.sum() else 1.0
    return wanted / wanted.sum()


def row_weights(labels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Chance of each image ``[n]`` to be drawn, so that classes come with ``shares [class]``; adds up to 1."""
    counts = np.bincount(labels, minlength=len(shares))
    weights = (shares / np.maximum(counts, 1))[labels]
    return np.asarray(weights / weights.sum())


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
    """Clean latents, each with its own prompt.

    Attributes:
        target: ``[n, c, y, x]`` with ``prompts``, class indices ``labels [n]`` and the chance ``weights [n]`` to be
            drawn. other: ``[m, c, y, x]`` with ``other_prompts``.
    """

    target: Tensor
    prompts: tuple[str | None, ...]
    labels: np.ndarray
    weights: np.ndarray
    other: Tensor
    other_prompts: tuple[str | None, ...]


class DDM(Method):
    """LoRA with an indicator."""

    key = "ddm"
    name = "DDM"
    kind = "weights"
    source = (
        "Huang, Tsao, Su and Chiang 2025, Debiasing Diffusion Model: Enhancing Fairness through Latent Representation "
        "Learning, arXiv 2503.12536"
    )
    explanation = (
        "Fine-tunes low-rank adapters of U-Net and text encoder with the diffusion loss on target and non-target "
        "images, each with its own prompt, plus α times an indicator's loss: three layers that tell target from "
        "non-target images by the denoised latent (the paper) or the predicted noise (its code), trained together with "
        "the adapters. No group labels enter the loss. Here the target set shows the target shares of the prompt at "
        "hand, so the set balances; the paper's is 80/20, and its claim is about the indicator (α = 0 is plain LoRA). "
        "The paper's 100 ImageNet images are replaced by latents of the model itself with their patches in random "
        "order, under the same prompts, which is our working form. Strength is the adapter's scale (Huang et al., "
        "arXiv 2503.12536)."
    )
    options = DDMOptions
    strengths = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    strength_name = "adapter scale"
    aim = "distribution"
    presets: ClassVar[Mapping[str, Preset]] = {
        "as the authors' code": Preset(
            {
                "alpha": 0.05, "mse_weight": 0.95, "indicator_on": "predicted noise", "target_set": "majority",
                "majority": 0.8, "lr": 1e-5, "clip": 1.0, "iterations": 1000, "batch_size": 4, "rank": 8,
                "lora_alpha": 32.0,
            },
            "Its 4,000 micro-batches of 1 with accumulation 4 are 1,000 batches of 4 here; AdamW; non-target images "
            "are shuffled latents, not ImageNet.",
        ),
        "plain LoRA": Preset({"alpha": 0.0}, "The same without its indicator: what the paper compares with."),
    }  # fmt: skip

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
    """Target images with the wanted shares by the probe's reading, and non-target ones made of them."""
    batches = task.draws.batches(progress)
    read = list(examples(batches, task.probe))
    labels = np.concatenate([labels for _, labels in read])
    prompts = tuple(batch.prompt for batch in batches for _ in batch.seeds)
    clean = torch.cat([clean_latents(task.model, batch, task.draws.guidance_scale) for batch in batches])
    counts = np.bincount(labels, minlength=len(task.shares))
    shares = set_shares(labels, task.shares, task.options)
    check_examples(counts, task.attribute, [i for i, share in enumerate(shares) if 0 < share < 1])
    generator = torch.Generator().manual_seed(task.options.seed)
    others = np.random.default_rng(task.options.seed).integers(len(clean), size=task.options.n_other)
    return TrainingSets(
        clean, prompts, labels, row_weights(labels, shares),
        shuffled(clean[torch.from_numpy(others)], generator), tuple(prompts[i] for i in others),
    )  # fmt: skip


def train_ddm(task: Task, sets: TrainingSets, progress: Progress) -> tuple[dict[str, Tensor], dict[str, object]]:
    """``w · MSE(target ∪ non-target) + α · CE(indicator)`` → adapter tensors, and notes: losses, entropy per subgroup.

    One optimiser for U-Net, text encoder and indicator together (their code): they work with each other.
    """
    model, options = task.model, task.options
    shape = LoraShape(options.rank, options.lora_alpha, ("to_q", "to_v"), ("q_proj", "v_proj"))
    scheduler = model.scheduler(task.draws.n_steps)
    generator = torch.Generator().manual_seed(options.seed)
    indicator = make_indicator(int(np.prod(model.latent_shape)), options.seed).to(model.device)
    encoder = getattr(model.pipeline, "text_encoder", None)
    curve: list[float] = []
    with model.lock, frozen(model.denoiser, encoder), adapters(model, shape, seed=options.seed) as adapted:
        trained = [*adapted.parameters, *indicator.parameters()]
        optimiser = torch.optim.AdamW(trained, lr=options.lr)
        with torch.enable_grad():
            for _ in progress.each(range(options.iterations)):
                loss = ddm_loss(task, sets, adapted, indicator, scheduler, generator)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_value_(trained, options.clip)
                optimiser.step()
                curve.append(float(loss.detach()))
            entropies = indicator_entropy(task, sets, adapted, indicator, scheduler, generator)
        tensors = adapted.tensors()
    named = zip(task.attribute.classes, entropies, strict=True)
    by_class = {label: float(value) for label, value in named if np.isfinite(value)}
    return tensors, {"loss": curve, "indicator entropy": by_class}


@dataclass(frozen=True)
class Batch:
    """Clean latents ``[n, c, y, x]``, a prompt each, and whether each is of the target set, ``int64 [n]``."""

    clean: Tensor
    prompts: tuple[str | None, ...]
    told: Tensor


def draw_batch(sets: TrainingSets, n: int, generator: torch.Generator) -> Batch:
    """A batch from both sets, as often from one as from the other; always ``n`` images, whatever their prompts."""
    n_target = (n + 1) // 2
    rows = torch.multinomial(torch.from_numpy(sets.weights), n_target, replacement=True, generator=generator)
    others = torch.randint(len(sets.other), (n - n_target,), generator=generator)
    prompts = [sets.prompts[i] for i in rows.tolist()] + [sets.other_prompts[i] for i in others.tolist()]
    told = torch.tensor([TARGET] * len(rows) + [NON_TARGET] * len(others))
    return Batch(torch.cat([sets.target[rows], sets.other[others]]), tuple(prompts), told)


def ddm_loss(
    task: Task,
    sets: TrainingSets,
    adapted: Adapters,
    indicator: nn.Module,
    scheduler: Any,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch: MSE over both sets, and the indicator's cross entropy over both sets."""
    options = task.options
    batch = draw_batch(sets, options.batch_size, generator)
    reading, loss = _read(task, batch.clean, batch.prompts, adapted, scheduler, generator)
    guess = F.cross_entropy(indicator(reading), batch.told.to(reading.device))
    return options.mse_weight * loss + options.alpha * guess


def _read(
    task: Task,
    clean: Tensor,
    prompts: Sequence[str | None],
    adapted: Adapters,
    scheduler: Any,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """What the indicator reads of noised latents ``[n, c, y, x]``, each under its own prompt; their diffusion loss."""
    noised = add_noise(scheduler, clean, generator)
    prediction = task.model.predict(noised.x, noised.t, encode_each(task.model, prompts, adapted))
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
    for rows in torch.arange(len(sets.target)).split(READ_AT_ONCE):
        prompts = [sets.prompts[i] for i in rows.tolist()]
        reading, _ = _read(task, sets.target[rows], prompts, adapted, scheduler, generator)
        probs.append(indicator(reading).softmax(1).cpu().numpy())
    return metrics.subgroup_entropy(np.concatenate(probs), sets.labels, len(task.shares))
