"""Paired timing: two ways of doing one thing, interleaved in one process, as a ratio with its interval."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        value: the figure in ``unit``; ``interval`` its 95 % interval, or (p50, p95) where ``name`` says so.
        bar: what it should be (empty: no bar); ``holds`` whether it is (``None``: no bar).
    """

    name: str
    value: float
    unit: str
    interval: tuple[float, float] | None = None
    bar: str = ""
    holds: bool | None = None
    note: str = ""
    details: dict[str, float] = field(default_factory=dict)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def interleaved(works: list[Callable[[], object]], repeats: int, *, warm: int = 1) -> np.ndarray:
    """Times ``[repeat, work]`` of all works in turn, so that a busy neighbour slows all of them alike."""
    for _ in range(warm):
        for work in works:
            work()
    return np.array([[seconds(work) for work in works] for _ in range(repeats)])


def ratio(slow: np.ndarray, fast: np.ndarray, *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median of the paired ratios ``slow / fast`` with a bootstrap interval."""
    found = slow / fast
    rng = np.random.default_rng(seed)
    draws = np.median(found[rng.integers(len(found), size=(2000, len(found)))], axis=1)
    return float(np.median(found)), (float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975)))
