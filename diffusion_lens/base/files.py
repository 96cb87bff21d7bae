"""Files on disk: JSON, safetensors, digests; written whole or not at all. No pickles are ever read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.types import LensError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_SIGNS = ("os error 28", "os error 122", "No space left", "failed writing file", "unexpected pos")
"""How safetensors and torch tell of a full disk, in words of their own."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What goes wrong while writing to ``path``, by whatever library it is noticed, as one ``LensError`` sentence."""
    try:
        yield
    except LensError:
        raise
    except Exception as error:
        told = _disk_error(error, path)
        if told is None:
            raise
        raise LensError(told) from error


def _disk_error(error: Exception, path: Path) -> str | None:
    """The sentence for an error of the disk; ``None`` for any other error."""
    code = error.errno if isinstance(error, OSError) else None
    place = path
    if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
        place = Path(error.filename)
    folder = next((p for p in (place, *place.absolute().parents) if p.is_dir()), place)
    if code in FULL or any(sign in str(error) for sign in FULL_SIGNS):
        return f"The disk under {folder} is full ({_free(folder)} free); make room and give the same command again."
    if code == errno.EROFS:
        return f"The disk under {folder} is read-only; choose another place."
    if code in (errno.EACCES, errno.EPERM):
        return f"You may not write to {place}; choose another place, or change who may write there."
    if code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"{place} cannot be written: a file stands where a folder should be, or the other way round."
    if code is not None and type(error) not in (FileNotFoundError, BrokenPipeError, ConnectionError):
        return f"{place} cannot be written: {error.strerror or error}."  # type: ignore[attr-defined]
    return None


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    except OSError:
        return "nothing"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour that replaces ``path`` on success: a killed run leaves no half file.

    Its bytes are on the disk before it takes the name. Raises ``LensError`` for a full, read-only or forbidden disk.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        try:
            yield partial
            flush(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return when a file's bytes are on the disk, and not in the system's memory alone."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """The same for a folder's list of files; systems that cannot do it do nothing."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def check_empty(folder: Path) -> None:
    """Raise ``LensError`` where ``folder`` is there and holds anything but hidden files."""
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise LensError(f"{folder} is not empty; choose a new folder.")


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
    except (ValueError, RecursionError):
        # Not JSON or not UTF-8; also a number of too many digits, or brackets nested too deep.
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
