"""A checkout has the bytes that were committed, also where git turns line ends into Windows'."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTENT = {"assets/portraits/lens.json": b"{\n}\n", "tests/data/case.json": b"[1,\r\n2]\n", "module.py": b"x = 1\n"}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_clone_with_windows_line_ends_keeps_every_byte(tmp_path: Path) -> None:
    def git(*words: str | Path) -> None:
        subprocess.run(["git", *words], check=True, capture_output=True)

    source = tmp_path / "source"
    for name, data in {**CONTENT, ".gitattributes": (ROOT / ".gitattributes").read_bytes()}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    git("init", "-q", source)
    git("-C", source, "add", ".")
    git("-C", source, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "files")
    git("clone", "-q", "-c", "core.autocrlf=true", source, tmp_path / "clone")
    for name, data in CONTENT.items():
        assert (tmp_path / "clone" / name).read_bytes() == data, name
