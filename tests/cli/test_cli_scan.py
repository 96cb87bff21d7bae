"""``scan`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import mistake
from lens_fixtures import PROMPTS
from typer.testing import CliRunner

from diffusion_lens.cli.app import app

WORDS = ("scan", PROMPTS[0], "-a", "gender", "-s", "mid_block", "--ranges", 1, "-n", 32, "--steered", 8)


@pytest.fixture
def run(tiny_lens_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command in an empty folder, with the tiny lens as the default one."""
    monkeypatch.setenv("DIFFUSION_LENS", str(tiny_lens_folder))
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_scan_tells_its_cost_then_prints_table_and_advice(run: Any, tmp_path: Path) -> None:
    result = run(*WORDS, "--html", "scan.html")
    assert result.exit_code == 0, result.output
    assert "1 sites, " in result.stderr and "images in all" in result.stderr
    assert "mid_block" in result.stdout and "some stand out by chance" in result.stderr + result.stdout
    assert "Where it lives" in (tmp_path / "scan.html").read_text(encoding="utf-8")
    plain = json.loads(run(*WORDS, "--json").stdout)
    assert [cell["site"] for cell in plain["cells"]] == ["mid_block"]
    assert set(plain["recommendation"]) == {"sites", "reason"}


def test_mistakes(run: Any) -> None:
    assert "attribute=class" in mistake(run(*WORDS, "--target", "male"))
    assert "Only a lens can keep a scan" in mistake(
        run("scan", "--model", "nowhere", "--classifier", "nobody", "--store", "-a", "gender")
    )
