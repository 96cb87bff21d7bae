"""Finding faces in photographs. The detector is any function from an image to boxes, so it can be exchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_lens.base.types import LensError
from diffusion_lens.base.weights import weight_file

FaceDetector = Callable[[np.ndarray], np.ndarray]
"""``uint8[H, W, 3]`` (RGB) → face boxes ``[m, 4]`` as left, top, width, height in pixels; ``m`` may be 0."""

YUNET_FILE = "face_detection_yunet_2023mar.onnx"


def yunet_detector(path: Path | str | None = None, *, min_score: float = 0.8) -> FaceDetector:
    """OpenCV's YuNet detector (MIT licence); one detector serves one thread.

    Raises:
        LensError: OpenCV is not installed, or its weights are missing (the message says where they go).
    """
    try:
        import cv2
    except ImportError:
        raise LensError("Face detection needs OpenCV; install it with: pip install opencv-python-headless.") from None
    weights = weight_file(YUNET_FILE, "the OpenCV Zoo (models/face_detection_yunet)", path)
    try:
        network = cv2.FaceDetectorYN.create(str(weights), "", (320, 320), min_score)
    except cv2.error:
        raise LensError(f"{weights.name} is not a readable YuNet file; fetch it again.") from None

    def detect(image: np.ndarray) -> np.ndarray:
        network.setInputSize((image.shape[1], image.shape[0]))
        _, found = network.detect(np.ascontiguousarray(image[:, :, ::-1]))
        return np.zeros((0, 4)) if found is None else found[:, :4]

    return detect


def face_crop(image: np.ndarray, box: np.ndarray, *, margin: float = 0.25, size: int = 224) -> np.ndarray:
    """The square around ``box``, widened by ``margin`` of its side on every side, as ``uint8[size, size, 3]``.

    FairFace pads its crops by a quarter as well, but turns them upright first; this one does not.
    Where the square leaves ``image uint8[H, W, 3]``, the border pixels are repeated.
    """
    left, top, width, height = (float(v) for v in box)
    half = max(width, height) * (0.5 + margin)
    x, y = left + width / 2, top + height / 2
    pad = int(np.ceil(max(0.0, half - x, half - y, x + half - image.shape[1], y + half - image.shape[0])))
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    square = (x - half + pad, y - half + pad, x + half + pad, y + half + pad)
    return np.asarray(Image.fromarray(padded).resize((size, size), Image.Resampling.BILINEAR, box=square))
