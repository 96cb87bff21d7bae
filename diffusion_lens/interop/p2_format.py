"""The guided-diffusion U-Net format: its configuration and its layers' names, here and in diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import LensError

IMAGE_CHANNELS = 3
NORM_GROUPS = 32
# guided-diffusion's table of channel multipliers; the image size cannot be read from a fully convolutional U-Net.
SIZE_OF_MULTIPLIERS = {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}

TRACELESS = ("use_new_attention_order", "noise_schedule", "diffusion_steps")
PUBLISHED = "p2"
"""What names the settings of the published P2 models (CelebA-HQ and FFHQ at 256)."""


class P2Config(StrictConfig):
    """guided-diffusion's model settings, in its own words; the defaults are P2's for CelebA-HQ at 256.

    Attributes:
        image_size: side of the square image, pixels.
        num_channels: channels of the first level.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        channel_mult: channels of every level as a multiple of ``num_channels``.
        attention_resolutions: image resolutions (pixels) whose levels have self-attention.
        num_head_channels: channels of an attention head; ``-1`` means ``num_heads`` heads instead.
        learn_sigma: the U-Net also gives variance channels.
        use_scale_shift_norm: the time embedding scales and shifts (FiLM) rather than adds.
        resblock_updown: residual blocks resample, rather than convolutions.
        use_new_attention_order: q, k, v are split before the heads, rather than after.
        noise_schedule: ``linear`` (scaled to ``diffusion_steps``) or ``cosine``.
    """

    image_size: int = 256
    num_channels: int = 128
    num_res_blocks: int = 1
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (16,)
    num_head_channels: int = 64
    num_heads: int = 4
    learn_sigma: bool = True
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    use_new_attention_order: bool = False
    class_cond: bool = False
    noise_schedule: Literal["linear", "cosine"] = "linear"
    diffusion_steps: int = 1000

    @field_validator("channel_mult", "attention_resolutions", mode="before")
    @classmethod
    def _comma_list(cls, value: Any) -> Any:
        """guided-diffusion's settings also write lists as ``"1,1,2,2,4,4"``, and a list of one as a number."""
        if isinstance(value, int):
            return (value,)
        return tuple(part for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every level, first level first."""
        return tuple(self.num_channels * multiple for multiple in self.channel_mult)

    @property
    def has_attention(self) -> tuple[bool, ...]:
        """Whether each level has self-attention."""
        return tuple(self.image_size // 2**level in self.attention_resolutions for level in range(len(self.channels)))


@dataclass(frozen=True)
class Layer:
    """One layer of the U-Net: ``source`` is its name in the checkpoint, ``target`` in diffusers."""

    kind: Literal["plain", "resnet", "attention"]
    source: str
    target: str
    shortcut: bool = False


RESNET_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}


def layers(config: P2Config) -> Iterator[Layer]:
    """Every layer that a U-Net of this configuration has, with both its names."""
    yield Layer("plain", "time_embed.0", "time_embedding.linear_1")
    yield Layer("plain", "time_embed.2", "time_embedding.linear_2")
    yield Layer("plain", "input_blocks.0.0", "conv_in")
    yield from _down_layers(config)
    yield Layer("resnet", "middle_block.0", "mid_block.resnets.0")
    yield Layer("attention", "middle_block.1", "mid_block.attentions.0")
    yield Layer("resnet", "middle_block.2", "mid_block.resnets.1")
    yield from _up_layers(config)
    yield Layer("plain", "out.0", "conv_norm_out")
    yield Layer("plain", "out.2", "conv_out")


def _down_layers(config: P2Config) -> Iterator[Layer]:
    """Layers of the way down, block by block; a level ends with its downsampler."""
    width, index, last = config.channels[0], 0, len(config.channels) - 1
    for level, channels in enumerate(config.channels):
        target = f"down_blocks.{level}"
        for block in range(config.num_res_blocks):
            index += 1
            source = f"input_blocks.{index}"
            yield Layer("resnet", f"{source}.0", f"{target}.resnets.{block}", shortcut=width != channels)
            if config.has_attention[level]:
                yield Layer("attention", f"{source}.1", f"{target}.attentions.{block}")
            width = channels
        if level < last:
            index += 1
            yield _resampler(config, f"input_blocks.{index}.0", f"{target}.downsamplers.0", "op")


def _up_layers(config: P2Config) -> Iterator[Layer]:
    """Layers of the way up, deepest level first; a level's last block also holds its upsampler."""
    width, index, skips = config.channels[-1], 0, _skip_channels(config)
    for up, channels in enumerate(reversed(config.channels)):
        target, attends = f"up_blocks.{up}", config.has_attention[-1 - up]
        for block in range(config.num_res_blocks + 1):
            source = f"output_blocks.{index}"
            yield Layer("resnet", f"{source}.0", f"{target}.resnets.{block}", shortcut=width + skips.pop() != channels)
            if attends:
                yield Layer("attention", f"{source}.1", f"{target}.attentions.{block}")
            width = channels
            index += 1
        if up < len(config.channels) - 1:
            yield _resampler(config, f"{source}.{2 if attends else 1}", f"{target}.upsamplers.0", "conv")


def _skip_channels(config: P2Config) -> list[int]:
    """Channels of every skip connection, in the order the way down makes them."""
    within = [channels for channels in config.channels for _ in range(config.num_res_blocks + 1)]
    return [config.channels[0], *within[:-1]]


def _resampler(config: P2Config, source: str, target: str, convolution: str) -> Layer:
    """A down- or upsampler: a residual block, or a single convolution under its own name."""
    if config.resblock_updown:
        return Layer("resnet", source, target)
    return Layer("plain", f"{source}.{convolution}", f"{target}.conv")


def source_keys(layer: Layer) -> list[str]:
    """The checkpoint's names of a layer's tensors."""
    parts = {
        "plain": [layer.source],
        "resnet": [f"{layer.source}.{part}" for part in RESNET_PARTS]
        + ([f"{layer.source}.skip_connection"] if layer.shortcut else []),
        "attention": [f"{layer.source}.{part}" for part in ("norm", "qkv", "proj_out")],
    }[layer.kind]
    return [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


def infer_config(state: dict[str, Tensor], told: Mapping[str, Any] | None = None) -> P2Config:
    """Read the configuration off a checkpoint's names and shapes; ``told`` are settings by name, which come first.

    Attention heads leave no trace: their number (``num_heads``) or their channels (``num_head_channels``) must be told.
    See ``untold`` for what else leaves none and takes guided-diffusion's default.

    Raises:
        LensError: the heads were not told, a setting is wrong, the names are of another format, or the multipliers
            belong to no known image size.
    """
    told = dict(told or {})
    heads = {name: told[name] for name in ("num_heads", "num_head_channels") if name in told}
    try:
        base = state["time_embed.0.weight"].shape[1]
        ups = [_resampler_place(state, index) for index in range(_count(state, "output_blocks"))]
        n_res = next((index for index, place in enumerate(ups) if place), len(ups) - 1)
        levels = len(ups) // (n_res + 1)
        starts = [1 + level * (n_res + 1) for level in range(levels)]
        widths = [state[f"input_blocks.{start}.0.out_layers.3.weight"].shape[0] for start in starts]
        multipliers = tuple(width // base for width in widths)
        scale_shift = state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
        learn_sigma = state["out.2.weight"].shape[0] == 2 * IMAGE_CHANNELS
    except (KeyError, IndexError, ZeroDivisionError):
        raise LensError("This is no guided-diffusion U-Net checkpoint: its layers have other names.") from None
    if not heads:
        raise LensError(
            "The checkpoint does not say how many attention heads it was trained with, and with another number it is "
            "another model: give its settings, at least num_heads or num_head_channels, as JSON (--config FILE), or "
            "--config p2 for those of the published P2 models (64 channels a head)."
        )
    if multipliers not in SIZE_OF_MULTIPLIERS and "image_size" not in told:
        raise LensError(
            f"The image size cannot be told from channel multipliers {multipliers}; give the checkpoint's "
            "configuration as a JSON file (--config)."
        )
    size = int(told.get("image_size") or SIZE_OF_MULTIPLIERS[multipliers])
    attended = [level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in state]
    seen: dict[str, Any] = {
        "image_size": size,
        "num_channels": base,
        "num_res_blocks": n_res,
        "channel_mult": multipliers,
        "attention_resolutions": tuple(size // 2**level for level in attended),
        "learn_sigma": learn_sigma,
        "use_scale_shift_norm": scale_shift,
        "resblock_updown": not any(name.endswith(".op.weight") for name in state),
        "class_cond": "label_emb.weight" in state,
        # In guided-diffusion, channels a head count where they are given.
        "num_head_channels": -1,
    }
    return P2Config.parse({**seen, **told}, where="--config")


def untold(told: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that leave no trace in a checkpoint and that were not told: name → the value that is assumed."""
    return {name: P2Config.model_fields[name].default for name in TRACELESS if name not in told}


def _count(state: dict[str, Tensor], group: str) -> int:
    """How many numbered blocks ``group`` has."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{group}.")})


def _resampler_place(state: dict[str, Tensor], index: int) -> int:
    """Where in output block ``index`` its upsampler stands; 0 where there is none."""
    for place in (1, 2):
        names = (f"output_blocks.{index}.{place}.{part}.weight" for part in ("in_layers.2", "conv"))
        if any(name in state for name in names):
            return place
    return 0
