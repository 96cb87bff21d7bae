"""Files are written whole or not at all, and a disk that will not take them is named in one sentence."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import FAULTS, break_disk
from kills import die_at, needs_fork

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import (
    atomic_folder,
    atomic_path,
    check_empty,
    check_writable,
    copy_file,
    disk_sentence,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
    write_text,
)
from diffusion_lens.base.resume import Checkpoint
from diffusion_lens.base.sheets import save_sheets
from diffusion_lens.base.transaction import changing
from diffusion_lens.base.types import LensError


class Settings(StrictConfig):
    """Something to save."""

    n: int = 1


def checkpoint(path: Path) -> None:
    """A training's state of some bytes."""
    Checkpoint(path, "x", {"net": torch.nn.Linear(99, 99)}, seconds=0.0).save({})


def change(folder: Path) -> None:
    """A change of a folder of two files."""
    with changing(folder) as begun:
        write_json(begun.staged / "a.json", [1] * 9999)
        write_json(begun.staged / "b.json", [2] * 9999)
        begun.commit(last="b.json")


def folder_of_two(path: Path) -> None:
    with atomic_folder(path) as partial:
        (partial / "inner").mkdir()
        (partial / "a").write_text("a" * 9999)
        (partial / "inner" / "b").write_text("b" * 9999)


SOURCE = Path(__file__)
NOISE = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda path: write_json(path, [1] * 9999),
    "text": lambda path: write_text(path, "x" * 9999),
    "tensors": lambda path: save_tensors(path, {"a": np.zeros(9999)}, {"b": "c", "d": "e"}),
    "copy": lambda path: copy_file(SOURCE, path),
    "settings": lambda path: Settings().save(path),
    "images": lambda path: save_sheets(NOISE, path, "x", lossless=True),
    "checkpoint": checkpoint,
    "folder": folder_of_two,
    "change": change,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("code", FAULTS, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("new", [True, False], ids=["new folder", "old folder"])
def test_a_disk_that_takes_nothing_is_named_and_left_as_it_was(
    writer: str, code: int, new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not new:
        (disk / "place").mkdir()
    with monkeypatch.context() as patch:
        break_disk(patch, disk, code)
        with pytest.raises(LensError, match=FAULTS[code]) as error:
            WRITERS[writer](disk / "place" / "x")
    assert str(disk) in str(error.value) and "\n" not in str(error.value)
    # Rust and C++ do not hear of the forbidden disk; their temporary files have hidden names.
    assert not [path for path in disk.rglob("*") if path.is_file() and not path.name.startswith(".")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("writer", sorted(set(WRITERS) - {"settings"}))
def test_a_disk_that_fills_up_while_a_file_is_written(writer: str, tmp_path: Path) -> None:
    """No file may grow beyond 2 kB here, which real libraries meet in their own ways, those in Rust and C++ too."""
    child = os.fork()
    if child == 0:
        import resource

        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            WRITERS[writer](tmp_path / "x")
        except LensError as error:
            code = 0 if str(error).startswith(f"The disk under {tmp_path}") and "is full" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".lens-")]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        BrokenPipeError(errno.EPIPE, "broken"),
        ValueError("nothing of a disk"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), atomic_path(tmp_path / "x"):
        raise error
    assert disk_sentence(error) is None and not list(tmp_path.iterdir())


def test_errors_that_do_not_say_where() -> None:
    assert disk_sentence(OSError(errno.ENOSPC, "full")) == (
        "The disk that was written to is full; make room and give the same command again."
    )
    assert disk_sentence(OSError(errno.EIO, "broken")) is None
    told = disk_sentence(OSError(errno.EIO, "broken"), Path("a/b"))
    assert told is not None and told.startswith("a/b cannot be written:")


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_text("mine")
    for path in (tmp_path, tmp_path / "new" / "x.json", tmp_path / "plain"):
        check_writable(path)
    monkeypatch.chdir(tmp_path)
    check_writable(Path("relative/x"))
    check_writable(Path("plain"))
    assert [path.name for path in tmp_path.iterdir()] == ["plain"] and (tmp_path / "plain").read_text() == "mine"
    with pytest.raises(LensError, match="a file stands where a folder should be"):
        check_writable(tmp_path / "plain" / "x.json")
    for code, sentence in FAULTS.items():
        with monkeypatch.context() as patch:
            break_disk(patch, tmp_path, code)
            with pytest.raises(LensError, match=sentence):
                check_writable(tmp_path / "new" / "x")


def test_only_an_empty_folder_is_empty(tmp_path: Path) -> None:
    check_empty(tmp_path / "none")
    (tmp_path / ".hidden").write_text("x")
    check_empty(tmp_path)
    (tmp_path / "x").write_text("x")
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(LensError, match="is not empty; choose a new folder"):
            check_empty(path)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    (path / "old").mkdir(parents=True)
    with pytest.raises(RuntimeError), atomic_folder(path) as partial:
        (partial / "new").write_text("x")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["old"]
    folder_of_two(path)
    assert sorted(p.name for p in path.iterdir()) == ["a", "inner"] and [p.name for p in tmp_path.iterdir()] == ["f"]


@needs_fork
def test_killed_at_any_change_of_the_disk_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for point in range(100):
        write_json(path, ["old"])
        died = die_at(point, lambda: write_json(path, ["new"] * 999))
        assert read_json(path) in (["old"], ["new"] * 999)
        if not died:
            break
    assert not died and point >= 3 and json.loads(path.read_text()) == ["new"] * 999


def test_equal_tensors_read_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"a": np.arange(3.0)})
    np.testing.assert_array_equal(load_tensors(tmp_path / "t.safetensors")["a"], np.arange(3.0))
