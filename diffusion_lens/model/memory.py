"""Batches that shrink when memory runs out: halve once, say so, go on."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import GenerationRequest

T = TypeVar("T")
Draw = Callable[[GenerationRequest, Callable[[int], None]], T]
"""Draws one batch; told how to report its own steps."""

log = logging.getLogger(__name__)
SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@dataclass
class Room:
    """How many images of a model fit at once, as far as is known; shared by its threads."""

    limit: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def fits(self, n: int) -> int:
        """``n``, or fewer where more have failed before."""
        with self.lock:
            return n if self.limit is None else min(n, self.limit)

    def halve(self, n: int) -> int:
        """Note that ``n`` were too many and log a warning; returns half, which later runs keep to."""
        half = max(1, n // 2)
        with self.lock:
            self.limit = half if self.limit is None else min(half, self.limit)
        log.warning(
            "Memory ran out with %d images at once; going on with %d. Images are those of the smaller batch: the "
            "same up to the last bits.", n, half,
        )  # fmt: skip
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return half


def in_batches(
    room: Room, request: GenerationRequest, batch_size: int, steps: int, draw: Draw[T], progress: Progress | None = None
) -> Iterator[T]:
    """``draw`` the request's seeds, ``batch_size`` at a time, in order; one result per batch.

    Where memory runs out, the batch is halved once and drawn again; a second time the error is raised. The results
    are those of the smaller ``batch_size`` from that batch on.
    ``progress``: ``steps`` per batch; their number grows where batches shrink.
    """
    bar = progress or Progress()
    size, may_halve, done, offset, n = room.fits(batch_size), True, 0, 0, len(request.seeds)
    while offset < n:
        part = replace(request, seeds=request.seeds[offset : offset + size])
        total = (done + -(-(n - offset) // size)) * steps
        full = False
        try:
            result = draw(part, _steps_after(bar, done * steps, total))
        except Exception as error:
            full = may_halve and len(part.seeds) > 1 and is_out_of_memory(error)
            if not full:
                raise
        if full:  # outside the handler: the traceback no longer holds the tensors that did not fit
            size, may_halve = room.halve(len(part.seeds)), False
            continue
        yield result
        offset, done = offset + len(part.seeds), done + 1


def _steps_after(progress: Progress, done: int, total: int) -> Callable[[int], None]:
    return lambda steps: progress.step(done + steps, total)
