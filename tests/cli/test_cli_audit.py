"""``audit plan`` and ``verify``: files written once, gone on with, checked; mistakes are one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from audits import plan_values
from cli_runs import Run, mistake
from typer.testing import CliRunner

from diffusion_lens.cli.app import app
from diffusion_lens.studies.audit.report import FILES


@pytest.fixture(scope="module")
def place(tiny_lens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``plan.json`` and the report of it in ``out``."""
    folder = tmp_path_factory.mktemp("audit")
    values = plan_values(tiny_lens_folder, size={"images": 8, "batch_size": 4}, edits=[], readers={"blind": 4})
    (folder / "plan.json").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["audit", str(folder / "plan.json"), "--out", str(folder / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((folder / "out" / "audit.json").read_text())
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(place)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_all_files_lie_there(place: Path) -> None:
    out = place / "out"
    assert {*FILES, "plan.json", "blind", "work"} <= {path.name for path in out.iterdir()}
    assert len(list((out / "blind").glob("*.png"))) == 4


def test_verify_holds_and_fails(run: Run, place: Path) -> None:
    assert run("verify", "out/audit.json", "-n", 2, "--device", "cpu").exit_code == 0
    values = json.loads((place / "out" / "audit.json").read_text())
    values["cells"][0]["seeds"][0] = 5
    (place / "forged.json").write_text(json.dumps(values))
    result = run("verify", "forged.json", "-n", 0)
    assert result.exit_code == 1 and "NOT verified" in result.stderr
    assert "no audit's JSON" in mistake(run("verify", "plan.json"))


def test_a_changed_plan_is_refused(run: Run, place: Path) -> None:
    values = json.loads((place / "plan.json").read_text())
    (place / "other.json").write_text(json.dumps({**values, "margin": 3}))
    assert "has changed since this audit began" in mistake(run("audit", "other.json", "--out", "out"))


def test_mistakes_are_one_sentence(run: Run, place: Path) -> None:
    (place / "bad.toml").write_text("question = ")
    assert "no TOML" in mistake(run("audit", "bad.toml"))
    assert "leave --prompt" in mistake(run("audit", "plan.json", "-p", "a nurse"))
    assert "--schema is plan or report" in mistake(run("audit", "--schema", "x"))
    assert "no file at" in mistake(run("audit", "nowhere.toml"))


def test_the_model_card_is_printed(run: Run) -> None:
    result = run("audit", "plan.json", "--out", "out", "--model-card")
    assert result.exit_code == 0 and result.stdout.startswith("## Bias, Risks, and Limitations")
