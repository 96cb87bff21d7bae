"""Latents as tokens and back, as FLUX and Qwen-Image pack them: 2 × 2 latents are one token."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

SIDE = 2
"""Latents a side of one token."""
SHIFTS = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
"""Settings of a scheduler whose shift depends on the number of tokens, and what the pipelines take without them."""


def pack(latents: Tensor) -> Tensor:
    """``[n, c, y, x]`` → tokens ``[n, y/2 · x/2, 4c]``."""
    n, c, y, x = latents.shape
    tokens = latents.view(n, c, y // SIDE, SIDE, x // SIDE, SIDE).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(n, (y // SIDE) * (x // SIDE), c * SIDE * SIDE)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse, for latents of ``size (y, x)``."""
    n, _, width = tokens.shape
    y, x = size
    maps = tokens.view(n, y // SIDE, x // SIDE, width // SIDE**2, SIDE, SIDE).permute(0, 3, 1, 4, 2, 5)
    return maps.reshape(n, width // SIDE**2, y, x)


def even_sigmas(n_steps: int) -> np.ndarray:
    """Noise levels from 1 to 1/n, before the shift."""
    return np.linspace(1.0, 1 / n_steps, n_steps)


def token_shift(scheduler: Any, n_tokens: int) -> float:
    """``mu`` of a shift that depends on the number of tokens."""
    return calculate_shift(n_tokens, *(scheduler.config.get(name, usual) for name, usual in SHIFTS))
