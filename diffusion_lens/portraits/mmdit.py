"""The Portraits model as a multimodal diffusion transformer: the stock parts of Stable Diffusion 3, and their training.

Rectified flow on the same latents and captions as the U-Nets (Esser et al., 2403.03206). Both text encoders are trained
with the transformer. What the stock pipeline adds to their tokens where it has no third encoder, tokens of zeros, costs
one token in training: see ``Counted``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.precision import mixed_precision, short_attention
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.portraits.denoiser import (
    denoising_loss,
    draw_rows,
    draw_timesteps,
    load_state,
    other_shape,
    read_state,
    save_state,
    tokenize,
)
from diffusion_lens.portraits.emphasis import Emphasis
from diffusion_lens.portraits.networks import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    TIMESTEPS,
    make_tokenizer,
    text_config,
)

FLOW_SHIFT = 3.0
"""How far times are shifted towards noise, in training and sampling; Stable Diffusion 3's own."""

MOST_ZEROS = 256
"""Tokens of zeros that the stock pipeline adds by default (its ``max_sequence_length``)."""


class TransformerConfig(StrictConfig):
    """Shape of the transformer and of its two text encoders.

    Attributes:
        layers: joint blocks, each with an image and a text stream; the last one drops the text.
        heads: attention heads of ``head_width`` channels; their product is the width of both streams.
        patch: latent pixels a side of one image token.
        text_width: width of each text encoder; the transformer reads both side by side.
    """

    layers: int = 6
    heads: int = 3
    head_width: int = 64
    patch: int = 2
    text_width: int = 96


class TransformerTrainConfig(StrictConfig):
    """How the transformer is trained.

    Attributes:
        n_steps: optimiser steps of ``batch_size`` latents each.
        caption_dropout: share of captions replaced by the empty prompt, which so learns the marginal.
        focus_share: share of times drawn around one place in place of uniformly, before they are shifted. focus: that
            place as a logit.
        coarse_weight: how often the error of areas counts beside that of latent pixels (``denoising_loss``).
        no_zeros: share of captions to which no tokens of zeros are added; ``MOST_ZEROS`` are added to half of the
            others, and any number up to that to the rest, so that every ``max_sequence_length`` draws the same.
    """

    shape: TransformerConfig = TransformerConfig()
    n_steps: int = 8_000
    batch_size: int = 64
    lr: float = 1e-3
    caption_dropout: float = 0.12
    ema_decay: float = 0.999
    focus_share: float = 0.5
    focus: float = 0.0
    coarse_weight: float = 3.0
    no_zeros: float = 0.5
    seed: int = 0


@dataclass
class TransformerParts:
    """The networks of a Stable Diffusion 3 pipeline but for the autoencoder."""

    transformer: SD3Transformer2DModel
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]
    tokenizer: CLIPTokenizer

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What is trained, the transformer first."""
        return (self.transformer, *self.encoders)

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the order of ``modules``."""
        return [p for module in self.modules for p in module.parameters()]


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the straight path from noise (σ = 1) to latents (σ = 0), times shifted by ``FLOW_SHIFT``."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=FLOW_SHIFT)


def make_transformer(config: TransformerConfig) -> SD3Transformer2DModel:
    """A fresh transformer on latents, which predicts zero.

    Blocks begin as the identity, their gates being zero, and other linear maps keep the variance of what they are given
    (Peebles and Xie, 2212.09748).
    """
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=config.patch,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=config.layers,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=2 * config.text_width,
        caption_projection_dim=config.heads * config.head_width,
        pooled_projection_dim=2 * config.text_width,
        pos_embed_max_size=LATENT_SIZE // config.patch,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    gates = [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for silent in (*gates, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(silent.weight)
    return transformer


def make_parts(config: TransformerConfig, seed: int) -> TransformerParts:
    """Fresh networks, determined by ``seed``."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    settings: CLIPTextConfig = text_config(tokenizer, config.text_width)
    encoders = CLIPTextModelWithProjection(settings), CLIPTextModelWithProjection(settings)
    return TransformerParts(make_transformer(config), encoders, tokenizer)


def encode_text(encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids ``[n, 16]`` → text tokens ``[n, 16, 2 · text_width]`` and pooled texts ``[n, 2 · text_width]``.

    As ``StableDiffusion3Pipeline.encode_prompt``: the last hidden states but one, and the projected ends, of both
    encoders side by side; no tokens of zeros yet.
    """
    read = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([output.hidden_states[-2] for output in read], dim=-1)
    return hidden, torch.cat([output.text_embeds for output in read], dim=-1)


class Counted(TorchFunctionMode):
    """Within it, the last token of every attention counts as many times as said: ``counts [n]``, which may be 0.

    The stock pipeline adds ``max_sequence_length`` tokens of zeros to a prompt where it has no third text encoder. They
    have no place, so they are the same token in every block; one, with the logarithm of their number added to its
    logits, has the same effect on all others.
    """

    def __init__(self, counts: Tensor, n_tokens: int) -> None:
        super().__init__()
        self.bias = counts.new_zeros((len(counts), 1, 1, n_tokens), dtype=torch.float32)
        self.bias[..., -1] = counts.float().log()[:, None, None]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Add the mask to attention; leave all else alone."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["attn_mask"] = self.bias.to(args[0].dtype)
        return func(*args, **kwargs)


def predict_velocity(
    transformer: SD3Transformer2DModel, noisy: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor, zeros: Tensor
) -> Tensor:
    """Velocities ``[n, 8, 16, 16]`` of ``noisy``, as if ``zeros int64[n]`` tokens of zeros followed the ``text``.

    ``timesteps [n]`` are the scheduler's, 1000 · σ.
    """
    text = F.pad(text, (0, 0, 0, 1))
    n_tokens = text.shape[1] + (noisy.shape[-1] // transformer.config["patch_size"]) ** 2
    with Counted(zeros, n_tokens):
        output: Tensor = transformer(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=text, pooled_projections=pooled
        ).sample
    return output


def draw_zeros(n: int, none: float, generator: torch.Generator) -> Tensor:
    """How many tokens of zeros follow each caption, ``int64[n]``: see ``TransformerTrainConfig.no_zeros``."""
    kind = torch.rand(n, generator=generator)
    some = (torch.rand(n, generator=generator) * torch.tensor(float(MOST_ZEROS)).log()).exp().round().long()
    counts = torch.where(kind < (1 + none) / 2, torch.full_like(some, MOST_ZEROS), some)
    return torch.where(kind < none, torch.zeros_like(some), counts)


@dataclass(frozen=True)
class Batch:
    """What one step is trained on: latents, token ids, times as indices below ``TIMESTEPS``, noise, tokens of zeros."""

    clean: Tensor
    ids: Tensor
    at: Tensor
    noise: Tensor
    zeros: Tensor


class Batches:
    """Latents ``[n, 8, 16, 16]`` and captions, drawn step by step; what a step draws depends on seed and step alone."""

    def __init__(
        self,
        latents: Tensor,
        captions: Sequence[str],
        tokenizer: CLIPTokenizer,
        config: TransformerTrainConfig,
        emphasis: Emphasis | None,
    ) -> None:
        self.latents, self.config = latents, config
        self.tokens, self.empty = tokenize(tokenizer, list(captions)), tokenize(tokenizer, [""])[0]
        weights = (None, None) if emphasis is None else (emphasis.named, emphasis.unnamed)
        self.named, self.unnamed = (None if w is None else torch.from_numpy(w) for w in weights)

    def draw(self, step: int) -> Batch:
        """The batch of ``step``, on the CPU."""
        config = self.config
        source = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rows = draw_rows(config.batch_size, len(self.latents), self.named, source)
        dropped = torch.rand(len(rows), generator=source) < config.caption_dropout
        if self.unnamed is not None:
            rows = torch.where(dropped, draw_rows(len(rows), len(self.latents), self.unnamed, source), rows)
        clean = self.latents[rows.to(self.latents.device)].cpu().float()
        return Batch(
            clean,
            torch.where(dropped[:, None], self.empty, self.tokens[rows]),
            draw_timesteps(len(rows), TIMESTEPS, config.focus_share, config.focus, source),
            torch.randn(clean.shape, generator=source),
            draw_zeros(len(rows), config.no_zeros, source),
        )


def flow_loss(parts: TransformerParts, batch: Batch, coarse_weight: float, device: torch.device) -> Tensor:
    """The squared error of the velocity, noise − latents, on the straight path between them; of areas, too."""
    scheduler = make_flow_scheduler()
    at = TIMESTEPS - 1 - batch.at  # the scheduler counts from noise
    sigma, timesteps = scheduler.sigmas[at].to(device)[:, None, None, None], scheduler.timesteps[at].to(device)
    clean, noise = batch.clean.to(device), batch.noise.to(device)
    with mixed_precision(device), short_attention(device):
        text, pooled = encode_text(parts.encoders, batch.ids.to(device))
        noisy = sigma * noise + (1 - sigma) * clean
        velocity = predict_velocity(parts.transformer, noisy, timesteps, text, pooled, batch.zeros.to(device))
    error = velocity.float() - (noise - clean)
    return denoising_loss(error, sigma / (1 - sigma).clamp_min(1e-4), coarse_weight)


def train_transformer(
    latents: Tensor,
    captions: Sequence[str],
    config: TransformerTrainConfig,
    *,
    device: torch.device,
    checkpoint: Path | None = None,
    resume: bool = False,
    start: TransformerParts | None = None,
    emphasis: Emphasis | None = None,
    checkpoint_every: int = 200,
    stop_after: int | None = None,
    progress: Progress | None = None,
) -> TransformerParts:
    """Train on latents ``[n, 8, 16, 16]`` and their captions; returns the moving averages.

    ``checkpoint`` is a folder rewritten every ``checkpoint_every`` steps; ``resume`` goes on from it, to the same
    weights as an uninterrupted run. ``start`` are networks to train further, in place of fresh ones. ``emphasis``: how
    often each latent is shown; evenly by default. ``stop_after``: leave off after so many steps of the ``n_steps`` that
    the learning rate is planned for. Raises ``LensError`` when there is nothing to resume or the checkpoint is of
    another shape.
    """
    parts = make_parts(config.shape, config.seed) if start is None else start
    for module in parts.modules:
        module.to(device).train()
    parameters = parts.parameters()
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(device)
    groups = [{"params": parameters, "lr": config.lr, "initial_lr": config.lr}]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    first = 0
    if resume:
        if checkpoint is None:
            raise LensError("Name the checkpoint folder to resume from.")
        first = load_state(checkpoint, parameters, ema, optimiser)
    schedule = get_cosine_schedule_with_warmup(
        optimiser, config.n_steps // 30, config.n_steps, last_epoch=first - 1 if first else -1
    )
    batches = Batches(latents, captions, parts.tokenizer, config, emphasis)
    last = config.n_steps if stop_after is None else min(stop_after, config.n_steps)
    for step in range(first, last):
        loss = flow_loss(parts, batches.draw(step), config.coarse_weight, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        ema.step(parameters)
        done = step + 1
        if checkpoint is not None and (done % checkpoint_every == 0 or done == last):
            save_state(checkpoint, parameters, ema, optimiser, done)
        if progress and (done % 50 == 0 or done == last):
            progress.step(done, config.n_steps, f"loss {float(loss.detach()):.4f}")
    ema.copy_to(parameters)
    for module in parts.modules:
        module.eval()
    return parts


def load_average_parts(checkpoint: Path, shape: TransformerConfig) -> TransformerParts:
    """The moving averages of an unfinished training, ready to sample; raises ``LensError`` for another shape."""
    parts = make_parts(shape, 0)
    tensors = read_state(checkpoint)
    try:
        for i, p in enumerate(parts.parameters()):
            p.data.copy_(tensors[f"ema.{i}"])
    except (KeyError, RuntimeError):
        raise other_shape(checkpoint) from None
    for module in parts.modules:
        module.eval()
    return parts


def sample_transformer(
    pipe: StableDiffusion3Pipeline,
    prompt: str,
    seeds: range,
    progress: Progress | None = None,
    *,
    n_steps: int,
    batch_size: int = 64,
) -> Iterator[np.ndarray]:
    """Batches ``uint8[n, 64, 64, 3]`` of the stock pipeline's samples, one seed each; unguided, no tokens of zeros."""
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(seeds), batch_size):
        part = seeds[first : first + batch_size]
        images = pipe(
            [prompt] * len(part),
            num_inference_steps=n_steps,
            guidance_scale=1.0,
            max_sequence_length=0,
            generator=[torch.Generator().manual_seed(seed) for seed in part],
            output_type="np",
        ).images
        yield (images * 255).round().astype(np.uint8)
        if progress:
            progress.step(first + len(part), len(seeds))
