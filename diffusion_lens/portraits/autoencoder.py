"""Training of the image autoencoder, the slow part on a CPU and seconds on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.precision import mixed_precision
from diffusion_lens.base.progress import Progress
from diffusion_lens.portraits.networks import make_autoencoder


class AutoencoderTrainConfig(StrictConfig):
    """How the autoencoder is trained.

    Attributes:
        latent_noise: standard deviation of the noise on latents in training, so that decoding forgives
            small sampling errors.
    """

    width: int = 48
    n_steps: int = 6000
    batch_size: int = 32
    lr: float = 2e-3
    latent_noise: float = 0.05
    seed: int = 0


def to_unit(images: Tensor) -> Tensor:
    """``uint8[n, H, W, 3]`` → float ``[n, 3, H, W]`` in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + L1 of the horizontal and vertical differences, which keeps drawn lines sharp (our working form).

    The middle of the picture, where the face is, weighs three times as much as the rest.
    """
    weight = torch.ones_like(target[:1, :1])
    weight[..., 12:46, 18:46] = 3.0
    error = output - target
    loss = (weight * (error.abs() + error.square())).mean()
    for axis in (2, 3):
        loss = loss + (weight.narrow(axis, 1, weight.shape[axis] - 1) * error.diff(dim=axis).abs()).mean()
    return loss


def train_autoencoder(
    images: Tensor,
    config: AutoencoderTrainConfig,
    *,
    device: torch.device,
    start: AutoencoderTiny | None = None,
    progress: Progress | None = None,
) -> AutoencoderTiny:
    """Train on ``uint8[n, 64, 64, 3]`` pictures; latents are held near zero mean and unit variance per channel.

    ``start`` goes on from an earlier autoencoder of the same width.
    """
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    model = make_autoencoder(config.width) if start is None else start.train()
    model = model.to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimiser, config.n_steps // 20, config.n_steps)
    noise_source = torch.Generator(device).manual_seed(config.seed)
    for step in range(config.n_steps):
        rows = torch.randint(len(images), (config.batch_size,), generator=generator)
        target = to_unit(images[rows.to(images.device)].to(device)).contiguous(memory_format=torch.channels_last)
        with mixed_precision(device):
            latents = model.encode(target).latents
            noise = torch.randn(latents.shape, generator=noise_source, device=device) * config.latent_noise
            output = model.decode(latents + noise).sample
        moments = latents.float().mean((0, 2, 3)).square() + (latents.float().std((0, 2, 3)) - 1).square()
        loss = reconstruction_loss(output.float(), target) + 0.05 * moments.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress and (step % 50 == 49 or step + 1 == config.n_steps):
            progress.step(step + 1, config.n_steps, f"loss {float(loss.detach()):.4f}")
    return model.eval().to(memory_format=torch.contiguous_format)


@torch.inference_mode()
def encode_all(model: AutoencoderTiny, images: Tensor, *, device: torch.device, batch_size: int = 512) -> Tensor:
    """Latents ``float16[n, 8, 16, 16]`` of all pictures, on ``device``."""
    parts = []
    for i in range(0, len(images), batch_size):
        with mixed_precision(device):
            parts.append(model.encode(to_unit(images[i : i + batch_size].to(device))).latents.half())
    return torch.cat(parts)


@torch.inference_mode()
def decode_images(model: AutoencoderTiny, latents: Tensor, *, batch_size: int = 256) -> np.ndarray:
    """Latents → ``uint8[n, 64, 64, 3]``, rounded as diffusers' pipelines do."""
    parts = []
    for i in range(0, len(latents), batch_size):
        image = model.decode(latents[i : i + batch_size].float()).sample
        parts.append(((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts).numpy()
