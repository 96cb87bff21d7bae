"""A few words make a whole configuration, the same one every time, and every mistake is told before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_classes import PROMPTS as CLIP_CLASSES
from conftest import make_text_pipeline
from lens_fixtures import AGE, GENDER, PROMPTS
from PIL import Image
from tiny_clip import save_tiny_clip
from typer.testing import CliRunner

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.app import app
from diffusion_lens.fit.defaults import STORE_BYTES, default_config, kind_defaults, read_prompts
from diffusion_lens.fit.run import Models, load_config
from diffusion_lens.model.pipelines import DiffusionModel


@pytest.mark.parametrize(
    ("kind", "steps", "guidance"),
    [("text", 50, 7.5), ("xl", 50, 5.0), ("lcm", 4, 8.5), ("pixel", 50, 1.0), ("latent", 50, 1.0)],
)
def test_every_kind_of_model_has_its_defaults(
    tiny_models: dict[str, DiffusionModel], tiny_fit_models: Models, kind: str, steps: int, guidance: float
) -> None:
    model = tiny_models[kind]
    assert (kind_defaults(model).n_steps, kind_defaults(model).guidance_scale) == (steps, guidance)
    prompts = PROMPTS if model.is_text else ()
    config = default_config(
        model, tiny_fit_models.classifier, source="s", classifier="c", attributes=("age",), prompts=prompts
    )
    assert (config.n_steps, config.guidance_scale, config.attributes) == (steps, guidance, ("age",))
    assert config.sae.d_sae == 8 * model.d_in and config.sampling_prompts == prompts
    assert config.sweeps == (PROMPTS[:1] if model.is_text else (None,))
    assert ("asymmetric" in config.choose.samplers) == model.is_ddim


def test_what_is_said_takes_the_place_of_a_default(tiny_fit_models: Models) -> None:
    def made(**more: Any) -> Any:
        return default_config(
            tiny_fit_models.model, tiny_fit_models.classifier, source="s", classifier="c", prompts=PROMPTS, **more
        )

    config = made(changes={"n_steps": 7, "n_images": None, "name": "mine"}, sae={"k": 3, "layout": "map", "lr": None})
    assert (config.n_steps, config.n_images, config.name) == (7, 2000, "mine")
    assert (config.sae.k, config.sae.layout, config.sae.lr) == (3, "map", 2e-3)
    assert config.attributes == ("gender", "age", "glasses")
    assert made(quick=True).n_images < config.n_images and made(quick=True, changes={"n_images": 9}).n_images == 9
    with pytest.raises(LensError, match="the SAE: 'k' is wrong"):
        made(sae={"k": 0})


def test_the_store_stays_within_its_budget(tiny_fit_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_fit_models.model  # 8 × 4 × 4 numbers, 50 steps, 2 bytes: 12,800 bytes an image
    monkeypatch.setattr("diffusion_lens.fit.defaults.STORE_BYTES", 5 * 12_800 * 70)
    config = default_config(
        model, tiny_fit_models.classifier, source="s", classifier="c", prompts=PROMPTS, attributes=("gender", "age")
    )
    assert config.per_class == 70
    # Stable Diffusion 1.5: 1280 × 8 × 8 numbers; gender, age and race have nine classes.
    assert 260 <= STORE_BYTES // (2 * 50 * 1280 * 64 * 9) <= 280


def test_prompts_and_attributes_that_do_not_fit_are_refused(
    tiny_models: dict[str, DiffusionModel], tiny_fit_models: Models, tmp_path: Path
) -> None:
    judge = tiny_fit_models.classifier
    with pytest.raises(LensError, match="draws from prompts"):
        default_config(tiny_models["text"], judge, source="s", classifier="c")
    with pytest.raises(LensError, match="takes no prompt"):
        default_config(tiny_models["pixel"], judge, source="s", classifier="c", prompts=PROMPTS)
    with pytest.raises(LensError, match="does not read 'hat'; it reads gender, age, glasses"):
        default_config(tiny_models["pixel"], judge, source="s", classifier="c", attributes=("hat",))
    (tmp_path / "p.txt").write_text("# people\na doctor\n\n  a nurse \na doctor\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ("a doctor", "a nurse")
    (tmp_path / "p.txt").write_text("#\n", encoding="utf-8")
    with pytest.raises(LensError, match="holds no prompt"):
        read_prompts(tmp_path / "p.txt")


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty working folder that holds a model and a CLIP."""
    make_text_pipeline().save_pretrained(tmp_path / "sd")
    save_tiny_clip(tmp_path / "clip")
    (tmp_path / "labels.json").write_text(json.dumps(CLIP_CLASSES), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_flags_are_kept_as_a_configuration(run: Run) -> None:
    Path("more.txt").write_text("a portrait of a person\n", encoding="utf-8")
    result = run(
        "fit", "--model", "sd", "--classifier", "clip:clip", "--labels", "labels.json", "--attributes", "gender",
        "--prompts", *PROMPTS, "--prompts-file", "more.txt", "--steps", 3, "--images", 20, "--batch-size", 4,
        "--sae-features", 16, "--sae-k", 4, "--offline", "--dry-run", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["seconds"] > 0 and found["memory_bytes"] > 0 and "sample" in found["stages"]
    config = load_config("runs/fit/fit.json")
    assert config.sampling_prompts == (*PROMPTS, "a portrait of a person")
    assert (config.n_steps, config.n_images, config.sae.d_sae, config.batch_size) == (3, 20, 16, 4)
    assert read_json(Path("runs/fit/classifier.json"))["labels"] == json.loads(json.dumps(CLIP_CLASSES))
    assert not Path("my-lens").exists()
    again = run("fit", "runs/fit/fit.json", "--offline", "--dry-run", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["stages"].keys() == found["stages"].keys()
    sheet = run("fit", "runs/fit/fit.json", "--offline", "--label-sheet", "sheet")
    assert sheet.exit_code == 0, sheet.output
    assert len(list(Path("sheet").glob("*.png"))) == 20
    assert Path("sheet/labels.csv").read_text().splitlines()[:2] == ["file,gender", "00000.png,"]


def test_a_variant_is_kept_and_opened_again(run: Run) -> None:
    make_text_pipeline().save_pretrained("sd", variant="fp16")  # beside the plain files
    words = ("--classifier", "clip:clip", "--labels", "labels.json", "--attributes", "gender", "--prompts", *PROMPTS)
    made = run("fit", "--model", "sd", *words, "--variant", "fp16", "--steps", 3, "--offline", "--dry-run", "--json")
    assert made.exit_code == 0, made.output
    assert load_config("runs/fit/fit.json").variant == "fp16"
    assert run("fit", "runs/fit/fit.json", "--offline", "--dry-run", "--json").exit_code == 0
    refused = run("fit", "--model", "sd", *words, "--variant", "ema", "--offline", "--dry-run")
    assert refused.exit_code == 2 and "no weights of the variant 'ema'" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Name a model with --model"),
        (("--model", "sd", "--prompts", "a nurse", "--classifier", "oracle"), "no classifier 'oracle'"),
        (("--model", "sd", "a nurse"), "give prompts after --prompts"),
        (("--model", "sd", "--labels", "sd/model_index.json"), "is no table of labels"),
        (("--model", "sd", "--classifier", "csv:x.csv"), "give them as --labeller"),
    ],
)
def test_mistakes_are_one_sentence(run: Run, words: tuple[str, ...], sentence: str) -> None:
    result = run("fit", *words, "--offline")
    assert result.exit_code == 2 and sentence in " ".join(result.stderr.split()), result.output


def test_calibrate_measures_and_keeps(run: Run) -> None:
    rng = np.random.default_rng(0)
    rows = ["file,gender"]
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"{i}.png")
        rows.append(f"{i}.png,{('male', 'female')[i % 2]}")
    Path("people.csv").write_text("\n".join(rows), encoding="utf-8")
    result = run(
        "calibrate", "--classifier", "clip:clip", "--labels", "labels.json", "--labelled", "people.csv", "--out", "c",
        "--offline", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    assert [row["class"] for row in table] == ["male", "female"]
    assert sum(int(row["decided"]) + int(row["uncertain"]) for row in table) == 12
    kept = read_json(Path("c/config.json"))
    assert np.sum(kept["confusion"]["gender"]) + np.sum(kept["uncertain"]["gender"]) == 12
    assert AGE.name not in kept["labels"] and GENDER.name in kept["labels"]
    words = ("fit", "--model", "sd", "--classifier", "clip:clip", "--labels", "labels.json", "--prompts", "a nurse",
             "--sae-features", 16, "--sae-k", 4, "--batch-size", 4, "--steps", 2, "--offline")  # fmt: skip
    blind = run(*words, "--dry-run")
    assert blind.exit_code == 0 and "How often the classifier errs on gender" in " ".join(blind.stderr.split())
    told = run(*words, "--labelled", "people.csv", "--dry-run")
    assert told.exit_code == 0 and "How often" not in told.stderr
    both = run(*words, "--labelled", "people.csv", "--assume-no-error")
    assert both.exit_code == 2 and "Either measure" in both.stderr
    described = read_json(Path("runs/fit/classifier.json"))
    assert described["confusion"] == kept["confusion"] and described["uncertain"] == kept["uncertain"]
