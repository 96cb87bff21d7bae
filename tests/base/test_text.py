"""Text and tables as people save them, read one way; tables written so that no spreadsheet runs a cell."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path

import pytest

from diffusion_lens.base import text as text_module
from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import read_json
from diffusion_lens.base.text import as_csv, read_table, read_text
from diffusion_lens.base.types import LensError

WORDS = "a photo of a médecin\na photo of a nurse\n"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


def write(folder: Path, data: bytes, name: str = "a.csv") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_of_every_kind_is_the_same(tmp_path: Path, encoding: str, end: str) -> None:
    assert read_text(write(tmp_path, WORDS.replace("\n", end).encode(encoding))) == WORDS


def test_marks_of_other_byte_orders_and_doubled_ones_are_no_text(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, b"\xfe\xff" + WORDS.encode("utf-16-be"))) == WORDS
    assert read_text(write(tmp_path, b"\xef\xbb\xbf" * 2 + WORDS.encode())) == WORDS
    assert read_text(write(tmp_path, b"")) == ""


def test_windows_1252_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_text(write(tmp_path, b"caf\xe9 \x96 5 \x80")) == "café – 5 €"
    assert "a.csv is not UTF-8" in caplog.text
    caplog.clear()
    read_text(write(tmp_path, "café".encode()))
    assert not caplog.text


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\x03", b"PK\x03\x04 zip", b"\x89PNG\r\n\x1a\n\x00\x00", b"\xff\xfe\x00"]
)
def test_what_is_no_text_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(LensError, match=r"a\.csv is no text file"):
        read_text(write(tmp_path, data))


def test_missing_files_folders_and_huge_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LensError, match="no file at"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(LensError, match="is a folder"):
        read_text(tmp_path)
    monkeypatch.setattr(text_module, "MAX_BYTES", 2**20)
    with pytest.raises(LensError, match="larger than 1 MB"):
        read_text(write(tmp_path, b"a" * (2**20 + 1)))


TABLE = "file,gender,note\r\n0.png,female,\r\n1.png,male,\r\n"
WANTED = [{"file": "0.png", "gender": "female", "note": ""}, {"file": "1.png", "gender": "male", "note": ""}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: t + ",,\r\n,,\r\n",  # rows that were emptied in Excel
        lambda t: t.replace("\r\n", ",,\r\n"),  # columns that were
        lambda t: "\r\n" + t.replace("\r\n", "\r\n\r\n"),
        lambda t: t.replace("0.png,female,", "0.png,female"),  # a short row
        lambda t: t.replace("gender", ' "gender" ').replace("female", " female "),
        lambda t: "sep=,\r\n" + t,
    ],
)  # fmt: skip
def test_tables_as_spreadsheets_save_them(tmp_path: Path, encoding: str, delimiter: str, change: object) -> None:
    data = change(TABLE).replace(",", delimiter).replace(' "gender" ', " gender ")  # type: ignore[operator]
    table = read_table(write(tmp_path, data.encode(encoding)))
    assert table.columns == ("file", "gender", "note") and [row.cells for row in table.rows] == WANTED


def test_quotes_lines_and_line_numbers(tmp_path: Path) -> None:
    data = b'file,note\na.png,"one, two\nthree"\n\nb.png,"he said ""no"""\n'
    rows = read_table(write(tmp_path, data)).rows
    assert [(row.line, row.cells["note"]) for row in rows] == [(3, "one, two\nthree"), (5, 'he said "no"')]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is empty"),
        (",,\n , \n", "is empty"),
        ("file,tone,tone\na,b,c\n", "two columns 'tone'"),
        ("file,tone\na,b\nc,d,e\n", "line 3: 'e' stands in no named column"),
        ("file,tone\na," + "x" * 200_000, "it is no table"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(LensError, match=message):
        read_table(write(tmp_path, data.encode()))


DANGEROUS = ["=1+1", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "=HYPERLINK(1)", "-", "--1", "-inf+1"]
HARMLESS = ["-0.5", "-1e-05", "-inf", "nan", "12", "a=b", "", "o'clock", "'quoted'"]


def test_no_cell_is_a_formula_and_numbers_stay_numbers() -> None:
    written = as_csv(["=x", "y"], [[cell, 1] for cell in DANGEROUS + HARMLESS] + [[-0.25, None]])
    rows = list(csv.reader(io.StringIO(written, newline="")))
    assert rows[0] == ["'=x", "y"]
    assert [row[0] for row in rows[1 : 1 + len(DANGEROUS)]] == ["'" + cell.replace("\r", "\n") for cell in DANGEROUS]
    assert [row[0] for row in rows[1 + len(DANGEROUS) : -1]] == HARMLESS
    assert rows[-1] == ["-0.25", ""]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    cells = ["=1+1", "-18", "a;b", 'say "a, b"', "@me", "two\nlines"]
    table = read_table(write(tmp_path, as_csv(["file", "-x"], [["f", c] for c in cells]).encode()))
    assert table.columns == ("file", "-x")
    assert [row.cells["-x"] for row in table.rows] == cells


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_json_that_people_save(tmp_path: Path, encoding: str) -> None:
    class Named(StrictConfig):
        name: str

    path = write(tmp_path, json.dumps({"name": "é"}, ensure_ascii=False).encode(encoding), "a.json")
    assert read_json(path) == {"name": "é"} and Named.load(path).name == "é"


@pytest.mark.parametrize("data", [b"{", b"NaN", b'{"a": Infinity}', b"[" * 100_000, b"9" * 10_000, b"\x00", b""])
def test_json_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(LensError, match=r"a\.json"):
        read_json(write(tmp_path, data, "a.json"))


def test_json_of_too_many_parts_is_refused_before_it_is_built(tmp_path: Path) -> None:
    with pytest.raises(LensError, match="more than 4,000,000 values"):
        read_json(write(tmp_path, b"[" + b"[]," * 3_000_000 + b"[]]", "a.json"))
