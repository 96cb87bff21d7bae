"""How far a piece of work is, told once for all loops inside it, and the one way to stop it.

Whoever starts the work makes a ``Progress`` and listens; a loop calls ``step(done, total)``; a function that calls
others hands each of them a ``part``. Nobody rescales counts, and every step is a place where the work may be stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
LEAST_SHARE = 0.02
"""Below this share of the work no time left is told: it would be a guess."""


class Cancelled(Exception):
    """Raised inside a loop whose work is to stop; what was finished before is kept."""


@dataclass(frozen=True)
class Status:
    """What a listener hears.

    Attributes:
        share: of the whole work, 0 to 1; never falls.
        stage: the name of the innermost named part, ``""`` where none has one.
        stage_share: how far that part is, 0 to 1; of the whole work where no part has a name.
        done, total: of the loop that reported, in its own units; ``note``: what else it says, e.g. its loss.
        seconds: since the work began.
        seconds_left: by the pace so far, without what was found finished; ``None`` while that is unknown.
    """

    share: float
    stage: str
    stage_share: float
    done: int
    total: int
    seconds: float
    seconds_left: float | None
    note: str = ""


Listen = Callable[[Status], None]


@dataclass
class _Work:
    """What all parts of one piece of work have in common."""

    listen: Listen | None
    stop: threading.Event
    clock: Callable[[], float]
    began: float
    share: float = 0.0
    skipped: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, share: float, stage: str, stage_share: float, done: int, total: int, note: str) -> None:
        with self.lock:
            self.share = max(self.share, min(1.0, share))
            seconds, own = self.clock() - self.began, self.share - self.skipped
            left = seconds * (1 - self.share) / own if own > LEAST_SHARE else None
            status = Status(self.share, stage, min(1.0, stage_share), done, total, seconds, left, note)
        if self.listen is not None:
            self.listen(status)


class Progress:
    """A piece of work, or a part of one.

    Args:
        listen: called after every step; may raise to stop the work, as ``Cancelled`` does.
        stop: set by anybody, from any thread, it ends the work at its next step.
        clock: seconds, rising; for tests.

    >>> work = Progress(lambda status: print(f"{status.share:.0%} {status.stage}"))
    >>> draw, read = work.parts((3, 1), ("drawing", "reading"))
    >>> draw.step(1, 2); read.step(1, 1)
    38% drawing
    100% reading
    """

    def __init__(
        self,
        listen: Listen | None = None,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = _Work(listen, stop or threading.Event(), clock, clock())
        self._start, self._span, self._given = 0.0, 1.0, 0.0
        self.stage, self._named = "", (0.0, 1.0)

    def part(self, weight: float, stage: str | None = None) -> Progress:
        """The next ``weight`` (0 to 1) of this, for a callee; parts follow one another and share the stop.

        ``stage`` names the part for people; without one it has this one's name. Weights that add up to more than 1
        are cut, those that add up to less leave the rest untold.
        """
        begin, self._given = self._given, min(1.0, self._given + max(0.0, weight))
        part = Progress.__new__(Progress)
        part._work, part._given = self._work, 0.0
        part._start, part._span = self._start + self._span * begin, self._span * (self._given - begin)
        part.stage, part._named = self.stage, self._named
        if stage is not None:
            part.stage, part._named = stage, (part._start, part._span)
        return part

    def some(self, share: float, stage: str | None = None) -> Progress:
        """The next ``share`` (0 to 1) of what is left: for work of which nobody knows how much will follow."""
        return self.part(share * (1.0 - self._given), stage)

    def parts(self, weights: int | Sequence[float], stages: Sequence[str | None] | None = None) -> list[Progress]:
        """What is left of this, in so many equal parts, or in parts by weight (of any sum); see ``part``."""
        own = [1.0] * weights if isinstance(weights, int) else [max(0.0, float(weight)) for weight in weights]
        left, whole = 1.0 - self._given, sum(own) or 1.0
        names = [None] * len(own) if stages is None else stages
        return [self.part(left * weight / whole, name) for weight, name in zip(own, names, strict=True)]

    def step(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units of this part are finished. Raises ``Cancelled`` where the work is to stop."""
        self.check()
        share = min(1.0, done / total) if total > 0 else 1.0
        whole, (start, span) = self._start + self._span * share, self._named
        self._work.tell(whole, self.stage, (whole - start) / span if span else 1.0, done, total, note)

    def each(self, items: Iterable[T], total: int | None = None) -> Iterator[T]:
        """``items`` one by one, each a step when the loop's body is done with it.

        ``total``: how many they are, where they have no length.
        """
        n = len(items) if total is None and isinstance(items, Sequence) else total or 0
        for done, item in enumerate(items, 1):
            yield item
            self.step(done, n)

    def found(self) -> None:
        """This part need not be done, since its result is there: it tells nothing of the pace."""
        with self._work.lock:
            self._work.skipped += self._span
        self.step(1, 1)

    def check(self) -> None:
        """Raise ``Cancelled`` where the work is to stop."""
        if self._work.stop.is_set():
            raise Cancelled

    def cancel(self) -> None:
        """Stop the whole work at its next step, from any thread."""
        self._work.stop.set()

    @property
    def cancelled(self) -> bool:
        """Whether the work is to stop."""
        return self._work.stop.is_set()
