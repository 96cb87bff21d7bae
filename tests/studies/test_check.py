"""``check``: verdicts and intervals by hand, its slow references, a planted world of known shares, whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from check_sizes import TINY
from measured import counted, measured
from sae_helpers import AGE, GENDER, random_maps, random_probe, random_sae
from scipy.stats import norm

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.features.reference import autograd_scores
from diffusion_lens.features.train_sae import evaluate_sae
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.generate import StepContext
from diffusion_lens.portraits import world as portraits
from diffusion_lens.results.stats import share_interval
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studies.check import steering, world
from diffusion_lens.studies.check.inside import Reconstruction, fidelity
from diffusion_lens.studies.check.result import CheckReport, Row, at_least, at_most, distance, stretch, visible, worst
from diffusion_lens.studies.check.run import plain_report, row_texts, run_check
from diffusion_lens.studies.check.runs import FIRST_SEED, Job


def test_verdicts() -> None:
    assert at_least(1, "", 0.96, (0.9, 0.99), 0.95, "share", 9).verdict == "holds"
    assert at_least(1, "", 0.94, (0.9, 0.97), 0.95, "share", 9).verdict == "open"
    assert at_least(1, "", 0.9, (0.85, 0.94), 0.95, "share", 9).verdict == "fails"
    assert at_least(1, "", 0.9, None, 0.95, "share", 9).verdict == "fails"
    assert at_most(1, "", 0.03, (0.01, 0.08), 0.04, "points", 9).verdict == "holds"
    assert at_most(1, "", 0.05, (0.02, 0.08), 0.04, "points", 9).verdict == "open"
    assert at_most(1, "", 0.07, (0.05, 0.09), 0.04, "points", 9).verdict == "fails"
    assert at_most(1, "", float("nan"), None, 0.04, "points", 9).verdict == "fails"


def test_stretched_intervals_hold_together() -> None:
    assert stretch(0.5, (0.4, 0.7), 1) == pytest.approx((0.4, 0.7))
    low, high = stretch(0.5, (0.4, 0.7), 20)
    factor = norm.ppf(1 - 0.05 / 40) / norm.ppf(0.975)
    assert (0.5 - low, high - 0.5) == pytest.approx((0.1 * factor, 0.2 * factor))


def test_distance_of_an_interval_from_zero() -> None:
    assert distance((-0.1, 0.3)) == (0.0, 0.3)
    assert distance((-0.3, -0.1)) == (0.1, 0.3)
    assert distance((0.1, 0.2)) == (0.1, 0.2)


def test_what_a_check_can_see() -> None:
    """At the distance that ``visible`` gives, four of five simulated checks fail the row; the card's own numbers."""
    n, m, bar = 400, 50, 0.04
    off = visible(n, m, bar)
    shares = np.random.default_rng(0).binomial(n, 0.5 + off, size=2000) / n
    half = norm.ppf(1 - 0.025 / m) * np.sqrt(shares * (1 - shares) / n)
    assert np.mean(shares - half - 0.5 > bar) == pytest.approx(0.8, abs=0.06)
    assert visible(1000, 442, bar) == pytest.approx(0.114, abs=0.005) and visible(64, 442, bar) > 0.3


def test_worst_is_the_gravest_then_the_tightest() -> None:
    wide, tight = at_most(1, "wide", 0.01, None, 0.04, "points", 1), at_most(1, "tight", 0.03, None, 0.04, "points", 1)
    unclear = at_most(1, "open", 0.05, (0.0, 0.1), 0.04, "points", 1)
    assert worst([wide, tight]) is tight
    assert worst([wide, unclear, tight]) is unclear


def report(full: bool, *verdicts: Any) -> CheckReport:
    rows = tuple(Row(1, "row", "bar", verdict) for verdict in verdicts)
    return CheckReport(rows, full, "lens", "id", "classifier", 0, "cpu", 1.0)


def test_an_open_row_passes_the_quick_check_alone() -> None:
    assert report(False, "holds", "open", "not applicable", "information").holds
    assert not report(True, "holds", "open").holds
    assert report(True, "holds", "not applicable").holds
    assert not report(False, "holds", "fails").holds
    assert report(True, "holds", "open").summary.startswith("full check not passed: 1 holds, 1 open")


@pytest.mark.parametrize("layout", ["position", "map"])
def test_fidelity_equals_the_trainers_own_measure(layout: str) -> None:
    sae, h = random_sae(layout), random_maps(3, 2).numpy()
    samples = torch.cat([sae.to_samples(torch.from_numpy(h[:, step])) for step in range(2)])
    found = fidelity(sae, h)
    assert found.fvu == pytest.approx(evaluate_sae(sae, samples)[0], rel=1e-5)
    assert found.fired.tolist() == (sae.encode(samples) > 0).any(0).tolist()
    alone = fidelity(sae, h[1:2])
    assert found.error[1] == pytest.approx(alone.error[0], rel=1e-5)


@pytest.mark.parametrize("layout", ["position", "map"])
@pytest.mark.parametrize("attribute", [GENDER, AGE])
def test_reference_is_complete_and_equals_the_closed_form(layout: str, attribute: Attribute) -> None:
    sae, probe, h = random_sae(layout), random_probe(attribute), random_maps(3, 3)
    slow = autograd_scores(sae, probe, h, steps=[0, 2])
    np.testing.assert_allclose(slow, integrated_gradients(sae, probe, h).scores[:, [0, 2]], atol=1e-6)
    for row, step in enumerate((0, 2)):
        samples = sae.to_samples(h[:, step])
        end = probe.probs(sae.from_samples(sae(samples)), step)
        start = probe.probs(sae.from_samples(sae.decode(torch.zeros(len(samples), sae.cfg.d_sae))), step)
        np.testing.assert_allclose(slow[:, row].sum(-1), (end - start).mean(0).detach().numpy(), atol=1e-5)


def test_reconstruction_puts_the_saes_output_in_place() -> None:
    sae, h = random_sae(), random_maps(2, 1)[:, 0]
    context = StepContext(0, 4, 900, (1, 2), None, 0.5, torch.zeros(2, 4, 8, 8))
    out = Reconstruction(sae).apply(h, context)
    assert torch.equal(out, sae.from_samples(sae(sae.to_samples(h))))
    assert Reconstruction(sae).spec != Reconstruction(random_sae(seed=1)).spec


def test_thinned_grids_keep_both_ends_and_the_identity() -> None:
    grid = (-3.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0)
    assert steering.thin(grid, 9, 1.0) == grid
    for n in (3, 4, 5):
        kept = steering.thin(grid, n, 1.0)
        assert len(kept) == n and (kept[0], kept[-1]) == (-3.0, 5.0) and 1.0 in kept
    assert steering.thin((0.0, 1.0, 2.0, 3.0), 3, 9.0) == (0.0, 2.0, 3.0)


def swept(*shares: float) -> Any:
    runs = [measured({GENDER: (np.arange(100) < 100 * share).astype(int)})["gender"] for share in shares]
    return SimpleNamespace(result=SimpleNamespace(attribute=GENDER, points=runs))


def test_order_fails_on_a_fall_that_chance_does_not_explain() -> None:
    male = GENDER.index("male")
    rising = steering.order_row(swept(0.2, 0.5, 0.8), male, "x")
    assert (rising.verdict, rising.value) == ("holds", 0.0)
    wobble = steering.order_row(swept(0.2, 0.81, 0.8), male, "x")
    assert wobble.verdict == "holds" and wobble.value == pytest.approx(0.01)
    fall = steering.order_row(swept(0.2, 0.9, 0.5), male, "x")
    assert fall.verdict == "fails" and fall.value == pytest.approx(0.4)
    falling = steering.order_row(swept(0.8, 0.2), GENDER.index("female"), "x")
    assert falling.verdict == "holds"


SOME = ("", "a portrait of a nurse")


def planted_lens() -> Any:
    """A stand-in for a lens of the planted world whose classifier never errs."""
    confusion = {a.name: np.eye(len(a.classes), dtype=int) * 5000 for a in portraits.ATTRIBUTES}
    classifier = SimpleNamespace(attributes=portraits.ATTRIBUTES, confusion=confusion)
    return SimpleNamespace(prompts=SOME, classifier=classifier)


def planted_images(n: int, gender_of_nurses: tuple[int, int] | None = None) -> world.Counted:
    """Images of both prompts as planted, but for the nurses' genders (female, male) where they are given."""
    found: world.Counted = {}
    for prompt in SOME:
        labels = {}
        for attribute in portraits.ATTRIBUTES:
            shares = portraits.planted_shares(prompt)[attribute.name]
            counts = np.floor(shares * n).astype(int)
            counts[np.argmax(shares)] += n - counts.sum()
            if prompt and attribute.name == "gender" and gender_of_nurses is not None:
                counts = np.array(gender_of_nurses)
            labels[attribute] = counted(attribute, *counts)
        sure = {a.name: 5000 * np.eye(len(a.classes), dtype=int) for a in portraits.ATTRIBUTES}
        found[prompt] = measured(labels, prompt=prompt, confusion=sure)
    return found


def test_professions_that_do_not_hold_are_named_with_why(tiny_lens: DiffusionLens) -> None:
    nouns = ("doctor", "nurse", "cook", "judge", "farmer")

    def rows(noun: str, moved: float) -> list[Row]:
        names = (f"FD at balance, 'a portrait of a {noun}'", f"age shares moved at balance, 'a portrait of a {noun}'")
        return [at_most(5, names[0], 0.05, (0.0, 0.1), 0.06, "number", 9),
                at_most(5, names[1], moved, (moved - 0.02, moved + 0.02), 0.05, "points", 9)]  # fmt: skip

    measured = [rows(noun, moved) for noun, moved in zip(nouns, (0.01, 0.118, 0.03, 0.06, 0.02), strict=True)]
    job = Job(tiny_lens, TINY, strict=True)
    *worst_of_four, count = steering._profession_rows(job, measured, [f"a portrait of a {noun}" for noun in nouns])
    assert [row.value for row in worst_of_four] == [0.05, 0.06]  # of the best four; the nurse is not among them
    assert count.value == 3 and count.verdict == "fails"
    assert count.note == (
        "3 of 5 measured hold; the worst of doctor, cook, farmer, judge above; not: nurse (age shares moved at balance "
        "11.8 points), judge (age shares moved at balance 6.0 points)"
    )
    quick = Job(tiny_lens, TINY)
    assert steering._profession_rows(quick, measured, [f"a {noun}" for noun in nouns])[-1].value == 4  # open passes


def test_shares_are_compared_with_the_planted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "has_truth", lambda lens: True)
    job = Job(planted_lens(), replace(TINY, again=0))
    rows = world.share_rows(job, planted_images(1000))
    assert [row.verdict for row in rows] == ["holds"] * len(portraits.ATTRIBUTES)
    rows = world.share_rows(job, planted_images(1000, (700, 300)))  # planted: 900, 100
    assert [row.verdict for row in rows] == ["fails"] + ["holds"] * (len(portraits.ATTRIBUTES) - 1)
    assert "nurse" in rows[0].note and rows[0].value == pytest.approx(0.2, abs=2e-3)
    within_chance = planted_images(1000, (855, 145))  # 4.5 points off
    assert world.share_rows(job, within_chance)[0].verdict == "open"


def test_chance_of_a_perfect_model_to_miss_the_bar() -> None:
    lens = planted_lens()
    smile = [c for c in world.compare(lens, planted_images(1000)) if c.share.label == "smile"]
    spread = np.sqrt(0.45 * 0.55 / 1000)
    assert smile[0].chance == pytest.approx(2 * norm.sf(0.04 / spread))
    assert 0.01 < smile[0].chance < 0.02


def test_no_two_groups_or_prompts_share_a_seed() -> None:
    job = Job(planted_lens(), TINY)
    ranges = [job.seeds(part, place, 1000, skip) for part in (1, 3, 5) for place in range(13) for skip in (0, 1000)]
    assert len({seed for some in ranges for seed in some}) == 1000 * len(ranges)
    with pytest.raises(LensError, match="up to 50,000"):
        job.seeds(1, 0, 60_000)


def test_a_lens_is_not_checked_on_seeds_that_it_was_chosen_on(tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match="fitted on seeds from 1,000,000"):
        run_check(tiny_lens, first_seed=1_000_000, sizes=TINY)


def test_unknown_parts_are_refused(tiny_lens: DiffusionLens) -> None:
    for parts in ((), (7,)):
        with pytest.raises(LensError, match="has the parts 1, 2, 3, 4, 5"):
            run_check(tiny_lens, parts=parts)


@pytest.fixture(scope="module")
def whole(tiny_lens: DiffusionLens) -> tuple[CheckReport, list[str]]:
    stages: list[str] = []
    told: list[Row] = []
    watched = Progress(lambda status: stages.append(status.stage))
    found = run_check(tiny_lens, sizes=TINY, progress=watched, on_rows=told.extend)
    first, control = found.by_prompt, found.rows[-1]
    assert told == [*(row for row in found.rows if row.part < 5), *first, control]  # as soon as it was measured
    return found, stages


def test_a_whole_check_measures_every_part(whole: tuple[CheckReport, list[str]]) -> None:
    found, stages = whole
    assert sorted({row.part for row in found.rows}) == [1, 2, 3, 4, 5]
    assert {stage[0] for stage in stages} == {"1", "3", "4", "5"}
    by_part = {part: [row for row in found.rows if row.part == part] for part in range(1, 6)}
    assert [row.verdict for row in by_part[1]] == ["not applicable"]
    assert by_part[2][0].verdict == "not applicable"
    assert {row.verdict for row in by_part[4]} == {"holds"}  # true of any lens
    measured = [row for row in found.rows if row.interval is not None and row.value is not None]
    assert measured and all(row.interval[0] <= row.value + 1e-12 for row in measured if row.interval and row.value)
    assert found.first_seed == FIRST_SEED


def test_the_shares_measured_on_the_way_are_kept(
    whole: tuple[CheckReport, list[str]], tiny_lens: DiffusionLens
) -> None:
    kept = whole[0].counted
    assert kept is not None and tuple(kept.shares) == tuple(p or "" for p in tiny_lens.prompts)
    job = Job(tiny_lens, TINY)
    prompt = tiny_lens.prompts[1]
    images = tiny_lens.generate(prompt, seeds=job.seeds(1, 1, TINY.shares)).images
    read = tiny_lens.classify(images)["gender"]
    shares = kept.shares[prompt or ""]["gender"]
    assert [share.count for share in shares] == read.counts.tolist()
    assert shares[0].n + shares[0].n_uncertain == TINY.shares
    assert kept.measurements[prompt or ""].request.seeds == tuple(job.seeds(1, 1, TINY.shares))
    assert run_check(tiny_lens, parts=(4,), sizes=TINY).counted is None


def test_undecided_images_are_counted(whole: tuple[CheckReport, list[str]], tiny_lens: DiffusionLens) -> None:
    row = next(row for row in whole[0].rows if row.name.startswith("gender: undecided"))
    n = TINY.shares * len(tiny_lens.prompts)
    job = Job(tiny_lens, TINY)
    images = [
        tiny_lens.generate(prompt, seeds=job.seeds(1, place, TINY.shares)).images
        for place, prompt in enumerate(tiny_lens.prompts)
    ]
    k = sum(tiny_lens.classify(part)["gender"].n_uncertain for part in images)
    assert (row.n, row.value, row.interval) == (n, k / n, share_interval(k, n))


def test_sweeps_come_with_their_control_and_serialise(whole: tuple[CheckReport, list[str]]) -> None:
    found, _ = whole
    sweeps: tuple[SweepResult, ...] = found.sweeps
    assert [sweep.is_control for sweep in sweeps] == [False] * (len(sweeps) - 1) + [True]
    assert sweeps[0].request == sweeps[-1].request
    plain = json.loads(json.dumps(plain_report(found), allow_nan=False))
    assert plain["holds"] == found.holds and len(plain["rows"]) == len(found.rows)
    assert all(len(row_texts(row)) == 7 for row in found.rows)
