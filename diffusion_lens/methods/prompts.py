"""Naming a class in a prompt: "a portrait of a firefighter" → "a portrait of a female firefighter"."""

from __future__ import annotations

import re

from diffusion_lens.base.types import Attribute, LensError

TAIL = " with "
SAID_OF_SKIN = ("tone", "skin tone")
BARE = "a portrait of a person"


def name_class(prompt: str | None, attribute: Attribute, label: str, *, template: str = "") -> str:
    """The prompt with the class said in it (our working form, for short English prompts).

    The word goes before the last one of the sentence's main part, with its article mended; of skin tones it is
    "… with dark skin". ``template`` overrides this: ``{prompt}`` and ``{label}`` are filled in. The empty prompt
    becomes "a portrait of a … person". Raises ``LensError`` for models without prompts.
    """
    attribute.index(label)
    if prompt is None:
        raise LensError("This model takes no prompt, so a class cannot be named in it.")
    if template:
        return template.replace("{prompt}", prompt).replace("{label}", label)
    text = prompt.strip() or BARE
    if attribute.name in SAID_OF_SKIN:
        return f"{text}{' and ' if TAIL in text else TAIL}{label} skin"
    main, found, tail = text.partition(TAIL)
    words = main.split()
    words.insert(len(words) - 1, label)
    place = len(words) - 3
    if place >= 0 and words[place].lower() in ("a", "an"):
        words[place] = "an" if re.match("[aeiou]", label, re.IGNORECASE) else "a"
    return " ".join(words) + found + tail
