"""Training of text encoder and U-Net together: v-prediction, EMA, resumable, the same on CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_lens.config import StrictConfig
from diffusion_lens.portraits.networks import (
    MAX_TOKENS,
    DenoiserConfig,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)
from diffusion_lens.portraits.precision import mixed_precision
from diffusion_lens.types import LensError


class DenoiserTrainConfig(StrictConfig):
    """How the denoiser is trained.

    Attributes:
        n_steps: optimiser steps of ``batch_size`` latents each.
        caption_dropout: share of captions replaced by the empty prompt, which so learns the marginal.
        skip_dropout: share of training images whose lowest-level skip connections are silenced, so that what
            the coarsest level knows has to pass through the bottleneck. Our working form; the architecture
            stays a stock U-Net.
    """

    shape: DenoiserConfig = DenoiserConfig()
    n_steps: int = 20_000
    batch_size: int = 64
    lr: float = 8e-4
    caption_dropout: float = 0.12
    skip_dropout: float = 0.0
    ema_decay: float = 0.9995
    seed: int = 0


@dataclass
class Denoiser:
    """The networks in training and their moving averages."""

    unet: UNet2DConditionModel | UNet2DModel
    text_encoder: CLIPTextModel | None
    tokenizer: CLIPTokenizer | None

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, U-Net first."""
        return [*self.unet.parameters(), *(self.text_encoder.parameters() if self.text_encoder else ())]


def make_denoiser(config: DenoiserConfig, seed: int) -> Denoiser:
    """Fresh networks, determined by ``seed``."""
    torch.manual_seed(seed)
    unet = make_unet(config)
    if not config.text_width:
        return Denoiser(unet, None, None)
    tokenizer = make_tokenizer()
    return Denoiser(unet, make_text_encoder(tokenizer, config.text_width), tokenizer)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids ``int64[n, 16]``, padded as the stock pipeline pads."""
    unique = sorted(set(captions))
    ids = tokenizer(unique, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
    row = {text: i for i, text in enumerate(unique)}
    return ids[[row[text] for text in captions]]


@contextmanager
def _skip_dropout(unet: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Silence the lowest level's skips for a random ``share`` of the batch, inside the context."""
    if share <= 0:
        yield
        return

    def silence(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        skips = kwargs.get("res_hidden_states_tuple", args[1] if len(args) > 1 else None)
        keep = torch.rand(len(skips[0]), 1, 1, 1, generator=generator, device=skips[0].device) >= share
        # the first block's last skip comes from the level above: it stays
        lowest = [s.shape[-1] == skips[-1].shape[-1] for s in skips]
        silenced = tuple(s * keep if low else s for s, low in zip(skips, lowest, strict=True))
        if "res_hidden_states_tuple" in kwargs:
            return args, {**kwargs, "res_hidden_states_tuple": silenced}
        return (args[0], silenced, *args[2:]), kwargs

    handle = unet.up_blocks[0].register_forward_pre_hook(silence, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def train_denoiser(
    latents: Tensor,
    captions: list[str],
    config: DenoiserTrainConfig,
    *,
    device: torch.device,
    checkpoint: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 1000,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Denoiser:
    """Train on latents ``[n, 8, 16, 16]`` and their captions; returns the moving averages.

    ``checkpoint`` is a folder rewritten every ``checkpoint_every`` steps; ``resume`` goes on from it. A resumed
    run draws other batches than an uninterrupted one would have. Raises ``LensError`` when there is nothing to
    resume or the checkpoint is of another shape.
    """
    nets = make_denoiser(config.shape, config.seed)
    for module in (nets.unet, nets.text_encoder):
        if module is not None:
            module.to(device).train()
    nets.unet.to(memory_format=torch.channels_last)
    parameters = nets.parameters()
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(device)
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimiser, config.n_steps // 30, config.n_steps)
    first = 0
    if resume:
        if checkpoint is None or not (checkpoint / "state.safetensors").exists():
            raise LensError("There is no checkpoint to resume; start without --resume.")
        first = _load_state(checkpoint, parameters, ema, optimiser, schedule)
    tokens = tokenize(nets.tokenizer, captions) if nets.tokenizer else None
    empty = tokenize(nets.tokenizer, [""])[0] if nets.tokenizer else None
    alphas = make_scheduler().alphas_cumprod.to(device)
    cpu = torch.Generator().manual_seed(config.seed + first)
    source = torch.Generator(device).manual_seed(config.seed + first)
    for step in range(first, config.n_steps):
        rows = torch.randint(len(latents), (config.batch_size,), generator=cpu)
        clean = latents[rows.to(latents.device)].to(device).float().contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=source, device=device)
        t = torch.randint(len(alphas), (len(clean),), generator=source, device=device)
        signal, spread = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        inputs: dict[str, Tensor] = {}
        with mixed_precision(device):
            if tokens is not None and empty is not None and nets.text_encoder is not None:
                ids = tokens[rows]
                dropped = torch.rand(len(ids), generator=cpu) < config.caption_dropout
                ids = torch.where(dropped[:, None], empty, ids).to(device)
                inputs["encoder_hidden_states"] = nets.text_encoder(ids)[0]
            with _skip_dropout(nets.unet, config.skip_dropout, source):
                predicted = nets.unet(signal * clean + spread * noise, t, **inputs).sample
        loss = F.mse_loss(predicted.float(), signal * noise - spread * clean)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        ema.step(parameters)
        done = step + 1
        if checkpoint is not None and (done % checkpoint_every == 0 or done == config.n_steps):
            _save_state(checkpoint, parameters, ema, optimiser, done)
        if on_step and (done % 50 == 0 or done == config.n_steps):
            on_step(done, config.n_steps, float(loss.detach()))
    ema.copy_to(parameters)
    nets.unet.eval().to(memory_format=torch.contiguous_format)
    if nets.text_encoder is not None:
        nets.text_encoder.eval()
    return nets


def _save_state(
    folder: Path, parameters: list[nn.Parameter], ema: EMAModel, optimiser: torch.optim.Optimizer, step: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for i, (p, shadow) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
        tensors[f"parameter.{i}"], tensors[f"ema.{i}"] = p.detach().contiguous(), shadow.contiguous()
        state = optimiser.state[p]
        tensors[f"first.{i}"], tensors[f"second.{i}"] = state["exp_avg"].contiguous(), state["exp_avg_sq"].contiguous()
    scratch = folder / "state.safetensors.part"
    save_file({k: v.clone() for k, v in tensors.items()}, scratch)
    scratch.replace(folder / "state.safetensors")  # a kill while writing leaves the previous one whole


def _load_state(
    folder: Path,
    parameters: list[nn.Parameter],
    ema: EMAModel,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    tensors = load_file(folder / "state.safetensors")
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
        raise LensError(f"The checkpoint in {folder} is of another shape; give its settings or start afresh.") from None
    ema.optimization_step = step
    for _ in range(step):
        schedule.step()
    return step
