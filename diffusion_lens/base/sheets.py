"""Thumbnails on disk: sprite sheets of equal tiles as WebP, with a JSON index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import atomic_path
from diffusion_lens.base.types import LensError

SHEET_SIDE = 4096
"""Longest side of a sheet in pixels: decodes fast, stays well under WebP's 16,383."""


class Sheet(StrictConfig):
    """One WebP file of ``n`` tiles in rows of ``columns``."""

    file: str
    n: int = Field(ge=1)
    columns: int = Field(ge=1)


class SheetIndex(StrictConfig):
    """All sheets of one image stack ``[n, height, width, 3]``, in order."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    sheets: tuple[Sheet, ...]

    @property
    def n(self) -> int:
        """Images in all sheets together."""
        return sum(sheet.n for sheet in self.sheets)


def save_sheets(
    images: np.ndarray, folder: Path, stem: str, *, columns: int = 32, quality: int = 90, lossless: bool = False
) -> SheetIndex:
    """Write ``uint8 [n, H, W, 3]`` as ``<stem>-00.webp``, … and ``<stem>.json``; returns the index."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise LensError(f"A sprite sheet takes uint8 [n, H, W, 3]; got {images.dtype} {list(images.shape)}.")
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
    stacks = [_split(folder / sheet.file, sheet, index) for sheet in index.sheets]
    return np.concatenate(stacks) if stacks else np.zeros((0, index.height, index.width, 3), np.uint8)


def _join(tiles: np.ndarray, columns: int) -> np.ndarray:
    n, height, width, _ = tiles.shape
    rows = -(-n // columns)
    padded = np.zeros((rows * columns, height, width, 3), np.uint8)
    padded[:n] = tiles
    grid = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(rows * height, columns * width, 3))


def _split(path: Path, sheet: Sheet, index: SheetIndex) -> np.ndarray:
    if not path.is_file():
        raise LensError(f"{path.name} is missing from {path.parent}.")
    rows = -(-sheet.n // sheet.columns)
    expected = (sheet.columns * index.width, rows * index.height)
    try:
        with Image.open(path, formats=["WEBP"]) as image:
            if image.size != expected:
                raise LensError(f"{path.name} is {image.size} pixels, its index says {expected}; restore it.")
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError):
        raise LensError(f"{path} is not a readable WebP image; restore it from the original.") from None
    tiles = pixels.reshape(rows, index.height, sheet.columns, index.width, 3).swapaxes(1, 2)
    return tiles.reshape(-1, index.height, index.width, 3)[: sheet.n]
