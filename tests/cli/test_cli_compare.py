"""``compare``, ``dissect``, ``together`` and ``portraits depth`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens_fixtures import PROMPTS
from typer.testing import CliRunner

from diffusion_lens.cli.app import app
from diffusion_lens.lens.lens import DiffusionLens


@pytest.fixture
def run(tiny_lens_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command in an empty folder, with the tiny lens as the default one."""
    monkeypatch.setenv("DIFFUSION_LENS", str(tiny_lens_folder))
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("command", ["compare", "dissect", "together", "portraits depth"])
def test_help_gives_examples(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"python -m diffusion_lens {command}" in " ".join(result.stdout.split())


def test_compare_prints_and_writes_the_table(run: Any, tmp_path: Path) -> None:
    words = ("compare", "-a", "gender", "-p", PROMPTS[0], "-m", "bypass,h-distribution", "-n", 12, "--tune", 10,
             "--fit", 4, "--out", "out")  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "H-Distribution" in result.stdout and "No steering" in result.stdout
    assert {p.suffix for p in (tmp_path / "out" / "gender").glob("comparison.*")} == {
        ".json",
        ".safetensors",
        ".csv",
        ".md",
    }
    assert "images to draw and 2 fits" in result.stderr and "(3 of 3;" in result.stderr
    plain = json.loads(run(*words, "--json").stdout)
    assert [row["method"] for row in plain["gender"]] == ["unsteered", "bypass", "h-distribution"]


def test_dissect_prints_groups(run: Any, tiny_lens: DiffusionLens) -> None:
    feature = int(np.argmax(tiny_lens.atlas.density))
    result = run("dissect", "-p", PROMPTS[0], "--feature", feature, "-n", 12)
    assert result.exit_code == 0, result.output
    assert "of 1 features" in result.stderr
    assert "2 turns of features on 12 images each" in result.stderr and "evidence" not in result.stderr
    grouped = json.loads(run("dissect", "-p", PROMPTS[0], "--feature", feature, "-n", 12, "--json").stdout)
    assert set(grouped) == {"gender", "age", "glasses"}


def test_together_tells_what_each_steer_moves(run: Any) -> None:
    result = run("together", "-p", PROMPTS[0], "--steer", "gender=even:2", "--steer", "age=old:1", "-n", 12)
    assert result.exit_code == 0, result.output
    assert "glasses: none" in result.stdout and "together" in result.stdout and "order is reversed" in result.stderr


def test_mistakes_are_one_sentence(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diffusion_lens.cli.dissect.assets_folder", lambda: tmp_path)  # nothing is bundled
    for words, message in (
        (("compare", "-m", "magic"), "no method"),
        (("compare", "-n", 3), "'n' is wrong"),
        (("dissect", "-n", 2), "'n' is wrong"),
        (("dissect", "--by", "glasses"), "--top"),
        (("dissect", "--by", "hats", "--top", 2), "none of these"),
        (("together", "--steer", "gender=even"), "Write a steer"),
        (("portraits", "depth"), "no trained autoencoder"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1
