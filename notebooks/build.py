"""Notebooks from their sources: an exercise and a solution of each, the solution executed with its outputs.

``python notebooks/build.py`` builds all, ``python notebooks/build.py 3`` one, ``--small`` on few images (as the ones
kept here are), ``--no-run`` without executing.
A source is a percent script (jupytext). In a cell tagged ``exercise``, what stands between ``# <solution>`` and
``# </solution>`` is left out of the exercise; the cell tagged ``check`` after it says what is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "source").glob("*.py"))
BLOCK = re.compile(r"^([ \t]*)# <solution>\n.*?^[ \t]*# </solution>\n?", re.DOTALL | re.MULTILINE)
STUB = 'raise NotImplementedError("Your code goes here.")'
LIMIT = 1_000_000
"""Bytes that a notebook with its outputs may have."""


def read(path: Path) -> nbformat.NotebookNode:
    """A source as a notebook, solution markers still in it."""
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    return notebook


def open_block(source: str) -> str:
    """A cell as a learner finds it."""
    return BLOCK.sub(lambda match: f"{match[1]}{STUB}\n", source + "\n").rstrip("\n")


def solved(source: str) -> str:
    """A cell with its solution, without the markers."""
    return "\n".join(line for line in source.split("\n") if line.strip() not in ("# <solution>", "# </solution>"))


def is_tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    """Whether a cell is an exercise, or a check."""
    return tag in cell.metadata.get("tags", ())


def form(notebook: nbformat.NotebookNode, *, solution: bool) -> nbformat.NotebookNode:
    """The exercise or the solution of a source."""
    made = nbformat.from_dict(notebook)
    for cell in made.cells:
        if is_tagged(cell, "exercise"):
            cell.source = solved(cell.source) if solution else open_block(cell.source)
    return made


def probes(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook in which every exercise is first left open and must fail its check, then solved and must pass it."""
    made = nbformat.from_dict(notebook)
    made.cells = list(_probed(notebook.cells))
    return made


def _probed(cells: list[nbformat.NotebookNode]) -> Iterator[nbformat.NotebookNode]:
    for here, after in zip(cells, [*cells[1:], None], strict=True):
        if not is_tagged(here, "exercise"):
            yield nbformat.from_dict(here)
            continue
        if after is None or not is_tagged(after, "check"):
            raise ValueError(f"No check follows this exercise: {here.source[:60]}")
        tried = f"{open_block(here.source)}\n{after.source}"
        yield nbformat.v4.new_code_cell(
            "_failed = False\ntry:\n    exec(" + repr(tried) + ", globals())\n"
            "except (AssertionError, NotImplementedError):\n    _failed = True\n"
            "assert _failed, 'An open exercise passed its check.'"
        )
        yield nbformat.v4.new_code_cell(solved(here.source))


def run(notebook: nbformat.NotebookNode, *, seconds: int = 600, small: bool = False) -> nbformat.NotebookNode:
    """Execute a notebook in the checkout; ``small``: on the few images of a test."""
    kept = dict(os.environ)
    root = str(HERE.parent)
    os.environ |= {"PYTHONPATH": root, "PLOTLY_RENDERER": "plotly_mimetype", "LESSON_SMALL": "1" if small else "0"}
    try:
        NotebookClient(
            notebook, timeout=seconds, kernel_name="python3", resources={"metadata": {"path": root}}
        ).execute()
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook, without what differs from run to run; refuses one that is too large."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        cell["outputs"] = (
            [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"] if cell.cell_type == "code" else []
        )
        if cell.cell_type != "code":
            del cell["outputs"]
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > LIMIT:
        raise SystemExit(f"{path.name} has {len(text.encode())} bytes; show fewer images.")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Build what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", help="first digits of the sources; all by default")
    parser.add_argument("--no-run", action="store_true", help="write the exercises alone")
    parser.add_argument("--small", action="store_true", help="on the few images of a test, in a minute each")
    asked = parser.parse_args()
    for source in SOURCES:
        if asked.numbers and source.name[0] not in asked.numbers:
            continue
        notebook = read(source)
        write(form(notebook, solution=False), HERE / "exercises" / f"{source.stem}.ipynb")
        if not asked.no_run:
            write(run(form(notebook, solution=True), small=asked.small), HERE / "solutions" / f"{source.stem}.ipynb")
        print(source.stem)


if __name__ == "__main__":
    main()
