"""What the intervals promise: the share of simulated cases in which a nominal 95 % interval holds the truth.

Two classes are summed over every count, without chance. More classes, and corrected shares, are drawn, from seeds:
``COVERAGE_DRAWS`` (an environment variable; the default is for every run) asks for more draws a cell and all cells.
A cell fails where its hits could not come from a coverage of 93 %; all cells of one n together must reach 93 %.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy.stats import binom

from diffusion_lens.results import metrics, stats

LONG = int(os.environ.get("COVERAGE_DRAWS", "0"))
SIZES = (8, 16, 48, 100, 250, 500, 1000)
SHARES = (0, 1e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.48, 0.5, 0.6, 0.8, 0.9, 0.98, 0.999, 1)
PROMISED = 0.93

THREE = [
    (1, 0, 0), (0.98, 0.01, 0.01), (0.9, 0.1, 0), (0.7, 0.25, 0.05), (0.5, 0.5, 0), (0.4, 0.3, 0.3), (1 / 3,) * 3,
]  # fmt: skip
FOUR = [(1, 0, 0, 0), (0.97, 0.01, 0.01, 0.01), (0.7, 0.2, 0.08, 0.02), (0.4, 0.3, 0.2, 0.1), (0.25,) * 4]
GOALS = {3: [(1 / 3,) * 3, (0.6, 0.3, 0.1), (0.98, 0.01, 0.01)], 4: [(0.25,) * 4, (0.85, 0.05, 0.05, 0.05)]}

Interval = tuple[float, float]


def holds(interval: Interval, truth: float) -> bool:
    return interval[0] - 1e-9 <= truth <= interval[1] + 1e-9


def exact_coverage(n: int, share: float, intervals: list[Interval], truth: float) -> float:
    """Of all counts of ``n`` images at this share of the second class, the share whose interval holds ``truth``."""
    inside = [holds(interval, truth) for interval in intervals]
    return float(binom.pmf(np.arange(n + 1), n, share) @ inside)


def odds(share: float) -> float:
    return -np.inf if share == 0 else np.inf if share == 1 else float(np.log(share / (1 - share)))


TWO_CLASSES: dict[str, tuple[Callable[[int, int], Interval], Callable[[float], float]]] = {
    "share": (lambda k, n: stats.share_interval(k, n), lambda p: p),
    "log ratio": (
        lambda k, n: stats.log_ratio_interval(k, n - k, numerator="b", denominator="a").interval,
        odds,
    ),
    "FD": (lambda k, n: metrics.fd_interval(np.array([n - k, k])), lambda p: np.sqrt(2) * abs(p - 0.5)),
    "FD from 90 : 10": (
        lambda k, n: metrics.fd_interval(np.array([n - k, k]), np.array([0.9, 0.1])),
        lambda p: np.sqrt(2) * abs(p - 0.1),
    ),
    "FD from 0 : 100": (
        lambda k, n: metrics.fd_interval(np.array([n - k, k]), np.array([0.0, 1.0])),
        lambda p: np.sqrt(2) * abs(p - 1),
    ),
    "SPD": (lambda k, n: metrics.parity_interval(np.array([n - k, k])), lambda p: abs(2 * p - 1)),
}


@pytest.mark.parametrize("name", TWO_CLASSES)
@pytest.mark.parametrize("n", SIZES)
def test_two_classes_hold_in_95_percent_of_all_cases(name: str, n: int) -> None:
    interval, truth = TWO_CLASSES[name]
    intervals = [interval(k, n) for k in range(n + 1)]
    found = {p: exact_coverage(n, p, intervals, truth(p)) for p in SHARES}
    assert min(found.values()) >= 0.95 - 1e-9, found


def draw(truth: tuple[float, ...], n: int, draws: int) -> Iterator[tuple[np.ndarray, int]]:
    """Counts of ``n`` images each, and how often they were drawn."""
    shares = np.array(truth) / np.sum(truth)
    counts = np.random.default_rng(n).multinomial(n, shares, size=draws)
    yield from zip(*np.unique(counts, axis=0, return_counts=True), strict=True)


def check(found: dict[object, tuple[int, int]]) -> None:
    """Every cell ``(hits, draws)`` could come from the coverage promised, and all together reach it."""
    low = {cell: (hits, n) for cell, (hits, n) in found.items() if hits < binom.ppf(1e-4, n, PROMISED)}
    assert not low, low
    hits, n = np.sum(list(found.values()), axis=0)
    assert hits / n >= PROMISED, found


@pytest.mark.parametrize("n", SIZES if LONG else (8, 48, 500))
@pytest.mark.parametrize("classes", [3, 4])
def test_discrepancies_of_several_classes(classes: int, n: int) -> None:
    goals = GOALS[classes] if LONG else GOALS[classes][:1] + GOALS[classes][-1:]
    draws = LONG or (1000 if n == 8 else 30)
    fd: dict[object, tuple[int, int]] = {}
    spd: dict[object, tuple[int, int]] = {}
    for truth in (THREE if classes == 3 else FOUR) + goals[1:]:
        cells = list(draw(truth, n, draws))
        for goal in goals:
            value = metrics.fairness_discrepancy(np.array(truth) / np.sum(truth), np.array(goal))
            hits = sum(times * holds(metrics.fd_interval(counts, np.array(goal)), value) for counts, times in cells)
            fd[truth, goal] = hits, draws
        value = max(truth) - min(truth)
        spd[truth] = sum(times * holds(metrics.parity_interval(counts), value) for counts, times in cells), draws
    check(fd)
    check(spd)


RATES = {
    2: [[0.95, 0.05], [0.03, 0.97]],
    3: [[0.9, 0.06, 0.04], [0.05, 0.85, 0.1], [0.02, 0.08, 0.9]],
    4: [[0.9, 0.04, 0.03, 0.03], [0.05, 0.85, 0.05, 0.05], [0.02, 0.08, 0.85, 0.05], [0.02, 0.03, 0.05, 0.9]],
}
TRUTHS: dict[int, list[tuple[float, ...]]] = {
    2: [(1 - p, p) for p in (0, 0.005, 0.02, 0.05, 0.2, 0.5, 0.8, 0.98, 1)],
    3: THREE,
    4: FOUR,
}


def readings(
    truth: tuple[float, ...], n: int, labelled: int | None, draws: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Counts and a confusion of ``labelled`` images a class, both drawn; without them the classifier is known."""
    rng = np.random.default_rng(n)
    rates = np.array(RATES[len(truth)]) if labelled else np.eye(len(truth))
    shares = np.array(truth) / np.sum(truth)
    for _ in range(draws):
        confusion = np.stack([rng.multinomial(labelled or 1_000_000, row) for row in rates])
        yield rng.multinomial(n, rates.T @ shares), confusion


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("labelled", [30, 200, None])
def test_corrected_share_and_log_ratio_of_two_classes(n: int, labelled: int | None) -> None:
    draws = LONG or 100
    share: dict[object, tuple[int, int]] = {}
    ratio: dict[object, tuple[int, int]] = {}
    for truth in TRUTHS[2]:
        found = [stats.rogan_gladen(int(c[1]), n, m) for c, m in readings(truth, n, labelled, draws)]
        share[truth] = sum(holds(f.interval, truth[1]) for f in found), draws
        ends = [stats.share_log_ratio(f, n, numerator="b", denominator="a").interval for f in found]
        ratio[truth] = sum(holds(interval, odds(truth[1])) for interval in ends), draws
    check(share)
    check(ratio)


@pytest.mark.parametrize("n", SIZES if LONG else (8, 48, 1000))
@pytest.mark.parametrize("labelled", [30, 200, None])
@pytest.mark.parametrize("classes", [3, 4])
def test_corrected_shares_of_several_classes(classes: int, n: int, labelled: int | None) -> None:
    draws = LONG or 30
    found: dict[object, tuple[int, int]] = {}
    for truth in TRUTHS[classes]:
        hits = np.zeros(classes, dtype=int)
        for counts, confusion in readings(truth, n, labelled, draws):
            intervals = stats.correct_shares(counts, confusion).intervals
            hits += [holds((low, high), p) for (low, high), p in zip(intervals, truth, strict=True)]
        found.update({(truth, column): (int(k), draws) for column, k in enumerate(hits)})
    check(found)


def test_the_simulation_sees_what_was_broken() -> None:
    """Intervals of version 0.4: FD by percentile bootstrap, and log ratios cut at ``½ / (n + 1)``."""
    rng = np.random.default_rng(0)

    def bootstrap(k: int, n: int) -> Interval:
        shares = rng.binomial(n, k / n, size=400) / n
        low, high = np.quantile(np.sqrt(2) * np.abs(shares - 0.5), (0.025, 0.975))
        return float(low), float(high)

    for n, share, reached in ((16, 0.02, 0.3), (48, 0.02, 0.65), (500, 0.5, 0.65)):
        intervals = [bootstrap(k, n) for k in range(n + 1)]
        assert exact_coverage(n, share, intervals, np.sqrt(2) * abs(share - 0.5)) < reached
    cut = [(max(low, odds(0.5 / 9)), high) for low, high in (TWO_CLASSES["log ratio"][0](k, 8) for k in range(9))]
    assert exact_coverage(8, 0.02, cut, odds(0.02)) == 0
    with pytest.raises(AssertionError):
        check({"broken": (20, 30)})
    with pytest.raises(AssertionError):
        check({cell: (27, 30) for cell in range(30)})
