"""Naming a class in a prompt: "a portrait of a firefighter" → "a portrait of a female firefighter"; and seeing it."""

from __future__ import annotations

import re

from diffusion_lens.base.types import Attribute, LensError

TAIL = " with "
SAID_OF_SKIN = ("tone", "skin tone")
BARE = "a portrait of a person"
ALSO_SAID: dict[str, tuple[str, ...]] = {
    "female": ("woman", "women", "girl", "girls", "lady"),
    "male": ("man", "men", "boy", "boys", "gentleman"),
    "old": ("elderly",),
}
"""Label → other English words that say it."""


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


def said_classes(prompt: str | None, attribute: Attribute) -> tuple[str, ...]:
    """The classes of ``attribute`` that a prompt names, in class order: of "a female judge" ``("female",)``.

    Whole words, in any case; of skin tones a label counts only before "skin". A class whose label has several words is
    said by all of them in a row. Our working form, for English prompts.
    """
    text = " ".join(re.findall(r"[a-z'-]+", (prompt or "").lower()))
    tail = " skin" if attribute.name in SAID_OF_SKIN else ""
    return tuple(
        label
        for label in attribute.classes
        if any(re.search(rf"\b{re.escape(word.lower())}{tail}\b", text) for word in (label, *ALSO_SAID.get(label, ())))
    )
