"""The script for the first quarter of an hour on a GPU runs, on small shapes, before there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``benchmarks/first_gpu_run.py`` as a module, on a machine without a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import first_gpu_run

    yield first_gpu_run
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(BENCHMARKS) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_every_part_runs_and_writes_its_rows(
    script: ModuleType, tiny_lens_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    assert script.main(["--lens", str(tiny_lens_folder), "--repeats", "2", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Small shapes on a CPU" in text and "FAILED" not in text and "not run | no time" not in text
    for part in script.PARTS:
        assert f"| {part.__name__} | took |" in text
    assert "the same images as alone" in text and "0.000 levels apart, at most 0" in text
    assert text.strip() in capsys.readouterr().out


def test_a_run_that_is_out_of_time_says_what_it_left_out(
    script: ModuleType, tiny_lens_folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    assert script.main(["--lens", str(tiny_lens_folder), "--seconds", "0", "--out", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("no time was left") == len(script.PARTS)
