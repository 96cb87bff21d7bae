"""Thumbnails on disk: sprite sheets of equal tiles as WebP, with a JSON index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import atomic_path
from diffusion_lens.base.pictures import open_picture
from diffusion_lens.base.types import LensError

SHEET_SIDE = 4096
"""Longest side of a sheet in pixels: decodes fast, stays well under WebP's 16,383."""

MAX_BYTES = 512 * 2**20
"""Most bytes that the images of one index may take; larger ones are kept at a fraction of their size."""

MAX_SHEET_PIXELS = 20_000_000


class Sheet(StrictConfig):
    """One WebP file of ``n`` tiles in rows of ``columns``."""

    file: str = Field(pattern=r"^[^./\\:][^/\\:]*\.webp$")
    n: int = Field(ge=1)
    columns: int = Field(ge=1)


class SheetIndex(StrictConfig):
    """All sheets of one image stack ``[n, height, width, 3]``, in order."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    sheets: tuple[Sheet, ...]

    @model_validator(mode="after")
    def _fits(self) -> SheetIndex:
        """Nothing is decoded that would not fit: every sheet counts once, all together under ``MAX_BYTES``."""
        if len({sheet.file for sheet in self.sheets}) < len(self.sheets):
            raise ValueError("it names a sheet twice")
        if self.n * self.height * self.width * 3 > MAX_BYTES:
            raise ValueError(f"its images take more than {MAX_BYTES:,} bytes")
        return self

    @property
    def n(self) -> int:
        """Images in all sheets together."""
        return sum(sheet.n for sheet in self.sheets)


def save_sheets(
    images: np.ndarray, folder: Path, stem: str, *, columns: int = 32, quality: int = 90, lossless: bool = False
) -> SheetIndex:
    """Write ``uint8 [n, H, W, 3]`` as ``<stem>-00.webp``, … and ``<stem>.json``; returns the index.

    Images that take more than ``MAX_BYTES`` together are kept at a half, a third, … of their size.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise LensError(f"A sprite sheet takes uint8 [n, H, W, 3]; got {images.dtype} {list(images.shape)}.")
    images = _shrunk(images)
    height, width = images.shape[1:3]
    columns = max(1, min(columns, SHEET_SIDE // width, len(images)))
    per_sheet = columns * max(1, SHEET_SIDE // height)
    sheets = []
    for number, first in enumerate(range(0, len(images), per_sheet)):
        tiles = images[first : first + per_sheet]
        sheet = Sheet(file=f"{stem}-{number:02d}.webp", n=len(tiles), columns=columns)
        with atomic_path(folder / sheet.file) as partial:
            Image.fromarray(_join(tiles, columns)).save(partial, "WEBP", quality=quality, lossless=lossless)
        sheets.append(sheet)
    index = SheetIndex(height=height, width=width, sheets=tuple(sheets))
    index.save(folder / f"{stem}.json")
    return index


def load_sheets(folder: Path, stem: str) -> np.ndarray:
    """Read the images back, ``uint8 [n, H, W, 3]``; raises ``LensError`` that names a bad file."""
    index = SheetIndex.load(folder / f"{stem}.json")
    images = np.zeros((index.n, index.height, index.width, 3), np.uint8)
    first = 0
    for sheet in index.sheets:
        images[first : first + sheet.n] = _split(folder / sheet.file, sheet, index)
        first += sheet.n
    return images


def _shrunk(images: np.ndarray) -> np.ndarray:
    """The images, or means over squares of ``factor`` pixels where they would take too much room."""
    factor, (n, height, width, _) = 1, images.shape
    while n * -(-height // factor) * -(-width // factor) * 3 > MAX_BYTES:
        factor += 1
    return images if factor == 1 else np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])


def _join(tiles: np.ndarray, columns: int) -> np.ndarray:
    n, height, width, _ = tiles.shape
    rows = -(-n // columns)
    padded = np.zeros((rows * columns, height, width, 3), np.uint8)
    padded[:n] = tiles
    grid = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(rows * height, columns * width, 3))


def _split(path: Path, sheet: Sheet, index: SheetIndex) -> np.ndarray:
    rows = -(-sheet.n // sheet.columns)
    size = (sheet.columns * index.width, rows * index.height)
    pixels = open_picture(path, formats=("WEBP",), max_pixels=MAX_SHEET_PIXELS, size=size, mend="restore it").pixels
    tiles = pixels.reshape(rows, index.height, sheet.columns, index.width, 3).swapaxes(1, 2)
    return tiles.reshape(-1, index.height, index.width, 3)[: sheet.n]
