"""Weights that meet stated shares: by hand, and on classes that go together."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_lens.features.raking import LARGEST_WEIGHT, even_weights, rake


def test_raking_meets_every_margin_and_keeps_what_hangs_together() -> None:
    labels = np.array([[0, 0]] * 40 + [[0, 1]] * 10 + [[1, 0]] * 20 + [[1, 1]] * 30)
    weights = rake(labels, [np.array([0.3, 0.7]), np.array([0.4, 0.6])])
    cells = np.array([weights[(labels == cell).all(1)].sum() for cell in ((0, 0), (0, 1), (1, 0), (1, 1))]) / 100
    assert cells[:2].sum() == pytest.approx(0.3) and cells[[0, 2]].sum() == pytest.approx(0.4)
    assert cells[0] * cells[3] / (cells[1] * cells[2]) == pytest.approx(40 * 30 / (10 * 20))  # the odds ratio stays
    assert weights.mean() == pytest.approx(1)
    assert rake(labels, [np.array([0.5, 0.5]), np.array([0.6, 0.4])]) == pytest.approx(np.ones(100))


def test_a_class_that_no_drawing_has_is_left_out() -> None:
    weights = rake(np.array([[0], [0], [1], [1]]), [np.array([0.2, 0.6, 0.2])])
    assert weights == pytest.approx([0.5, 0.5, 1.5, 1.5])


def test_even_weights_part_what_went_together() -> None:
    # 40 young women, 10 old ones, 20 young men, 30 old ones
    gender, age = np.repeat([0, 0, 1, 1], [40, 10, 20, 30]), np.repeat([0, 1, 0, 1], [40, 10, 20, 30])
    weights = even_weights(gender, [age])
    # Both have 60 young and 40 old of 100: 30 and 20 of each 50.
    assert weights == pytest.approx(np.repeat([30 / 40, 20 / 10, 30 / 20, 20 / 30], [40, 10, 20, 30]))


def test_even_weights_balance_classes_first() -> None:
    weights = even_weights(np.repeat([0, 1], [80, 20]), [])
    assert weights == pytest.approx(np.repeat([50 / 80, 50 / 20], [80, 20]))
    # Of women 6 in 8 are young, of men 2 in 4: 62.5 % where both count alike, whatever their number.
    gender, age = np.repeat([0, 1], [8, 4]), np.array([0] * 6 + [1] * 2 + [0] * 2 + [1] * 2)
    weights = even_weights(gender, [age])
    for own in (0, 1):
        mine = weights[gender == own]
        assert mine.sum() == pytest.approx(6)
        assert mine[age[gender == own] == 0].sum() == pytest.approx(6 * 0.625)


def test_even_weights_hold_for_several_attributes_and_undecided_images() -> None:
    rng = np.random.default_rng(0)
    gender = rng.integers(0, 2, 4000)
    age = np.where(rng.random(4000) < 0.6, gender, rng.integers(-1, 3, 4000))
    tone = np.where(rng.random(4000) < 0.4, age, rng.integers(0, 4, 4000))
    weights = even_weights(gender, [age, tone])
    assert weights.mean() == pytest.approx(1)
    for other in (age, tone):
        shares = [np.bincount(other[gender == g] + 1, weights[gender == g], 5) for g in (0, 1)]
        assert shares[0] / shares[0].sum() == pytest.approx(shares[1] / shares[1].sum(), abs=1e-6)


def test_no_image_speaks_for_its_whole_class() -> None:
    gender, age = np.repeat([0, 0, 1, 1], [499, 1, 1, 499]), np.repeat([0, 1, 0, 1], [499, 1, 1, 499])
    weights = even_weights(gender, [age])
    assert weights[[499, 500]] == pytest.approx(LARGEST_WEIGHT)
    assert weights[0] == pytest.approx(250 / 499)
