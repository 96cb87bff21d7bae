"""Put a pipeline where it runs: device, number format, memory layout, compiled blocks, slices, offloading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.run_options import RunOptions

RECOMPILE_LIMIT = 64
"""Compiled forms of one forward: blocks of one class count together, and so does every batch size."""
BLOCKS = ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks", "layers")
"""Lists of blocks in U-Nets and transformers."""


def place(
    pipe: Any, denoiser: Any, module: str, device: torch.device, dtype: torch.dtype, options: RunOptions | None
) -> None:
    """Move every part of ``pipe`` to ``device`` and ``dtype`` for inference, as ``options`` say (changed in place).

    ``module``: the hooked one, inside the ``denoiser``. On CUDA, convolutions run on channels_last tensors. Raises
    ``LensError`` where this pipeline cannot be offloaded.
    """
    offload = options is not None and options.offload
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            # transformers loads "auto" dtypes, so each part is checked; diffusers' own .to() would warn needlessly.
            nn.Module.to(part, device=torch.device("cpu") if offload else device, dtype=dtype).eval()
    if device.type == "cuda":
        for network in (denoiser, decoder(pipe)):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    if options is None:
        return
    if options.slicing:
        slice_work(pipe, denoiser)
    if options.compile:
        compile_blocks(denoiser, module)
    if offload:
        offload_parts(pipe, device)


def decoder(pipe: Any) -> Any:
    """The autoencoder that turns latents into pixels; ``None`` for pixel models."""
    return getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)


def slice_work(pipe: Any, denoiser: Any) -> None:
    """Attention in two parts where the denoiser has that, and one image at a time through the autoencoder."""
    if hasattr(denoiser, "set_attention_slice"):
        denoiser.set_attention_slice("auto")
    if hasattr(decoder(pipe), "enable_slicing"):
        decoder(pipe).enable_slicing()


def compile_blocks(denoiser: Any, module: str) -> None:
    """Compile the forward of each block, and leave a U-Net's bottleneck and the hooked module as they are.

    A compiled whole would not see hooks inside it. Hooks on a block run outside its compiled forward, so reading,
    editing and replaying the up-path work as before; hooks placed later inside a block make it compile again.
    """
    from torch._dynamo import config

    config.skip_nnmodule_hook_guards = False
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for name, block in ((f"{path}.{i}", block) for path in BLOCKS for i, block in _listed(denoiser, path)):
        if not module.startswith(f"{name}."):
            block.forward = torch.compile(block.forward)


def _listed(denoiser: Any, path: str) -> list[tuple[int, Any]]:
    return list(enumerate(getattr(denoiser, path, None) or ()))


def offload_parts(pipe: Any, device: torch.device) -> None:
    """Diffusers' own offloading of whole parts. Hooks inside the U-Net still work: it stays in place for a whole
    image. Finer offloading, layer by layer, would take the up-blocks away between a pass and its replay.
    """
    if getattr(pipe, "model_cpu_offload_seq", None) is None:
        raise LensError(
            f"{type(pipe).__name__} does not say in which order its parts run, so it cannot be offloaded; "
            "leave --offload out."
        )
    try:
        pipe.enable_model_cpu_offload(device=device)
    except ImportError:
        raise LensError("--offload needs the accelerate package; install it with: pip install accelerate") from None
