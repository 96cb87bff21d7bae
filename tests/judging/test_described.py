"""A photo classifier comes back from its description as it was, and not as another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_classes import PROMPTS
from fits import quick
from lens_fixtures import GENDER, tiny_config
from photo_models import LABEL_MAP, hub_folder, photos  # noqa: F401
from PIL import Image
from tiny_clip import save_tiny_clip

from diffusion_lens.base.types import ASSUMED, Attribute, LensError, is_assumed
from diffusion_lens.fit.run import Models, fit, load_config, open_labeller, prepare, run_stage
from diffusion_lens.fit.stages import read_labels, sampled
from diffusion_lens.judging.described import (
    SMALL_BYTES,
    WEIGHTS,
    ClassifierSpec,
    assumed_right,
    build,
    describe,
    named_spec,
    open_classifier,
    save_classifier,
)
from diffusion_lens.judging.fairface import FAIRFACE_FILE, ResNet34
from diffusion_lens.judging.labelled import write_label_sheet
from diffusion_lens.judging.readers import CLIP_PROMPTS
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.plots import describe_confusion
from diffusion_lens.results.manifest import read_manifest, write_manifest


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_a_clip_classifier_comes_back_with_rule_and_error(clip_folder: Path, tmp_path: Path) -> None:
    made = build(named_spec(f"clip:{clip_folder}", labels=PROMPTS), offline=True)
    made = made.with_rules({"gender": 1.5}, {"gender": 0.51})
    made = made.with_confusion({"gender": np.array([[40, 2], [3, 38]])}, {"gender": np.array([5, 4])})
    assert save_classifier(made, tmp_path / "c")
    again = open_classifier(tmp_path / "c", offline=True)
    assert again.classifier_id == made.classifier_id
    assert again.attributes == (Attribute("gender", ("male", "female")),)
    np.testing.assert_array_equal(again.confusion["gender"], [[40, 2], [3, 38]])
    images = photos(5)
    mine, theirs = made.predict(images)["gender"], again.predict(images)["gender"]
    np.testing.assert_array_equal(mine.probs, theirs.probs)
    np.testing.assert_array_equal(mine.certain, theirs.certain)
    assert describe(again) == describe(made).model_copy(update={"model": str(tmp_path / "c" / WEIGHTS)})


def test_small_weights_travel_and_large_ones_do_not(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(named_spec(f"clip:{clip_folder}", labels=PROMPTS), offline=True)
    save_classifier(made, tmp_path / "small")
    kept = [p for p in (tmp_path / "small").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in kept) < SMALL_BYTES
    assert {p.suffix for p in kept} <= {".json", ".txt", ".safetensors"}
    assert str(clip_folder) not in (tmp_path / "small" / "config.json").read_text()
    monkeypatch.setattr("diffusion_lens.judging.described.SMALL_BYTES", 1000)
    save_classifier(made, tmp_path / "large")
    assert [p.name for p in (tmp_path / "large").rglob("*")] == ["config.json"]
    assert open_classifier(tmp_path / "large", offline=True).classifier_id == made.classifier_id


def test_a_transformers_classifier_comes_back(hub_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    made = build(named_spec(f"hf:{hub_folder}", labels=LABEL_MAP), offline=True)
    save_classifier(made, tmp_path / "c")
    again = open_classifier(tmp_path / "c", offline=True)
    assert again.classifier_id == made.classifier_id
    np.testing.assert_array_equal(again.predict(photos(3))["gender"].probs, made.predict(photos(3))["gender"].probs)


def test_fairface_comes_back_from_where_its_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    file = tmp_path / "here" / FAIRFACE_FILE
    file.parent.mkdir()
    torch.save(ResNet34().state_dict(), file)
    made = build(named_spec(f"fairface:{file}"))
    assert made.crop and [a.name for a in made.attributes] == ["gender", "age", "race"]
    assert save_classifier(made, tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["config.json"]
    assert open_classifier(tmp_path / "c").classifier_id == made.classifier_id
    weights = tmp_path / "weights"
    weights.mkdir()
    monkeypatch.setenv("DIFFUSION_LENS_WEIGHTS", str(weights))
    file.rename(weights / FAIRFACE_FILE)
    assert open_classifier(tmp_path / "c").classifier_id == made.classifier_id
    (weights / FAIRFACE_FILE).unlink()
    with pytest.raises(LensError, match=f"{FAIRFACE_FILE} is missing; get it from .* and save it as {weights}"):
        open_classifier(tmp_path / "c")


def test_names_that_mean_no_classifier_say_what_to_do(tmp_path: Path) -> None:
    assert named_spec("clip").model == "openai/clip-vit-large-patch14"
    assert {name: tuple(own) for name, own in named_spec("clip").labels.items()} == {
        name: tuple(own) for name, own in CLIP_PROMPTS.items()
    }
    cases = {
        "hf:owner/name": "which labels of owner/name make which class",
        "csv:labels.csv": "give them as --labeller",
        "oracle": "no classifier 'oracle'; choose clip",
    }
    for text, message in cases.items():
        with pytest.raises(LensError, match=message):
            open_classifier(text)
    with pytest.raises(LensError, match="hf download nobody/nothing"):
        open_classifier("clip:nobody/nothing", offline=True)
    with pytest.raises(LensError, match="no race 'Martian'; it reads race: White"):
        (tmp_path / "f.pt").touch()
        build(named_spec(f"fairface:{tmp_path / 'f.pt'}", labels={"race": {"a": ("White",), "b": ("Martian",)}}))
    (tmp_path / "bad.json").write_text(json.dumps({"kind": "clip", "model": "x", "labels": {}, "colour": 1}))
    with pytest.raises(LensError, match=r"bad\.json: '(labels|colour)' is wrong"):
        open_classifier(tmp_path / "bad.json")


def test_an_unknown_detector_is_not_described(clip_folder: Path, tmp_path: Path) -> None:
    made = build(named_spec(f"clip:{clip_folder}", labels=PROMPTS), offline=True)
    own = replace(made, detector=lambda image: np.zeros((1, 4)), detector_id="mine")
    assert describe(own) is None and not save_classifier(own, tmp_path / "c") and not (tmp_path / "c").exists()


def test_a_lens_opens_its_described_judge_and_refuses_another(
    copied_lens: Callable[[], Path], clip_folder: Path
) -> None:
    folder = copied_lens()
    for path in (folder / "classifier").iterdir():
        path.unlink()
    judge = build(named_spec(f"clip:{clip_folder}", labels=PROMPTS), offline=True)
    save_classifier(judge, folder / "classifier")
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"classifier_id": judge.classifier_id}))
    opened = DiffusionLens.from_pretrained(folder, offline=True).classifier
    assert opened.classifier_id == judge.classifier_id and opened.attributes == judge.attributes
    spec = ClassifierSpec.load(folder / "classifier" / "config.json")
    spec.model_copy(update={"thresholds": {"gender": 0.9}}).save(folder / "classifier" / "config.json")
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(LensError, match="belongs to another lens, or the weights"):
        _ = DiffusionLens.from_pretrained(folder, offline=True).classifier


def test_people_label_what_was_sampled_and_nothing_is_sampled_again(tiny_fit_models: Models, tmp_path: Path) -> None:
    config = tiny_config(n_images=24, settings=(), attributes=("gender",))
    first = prepare(config, tiny_fit_models, tmp_path / "w")
    run_stage(first, "sample")
    images = np.concatenate(list(sampled(first)))
    table = write_label_sheet(images, tmp_path / "sheet", [GENDER])
    truth = np.arange(24) % 2
    rows = [f"{i:05d}.png,{GENDER.classes[label]}" for i, label in enumerate(truth[:20])]
    table.write_text("\n".join(["file,gender", *rows]), encoding="utf-8")
    people = open_labeller(f"csv:{table}", tiny_fit_models.classifier)
    ready = prepare(config, replace(tiny_fit_models, labeller=people), tmp_path / "w")
    assert ready.folders["sample"] == first.folders["sample"] and ready.folders["label"] != first.folders["label"]
    run_stage(ready, "label")
    read = read_labels(ready)["gender"]
    np.testing.assert_array_equal(read.labels[:20], truth[:20])
    np.testing.assert_array_equal(read.certain, np.arange(24) < 20)
    assert Image.open(tmp_path / "sheet" / "00000.png").size == images.shape[2:0:-1]


def test_a_configuration_names_people_beside_it(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").touch()
    config = tiny_config(labeller="csv:labels.csv", classifier="clip")
    config.save(tmp_path / "fit.json")
    read = load_config(tmp_path / "fit.json")
    assert read.labeller == f"csv:{tmp_path / 'labels.csv'}" and read.classifier == "clip"


def test_a_lens_judged_by_clip_is_fitted_moved_and_opened(
    clip_folder: Path, tiny_fit_models: Models, tmp_path: Path
) -> None:
    spec = ClassifierSpec(
        kind="clip", model=str(clip_folder), labels={"gender": {"female": ("a doctor",), "male": ("w w w w",)}},
        temperatures={"gender": 0.1}, thresholds={"gender": 0.5},
        confusion={"gender": ((38, 2), (1, 39))}, uncertain={"gender": (2, 1)},
    )  # fmt: skip
    spec.save(tmp_path / "judge.json")
    config = quick(classifier="judge.json", n_images=48, per_class=8, sweep_images=8)
    config.save(tmp_path / "fit.json")
    assert load_config(tmp_path / "fit.json").classifier == str(tmp_path / "judge.json")
    judge = open_classifier(tmp_path / "judge.json", offline=True)
    blind = replace(judge, confusion={})
    with pytest.raises(LensError, match=r"How often the classifier errs on gender is not known: .*--label-sheet"):
        fit(config, tmp_path / "made", work=tmp_path / "w", models=Models(tiny_fit_models.model, blind, blind))
    assert not (tmp_path / "w").exists()
    counts = assumed_right(blind).confusion["gender"]
    np.testing.assert_array_equal(counts / ASSUMED, np.eye(2))
    assert is_assumed(counts) and not is_assumed(counts // 10)
    assert "not measured" in describe_confusion(counts, blind.attributes[0])
    made = fit(config, tmp_path / "made", work=tmp_path / "w", models=Models(tiny_fit_models.model, judge, judge))
    (tmp_path / "made").rename(tmp_path / "moved")
    lens = DiffusionLens.from_pretrained(tmp_path / "moved", offline=True)
    assert lens.manifest.classifier_id == lens.classifier.classifier_id == judge.classifier_id
    assert lens.attributes == judge.attributes == made.attributes
    assert str(tmp_path) not in (tmp_path / "moved" / "classifier" / "config.json").read_text()
    stored = lens.sweeps[0]
    fresh = lens.sweep(stored.request, "gender")
    for mine, theirs in zip(stored.points, fresh.points, strict=True):
        np.testing.assert_array_equal(mine.labels, theirs.labels)
