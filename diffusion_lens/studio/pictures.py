"""Arrays → small inline images."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def data_uri(image: np.ndarray) -> str:
    """``uint8 [H, W, 3]`` as an inline JPEG, without chroma loss: small faces live on few pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spotlight(image: np.ndarray, heat: np.ndarray, *, least_side: int = 96) -> np.ndarray:
    """The image lit where ``heat [y, x]`` is high and greyed where it is low: told by light, not by hue."""
    height, width = image.shape[:2]
    factor = max(1, -(-least_side // width))
    size = (width * factor, height * factor)
    large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    heat = np.nan_to_num(np.asarray(heat, dtype=np.float32))
    peak = float(heat.max(initial=0))
    if peak <= 0:
        return large.astype(np.uint8)
    small = Image.fromarray(np.clip(heat / peak, 0, 1) * 255).convert("F")
    light = np.clip(np.asarray(small.resize(size, Image.Resampling.BICUBIC)) / 255, 0, 1)[..., None]
    light = np.sqrt(light)
    dim = 0.55 * large.mean(axis=-1, keepdims=True) + 48
    return np.clip(dim * (1 - light) + large * light, 0, 255).astype(np.uint8)
