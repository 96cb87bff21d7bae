"""Several processes on one piece of work: who takes what, and when all are done.

Started by ``accelerate launch`` (or ``torchrun``), each process takes every so-manieth batch and writes it to the
same folder; a barrier ends the stage. Started plainly, there is one process and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from diffusion_lens.base.types import LensError

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long the others wait for the main process, which fits alone for hours."""


def _no_wait() -> None:
    """One process waits for nobody."""


@dataclass(frozen=True)
class Processes:
    """This process among ``count``.

    Attributes:
        index: from 0; process 0 is the main one. local: the index on this machine, which picks the GPU.
        wait: returns when every process has called it.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    wait: Callable[[], None] = _no_wait

    @property
    def is_main(self) -> bool:
        """Whether this process does what cannot be shared."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's own items; over all processes they make up ``items``, each once."""
        return list(items[self.index :: self.count])

    def device(self, name: str) -> str:
        """The device of this process: a GPU of its own where ``name`` is just ``cuda``."""
        return f"cuda:{self.local}" if name == "cuda" and self.count > 1 else name


ALONE = Processes()


def launched() -> Processes:
    """What a launcher made of this process; ``ALONE`` without one. Raises ``LensError`` without accelerate."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError:
        raise LensError("Several processes need accelerate; install it with: pip install accelerate.") from None
    # The barriers go through the processors also where the work is on GPUs: a wait of hours must not hold a GPU.
    state = PartialState(cpu=True, timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.local_process_index, state.wait_for_everyone)
