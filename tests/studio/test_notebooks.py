"""The notebooks: every open exercise fails its check, every solution passes it, and both forms say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="the notebooks need requirements-dev.txt")

from notebooks import build

NAMES = [path.stem for path in build.SOURCES]


def test_there_are_five_in_order() -> None:
    assert [name[0] for name in NAMES] == list("12345")


@pytest.mark.parametrize("source", build.SOURCES, ids=NAMES)
def test_every_exercise_fails_its_check_before_and_passes_after(source: Path) -> None:
    """The whole notebook is executed, on a few images; each exercise first as a learner finds it."""
    notebook = build.read(source)
    n = sum(build.is_tagged(cell, "exercise") for cell in notebook.cells)
    assert n >= 3
    done = build.run(build.probes(notebook), seconds=300, small=True)
    assert sum("An open exercise passed" in cell.source for cell in done.cells) == n


@pytest.mark.parametrize("source", build.SOURCES, ids=NAMES)
def test_twins_are_built_from_their_source(source: Path) -> None:
    notebook = build.read(source)
    for folder, solution in (("exercises", False), ("solutions", True)):
        kept = json.loads((build.HERE / folder / f"{source.stem}.ipynb").read_text(encoding="utf-8"))
        made = build.form(notebook, solution=solution)
        assert ["".join(cell["source"]) for cell in kept["cells"]] == [cell.source for cell in made.cells], (
            f"{folder}/{source.stem}.ipynb is not of today's source; run: python notebooks/build.py {source.stem[0]}"
        )
        shown = json.dumps(kept)
        assert ("image/png" in shown) == (solution and source.stem[0] != "4") and len(shown) < build.LIMIT
        assert "<solution>" not in shown and ("Your code goes here" in shown) != solution


@pytest.mark.parametrize("source", build.SOURCES, ids=NAMES)
def test_a_notebook_says_how_long_how_hard_and_ends_with_a_question(source: Path) -> None:
    cells = build.read(source).cells
    words = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert "**One idea:**" in words[0] and re.search(r"About \d+ minutes", words[0])
    assert "%pip install" in cells[1].source
    told = [w for w in words if w.startswith("## Exercise")]
    assert all("Difficulty 🔴" in w and "importance 🔵" in w and re.search(r"spend up to \d+ minutes", w) for w in told)
    assert len(told) == sum(build.is_tagged(cell, "exercise") for cell in cells)
    assert words[-1].startswith("## An open question") or "## An open question" in words[-1]


def test_open_blocks_keep_their_place_and_solutions_lose_their_marks() -> None:
    cell = "def f(x):\n    # <solution>\n    y = x\n    return y\n    # </solution>\n\n\ng = 1"
    assert build.open_block(cell) == f"def f(x):\n    {build.STUB}\n\n\ng = 1"
    assert build.solved(cell) == "def f(x):\n    y = x\n    return y\n\n\ng = 1"
