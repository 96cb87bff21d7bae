"""Weights that people fetch themselves: where they lie, what to say when they are missing, and what names them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from diffusion_lens.base.types import LensError

WEIGHTS_VARIABLE = "DIFFUSION_LENS_WEIGHTS"
LOAD_ERRORS = (Exception,)
"""What libraries raise for files that are missing, broken or of another kind: tokenizers raise bare ``Exception``s."""


def weights_folder() -> Path:
    """Where fetched weights are looked for: ``$DIFFUSION_LENS_WEIGHTS``, else ``~/.cache/diffusion-lens/weights``."""
    named = os.environ.get(WEIGHTS_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "diffusion-lens" / "weights"


def weight_file(name: str, origin: str, path: Path | str | None = None) -> Path:
    """The file ``name`` at ``path``, or in the weights folder; raises ``LensError`` saying where to get and put it."""
    found = weights_folder() / name if path is None else Path(path)
    if not found.is_file():
        raise LensError(f"{name} is missing; get it from {origin} and save it as {found}.")
    return found


def reason(error: Exception) -> str:
    """The first line of what a library says, for the end of a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def weights_digest(module: nn.Module, *texts: str) -> str:
    """First 16 hex digits of a sha256 over ``texts`` and every named tensor of ``module``."""
    digest = hashlib.sha256("\0".join(texts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # Through bytes, since numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
