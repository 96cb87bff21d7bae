"""Pipelines with the architecture of published models and random weights: full-size, or small enough for a CPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_lens.interop.convert_p2 import unet_config
from diffusion_lens.interop.p2_format import P2Config

TOKENS = 77


def stable_diffusion(full: bool) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: 860 million parameters in the U-Net, 512² images; where not ``full``, 64² and 64 channels.

    The text encoder has the published size but knows letters alone: its cost is paid once per prompt.
    """
    torch.manual_seed(0)
    channels = (320, 640, 1280, 1280) if full else (32, 64, 64, 64)
    width = 768 if full else 32
    unet = UNet2DConditionModel(
        sample_size=64 if full else 16, block_out_channels=channels, layers_per_block=2 if full else 1,
        cross_attention_dim=width, attention_head_dim=8,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )  # fmt: skip
    sides = (128, 256, 512, 512) if full else (32, 32, 32)
    vae = AutoencoderKL(
        block_out_channels=sides, down_block_types=("DownEncoderBlock2D",) * len(sides),
        up_block_types=("UpDecoderBlock2D",) * len(sides), layers_per_block=2 if full else 1, latent_channels=4,
        scaling_factor=0.18215,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(_text(width, 12 if full else 2)).eval(), tokenizer=_tokenizer(), unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
KNOWN = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(KNOWN)}, merges=[], model_max_length=TOKENS)


def _text(width: int, layers: int, **changes: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(KNOWN), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64 or 2, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, **changes,
    )  # fmt: skip


def stable_diffusion_3(full: bool) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium: 2.5 billion parameters in the transformer, 1024² images; else 64² and 3 blocks.

    Without its third text encoder, in whose place zeros stand, as the stock pipeline allows.
    """
    torch.manual_seed(0)
    heads, layers, width, pooled = (24, 24, 4096, (768, 1280)) if full else (2, 3, 64, (32, 32))
    transformer = SD3Transformer2DModel(
        sample_size=128 if full else 16, patch_size=2, in_channels=16, out_channels=16, num_layers=layers,
        attention_head_dim=64 if full else 16, num_attention_heads=heads, joint_attention_dim=width,
        caption_projection_dim=heads * (64 if full else 16), pooled_projection_dim=sum(pooled),
        pos_embed_max_size=384 if full else 16, dual_attention_layers=tuple(range(13)) if full else (0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    sides = (128, 256, 512, 512) if full else (32, 32, 32)
    vae = AutoencoderKL(
        block_out_channels=sides, down_block_types=("DownEncoderBlock2D",) * len(sides),
        up_block_types=("UpDecoderBlock2D",) * len(sides), layers_per_block=2 if full else 1, latent_channels=16,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(_text(own, 12 if full else 2, projection_dim=own)).eval() for own in pooled]
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=_tokenizer(), tokenizer_2=_tokenizer(), text_encoder_3=None, tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def p2(full: bool) -> DDIMPipeline:
    """P2's CelebA-HQ network, 256² pixels, as ``convert-p2`` writes it; 32² and two levels where not ``full``."""
    small = {"image_size": 32, "num_channels": 32, "channel_mult": (1, 2, 2), "attention_resolutions": (8,)}
    config = P2Config(learn_sigma=False) if full else P2Config(learn_sigma=False, **small)
    torch.manual_seed(0)
    return DDIMPipeline(UNet2DModel(**unet_config(config)), DDIMScheduler(beta_end=0.02, set_alpha_to_one=True))


ARCHITECTURES: dict[str, Any] = {"Stable Diffusion 1.5": stable_diffusion, "P2, CelebA-HQ": p2}
