"""Flip-books: the same seeds drawn at many strengths ahead of time, as one sprite that a browser flips through.

Fidelity: every frame is drawn exactly as the app draws it at full steps, in a batch of the same seeds (E0: bit for bit
on the machine that drew it; E1 elsewhere), and the classifier read that frame. What is kept of it is a lossy WebP (E3,
with its measured error): to look at, never to measure.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import atomic_path, load_tensors, save_tensors
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.types import MAX_BETA, Attribute, GenerationRequest, LensError, Short

LEAST_STRENGTHS = 33
"""Fewer frames than these are seen as jumps."""
MAX_STRENGTHS, MAX_SEEDS = 201, 16
MAX_CELL = 128
"""Longest side of a frame in pixels; larger images are kept as means over squares of pixels."""
MAX_SPRITE_BYTES = 2_000_000
MAX_BOOKS = 64
"""Of one lens."""
MAX_SIDE = 16_383
"""Longest side of a WebP."""
LENS_BYTES = 8_000_000
"""What the sprites of one lens may take together."""
QUALITIES = (85, 80, 75, 70, 60, 50)
"""Of WebP, the best first; a worse one where the sprite would be too large."""
METHOD = 6


class Head(StrictConfig):
    """What a book's JSON holds; its arrays lie beside it as safetensors, its frames as WebP."""

    format_version: int = Field(default=1, ge=1, le=1)
    request: dict[str, Any]
    attribute: dict[str, Any]
    target: str
    betas: tuple[float, ...] = Field(min_length=2, max_length=MAX_STRENGTHS)
    identity: float
    edit: str = Field(pattern=r"^[0-9a-f]{12}$")
    setting: str
    sae_id: str
    classifier_id: str
    attributes: tuple[dict[str, Any], ...] = Field(min_length=1, max_length=64)
    cell: tuple[int, int]
    error: float = Field(ge=0, le=255)


@dataclass(frozen=True, eq=False, repr=False)
class FlipBook(Short):
    """One prompt, one attribute's recommended turn, ``m`` strengths × ``n`` seeds.

    Attributes:
        request: what was drawn; its seeds are the sprite's columns.
        attribute: the one that is steered, towards ``target``.
        betas: strengths as people read them, rising: the sprite's rows. identity: the one that changes nothing.
        edit: ``EditSpec.digest`` of the edit at ``furthest``, without what its probes are: says which turn this is.
        setting: the turn in words. sae_id, classifier_id: whose features, whose reading.
        labels: attribute → class index ``[m, n]`` of the frames as drawn; ``certain``: ``[m, n]``, False is
            "uncertain". confidence: the classifier's probability of the steered attribute's label ``[m, n]``.
        activation_ratio: mean ``|h'| / |h|`` at every strength ``[m]``; 1 where nothing is turned.
        cell: height and width of a frame in pixels. sprite: the WebP, ``m`` rows of ``n`` frames.
        error: mean absolute difference of the sprite from the frames as drawn, in levels of 255.
    """

    request: GenerationRequest
    attribute: Attribute
    target: str
    betas: tuple[float, ...]
    identity: float
    edit: str
    setting: str
    sae_id: str
    classifier_id: str
    attributes: tuple[Attribute, ...]
    labels: Mapping[str, np.ndarray]
    certain: Mapping[str, np.ndarray]
    confidence: np.ndarray
    activation_ratio: np.ndarray
    cell: tuple[int, int]
    sprite: bytes
    error: float

    @property
    def furthest(self) -> float:
        """The strength that ``edit`` is of: the last one, or the first where nothing is turned at the last."""
        return self.betas[0] if self.betas[-1] == self.identity else self.betas[-1]

    @property
    def digest(self) -> str:
        """8 hex digits over the sprite: names this drawing of it to a browser's cache."""
        return hashlib.sha256(self.sprite).hexdigest()[:8]

    def frames(self) -> np.ndarray:
        """The sprite's frames, ``uint8 [m, n, H, W, 3]``."""
        shape = (len(self.betas), len(self.request.seeds), *self.cell)
        with Image.open(io.BytesIO(self.sprite), formats=("WEBP",)) as image:
            pixels = np.asarray(image.convert("RGB"))
        return pixels.reshape(shape[0], shape[2], shape[1], shape[3], 3).swapaxes(1, 2)


def make_sprite(frames: np.ndarray, max_bytes: int) -> tuple[bytes, tuple[int, int], float]:
    """Frames ``uint8 [m, n, H, W, 3]`` as one WebP of at most ``max_bytes``: its bytes, cell and error.

    Raises ``LensError`` where even the lowest quality takes more room.
    """
    small = _shrunk(frames)
    m, n, height, width = small.shape[:4]
    if m * height > MAX_SIDE or n * width > MAX_SIDE:
        raise LensError(f"A flip-book of {m} strengths of {height} pixels is higher than a WebP may be; take fewer.")
    sheet = np.ascontiguousarray(small.swapaxes(1, 2)).reshape(m * height, n * width, 3)
    for quality in QUALITIES:
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "WEBP", quality=quality, method=METHOD)
        sprite = buffer.getvalue()
        if len(sprite) <= min(max_bytes, MAX_SPRITE_BYTES):
            seen = np.asarray(Image.open(buffer).convert("RGB"), dtype=np.int16)
            return sprite, (height, width), float(np.abs(seen - sheet).mean())
    raise LensError(f"A flip-book of {m} × {n} frames takes {len(sprite):,} bytes and may take {max_bytes:,}.")


def _shrunk(frames: np.ndarray) -> np.ndarray:
    m, n, height, width = frames.shape[:4]
    factor = math.ceil(max(height, width) / MAX_CELL)
    if factor == 1:
        return frames
    flat = frames.reshape(m * n, height, width, 3)
    reduced = np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in flat])
    return reduced.reshape(m, n, *reduced.shape[1:])


def save_flip_book(book: FlipBook, folder: Path, stem: str) -> Path:
    """Write ``<stem>.json``, ``<stem>.safetensors`` and ``<stem>.webp``; returns the JSON's path."""
    names = [a.name for a in book.attributes]
    save_tensors(folder / f"{stem}.safetensors", {
        "labels": np.stack([book.labels[name] for name in names]).astype(np.uint8),
        "certain": np.stack([book.certain[name] for name in names]).astype(np.uint8),
        "confidence": book.confidence.astype(np.float32),
        "activation_ratio": book.activation_ratio.astype(np.float32),
    })  # fmt: skip
    with atomic_path(folder / f"{stem}.webp") as partial:
        partial.write_bytes(book.sprite)
    head = Head(
        request=to_plain(book.request), attribute=to_plain(book.attribute), target=book.target, betas=book.betas,
        identity=book.identity, edit=book.edit, setting=book.setting, sae_id=book.sae_id,
        classifier_id=book.classifier_id, attributes=tuple(to_plain(a) for a in book.attributes), cell=book.cell,
        error=book.error,
    )  # fmt: skip
    head.save(folder / f"{stem}.json")
    return folder / f"{stem}.json"


def load_flip_book(folder: Path, stem: str) -> FlipBook:
    """Read what ``save_flip_book`` wrote; no frame is decoded.

    Raises ``LensError`` that names the file where counts, sizes or readings do not fit together, or exceed the limits.
    """
    head = Head.load(folder / f"{stem}.json")
    try:
        book = _book(head, load_tensors(folder / f"{stem}.safetensors"), _sprite(folder / f"{stem}.webp"))
        _check(book)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f": {error}" if isinstance(error, LensError) else ""
        raise LensError(f"{stem}.json is not a whole flip-book{reason}; run flip-books again.") from None
    return book


def _book(head: Head, arrays: Mapping[str, np.ndarray], sprite: bytes) -> FlipBook:
    attributes = tuple(from_plain(Attribute, own) for own in head.attributes)
    labels, certain = arrays["labels"], arrays["certain"]
    return FlipBook(
        from_plain(GenerationRequest, head.request), from_plain(Attribute, head.attribute), head.target, head.betas,
        head.identity, head.edit, head.setting, head.sae_id, head.classifier_id, attributes,
        {a.name: labels[i].astype(np.int64) for i, a in enumerate(attributes)},
        {a.name: certain[i].astype(bool) for i, a in enumerate(attributes)},
        arrays["confidence"], arrays["activation_ratio"], head.cell, sprite, head.error,
    )  # fmt: skip


def _sprite(path: Path) -> bytes:
    if not path.is_file():
        raise LensError(f"{path.name} is missing")
    if path.stat().st_size > MAX_SPRITE_BYTES:
        raise LensError(f"{path.name} takes more than {MAX_SPRITE_BYTES:,} bytes")
    return path.read_bytes()


def _check(book: FlipBook) -> None:
    """Raise ``LensError`` unless everything in a book fits together; somebody else may have written it."""
    m, n = len(book.betas), len(book.request.seeds)
    if n > MAX_SEEDS:
        raise LensError(f"it has {n} seeds, and may have {MAX_SEEDS}")
    if not all(abs(beta) <= MAX_BETA for beta in book.betas) or list(book.betas) != sorted(set(book.betas)):
        raise LensError("its strengths do not rise")
    if book.identity not in book.betas:
        raise LensError("it does not show the model as it is")
    if book.attribute not in book.attributes:
        raise LensError(f"it does not read {book.attribute.name}")
    book.attribute.index(book.target)
    for attribute in book.attributes:
        labels, certain = book.labels[attribute.name], book.certain[attribute.name]
        if labels.shape != (m, n) or certain.shape != (m, n):
            raise LensError(f"its readings of {attribute.name} are not {m} × {n}")
        if labels.max() >= len(attribute.classes):
            raise LensError(f"a reading of {attribute.name} is of a class that it has not")
    if book.confidence.shape != (m, n) or not ((book.confidence >= 0) & (book.confidence <= 1)).all():
        raise LensError("its probabilities do not lie between 0 and 1")
    if book.activation_ratio.shape != (m,) or not np.isfinite(book.activation_ratio).all():
        raise LensError("its activation ratios are no numbers")
    _check_size(book, m, n)


def _check_size(book: FlipBook, m: int, n: int) -> None:
    height, width = book.cell
    if not (1 <= height <= MAX_CELL and 1 <= width <= MAX_CELL):
        raise LensError(f"its frames are {width} × {height} pixels, and may have {MAX_CELL} a side")
    try:
        with Image.open(io.BytesIO(book.sprite), formats=("WEBP",)) as image:
            size, pages = image.size, getattr(image, "n_frames", 1)
    except (OSError, Image.DecompressionBombError):
        raise LensError("its sprite is no WebP") from None
    if size != (n * width, m * height) or pages != 1:
        raise LensError(f"its sprite is {size[0]} × {size[1]} pixels and should be {n * width} × {m * height}")
