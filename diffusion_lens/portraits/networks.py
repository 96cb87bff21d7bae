"""The Portraits model's parts, built from stock diffusers and transformers classes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.portraits.world import vocabulary

LATENT_CHANNELS = 8
LATENT_SIZE = 16
MAX_TOKENS = 16
TIMESTEPS = 1000
SHIFT = 7.0


class DenoiserConfig(StrictConfig):
    """Shape of the U-Net.

    Attributes:
        channels: width of every level; the last one is the bottleneck's ``d_in``.
        attention: which levels attend to themselves and to the text.
        layers: ResNet blocks per level.
        heads: attention heads.
        text_width: width of the text encoder; 0 builds an unconditional ``UNet2DModel``.
        lowest_skip: whether the coarsest level has skip connections around the bottleneck. Without them their
            weights are zero and stay so: the class is the stock U-Net, and what the coarsest level knows has to
            pass through ``mid_block``.
    """

    channels: tuple[int, ...] = (48, 96, 128)
    attention: tuple[bool, ...] = (False, False, True)
    layers: int = 1
    heads: int = 4
    text_width: int = 96
    lowest_skip: bool = False


def make_tokenizer() -> CLIPTokenizer:
    """A ``CLIPTokenizer`` with a vocabulary of its own: bytes, plus one token for every caption word.

    Any other text still has tokens (its bytes), but the model has never seen them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(vocabulary())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token; ties go by the alphabet.

    tokenizers' own trainer numbers the alphabet in an order that changes from run to run.
    """
    parts = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(part) > 1 for part in parts):
        pairs = Counter(pair for part in parts for pair in pairwise(part))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        parts = [_merged(part, best) for part in parts]
    return merges


def _merged(part: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in part:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Shape of a two-layer CLIP text encoder of ``width`` for ``MAX_TOKENS`` tokens."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """A fresh text encoder of the shape that ``text_config`` says."""
    return CLIPTextModel(text_config(tokenizer, width))


def make_autoencoder(width: int) -> AutoencoderTiny:
    """A convolutional autoencoder, 64 × 64 × 3 ↔ 16 × 16 × 8 latents of about unit variance."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(2, 1, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def make_unet(config: DenoiserConfig) -> UNet2DConditionModel | UNet2DModel:
    """The denoiser on latents: text-conditional, or unconditional where ``text_width`` is 0."""
    kinds = ("CrossAttnDownBlock2D", "DownBlock2D") if config.text_width else ("AttnDownBlock2D", "DownBlock2D")
    down = tuple(kinds[0] if attends else kinds[1] for attends in config.attention)
    up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    shared = {
        "sample_size": LATENT_SIZE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": config.channels,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": config.layers,
        "norm_num_groups": 16,
    }
    unet: UNet2DConditionModel | UNet2DModel
    if config.text_width:
        unet = UNet2DConditionModel(**shared, attention_head_dim=config.heads, cross_attention_dim=config.text_width)
    else:
        unet = UNet2DModel(**shared, attention_head_dim=config.channels[-1] // config.heads)
    if not config.lowest_skip:
        with torch.no_grad():
            for weight, first in _lowest_skip_weights(unet):
                weight[:, first:] = 0
    return unet


def _lowest_skip_weights(unet: UNet2DConditionModel | UNet2DModel) -> list[tuple[nn.Parameter, int]]:
    """Weights of the first up-block that read skip connections, and their first input channel that does."""
    hidden = unet.config["block_out_channels"][-1]
    resnets = unet.up_blocks[0].resnets
    return [(conv.weight, hidden) for resnet in resnets for conv in (resnet.conv1, resnet.conv_shortcut)]


def keep_silent(unet: UNet2DConditionModel | UNet2DModel) -> list[RemovableHandle]:
    """Hooks that keep skip weights that are zero at zero in training; remove them afterwards."""

    def masked(first: int) -> Callable[[Tensor], Tensor]:
        def mask(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[:, first:] = 0
            return gradient

        return mask

    return [
        weight.register_hook(masked(first))
        for weight, first in _lowest_skip_weights(unet)
        if not weight[:, first:].any()
    ]


def schedule_betas(n: int = TIMESTEPS, shift: float = SHIFT) -> list[float]:
    """The noise added at every timestep ``t`` of ``n``: signal over noise falls as ``(1 - u) / (shift · u)``, u = t/n.

    The straight path of flow matching, shifted towards noise (Esser et al., 2403.03206, eq. 23). Large areas get
    their colour while nearly all is noise; the squared cosine hurries through that part in few steps, and leaves
    every area near its mean colour.
    """
    odds = [(1 - t / n) / (shift * t / n) for t in range(1, n)]
    signal = [1.0, *(r * r / (1 + r * r) for r in odds)]
    return [*(1 - after / before for before, after in pairwise(signal)), 0.999]


def make_scheduler() -> DDIMScheduler:
    """DDIM, v-prediction, on ``schedule_betas`` from its last, pure-noise timestep."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=schedule_betas(),
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with trailing steps; the stock pipeline asks for it
    )
