"""Single features turned alone: effects against a plain run, grouping on tables of known truth, names in the atlas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS
from scipy.stats import binomtest

from diffusion_lens.base.progress import Cancelled, Progress
from diffusion_lens.base.types import Attribute, FeatureSet, Intervention, LensError, Predictions
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.denoise import Capture, StepContext
from diffusion_lens.model.generate import generate, record_trajectory, request
from diffusion_lens.results.dissection import (
    effects_of,
    evidence,
    groups,
    is_sure,
    least_images,
    load_dissection,
    moved_beside,
    name_of,
    save_dissection,
    to_atlas,
)
from diffusion_lens.results.manifest import verify
from diffusion_lens.steering.intervene import make_edit
from diffusion_lens.studies.dissect import run as module
from diffusion_lens.studies.dissect.choose import candidates, choose_features, contrasts, difference_shares
from diffusion_lens.studies.dissect.config import DissectConfig
from diffusion_lens.studies.dissect.run import (
    Dissection,
    FeatureTurns,
    dissect,
    first_firing,
    make_plan,
    paired_effects,
    plan_batches,
    q_values,
)

GLASSES = Attribute("glasses", ("none", "glasses"))


def config(**changes: Any) -> DissectConfig:
    """A dissection of seconds."""
    values: dict[str, Any] = {
        "prompt": PROMPTS[0],
        "n": 20,
        "betas": (8.0,),
        "sampler": "symmetric",
        "batch_size": 20,
        **changes,
    }
    return DissectConfig(**values)


def made(effects: dict[str, np.ndarray], p_values: dict[str, np.ndarray], **changes: Any) -> Dissection:
    """A dissection of known numbers."""
    n = len(next(iter(effects.values())))
    classes = {"glasses": ("none", "glasses"), "beard": ("no beard", "beard")}
    values: dict[str, Any] = {
        "features": tuple(range(n)), "betas": (10.0,) * n, "effects": effects,
        "classes": {name: classes[name] for name in effects},
        "low": {k: v - 0.1 for k, v in effects.items()}, "high": {k: v + 0.1 for k, v in effects.items()},
        "p_values": p_values, "flips": {k: np.abs(v[:, 0]) for k, v in effects.items()}, "sae_id": "s",
        "q_values": q_values(p_values), "source": "test", "alpha": 0.05, "n": 32, **changes,
    }  # fmt: skip
    return Dissection(**values)


def alone(lens: DiffusionLens, feature: int, mode: Any = "scale", beta: float = 8.0) -> Intervention:
    """One feature's turn, as anybody would write it."""
    return Intervention.at_beta(
        FeatureSet((feature,), (0.0,), "", "", lens.sae.sae_id), mode, beta, sampler="symmetric"
    )


def some_features(lens: DiffusionLens) -> tuple[int, ...]:
    """The most and the least active live features."""
    order = np.argsort(-lens.atlas.density, kind="stable")
    live = [int(i) for i in order if lens.atlas.density[i] > 0]
    return (*live[:3], *live[-3:])


@pytest.mark.parametrize(("sampler", "batch"), [("symmetric", 7), ("asymmetric", 20)])
def test_features_are_turned_alone_on_the_same_seeds(
    tiny_lens: DiffusionLens, tmp_path: Path, sampler: Any, batch: int
) -> None:
    features = some_features(tiny_lens)
    found = dissect(tiny_lens, config(features=features, sampler=sampler, batch_size=batch), tmp_path)
    seeds = range(10_000_000, 10_000_020)
    assert found.features == tuple(sorted(features)) and set(found.classes) == {"gender", "age", "glasses"}
    before = tiny_lens.classify(tiny_lens.generate(PROMPTS[0], seeds=seeds, batch_size=20).images)
    for row, feature in enumerate(found.features):
        turn = Intervention.at_beta(alone(tiny_lens, feature).features, "scale", 8.0, sampler=sampler)
        after = tiny_lens.classify(tiny_lens.generate(PROMPTS[0], turn, seeds=seeds, batch_size=20).images)
        for name, p in before.items():
            both = p.certain & after[name].certain
            for label in range(len(p.attribute.classes)):
                shares = [float((q.labels[both] == label).mean()) for q in (p, after[name])]
                assert found.effects[name][row, label] == pytest.approx(shares[1] - shares[0])
            assert found.flips[name][row] == pytest.approx((p.labels != after[name].labels)[both].mean())


def test_a_feature_is_turned_to_every_beta(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    features = some_features(tiny_lens)[:2]
    both = dissect(tiny_lens, config(features=features, betas=(8.0, -4.0)), tmp_path / "both")
    assert sorted(zip(both.features, both.betas, strict=True)) == sorted((f, b) for f in features for b in (8.0, -4.0))
    assert both.ids() == tuple(sorted(features)) and "β = 8 and -4, symmetric" in both.source
    for beta in (8.0, -4.0):
        one = dissect(tiny_lens, config(features=features, betas=(beta,)), tmp_path / str(beta))
        rows = [both.betas[row] == beta for row in range(4)]
        for name in one.classes:
            np.testing.assert_array_equal(both.effects[name][rows], one.effects[name])
    added = dissect(tiny_lens, config(features=features, betas=(-4.0,)), tmp_path / "8.0")
    assert (added.features, added.betas) == (both.features, both.betas), "another β adds to a folder"


def test_a_feature_belongs_where_the_furthest_of_its_turns_moved(tiny_lens: DiffusionLens) -> None:
    effects = {"glasses": np.array([[-0.2, 0.2], [0.1, -0.1]]), "beard": np.array([[0.1, -0.1], [0.5, -0.5]])}
    sure = {name: np.full((2, 2), 1e-6) for name in effects}
    found = made(effects, sure, features=(3, 3), betas=(10.0, -4.0), sae_id=tiny_lens.atlas.sae_id)
    grouped = groups(found)
    assert not grouped["glasses"] and [(e.feature, e.beta, e.label) for e in grouped["beard"]] == [
        (3, -4.0, "no beard")
    ]
    assert [(e.beta, e.difference) for e in effects_of(found, 3) if e.label == "glasses"] == [(10.0, 0.2), (-4.0, -0.1)]
    assert "1 features tested" in evidence(found, "beard") and "at β = -4" in evidence(found, "beard")
    assert to_atlas(found, tiny_lens.atlas).effects["beard"][3] == pytest.approx([0.5, -0.5])


def test_restarted_images_are_those_of_a_whole_run(tiny_lens: DiffusionLens) -> None:
    settings = config(n=20, batch_size=20)
    plan = make_plan(tiny_lens, settings, [(feature, 8.0) for feature in some_features(tiny_lens)])
    late = [(i, f) for i, f in np.argwhere((plan.first > 0) & (plan.first < plan.request.n_steps))]
    assert late, "some feature must begin to fire late for this test to say anything"
    image, feature = (int(v) for v in late[0])
    seed, begin = plan.request.seeds[image], int(plan.first[image, feature])
    part = tiny_lens.request(PROMPTS[0], [seed])
    turns = FeatureTurns(tiny_lens.sae, {seed: (feature, 8.0)}, "scale", "symmetric", (begin, plan.request.n_steps))
    start = record_trajectory(tiny_lens.model, part)
    restarted = generate(tiny_lens.model, part, edit=turns, start=start).images
    whole = tiny_lens.generate(part, alone(tiny_lens, feature)).images
    np.testing.assert_array_equal(restarted, whole)
    never = [(i, f) for i, f in np.argwhere(plan.first == plan.request.n_steps)]
    image, feature = (int(v) for v in never[0])
    part = tiny_lens.request(PROMPTS[0], [plan.request.seeds[image]])
    same = tiny_lens.generate(part, alone(tiny_lens, feature)).images
    np.testing.assert_array_equal(same, tiny_lens.generate(part).images)


def test_first_firing_is_the_slow_search(tiny_lens: DiffusionLens) -> None:
    h = tiny_lens.generate(PROMPTS[0], seeds=range(5), capture=True).activations.h.astype(np.float32)
    first = first_firing(tiny_lens.sae, h)
    for image, feature in np.ndindex(first.shape):
        acts = [
            tiny_lens.sae.encode(tiny_lens.sae.to_samples(torch.from_numpy(h[image, step][None])))[..., feature]
            for step in range(h.shape[1])
        ]
        fires = [step for step, a in enumerate(acts) if (a > 0).any()]
        assert first[image, feature] == (fires[0] if fires else h.shape[1])


@pytest.mark.parametrize("mode", ["scale", "add", "suppress"])
def test_a_batch_of_features_turns_each_image_by_its_own(tiny_lens: DiffusionLens, mode: Any) -> None:
    seeds, features = (3, 5, 9), some_features(tiny_lens)[:2]
    own = {3: (features[0], 3.0), 5: (features[1], 3.0), 9: (features[0], -2.0)}
    drawn = tiny_lens.generate(PROMPTS[0], seeds=seeds, capture=True)
    h = torch.from_numpy(drawn.activations.h[:, 1].astype(np.float32))

    def context(rows: tuple[int, ...]) -> StepContext:
        return StepContext(1, 4, 500, rows, None, 0.5, torch.zeros(len(rows), 4, 8, 8))

    together = FeatureTurns(tiny_lens.sae, own, mode, "symmetric", (0, 4)).apply(h, context(seeds))
    for row, seed in enumerate(seeds):
        edit = make_edit([alone(tiny_lens, own[seed][0], mode, own[seed][1])], tiny_lens.sae)
        expected = edit.apply(h[row : row + 1], context((seed,)))
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(together, h)


def test_batches_hold_every_pair_once_and_no_image_twice() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 6, (10, 7))
    batches = list(plan_batches(first, 5, 4))
    pairs = [pair for batch in batches for pair in batch]
    assert sorted(pairs) == [(int(i), int(j)) for i, j in np.argwhere(first < 5)]
    assert all(len({i for i, _ in batch}) == len(batch) <= 4 for batch in batches)
    wasted = sum(first[i, j] - min(first[a, b] for a, b in batch) for batch in batches for i, j in batch)
    assert wasted <= len(pairs) / 2, "a batch begins where its images do"


def test_paired_effects_by_hand() -> None:
    def reading(labels: list[int], certain: list[bool]) -> Predictions:
        return Predictions(np.eye(2)[labels], np.array(certain), GLASSES, "c")

    before, after = [0] * 12 + [1] * 4, [0] * 4 + [1] * 12
    moved = paired_effects(reading(before, [True] * 16), reading(after, [True] * 15 + [False]))
    assert moved[0] == pytest.approx([-8 / 15, 8 / 15])
    assert (moved[1] < moved[0]).all() and (moved[2] > moved[0]).all()
    assert moved[3] == pytest.approx([binomtest(8, 8).pvalue] * 2)
    nothing = paired_effects(reading(before, [False] * 16), reading(after, [True] * 16))
    assert np.isnan(nothing[0]).all() and nothing[3].tolist() == [1.0, 1.0]


def test_groups_hold_each_feature_where_its_largest_sure_effect_lies() -> None:
    glasses = np.array([[-0.4, 0.4], [-0.3, 0.3], [0.1, -0.1], [0.5, -0.5]])
    beard = np.array([[0.1, -0.1], [-0.35, 0.35], [0.0, 0.0], [0.2, -0.2]])
    sure = np.full((4, 2), 1e-6)
    unsure = np.ones((4, 2))
    unsure[1] = 1e-6
    p_glasses = sure.copy()
    p_glasses[2] = 0.6
    found = made({"glasses": glasses, "beard": beard}, {"glasses": p_glasses, "beard": unsure})
    grouped = groups(found)
    assert [(e.feature, e.label) for e in grouped["glasses"]] == [(3, "none"), (0, "glasses")]
    assert [(e.feature, e.label) for e in grouped["beard"]] == [(1, "beard")]
    first = grouped["glasses"][1]
    assert first.difference == pytest.approx(0.4) and first.interval == pytest.approx((0.3, 0.5))
    assert first.specificity == pytest.approx(0.4 / 0.5) and name_of(first) == "glasses: glasses +40 points at β = 10"
    assert name_of(replace(first, beta=-4.0)) == "glasses turned down: glasses +40 points at β = -4"


def test_false_discoveries_are_held_down() -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(size=(200, 2))
    effects = {"glasses": rng.normal(size=(200, 2))}
    found = made(effects, {"glasses": noise})
    assert sum(map(len, groups(found).values())) <= 2  # 20 would pass at 5 % without adjustment
    flat = np.sort(noise.ravel())
    slow = np.minimum.accumulate((flat * len(flat) / np.arange(1, len(flat) + 1))[::-1])[::-1]
    np.testing.assert_allclose(np.sort(found.q_values["glasses"].ravel()), np.minimum(slow, 1))


def test_what_cannot_change_is_no_test() -> None:
    p = np.array([[0.01, 0.01], [0.04, 0.04], [np.nan, np.nan]])
    adjusted = q_values({"glasses": p})["glasses"]
    assert np.isnan(adjusted[2]).all() and adjusted[:2].tolist() == [[0.02, 0.02], [0.04, 0.04]]
    found = made({"glasses": np.array([[-0.4, 0.4], [0.1, -0.1], [0.0, 0.0]])}, {"glasses": p})
    assert found.tested.tolist() == [True, True, False]
    assert "2 features tested" in evidence(found, "glasses")


def test_evidence_says_what_was_found_and_what_could_have_been() -> None:
    effects = {"glasses": np.array([[-0.5, 0.5], [0.1, -0.1]]), "beard": np.array([[0.2, -0.2], [0.0, 0.0]])}
    p_values = {"glasses": np.array([[1e-6, 1e-6], [0.9, 0.9]]), "beard": np.array([[0.2, 0.2], [1.0, 1.0]])}
    found = made(effects, p_values)
    assert "feature #0: glasses +50 points (95 % +40 to +60) at β = 10." in evidence(found, "glasses")
    none = evidence(found, "beard")
    assert "No feature tested moves beard for sure (the largest: #0, no beard +20 points" in none
    assert "2 features tested on 32 paired images a turn" in none
    # two of eight tests count: an effect passes at p <= 0.05 * 2 / 8 = 0.0125, eight images moved one way (2^-7)
    assert least_images(found) == 8 and binomtest(8, 8).pvalue <= 0.0125 < binomtest(7, 7).pvalue
    p_values["beard"][0] = 1e-6
    beside = made(effects, p_values)
    assert "one feature moves it for sure beside something that moves further" in evidence(beside, "beard")
    assert "the furthest #0: no beard +20 points (95 % +10 to +30) at β = 10" in evidence(beside, "beard")
    assert [e.feature for e in moved_beside(beside, "beard")] == [0] and not moved_beside(beside, "glasses")
    still = {name: np.zeros_like(e) for name, e in effects.items()}
    assert "never moved" in evidence(made(still, {k: np.ones_like(v) for k, v in p_values.items()}), "beard")


def test_a_card_gets_every_class_with_its_test() -> None:
    found = made({"glasses": np.array([[-0.4, 0.4]])}, {"glasses": np.array([[1e-6, 1e-6]])}, features=(5,))
    first, second = effects_of(found, 5)
    assert (first.label, second.label) == ("none", "glasses") and second.difference == pytest.approx(0.4)
    assert is_sure(found, second) and effects_of(found, 4) == ()


def test_a_dissection_reads_back(tmp_path: Path) -> None:
    found = made({"glasses": np.array([[-0.4, 0.4]])}, {"glasses": np.array([[1e-6, np.nan]])})
    save_dissection(tmp_path / "dissection.safetensors", found)
    again = load_dissection(tmp_path / "dissection.safetensors")
    for part in ("effects", "low", "high", "p_values", "q_values", "flips"):
        np.testing.assert_array_equal(getattr(again, part)["glasses"], getattr(found, part)["glasses"])
    assert (again.features, again.classes, again.n, again.source) == (found.features, found.classes, 32, "test")
    assert again.betas == found.betas
    (tmp_path / "dissection.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(LensError, match="damaged"):
        load_dissection(tmp_path / "dissection.safetensors")


def test_the_atlas_takes_effects_and_names(tiny_lens: DiffusionLens) -> None:
    atlas = tiny_lens.atlas
    found = made(
        {"glasses": np.array([[-0.4, 0.4], [0.0, 0.0]])}, {"glasses": np.array([[1e-9, 1e-9], [1.0, 1.0]])},
        features=(5, 7), sae_id=atlas.sae_id,
    )  # fmt: skip
    new = to_atlas(found, atlas)
    assert new.labels[5] == "glasses: glasses +40 points at β = 10" and new.labels[7] == atlas.labels[7]
    assert new.effects["glasses"][5] == pytest.approx([-0.4, 0.4]) and np.isnan(new.effects["glasses"][6]).all()
    assert "turning it alone" in new.label_source
    with pytest.raises(LensError, match="another SAE"):
        to_atlas(made({"glasses": np.zeros((1, 2))}, {"glasses": np.ones((1, 2))}), atlas)


def test_a_stopped_dissection_goes_on_and_another_is_refused(
    tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = some_features(tiny_lens)[:3]
    monkeypatch.setattr(module, "BLOCK", 1)
    measured: list[int] = []
    real = module.measure_block

    def count(lens: Any, settings: Any, plan: Any, turns: Any, *rest: Any) -> Any:
        if len(measured) == 2 and len(plan.turns) == len(live):
            raise Cancelled
        measured.extend(feature for feature, _ in turns)
        return real(lens, settings, plan, turns, *rest)

    monkeypatch.setattr(module, "measure_block", count)
    seen: list[float] = []
    with pytest.raises(Cancelled):
        watched = Progress(lambda status: seen.append(status.share))
        dissect(tiny_lens, config(features=live), tmp_path, progress=watched)
    assert seen and seen == sorted(seen) and 0 < seen[-1] < 1
    told: list[str] = []
    found = dissect(tiny_lens, config(features=live), tmp_path, on_plan=lambda plan: told.append(plan.describe()))
    assert measured == list(live) and found.features == tuple(sorted(live))
    assert told[0].startswith("1 turns of features on 20 images each")
    other = some_features(tiny_lens)[3]
    assert set(dissect(tiny_lens, config(features=(other,)), tmp_path).features) == {*live, other}, "they add up"
    with pytest.raises(LensError, match="another dissection"):
        dissect(tiny_lens, config(features=live, n=21), tmp_path)


def test_numbers_of_half_precision_are_kept_apart(
    tiny_lens: DiffusionLens, tiny_lens_folder: Path, tmp_path: Path
) -> None:
    wanted = config(features=some_features(tiny_lens)[:1])
    half = DiffusionLens.from_pretrained(tiny_lens_folder, dtype=torch.bfloat16)
    found = dissect(half, wanted, tmp_path / "half")
    assert np.isfinite(found.effects["gender"]).all()
    single = dissect(tiny_lens, wanted, tmp_path / "single")
    for lens, folder in ((tiny_lens, "half"), (half, "single")):
        with pytest.raises(LensError, match="another dissection"):
            dissect(lens, wanted, tmp_path / folder)
    assert single.effects["gender"].shape == found.effects["gender"].shape


def test_an_effect_that_came_too_far_is_refused_before_anything_is_drawn(
    tiny_lens: DiffusionLens, tmp_path: Path
) -> None:
    with pytest.raises(LensError, match="beta"):
        dissect(tiny_lens, config(betas=(8.0, 1e9)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_live_features_are_chosen(tiny_lens: DiffusionLens) -> None:
    density = tiny_lens.atlas.density
    least = float(np.sort(density)[-2])
    assert set(choose_features(tiny_lens, config(min_density=least))) == set(np.flatnonzero(density >= least).tolist())
    top = choose_features(tiny_lens, config(top=4, min_density=0))
    assert list(top) == np.argsort(-density, kind="stable")[:4].tolist()
    by_two = choose_features(tiny_lens, config(top=6, by=("gender", "density"), min_density=0))
    totals = tiny_lens.attributions["gender"]
    share = np.max([totals.total(c) / np.abs(totals.total(c)).max() for c in ("female", "male")], axis=0)
    assert by_two[0] == int(np.where(density > 0, share, -9).argmax()) and by_two[1] == int(density.argmax())
    with pytest.raises(LensError, match="Name features"):
        choose_features(tiny_lens, config(features=(10_000,)))
    with pytest.raises(LensError, match="none of these"):
        choose_features(tiny_lens, config(top=2, by=("hats",)))


def test_shares_of_a_difference_are_those_of_the_sum_written_out(tiny_lens: DiffusionLens) -> None:
    sae, rng = tiny_lens.sae, np.random.default_rng(5)
    h = 3 * rng.normal(size=(6, 2, sae.cfg.channels, *sae.cfg.spatial)).astype(np.float32)
    contrast = np.array([[0.5, 0.5, -0.25, -0.25, -0.25, -0.25]])
    found = difference_shares(sae, h, contrast)[0]
    expected, total = np.zeros(sae.cfg.d_sae), 0.0
    w_dec = sae.W_dec.detach().numpy()
    for step in range(2):
        for y in range(h.shape[3]):
            for x in range(h.shape[4]):
                samples = torch.from_numpy(h[:, step, :, y, x].copy())
                acts = contrast[0] @ sae.encode(samples).detach().numpy()
                change = contrast[0] @ samples.numpy()
                total += float(change @ change)
                expected += acts * (w_dec @ change)
    np.testing.assert_allclose(found, expected / total, atol=1e-5)
    assert np.abs(found).max() > 1e-3


def test_a_contrast_weighs_a_class_against_the_others_read_for_sure() -> None:
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.4, 0.6]])
    read = Predictions(probs, np.array([True, True, True, False]), GLASSES, "c")
    np.testing.assert_allclose(contrasts(read), [[0.5, 0.5, -1, 0], [-0.5, -0.5, 1, 0]])
    alike = Predictions(probs[:2], np.array([True, True]), GLASSES, "c")
    assert not contrasts(alike).any()


def test_features_for_what_nobody_probes_are_found_by_images_of_their_own(tiny_lens: DiffusionLens) -> None:
    wanted = config(by=("glasses",), choice_images=24)
    score = candidates(tiny_lens, wanted)["glasses"]
    manifest = tiny_lens.manifest
    seeds = tuple(range(wanted.first_seed + wanted.n, wanted.first_seed + wanted.n + 24))
    plain = request(tiny_lens.model, wanted.prompt, seeds, manifest.n_steps, manifest.guidance_scale)
    drawn = generate(tiny_lens.model, plain, capture=Capture(), batch_size=20)
    weights = contrasts(tiny_lens.classify(drawn.images)["glasses"])
    assert drawn.activations is not None
    np.testing.assert_allclose(
        score, difference_shares(tiny_lens.sae, drawn.activations.h, weights).max(axis=0), atol=1e-6
    )


def test_effects_can_live_in_the_lens(
    tiny_lens: DiffusionLens, copied_lens: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copied_lens()
    feature = int(np.argmax(tiny_lens.atlas.density))
    found = dissect(tiny_lens, config(features=(feature,)), tmp_path)
    opened = DiffusionLens.from_pretrained(folder)
    _ = opened.atlas  # read before: what is stored shows in the lens that is open
    opened.store(found)
    verify(folder)
    np.testing.assert_allclose(opened.atlas.effects["glasses"][feature], found.effects["glasses"][0], rtol=1e-6)
    again = DiffusionLens.from_pretrained(folder).dissection
    assert again is not None and again.features == (feature,)
