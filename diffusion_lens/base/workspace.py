"""Do a piece of work once, keep it whole, find it again: what every long run stands on that may be stopped.

A piece lies under its key, and the key says everything that decides it: whoever asks for the same finds it, whoever
changes a setting makes another. A piece takes its name only when all of it is on the disk, so that a killed run leaves
none by halves, and several processes may work in one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diffusion_lens.base.files import (
    disk_errors,
    flush,
    flush_folder,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)  # fmt: skip
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError

T = TypeVar("T")
DIGITS = 12


def digest(decides: object) -> str:
    """Twelve hex digits over plain values (and what ``str`` makes of others): equal ones give equal digits."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@dataclass(frozen=True)
class Workspace:
    """A folder of finished pieces. It need not be there before the first one is kept.

    A key is the piece's file or folder name. Where what decides a piece does not fit into a name, ``part`` makes a
    workspace of its own for it.
    """

    folder: Path

    def part(self, name: str, decides: object = None) -> Workspace:
        """The workspace ``name`` in this one; ``decides``: plain values that its pieces depend on."""
        return Workspace(self.folder / (name if decides is None else f"{name}-{digest(decides)}"))

    def path(self, key: str) -> Path:
        """Where a piece lies, or will."""
        return self.folder / key

    def has(self, *keys: str) -> bool:
        """Whether all of these pieces are there."""
        return all(self.path(key).exists() for key in keys)

    def keep(
        self,
        key: str,
        make: Callable[[], T],
        save: Callable[[Path, T], object],
        progress: Progress | None = None,
    ) -> Path:
        """``make`` a piece unless it is there, and ``save`` it as a file or a folder; returns its path.

        ``progress``: the part of the bar that belongs to this piece; a piece that is found fills it at once.
        Raises ``LensError`` where the disk is full or may not be written.
        """
        path = self.path(key)
        if path.exists():
            if progress is not None:
                progress.found()
            return path
        value = make()
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        with disk_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save(partial, value)
                _settle(partial)
                _take_name(partial, path)
            finally:
                _remove(partial)
        return path

    def piece(
        self,
        key: str,
        make: Callable[[], T],
        save: Callable[[Path, T], object],
        load: Callable[[Path], T],
        progress: Progress | None = None,
    ) -> T:
        """A piece, made by ``make`` unless it is there; always as ``load`` reads it, so that both ways are equal."""
        return load(self.keep(key, make, save, progress))

    def tensors(
        self, key: str, make: Callable[[], dict[str, np.ndarray]], progress: Progress | None = None
    ) -> dict[str, np.ndarray]:
        """A piece that is a few arrays, as ``<key>.safetensors``."""
        return self.piece(f"{key}.safetensors", make, save_tensors, load_tensors, progress)

    def values(self, key: str, make: Callable[[], Any], progress: Progress | None = None) -> Any:
        """A piece that is plain values, as ``<key>.json``; always as JSON gives them back."""
        return self.piece(f"{key}.json", make, write_json, read_json, progress)

    def claim(self, key: str, decides: Any, refusal: str) -> None:
        """Note as ``<key>.json`` what decides every piece here; raises ``LensError(refusal)`` where it says other."""
        if self.values(key, lambda: decides) != json.loads(json.dumps(decides)):
            raise LensError(refusal)

    def names(self, pattern: str) -> list[Path]:
        """The pieces that match a glob pattern, sorted by name."""
        return sorted(path for path in self.folder.glob(pattern) if not path.name.startswith("."))


def _settle(path: Path) -> None:
    for inner in (path, *path.rglob("*")) if path.is_dir() else (path,):
        flush_folder(inner) if inner.is_dir() else flush(inner)


def _take_name(partial: Path, path: Path) -> None:
    """Give a finished piece its name; where another process was first, its piece stays, for it is the same."""
    try:
        os.rename(partial, path) if partial.is_dir() else os.replace(partial, path)
    except OSError:
        if not path.is_dir():
            raise
    flush_folder(path.parent)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
