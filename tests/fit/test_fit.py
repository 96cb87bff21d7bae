"""A fit goes on where it was killed, repeats only what a change touches, and gives the same lens every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import SETTING, quick
from lens_fixtures import AGE, GENDER, PROMPTS, STEPS, classifier_of, make_classifier, tiny_config
from measured import counted, measured

from diffusion_lens.base.files import load_tensors, read_json
from diffusion_lens.base.progress import Progress, Status
from diffusion_lens.base.types import LensError, Predictions
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.features.atlas import AtlasConfig
from diffusion_lens.features.train_sae import SAETrainConfig
from diffusion_lens.fit.choose import ChooseConfig, Trial, best, candidates, choose_setting, judge, together
from diffusion_lens.fit.config import STAGES, FitConfig, stage_hashes
from diffusion_lens.fit.estimate import Estimate, Speed, StageCost, estimate
from diffusion_lens.fit.run import Models, check_space, fit, load_config, prepare, run_stage
from diffusion_lens.fit.stages import PositionChunks, Work, activations_of, select
from diffusion_lens.judging.labelled import HumanLabels
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.activations import ActivationStore
from diffusion_lens.model.generate import Capture, generate, request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.sweeps import SweepPoint


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_fit_goes_on_and_gives_the_same_lens(tiny_fit_models: Models, tmp_path: Path) -> None:
    whole = fit(quick(), tmp_path / "whole", work=tmp_path / "w1", models=tiny_fit_models)
    calls: list[Status] = []
    again = Progress(calls.append)
    fit(quick(), tmp_path / "again", work=tmp_path / "w1", models=tiny_fit_models, progress=again)
    assert [(status.stage, status.stage_share, status.total) for status in calls] == [(name, 1, 1) for name in STAGES]
    stops = [("sample", 0.3), ("sample", 0.8), ("label", 0.6), ("collect", 0.5), ("sae", 0.5), ("probes", 1.0),
             ("attribution", 1.0), ("sweeps", 1.0)]  # fmt: skip

    def kill(status: Status) -> None:
        if stops and status.stage == stops[0][0] and status.stage_share >= stops[0][1]:
            stops.pop(0)
            raise Killed

    for _ in list(stops):
        with pytest.raises(Killed):
            fit(quick(), tmp_path / "pieces", work=tmp_path / "w2", models=tiny_fit_models, progress=Progress(kill))
    pieces = fit(quick(), tmp_path / "pieces", work=tmp_path / "w2", models=tiny_fit_models, progress=Progress(kill))
    assert pieces.manifest.files == whole.manifest.files


def test_a_resumed_stage_repeats_nothing_that_is_there(tiny_fit_models: Models, tmp_path: Path) -> None:
    def stop(status: Status) -> None:
        if status.share > 0.55:  # in the third of four batches
            raise Killed

    ready = prepare(quick(), tiny_fit_models, tmp_path)
    with pytest.raises(Killed):
        run_stage(replace(ready, progress=Progress(stop)), "sample")
    kept = sorted(ready.folders["sample"].glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2
    run_stage(ready, "sample")
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert sum(len(load_tensors(p)["images"]) for p in ready.folders["sample"].glob("*.safetensors")) == 48


@pytest.mark.parametrize(
    ("change", "first_changed"),
    [
        ({"sae": SAETrainConfig(d_sae=8, k=2, n_steps=20)}, "sae"),
        ({"n_images": 50}, "sample"),
        ({"atlas": AtlasConfig(seed=5)}, "atlas"),
        ({"sweep_images": 13}, "sweeps"),
        ({"sweep_attributes": ("gender",)}, "sweeps"),
        ({"name": "other", "prompts": ("",), "vocabulary": None, "model": "elsewhere", "classifier": "moved"}, None),
    ],
)
def test_a_change_repeats_its_stage_and_all_after_it(change: dict[str, Any], first_changed: str | None) -> None:
    before, after = stage_hashes(quick(), {"unet": "a"}), stage_hashes(quick(**change), {"unet": "a"})
    changed = [stage for stage in STAGES if before[stage] != after[stage]]
    assert changed == ([] if first_changed is None else list(STAGES[STAGES.index(first_changed) :]))
    assert not set(before.values()) & set(stage_hashes(quick(), {"unet": "b"}).values())


def test_prompts_that_the_model_would_not_read_are_refused_before_anything_is_drawn(
    tiny_fit_models: Models, tmp_path: Path
) -> None:
    for changes, words in (
        ({"sampling_prompts": (*PROMPTS, "a portrait of a zebra")}, "never saw “zebra”"),
        ({"vocabulary": None, "sweep_prompts": ("a portrait of a nurse " * 4,)}, "tokens and the model reads"),
        ({"vocabulary": None, "prompts": ("a (nurse:1.4)",)}, "Weights are not read"),
    ):
        with pytest.raises(LensError, match=words):
            prepare(tiny_config(**changes), tiny_fit_models, tmp_path)


def test_every_key_of_the_configuration_has_its_place() -> None:
    from diffusion_lens.fit.config import STAGE_KEYS

    no_stage = {"name", "model", "variant", "classifier", "labeller", "bundle_pipeline", "prompts", "vocabulary"}
    listed = [key for keys in STAGE_KEYS.values() for key in keys]
    assert set(listed) | no_stage == set(FitConfig.model_fields) and len(listed) == len(set(listed))


def test_labels_come_from_the_images_and_only_certain_ones_teach(tiny_fit_models: Models, tmp_path: Path) -> None:
    ready = prepare(quick(), tiny_fit_models, tmp_path)
    for stage in ("sample", "label", "collect"):
        run_stage(ready, stage)
    images = np.concatenate([load_tensors(p)["images"] for p in sorted(ready.folders["sample"].glob("0*.safetensors"))])
    reading = tiny_fit_models.labeller.predict(images)["gender"]
    chosen = load_tensors(ready.folders["collect"] / "rows.safetensors")["of.gender"]
    assert reading.certain[chosen].all()
    assert np.bincount(reading.labels[chosen]).tolist() == [12, 12]


def test_collected_activations_are_those_of_their_images(tiny_fit_models: Models, tmp_path: Path) -> None:
    ready = prepare(quick(), tiny_fit_models, tmp_path)
    for stage in ("sample", "label", "collect"):
        run_stage(ready, stage)
    chosen = load_tensors(ready.folders["collect"] / "rows.safetensors")["of.gender"]
    h = activations_of(ready, chosen[3:9])
    for row, mine in zip(chosen[3:9], h, strict=True):
        prompt, seed = ready.rows()[row]
        drawn = generate(ready.model, request(ready.model, prompt, [seed], STEPS, 2.0), capture=Capture())
        assert drawn.activations is not None
        np.testing.assert_allclose(mine, drawn.activations.h[0], atol=5e-3)
    store = ActivationStore(ready.folders["collect"] / "h")
    samples = next(iter(PositionChunks(store, ready.model.d_in)))
    maps = next(iter(store)).reshape(-1, *ready.model.hook_shape)
    np.testing.assert_array_equal(samples.reshape(len(maps), 16, 8)[5, 6], maps[5].reshape(8, 16)[:, 6])


def predictions(labels: Sequence[int], certain: Sequence[bool]) -> Predictions:
    return Predictions(np.eye(2)[list(labels)], np.array(certain), GENDER, "c")


def test_selection_is_balanced_seeded_and_names_a_rare_class() -> None:
    readings = {"gender": predictions([0] * 30 + [1] * 8, [True] * 34 + [False] * 4)}
    rows = select(readings, ["gender"], 10, 0)["gender"]
    assert len(rows) == 14 and set(range(30, 34)) <= set(rows.tolist()) and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, select(readings, ["gender"], 10, 0)["gender"])
    assert rows.tolist() != select(readings, ["gender"], 10, 1)["gender"].tolist()
    with pytest.raises(LensError, match="Only 3 of 38 images read as gender = male"):
        select({"gender": predictions([0] * 30 + [1] * 8, [True] * 33 + [False] * 5)}, ["gender"], 10, 0)


def test_a_labeller_beside_the_judge_is_recorded(
    tiny_fit_models: Models, text_model: DiffusionModel, tmp_path: Path
) -> None:
    labeller = make_classifier(text_model)
    labeller.network.heads.bias.data[0] += 0.01
    other = type(labeller)(labeller.config, labeller.network, "e" * 16)
    lens = fit(
        quick(), tmp_path / "l", work=tmp_path / "w", models=Models(text_model, tiny_fit_models.classifier, other)
    )
    assert lens.manifest.labeller_id == "e" * 16 and lens.manifest.judged_apart
    assert lens.manifest.classifier_id == tiny_fit_models.classifier.classifier_id


def test_the_labeller_chooses_so_that_the_judge_has_seen_no_step(
    tiny_fit_models: Models, text_model: DiffusionModel, tmp_path: Path
) -> None:
    own, other = tiny_fit_models.classifier, make_classifier(text_model)
    people = HumanLabels(own.attributes, {}, "people")
    for labeller, chooser in ((other, other), (own, own), (people, own)):
        work = prepare(quick(), Models(text_model, own, labeller), tmp_path)
        assert work.chooser is chooser
    unknown = replace(other, config=other.config.model_copy(update={"confusion": {}}))
    assert prepare(quick(), Models(text_model, own, unknown), tmp_path).chooser is own


def test_what_does_not_fit_together_is_refused_before_anything_runs(tiny_fit_models: Models, tmp_path: Path) -> None:
    cases = [
        ({"attributes": ("hat",), "settings": ()}, "does not read 'hat'"),
        ({"model_id": "other"}, "configuration names others"),
        ({"sampling_prompts": (), "prompts": (), "sweep_prompts": ()}, "needs sampling_prompts"),
    ]
    for changes, message in cases:
        with pytest.raises(LensError, match=message):
            fit(quick(**changes), tmp_path / "l", work=tmp_path / "w", models=tiny_fit_models)
    assert not (tmp_path / "w").exists()


def test_a_folder_with_other_things_in_it_is_not_overwritten(tiny_fit_models: Models, tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "thesis.docx").write_text("precious")
    with pytest.raises(LensError, match=r"'thesis\.docx', which is no part of a lens"):
        fit(quick(), tmp_path / "l", work=tmp_path / "w", models=tiny_fit_models)
    assert not (tmp_path / "w").exists()


def test_no_path_of_this_machine_enters_a_bundled_lens(tiny_lens_folder: Path) -> None:
    for path in tiny_lens_folder.rglob("*.json"):
        assert str(tiny_lens_folder.parent) not in path.read_text(), path
    log = read_json(tiny_lens_folder / "fit" / "log.json")
    assert set(log["probe_accuracy"]) == {"gender", "age"} and log["sae"]["l0"] <= 4
    assert len(read_json(tiny_lens_folder / "examples" / "origin.json")) == 40


def test_shipped_sweeps_equal_fresh_ones(tiny_lens: DiffusionLens) -> None:
    stored = next(s for s in tiny_lens.sweeps if s.attribute == GENDER and not s.is_control)
    fresh = tiny_lens.sweep(stored.request, "gender")
    for mine, theirs in zip(stored.points, fresh.points, strict=True):
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        assert mine.fd == theirs.fd and mine.log_ratio == theirs.log_ratio


def test_a_configuration_file_counts_paths_from_its_folder(tmp_path: Path) -> None:
    values = json.loads(quick().model_dump_json())
    (tmp_path / "pipeline").mkdir()
    values.update(model="pipeline", classifier="owner/name")
    (tmp_path / "fit.json").write_text(json.dumps(values))
    config = load_config(tmp_path / "fit.json")
    assert config.model == str(tmp_path / "pipeline") and config.classifier == "owner/name"
    values["n_imags"] = 3
    (tmp_path / "fit.json").write_text(json.dumps(values))
    with pytest.raises(LensError, match=r"fit\.json: 'n_imags' is wrong"):
        load_config(tmp_path / "fit.json")


@pytest.mark.parametrize(
    "changes", [{"settings": (SETTING, SETTING)}, {"attributes": ("age",)}, {"sampling_prompts": ()}, {"n_images": 0}]
)
def test_a_configuration_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    values = {
        **json.loads(quick().model_dump_json()),
        **json.loads(json.dumps(changes, default=lambda s: s.model_dump())),
    }
    with pytest.raises(LensError, match="is wrong"):
        FitConfig.parse(values)


def test_an_estimate_counts_what_will_be_done(tiny_fit_models: Models) -> None:
    speed = Speed(step=0.5, decode=2.0, sae_step=0.1, multiply_adds=1e9)
    cost = estimate(quick(), tiny_fit_models.model, tiny_fit_models.classifier, speed)
    by_stage = {c.stage: c for c in cost.stages}
    assert tuple(by_stage) == STAGES
    assert by_stage["sample"].seconds == 48 * (STEPS * 0.5 + 2.0)
    assert by_stage["sample"].disk_bytes == 48 * 16 * 16 * 3
    assert by_stage["collect"].seconds == 24 * STEPS * 0.5
    assert by_stage["collect"].disk_bytes == 24 * STEPS * 8 * 4 * 4 * 2
    assert by_stage["sae"].seconds == 20 * 0.1
    assert by_stage["settings"].seconds == by_stage["effects"].seconds == 0
    assert by_stage["sweeps"].seconds == pytest.approx(12 * (1.7 * STEPS * 0.5 + 2.0) * 2)
    assert cost.seconds == pytest.approx(sum(c.seconds for c in cost.stages))
    assert cost.text().count("\n") == len(STAGES) + 2
    weights = sum(p.numel() * 4 for p in tiny_fit_models.model.denoiser.parameters())
    assert weights < cost.model_bytes < 4 * weights and cost.memory_bytes == cost.model_bytes + 10**9
    assert cost.lens_bytes > cost.model_bytes, "its pipeline lies in the lens"
    measured = estimate(quick(), tiny_fit_models.model, tiny_fit_models.classifier)
    assert all(c.seconds >= 0 for c in measured.stages) and measured.seconds > 0


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path) -> None:
    one, two = tmp_path / "work", tmp_path / "lens"
    check_space(Estimate((StageCost("sample", 1.0, 1000),), 0), one / "not" / "yet", two)
    with pytest.raises(LensError, match=rf"on the disk under {tmp_path}.*; choose another folder"):
        check_space(Estimate((StageCost("sample", 1.0, 10**18),), 0), one, two)
    with pytest.raises(LensError, match="choose another folder"):
        check_space(Estimate((), 0, lens_bytes=10**18), one, two)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(LensError, match="choose another folder"):  # each fits, both on one disk do not
        check_space(Estimate((StageCost("sample", 1.0, free * 2 // 3),), 0, lens_bytes=free * 2 // 3), one, two)


def point(beta: float, male: int, changed: float, n: int = 100) -> SweepPoint:
    """``male`` of ``n`` images, measured against images of which ``changed`` had another age."""
    gender, ages = counted(GENDER, n - male, male), np.zeros(n, int)
    before = measured({GENDER: gender, AGE: ages})
    ages = ages.copy()
    ages[: round(changed * n)] = 1
    return SweepPoint(measured({GENDER: gender, AGE: ages}, reference=before), GENDER, beta=beta)


def test_a_trial_is_judged_where_its_effect_is_one() -> None:
    points = [point(0, 10, 0.4), point(1, 50, 0.0), point(2, 90, 0.2), point(3, 60, 0.9)]
    trial = judge(SETTING, points, 1)
    edge = np.log(10.5 / 90.5)
    assert trial.effects[0][:3] == pytest.approx((edge, 0.0, -edge))
    assert trial.reach == pytest.approx(-edge)
    expected = (np.interp(-1, [edge, 0], [0.4, 0.0]) + np.interp(1, [0, -edge], [0.0, 0.2])) / 2
    assert trial.spillover == pytest.approx(expected)
    weak = judge(SETTING, [point(0, 40, 0.1), point(1, 50, 0.0), point(2, 60, 0.1)], 1)
    assert weak.reach < 1 and np.isnan(weak.spillover)


def test_equal_counts_do_not_end_the_stretch_that_counts() -> None:
    points = [point(0, 10, 0.1), point(1, 30, 0.0), point(2, 30, 0.1), point(3, 80, 0.3), point(4, 60, 0.9)]
    assert judge(SETTING, points, 1).reach == pytest.approx(np.log(80.5 / 20.5))  # past 3 it falls


def test_the_best_trial_reaches_far_enough_and_spills_least() -> None:
    near, wide, clean = (
        Trial(SETTING.model_copy(update={"n_features": n}), (), reach, spill)
        for n, reach, spill in ((1, 0.9, float("nan")), (2, 3.0, 0.5), (3, 1.1, 0.2))
    )
    assert best([near, wide, clean]) is clean
    assert best([near]) is near
    with pytest.raises(LensError):
        best([])


def test_prompts_together_count_the_least_reach_and_the_mean_spillover() -> None:
    far, close = Trial(SETTING, ((1.0, 2.0),), 2.0, 0.1), Trial(SETTING, ((0.0, 1.0),), 0.5, 0.3)
    assert together([far, close]) == Trial(SETTING, ((1.0, 2.0), (0.0, 1.0)), 0.5, pytest.approx(0.2))


def test_candidates_move_strengths_to_each_modes_zero() -> None:
    grid = ChooseConfig(
        n_features=(1, 2), poles=("one",), modes=("scale", "add"), samplers=("symmetric",), betas=(0, 3)
    )  # fmt: skip
    found = list(candidates("gender", "male", grid))
    assert [(s.n_features, s.mode, s.betas) for s in found] == [
        (1, "scale", (0.0, 1.0, 3.0)), (1, "add", (-1.0, 0.0, 2.0)),
        (2, "scale", (0.0, 1.0, 3.0)), (2, "add", (-1.0, 0.0, 2.0)),
    ]  # fmt: skip


def test_candidates_hold_the_other_attributes_or_nothing() -> None:
    grid = ChooseConfig(n_features=(1,), poles=("one",), samplers=("symmetric",), holds=("nothing", "others"))
    assert [s.hold for s in candidates("gender", "male", grid, ["age", "tone"])] == [(), ("age", "tone")]
    assert [s.hold for s in candidates("gender", "male", grid)] == [(), ()]


def test_a_setting_is_chosen_by_measuring_and_resumes(
    tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ChooseConfig(n_features=(2, 4), poles=("both",), samplers=("symmetric",), betas=(-4.0, 1.0, 6.0))
    settings = list(candidates("gender", "male", grid))
    wanted = [request(tiny_lens.model, prompt, range(500, 516), STEPS, 2.0) for prompt in PROMPTS[:2]]
    parts = (tiny_lens.model, tiny_lens.sae, tiny_lens.attributions["gender"], tiny_lens.classifier, wanted, settings)
    chosen, trials = choose_setting(*parts, probes=tiny_lens.probes, keep=Workspace(tmp_path))
    assert len(trials) == 2 and chosen.n_seeds_chosen_on == 16
    assert "2 settings on 16 images per strength of 2 prompt(s)" in chosen.note
    assert chosen.n_features == best(trials).setting.n_features
    shutil.rmtree(tmp_path / "0001-01" / "002")
    again = choose_setting(*parts, probes=tiny_lens.probes, keep=Workspace(tmp_path))
    assert again[0] == chosen and repr(again[1]) == repr(trials)
    monkeypatch.setattr("diffusion_lens.fit.choose.observe_baseline", None)  # nothing is left to draw
    assert choose_setting(*parts, probes=tiny_lens.probes, keep=Workspace(tmp_path))[0] == chosen


def test_an_attribute_without_a_setting_gets_one_from_the_fit(tiny_fit_models: Models, tmp_path: Path) -> None:
    grid = ChooseConfig(
        n_features=(1, 2), poles=("one",), samplers=("symmetric",), betas=(1.0, 5.0), n_images=8, prompts=(PROMPTS[0],)
    )
    lens = fit(quick(settings=(), choose=grid), tmp_path / "l", work=tmp_path / "w", models=tiny_fit_models)
    assert lens.setting("gender").n_seeds_chosen_on == 8
    assert len(read_json(tmp_path / "l" / "fit" / "log.json")["trials"]["gender"]) == 2


def test_an_unconditional_model_is_fitted_too(pixel_model: DiffusionModel, tmp_path: Path) -> None:
    made = generate(pixel_model, request(pixel_model, None, range(128), STEPS, 1.0), batch_size=64).images
    judge_ = classifier_of(made)
    config = quick(
        model_id=pixel_model.model_id, sampling_prompts=(), prompts=(), sweep_prompts=(), vocabulary=None,
        guidance_scale=1.0, n_images=64,
    )  # fmt: skip
    lens = fit(config, tmp_path / "l", work=tmp_path / "w", models=Models(pixel_model, judge_, judge_))
    assert lens.prompts == (None,) and len(lens.sweeps) == 1
    assert lens.generate(None, lens.intervention("gender", "male", 2.0), seeds=range(2)).images.shape == (2, 8, 8, 3)


def test_the_work_object_names_rows_prompt_by_prompt(tiny_fit_models: Models, tmp_path: Path) -> None:
    ready: Work = prepare(quick(n_images=5, first_seed=7), tiny_fit_models, tmp_path)
    assert ready.rows() == [(PROMPTS[0], 7), (PROMPTS[0], 9), (PROMPTS[0], 11), (PROMPTS[1], 8), (PROMPTS[1], 10)]
