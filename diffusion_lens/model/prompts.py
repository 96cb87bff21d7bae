"""Whether a model reads a prompt as a person wrote it: every word known, none cut off, nothing invisible.

The one check of prompts: whatever encodes or draws calls it, and so do the command line and the app before they wait
for a model. No heavy import here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

from diffusion_lens.base.types import LensError

PIECE = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]+|_+")
"""A word, a number, or signs that stand together."""
WEIGHT = re.compile(r"[(\[][^()\[\]]*:\s*\d*\.\d+\s*[)\]]")
"""``(word:1.4)``, how other programs weigh a word."""
JOINERS = "\u200c\u200d"
"""Invisible, yet part of words and emoji."""
FLAG_LETTERS = "".join(map(chr, range(0xE0020, 0xE0080)))
"""Invisible letters in the emoji of some flags."""
SHOWN = 5


def unknown_pieces(prompt: str, vocabulary: Collection[str] | None) -> tuple[str, ...]:
    """What in a prompt the model never saw, in order: words, numbers, signs, emoji; empty for an open vocabulary."""
    if vocabulary is None:
        return ()
    text = unicodedata.normalize("NFC", prompt).lower()
    return tuple(piece for piece in PIECE.findall(text) if piece not in vocabulary)


def check_words(prompt: str, vocabulary: Collection[str] | None = None) -> None:
    """Raise ``LensError`` for what would be drawn and not meant, as far as the text alone tells.

    That is: an invisible character; anything outside a closed ``vocabulary``; a weight, which no model here reads.
    """
    for character in prompt:
        if _is_invisible(character):
            raise LensError(
                f"The prompt holds an invisible character (U+{ord(character):04X}), which the model would read; "
                "type the prompt anew."
            )
    unknown = unknown_pieces(prompt, vocabulary)
    if unknown:
        shown = ", ".join(f"“{piece}”" for piece in dict.fromkeys(unknown[:SHOWN]))
        known = ", ".join(vocabulary or ())
        raise LensError(f"The model never saw {shown}; the words it knows are {known}.")
    weight = WEIGHT.search(prompt)
    if weight:
        raise LensError(
            f"Weights are not read: the model would take “{weight.group()}” for text; write the words alone."
        )


def check_prompt(
    prompt: str, vocabulary: Collection[str] | None, pipeline: Any, lengths: Mapping[str, int] | None = None
) -> None:
    """The same, and what the pipeline's tokenizers tell: words they cannot read, and words beyond their length.

    ``lengths``: tokenizer → most tokens that the model takes of it, where that is not the tokenizer's own; one that
    reads the whole prompt is enough.
    """
    check_words(prompt, vocabulary)
    cut: list[LensError] = []
    tokenizers = tokenizers_of(pipeline)
    for name, tokenizer in tokenizers.items():
        text = pipeline.maybe_convert_prompt(prompt, tokenizer) if hasattr(pipeline, "maybe_convert_prompt") else prompt
        unread = next((word for word in text.split() if not _is_read(word, tokenizer)), None)
        if unread is not None:
            raise LensError(f"The model's tokenizer cannot read “{unread[:60]}”; leave it out.")
        try:
            _check_length(text, tokenizer, (lengths or {}).get(name, tokenizer.model_max_length))
        except LensError as error:
            cut.append(error)
    if cut and len(cut) == len(tokenizers):
        raise cut[-1]


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """A pipeline's tokenizers by the name of the part."""
    named = {name: getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    return {name: tokenizer for name, tokenizer in named.items() if tokenizer is not None}


def token_ids(text: str, tokenizer: Any, *, special: bool = False) -> list[int]:
    """Tokens of a text, however long; ``special``: with those that begin and end it."""
    return list(tokenizer(text, add_special_tokens=special, truncation=False, verbose=False).input_ids)


def _check_length(text: str, tokenizer: Any, most: int) -> None:
    ids = token_ids(text, tokenizer, special=True)
    if len(ids) <= most:
        return
    lost = tokenizer.decode(ids[most - 1 : -1]).strip()
    raise LensError(
        f"This prompt has {len(ids)} tokens and the model reads {most}: “{_short(lost)}” would be cut off and have no "
        "effect; shorten it."
    )


def _is_read(word: str, tokenizer: Any) -> bool:
    """Whether a word has tokens of its own: none that stands for the unknown, or that ends a text."""
    unread = {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    return not unread & set(token_ids(word, tokenizer))


def _is_invisible(character: str) -> bool:
    """Half a character, a control or format character; white space and what holds words and emoji together are not."""
    if character.isspace() or character in JOINERS or character in FLAG_LETTERS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"
