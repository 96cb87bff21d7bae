"""Metrics against hand-computed values, scipy's matrix root and exact distributions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import binom

from diffusion_lens.base.types import Attribute, LensError, Predictions
from diffusion_lens.results import metrics

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
