"""Metrics against hand-computed values, scipy's matrix root and exact distributions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import binom, chisquare

from diffusion_lens.base.types import Attribute, LensError, Predictions
from diffusion_lens.results import metrics, stats

GENDER = Attribute("gender", ("female", "male"))
GLASSES = Attribute("glasses", ("no", "yes"))


def reading(labels: list[int], certain: list[int] | None = None, attribute: Attribute = GENDER) -> Predictions:
    probs = np.eye(2)[labels] * 0.8 + 0.1
    return Predictions(probs, np.array(certain or [1] * len(labels), bool), attribute, "hand")


def test_fairness_discrepancy_by_hand() -> None:
    assert metrics.fairness_discrepancy(np.array([0.339, 0.661])) == pytest.approx(np.sqrt(2) * 0.161)
    assert metrics.fairness_discrepancy(np.array([0.7, 0.3]), np.array([0.7, 0.3])) == 0
    rows = np.array([[0.9, 0.1], [0.5, 0.5]])
    assert metrics.fairness_discrepancy(rows) == pytest.approx(np.sqrt(2) * 0.2)
    with pytest.raises(LensError, match="sum to 1"):
        metrics.fairness_discrepancy(np.array([0.5, 0.5]), np.array([0.5, 0.6]))


def test_null_floor_is_the_binomial_quantile() -> None:
    counts = np.arange(101)
    fd = np.sqrt(2) * np.abs(counts / 100 - 0.5)
    order = np.argsort(fd)
    exact = fd[order][np.searchsorted(np.cumsum(binom.pmf(counts, 100, 0.5)[order]), 0.95)]
    assert metrics.fd_null_floor(100) == pytest.approx(exact, abs=np.sqrt(2) * 0.011)
    assert metrics.fd_null_floor(100) > metrics.fd_null_floor(1000)
    assert metrics.fd_null_floor(100, np.array([0.9, 0.1])) < metrics.fd_null_floor(100)
    assert np.isnan(metrics.fd_null_floor(0))


def test_two_classes_fd_is_a_function_of_the_share() -> None:
    low, high = stats.share_interval(30, 100)
    root = np.sqrt(2)
    assert metrics.fd_interval(np.array([70, 30])) == pytest.approx((root * (0.5 - high), root * (0.5 - low)))
    assert metrics.fd_interval(np.array([30, 70])) == pytest.approx(metrics.fd_interval(np.array([70, 30])))
    goal = np.array([0.65, 0.35])  # inside the share's interval
    assert metrics.fd_interval(np.array([70, 30]), goal) == pytest.approx((0, root * (0.35 - low)))
    assert metrics.parity_interval(np.array([70, 30])) == pytest.approx((1 - 2 * high, 1 - 2 * low))
    # All images of one class: not certain, and never beyond what FD can be.
    low, high = metrics.fd_interval(np.array([8, 0]))
    assert (low, high) == pytest.approx((root * (0.025 ** (1 / 8) - 0.5), root / 2))


def test_fd_of_several_classes_reaches_0_exactly_where_pearsons_test_allows_the_target() -> None:
    goal = np.array([0.5, 0.3, 0.2])
    for counts in ([55, 30, 15], [60, 25, 15], [62, 25, 13], [64, 22, 14]):
        refused = chisquare(counts, 100 * goal).pvalue < 0.05
        low, high = metrics.fd_interval(np.array(counts), goal)
        assert (low > 0) == refused
        assert low <= metrics.fairness_discrepancy(np.array(counts) / 100, goal) <= high
    assert metrics.fd_interval(np.array([20, 0, 0]))[1] == pytest.approx(np.sqrt(2 / 3))
    assert metrics.fd_interval(np.array([20, 0, 0]))[0] < 0.7
    assert metrics.fd_interval(np.zeros(3, int), goal) == pytest.approx((0, np.linalg.norm([0.5, 0.3, 0.8])))


def test_nearest_shares_equal_a_grid() -> None:
    counts, goal = np.array([30, 12, 6]), np.array([0.2, 0.3, 0.5])
    side = np.linspace(0, 1, 601)
    a, b = (m.ravel() for m in np.meshgrid(side, side))
    grid = np.stack([a, b, 1 - a - b], axis=1)[a + b < 1]
    with np.errstate(divide="ignore"):
        x2 = (counts**2 / grid).sum(axis=1) / 48 - 48
    slow = grid[x2 <= 5.99]
    fast = metrics._nearest(counts, goal, 5.99)
    assert np.linalg.norm(fast - goal) == pytest.approx(np.linalg.norm(slow - goal, axis=1).min(), abs=1e-3)
    assert metrics._pearson(counts, fast) == pytest.approx(5.99, abs=1e-4) and fast.sum() == pytest.approx(1)


def test_the_nearest_shares_are_found_for_any_counts() -> None:
    """A solver that gives up leaves FD's interval open to 0: these made a general one (SLSQP) do so."""
    rng = np.random.default_rng(0)
    for trial in range(150):
        k, n = int(rng.integers(3, 8)), int(rng.choice([8, 48, 500, 5000]))
        counts = rng.multinomial(n, rng.dirichlet(np.full(k, rng.choice([0.2, 1, 5]))))
        goal = np.full(k, 1 / k) if trial % 2 else rng.dirichlet(np.full(k, 2.0))
        limit = 6.0 + 2 * (k - 3)
        if metrics._pearson(counts, goal) > limit:
            found = metrics._nearest(counts, goal, limit)
            assert metrics._pearson(counts, found) == pytest.approx(limit, abs=1e-3)
            assert found.min() >= 0 and found.sum() == pytest.approx(1)
            # A step towards the target leaves the region.
            assert metrics._pearson(counts, found + 1e-3 * (goal - found)) > limit
    for counts in ([26, 9, 13], [63, 31, 6], [49, 19, 32]):
        low, high = metrics.fd_interval(np.array(counts))
        value = metrics.fairness_discrepancy(np.array(counts) / sum(counts))
        assert 0 < low < value < high


def test_fd_intervals_narrow_as_images_come_in() -> None:
    widths = [np.diff(metrics.fd_interval(n * np.array([14, 5, 1])))[0] for n in (5, 20, 80, 320)]
    assert all(later < 0.6 * sooner for sooner, later in pairwise(widths))


def test_pearsons_null_is_drawn_for_rare_classes() -> None:
    # n = 8 at (.98, .01, .01): one image of a rare class has X² = 10.6, more than χ²'s 5.99, in 15 % of cases.
    assert metrics._pearson_null(8, (0.98, 0.01, 0.01), 0.95) == pytest.approx(49 / 7.84 + 1 / 0.08 - 8)
    assert metrics._pearson_null(100, (0.5, 0.3, 0.2), 0.95) == 0
    assert metrics.fd_interval(np.array([7, 1, 0]), np.array([0.98, 0.01, 0.01]))[0] == 0
    # A class that should have no image, but has one, is refused at once.
    assert metrics.fd_interval(np.array([50, 49, 1]), np.array([0.5, 0.5, 0.0]))[0] > 0


def test_parity_difference_and_its_interval() -> None:
    assert metrics.parity_difference(np.array([0.5, 0.3, 0.2])) == pytest.approx(0.3)
    low, high = metrics.parity_interval(np.array([50, 30, 20]))
    assert low == pytest.approx(0.1090, abs=1e-4)
    assert stats.agresti_min(50, 20, 100)[1] == pytest.approx(0.4456, abs=1e-4)
    assert 0.4456 < high < 0.47
    assert metrics.parity_interval(np.array([4, 4, 0]))[0] == 0  # of 8 images, equal shares show as much in one of 20
    assert low == pytest.approx(stats.agresti_min(50, 20, 100, level=1 - 0.05 / 3)[0])
    assert metrics.parity_interval(np.array([0, 0])) == (0, 1)
    assert metrics.parity_interval(np.array([20, 20, 20]))[0] == 0
    with pytest.raises(LensError, match="two or more classes"):
        metrics.parity_interval(np.array([5]))


def test_small_numbers_by_hand() -> None:
    assert metrics.entropy(np.array([[0.5, 0.5], [1.0, 0.0]])) == pytest.approx([np.log(2), 0])
    groups = metrics.subgroup_entropy(np.array([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]), np.array([0, 0, 2]), 3)
    assert groups[[0, 2]] == pytest.approx([np.log(2) / 2, np.log(2)]) and np.isnan(groups[1])
    a, b = np.array([[2.0, 0], [1, 0]]), np.array([[0.0, 3], [-1, 0]])
    assert metrics.cosine_to_unit(a, b) == pytest.approx([0.5, 0])
    with pytest.raises(LensError, match="all zeros"):
        metrics.cosine_to_unit(np.zeros((1, 2)), np.ones((1, 2)))


@pytest.mark.parametrize(("n", "m", "d"), [(60, 80, 20), (60, 50, 100), (50, 200, 70)])
def test_frechet_distance_equals_the_matrix_root(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(n)
    a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    b = rng.normal(size=(m, d)) + 0.3
    sa, sb = np.cov(a.T), np.cov(b.T)
    slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * np.real(sqrtm(sa @ sb)))
    assert metrics.frechet_distance(a, b) == pytest.approx(slow, rel=1e-5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(4 * d)


def test_frechet_distance_refuses_few_images() -> None:
    with pytest.raises(LensError, match="needs >= 50"):
        metrics.frechet_distance(np.zeros((49, 3)), np.zeros((100, 3)))
    with pytest.raises(LensError, match="one d"):
        metrics.frechet_distance(np.zeros((60, 3)), np.zeros((60, 4)))


def test_inception_score_extremes() -> None:
    sure = np.eye(4)[np.arange(200) % 4]
    assert metrics.inception_score(sure) == pytest.approx((4, 0))
    assert metrics.inception_score(np.full((100, 4), 0.25))[0] == pytest.approx(1)
    with pytest.raises(LensError, match="needs >= 100"):
        metrics.inception_score(sure[:99])


def test_agreement_counts_undecided_as_a_class() -> None:
    before = reading([0, 0, 1, 1, 1], [1, 1, 1, 1, 0])
    after = reading([0, 1, 1, 1, 0], [1, 1, 1, 0, 0])
    assert metrics.agreement(before, after) == pytest.approx(3 / 5)
    with pytest.raises(LensError, match="same seeds"):
        metrics.agreement(before, reading([0]))


def test_changes_pair_the_images_decided_both_times() -> None:
    before = reading([0, 0, 0, 1, 1], [1, 1, 1, 1, 0])
    after = reading([0, 1, 1, 1, 0], [1, 1, 1, 1, 1])
    female, male = metrics.changes(before, after)
    assert (male.n, male.before, male.after, male.difference) == (4, 0.25, 0.75, 0.5)
    assert female.difference == -0.5
    assert female.interval == pytest.approx((-male.interval[1], -male.interval[0]))
    assert metrics.changes(before, reading([0] * 5, [0, 0, 0, 0, 1])) == ()


def test_intersections() -> None:
    table = metrics.intersections(reading([0, 0, 1, 1]), reading([0, 1, 1, 1], [1, 1, 1, 0], GLASSES))
    assert table.tolist() == [[1, 1], [0, 1]]
