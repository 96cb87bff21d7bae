"""Which pipelines can be opened, and whether the parts of one belong together.

A pipeline is recognised by its class, not by the parts it happens to have: a refiner, an up-scaler or a model of sound
has a U-Net and a text encoder, too, and its own call does other things with them. What is refused is refused when the
pipeline is opened, in a sentence.
"""

from __future__ import annotations

from typing import Any, Literal

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.prompts import token_ids, tokenizers_of

Kind = Literal["text", "text-xl", "pixel", "latent"]

KINDS: dict[str, Kind] = {
    "StableDiffusionPipeline": "text",
    "LatentConsistencyModelPipeline": "text",
    "StableDiffusionXLPipeline": "text-xl",
    "DDPMPipeline": "pixel",
    "DDIMPipeline": "pixel",
    "PNDMPipeline": "pixel",
    "LDMPipeline": "latent",
}
"""diffusers' pipeline class → what is done with its parts."""
ENCODERS: dict[Kind, tuple[str, ...]] = {"text": ("text_encoder",), "text-xl": ("text_encoder", "text_encoder_2")}
DECODERS: dict[Kind, str] = {"text": "vae", "text-xl": "vae", "latent": "vqvae"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ARGMAX_EOS = 2
"""A CLIP configuration's ``eos_token_id`` that stands for "the largest id", from before it said its own."""


def supported(class_name: object) -> Kind:
    """The kind of a pipeline by its class's name; raises ``LensError`` that names what can be opened."""
    if isinstance(class_name, str) and class_name in KINDS:
        return KINDS[class_name]
    raise LensError(
        f"{class_name} is not supported: choose a text-to-image Stable Diffusion, SDXL or LCM pipeline, or an "
        "unconditional DDPM, DDIM or LDM one, with a U-Net."
    )


def kind_of(pipe: Any) -> Kind:
    """The kind of a pipeline in memory, after checking that its parts are there, whole, and fit each other.

    Raises ``LensError`` that names the part.
    """
    name = type(pipe).__name__
    kind = supported(name if type(pipe).__module__.startswith("diffusers.") else f"{name} (not of diffusers)")
    for part in ("unet", "scheduler", *ENCODERS.get(kind, ()), *([DECODERS[kind]] if kind in DECODERS else [])):
        if getattr(pipe, part, None) is None:
            raise LensError(f"This {name} has no {part} and cannot draw; fetch it again, whole.")
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            _check_filled(part, module)
    if kind in ENCODERS:
        _check_text_unet(pipe, kind)
        _check_text(pipe, kind)
    else:
        _check_plain_unet(pipe.unet)
    _check_latents(pipe, kind)
    return kind


def _check_filled(part: str, module: nn.Module) -> None:
    """No tensor on the meta device: those have a shape and no numbers."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise LensError(f"The {part} lacks the numbers of its tensor '{name}'; fetch the model again.")


def _check_text_unet(pipe: Any, kind: Kind) -> None:
    unet, name = pipe.unet, type(pipe).__name__
    if type(unet) is not UNet2DConditionModel:
        raise LensError(f"A {name} whose U-Net is a {type(unet).__name__} is not supported.")
    config = unet.config
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise LensError("This U-Net is class-conditional, which is not supported: choose one told by text alone.")
    added = "text_time" if kind == "text-xl" else None
    if config.addition_embed_type != added or config.encoder_hid_dim_type is not None:
        raise LensError(
            f"This U-Net is conditioned in a way that a {name} does not know, which is not supported "
            f"({config.addition_embed_type or config.encoder_hid_dim_type or 'no text_time embedding'})."
        )
    widths = [getattr(pipe, part).config.hidden_size for part in ENCODERS[kind]]
    if config.cross_attention_dim not in (sum(widths), [sum(widths)]):
        raise LensError(
            f"The text encoders give embeddings of {sum(widths)} and this U-Net reads {config.cross_attention_dim}; "
            "the parts belong to different models."
        )


def _check_plain_unet(unet: Any) -> None:
    if type(unet) is not UNet2DModel:
        raise LensError(f"An unconditional pipeline whose U-Net is a {type(unet).__name__} is not supported.")
    if unet.class_embedding is not None:
        raise LensError("This U-Net is class-conditional, which is not supported: choose an unconditional one.")


def _check_latents(pipe: Any, kind: Kind) -> None:
    """Size, channels in, channels out: what goes round between U-Net, sampler and decoder."""
    config = pipe.unet.config
    size = config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise LensError(
            "This U-Net does not say how large its images are, which is needed: write sample_size into its config.json."
        )
    if kind in DECODERS and config.in_channels != getattr(pipe, DECODERS[kind]).config.latent_channels:
        raise LensError(
            "This U-Net takes extra input channels (in-painting or editing), or belongs to another autoencoder; "
            "choose a text-to-image model."
        )
    halvings = 2 ** (len(config.block_out_channels) - 1)
    # The other kind of U-Net enlarges each level to its skip connections' size.
    if kind not in ENCODERS and any(side % halvings for side in sides):
        raise LensError(
            f"This U-Net halves its images {len(config.block_out_channels) - 1} times, and a side of {min(sides)} "
            f"cannot be: sample_size in its config.json must be a multiple of {halvings}."
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise LensError(
            f"This U-Net turns {config.in_channels} channels into {config.out_channels}, which is not supported."
        )


def _check_text(pipe: Any, kind: Kind) -> None:
    """Each tokenizer is whole and made for its encoder's vocabulary and length."""
    tokenizers = tokenizers_of(pipe)
    for part in ENCODERS[kind]:
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
