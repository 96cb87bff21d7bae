"""Read other people's checkpoint files without ever running what is in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_lens.base.types import LensError


def read_pt(path: Path) -> Any:
    """What a ``.pt`` file holds, read with ``weights_only=True``: tensors, numbers, lists and mappings of them.

    Raises:
        LensError: the file is missing, damaged, or a pickle that would run code.
    """
    if not path.is_file():
        raise LensError(f"There is no file at {path}; check the path.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LensError(
            f"{path.name} is no plain tensor file (it is damaged, or a pickle that would run code), so it was not "
            "opened; ask its author for a .safetensors copy."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise LensError(f"{path.name} is not a readable PyTorch file; fetch it again.") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A flat name → tensor mapping from a ``.safetensors`` or ``.pt`` file, on the CPU.

    Raises:
        LensError: the file is missing, damaged, of another kind, would run code, or holds something else.
    """
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise LensError(f"There is no file at {path}; check the path.")
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError):
            raise LensError(f"{path.name} is not a readable safetensors file; fetch it again.") from None
    if path.suffix not in (".pt", ".pth", ".ckpt"):
        raise LensError(f"{path.name} is neither a .pt nor a .safetensors file; give one of these.")
    values = read_pt(path)
    if not isinstance(values, dict) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise LensError(f"{path.name} does not hold a flat mapping of names to tensors; save the bare state dict.")
    return {str(name): tensor for name, tensor in values.items()}
