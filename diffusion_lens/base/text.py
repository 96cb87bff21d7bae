"""The one reader of text files that people write, and the one writer of tables.

Text comes in UTF-8 with or without a byte order mark, UTF-16, or Windows-1252; tables come with commas, semicolons or
tabs, with Excel's empty rows and columns. What is written is UTF-8, and no cell of a table is taken for a formula.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_lens.base.types import LensError

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**20
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
DELIMITERS = (",", ";", "\t")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"-?(\d+(\.\d*)?([eE][+-]?\d+)?|inf|nan)")


def read_text(path: Path | str) -> str:
    """A text file with line ends ``\\n`` and without a byte order mark.

    Raises:
        LensError: names a file that is missing, may not be read, is too large, or is no text.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[str, str]:
    """Text and encoding of a file, see ``read_text``."""
    try:
        if path.is_dir():
            raise LensError(f"{path} is a folder; name a text file.")
        if path.exists() and not path.is_file():
            raise LensError(f"{path} is no file; name a text file.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise LensError(f"There is no file at {path}; check the path.") from None
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise LensError(f"{path} cannot be read ({told}); check the path and its permissions.") from None
    if len(data) > MAX_BYTES:
        raise LensError(f"{path} is larger than {MAX_BYTES // 2**20} MB; split it.")
    text, encoding = _decode(data, path)
    if encoding == "cp1252":
        log.warning("%s is not UTF-8 and was read as Windows-1252; save it as UTF-8 if letters look wrong.", path.name)
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), encoding


def _decode(data: bytes, path: Path) -> tuple[str, str]:
    marked = next((encoding for mark, encoding in MARKS.items() if data.startswith(mark)), None)
    for encoding in [marked] if marked else [*_unmarked(data), "utf-8", "cp1252"]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not CONTROLS.search(text):
            return text, encoding
    raise LensError(f"{path} is no text file, or is damaged; save it as text in UTF-8.")


def _unmarked(data: bytes) -> list[str]:
    """UTF-16 without a mark: where every second byte of mostly Latin text is zero."""
    even, odd = data[:4096:2], data[1:4096:2]
    if odd.count(0) > len(odd) // 2:
        return ["utf-16-le"]
    return ["utf-16-be"] if even.count(0) > len(even) // 2 else []


@dataclass(frozen=True)
class Row:
    """One filled row of a table: its line in the file, and column → cell without spaces around it."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """The named columns of a table, its rows that are not empty, and the encoding that it was read in."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    encoding: str


def read_table(path: Path | str) -> Table:
    """A table of values between commas, semicolons or tabs, whichever part its first line most.

    Empty rows and unnamed empty columns are left out; missing cells at a row's end are empty.

    Raises:
        LensError: no text, no header, a column that stands twice, or a row with more cells than the header.
    """
    path = Path(path)
    text, encoding = _read(path)
    lines = text.split("\n")
    told = re.fullmatch(r'"?sep=(.)"?[,;\t]*', lines[0])  # how Excel is told, and tells, the delimiter
    body, skipped = ("\n".join(lines[1:]), 1) if told else ("\n".join(lines), 0)
    delimiter = told.group(1) if told else _delimiter(body)
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter)
    try:
        parsed = [(reader.line_num + skipped, [_plain(cell) for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise LensError(f"{path.name}, line {reader.line_num + skipped}: it is no table ({error}).") from None
    filled = [(line, cells) for line, cells in parsed if any(cells)]
    if not filled:
        raise LensError(f"{path.name} is empty; write a first line with the names of its columns.")
    (_, header), *rest = filled
    names = [name for name in header if name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LensError(f"{path.name} has two columns '{twice}'; rename or delete one of them.")
    return Table(tuple(names), tuple(_row(path, line, header, cells) for line, cells in rest), encoding)


def _delimiter(text: str) -> str:
    first = next((line for line in text.split("\n") if line.strip(" ,;\t")), "")
    return max(DELIMITERS, key=lambda d: len(next(csv.reader([first], delimiter=d), [])))


def _row(path: Path, line: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    names = [*header, *[""] * len(cells)]
    stray = next((cell for name, cell in zip(names, cells, strict=False) if cell and not name), "")
    if stray:
        raise LensError(f"{path.name}, line {line}: '{stray}' stands in no named column; quote cells that hold commas.")
    padded = [*cells, *[""] * len(header)]
    return Row(line, {name: cell for name, cell in zip(header, padded, strict=False) if name})


def _plain(cell: str) -> str:
    """A cell as it was meant: without spaces around it, and without the mark of ``as_csv``."""
    text = cell.strip()
    return text[1:].strip() if text[:1] == "'" and text[1:].lstrip().startswith(FORMULA) else text


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table between commas, a line per row; ``None`` is an empty cell.

    Text that a spreadsheet would take for a formula gets an apostrophe before it; numbers stay numbers.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_safe(name) for name in columns])
    writer.writerows([_safe(value) for value in row] for row in rows)
    return out.getvalue()


def _safe(value: Any) -> str:
    text = "" if value is None else str(value)
    formula = text.startswith(FORMULA) or text.lstrip().startswith(FORMULA)
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # the csv module leaves a lone \r unquoted
    return f"'{text}" if formula and not NUMBER.fullmatch(text) else text
