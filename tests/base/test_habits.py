"""What works on one system and not on another is kept out: encodings left to the machine, and files named by hand."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("diffusion_lens", "assets", "tests", "docs", "benchmarks")
CODE = ("diffusion_lens", "docs", "benchmarks")
SOURCES = [ROOT / "app.py", *(path for place in CODE for path in (ROOT / place).rglob("*.py"))]
TEXT = {"read_text", "write_text", "open"}
OTHERS = {"os", "Image", "opening", "judging"}
"""Whose ``open`` opens no text."""
WINDOWS_NAMES = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}
LEAST = (3, 10)
"""The oldest Python claimed in pyproject.toml."""


def calls_without_encoding(source: str) -> Iterator[int]:
    """Lines that open text in whatever encoding the machine prefers: cp1252 on Windows."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        of = node.func.value if isinstance(node.func, ast.Attribute) else None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in TEXT or (of is None and name != "open") or getattr(of, "id", "") in OTHERS:
            continue
        given = [*node.args, *(word.value for word in node.keywords)]
        texts = [value.value for value in given if isinstance(value, ast.Constant)]
        binary = any(isinstance(text, str) and "b" in text and set(text) <= set("rwxab+") for text in texts)
        if not binary and not any(word.arg in ("encoding", None) for word in node.keywords):
            yield node.lineno


def test_text_is_opened_in_an_encoding_that_is_named() -> None:
    wrong = [
        f"{path.relative_to(ROOT).as_posix()}:{line}"
        for path in SOURCES
        for line in calls_without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_the_check_sees_what_it_is_for() -> None:
    wrong = ["open('a')", "Path('a').read_text()", "p.write_text('x')", "p.open('w')"]
    right = ["open('a', 'rb')", "p.open('rb')", "p.read_text(encoding='utf-8')", "os.open(p, 1)", "write_text(p, 'b')"]
    assert list(calls_without_encoding("\n".join(wrong))) == [1, 2, 3, 4]
    assert list(calls_without_encoding("\n".join(right))) == []


def test_the_oldest_python_claimed_can_parse_the_package() -> None:
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=LEAST)
    claimed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in claimed and 'target-version = "py310"' in claimed
    assert sys.version_info >= LEAST


def test_every_file_can_have_its_name_on_windows() -> None:
    paths = [path for place in PLACES for path in (ROOT / place).rglob("*")]
    names = [path.relative_to(ROOT) for path in paths if "__pycache__" not in path.parts]
    for name in names:
        assert not set(name.as_posix()) & set('<>:"\\|?*') and len(name.as_posix()) < 180, name
        for part in name.parts:
            assert part.split(".")[0].lower() not in WINDOWS_NAMES and part[-1] not in ". ", name
    folded = [name.as_posix().lower() for name in names]
    assert len(set(folded)) == len(folded), "two names differ in capitals alone"
