"""Random checkpoints in the guided-diffusion format."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion_lens.interop.p2_format import P2Config

SMALL = P2Config(image_size=16, num_channels=32, channel_mult=(1, 2), attention_resolutions=(8,), num_head_channels=32)


def build_state(config: P2Config, *, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """A random checkpoint of this configuration, from the format's construction order."""
    generator = torch.Generator(device).manual_seed(seed) if device == "cpu" else None
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        fan_in = math.prod(shape[1:])
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            state[f"{name}.{kind}"] = torch.randn(*size, generator=generator, device=device) / math.sqrt(fan_in)

    def res(name: str, c_in: int, c_out: int) -> None:
        put(f"{name}.in_layers.0", c_in)
        put(f"{name}.in_layers.2", c_out, c_in, 3, 3)
        put(f"{name}.emb_layers.1", c_out * (2 if config.use_scale_shift_norm else 1), 4 * config.num_channels)
        put(f"{name}.out_layers.0", c_out)
        put(f"{name}.out_layers.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            put(f"{name}.skip_connection", c_out, c_in, 1, 1)

    def attention(name: str, c: int) -> None:
        put(f"{name}.norm", c)
        put(f"{name}.qkv", 3 * c, c, 1)
        put(f"{name}.proj_out", c, c, 1)

    def resampler(name: str, kind: str, c: int) -> None:
        res(name, c, c) if config.resblock_updown else put(f"{name}.{kind}", c, c, 3, 3)

    base = ch = config.num_channels
    put("time_embed.0", 4 * base, base)
    put("time_embed.2", 4 * base, 4 * base)
    put("input_blocks.0.0", ch, 3, 3, 3)
    stack, index, side = [ch], 1, config.image_size
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            res(f"input_blocks.{index}.0", ch, mult * base)
            ch = mult * base
            if side in config.attention_resolutions:
                attention(f"input_blocks.{index}.1", ch)
            stack.append(ch)
            index += 1
        if level != len(config.channel_mult) - 1:
            resampler(f"input_blocks.{index}.0", "op", ch)
            stack.append(ch)
            index, side = index + 1, side // 2
    res("middle_block.0", ch, ch)
    attention("middle_block.1", ch)
    res("middle_block.2", ch, ch)
    index = 0
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for block in range(config.num_res_blocks + 1):
            res(f"output_blocks.{index}.0", ch + stack.pop(), mult * base)
            ch, place = mult * base, 1
            if side in config.attention_resolutions:
                attention(f"output_blocks.{index}.1", ch)
                place = 2
            if level and block == config.num_res_blocks:
                resampler(f"output_blocks.{index}.{place}", "conv", ch)
                side *= 2
            index += 1
    put("out.0", base)
    put("out.2", 6 if config.learn_sigma else 3, base, 3, 3)
    return state
