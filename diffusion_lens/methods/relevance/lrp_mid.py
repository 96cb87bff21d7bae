"""Relevance through a diffusers mid-block, from its output to its input and to the neurons inside.

Identity through normalisation and SiLU; biases and the time embedding take none; attention weights and GEGLU's
gates count as constants, so relevance follows the values. What cross-attention passes to the prompt is returned
beside the rest, so that everything adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UNetMidBlock2DCrossAttn
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.methods.relevance.lrp import Rule, linear, split, through


@dataclass
class Tape:
    """First input, text input and output of every module inside a block, from one forward pass."""

    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    texts: dict[nn.Module, Tensor | None] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)


@contextmanager
def record(block: nn.Module) -> Iterator[Tape]:
    """Note what passes through every module of ``block`` in the forward that runs inside this context."""
    tape = Tape()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = args[0] if args else kwargs.get("hidden_states")
        main = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and isinstance(main, Tensor):
            tape.inputs[module], tape.outputs[module] = first.detach().clone(), main.detach().clone()
            text = kwargs.get("encoder_hidden_states")
            tape.texts[module] = None if text is None else text.detach().clone()

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in block.modules()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class BlockRelevance:
    """Relevance at a block's input ``[n, c, y, x]``, at its neurons (layer → like the layer's input), at the prompt
    (summed, ``[n]``)."""

    at_input: Tensor
    neurons: dict[str, Tensor]
    at_prompt: Tensor


def check_mid_block(block: nn.Module) -> None:
    """Raise ``LensError`` for anything but diffusers' two mid-blocks made of parts that relevance can pass."""
    parts = [*getattr(block, "resnets", []), *(a for a in getattr(block, "attentions", []) if a is not None)]
    kinds = (ResnetBlock2D, Transformer2DModel, Attention)
    plain = all(isinstance(p, kinds) and getattr(p, "time_embedding_norm", "default") == "default" for p in parts)
    if not isinstance(block, (UNetMidBlock2D, UNetMidBlock2DCrossAttn)) or not plain:
        raise LensError(
            f"Relevance cannot pass a {type(block).__name__}; hook 'mid_block' of a Stable Diffusion or DDPM U-Net, "
            "or rank the bottleneck's own channels."
        )


def mid_block_relevance(block: Any, tape: Tape, relevance: Tensor, rule: Rule) -> BlockRelevance:
    """From the relevance of the block's output ``[n, c, y, x]`` back; ``tape`` is of the same forward."""
    found = BlockRelevance(relevance, {}, relevance.new_zeros(len(relevance)))
    pairs = list(zip(block.attentions, block.resnets[1:], strict=True))
    for number, (attention, resnet) in reversed(list(enumerate(pairs))):
        _resnet(resnet, f"resnets.{number + 1}", tape, found, rule)
        if attention is not None:
            _attention_part(attention, f"attentions.{number}", tape, found, rule)
    _resnet(block.resnets[0], "resnets.0", tape, found, rule)
    return found


def _resnet(block: Any, name: str, tape: Tape, found: BlockRelevance, rule: Rule) -> None:
    branch = tape.outputs[block.conv2]
    shortcut = block.conv_shortcut
    skip = tape.inputs[block] if shortcut is None else tape.outputs[shortcut]
    at_skip, at_branch = split(skip, branch, found.at_input)
    if shortcut is not None:
        at_skip = _conv(shortcut, tape.inputs[shortcut], at_skip, rule)
    at_branch = _conv(block.conv2, tape.inputs[block.conv2], at_branch, rule)
    found.neurons[f"{name}.conv2"] = at_branch
    found.at_input = at_skip + _conv(block.conv1, tape.inputs[block.conv1], at_branch, rule)


def _attention_part(block: Any, name: str, tape: Tape, found: BlockRelevance, rule: Rule) -> None:
    if isinstance(block, Transformer2DModel):
        _transformer(block, name, tape, found, rule)
        return
    h = tape.inputs[block]
    tokens = h.flatten(2).transpose(1, 2)
    output = tape.outputs[block.to_out[0]]
    at_skip, at_branch = split(tokens, output, found.at_input.flatten(2).transpose(1, 2)) if (
        block.residual_connection
    ) else (torch.zeros_like(tokens), found.at_input.flatten(2).transpose(1, 2))  # fmt: skip
    at_tokens, _ = _attention(block, tape, at_branch, rule)
    found.at_input = (at_skip + at_tokens).transpose(1, 2).reshape(h.shape)


def _transformer(block: Any, name: str, tape: Tape, found: BlockRelevance, rule: Rule) -> None:
    h = tape.inputs[block]
    y, x = h.shape[2:]
    inside = tape.outputs[block.proj_out]
    inside = inside if inside.ndim == 4 else _as_map(inside, y, x)
    at_skip, relevance = split(h, inside, found.at_input)
    if block.use_linear_projection:
        at_tokens = linear(tape.inputs[block.proj_out], block.proj_out.weight, _as_tokens(relevance), rule)
    else:
        at_tokens = _as_tokens(_conv(block.proj_out, tape.inputs[block.proj_out], relevance, rule))
    for number, layer in reversed(list(enumerate(block.transformer_blocks))):
        at_tokens = _transformer_block(layer, f"{name}.transformer_blocks.{number}", tape, at_tokens, found, rule)
    if block.use_linear_projection:
        at_map = _as_map(linear(tape.inputs[block.proj_in], block.proj_in.weight, at_tokens, rule), y, x)
    else:
        at_map = _conv(block.proj_in, tape.inputs[block.proj_in], _as_map(at_tokens, y, x), rule)
    found.at_input = at_skip + at_map


def _transformer_block(
    layer: BasicTransformerBlock, name: str, tape: Tape, relevance: Tensor, found: BlockRelevance, rule: Rule
) -> Tensor:
    ff: Any = layer.ff
    project, output = ff.net[0], ff.net[2]
    at_skip, at_branch = split(tape.inputs[layer.norm3], tape.outputs[output], relevance)
    at_hidden = linear(tape.inputs[output], output.weight, at_branch, rule)
    found.neurons[f"{name}.ff.net.2"] = at_hidden
    # GEGLU: the first half of the projection is the value, the second its gate.
    weight = project.proj.weight[: at_hidden.shape[-1]] if type(project).__name__ == "GEGLU" else project.proj.weight
    relevance = at_skip + linear(tape.inputs[project], weight, at_hidden, rule)
    for attention, norm in ((layer.attn2, layer.norm2), (layer.attn1, layer.norm1)):
        if attention is None:
            continue
        at_skip, at_branch = split(tape.inputs[norm], tape.outputs[attention.to_out[0]], relevance)
        at_values, crossed = _attention(attention, tape, at_branch, rule)
        if crossed:
            found.at_prompt = found.at_prompt + at_values.flatten(1).sum(1)
            relevance = at_skip
        else:
            relevance = at_skip + at_values
    return relevance


def _attention(attention: Any, tape: Tape, relevance: Tensor, rule: Rule) -> tuple[Tensor, bool]:
    """Through output projection, weighted sum and values: relevance of the tokens the values came from, and whether
    those are the prompt's."""
    query, key, value = (tape.outputs[layer] for layer in (attention.to_q, attention.to_k, attention.to_v))
    at_sum = linear(tape.inputs[attention.to_out[0]], attention.to_out[0].weight, relevance, rule)
    heads = attention.heads

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)

    q, k = by_head(query), by_head(key)
    weights = F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    at_value = through(lambda v, a: a @ v, by_head(value), weights, by_head(at_sum), rule)
    at_value = at_value.transpose(1, 2).reshape(value.shape)
    tokens = linear(tape.inputs[attention.to_v], attention.to_v.weight, at_value, rule)
    return tokens, tape.texts.get(attention) is not None


def _conv(layer: Any, x: Tensor, relevance: Tensor, rule: Rule) -> Tensor:
    return through(
        lambda a, w: F.conv2d(a, w, None, layer.stride, layer.padding, layer.dilation, layer.groups),
        x, layer.weight, relevance, rule,
    )  # fmt: skip


def _as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _as_map(tokens: Tensor, y: int, x: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, y, x)
