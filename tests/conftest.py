"""Tiny random pipelines that every test shares: real diffusers classes, four to eight channels, no download."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from lens_fixtures import copied_lens, prompt_free_lens, tiny_fit_models, tiny_lens, tiny_lens_folder  # noqa: F401
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline

WORDS = ("a", "portrait", "of", "firefighter", "doctor", "nurse", "person", "woman", "man")
MAX_TOKENS = 12


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the letters and ``WORDS``."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>"])}
    for token in [*letters, *(f"{letter}</w>" for letter in letters)]:
        vocab[token] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            parts = ["".join(pair), *parts[2:]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def text_config(**changes: Any) -> CLIPTextConfig:
    """Two layers of eight channels."""
    values: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": MAX_TOKENS, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1, **changes,
    }  # fmt: skip
    return CLIPTextConfig(**values)


def text_unet(**changes: Any) -> UNet2DConditionModel:
    """Two levels, 8² latents of four channels, an eight-channel 4² bottleneck."""
    values: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (4, 8), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 8, "attention_head_dim": 2,
        "norm_num_groups": 2, **changes,
    }  # fmt: skip
    return UNet2DConditionModel(**values)


def pixel_unet(**changes: Any) -> UNet2DModel:
    """Two levels, 8² RGB pixels, an eight-channel 4² bottleneck."""
    values: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (4, 8), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2, "norm_num_groups": 2, **changes,
    }  # fmt: skip
    return UNet2DModel(**values)


def tiny_vae() -> AutoencoderTiny:
    """Decodes 8² latents to 16² images."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip


def latent_scheduler(**changes: Any) -> DDIMScheduler:
    """Stable Diffusion's own DDIM settings."""
    values: dict[str, Any] = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1, **changes,
    }  # fmt: skip
    return DDIMScheduler(**values)


def make_text_pipeline(**unet_changes: Any) -> StableDiffusionPipeline:
    """Stable Diffusion, tiny."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(text_config()).eval(), tokenizer=tiny_tokenizer(),
        unet=text_unet(**unet_changes), scheduler=latent_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def make_pixel_pipeline(**unet_changes: Any) -> DDPMPipeline:
    """A DDPM as google/ddpm-celebahq-256 ships it: ancestral scheduler, clipped x0."""
    torch.manual_seed(1)
    return DDPMPipeline(unet=pixel_unet(**unet_changes), scheduler=DDPMScheduler())


def make_ddim_pipeline() -> DDIMPipeline:
    """The same model as a DDIM pipeline."""
    torch.manual_seed(1)
    return DDIMPipeline(unet=pixel_unet(), scheduler=DDIMScheduler())


def make_latent_pipeline() -> LDMPipeline:
    """Unconditional latent diffusion with a VQ autoencoder."""
    torch.manual_seed(2)
    vae = VQModel(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=2, num_vq_embeddings=32,
    )  # fmt: skip
    torch.nn.init.normal_(vae.quantize.embedding.weight)  # spread as latents are: else most fall to a few codes
    return LDMPipeline(vqvae=vae.eval(), unet=pixel_unet(), scheduler=latent_scheduler())


def make_xl_pipeline() -> StableDiffusionXLPipeline:
    """SDXL with two text encoders."""
    torch.manual_seed(3)
    unet = text_unet(
        cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=6 * 2 + 8,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(projection_dim=8)).eval(),
        tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(), unet=unet, scheduler=latent_scheduler(),
        add_watermarker=False,
    )  # fmt: skip


def make_lcm_pipeline() -> LatentConsistencyModelPipeline:
    """A few-step model: guidance enters as an embedding, fresh noise at every step."""
    torch.manual_seed(4)
    return LatentConsistencyModelPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(text_config()).eval(), tokenizer=tiny_tokenizer(),
        unet=text_unet(time_cond_proj_dim=8), scheduler=LCMScheduler(original_inference_steps=50),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "text": make_text_pipeline,
    "pixel": make_pixel_pipeline,
    "latent": make_latent_pipeline,
    "xl": make_xl_pipeline,
    "lcm": make_lcm_pipeline,
}


@pytest.fixture(scope="session")
def tiny_text_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion with random weights; do not change it."""
    return make_text_pipeline()


@pytest.fixture(scope="session")
def tiny_pixel_pipeline() -> DDPMPipeline:
    """DDPM with random weights; do not change it."""
    return make_pixel_pipeline()


@pytest.fixture(scope="session")
def tiny_latent_pipeline() -> LDMPipeline:
    """Unconditional LDM with random weights; do not change it."""
    return make_latent_pipeline()


@pytest.fixture(scope="session")
def tiny_xl_pipeline() -> StableDiffusionXLPipeline:
    """SDXL with random weights; do not change it."""
    return make_xl_pipeline()


@pytest.fixture(scope="session")
def tiny_lcm_pipeline() -> LatentConsistencyModelPipeline:
    """LCM with random weights; do not change it."""
    return make_lcm_pipeline()


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, DiffusionModel]:
    """Every tiny pipeline opened at its mid-block, by kind: text, pixel, latent, xl, lcm."""
    return {name: wrap_pipeline(make(), f"tiny-{name}") for name, make in MAKERS.items()}


@pytest.fixture(scope="session")
def text_model(tiny_models: dict[str, DiffusionModel]) -> DiffusionModel:
    """Tiny Stable Diffusion, opened."""
    return tiny_models["text"]


@pytest.fixture(scope="session")
def pixel_model(tiny_models: dict[str, DiffusionModel]) -> DiffusionModel:
    """Tiny DDPM, opened (sampled with DDIM)."""
    return tiny_models["pixel"]
