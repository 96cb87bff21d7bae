"""A lens on disk: one folder of safetensors, JSON and WebP, described and sealed by ``lens.json``.

No pickles are ever read. Every file is listed with its size and sha256, so that a
missing, truncated, altered or foreign file is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import Field

from diffusion_lens.config import Setting, StrictConfig
from diffusion_lens.types import Attribute, LensError

FORMAT_VERSION = 1
MANIFEST = "lens.json"


class FileSeal(StrictConfig):
    """Size in bytes and sha256 (64 hex digits) of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BaseModelRef(StrictConfig):
    """The diffusion model that a lens opens.

    ``bundled``: the pipeline lies in ``pipeline/`` of the lens; otherwise ``source`` is a hub id or a folder.
    ``id`` is the name under which requests and the SAE know the model, on any machine.
    """

    id: str
    source: str
    revision: str | None = None
    bundled: bool = False


class AttributeConfig(StrictConfig):
    """An attribute and its ordered classes, as stored."""

    name: str
    classes: tuple[str, ...] = Field(min_length=2)

    def attribute(self) -> Attribute:
        """The result type of the same content."""
        return Attribute(self.name, self.classes)


class Manifest(StrictConfig):
    """``lens.json``: what a lens holds and how its images are made.

    Attributes:
        attributes: those the lens steers; ``nuisances``: those the classifier reads besides.
        prompts: suggested prompts (``""`` is the empty prompt); empty for unconditional models.
        vocabulary: the words the model knows; ``None`` for models with an open vocabulary.
        settings: attribute → the shipped turn.
        classifier_id: of the one that judges images; ``labeller_id``: of the one whose reading trained the probes.
        files: path inside the folder → its seal; ``lens.json`` itself is not listed.
    """

    format_version: int = FORMAT_VERSION
    name: str
    base_model: BaseModelRef
    hook_name: str
    scheduler: str
    n_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    attributes: tuple[AttributeConfig, ...] = Field(min_length=1)
    nuisances: tuple[AttributeConfig, ...] = ()
    prompts: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)
    sae_id: str
    classifier_id: str
    labeller_id: str | None = None
    files: dict[str, FileSeal] = Field(default_factory=dict)

    @property
    def lens_id(self) -> str:
        """First 16 hex digits of the manifest's sha256: names the lens with every file in it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


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


def seal(folder: Path) -> dict[str, FileSeal]:
    """Size and sha256 of every file under ``folder`` that belongs to a lens, by relative path, sorted."""
    return {
        name: FileSeal(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in sorted(_content(folder))
        if "/" in name or name.endswith(".safetensors")
    }


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Seal every file of ``folder`` and write ``lens.json``; returns the manifest with its seals."""
    sealed = manifest.model_copy(update={"files": seal(folder)})
    write_json(folder / MANIFEST, sealed.model_dump(mode="json"))
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """Read ``lens.json``; raises ``LensError`` if this is no lens, a newer one, or has a wrong key."""
    if not folder.is_dir():
        raise LensError(f"There is no folder {folder}; check the path of the lens.")
    if not (folder / MANIFEST).is_file():
        raise LensError(f"{folder} is not a lens: {MANIFEST} is missing.")
    values = read_json(folder / MANIFEST)
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise LensError(f"{folder / MANIFEST} is not a lens manifest: it has no format_version.")
    if version != FORMAT_VERSION:
        raise LensError(
            f"{folder / MANIFEST} has format {version}; this program reads format {FORMAT_VERSION}. "
            f"{'Update the program.' if version > FORMAT_VERSION else 'Fit the lens again.'}"
        )
    return Manifest.parse(values, where=MANIFEST)


def verify(folder: Path, manifest: Manifest | None = None) -> Manifest:
    """Check every file of a lens against its seal.

    Raises ``LensError`` naming the first file that is missing, truncated, altered (with both sha256),
    outside the folder, or foreign (not listed, yet in a subfolder from which the lens is read).
    """
    manifest = manifest or read_manifest(folder)
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    foreign = sorted(name for name in _content(folder) if "/" in name and name not in manifest.files)
    if foreign:
        raise LensError(f"{foreign[0]} does not belong to this lens ({folder}); remove it.")
    return manifest


def _check_file(folder: Path, name: str, expected: FileSeal) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise LensError(f"{MANIFEST} names '{name}', which lies outside the lens folder; do not use this lens.")
    path = folder / name
    if not path.is_file():
        raise LensError(f"{name} is missing from the lens {folder}; restore it from the original.")
    size = path.stat().st_size
    if size < expected.bytes:
        raise LensError(f"{name} is truncated: {size:,} of {expected.bytes:,} bytes; restore it from the original.")
    digest = sha256_of(path)
    if digest != expected.sha256:
        raise LensError(
            f"{name} is not the file of this lens: its sha256 is {digest}, expected {expected.sha256}; "
            "restore it from the original."
        )


def _content(folder: Path) -> Iterator[str]:
    """Relative paths of the files under ``folder``; hidden files and folders belong to other tools."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()
