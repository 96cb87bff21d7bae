"""The Portraits model's parts, built from stock diffusers and transformers classes alone."""

from __future__ import annotations

import json

from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_lens.config import StrictConfig
from diffusion_lens.portraits.world import vocabulary

LATENT_CHANNELS = 8
LATENT_SIZE = 16
MAX_TOKENS = 16


class DenoiserConfig(StrictConfig):
    """Shape of the U-Net.

    Attributes:
        channels: width of every level; the last one is the bottleneck's ``d_in``.
        attention: which levels attend to themselves and to the text.
        layers: ResNet blocks per level.
        heads: attention heads.
        text_width: width of the text encoder; 0 builds an unconditional ``UNet2DModel``.
    """

    channels: tuple[int, ...] = (64, 128, 160)
    attention: tuple[bool, ...] = (False, False, True)
    layers: int = 1
    heads: int = 4
    text_width: int = 96


def make_tokenizer() -> CLIPTokenizer:
    """A ``CLIPTokenizer`` with a vocabulary of its own: bytes, plus one token for every caption word.

    Any other text still has tokens (its bytes), but the model has never seen them.
    """
    core = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    core.train_from_iterator(vocabulary(), trainer)
    vocab = dict(core.get_vocab())
    for letter in alphabet:
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """A two-layer CLIP text encoder of ``width`` for ``MAX_TOKENS`` tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
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
    )


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
    if config.text_width:
        return UNet2DConditionModel(**shared, attention_head_dim=config.heads, cross_attention_dim=config.text_width)
    return UNet2DModel(**shared, attention_head_dim=config.channels[-1] // config.heads)


def make_scheduler() -> DDIMScheduler:
    """DDIM, v-prediction, squared-cosine schedule, starting at the last (pure-noise) timestep."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # unused with trailing steps; the stock pipeline asks for it
    )
