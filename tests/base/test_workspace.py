"""A workspace makes a piece once, keeps it whole, and finds it again, also after a kill and beside other processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kills import at_once, die_at, needs_fork

from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.progress import Cancelled, Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.base.workspace import Workspace, digest


def counted(calls: list[str], value: object = 1) -> Callable[[], object]:
    def make() -> object:
        calls.append("made")
        return value

    return make


def save_folder(path: Path, value: object) -> None:
    """A piece of two files."""
    write_json(path / "a.json", value)
    write_json(path / "inner" / "b.json", value)


def load_folder(path: Path) -> object:
    return [read_json(path / "a.json"), read_json(path / "inner" / "b.json")]


def test_a_piece_is_made_once_and_found_again(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(3):
        again = Workspace(tmp_path / "w")  # as another run
        assert again.values("a", counted(calls, {"x": 1})) == {"x": 1}
        assert again.piece("folder", counted(calls, 2), save_folder, load_folder) == [2, 2]
        np.testing.assert_array_equal(again.tensors("t", lambda: {"x": np.arange(3.0)})["x"], np.arange(3.0))
    assert calls == ["made"] * 2
    assert again.has("a.json", "folder", "t.safetensors") and not again.has("a.json", "b.json")
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["a.json", "folder", "t.safetensors"]
    assert [p.name for p in again.names("*.json")] == ["a.json"]


def test_what_was_just_made_is_as_it_is_read_back(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    assert work.values("a", lambda: {"tuple": (1, 2)}) == {"tuple": [1, 2]} == work.values("a", lambda: None)


def test_other_settings_make_another_piece(tmp_path: Path) -> None:
    calls: list[str] = []
    for decides in ({"n": 1, "m": 2}, {"m": 2, "n": 1}, {"n": 2, "m": 2}):
        Workspace(tmp_path).part("sweep", decides).values("a", counted(calls))
    assert calls == ["made"] * 2
    assert digest({"a": 1}) == digest({"a": 1}) != digest({"a": 2}) and len(digest(None)) == 12
    assert Workspace(tmp_path).part("sweep").folder == tmp_path / "sweep"


def test_a_workspace_of_other_settings_is_refused(tmp_path: Path) -> None:
    for _ in range(2):
        Workspace(tmp_path).claim("settings", {"n": (1, 2)}, "other settings")
    with pytest.raises(LensError, match=r"^other settings$"):
        Workspace(tmp_path).claim("settings", {"n": (1, 3)}, "other settings")


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt, RuntimeError])
def test_work_that_is_stopped_keeps_nothing_by_halves(tmp_path: Path, error: type[BaseException]) -> None:
    def stopped(path: Path, value: object) -> None:
        save_folder(path, value)
        raise error

    work = Workspace(tmp_path)
    with pytest.raises(error):
        work.keep("folder", lambda: 1, stopped)
    assert list(tmp_path.iterdir()) == [] and not work.has("folder")
    assert work.piece("folder", lambda: 1, save_folder, load_folder) == [1, 1]


def test_a_piece_that_is_found_fills_its_part_of_the_bar(tmp_path: Path) -> None:
    seen: list[float] = []
    work, bar = Workspace(tmp_path), Progress(lambda status: seen.append(status.share))
    first, second = bar.parts(2)
    work.values("a", lambda: first.step(1, 2) or 1, first)
    assert seen == [0.25]
    work.values("a", lambda: 1, second)
    assert seen[-1] == 1.0


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    def full(path: Path, value: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(LensError, match=rf"The disk under {tmp_path} is full \(.* GB free\); make room"):
        Workspace(tmp_path).keep("a", lambda: 1, full)
    assert list(tmp_path.iterdir()) == []


@needs_fork
def test_killed_at_any_change_of_the_disk_a_piece_is_whole_or_missing(tmp_path: Path) -> None:
    for point in range(100):
        work = Workspace(tmp_path / f"{point}")
        died = die_at(point, lambda: work.keep("folder", lambda: 1, save_folder))  # noqa: B023
        assert not work.has("folder") or load_folder(work.path("folder")) == [1, 1]
        assert work.piece("folder", lambda: 1, save_folder, load_folder) == [1, 1]
        if not died:
            break
    assert not died and point > 10


@needs_fork
def test_processes_that_make_the_same_pieces_at_once_get_the_same(tmp_path: Path) -> None:
    def work() -> None:
        own = Workspace(tmp_path)
        for number in range(20):
            assert own.piece(f"folder-{number}", lambda: 1, save_folder, load_folder) == [1, 1]
            assert own.values(f"{number}", lambda: [1]) == [1]

    assert at_once([work] * 4) == [0] * 4
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]
