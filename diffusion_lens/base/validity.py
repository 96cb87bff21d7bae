"""Pictures that show nobody: found, named, and never counted as a person.

An overflow in half precision, a safety checker, or a broken file leaves a flat picture, and a classifier asked who is
on it always answers. The pipeline's decoder names the first two (``Generation.faults``); flat pictures are found by
their pixels, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from diffusion_lens.base.types import FAULTS, Fault, Generation, LensError, Predictions

FLAT = 2.0
"""A picture is constant if every colour channel's standard deviation is at most this, in levels of 255."""

REASONS: dict[Fault, str] = {
    "not finite": "overflowed while it was drawn (draw in a wider number format)",
    "censored": "was blacked out by the model's safety checker",
    "constant": "is one flat colour",
}


def is_constant(image: np.ndarray) -> bool:
    """Whether ``uint8[H, W, 3]`` is one flat colour (``FLAT``); a picture without pixels is."""
    if not image.size:
        return True
    channels = image.reshape(-1, image.shape[-1])
    return bool((channels.std(axis=0, dtype=np.float32) <= FLAT).all())


def find_constant(images: Sequence[np.ndarray] | np.ndarray) -> tuple[Fault | None, ...]:
    """``"constant"`` for each flat one of ``uint8[H, W, 3]`` images of any sizes, ``None`` for the others."""
    return tuple("constant" if is_constant(image) else None for image in images)


def faults_of(generation: Generation) -> tuple[Fault | None, ...]:
    """One fault or ``None`` per image: those its decoder named, else those that its pixels show."""
    return generation.faults or find_constant(generation.images)


def discard(predictions: Mapping[str, Predictions], faults: Sequence[Fault | None]) -> dict[str, Predictions]:
    """The same readings, in which pictures with a fault are undecided; probabilities stay as the classifier gave them.

    ``faults``: one per image, or empty where none is known.
    """
    bad = np.array([fault is not None for fault in faults], dtype=bool)
    if not bad.any():
        return dict(predictions)
    return {name: replace(reading, certain=reading.certain & ~bad) for name, reading in predictions.items()}


def count_faults(faults: Sequence[Fault | None]) -> dict[Fault, int]:
    """How many pictures have each fault, in the order of ``FAULTS``; faults that none has are left out."""
    return {fault: count for fault in FAULTS if (count := sum(own == fault for own in faults))}


def say_faults(counts: Mapping[Fault, int], n: int) -> str:
    """One sentence on the pictures that show nobody, e.g. "2 of 8 images are not counted: ..."; empty if none does."""
    total = sum(counts.values())
    if not total:
        return ""
    kinds = ", ".join(f"{count} {fault}" for fault, count in counts.items())
    return f"{total} of {n} images show nobody and stand under undecided ({kinds})."


def require_valid(faults: Sequence[Fault | None]) -> None:
    """Raise ``LensError`` where every picture has a fault: there is nothing to read, let alone to count."""
    if not faults or None in faults:
        return
    counts = count_faults(faults)
    why = "; ".join(f"{count} {REASONS[fault]}" for fault, count in counts.items())
    raise LensError(f"None of the {len(faults)} images shows anybody: {why}.")
