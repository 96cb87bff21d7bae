"""Two processes make the same lens as one, a killed pair goes on, and a full disk is one sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_text_pipeline
from fits import quick
from lens_fixtures import tiny_config
from safetensors import SafetensorError

from diffusion_lens.base.files import save_tensors
from diffusion_lens.base.processes import ALONE, Processes, launched
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.fit.run import Models, fit, load_config
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.manifest import read_manifest

PATIENCE = 300.0


def test_a_share_is_every_so_manieth_item() -> None:
    parts = [Processes(i, 3).share("abcdefgh") for i in range(3)]
    assert parts == [["a", "d", "g"], ["b", "e", "h"], ["c", "f"]]
    assert ALONE.share("ab") == ["a", "b"] and ALONE.is_main and not Processes(1, 2).is_main
    assert Processes(1, 2, local=1).device("cuda") == "cuda:1" and ALONE.device("cuda") == "cuda"
    assert Processes(1, 2, local=1).device("cpu") == "cpu"


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(LensError, match="pip install accelerate"):
        launched()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as each of the launched processes has: the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(config: Path, out: Path, work: Path) -> subprocess.Popen[str]:
    """``fit`` in two processes, on the CPU."""
    words = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "diffusion_lens", "fit", str(config), "--out", str(out), "--work", str(work), "--device", "cpu",
        "--offline",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(launcher: subprocess.Popen[str]) -> None:
    """End the launcher and its workers, which have sessions of their own, without a warning."""
    import psutil  # comes with accelerate

    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family)
    launcher.wait()


def test_two_processes_killed_and_started_again_make_the_lens_of_one(
    tiny_fit_models: Models, tmp_path: Path, one_thread: None
) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    make_text_pipeline().save_pretrained(tmp_path / "sd")
    (tmp_path / "judge").mkdir()
    tiny_fit_models.classifier.save(tmp_path / "judge")  # type: ignore[attr-defined]
    quick(model="sd", classifier="judge", batch_size=4).save(tmp_path / "fit.json")
    fit(load_config(tmp_path / "fit.json"), tmp_path / "one", work=tmp_path / "w1", offline=True)
    first = start(tmp_path / "fit.json", tmp_path / "two", tmp_path / "w2")
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and first.poll() is None and len(list(tmp_path.glob("w2/sample-*/0*"))) < 3:
        time.sleep(0.02)
    kill(first)
    assert not list(tmp_path.glob("w2/sample-*/done.json")) and not (tmp_path / "two").exists()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("w2/sample-*/0*.safetensors")}
    assert len(kept) >= 3
    second = start(tmp_path / "fit.json", tmp_path / "two", tmp_path / "w2")
    said, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert said.count("The lens is in") == 1
    assert read_manifest(tmp_path / "two").files == read_manifest(tmp_path / "one").files
    assert DiffusionLens.from_pretrained(tmp_path / "two").manifest.lens_id == read_manifest(tmp_path / "one").lens_id


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_fit_goes_on(
    fault: Exception, tiny_fit_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"n": 0}

    def full(*args: Any, **kwargs: Any) -> None:
        calls["n"] += 1
        if calls["n"] == 2:
            raise fault
        save_tensors(*args, **kwargs)

    monkeypatch.setattr("diffusion_lens.fit.stages.save_tensors", full)
    monkeypatch.setattr("diffusion_lens.fit.run.STAGES", ("sample",))
    monkeypatch.setattr("diffusion_lens.fit.run.write_lens", lambda *_: None)
    with pytest.raises(LensError, match=r"The disk under .* is full \(.*\); make room and give the same command again"):
        fit(tiny_config(), tmp_path / "l", work=tmp_path / "w", models=tiny_fit_models)
    folder = next((tmp_path / "w").glob("sample-*"))
    assert [path.name for path in folder.iterdir()] == ["000000.safetensors"]
    with pytest.raises(LensError, match="There is no folder"):  # the stages went through; nothing was written out
        fit(tiny_config(), tmp_path / "l", work=tmp_path / "w", models=tiny_fit_models)
    assert len(list(folder.glob("0*.safetensors"))) == 6 and (folder / "done.json").is_file()


def test_other_faults_stay_what_they_are(tiny_fit_models: Models, tmp_path: Path) -> None:
    def burst(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(tiny_config(), tmp_path / "l", work=tmp_path / "w", models=tiny_fit_models, progress=Progress(burst))
