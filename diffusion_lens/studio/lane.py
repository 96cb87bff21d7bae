"""One compute lane that all visitors share, taken in turns.

A slider move waits for one step of a running sweep at most; sweeps take turns with each other step by step, so
nobody's long run stops another's. Every visitor can stop their own work, and nobody else's.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 4.0
"""Seconds after which a waiting sweep goes before a slider move that has only just come."""

MAX_VISITORS = 1000


class Turn:
    """Somebody's hold on the lane."""

    def __init__(self, lane: Lane, urgent: bool) -> None:
        self._lane = lane
        self._urgent = urgent

    def give_way(self) -> None:
        """Between two steps: let whoever waits go first, then go on. Urgent work runs through."""
        if not self._urgent:
            self._lane.swap(self._urgent)


class Lane:
    """A fair lock: first come, first served, with a head start of ``PATIENCE`` seconds for urgent work."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._waiting: list[tuple[float, int]] = []
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def hold(self, *, urgent: bool) -> Iterator[Turn]:
        """Wait for the lane and keep it for the block."""
        self._enter(urgent)
        try:
            yield Turn(self, urgent)
        finally:
            self._leave()

    def swap(self, urgent: bool) -> None:
        """Leave and queue again, if anybody waits."""
        if self._waiting:
            self._leave()
            self._enter(urgent)

    def _enter(self, urgent: bool) -> None:
        with self._changed:
            ticket = (time.monotonic() + (0.0 if urgent else PATIENCE), next(self._numbers))
            heapq.heappush(self._waiting, ticket)
            self._changed.wait_for(lambda: not self._taken and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            self._taken = True

    def _leave(self) -> None:
        with self._changed:
            self._taken = False
            self._changed.notify_all()


class Stops:
    """Visitor → the flag that ends their running work; the oldest of many visitors are forgotten."""

    def __init__(self) -> None:
        self._flags: OrderedDict[str, threading.Event] = OrderedDict()
        self._guard = threading.Lock()

    def start(self, visitor: str) -> threading.Event:
        """A fresh flag for new work; what the visitor ran before is told to stop."""
        with self._guard:
            before = self._flags.pop(visitor, None)
            if before is not None:
                before.set()
            flag = self._flags[visitor] = threading.Event()
            while len(self._flags) > MAX_VISITORS:
                self._flags.popitem(last=False)[1].set()
            return flag

    def stop(self, visitor: str) -> None:
        """End the visitor's work at its next step."""
        with self._guard:
            flag = self._flags.pop(visitor, None)
        if flag is not None:
            flag.set()
