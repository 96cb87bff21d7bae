"""The one reader of image files: what a person sees in a viewer, as RGB bytes.

EXIF orientation is applied, embedded colour profiles are turned into sRGB, 16 bits become 8 by their full scale, and
what is transparent is laid on white (``BACKGROUND``). Of an animation or of several pages the first is read, and a
warning says so. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from diffusion_lens.base.types import LensError

log = logging.getLogger(__name__)

MAX_PIXELS = 50_000_000
BACKGROUND = (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are opened; others (such as EPS, which starts a program) are not."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
ORIENTATION = 0x0112
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True)
class Picture:
    """``pixels uint8[H, W, 3]`` and what was left out, in words (``""``: nothing)."""

    pixels: np.ndarray
    note: str


def open_image(path: Path) -> np.ndarray:
    """An image file as RGB ``uint8[H, W, 3]``; logs a warning where only a part of it was read.

    ``LensError`` names a missing, damaged or huge file, and the mode of one whose numbers cannot be told.
    """
    picture = open_picture(path)
    if picture.note:
        log.warning("%s: %s", path.name, picture.note)
    return picture.pixels


def open_picture(
    path: Path,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    size: tuple[int, int] | None = None,
    mend: str = "save it again as PNG, or leave it out",
) -> Picture:
    """The same with its note; ``size`` (width, height): the only one allowed; ``mend``: what a person can do.

    Raises:
        LensError: one sentence that names the file.
    """
    try:
        if not path.is_file():
            raise LensError(f"{path.name} is missing from {path.parent}; put it there, or leave it out.")
        with Image.open(path, formats=formats) as image:
            _check_size(path, image.size, max_pixels, size)
            note = _note(image)
            image.load()
            return Picture(_upright(_pixels(image, path), image), note)
    except LensError:
        raise
    except UnidentifiedImageError:
        raise LensError(f"{path.name} is no image of a known kind; {mend}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise LensError(f"{path.name} has more than {max_pixels:,} pixels; make it smaller.") from None
    except PermissionError:
        raise LensError(f"{path.name} may not be read; change its permissions, or leave it out.") from None
    except Exception as error:  # decoders meet damaged bytes with nearly every kind of exception
        reason = str(error).strip().splitlines()
        told = f" ({reason[0][:100]})" if reason else ""
        raise LensError(f"{path.name} is a damaged image{told}; {mend}.") from None


def _check_size(path: Path, found: tuple[int, int], max_pixels: int, expected: tuple[int, int] | None) -> None:
    if found[0] * found[1] > max_pixels:
        raise LensError(f"{path.name} has more than {max_pixels:,} pixels; make it smaller.")
    if expected is not None and found != expected:
        raise LensError(f"{path.name} is {found} pixels, its index says {expected}; restore it.")


def _note(image: Image.Image) -> str:
    n = getattr(image, "n_frames", 1)
    # An MPO holds one photograph and copies of it for other screens.
    if n == 1 or image.format == "MPO":
        return ""
    what = "pages" if image.format == "TIFF" else "frames"
    return f"it has {n} {what}, and the first alone is read"


def _pixels(image: Image.Image, path: Path) -> np.ndarray:
    """RGB ``uint8[H, W, 3]`` as stored, not yet turned upright."""
    mode = image.mode
    if mode in SIXTEEN_BITS or (mode == "I" and image.format in ("PNG", "PPM")):
        return _grey(np.asarray(image).astype(np.uint32), 65_535)
    if mode == "F":
        values = np.asarray(image)
        if np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
            return _grey(np.round(values * 255).astype(np.uint8), 255)
    if mode not in COLOURS:
        raise LensError(
            f"{path.name} has pixels of the mode {mode}, whose black and white are not told; save it with 8 bits a "
            "channel."
        )
    colours = _to_srgb(image)
    if colours.has_transparency_data:
        ground = Image.new("RGBA", colours.size, (*BACKGROUND, 255))
        colours = Image.alpha_composite(ground, _with_alpha(colours))
    return np.asarray(colours.convert("RGB"))


def _grey(values: np.ndarray, white: int) -> np.ndarray:
    """Whole numbers ``[H, W]`` from 0 to ``white`` as grey RGB bytes, rounded to the nearest."""
    levels = values if white == 255 else (values * 255 + white // 2) // white
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _to_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB; one without a profile, or with a broken one, is taken as it is, as viewers do."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        turned = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return image if turned is None else turned


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """The pixels as the EXIF orientation says they are to be seen; a broken EXIF block says nothing."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # an EXIF block is bytes of anybody's making, and no part of the picture
        orientation = 1
    turned = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels),
    }.get(orientation, pixels)
    return np.ascontiguousarray(turned)
