"""One compute lane that all visitors share, taken in turns.

A slider move waits for one step of a running sweep at most; sweeps take turns with each other step by step, so
nobody's long run stops another's. Whoever waits can be told how many are before them and about how long it takes.
Every visitor can stop their own work, and nobody else's, and has one long job at a time.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffusion_lens.base.types import LensError

PATIENCE = 4.0
"""Seconds after which a waiting sweep goes before a slider move that has only just come."""

TELL_EVERY = 0.5
"""Seconds between two tellings of whoever waits."""

MAX_VISITORS = 1000
MEMORY = 0.7
"""Share of the former estimate that stays when another turn has been timed."""

PLACES = {"sweep": "Sweep", "mix": "Explore", "balance": "Explore", "methods": "Methods"}
"""Where a long work is begun, as the app's tabs are called."""


@dataclass(frozen=True)
class Wait:
    """What somebody in the queue can be told: how many go before them, and about how many seconds that takes."""

    ahead: int
    seconds: float

    @property
    def text(self) -> str:
        """``busy: 3 before you, about 40 s``."""
        before = f"{self.ahead} before you" if self.ahead > 1 else "one before you"
        return f"busy: {before}, about {max(1, round(self.seconds))} s"


@dataclass(eq=False)
class Ticket:
    """Somebody's place in the queue; ``turns``, ``used``: how often and how many seconds this work had the lane."""

    number: int
    urgent: bool
    since: float
    used: float = 0.0
    turns: int = 0


@dataclass
class Line:
    """Who goes next, as plain data: no threads and no clock of its own.

    Urgent work goes in order of arrival, before long work that has waited less than ``PATIENCE`` longer. Of long works
    the one goes that has had least of the lane, so that all progress alike whatever their steps cost.
    """

    waiting: list[Ticket] = field(default_factory=list)
    running: Ticket | None = None
    began: float = 0.0

    def join(self, ticket: Ticket, now: float) -> None:
        """Queue up. A long work that is new counts as having had as much as the one that has had least."""
        ticket.since = now
        had = [t.used for t in self.waiting if not t.urgent]
        if self.running is not None and not self.running.urgent:
            had.append(self.running.used + now - self.began)
        if not ticket.turns:
            ticket.used = min(had, default=0.0)
        self.waiting.append(ticket)

    def drop(self, ticket: Ticket) -> None:
        """Leave the queue without a turn."""
        self.waiting.remove(ticket)

    def order(self) -> list[Ticket]:
        """Everybody who waits, next first."""
        urgent = sorted((t for t in self.waiting if t.urgent), key=lambda t: (t.since, t.number))
        long = sorted((t for t in self.waiting if not t.urgent), key=lambda t: (t.used, t.number))
        found: list[Ticket] = []
        while urgent and long:
            late = min(t.since for t in long) + PATIENCE < urgent[0].since
            found.append((long if late else urgent).pop(0))
        return found + urgent + long

    def start(self, ticket: Ticket, now: float) -> None:
        """Give the lane to whoever is next."""
        self.waiting.remove(ticket)
        ticket.turns += 1
        self.running, self.began = ticket, now

    def end(self, now: float) -> float:
        """The lane is free again; returns how many seconds it was held."""
        assert self.running is not None
        seconds = now - self.began
        self.running.used += seconds
        self.running = None
        return seconds


class Turn:
    """Somebody's hold on the lane."""

    def __init__(self, lane: Lane, ticket: Ticket, tell: Callable[[Wait], None] | None) -> None:
        self._lane = lane
        self._ticket = ticket
        self._tell = tell

    def give_way(self) -> None:
        """Between two steps: let whoever waits go first, then go on. Urgent work runs through."""
        if not self._ticket.urgent:
            self._lane.swap(self._ticket, self._tell)


class Lane:
    """A fair lock (see ``Line``); ``clock`` tells seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._changed = threading.Condition()
        self._line = Line()
        self._numbers = itertools.count()
        self._clock = clock
        self._mean = {True: 1.0, False: 1.0}

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._line.waiting)

    @property
    def drawing(self) -> bool:
        """Whether somebody has the lane."""
        return self._line.running is not None

    @contextmanager
    def hold(self, *, urgent: bool, tell: Callable[[Wait], None] | None = None) -> Iterator[Turn]:
        """Wait for the lane and keep it for the block. ``tell`` hears now and then how long it still takes.

        What ``tell`` raises ends the waiting.
        """
        ticket = Ticket(next(self._numbers), urgent, self._clock())
        self._enter(ticket, tell)
        try:
            yield Turn(self, ticket, tell)
        finally:
            self._leave(ticket)

    def swap(self, ticket: Ticket, tell: Callable[[Wait], None] | None = None) -> None:
        """Leave and queue again, if anybody waits."""
        if self._line.waiting:
            self._leave(ticket)
            self._enter(ticket, tell)

    def _enter(self, ticket: Ticket, tell: Callable[[Wait], None] | None) -> None:
        with self._changed:
            self._line.join(ticket, self._clock())
            try:
                while not self._is_next(ticket):
                    self._changed.wait(None if tell is None else TELL_EVERY)
                    if tell is not None and not self._is_next(ticket):
                        tell(self._wait_of(ticket))
            except BaseException:
                self._line.drop(ticket)
                self._changed.notify_all()
                raise
            self._line.start(ticket, self._clock())

    def _is_next(self, ticket: Ticket) -> bool:
        return self._line.running is None and self._line.order()[0] is ticket

    def _wait_of(self, ticket: Ticket) -> Wait:
        before = self._line.order()
        before = before[: before.index(ticket)]
        running = self._line.running
        left = 0.0 if running is None else max(0.0, self._mean[running.urgent] - (self._clock() - self._line.began))
        seconds = left + sum(self._mean[t.urgent] for t in before)
        return Wait(len(before) + (running is not None), seconds)

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            if self._line.running is not ticket:  # its waiting was ended
                return
            seconds = self._line.end(self._clock())
            self._mean[ticket.urgent] = MEMORY * self._mean[ticket.urgent] + (1 - MEMORY) * seconds
            self._changed.notify_all()


class Stops:
    """Owner (``visitor:work``) → the flag that ends their running work; the oldest of many are forgotten.

    A visitor without a name (who acts before the page has loaded) gets a flag that nobody else's work can end.
    """

    def __init__(self) -> None:
        self._flags: OrderedDict[str, threading.Event] = OrderedDict()
        self._long: dict[str, tuple[str, int]] = {}
        self._guard = threading.Lock()

    def start(self, owner: str) -> threading.Event:
        """A fresh flag for new work; what the visitor ran before under this name is told to stop."""
        flag = threading.Event()
        if owner.startswith(":"):
            return flag
        with self._guard:
            before = self._flags.pop(owner, None)
            if before is not None:
                before.set()
            self._flags[owner] = flag
            while len(self._flags) > MAX_VISITORS:
                self._flags.popitem(last=False)[1].set()
            return flag

    def stop(self, owner: str) -> None:
        """End the visitor's work at its next step."""
        with self._guard:
            flag = self._flags.pop(owner, None)
        if flag is not None:
            flag.set()

    def leave(self, visitor: str) -> None:
        """End everything of a visitor who is gone."""
        with self._guard:
            gone = [owner for owner in self._flags if owner.startswith(f"{visitor}:")]
            flags = [self._flags.pop(owner) for owner in gone]
        for flag in flags:
            flag.set()

    @contextmanager
    def one_long_job(self, owner: str) -> Iterator[None]:
        """Hold the visitor's one place for long work; raises ``LensError`` where other long work of theirs runs.

        The same work begun anew may overlap with the one before it, which has been told to stop.
        """
        visitor, _, work = owner.partition(":")
        if not visitor:
            yield
            return
        with self._guard:
            running, n = self._long.get(visitor, (work, 0))
            if running != work:
                place = PLACES.get(running, running)
                raise LensError(f"One long job at a time: what you began under {place} still runs; stop it, or wait.")
            self._long[visitor] = (work, n + 1)
        try:
            yield
        finally:
            with self._guard:
                _, n = self._long[visitor]
                if n == 1:
                    del self._long[visitor]
                else:
                    self._long[visitor] = (work, n - 1)

    @property
    def n_running(self) -> int:
        """Works that could be stopped now, or whose visitors have not begun others since."""
        return len(self._flags)
