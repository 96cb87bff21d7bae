"""Tiny random pipelines around transformers: stock classes, two or three blocks of a few channels, no download."""

from __future__ import annotations

from typing import Any

import torch
from conftest import latent_scheduler, text_config, tiny_tokenizer
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


def flow(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """Shifted by the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **changes)


def make_flux(embeds: bool = True) -> FluxPipeline:
    """FLUX.1: dev, or schnell without a guidance embedding and without a shift that depends on the size."""
    torch.manual_seed(12)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=8, guidance_embeds=embeds, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return FluxPipeline(
        transformer=shaken(transformer), vae=tiny_kl(), text_encoder=CLIPTextModel(text_config()).eval(),
        tokenizer=tiny_tokenizer(), text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
        scheduler=flow() if embeds else FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def make_pixart(kind: str = "sigma") -> Any:
    """PixArt-Σ, or -α; with α comes a learned variance."""
    torch.manual_seed(13)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=8, sample_size=8, patch_size=2, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "transformer": shaken(transformer), "vae": tiny_kl(), "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(), "scheduler": latent_scheduler(),
    }  # fmt: skip
    return (PixArtSigmaPipeline if kind == "sigma" else PixArtAlphaPipeline)(**parts)


def gemma_tokenizer() -> GemmaTokenizer:
    """Reads letters, one by one."""
    characters = [chr(c) for c in range(33, 127)]
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *characters])}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=8192)


def gemma_encoder() -> Gemma2Model:
    """Two layers of eight channels."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=128, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, max_position_embeddings=8192,
        )
    ).eval()  # fmt: skip


def make_sana() -> SanaPipeline:
    """Sana, with the solver that it is often given replaced by Euler steps."""
    torch.manual_seed(14)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=4,
    )  # fmt: skip
    channels, layers = (4,) * 6, (1,) * 6
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=channels,
        decoder_block_out_channels=channels, encoder_layers_per_block=layers, decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.4,
    )  # fmt: skip
    return SanaPipeline(
        transformer=shaken(transformer), vae=vae.eval(), text_encoder=gemma_encoder(), tokenizer=gemma_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Reads bytes."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=4096)
    tokenizer.chat_template = CHAT
    return tokenizer


QWEN: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "max_window_layers": 2,
}  # fmt: skip


VISION_TOKENS = {
    "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303,
    "vision_token_id": 304,
}  # fmt: skip


def qwen3(layers: int) -> Qwen3ForCausalLM:
    """A language model of eight channels."""
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, head_dim=4, **QWEN)).eval()


def make_qwen_image() -> QwenImagePipeline:
    """Qwen-Image."""
    torch.manual_seed(15)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.7],
    )  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8, "patch_size": 2,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10_000.0}
    text = {**QWEN, "num_hidden_layers": 2, "rope_scaling": rope}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **VISION_TOKENS)
    )
    return QwenImagePipeline(
        transformer=shaken(transformer), vae=vae.eval(), text_encoder=encoder.eval(), tokenizer=qwen_tokenizer(),
        scheduler=flow(shift_terminal=0.02),
    )  # fmt: skip


def make_z_image() -> ZImagePipeline:
    """Z-Image."""
    torch.manual_seed(16)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 2, 2], axes_lens=[128, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=shaken(transformer, 0.1), vae=tiny_kl(), text_encoder=qwen3(2), tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def make_lumina2() -> Lumina2Pipeline:
    """Lumina 2; its pipeline takes autoencoders to enlarge eightfold."""
    torch.manual_seed(17)
    transformer = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    vae = tiny_kl(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=shaken(transformer), vae=vae, text_encoder=gemma_encoder(), tokenizer=gemma_tokenizer(),
        scheduler=flow(),
    )  # fmt: skip


def make_flux2(distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2-klein, guided or distilled."""
    torch.manual_seed(18)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        transformer=shaken(transformer), vae=vae.eval(), text_encoder=qwen3(28), tokenizer=qwen_tokenizer(),
        scheduler=flow(), is_distilled=distilled,
    )  # fmt: skip


def make_dit() -> DiTPipeline:
    """DiT, of the thousand classes that its pipeline takes for granted."""
    torch.manual_seed(19)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
    )  # fmt: skip
    return DiTPipeline(transformer=shaken(transformer), vae=tiny_kl(), scheduler=latent_scheduler())
