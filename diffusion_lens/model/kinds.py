"""Whether the parts of a pipeline belong together.

A pipeline is recognised by its class, not by the parts it happens to have: a refiner, an up-scaler or a model of sound
has a U-Net and a text encoder, too, and its own call does other things with them. What is refused is refused when the
pipeline is opened, in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.prompts import token_ids, tokenizers_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ARGMAX_EOS = 2
"""A CLIP configuration's ``eos_token_id`` that stands for "the largest id", from before it said its own."""


def check_filled(part: str, module: nn.Module) -> None:
    """No tensor on the meta device: those have a shape and no numbers."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise LensError(f"The {part} lacks the numbers of its tensor '{name}'; fetch the model again.")


def check_text_unet(pipe: Any, encoders: Sequence[str], added: str | None) -> None:
    """The U-Net reads the text that these encoders give, and is told nothing else but ``added``."""
    unet, name = pipe.unet, type(pipe).__name__
    if type(unet) is not UNet2DConditionModel:
        raise LensError(f"A {name} whose U-Net is a {type(unet).__name__} is not supported.")
    config = unet.config
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise LensError("This U-Net is class-conditional, which is not supported: choose one told by text alone.")
    if config.addition_embed_type != added or config.encoder_hid_dim_type is not None:
        raise LensError(
            f"This U-Net is conditioned in a way that a {name} does not know, which is not supported "
            f"({config.addition_embed_type or config.encoder_hid_dim_type or 'no text_time embedding'})."
        )
    widths = [getattr(pipe, part).config.hidden_size for part in encoders]
    if config.cross_attention_dim not in (sum(widths), [sum(widths)]):
        raise LensError(
            f"The text encoders give embeddings of {sum(widths)} and this U-Net reads {config.cross_attention_dim}; "
            "the parts belong to different models."
        )


def check_plain_unet(unet: Any) -> None:
    """An unconditional U-Net."""
    if type(unet) is not UNet2DModel:
        raise LensError(f"An unconditional pipeline whose U-Net is a {type(unet).__name__} is not supported.")
    if unet.class_embedding is not None:
        raise LensError("This U-Net is class-conditional, which is not supported: choose an unconditional one.")


def check_latents(pipe: Any, decoder: str, *, conditional: bool) -> None:
    """Size, channels in, channels out: what goes round between U-Net, sampler and decoder."""
    config = pipe.unet.config
    size = config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise LensError(
            "This U-Net does not say how large its images are, which is needed: write sample_size into its config.json."
        )
    if decoder and config.in_channels != getattr(pipe, decoder).config.latent_channels:
        raise LensError(
            "This U-Net takes extra input channels (in-painting or editing), or belongs to another autoencoder; "
            "choose a text-to-image model."
        )
    halvings = 2 ** (len(config.block_out_channels) - 1)
    # The other kind of U-Net enlarges each level to its skip connections' size.
    if not conditional and any(side % halvings for side in sides):
        raise LensError(
            f"This U-Net halves its images {len(config.block_out_channels) - 1} times, and a side of {min(sides)} "
            f"cannot be: sample_size in its config.json must be a multiple of {halvings}."
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise LensError(
            f"This U-Net turns {config.in_channels} channels into {config.out_channels}, which is not supported."
        )


def check_text(pipe: Any, encoders: Sequence[str]) -> None:
    """Each tokenizer is whole and made for its encoder's vocabulary and length."""
    tokenizers = tokenizers_of(pipe)
    for part in encoders:
        name = part.replace("text_encoder", "tokenizer")
        if name not in tokenizers:
            raise LensError(f"This {type(pipe).__name__} has no {name}; fetch it again, whole.")
        _check_tokenizer(name, tokenizers[name], part, getattr(pipe, part))


def _check_tokenizer(name: str, tokenizer: Any, part: str, encoder: Any) -> None:
    known = tokenizer.get_vocab()
    letters = {tuple(token_ids(letter, tokenizer)) for letter in LETTERS}
    if len(letters) < len(LETTERS) or () in letters or not _knows_its_words(tokenizer, known):
        raise LensError(
            f"The {name} is not whole: it reads different texts alike; fetch its vocabulary (tokenizer.json, or "
            "vocab.json with merges.txt) again."
        )
    rows = encoder.get_input_embeddings().weight.shape[0]
    if max(known.values()) >= rows:
        raise LensError(
            f"The {name} has tokens up to {max(known.values())} and the {part} knows {rows}; "
            "they belong to different models."
        )
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest is not None and not 3 <= tokenizer.model_max_length <= longest:
        raise LensError(
            f"The {name} gives up to {_length(tokenizer)} tokens and the {part} reads {longest}; "
            "mend model_max_length in tokenizer_config.json."
        )
    end = getattr(encoder.config, "eos_token_id", None)
    if end not in (None, ARGMAX_EOS, tokenizer.eos_token_id):
        raise LensError(
            f"The {name} ends texts with the token {tokenizer.eos_token_id} and the {part} waits for {end}; "
            "they belong to different models."
        )


def _knows_its_words(tokenizer: Any, known: dict[str, int], sample: int = 64) -> bool:
    """Whether words that have a token of their own are read as that token: without its merges none is."""
    words = [word.removesuffix("</w>") for word in sorted(known) if word.endswith("</w>") and len(word) > len("x</w>")]
    words = [word for word in words if word.isascii() and word.isalpha()]
    words = words[:: max(1, len(words) // sample)]
    whole = sum(token_ids(word, tokenizer) == [known[f"{word}</w>"]] for word in words)
    return not words or 2 * whole >= len(words)


def _length(tokenizer: Any) -> str:
    length = tokenizer.model_max_length
    return "any number of" if length > 10**9 else str(length)
