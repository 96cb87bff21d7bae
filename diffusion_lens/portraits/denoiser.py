"""Training of text encoder and U-Net together: v-prediction, EMA, resumable, the same on CPU and GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import atomic_path
from diffusion_lens.base.precision import mixed_precision, short_attention
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.portraits.emphasis import Emphasis
from diffusion_lens.portraits.networks import (
    LATENT_CHANNELS,
    MAX_TOKENS,
    DenoiserConfig,
    keep_silent,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)

AREA = 4
"""Latent pixels a side that ``denoising_loss`` averages over: a quarter of the image each way."""

KNOWN = 5.0
"""Noise over signal up to which the colour of a large area can be told: two skin tones are two deviations apart."""


class DenoiserTrainConfig(StrictConfig):
    """How the denoiser is trained.

    Attributes:
        n_steps: optimiser steps of ``batch_size`` latents each.
        caption_dropout: share of captions replaced by the empty prompt, which so learns the marginal.
        focus_share: share of timesteps drawn around one place of the schedule in place of uniformly (our working
            form: a logit-normal of deviation 1). focus: that place as a logit: -1.2, at a quarter, is where shapes
            are decided; higher, where large areas get their colour.
        coarse_weight: how often the error of areas counts beside that of latent pixels (``denoising_loss``).
        bottleneck_weight: how often it counts that the bottleneck tells the colour of areas (``bottleneck_loss``);
            0 leaves that out.
    """

    shape: DenoiserConfig = DenoiserConfig()
    n_steps: int = 20_000
    batch_size: int = 128
    lr: float = 8e-4
    caption_dropout: float = 0.12
    ema_decay: float = 0.999
    focus_share: float = 0.5
    focus: float = -1.0
    coarse_weight: float = 6.0
    bottleneck_weight: float = 2.0
    seed: int = 0


@dataclass
class Denoiser:
    """The networks in training and their moving averages."""

    unet: UNet2DConditionModel | UNet2DModel
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer | None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What is trained, U-Net first."""
        return (self.unet,) if self.text_encoder is None else (self.unet, self.text_encoder)

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the order of ``modules``."""
        return [p for module in self.modules for p in module.parameters()]


def make_denoiser(config: DenoiserConfig, seed: int) -> Denoiser:
    """Fresh networks, determined by ``seed``."""
    torch.manual_seed(seed)
    unet = make_unet(config)
    if not config.text_width:
        return Denoiser(unet, None, None)
    tokenizer = make_tokenizer()
    return Denoiser(unet, make_text_encoder(tokenizer, config.text_width), tokenizer)


def without_text(text: Denoiser, config: DenoiserConfig, seed: int) -> Denoiser:
    """Unconditional networks that start from a text-conditional denoiser: every weight of equal name and shape.

    Raises ``LensError`` where the two share nothing but the first and last convolutions.
    """
    nets = make_denoiser(config, seed)
    own, other = nets.unet.state_dict(), text.unet.state_dict()
    shared = {k: v.clone() for k, v in other.items() if k in own and own[k].shape == v.shape}
    if not any(k.startswith("mid_block.resnets") for k in shared):
        raise LensError("That pipeline is of another shape; train the unconditional one without --from.")
    nets.unet.load_state_dict(shared, strict=False)
    return nets


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids ``int64[n, 16]``, padded as the stock pipeline pads."""
    unique = sorted(set(captions))
    ids = tokenizer(unique, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
    row = {text: i for i, text in enumerate(unique)}
    return ids[[row[text] for text in captions]]


def train_denoiser(
    latents: Tensor,
    captions: list[str],
    config: DenoiserTrainConfig,
    *,
    device: torch.device,
    checkpoint: Path | None = None,
    resume: bool = False,
    start: Denoiser | None = None,
    emphasis: Emphasis | None = None,
    checkpoint_every: int = 500,
    progress: Progress | None = None,
) -> Denoiser:
    """Train on latents ``[n, 8, 16, 16]`` and their captions; returns the moving averages.

    ``checkpoint`` is a folder rewritten every ``checkpoint_every`` steps; ``resume`` goes on from it. A resumed
    run draws other batches than an uninterrupted one would have. ``start`` are networks to train further, in place
    of fresh ones. ``emphasis``: how often each latent is shown; evenly by default. Raises ``LensError`` when there is
    nothing to resume or the checkpoint is of another shape.
    """
    nets = make_denoiser(config.shape, config.seed) if start is None else start
    for module in nets.modules:
        module.to(device).train()
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    nets.unet.to(memory_format=layout)
    silenced = keep_silent(nets.unet)
    reading = BottleneckReading(nets.unet, config.seed, device) if config.bottleneck_weight else None
    parameters = [*nets.parameters(), *(reading.head.parameters() if reading else ())]
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(device)
    groups = [{"params": nets.parameters(), "lr": config.lr, "initial_lr": config.lr}]
    if reading:  # it starts from nothing, and what it has not learnt yet misleads the rest
        groups.append({"params": list(reading.head.parameters()), "lr": 10 * config.lr, "initial_lr": 10 * config.lr})
    optimiser = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    first = 0
    if resume:
        if checkpoint is None:
            raise LensError("Name the checkpoint folder to resume from.")
        first = load_state(checkpoint, parameters, ema, optimiser)
    schedule = get_cosine_schedule_with_warmup(
        optimiser, config.n_steps // 30, config.n_steps, last_epoch=first - 1 if first else -1
    )
    tokens = tokenize(nets.tokenizer, captions) if nets.tokenizer else None
    empty = tokenize(nets.tokenizer, [""])[0] if nets.tokenizer else None
    named, unnamed = (None, None) if emphasis is None else map(torch.from_numpy, (emphasis.named, emphasis.unnamed))
    alphas = make_scheduler().alphas_cumprod.to(device)
    cpu = torch.Generator().manual_seed(config.seed + first)
    source = torch.Generator(device).manual_seed(config.seed + first)
    for step in range(first, config.n_steps):
        rows = draw_rows(config.batch_size, len(latents), named, cpu)
        dropped = torch.rand(len(rows), generator=cpu) < (1.0 if tokens is None else config.caption_dropout)
        if emphasis is not None:
            rows = torch.where(dropped, draw_rows(len(rows), len(latents), unnamed, cpu), rows)
        clean = latents[rows.to(latents.device)].to(device).float().contiguous(memory_format=layout)
        noise = torch.randn(clean.shape, generator=source, device=device)
        t = draw_timesteps(len(clean), len(alphas), config.focus_share, config.focus, source)
        signal, spread = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        inputs: dict[str, Tensor] = {}
        with mixed_precision(device), short_attention(device):
            if tokens is not None and empty is not None and nets.text_encoder is not None:
                ids = torch.where(dropped[:, None], empty, tokens[rows]).to(device)
                inputs["encoder_hidden_states"] = nets.text_encoder(ids)[0]
            predicted = nets.unet(signal * clean + spread * noise, t, **inputs).sample
        error = predicted.float() - (signal * noise - spread * clean)
        loss = denoising_loss(error, spread / signal, config.coarse_weight)
        if reading:
            loss = loss + config.bottleneck_weight * bottleneck_loss(reading(), clean, spread / signal)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        ema.step(parameters)
        done = step + 1
        if checkpoint is not None and (done % checkpoint_every == 0 or done == config.n_steps):
            save_state(checkpoint, parameters, ema, optimiser, done)
        if progress and (done % 50 == 0 or done == config.n_steps):
            progress.step(done, config.n_steps, f"loss {float(loss.detach()):.4f}")
    for handle in (*silenced, *([reading.handle] if reading else ())):
        handle.remove()
    ema.copy_to(parameters)
    nets.unet.eval().to(memory_format=torch.contiguous_format)
    if nets.text_encoder is not None:
        nets.text_encoder.eval()
    return nets


class BottleneckReading:
    """A linear head that reads ``d_in`` channels of ``mid_block``'s output as latent channels, while training."""

    def __init__(self, unet: UNet2DConditionModel | UNet2DModel, seed: int, device: torch.device) -> None:
        d_in = unet.config["block_out_channels"][-1]
        torch.manual_seed(seed)
        self.head = nn.Sequential(nn.GroupNorm(16, d_in), nn.Conv2d(d_in, LATENT_CHANNELS, 1)).to(device)
        self.handle = unet.mid_block.register_forward_hook(self._keep)
        self.h: Tensor | None = None

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.h = output

    def __call__(self) -> Tensor:
        """What the last pass tells of the clean latents: their averages, ``[n, 8, y, x]`` at the bottleneck's size."""
        assert self.h is not None
        return self.head(self.h.float())


def denoising_loss(error: Tensor, noise_ratio: Tensor, coarse_weight: float) -> Tensor:
    """Mean squared error of v ``[n, c, y, x]``, and again of its averages over ``AREA`` × ``AREA`` blocks.

    The colour of a large area is a small part of the squared error, and most of what is seen. ``noise_ratio
    [n, 1, 1, 1]`` is σ / α: the second term is divided by 1 + (σ / 5 α)⁴, for at more noise the colour of an area
    cannot be known, and its error only hides the rest. White errors count ``coarse_weight`` times more at no noise.
    Both terms are least at the posterior mean, so what is learnt stays the same (our working form).
    """
    fine = error.square().mean()
    if not coarse_weight:
        return fine
    areas = F.avg_pool2d(error, AREA).square() / (1 + (noise_ratio / KNOWN) ** 4)
    return fine + coarse_weight * AREA**2 * areas.mean()


def bottleneck_loss(told: Tensor, clean: Tensor, noise_ratio: Tensor) -> Tensor:
    """Mean squared error of ``told [n, c, y, x]`` against the clean latents' averages over its blocks.

    The colour of areas can go around the bottleneck, in the skip connections, where nothing weighs it as a whole;
    models without this term left more skins between two tones (model card). No label enters. Divided by
    1 + (σ / 5 α)² where ``noise_ratio`` is σ / α; as in ``denoising_loss``, blocks count as many times as they have
    latent pixels (our working form, after deep supervision: Lee et al., 1409.5185).
    """
    block = clean.shape[-1] // told.shape[-1]
    error = told - F.avg_pool2d(clean, block)
    return block**2 * (error.square() / (1 + (noise_ratio / KNOWN) ** 2)).mean()


def draw_rows(n: int, n_latents: int, weights: Tensor | None, generator: torch.Generator) -> Tensor:
    """Which latents to show next, ``int64[n]``: evenly, or as often as ``weights [n_latents]`` say."""
    if weights is None:
        return torch.randint(n_latents, (n,), generator=generator)
    return torch.multinomial(weights, n, replacement=True, generator=generator)


def draw_timesteps(n: int, n_train: int, focus_share: float, focus: float, generator: torch.Generator) -> Tensor:
    """Timesteps ``int64[n]`` below ``n_train``: uniform, but for ``focus_share`` of them around ``focus`` (a logit)."""
    device = generator.device
    uniform = torch.rand(n, generator=generator, device=device)
    near = (torch.randn(n, generator=generator, device=device) + focus).sigmoid()
    chosen = torch.rand(n, generator=generator, device=device) < focus_share
    return (torch.where(chosen, near, uniform) * n_train).long().clamp_(max=n_train - 1)


def load_average(checkpoint: Path, shape: DenoiserConfig) -> Denoiser:
    """The moving averages of an unfinished training, ready to sample; raises ``LensError`` for another shape."""
    nets = make_denoiser(shape, 0)
    tensors = read_state(checkpoint)
    try:
        for i, p in enumerate(nets.parameters()):
            p.data.copy_(tensors[f"ema.{i}"])
    except (KeyError, RuntimeError):
        raise other_shape(checkpoint) from None
    nets.unet.eval()
    if nets.text_encoder is not None:
        nets.text_encoder.eval()
    return nets


def read_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; raises ``LensError`` where there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        raise LensError(f"There is no checkpoint in {folder}; train first, or start without --resume.")
    return load_file(path)


def other_shape(folder: Path) -> LensError:
    """What to say of a checkpoint that does not fit the networks."""
    return LensError(f"The checkpoint in {folder} is of another shape; give its settings or start afresh.")


def save_state(
    folder: Path, parameters: list[nn.Parameter], ema: EMAModel, optimiser: torch.optim.Optimizer, step: int
) -> None:
    """Write a training's state after ``step`` steps: weights, their averages and AdamW's moments."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for i, (p, shadow) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
        tensors[f"parameter.{i}"], tensors[f"ema.{i}"] = p.detach().contiguous(), shadow.contiguous()
        state = optimiser.state[p]
        tensors[f"first.{i}"], tensors[f"second.{i}"] = state["exp_avg"].contiguous(), state["exp_avg_sq"].contiguous()
    with atomic_path(folder / "state.safetensors") as partial:  # a kill while writing leaves the previous one whole
        save_file({k: v.clone() for k, v in tensors.items()}, partial)


def load_state(
    folder: Path,
    parameters: list[nn.Parameter],
    ema: EMAModel,
    optimiser: torch.optim.Optimizer,
) -> int:
    """Set a training to its checkpoint and return its step; raises ``LensError`` where it does not fit."""
    tensors = read_state(folder)
    step = int(tensors["step"])
    try:
        for i, p in enumerate(parameters):
            p.data.copy_(tensors[f"parameter.{i}"])
            ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
            optimiser.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"first.{i}"].to(p.device),
                "exp_avg_sq": tensors[f"second.{i}"].to(p.device),
            }
    except (KeyError, RuntimeError):
        raise other_shape(folder) from None
    ema.optimization_step = step
    return step
