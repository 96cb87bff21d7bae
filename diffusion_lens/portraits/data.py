"""Drawn pictures in bulk: records, images and labels as arrays, drawn by all cores."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.portraits import world
from diffusion_lens.portraits.draw import SIZE, VARIATION, Variation, draw

CHUNK = 500
PROMPT_SEED = 700_000_000


@dataclass(frozen=True)
class Drawings:
    """Pictures with their truth.

    Attributes:
        images: ``uint8[n, 64, 64, 3]``.
        labels: ``int64[n, attribute]`` class indices in the order of ``world.ATTRIBUTES``.
        captions: one truthful caption each.
    """

    images: np.ndarray
    labels: np.ndarray
    captions: tuple[str, ...]


def _draw_chunk(seeds: range, *, balanced: bool, variation: Variation) -> tuple[np.ndarray, np.ndarray, list[str]]:
    records = [world.sample_record(seed, balanced=balanced) for seed in seeds]
    images = np.stack([draw(record, variation) for record in records])
    labels = np.array([record.classes for record in records], dtype=np.int64)
    return images, labels, [world.sample_caption(record) for record in records]


def describe(n: int, *, first_seed: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels ``int64[n, attribute]`` and captions of the portraits that ``draw_many`` draws, without drawing them."""
    records = [world.sample_record(seed) for seed in range(first_seed, first_seed + n)]
    labels = np.array([record.classes for record in records], dtype=np.int64)
    return labels, tuple(world.sample_caption(record) for record in records)


def draw_many(
    n: int,
    *,
    first_seed: int,
    balanced: bool = False,
    variation: Variation = VARIATION,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Drawings:
    """Draw ``n`` portraits with seeds ``first_seed, first_seed + 1, …``.

    The result does not depend on ``workers`` (default: every core). ``balanced`` draws every attribute evenly;
    ``variation`` is how far colours vary within a class.
    """
    chunks = [range(s, min(s + CHUNK, first_seed + n)) for s in range(first_seed, first_seed + n, CHUNK)]
    images = np.empty((n, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.empty((n, len(world.ATTRIBUTES)), dtype=np.int64)
    captions: list[str] = []
    task = partial(_draw_chunk, balanced=balanced, variation=variation)
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(chunks) == 1:
        _collect(map(task, chunks), images, labels, captions, progress)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            _collect(pool.map(task, chunks), images, labels, captions, progress)
    return Drawings(images, labels, tuple(captions))


def draw_prompt(prompt: str, n: int, *, first_seed: int = PROMPT_SEED) -> np.ndarray:
    """``n`` portraits of a prompt as the world plants them, ``uint8[n, 64, 64, 3]``; ``""`` is everyone.

    Raises ``LensError`` for a prompt that is no sentence of this world, or names more than a profession.
    """
    noun, said = world.parse_prompt(prompt)
    if any(said.values()):
        raise LensError(f"'{prompt}' names more than a profession; choose a plain sentence of this world.")
    return np.stack([draw(world.sample_record(seed, noun=noun)) for seed in range(first_seed, first_seed + n)])


def _collect(
    parts: Iterable[tuple[np.ndarray, np.ndarray, list[str]]],
    images: np.ndarray,
    labels: np.ndarray,
    captions: list[str],
    progress: Progress | None,
) -> None:
    at = 0
    for chunk_images, chunk_labels, chunk_captions in parts:
        stop = at + len(chunk_images)
        images[at:stop], labels[at:stop] = chunk_images, chunk_labels
        captions += chunk_captions
        at = stop
        if progress:
            progress.step(at, len(images))
