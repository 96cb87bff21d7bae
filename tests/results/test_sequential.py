"""The confidence sequence of a share: by hand, and what it promises to those who look after every image."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_lens.base.types import LensError
from diffusion_lens.results import stats
from diffusion_lens.results.sequential import images_for, log_evidence, narrow_enough, sequence_interval


def test_by_hand() -> None:
    assert sequence_interval(0, 0) == (0, 1)
    # Evidence against .5 in one image is none; in two alike: 4 · (1/2) (c/2 + 1) / (c + 1) = (c + 2) / (c + 1).
    c = 500 / (2 * np.log(20) + np.log(2 * np.log(20)) + 1)
    assert log_evidence(1, 1, 0.5) == pytest.approx(0)
    assert log_evidence(2, 2, 0.5) == pytest.approx(np.log((c + 2) / (c + 1)))
    assert log_evidence(np.array([0, 1, 2]), 2, 0.5)[0] == pytest.approx(np.log((c + 2) / (c + 1)))
    low, high = sequence_interval(300, 1000)
    assert sequence_interval(700, 1000) == pytest.approx((1 - high, 1 - low))
    assert log_evidence(300, 1000, low) == pytest.approx(np.log(20))
    assert sequence_interval(0, 10_000)[0] == 0 and sequence_interval(10_000, 10_000)[1] == 1


def test_evidence_is_a_martingale_at_the_true_share() -> None:
    for share in (0.1, 0.5, 0.97):
        for k, n in ((0, 0), (1, 4), (30, 60), (60, 60)):
            now, hit, miss = (np.exp(log_evidence(*kn, share)) for kn in ((k, n), (k + 1, n + 1), (k, n + 1)))
            assert share * hit + (1 - share) * miss == pytest.approx(now)


@pytest.mark.parametrize("made_for", [20, 500, 5000])
def test_the_shares_it_holds_are_one_interval(made_for: int) -> None:
    grid = np.concatenate([np.geomspace(1e-9, 1e-3, 200), np.linspace(1e-3, 1 - 1e-3, 800)])
    for n in (1, 2, 10, 100, 3000):
        for k in sorted({0, 1, 2, n // 10, n // 2, n} - {k for k in (2,) if k > n}):
            low, high = sequence_interval(k, n, made_for=made_for)
            held = np.array([log_evidence(k, n, p, made_for=made_for) < np.log(20) for p in grid])
            assert (held == ((grid > low) & (grid < high))).all(), (k, n)


def test_it_is_wider_than_one_look_but_not_by_much() -> None:
    for k, n in ((50, 100), (20, 400), (250, 500), (500, 1000)):
        low, high = sequence_interval(k, n)
        once = stats.share_interval(k, n)
        assert low < once[0] and once[1] < high
        assert high - low < 1.9 * (once[1] - once[0])
    low, high = sequence_interval(250, 500)
    assert high - low == pytest.approx(3.03 / np.sqrt(500), rel=0.02)
    assert all(np.diff(sequence_interval(250, 500, made_for=m))[0] > high - low - 1e-4 for m in (100, 2500))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 0.9, 1.0])
def test_it_holds_at_every_look(share: float) -> None:
    rng = np.random.default_rng(round(100 * share))
    hits = np.cumsum(rng.random((1500, 800)) < share, axis=1)
    n = np.arange(1, 801)
    # The interval at (k, n) leaves the share out where the evidence against it has grown to 20.
    left_out = log_evidence(hits, n, share) >= np.log(20)
    assert left_out.any(axis=1).mean() <= 0.05
    for row in range(0, 1500, 300):
        for look in (3, 50, 799):
            low, high = sequence_interval(int(hits[row, look]), look + 1)
            assert (low <= share <= high) == (not left_out[row, look])


def test_an_interval_for_one_look_does_not_hold_at_every_look() -> None:
    rng = np.random.default_rng(0)
    hits = np.cumsum(rng.random((200, 500)) < 0.5, axis=1)
    missed = 0
    for row in hits:
        missed += any(
            not low <= 0.5 <= high
            for low, high in (stats.share_interval(int(row[n - 1]), n) for n in range(10, 501, 10))
        )
    assert missed / 200 > 0.1


def test_stopping_at_a_width_keeps_the_promise() -> None:
    rng = np.random.default_rng(1)
    hits, sizes = 0, []
    for _ in range(200):
        k = n = 0
        while not narrow_enough(k, n, 0.1):
            n += 8
            k += int(rng.binomial(8, 0.2))
        sizes.append(n)
        low, high = sequence_interval(k, n)
        hits += low <= 0.2 <= high
    assert hits >= 190
    assert max(sizes) <= images_for(0.1) + 8


def test_how_many_images_it_takes() -> None:
    n = images_for(0.04)  # one look takes 600
    assert 1400 < n < 1480
    assert narrow_enough(n // 2, n, 0.04) and not narrow_enough(round(0.48 * n), round(0.96 * n), 0.04)
    assert narrow_enough(20, 500, 0.04)  # a rare class takes fewer


def test_what_cannot_be() -> None:
    for k, n in ((3, 2), (-1, 5), (0, -1)):
        with pytest.raises(LensError, match="between 0 and n"):
            sequence_interval(k, n)
    with pytest.raises(LensError, match="level"):
        sequence_interval(1, 2, level=1.0)
    with pytest.raises(LensError, match="made_for"):
        sequence_interval(1, 2, made_for=0)
    for half in (0.0, 0.5, 4.0):
        with pytest.raises(LensError, match="half width"):
            images_for(half)
    with pytest.raises(LensError, match="more than"):
        images_for(1e-6)
