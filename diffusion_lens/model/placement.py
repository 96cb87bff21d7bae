"""Put a pipeline where it runs: device, number format, memory layout, compiled blocks, slices, offloading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.run_options import RunOptions

RECOMPILE_LIMIT = 64
"""Compiled forms of one forward: blocks of one class count together, and so does every batch size."""


def place(pipe: Any, hook_name: str, device: torch.device, dtype: torch.dtype, options: RunOptions | None) -> None:
    """Move every part of ``pipe`` to ``device`` and ``dtype`` for inference, as ``options`` say (changed in place).

    On CUDA, convolutions run on channels_last tensors. Raises ``LensError`` where this pipeline cannot be offloaded.
    """
    offload = options is not None and options.offload
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            # transformers loads "auto" dtypes, so each part is checked; diffusers' own .to() would warn needlessly.
            nn.Module.to(module, device=torch.device("cpu") if offload else device, dtype=dtype).eval()
    if device.type == "cuda":
        for part in (pipe.unet, decoder(pipe)):
            if part is not None:
                part.to(memory_format=torch.channels_last)
    if options is None:
        return
    if options.slicing:
        slice_work(pipe)
    if options.compile:
        compile_blocks(pipe.unet, hook_name)
    if offload:
        offload_parts(pipe, device)


def decoder(pipe: Any) -> Any:
    """The autoencoder that turns latents into pixels; ``None`` for pixel models."""
    return getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)


def slice_work(pipe: Any) -> None:
    """Attention in two parts where the U-Net has that, and one image at a time through the autoencoder."""
    if hasattr(pipe.unet, "set_attention_slice"):
        pipe.unet.set_attention_slice("auto")
    if hasattr(decoder(pipe), "enable_slicing"):
        decoder(pipe).enable_slicing()


def compile_blocks(unet: Any, hook_name: str) -> None:
    """Compile the forward of each down- and up-block, and leave the bottleneck and the hooked module as they are.

    A compiled whole would not see hooks inside it. Hooks on a block run outside its compiled forward, so reading,
    editing and replaying the up-path work as before; hooks placed later inside a block make it compile again.
    """
    from torch._dynamo import config

    config.skip_nnmodule_hook_guards = False
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    blocks = [(f"{path}.{i}", block) for path in ("down_blocks", "up_blocks") for i, block in _listed(unet, path)]
    for name, block in blocks:
        if not hook_name.startswith(f"{name}."):
            block.forward = torch.compile(block.forward)


def _listed(unet: Any, path: str) -> list[tuple[int, Any]]:
    return list(enumerate(getattr(unet, path)))


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
