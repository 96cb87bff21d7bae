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
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from diffusion_lens.base.text import read_text
from diffusion_lens.base.types import LensError

MAX_JSON_PARTS = 4_000_000
"""Commas, colons and brackets of a JSON file, each of which may become some 100 bytes of memory."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_SIGNS = ("os error 28", "os error 27", "os error 122", "No space left", "failed writing file", "unexpected pos")
"""How safetensors and torch tell of a full disk, in words of their own."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What goes wrong while writing to ``path``, by whatever library it is noticed, as one ``LensError`` sentence."""
    try:
        yield
    except LensError:
        raise
    except Exception as error:
        told = disk_sentence(error, path)
        if told is None:
            raise
        raise LensError(told) from error


def disk_sentence(error: Exception, path: Path | None = None) -> str | None:
    """What a person can do about an error of a disk; ``None`` for any other error.

    ``path``: what was being written, where the error does not say it.
    """
    code = error.errno if isinstance(error, OSError) else None
    # Of a copy, the first name is the source's.
    names = (error.filename2, error.filename) if isinstance(error, OSError) else ()
    place = next((Path(name) for name in names if isinstance(name, str | os.PathLike)), path)
    if code in FULL or any(sign in str(error) for sign in FULL_SIGNS):
        return f"{_disk_of(place)} is full{_free(place)}; make room and give the same command again."
    if code == errno.EROFS:
        return f"{_disk_of(place)} is read-only; choose another place."
    if place is None or code is None or isinstance(error, FileNotFoundError | ConnectionError):
        return None
    if code in (errno.EACCES, errno.EPERM):
        return f"There is no permission for {place}; choose another place, or change who may write there."
    if code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"{place} cannot be written: a file stands where a folder should be, or the other way round."
    return f"{place} cannot be written: {os.strerror(code)}."


def _disk_of(place: Path | None) -> str:
    return "The disk that was written to" if place is None else f"The disk under {_folder_of(place)}"


def _folder_of(place: Path) -> Path:
    return next((p for p in (place, *place.absolute().parents) if p.is_dir()), place)


def _free(place: Path | None) -> str:
    if place is None:
        return ""
    try:
        return f" ({shutil.disk_usage(_folder_of(place)).free / 1e9:.1f} GB free)"
    except OSError:
        return ""


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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of several files: it takes the place of one that is there when all of it is written."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, former = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("partial", "former"))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for inner in (partial, *partial.rglob("*")):
                flush_folder(inner) if inner.is_dir() else flush(inner)
            if path.exists():
                os.rename(path, former)
            os.rename(partial, path)
            flush_folder(path.parent)
        finally:
            if former.exists() and not path.exists():
                os.rename(former, path)
            shutil.rmtree(former, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)


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


def check_writable(path: Path) -> None:
    """Raise ``LensError`` where ``path``, a file or folder to be, could not be written; best before the work begins."""
    folder = next(p for p in (path, *path.absolute().parents) if p.exists())
    with disk_errors(path):
        if not folder.is_dir() and folder != path:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        with TemporaryFile(dir=folder if folder.is_dir() else folder.absolute().parent) as file:
            file.write(b"0")


def check_empty(folder: Path) -> None:
    """Raise ``LensError`` where ``folder`` is there and holds anything but hidden files."""
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise LensError(f"{folder} is not empty; choose a new folder.")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as it is, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(text.encode("utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, whole or not at all."""
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)


def write_json(path: Path, values: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all; non-finite numbers are refused (``ValueError``).

    ``indent``: for what people read and version control compares; results are written without.
    """
    separators = (",", ":") if indent is None else None
    text = json.dumps(values, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path, *, infinite: bool = False) -> Any:
    """Read JSON; raises ``LensError`` that names the file.

    ``infinite``: take ``Infinity`` and ``NaN`` too, which diffusers writes into configurations of samplers.
    """
    if not path.exists():
        raise LensError(f"{path.name} is missing from {path.parent}.")
    return parse_json(read_text(path), path, infinite=infinite)


def parse_json(text: str, path: Path, *, infinite: bool = False) -> Any:
    """The values of a JSON text that stands in ``path``; ``LensError`` for none, too many, or nested too deep."""
    if sum(map(text.count, ",:[{")) > MAX_JSON_PARTS:
        raise LensError(f"{path} holds more than {MAX_JSON_PARTS:,} values; restore it from the original.")
    try:
        return json.loads(text, parse_constant=None if infinite else _refuse)
    except (ValueError, RecursionError):
        # Not JSON; also a number of too many digits or none at all, or brackets nested too deep.
        raise LensError(f"{path} is not readable JSON; restore it from the original.") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


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


def load_header(path: Path, name: str) -> Any:
    """The JSON that a safetensors file keeps under ``name`` in its header; raises ``LensError`` that names the file."""
    metadata = load_metadata(path)
    if name not in metadata:
        raise LensError(f"{path} says nothing of '{name[:40]}' in its header; restore it from the original.")
    return parse_json(metadata[name], path)


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
