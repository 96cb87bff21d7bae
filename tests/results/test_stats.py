"""Intervals: values by hand, coverage by simulation, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.results import stats

GENDER = Attribute("gender", ("female", "male"))
TONES = Attribute("skin tone", ("light", "mid", "dark"))
GOOD = np.array([[190, 10], [6, 194]])
THREE = np.array([[90, 5, 5], [6, 80, 14], [2, 8, 90]])


def test_share_interval_inverts_the_binomial_tails() -> None:
    # By hand: none of 8 has the upper end 1 - .025^(1/8); all of 8 mirror it.
    assert stats.share_interval(0, 8) == pytest.approx((0, 1 - 0.025 ** (1 / 8)))
    assert stats.share_interval(8, 8) == pytest.approx((0.025 ** (1 / 8), 1))
    low, high = stats.share_interval(30, 100)
    assert binom.sf(29, 100, low) == pytest.approx(0.025) and binom.cdf(30, 100, high) == pytest.approx(0.025)
    assert (1 - high, 1 - low) == pytest.approx(stats.share_interval(70, 100))
    narrow = stats.share_interval(30, 100, level=0.5)
    assert low < narrow[0] < 0.3 < narrow[1] < high


def test_imprecise_interval_of_a_share_is_the_exact_one() -> None:
    for k in (0, 1, 6):
        found = stats.imprecise_interval(lambda shares: shares[:, 1], np.array([24 - k, k]), n_draws=100_000)
        assert found == pytest.approx(stats.share_interval(k, 24), abs=0.004)
    # In several classes, too: the one more image is of the class itself, or of any other.
    found = stats.imprecise_interval(lambda shares: shares[:, 2], np.array([5, 3, 2, 0]), n_draws=100_000)
    assert found == pytest.approx(stats.share_interval(2, 10), abs=0.004)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_counts_that_cannot_be(k: int, n: int) -> None:
    with pytest.raises(LensError, match=r"needs >= 1|between 0 and"):
        stats.share_interval(k, n)


def test_mcnemar_is_a_sign_test_of_the_discordant_pairs() -> None:
    before = np.array([True] * 9 + [False] * 11)
    after = np.array([True] * 8 + [False] + [True] * 7 + [False] * 4)
    found = stats.mcnemar(before, after)
    assert (found.gained, found.lost) == (7, 1)
    assert found.p_value == pytest.approx(2 * binom.cdf(1, 8, 0.5))
    assert stats.mcnemar(before, before).p_value == 1


def test_paired_difference_by_hand_and_coverage() -> None:
    before = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    after = np.array([1, 1, 0, 1, 1, 1, 0, 0], bool)  # gained 3, lost 1
    found = stats.paired_difference(before, after)
    half = 1.959963984540054 * np.sqrt(5 / 10 - 0.2**2) / np.sqrt(10)
    assert found.value == pytest.approx(0.25)
    assert found.interval == pytest.approx((0.2 - half, 0.2 + half))
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        cells = rng.choice(4, size=60, p=[0.5, 0.2, 0.1, 0.2])  # both, gained, lost, neither
        moved = stats.paired_difference((cells == 0) | (cells == 2), (cells == 0) | (cells == 1))
        hits += moved.interval[0] <= 0.1 <= moved.interval[1]
    assert 930 <= hits <= 985


def test_a_log_ratio_is_the_log_odds_of_its_share() -> None:
    found = stats.log_ratio_interval(60, 20, numerator="male", denominator="female")
    ends = np.array(stats.share_interval(60, 80))
    assert found.value == pytest.approx(np.log(3))
    assert found.interval == pytest.approx(tuple(np.log(ends / (1 - ends))))
    assert not found.haldane and found.note == ""
    mirrored = stats.log_ratio_interval(20, 60, numerator="male", denominator="female")
    assert mirrored.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    with pytest.raises(LensError, match="needs >= 1"):
        stats.log_ratio_interval(0, 0, numerator="male", denominator="female")


def test_a_zero_count_leaves_the_log_ratio_open_and_marked() -> None:
    found = stats.log_ratio_interval(0, 20, numerator="male", denominator="female")
    share = 1 - 0.025 ** (1 / 20)
    assert found.haldane and found.value == pytest.approx(np.log(0.5 / 20.5))
    assert found.interval == (-np.inf, pytest.approx(np.log(share / (1 - share))))
    assert found.text == "-3.71* (below -1.60)" and "zero count" in found.note
    other = stats.log_ratio_interval(20, 0, numerator="male", denominator="female")
    assert other.text == "+3.71* (above +1.60)"


def test_corrected_log_ratio_is_open_where_its_share_is() -> None:
    found = stats.share_log_ratio(stats.Estimate(1.0, (0.9, 1.0)), 49, numerator="male", denominator="female")
    assert found.haldane and found.value == pytest.approx(np.log(0.99 / 0.01))
    assert found.interval == (pytest.approx(np.log(9)), np.inf)
    inside = stats.share_log_ratio(stats.Estimate(0.9, (0.8, 1.0)), 49, numerator="male", denominator="female")
    assert not inside.haldane and inside.value == pytest.approx(np.log(9)) and inside.text == "+2.20 (above +1.39)"
    # Fewer readings than the classifier's errors alone: the stand-in value stays within its interval.
    outside = stats.share_log_ratio(stats.Estimate(0.0, (0.0, 0.001)), 8, numerator="male", denominator="female")
    assert outside.interval == (-np.inf, outside.value) and outside.value == pytest.approx(np.log(0.5 / 8.5))


def test_rogan_gladen_undoes_the_error_and_is_symmetric() -> None:
    # Se = .97, Sp = .95: of 1000 images with a true share of .3, .3 * 970 + .7 * 50 = 326 are read as class 1.
    found = stats.rogan_gladen(326, 1000, GOOD)
    assert found.value == pytest.approx(0.3)
    mirrored = stats.rogan_gladen(674, 1000, GOOD[::-1, ::-1])
    assert mirrored.value == pytest.approx(0.7)
    assert mirrored.interval == pytest.approx((1 - found.interval[1], 1 - found.interval[0]))
    assert stats.rogan_gladen(10, 1000, GOOD).value == 0  # fewer than the false positives alone


def test_lang_reiczigel_by_hand() -> None:
    # k/n = 50/100, Se = 90/100, Sp = 80/100, z² = 3.8415: the paper's formulas with a pocket calculator.
    found = stats.rogan_gladen(50, 100, np.array([[80, 20], [10, 90]]))
    z = 1.959963984540054
    read, se, sp = 0.5, 91 / 102, 81 / 102
    p = (read + sp - 1) / (se + sp - 1)
    shift = 2 * z**2 * (p * se * (1 - se) / 102 - (1 - p) * sp * (1 - sp) / 102)
    var = 0.25 / (100 + z**2) + p**2 * se * (1 - se) / 102 + (1 - p) ** 2 * sp * (1 - sp) / 102
    half = z * np.sqrt(var) / (se + sp - 1)
    assert found.value == pytest.approx(0.3 / 0.7)
    assert found.interval == pytest.approx((p + shift - half, p + shift + half))
    assert found.interval == pytest.approx((0.2655, 0.5838), abs=1e-4)


def test_a_corrected_interval_is_no_narrower_than_the_counts_allow() -> None:
    known = 1_000_000 * np.eye(2, dtype=int)
    for k, n in ((8, 16), (0, 8), (1, 8)):
        low, high = stats.rogan_gladen(k, n, known).interval
        exact = stats.share_interval(k, n)
        assert low <= exact[0] + 1e-5 and exact[1] - 1e-5 <= high
    # Se = .97, Sp = .95 known well: 4 of 8 are 8/16.56 ± the exact interval's ends, corrected alike.
    low, high = stats.rogan_gladen(4, 8, 100 * GOOD).interval
    exact = (np.array(stats.share_interval(4, 8)) - 0.05) / 0.92
    assert (low, high) == pytest.approx(tuple(exact), abs=1e-3)


@pytest.mark.parametrize(("p", "se", "sp", "n"), [(0.5, 0.95, 0.9, 100), (0.1, 0.9, 0.9, 200), (0.97, 0.97, 0.97, 200)])
def test_lang_reiczigel_coverage_where_the_uncorrected_fails(p: float, se: float, sp: float, n: int) -> None:
    rng = np.random.default_rng(1)
    hits = naive = 0
    for _ in range(500):
        tp, tn = rng.binomial(100, se), rng.binomial(100, sp)
        k = int(rng.binomial(n, p * se + (1 - p) * (1 - sp)))
        low, high = stats.rogan_gladen(k, n, np.array([[tn, 100 - tn], [100 - tp, tp]])).interval
        hits += low <= p <= high
        low, high = stats.share_interval(k, n)
        naive += low <= p <= high
    assert hits >= 465
    if p != 0.5:
        assert naive < hits


def test_simplex_least_squares_matches_a_general_solver() -> None:
    rates = stats.error_rates(THREE)
    for shares in ([0.7, 0.3, 0.0], [0.0, 0.1, 0.9], [0.2, 0.5, 0.3]):
        q = np.array(shares)
        slow = minimize(
            lambda p, q=q: ((rates.T @ p - q) ** 2).sum(),
            np.full(3, 1 / 3),
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        ).x
        assert stats.simplex_least_squares(rates, q) == pytest.approx(slow, abs=2e-5)


def test_correct_shares_undoes_a_known_mixing() -> None:
    rates = stats.error_rates(THREE)
    truth = np.array([0.6, 0.1, 0.3])
    counts = np.round(100_000 * rates.T @ truth).astype(int)
    found = stats.correct_shares(counts, THREE)
    assert found.values == pytest.approx(truth, abs=1e-4)
    assert (found.intervals[:, 0] <= found.values).all() and (found.values <= found.intervals[:, 1]).all()
    assert stats.correct_shares(counts, 10_000 * THREE).intervals[0] == pytest.approx((0.6, 0.6), abs=0.01)
    assert np.diff(found.intervals[0]) > 0.02  # the confusion's own uncertainty is counted
    again = stats.correct_shares(counts, THREE)
    assert (again.intervals == found.intervals).all()  # no chance in it


def test_correct_shares_agrees_with_rogan_gladen_for_two_classes() -> None:
    found = stats.correct_shares(np.array([400, 600]), GOOD)
    one = stats.rogan_gladen(600, 1000, GOOD)
    assert found.values[1] == pytest.approx(one.value, abs=1e-6)
    assert found.intervals[1] == pytest.approx(one.interval, abs=0.01)
    assert found.intervals[0] == pytest.approx(1 - found.intervals[1, ::-1])


def test_two_corrected_classes_by_hand() -> None:
    """Fieller's ratio by MOVER: the ends solve ``q - (1 - θ) f - θ Se = ± root of the squared one-sided errors``."""
    confusion = np.array([[80, 20], [10, 90]])
    low, high = stats.correct_shares(np.array([50, 50]), confusion).intervals[1]
    (q_low, q_high), (f_low, f_high), (s_low, s_high) = (
        stats.share_interval(*kn) for kn in ((50, 100), (20, 100), (90, 100))
    )
    for theta, q_end, f_end, s_end in ((low, q_low, f_high, s_high), (high, q_high, f_low, s_low)):
        gap = 0.5 - (1 - theta) * 0.2 - theta * 0.9
        errors = [q_end - 0.5, (1 - theta) * (f_end - 0.2), theta * (s_end - 0.9)]
        assert abs(gap) == pytest.approx(np.linalg.norm(errors), abs=1e-9)


def test_a_classifier_without_error_leaves_the_exact_intervals() -> None:
    counts = np.array([30, 0, 20, 1])
    found = stats.correct_shares(counts, 1_000_000_000 * np.eye(4, dtype=int))
    exact = [stats.share_interval(int(k), 51) for k in counts]
    assert found.intervals == pytest.approx(np.array(exact), abs=1e-5)
    assert found.values == pytest.approx(counts / 51)


def test_a_zero_count_does_not_pretend_to_be_certain() -> None:
    found = stats.correct_shares(np.array([30, 0, 20]), 100 * np.eye(3, dtype=int))
    assert found.values[1] == pytest.approx(0, abs=1e-9)
    assert found.intervals[1, 1] > 0.01


@pytest.mark.parametrize(
    ("confusion", "message"),
    [
        (np.array([[52, 48], [47, 53]]), "mixes up"),
        (np.array([[10, 90], [90, 10]]), "mixes up"),
        (np.array([[9, 0], [0, 100]]), "needs >= 10"),
        (np.array([[1, 2, 3], [4, 5, 6]]), "square"),
        (np.full((3, 3), 20), "mixes up"),
    ],
)
def test_confusions_that_cannot_be_inverted(confusion: np.ndarray, message: str) -> None:
    with pytest.raises(LensError, match=message):
        stats.error_rates(confusion)


def test_shares_of_two_and_of_three_classes() -> None:
    female, male = stats.shares(np.array([40, 60]), 5, GENDER, GOOD)
    assert (male.label, male.count, male.n, male.n_uncertain, male.raw) == ("male", 60, 100, 5, 0.6)
    assert male.raw_interval == stats.share_interval(60, 100)
    assert female.corrected == pytest.approx(1 - male.corrected)
    assert female.corrected_interval == pytest.approx((1 - male.corrected_interval[1], 1 - male.corrected_interval[0]))
    raw, corrected = stats.log_ratios((female, male))
    assert raw is not None and corrected is not None
    assert raw.value == pytest.approx(np.log(1.5)) and (raw.numerator, raw.denominator) == ("male", "female")
    assert corrected.value == pytest.approx(np.log(male.corrected / female.corrected))
    tones = stats.shares(np.array([50, 30, 20]), 0, TONES, THREE)
    assert sum(t.corrected for t in tones) == pytest.approx(1)
    assert stats.log_ratios(tones) == (None, None)


def test_no_decided_image_says_nothing() -> None:
    classes = stats.shares(np.array([0, 0]), 12, GENDER, GOOD)
    assert all(np.isnan(c.raw) and c.raw_interval == (0, 1) and c.n_uncertain == 12 for c in classes)
    assert stats.log_ratios(classes) == (None, None)


def test_paired_bootstrap_uses_the_pairs() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=200)
    other = base + 0.5 + 0.01 * rng.normal(size=200)

    def gain(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return b.mean(axis=axis) - a.mean(axis=axis)

    found = stats.paired_bootstrap(gain, base, other)
    assert found.interval[1] - found.interval[0] < 0.01  # unpaired it would be about 0.4 wide
    assert found.interval[0] < found.value < found.interval[1]
    assert found == stats.paired_bootstrap(gain, base, other)
    with pytest.raises(LensError, match="needs >= 10"):
        stats.paired_bootstrap(gain, base[:9], other[:9])


def test_cluster_bootstrap_equals_a_slow_loop() -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.binomial(1, p, size=40).astype(float) for p in (0.2, 0.5, 0.9)]
    prompts[1][:5] = np.nan
    found = stats.cluster_bootstrap(prompts, paired_seeds=True, n_boot=4000)
    loop = []
    for _ in range(4000):
        seeds = rng.integers(40, size=40)
        chosen = rng.integers(3, size=3)
        loop.append(np.mean([np.nanmean(prompts[c][seeds]) for c in chosen]))
    assert found.value == pytest.approx(np.mean([np.nanmean(p) for p in prompts]))
    assert found.interval == pytest.approx(tuple(np.quantile(loop, (0.025, 0.975))), abs=0.03)
    fixed = stats.cluster_bootstrap(prompts, paired_seeds=True, fixed_prompts=True)
    assert np.diff(fixed.interval) < np.diff(found.interval) / 2


def test_cluster_bootstrap_coverage_over_fixed_prompts() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        prompts = [rng.binomial(1, p, size=60).astype(float) for p in (0.2, 0.5, 0.8)]
        low, high = stats.cluster_bootstrap(
            prompts, paired_seeds=False, fixed_prompts=True, n_boot=300, seed=trial
        ).interval
        hits += low <= 0.5 <= high
    assert hits >= 180


def test_pooled_share_of_one_prompt_is_the_exact_interval() -> None:
    for k in (0, 3, 20):
        values = np.array([1.0] * k + [0.0] * (20 - k) + [np.nan] * 5)
        found = stats.pooled_share([values], n_draws=50_000)
        assert found.value == pytest.approx(k / 20)
        assert found.interval == pytest.approx(stats.share_interval(k, 20), abs=0.006)
    with pytest.raises(LensError, match="decided image"):
        stats.pooled_share([np.ones(3), np.full(3, np.nan)])
    with pytest.raises(LensError, match="seeds in order"):
        stats.pooled_share([np.ones(3), np.ones(4)])


@pytest.mark.parametrize("shares", [(0.0, 0.0, 0.02), (0.02, 0.5, 0.9), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("n", [10, 48, 250])
def test_pooled_share_coverage(shares: tuple[float, ...], together: bool, n: int) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(200):
        luck = np.broadcast_to(rng.random(n), (3, n)) if together else rng.random((3, n))
        values = [np.where(rng.random(n) < 0.1, np.nan, u < p) for u, p in zip(luck, shares, strict=True)]
        if all(np.isfinite(v).any() for v in values):
            low, high = stats.pooled_share(values, n_draws=400).interval
            hits += low <= np.mean(shares) <= high
    assert hits >= 184


def test_cluster_bootstrap_refusals() -> None:
    enough = np.ones(20)
    with pytest.raises(LensError, match="needs >= 2 prompts"):
        stats.cluster_bootstrap([enough], paired_seeds=True)
    with pytest.raises(LensError, match="needs >= 10"):
        stats.cluster_bootstrap([enough, np.full(20, np.nan)], paired_seeds=True)
    with pytest.raises(LensError, match="share their seeds"):
        stats.cluster_bootstrap([enough, np.ones(30)], paired_seeds=True)
