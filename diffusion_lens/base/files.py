"""Files on disk: JSON, safetensors, digests; written whole or not at all. No pickles are ever read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.types import LensError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour that replaces ``path`` on success: a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON, whole or not at all; non-finite numbers are refused (``ValueError``)."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; raises ``LensError`` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LensError(f"{path.name} is missing from {path.parent}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise LensError(f"{path} is not readable JSON; restore it from the original.") from None


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write numpy arrays or torch tensors as one safetensors file, whole or not at all.

    ``metadata``: text → text, kept in the file's header, sorted: equal content makes equal files.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(_as_numpy(value)) for name, value in tensors.items()}
    with atomic_path(path) as partial:
        save_file(arrays, partial, metadata=dict(metadata) if metadata else None)
        if metadata and len(metadata) > 1:
            _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order; the library writes them in another one each time."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a safetensors file; raises ``LensError`` that names a missing or damaged file."""
    with _open_tensors(path) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no dict


def load_metadata(path: Path) -> dict[str, str]:
    """The text → text header of a safetensors file (empty if it has none)."""
    with _open_tensors(path) as handle:
        return dict(handle.metadata() or {})


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LensError(f"{path.name} is missing from {path.parent}.")
    try:
        with safe_open(str(path), framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise LensError(f"{path} is damaged ({error}); restore it from the original.") from None


def _as_numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
