"""Results reach the person whatever standard output is: of few letters, closed, full, or interrupted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from diffusion_lens.cli.app import app
from diffusion_lens.cli.console import say, show_json
from diffusion_lens.cli.output import NOT_WRITTEN, keeping, make_printable
from diffusion_lens.lens.lens import DiffusionLens

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None)


def run(*words: str, encoding: str = "ascii", **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "diffusion_lens", *words]
    return subprocess.run(command, env=environment, capture_output=True, **options)


class Stream(io.TextIOWrapper):
    """Standard output of an encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    @property
    def written(self) -> bytes:
        return self.buffer.getvalue()  # type: ignore[attr-defined,no-any-return]


@contextmanager
def standard_output(encoding: str) -> Iterator[Stream]:
    stream = Stream(encoding)
    with redirect_stdout(stream):
        make_printable()
        yield stream


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_help_and_a_table_are_printed_in_every_encoding(encoding: str) -> None:
    for words in (("sweep", "--help"), ("portraits", "table", "-a", "gender")):
        done = run(*words, encoding=encoding)
        assert done.returncode == 0, done.stderr
        done.stdout.decode(encoding)
    assert "β" in run("sweep", "--help", encoding="utf-8").stdout.decode()
    assert "beta" in run("sweep", "--help", encoding="ascii").stdout.decode()


def test_every_page_of_help_can_be_printed() -> None:
    with standard_output("ascii") as stdout:
        for words in ([], *([name] for name in COMMANDS)):
            with pytest.raises(SystemExit) as done:
                app([*words, "--help"])
            assert done.value.code == 0
    assert stdout.written.isascii() and len(stdout.written) > 10_000


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", 'beta - e 1/2 ? ? -> "x"...'), ("cp1252", "beta – é ½ ? ? -> “x”…"), ("utf-8", "β – é ½ Ł 漢 → “x”…")],
)  # fmt: skip
def test_what_a_stream_cannot_hold_is_told_by_look_alikes(encoding: str, expected: str) -> None:
    with standard_output(encoding) as stdout:
        print("β – é ½ Ł 漢 → “x”…")
    assert stdout.written.decode(encoding).strip() == expected


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_keeps_every_letter(encoding: str) -> None:
    with standard_output(encoding) as stdout:
        show_json({"β": "漢 é"})
    assert json.loads(stdout.written.decode(encoding)) == {"β": "漢 é"}


@pytest.mark.parametrize("error", [BrokenPipeError(32, "closed"), OSError(28, "full"), KeyboardInterrupt()])
def test_a_result_that_cannot_be_printed_is_kept(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep-result.json").write_text("older")
    monkeypatch.setattr("diffusion_lens.cli.output._silence", lambda: None)
    told: list[str] = []
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else typer.Exit
    with pytest.raises(kind) as ended, keeping("sweep", lambda: {"share": 0.25}, told.append):
        raise error
    assert getattr(ended.value, "exit_code", NOT_WRITTEN) == NOT_WRITTEN
    assert json.loads((tmp_path / "sweep-result-1.json").read_text()) == {"share": 0.25}
    assert (tmp_path / "sweep-result.json").read_text() == "older"
    assert len(told) == 1 and "sweep-result-1.json" in told[0]


def test_nothing_is_kept_where_printing_went_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with keeping("sweep", lambda: pytest.fail("asked for"), pytest.fail):
        print("table")
    assert not list(tmp_path.iterdir())


def test_where_nothing_may_be_written_the_result_goes_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("diffusion_lens.cli.output._silence", lambda: None)
    with pytest.raises(typer.Exit), keeping("x", lambda: [1], lambda text: None):
        raise BrokenPipeError
    assert [path.name for path in (tmp_path / "temporary").iterdir()] == ["x-result.json"]


@pytest.mark.skipif(os.name != "posix", reason="pipes are closed in another way there")
def test_a_closed_pipe_ends_in_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "diffusion_lens", "portraits", "table"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(write)
    assert done.returncode != 0 and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_a_sweep_is_kept_where_its_table_cannot_be_printed(
    tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def closed(*_: Any) -> None:
        raise BrokenPipeError(32, "closed")

    monkeypatch.setattr("diffusion_lens.cli.measure.show_table", closed)
    monkeypatch.setattr("diffusion_lens.cli.output._silence", lambda: None)
    words = ["sweep", tiny_lens.prompts[0] or "", "--lens", str(tiny_lens.folder), "-n", "2", "--betas", "1,2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == NOT_WRITTEN and "kept in sweep-result.json" in done.stderr
    (kept,) = json.loads((tmp_path / "sweep-result.json").read_text(encoding="utf-8"))
    assert [point["beta"] for point in kept["points"]] == [1, 2]


def test_nobody_listening_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "closed")

    monkeypatch.setattr(sys, "stderr", Closed())
    say("still here")
