"""Convert a guided-diffusion U-Net (the format of P2's ``celebahq_p2.pt``) to a stock diffusers pipeline folder.

The weights are only renamed and regrouped; ``UNet2DModel`` has an exact counterpart for every layer, so the
outputs agree with the original's to floating-point rounding. ``middle_block`` becomes ``mid_block``, whose output is
the h of the papers.

Learned variance: such a U-Net gives six channels, three of noise and three of variance. DDIM reads the noise alone,
and the stock ``DDIMPipeline`` cannot run a six-channel U-Net, so by default the variance rows of the last
convolution are left out: the folder then loads *and runs* in ``DDIMPipeline``. ``keep_variance=True`` keeps all six
and writes a ``DDPMPipeline`` with ``variance_type="learned_range"``, which reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from diffusion_lens.base.checkpoints import read_state_dict
from diffusion_lens.base.files import atomic_folder, check_empty
from diffusion_lens.base.types import LensError
from diffusion_lens.interop.p2_format import (
    IMAGE_CHANNELS,
    NORM_GROUPS,
    RESNET_PARTS,
    Layer,
    P2Config,
    infer_config,
    layers,
    source_keys,
)


def _head_count(config: P2Config, channels: int) -> int:
    """Attention heads at a level of ``channels``."""
    heads = config.num_heads if config.num_head_channels == -1 else channels // config.num_head_channels
    size = config.num_heads if config.num_head_channels == -1 else config.num_head_channels
    if size < 1 or channels % size or heads < 1:
        raise LensError(
            f"Attention heads of this size do not divide {channels} channels; give num_head_channels in the config."
        )
    return heads


def _converted(layer: Layer, state: dict[str, Tensor], config: P2Config) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors under diffusers' names, in diffusers' shapes."""
    for kind in ("weight", "bias"):
        if layer.kind == "plain":
            yield f"{layer.target}.{kind}", state[f"{layer.source}.{kind}"]
        elif layer.kind == "resnet":
            shortcut = {"skip_connection": "conv_shortcut"} if layer.shortcut else {}
            for source, target in (RESNET_PARTS | shortcut).items():
                yield f"{layer.target}.{target}.{kind}", state[f"{layer.source}.{source}.{kind}"]
        else:
            yield f"{layer.target}.group_norm.{kind}", state[f"{layer.source}.norm.{kind}"]
            yield f"{layer.target}.to_out.0.{kind}", _dense(state[f"{layer.source}.proj_out.{kind}"])
            stacked = _dense(state[f"{layer.source}.qkv.{kind}"])
            for name, part in zip("qkv", _split_qkv(stacked, config), strict=True):
                yield f"{layer.target}.to_{name}.{kind}", part


def _dense(tensor: Tensor) -> Tensor:
    """A 1×1 convolution's weight ``[out, in, 1]`` as a linear layer's ``[out, in]``; biases pass."""
    return tensor.squeeze(-1) if tensor.ndim == 3 else tensor


def _split_qkv(stacked: Tensor, config: P2Config) -> tuple[Tensor, ...]:
    """``[3 c, ...]`` → q, k, v of ``[c, ...]``, heads in order.

    The legacy order stacks q, k, v within every head; the new one stacks all heads of q, then of k, then of v.
    """
    if config.use_new_attention_order:
        return stacked.chunk(3)
    channels = stacked.shape[0] // 3
    heads = _head_count(config, channels)
    by_head = stacked.reshape(heads, 3, channels // heads, *stacked.shape[1:])
    return tuple(by_head[:, part].reshape(channels, *stacked.shape[1:]) for part in range(3))


def unet_config(config: P2Config) -> dict[str, Any]:
    """``UNet2DModel``'s arguments; raises where it has no counterpart."""
    if config.class_cond:
        raise LensError("This checkpoint is class-conditional; only unconditional ones can be opened.")
    if not config.channel_mult or config.channel_mult[0] != 1 or config.num_channels % NORM_GROUPS:
        raise LensError(
            f"channel_mult must begin with 1 and num_channels be a multiple of {NORM_GROUPS}; "
            f"this configuration has {config.channel_mult} and {config.num_channels}."
        )
    attended = {c for c, has in zip(config.channels, config.has_attention, strict=True) if has} | {config.channels[-1]}
    head_sizes = {channels // _head_count(config, channels) for channels in attended}
    if len(head_sizes) > 1:
        raise LensError("Attention heads differ in size between levels, which diffusers' UNet2DModel cannot express.")
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    resample = "resnet" if config.resblock_updown else "conv"
    return {
        "sample_size": config.image_size,
        "in_channels": IMAGE_CHANNELS,
        "out_channels": IMAGE_CHANNELS * (2 if config.learn_sigma else 1),
        "block_out_channels": config.channels,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if has else down for has in config.has_attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else up for has in reversed(config.has_attention)),
        "downsample_type": resample,
        "upsample_type": resample,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "attention_head_dim": head_sizes.pop(),
        "norm_num_groups": NORM_GROUPS,
        # Without it, UNet2DModel drops the mid-block's attention norm as soon as scale_shift is on.
        "attn_norm_num_groups": NORM_GROUPS,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def convert_unet(state: dict[str, Tensor], config: P2Config) -> UNet2DModel:
    """The same U-Net in diffusers, float32, with all its output channels.

    ``unet(x [n, 3, s, s], timesteps [n]).sample`` is ``[n, 3 or 6, s, s]``; the original's numbers to 1e-5 relative.

    Raises:
        LensError: names the first missing or unexpected tensor, or the first of a wrong shape.
    """
    arguments = unet_config(config)
    plan = list(layers(config))
    expected = [key for layer in plan for key in source_keys(layer)]
    if missing := [key for key in expected if key not in state]:
        raise LensError(f"The checkpoint lacks '{missing[0]}' ({len(missing)} missing); check that the config fits it.")
    if unexpected := sorted(set(state) - set(expected)):
        raise LensError(
            f"The checkpoint has an unexpected '{unexpected[0]}' ({len(unexpected)} in all); "
            "check that the config fits it."
        )
    for layer in plan:
        if layer.kind == "attention" and state[f"{layer.source}.qkv.weight"].shape[0] % 3:
            raise LensError(f"'{layer.source}.qkv.weight' cannot be split into q, k and v; the checkpoint is damaged.")
    converted = {name: tensor.to(torch.float32) for layer in plan for name, tensor in _converted(layer, state, config)}
    with torch.device("meta"):  # no random initialisation: it would draw from the global generator
        unet = UNet2DModel(**arguments)
    for name, parameter in unet.state_dict().items():
        if converted[name].shape != parameter.shape:
            raise LensError(
                f"The checkpoint's tensor for '{name}' has shape {tuple(converted[name].shape)} where the config "
                f"asks for {tuple(parameter.shape)}; check that the config fits it."
            )
    unet.load_state_dict({name: tensor.contiguous() for name, tensor in converted.items()}, strict=True, assign=True)
    return unet.eval()


def drop_variance(unet: UNet2DModel) -> UNet2DModel:
    """The same U-Net without its variance channels: the last convolution keeps the noise rows alone."""
    if unet.config["out_channels"] == IMAGE_CHANNELS:
        return unet
    with torch.device("meta"):
        noise_only = UNet2DModel.from_config({**unet.config, "out_channels": IMAGE_CHANNELS})
    state = {
        name: tensor[:IMAGE_CHANNELS].clone() if name.startswith("conv_out.") else tensor
        for name, tensor in unet.state_dict().items()
    }
    noise_only.load_state_dict(state, strict=True, assign=True)
    return noise_only.eval()


def _schedule(config: P2Config) -> dict[str, Any]:
    """The scheduler arguments that both stock schedulers share; x0 is clipped as guided-diffusion does by default."""
    scale = 1000 / config.diffusion_steps
    return {
        "num_train_timesteps": config.diffusion_steps,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[config.noise_schedule],
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
        "prediction_type": "epsilon",
        "clip_sample": True,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }


def convert(
    checkpoint: Path, out: Path, config: P2Config | Mapping[str, Any] | None = None, *, keep_variance: bool = False
) -> Path:
    """Convert a checkpoint file to a pipeline folder that stock diffusers opens and runs.

    Args:
        checkpoint: ``.pt`` (read with ``weights_only=True``) or ``.safetensors`` with the bare state dict.
        out: the folder to write; it must be new or empty. It also gets ``p2_config.json``, what it was made with.
        config: the checkpoint's settings, or by name those that it does not tell itself: at least its attention heads.
        keep_variance: keep the learned variance and write a ``DDPMPipeline`` (see the module's docstring).

    Returns:
        ``out``.

    Raises:
        LensError: heads that nobody told, the checkpoint or config does not fit (one sentence), or ``out`` is in use.
    """
    check_empty(out)
    state = read_state_dict(checkpoint)
    config = config if isinstance(config, P2Config) else infer_config(state, config)
    unet = convert_unet(state, config)
    with atomic_folder(out) as partial:
        if keep_variance and config.learn_sigma:
            scheduler = DDPMScheduler(variance_type="learned_range", **_schedule(config))
            DDPMPipeline(unet, scheduler).save_pretrained(partial, safe_serialization=True)
        else:
            ddim = DDIMScheduler(set_alpha_to_one=True, **_schedule(config))
            DDIMPipeline(drop_variance(unet), ddim).save_pretrained(partial, safe_serialization=True)
        config.save(partial / "p2_config.json")
    return out
