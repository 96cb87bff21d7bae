"""How the app is doing: memory, queue and caches, for whoever runs it."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_lens.studio.studio import Studio

STARTED = time.monotonic()
MB = 2**20


@dataclass(frozen=True)
class Status:
    """One look at a running app.

    Attributes:
        seconds: since it was started. memory_mb: resident now; ``peak_mb``: at most so far; 0 where the system does
            not tell.
        drawing: whether somebody has the lane. waiting: how many wait for it. running: works that can be stopped.
        lenses: name → what is kept of it.
    """

    seconds: float
    memory_mb: float
    peak_mb: float
    drawing: bool
    waiting: int
    running: int
    lenses: dict[str, Kept]

    @property
    def lines(self) -> tuple[str, ...]:
        """The same for a person."""
        queue = f"{'drawing' if self.drawing else 'idle'}, {self.waiting} waiting, {self.running} under way or stopped"
        return (
            f"Up for {self.seconds / 3600:.1f} h; memory {self.memory_mb:,.0f} MB, at most {self.peak_mb:,.0f} MB.",
            f"Queue: {queue}.",
            *(
                f"{name}: model {'loaded' if kept.model_loaded else 'not loaded yet'}; kept {kept.runs} unedited runs "
                f"({kept.runs_mb:.1f} MB) and {kept.rows} rows of images ({kept.rows_mb:.1f} MB)."
                for name, kept in self.lenses.items()
            ),
        )


@dataclass(frozen=True)
class Kept:
    """What is kept of one lens for the next visitor, shared by all."""

    model_loaded: bool
    runs: int
    runs_mb: float
    rows: int
    rows_mb: float


def status(studios: Sequence[Studio]) -> Status:
    """How the app of these studios is doing now."""
    first = studios[0]
    now, peak = _resident()
    return Status(
        time.monotonic() - STARTED, now / MB, peak / MB, first.lane.drawing, first.lane.waiting, first.stops.n_running,
        {studio.lens.manifest.name: _kept(studio) for studio in studios},
    )  # fmt: skip


def _kept(studio: Studio) -> Kept:
    runs, rows = studio.bases, studio.rows
    return Kept(studio.lens.is_ready, len(runs), runs.bytes / MB, len(rows), rows.bytes / MB)


def _resident() -> tuple[int, int]:
    """Resident bytes now and at most, 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            told: dict[str, Any] = dict(line.split(":", 1) for line in file)
        return int(told["VmRSS"].split()[0]) * 1024, int(told["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0, 0


def give_back() -> None:
    """Return freed memory to the system: a C library that keeps it for later never would by itself."""
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


def _trim() -> Any:
    """``malloc_trim`` of glibc; ``None`` elsewhere."""
    if not sys.platform.startswith("linux") or "ANDROID_ROOT" in os.environ:
        return None
    try:
        return getattr(ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6"), "malloc_trim", None)
    except OSError:
        return None
