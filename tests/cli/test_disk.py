"""Every command that writes names the disk that will not take it, before it computes, and loses nothing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Run, mistake
from disks import FAULTS, break_disk
from fits import quick
from lens_fixtures import PROMPTS
from typer.testing import CliRunner

from diffusion_lens.base.types import LensError
from diffusion_lens.cli.app import app
from diffusion_lens.cli.console import MISTAKE
from diffusion_lens.fit.run import Models, fit
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.manifest import read_manifest, verify
from diffusion_lens.studies.joint import steer_together

DOCTOR = PROMPTS[0]


@pytest.fixture
def run(tiny_lens_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in a folder that holds an empty ``disk``, with the tiny lens as the default one."""
    monkeypatch.setenv("DIFFUSION_LENS", str(tiny_lens_folder))
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


WRITING: dict[str, tuple[Any, ...]] = {
    "generate": ("generate", DOCTOR, "--out", "disk/x.png"),
    "generate into a folder": ("generate", DOCTOR, "--out", "disk/pictures"),
    "attribute": ("attribute", DOCTOR, "--html", "disk/x.html"),
    "sweep": ("sweep", DOCTOR, "--html", "disk/x.html"),
    "balance": ("balance", DOCTOR, "--html", "disk/x.html"),
    "check": ("check", "--html", "disk/x.html"),
    "check's shares": ("check", "--full", "--part", 1, "--store", "--lens", "disk/lens"),
    "audit": ("audit", "-p", DOCTOR, "--out", "disk/audit"),
    "compare": ("compare", "--work", "disk/work"),
    "compare's tables": ("compare", "--out", "disk/tables"),
    "compare's lens": ("compare", "--store", "--lens", "disk/lens"),
    "dissect": ("dissect", "--work", "disk/work"),
    "dissect's lens": ("dissect", "--store", "--lens", "disk/lens"),
    "together's lens": ("together", "--store", "--lens", "disk/lens"),
    "fit": ("fit", "fit.json", "--out", "lens", "--work", "disk/work"),
    "fit's lens": ("fit", "fit.json", "--out", "disk/lens", "--work", "work"),
    "calibrate": ("calibrate", "--classifier", "clip:x", "--labelled", "x.csv", "--out", "disk/judge"),
    "convert-p2": ("convert-p2", "x.pt", "disk/pipeline"),
    "import-difflens": ("import-difflens", "sae", "disk/lens", "--model-id", "m", "--attribute", "gender=a,b",
                        "--features", "gender=f"),
    "portraits train": ("portraits", "train", "--work", "disk/work"),
    "portraits average": ("portraits", "average", "one", "two", "-o", "disk/x"),
    "portraits depth": ("portraits", "depth", "--work", "disk/work"),
    "portraits table": ("portraits", "table", "--out", "disk/table.json"),
    "portraits sheet": ("portraits", "sheet", "disk/sheet.png"),
}  # fmt: skip


@pytest.mark.parametrize("code", FAULTS, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("command", WRITING)
def test_a_command_names_the_disk_before_it_begins(
    command: str, code: int, run: Run, tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = WRITING[command]
    if "--store" in words:
        tiny_lens.save_pretrained(tmp_path / "disk" / "lens")
    before = sorted((tmp_path / "disk").rglob("*"))

    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("something was drawn for nothing")

    with monkeypatch.context() as patch:
        patch.setattr("diffusion_lens.model.denoise.BatchRun.draw", drawn)
        break_disk(patch, tmp_path / "disk", code)
        told = mistake(run(*words))
    assert re.search(FAULTS[code], told) and "disk" in told
    assert sorted((tmp_path / "disk").rglob("*")) == before


def test_a_result_that_cannot_be_stored_is_printed_and_the_lens_is_as_it_was(
    run: Run, tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "disk" / "lens"
    tiny_lens.save_pretrained(folder)
    before = read_manifest(folder)

    def fills_the_disk(*args: Any, **options: Any) -> Any:
        result = steer_together(*args, **options)
        break_disk(monkeypatch, folder, errno.ENOSPC)
        return result

    monkeypatch.setattr("diffusion_lens.studies.joint.steer_together", fills_the_disk)
    result = run(
        "together",
        "-p",
        DOCTOR,
        "--steer",
        "gender=even:2",
        "--steer",
        "age=old:1",
        "-n",
        12,
        "--store",
        "--lens",
        folder,
    )
    monkeypatch.undo()
    assert result.exit_code == MISTAKE and "glasses: none" in result.stdout
    assert re.search(FAULTS[errno.ENOSPC], result.stderr.splitlines()[-1]) and str(folder) in result.stderr
    assert verify(folder) == before


def test_a_fit_onto_a_full_disk_keeps_the_lens_that_was_there(
    tiny_fit_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(quick(name="old"), tmp_path / "lens", work=tmp_path / "work", models=tiny_fit_models)
    real = os.fsync
    for left in (1, 4, 9, 20):  # the disk is full after so many files
        count = iter(range(left))

        def full(handle: int, count: Iterator[int] = count) -> None:
            if next(count, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(LensError, match=FAULTS[errno.ENOSPC]):
                fit(quick(name="new"), tmp_path / "lens", work=tmp_path / "work", models=tiny_fit_models)
        assert verify(tmp_path / "lens").name == "old"
    fit(quick(name="new"), tmp_path / "lens", work=tmp_path / "work", models=tiny_fit_models)
    assert verify(tmp_path / "lens").name == "new"
