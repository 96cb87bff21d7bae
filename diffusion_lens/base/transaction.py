"""Several files of one folder changed together: all of them or none, by one process at a time.

New files are written to a folder of their own (``STAGED``). Once all of them are on the disk, that folder is renamed
to ``PENDING``: from then on the change counts. Its files then move to their places, and whoever finds ``PENDING``
after a kill moves the rest. Every moment so leaves the old files or the new ones.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from diffusion_lens.base.files import disk_errors, flush, flush_folder, read_json, write_json
from diffusion_lens.base.types import LensError

if TYPE_CHECKING:
    from filelock import FileLock

T = TypeVar("T")
log = logging.getLogger(__name__)

LOCK, WRITER, STAGED, PENDING = ".lens-lock", ".lens-writer", ".lens-staged", ".lens-pending"
"""The lock, who holds it, and the two stages of a change; hidden, since they are no content."""
JOURNAL = ".journal.json"
PATIENCE = 600.0
"""Seconds to wait for another writer."""
TRIES = 20
"""How often a reader begins anew because somebody changed the folder meanwhile."""


@dataclass(frozen=True)
class Change:
    """A change of ``folder`` under way: files written to ``staged`` get the same names in ``folder``."""

    folder: Path
    staged: Path

    def names(self) -> list[str]:
        """The staged files, by their names in the folder, sorted."""
        return sorted(path.relative_to(self.staged).as_posix() for path in self.staged.rglob("*") if path.is_file())

    def commit(self, *, removed: Iterable[str] = (), last: str | None = None) -> None:
        """Let the staged files take their places, and remove the files ``removed``; ``last`` is moved at the end."""
        names = self.names()
        gone = sorted(set(removed) - set(names))
        for name in gone:
            check_inside(self.folder, name)
        with disk_errors(self.folder):
            write_json(self.staged / JOURNAL, {"removed": gone, "last": last})
            for path in (self.staged, *self.staged.rglob("*")):
                flush_folder(path) if path.is_dir() else flush(path)
            os.rename(self.staged, self.folder / PENDING)
            flush_folder(self.folder)
            _finish(self.folder)


@contextmanager
def changing(folder: Path, patience: float = PATIENCE) -> Iterator[Change]:
    """Hold the folder's lock and make a ``Change`` of it; what is not committed at the end of the block is dropped.

    Raises ``LensError`` that names the process that holds the lock after ``patience`` seconds, and for a folder that
    cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, patience):
        staged = folder / STAGED
        with disk_errors(folder):
            _finish(folder)
            shutil.rmtree(staged, ignore_errors=True)  # of a writer that was killed: the lock was free
            staged.mkdir()
        try:
            yield Change(folder, staged)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def settle(folder: Path, patience: float = PATIENCE) -> None:
    """Finish a change whose writer was killed; wait for one whose writer lives."""
    if (folder / PENDING).is_dir():
        with _locked(folder, patience), disk_errors(folder):
            _finish(folder)


def read_whole(folder: Path, index: str, read: Callable[[], T]) -> T:
    """What ``read`` makes of a folder that nobody changed meanwhile; begins anew where somebody did.

    ``index``: a file that every change replaces. Needs no right to write, except to finish a killed writer's change.
    """
    for _ in range(TRIES):
        settle(folder)
        before = _content(folder / index)
        try:
            value = read()
        except (LensError, OSError):
            if _same(folder, index, before):
                raise
            continue
        if _same(folder, index, before):
            return value
    raise LensError(f"{folder} keeps changing while it is read; wait until its writer has ended.")


def check_inside(folder: Path, name: str) -> None:
    """Raise ``LensError`` for the name of a file that would lie outside ``folder``."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise LensError(f"'{name}' lies outside the lens folder {folder}; do not use this lens.")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _same(folder: Path, index: str, before: bytes | None) -> bool:
    return not (folder / PENDING).is_dir() and _content(folder / index) == before


@contextmanager
def _locked(folder: Path, patience: float) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        with disk_errors(folder):
            _acquire(lock, folder, patience)
    except Timeout:
        raise LensError(f"{folder} is being written by {_writer(folder)}; try again when that has ended.") from None
    except NotImplementedError:
        raise LensError(f"The disk under {folder} cannot lock files; keep the lens on another disk.") from None
    try:
        with disk_errors(folder):
            own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            (folder / WRITER).write_text(json.dumps(own), encoding="utf-8")
        yield
    finally:
        (folder / WRITER).unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, folder: Path, patience: float) -> None:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("Waiting for %s, which writes %s.", _writer(folder), folder)
        lock.acquire(timeout=patience)


def _writer(folder: Path) -> str:
    try:
        found = json.loads((folder / WRITER).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} (since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _finish(folder: Path) -> None:
    """Move what is pending to its places; may be killed and begun again at any point. Under the lock alone."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    if (pending / JOURNAL).is_file():
        removed, last = _read_journal(pending / JOURNAL)
        left = Change(folder, pending).names()
        for name in removed:
            check_inside(folder, name)
        for name in removed:
            (folder / name).unlink(missing_ok=True)
        for name in sorted(set(left) - {JOURNAL, last}):
            _move(pending / name, folder / name)
        for name in removed:
            _prune((folder / name).parent, folder)
        flush_folder(folder)
        if last in left:
            _move(pending / last, folder / last)
            flush_folder(folder)
        (pending / JOURNAL).unlink()
    shutil.rmtree(pending)


def _read_journal(path: Path) -> tuple[list[str], str | None]:
    values = read_json(path)
    try:
        return [str(name) for name in values["removed"]], values["last"]
    except (KeyError, TypeError):
        raise LensError(f"{path} is not the journal of a change; remove {path.parent}.") from None


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    flush_folder(target.parent)


def _prune(empty: Path, root: Path) -> None:
    """Remove folders that a removed file leaves empty."""
    while empty != root and empty.is_dir() and not any(empty.iterdir()):
        empty.rmdir()
        empty = empty.parent
