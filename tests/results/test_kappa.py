"""κ against hand-computed values, statsmodels, and its own promise."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.inter_rater import fleiss_kappa as library_fleiss

from diffusion_lens.base.types import LensError
from diffusion_lens.results.kappa import cohen_kappa, fleiss_kappa

# Fleiss (1971) by Wikipedia's worked example: 14 raters, 10 items, 5 classes; κ = .210.
WORKED = np.array([
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
])  # fmt: skip


def test_cohens_kappa_by_hand() -> None:
    # p_o = 35/50 = .7; p_e = .5 · .6 + .5 · .4 = .5; κ = .2 / .5.
    found = cohen_kappa(np.array([[20, 5], [10, 15]]))
    assert found.value == pytest.approx(0.4)
    usual = cohens_kappa(np.array([[20, 5], [10, 15]]))
    assert found.value == pytest.approx(usual.kappa)
    assert found.interval == pytest.approx((usual.kappa_low, usual.kappa_upp), abs=0.07)
    assert found == cohen_kappa(np.array([[20, 5], [10, 15]]))
    three = np.array([[44, 5, 1], [7, 20, 3], [9, 5, 6]])
    assert cohen_kappa(three).value == pytest.approx(cohens_kappa(three).kappa)
    assert cohen_kappa(10 * three).interval == pytest.approx(
        (cohens_kappa(10 * three).kappa_low, cohens_kappa(10 * three).kappa_upp), abs=0.01
    )


def test_perfect_agreement_is_not_certain() -> None:
    found = cohen_kappa(np.diag([10, 10]))
    assert found.value == 1 and found.interval[1] == 1 and 0.5 < found.interval[0] < 0.9
    several = fleiss_kappa(np.array([[3, 0]] * 10 + [[0, 3]] * 10))
    assert several.value == 1 and several.interval[1] == 1 and 0.5 < several.interval[0] < 0.9
    opposite = cohen_kappa(np.array([[0, 10], [10, 0]]))
    assert opposite.value == pytest.approx(-1) and opposite.interval[1] > -0.9


def test_one_class_throughout_says_nothing() -> None:
    found = cohen_kappa(np.diag([20, 0]))
    assert np.isnan(found.value) and found.interval[0] < 0.1 and found.interval[1] == 1
    several = fleiss_kappa(np.array([[4, 0, 0]] * 20))
    assert np.isnan(several.value) and several.interval[0] < 0.2 and several.interval[1] == 1


def test_fleiss_kappa_by_hand() -> None:
    found = fleiss_kappa(WORKED)
    assert found.value == pytest.approx(0.2099, abs=1e-4)
    assert found.value == pytest.approx(library_fleiss(WORKED))
    assert found.interval[0] < 0.2 < found.interval[1] < 0.5
    # Two raters a, b of two items: (x, x), (x, y). P = (1 + 0) / 2; p = (3/4, 1/4), P_e = 10/16; κ = -1/3.
    assert fleiss_kappa(np.array([[2, 0], [1, 1]])).value == pytest.approx(-1 / 3)


@pytest.mark.parametrize("table", [np.ones((2, 3)), np.zeros((2, 2)), np.array([[-1, 2], [1, 1]]), np.ones((1, 1))])
def test_tables_that_cannot_be(table: np.ndarray) -> None:
    with pytest.raises(LensError, match="square"):
        cohen_kappa(table)


def test_ratings_that_cannot_be() -> None:
    with pytest.raises(LensError, match="equally many"):
        fleiss_kappa(np.array([[3, 0], [2, 2]]))
    for wrong in (np.array([[1, 0]]), np.zeros((0, 2)), np.array([[3], [3]]), np.array([3, 3])):
        with pytest.raises(LensError, match=">= 2 raters"):
            fleiss_kappa(wrong)


def two_raters(k: int, agree: float) -> np.ndarray:
    """A table of shares: uneven classes, named alike in ``agree`` of the items, else independently."""
    classes = np.arange(k, 0, -1) / (k * (k + 1) / 2)
    return agree * np.diag(classes) + (1 - agree) * np.outer(classes, classes)


@pytest.mark.parametrize("n", [12, 40, 200])
def test_kappas_hold_what_they_promise(n: int) -> None:
    rng = np.random.default_rng(n)
    hits = []
    for k, agree in ((2, 0.0), (2, 0.5), (2, 0.9), (2, 1.0), (3, 0.6), (3, 0.95)):
        cells = two_raters(k, agree)
        for _ in range(60):
            table = rng.multinomial(n, cells.ravel()).reshape(k, k)
            low, high = cohen_kappa(table).interval
            hits.append(low - 1e-9 <= agree <= high + 1e-9)
    assert np.mean(hits) >= 0.93
    hits = []
    for k, agree in ((2, 0.0), (2, 0.7), (3, 0.5)):
        classes = np.arange(k, 0, -1) / (k * (k + 1) / 2)
        for _ in range(40):  # four raters: each names the item's own class with probability √agree, else any
            own = rng.choice(k, size=(n, 1), p=classes)
            named = np.where(rng.random((n, 4)) < np.sqrt(agree), own, rng.choice(k, size=(n, 4), p=classes))
            ratings = np.stack([(named == c).sum(axis=1) for c in range(k)], axis=1)
            low, high = fleiss_kappa(ratings).interval
            hits.append(low - 1e-9 <= agree <= high + 1e-9)
    assert np.mean(hits) >= 0.93
