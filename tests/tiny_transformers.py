"""Tiny random pipelines around transformers: stock classes, two or three blocks of a few channels, no download."""

from __future__ import annotations

from typing import Any

import torch
from conftest import text_config, tiny_tokenizer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 32


def shaken(model: Any, scale: float = 0.2) -> Any:
    """The model with noise added to every weight, so that no gate or output layer is closed."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * scale)
    return model.eval()


def tiny_kl(channels: int = 4, **changes: Any) -> AutoencoderKL:
    """Decodes latents to twice their size; shifted, as those of flow models are."""
    values: dict[str, Any] = {
        "in_channels": 3, "out_channels": 3, "latent_channels": channels, "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 16, "scaling_factor": 1.5, "shift_factor": 0.06,
        "use_quant_conv": False, "use_post_quant_conv": False, **changes,
    }  # fmt: skip
    return AutoencoderKL(**values).eval()


def t5_tokenizer() -> T5Tokenizer:
    """Reads letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -2.0)]
    letters = [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    return T5Tokenizer(vocab=[*pieces, *letters], extra_ids=0, model_max_length=64)


def t5_encoder(width: int = WIDTH) -> T5EncoderModel:
    """Two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    ).eval()


def make_sd3(third: bool = False, **changes: Any) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3, as many people keep it without the third text encoder: 16 image tokens."""
    torch.manual_seed(11)
    values: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 8,
        "pooled_projection_dim": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        **changes,
    }  # fmt: skip
    encoders = [CLIPTextModelWithProjection(text_config(projection_dim=8)).eval() for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=shaken(SD3Transformer2DModel(**values)), vae=tiny_kl(), text_encoder=encoders[0],
        text_encoder_2=encoders[1], tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5_encoder() if third else None, tokenizer_3=t5_tokenizer() if third else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
