"""Disks that are full, read-only or not one's own, for one folder alone; the rest of the machine works as ever."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAULTS = {
    errno.ENOSPC: r"The disk under .* is full \(.* GB free\); make room and give the same command again\.",
    errno.EROFS: r"The disk under .* is read-only; choose another place\.",
    errno.EACCES: r"There is no permission for .*; choose another place, or change who may write there\.",
}
"""Error number → what a person should be told."""


def break_disk(patch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    """Let every attempt to write under ``folder`` fail as the system would; on a full disk names can still change."""
    root = folder.absolute()

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(root)

    def broken(real: Callable[..., Any], writes: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if inside(path) and writes(*args, **kwargs):
                raise OSError(code, os.strerror(code), os.fspath(path))
            return real(path, *args, **kwargs)

        return call

    def mode_writes(mode: str = "r", *_: Any, **__: Any) -> bool:
        return any(letter in mode for letter in "wax+")

    def flags_write(flags: int, *_: Any, **__: Any) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    patch.setattr(io, "open", broken(io.open, mode_writes))
    patch.setattr("builtins.open", io.open)
    patch.setattr(os, "open", broken(os.open, flags_write))
    for name in ("mkdir",) if code == errno.ENOSPC else ("mkdir", "rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, broken(getattr(os, name)))
