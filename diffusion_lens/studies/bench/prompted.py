"""What a comparison draws beside its prompt: prompts that name a class, and drawings that show the target shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.methods.prompts import name_class, said_classes
from diffusion_lens.portraits import world
from diffusion_lens.portraits.draw import draw
from diffusion_lens.studies.bench.shared import JudgedLens

N_DRAWN = 1_000
DRAWN_SEED = 700_000_000
MAX_TRIES = 60_000
PLANTED = "diffusion-lens/portraits"
"""Begins the ids of the models of the drawn world."""


def explicit_prompts(lens: JudgedLens, prompt: str | None, attribute: Attribute) -> dict[str, str]:
    """Class → the prompt with it said; empty where the model takes no prompt or does not know the words."""
    if prompt is None or said_classes(prompt, attribute):
        return {}
    found = {label: name_class(prompt, attribute, label) for label in attribute.classes}
    try:
        for text in found.values():
            lens.model.check_prompt(text)
    except LensError:
        return {}
    return found


def drawn_features(
    lens: JudgedLens, prompt: str | None, attribute: Attribute, target: Sequence[float], n: int = N_DRAWN
) -> np.ndarray | None:
    """The judge's features ``[n, d]`` of drawings of a prompt in which ``attribute`` shows the target shares.

    What a perfect method would draw: the world's own pictures, balanced. ``None`` where the lens's model is not of the
    drawn world, or where it hardly draws a class.
    """
    known = all(a in world.ATTRIBUTES for a in lens.classifier.attributes)
    if not known or attribute not in world.ATTRIBUTES or not lens.manifest.base_model.id.startswith(PLANTED):
        return None
    try:
        noun, said = world.parse_prompt(prompt or "")
    except LensError:
        return None
    if any(said.values()):
        return None
    left = {label: round(n * share) for label, share in zip(attribute.classes, target, strict=True)}
    images = []
    for seed in range(DRAWN_SEED, DRAWN_SEED + MAX_TRIES):
        record = world.sample_record(seed, noun=noun)
        label = record.label(attribute)
        if left[label]:
            left[label] -= 1
            images.append(draw(record))
        if not any(left.values()):
            return lens.classifier.features(np.stack(images))
    return None
