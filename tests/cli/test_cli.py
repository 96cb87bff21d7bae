"""The command line: what it prints, what it writes, and one sentence with status 2 for every mistake."""

from __future__ import annotations

import io
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from check_sizes import TINY
from cli_runs import Run, mistake
from lens_fixtures import PROMPTS
from PIL import Image
from typer.testing import CliRunner

from diffusion_lens.base.edits import describe
from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.types import LensError
from diffusion_lens.base.words import duration
from diffusion_lens.cli import console
from diffusion_lens.cli.app import app
from diffusion_lens.cli.console import STOPPED
from diffusion_lens.cli.options import BATCH, batch_of
from diffusion_lens.cli.portraits import recipe_config
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.portraits import draw as drawing
from diffusion_lens.portraits import recipe, world
from diffusion_lens.results.manifest import read_manifest, write_manifest

COMMANDS = (
    "generate", "attribute", "sweep", "balance", "check", "audit", "fit", "convert-p2", "import-difflens", "serve",
    "portraits train", "portraits export", "portraits average", "portraits sheet", "portraits table",
)  # fmt: skip
DOCTOR = PROMPTS[0]


@pytest.fixture
def run(tiny_lens_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty working folder, with the tiny lens as the default one."""
    monkeypatch.setenv("DIFFUSION_LENS", str(tiny_lens_folder))
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_examples(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"python -m diffusion_lens {command}" in " ".join(result.stdout.split())


def test_help_is_quick_because_torch_is_not_loaded() -> None:
    heavy = "{'torch', 'diffusers', 'plotly', 'gradio'}"
    code = f"import sys, diffusion_lens.__main__; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generate_draws_the_same_seeds_unedited_and_edited(run: Run, tiny_lens: DiffusionLens) -> None:
    words = ("generate", DOCTOR, "--turn", "gender=male:3", "-n", 10, "--first-seed", 40, "--json")
    result = run(*words, "--out", "pair.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    base = tiny_lens.generate(DOCTOR, seeds=range(40, 50))
    edited = tiny_lens.generate(base.request, tiny_lens.intervention("gender", "male", 3.0))
    assert found["edit"] == describe(edited.edit) and found["files"] == ["pair.png"]
    counts = [share["count"] for share in found["read"]["gender"]["shares"]]
    assert counts == [s.count for s in tiny_lens.evaluate(edited, "gender").shares]
    pixels = np.asarray(Image.open("pair.png"))
    side = base.images.shape[1]
    assert pixels.shape == (4 * (side + 2) + 2, 8 * (side + 2) + 2, 3)
    assert np.array_equal(pixels[2 : 2 + side, 2 : 2 + side], base.images[0])
    assert np.array_equal(pixels[4 + side : 4 + 2 * side, 2 : 2 + side], edited.images[0])


def test_generate_writes_single_pictures_into_a_folder(run: Run, tiny_lens: DiffusionLens) -> None:
    result = run("generate", DOCTOR, "-n", 2, "--out", "pictures")
    assert result.exit_code == 0 and "decided images" in result.stdout
    assert sorted(p.name for p in Path("pictures").iterdir()) == ["0.png", "1.png"]
    drawn = tiny_lens.generate(DOCTOR, seeds=range(2)).images
    assert np.array_equal(np.asarray(Image.open("pictures/1.png")), drawn[1])


def test_generate_turns_features_where_it_is_told(run: Run, tiny_lens: DiffusionLens) -> None:
    words = ("generate", DOCTOR, "--turn", "gender=male:6", "-n", 2, "--json", "--out", "pair.png")
    result = run(*words, "--where", "cols=0")
    assert result.exit_code == 0, result.output
    turn = tiny_lens.intervention("gender", "male", 6.0, where=("#...",) * 4)
    edited = tiny_lens.generate(DOCTOR, turn, seeds=range(2))
    assert json.loads(result.stdout)["edit"] == describe(edited.edit) and "at 4 of 16 positions" in result.stdout
    pixels, side = np.asarray(Image.open("pair.png")), edited.images.shape[1]
    assert np.array_equal(pixels[4 + side : 4 + 2 * side, 2 : 2 + side], edited.images[0])
    for wrong in (("--where", "cols=9"), ("--where", "eyes")):
        assert run(*words, *wrong).exit_code == 2
    assert run("generate", DOCTOR, "--where", "rows=0").exit_code == 2


def test_attribute_lists_the_top_features(run: Run, tiny_lens: DiffusionLens) -> None:
    words = ("attribute", DOCTOR, "-a", "age", "-t", "old", "-n", 12, "--top", 5)
    found = json.loads(run(*words, "--json", "--html", "age.html").stdout)
    drawn = tiny_lens.generate(DOCTOR, seeds=range(12), capture=True)
    expected = tiny_lens.attribute(drawn, "age").top_k(5, target="old")
    assert [row["id"] for row in found["features"]] == list(expected.ids)
    assert "plotly" in Path("age.html").read_text(encoding="utf-8")
    table = run(*words)
    assert "Completeness gap" in table.stderr and str(expected.ids[0]) in table.stdout


def test_sweep_and_its_control_as_json_and_plot(run: Run, tiny_lens: DiffusionLens) -> None:
    words = ("sweep", DOCTOR, "-n", 16, "--betas", "-2,1,4")
    found = json.loads(run(*words, "--control", "random", "--html", "sweep.html", "--json").stdout)
    expected = tiny_lens.sweep(DOCTOR, "gender", betas=(-2, 1, 4), n=16)
    assert [point["beta"] for point in found[0]["points"]] == [-2, 1, 4]
    assert found[0]["points"][2]["labels"] == expected.points[2].labels.tolist()
    assert [sweep["is_control"] for sweep in found] == [False, True]
    page = Path("sweep.html").read_text(encoding="utf-8")
    assert "<figcaption>" in page and 'src="http' not in page
    assert "log ratio" in run(*words).stdout


def test_balance_says_where_the_share_is_met(run: Run) -> None:
    words = ("balance", DOCTOR, "-n", 24, "--betas", "-4,1,6", "--share", 0.5)
    result = run(*words)
    assert result.exit_code == 0 and "A share of 50 % male" in result.stderr
    found = json.loads(run(*words, "--json").stdout)
    assert found["balance"]["label"] == "male" and len(found["sweep"]["points"]) == 3


def test_check_exits_by_its_verdict(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_lens.studies.check.run.QUICK", TINY)
    good = run("check", "--part", 4)
    assert good.exit_code == 0, good.output
    assert good.stdout.strip().splitlines()[-1].startswith("quick check passed: 4 holds")
    bad = run("check", "--part", 3, "--json")
    assert bad.exit_code == 1 and json.loads(bad.stdout)["holds"] is False
    assert bad.stderr.strip().splitlines()[-1].startswith("quick check not passed")


def test_audit_writes_its_files_and_the_command_that_makes_them_again(run: Run, tiny_lens_folder: Path) -> None:
    Path("notes.txt").write_text("Seen.", encoding="utf-8")
    words = ("audit", "-p", DOCTOR, "-n", 12, "--first-seed", 7, "--notes", "@notes.txt", "--out", "report")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in Path("report").iterdir()) == ["audit.csv", "audit.html", "audit.json", "measures.csv"]
    stored = json.loads(Path("report/audit.json").read_text(encoding="utf-8"))
    assert stored["notes"] == "Seen."
    again = shlex.split(stored["command"])
    assert again[:5] == ["python", "-m", "diffusion_lens", "audit", "--lens"]
    assert again[5:] == [
        str(tiny_lens_folder), "--prompt", DOCTOR, "--images", "12", "--first-seed", "7", "--batch-size", "16"
    ]  # fmt: skip


def test_a_lens_is_drawn_in_the_batches_that_it_was_fitted_with(
    run: Run, copied_lens: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = copied_lens()
    stored = lens / "fit" / "config.json"
    write_json(stored, {**read_json(stored), "batch_size": 5})
    write_manifest(lens, read_manifest(lens))
    words = ("audit", "-p", DOCTOR, "-n", 12, "--lens", lens)
    for more, size in (((), "5"), (("--batch-size", 3), "3")):
        assert run(*words, *more).exit_code == 0
        command = json.loads(Path("audit/audit.json").read_text(encoding="utf-8"))["command"]
        assert command.endswith(f" --images 12 --first-seed 0 --batch-size {size}")
    stored.unlink()
    write_manifest(lens, read_manifest(lens))  # as an imported lens: nothing tells how it was fitted
    opened = DiffusionLens.from_pretrained(lens)
    assert not opened.fitted_from and [batch_of(opened, asked) for asked in (None, 7, 0)] == [BATCH, 7, 0]


def test_serve_hands_the_lens_to_the_app(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []
    stand_in = ModuleType("diffusion_lens.ui")
    stand_in.launch = lambda lens, **options: calls.append((lens, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusion_lens.ui", stand_in)
    assert run("serve", "--port", 8123).exit_code == 0
    lens, options = calls[0]
    assert lens.manifest.name == "tiny"
    assert options == {"server_name": "127.0.0.1", "server_port": 8123, "share": False, "mcp_server": False}


def test_serve_status_says_how_a_running_app_is_doing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "seconds": 7200, "memory_mb": 600.0, "peak_mb": 700.0, "drawing": True, "waiting": 2, "running": 3,
        "lenses": {"tiny": {"model_loaded": True, "runs": 1, "runs_mb": 2.0, "rows": 0, "rows_mb": 0.0}},
    }  # fmt: skip
    asked: list[str] = []

    def answer(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO(json.dumps(told).encode())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    done = run("serve", "--status", "--host", "0.0.0.0")
    assert done.exit_code == 0 and asked == ["http://127.0.0.1:7860/status"]
    assert "Up for 2.0 h; memory 600 MB" in done.output and "drawing, 2 waiting" in done.output
    assert "tiny: model loaded; kept 1 unedited runs (2.0 MB)" in done.output
    monkeypatch.undo()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        missing = run("serve", "--status", "--port", nobody.getsockname()[1])
    assert "No app of this program answers at" in mistake(missing)


MISTAKES = [
    (("generate", "a portrait of a wizard"), "never saw “wizard”"),
    (("generate",), "needs a prompt, for example 'a portrait of a doctor'"),
    (("generate", DOCTOR, "-n", "-3"), "Ask for 1 to 20,000 images"),
    (("generate", DOCTOR, "-n", 10**15), "Ask for 1 to 20,000 images"),
    (("generate", DOCTOR, "--first-seed", "-1"), "Seeds are whole numbers"),
    (("generate", DOCTOR, "--first-seed", 2**63), "Seeds are whole numbers"),
    (("generate", DOCTOR, "--steps", 0), "n_steps must lie between 1 and 1000"),
    (("generate", DOCTOR, "--steps", 10**9), "n_steps must lie between 1 and 1000"),
    (("generate", DOCTOR, "--guidance", "nan"), "guidance_scale must lie between 0 and 50"),
    (("generate", DOCTOR, "--batch-size", 0), "batch_size must be at least 1"),
    (("generate", DOCTOR, "--turn", "gender=male:nan"), "beta must be a finite number"),
    (("generate", DOCTOR, "--turn", "gender=male:inf"), "beta must be a finite number"),
    (("generate", DOCTOR, "--turn", "gender=male:101"), "beta must be a finite number"),
    (("generate", DOCTOR, "--turn", "gender:male:1"), "Write a turn as attribute=class:strength"),
    (("generate", DOCTOR, "--turn", "height=tall:1"), "does not steer 'height'; it steers gender, age"),
    (("generate", DOCTOR, "--turn", "gender=tall:1"), "'tall' is no class of gender"),
    (("generate", DOCTOR, "--device", "toaster"), "There is no device 'toaster'"),
    (("generate", DOCTOR, "-n", 1, "--out", "x.exe"), "'x.exe' is neither"),
    (("generate", DOCTOR, "--lens", "nowhere"), "nowhere"),
    (("attribute", DOCTOR, "-a", "height"), "does not steer 'height'"),
    (("attribute", DOCTOR, "--top", 0, "-n", 2), "Choose between 1 and 32 features"),
    (("attribute", DOCTOR, "--method", "guess", "-n", 2), "'guess' is no attribution method"),
    (("sweep", DOCTOR, "--betas", "1,x"), "Strengths are numbers with commas"),
    (("sweep", DOCTOR, "--betas", "nan"), "different, finite betas"),
    (("sweep", DOCTOR, "--betas", "1,1"), "different, finite betas"),
    (("sweep", DOCTOR, "--control", "noise"), "A control is random or flip"),
    (("balance", DOCTOR, "--share", 1.5), "A target share lies between 0 and 1"),
    (("balance", DOCTOR, "-n", 4, "--betas", "1,2"), "decided images each"),
    (("check", "--part", 5, "--store"), "ask for one of them"),
    (("check", "--part", 9), "A check has the parts 1, 2, 3, 4, 5"),
    (("audit", "--notes", "@nowhere.txt"), "no file at nowhere.txt"),
    (("fit", "nowhere.json", "--out", "x"), "nowhere.json is missing"),
    (("convert-p2", "nowhere.pt", "out"), "There is no file nowhere.pt"),
    (("import-difflens", "sae", "out", "--model-id", "m", "--attribute", "gender", "--features", "gender=f"),
     "Write it as name=value"),
    (("import-difflens", "sae", "out", "--model-id", "m", "--attribute", "gender=a,b", "--features", "age=f"),
     "Say where the feature lists of gender lie"),
    (("portraits", "train", "--stage", "eyes"), "There is no stage 'eyes'"),
    (("portraits", "train", "--steps", 3), "Name one --stage"),
    (("portraits", "train", "--match", 9), "name it with --from"),
    (("portraits", "export", "--work", "nowhere"), "autoencoder is missing; train first"),
    (("portraits", "export", "--stage", "eyes"), "no stage 'eyes' to export"),
    (("portraits", "average", "one", "two", "-o", "one"), "write to another folder"),
    (("portraits", "average", "one", "two", "-o", "three"), "one holds no pipeline"),
    (("portraits", "table", "-a", "height"), "no attribute 'height'"),
    (("portraits", "table", "--prompt", "a wizard"), "not a sentence of this world"),
    (("portraits", "sheet", "x.png", "-n", 0), "Ask for 1 to 20,000 images"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistakes_get_one_sentence(run: Run, tmp_path: Path, words: tuple[Any, ...], sentence: str) -> None:
    assert sentence in mistake(run(*words))
    assert not list(tmp_path.rglob("*.*"))


def test_damaged_and_foreign_files_are_named(run: Run, copied_lens: Callable[[], Path]) -> None:
    for harm, named in (
        (lambda lens: (lens / "probes.safetensors").write_bytes(b"short"), "probes.safetensors"),
        (lambda lens: (lens / "sae" / "sae_weights.safetensors").unlink(), "sae_weights.safetensors"),
        (lambda lens: (lens / "lens.json").write_text("{"), "lens.json"),
    ):
        lens = copied_lens()
        harm(lens)
        assert named in mistake(run("generate", DOCTOR, "--lens", lens))


def test_stopping_leaves_no_half_file(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusion_lens.model.generate.generate", stop)
    result = run("generate", DOCTOR)
    assert result.exit_code == STOPPED and result.stderr.startswith("Stopped.")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(run: Run) -> None:
    Path("plain").write_text("", encoding="utf-8")
    assert mistake(run("portraits", "table", "--out", "plain/table.json")).startswith("plain")


def test_too_little_memory_is_said_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffusion_lens.model.generate.generate", burst)
    assert "lower --batch-size" in mistake(run("generate", DOCTOR))


def test_fit_estimates_before_it_begins(run: Run, tiny_lens_folder: Path) -> None:
    config = json.loads((tiny_lens_folder / "fit" / "config.json").read_text(encoding="utf-8"))
    config.update(
        model=str(tiny_lens_folder / "pipeline"), classifier=str(tiny_lens_folder / "classifier"), labeller=None
    )
    Path("fit.json").write_text(json.dumps(config), encoding="utf-8")
    found = json.loads(run("fit", "fit.json", "--out", "lens", "--estimate", "--json").stdout)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"].values()))
    assert not Path("lens").exists()
    config["colour"] = 1
    Path("fit.json").write_text(json.dumps(config), encoding="utf-8")
    assert "'colour'" in mistake(run("fit", "fit.json", "--out", "lens"))


def test_recipe_numbers_belong_to_one_stage() -> None:
    assert recipe_config(("pipeline",), 12, 3, 40).denoiser.n_steps == 12
    assert recipe_config(("pipeline",), 12, 3, 40).n_drawings == 40
    assert recipe_config(("unconditional",), None, 3, None).unconditional.batch_size == 3
    assert recipe_config(("autoencoder",), 5, None, None).autoencoder.n_steps == 5
    assert recipe_config(("classifier",), 5, None, None).classifier_steps == 5
    assert recipe_config(("mmdit",), 5, None, None, focus=0.5).mmdit.focus == 0.5
    with pytest.raises(LensError, match="Name one"):
        recipe_config(("pipeline", "classifier"), 5, None, None)


def test_training_runs_the_stages_in_order(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []
    starts: list[Path | None] = []
    matches: list[int] = []

    def denoiser(*_: object, unconditional: bool, resume: bool, start: Path | None, match: int) -> None:
        seen.append(("unconditional" if unconditional else "pipeline", resume))
        starts.append(start)
        matches.append(match)

    def transformer(*_: object, resume: bool, start: Path | None, match: int) -> None:
        seen.append(("mmdit", resume))
        starts.append(start)
        matches.append(match)

    monkeypatch.setattr(recipe, "autoencoder_stage", lambda *_: seen.append(("autoencoder", False)))
    monkeypatch.setattr(recipe, "classifier_stage", lambda *_, **__: seen.append(("classifier", False)))
    monkeypatch.setattr(recipe, "labeller_stage", lambda *_, **__: seen.append(("labeller", False)))
    monkeypatch.setattr(recipe, "denoiser_stage", denoiser)
    monkeypatch.setattr(recipe, "transformer_stage", transformer)
    assert run("portraits", "train", "--resume").exit_code == 0
    assert [name for name, _ in seen] == ["autoencoder", "pipeline", "unconditional", "mmdit", "classifier", "labeller"]
    assert [resumed for _, resumed in seen] == [False, True, True, True, False, False]
    finished = tmp_path / "runs" / "portraits" / "pipeline"
    finished.mkdir(parents=True)
    (finished / "model_index.json").write_text("{}")
    seen.clear()
    assert "already in" in run("portraits", "train").stderr
    assert [name for name, _ in seen] == ["autoencoder", "unconditional", "mmdit", "classifier", "labeller"]
    seen.clear()
    run("portraits", "train", "--stage", "pipeline")
    assert [name for name, _ in seen] == ["pipeline"]
    assert set(starts) == {None}
    run("portraits", "train", "--stage", "pipeline", "--from", "elsewhere")
    assert starts[-1] == Path("elsewhere") and set(matches) == {0}
    run("portraits", "train", "--stage", "pipeline", "--from", "elsewhere", "--match", 500)
    assert matches[-1] == 500
    run("portraits", "train", "--stage", "mmdit", "--from", "another", "--match", 9)
    assert (seen[-1][0], starts[-1], matches[-1]) == ("mmdit", Path("another"), 9)
    assert "name the one --stage" in run("portraits", "train", "--from", "elsewhere").stderr


def test_sheet_of_drawings_obeys_the_prompt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[world.Record] = []
    real = drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda record: (drawn.append(record), real(record))[1])
    result = run("portraits", "sheet", "sheet.png", "--prompt", "a portrait of an old female judge", "-n", 3)
    assert result.exit_code == 0, result.output
    assert {(r.noun, r.label(world.GENDER), r.label(world.AGE)) for r in drawn} == {("judge", "female", "old")}
    assert Image.open("sheet.png").size == (3 * 66 + 2, 68)


def test_table_prints_the_planted_truth(run: Run) -> None:
    result = run("portraits", "table", "--json", "--out", "table.json", "--prompt", "a portrait of a nurse")
    assert json.loads(result.stdout)["a portrait of a nurse"]["gender"] == pytest.approx([0.9, 0.1])
    assert json.loads(Path("table.json").read_text(encoding="utf-8")) == world.table()
    assert "90.0%" in run("portraits", "table").stdout


def test_durations_in_words() -> None:
    assert [duration(s) for s in (3, 120, 7200)] == ["3 s", "2 min", "2.0 h"]


def test_the_time_left_of_a_resumed_run_counts_only_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 40.0, 80.0])
    monkeypatch.setattr("diffusion_lens.cli.console.time.monotonic", lambda: next(clock))
    bar = console.Bar("training")
    for done in (500, 510, 530):  # ten steps in 30 s, then 20 in 40 s
        bar.work.step(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"training: 51%, about {duration(490 * 30 / 10)} left",
        f"training: 53%, about {duration(470 * 70 / 30)} left",
    ]
