"""Standard output that may not hold every letter, may be closed, or may be interrupted: no result is lost to it."""

from __future__ import annotations

import codecs
import os
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from diffusion_lens.base.files import write_json

NOT_WRITTEN = 1
"""Exit status of a command whose result could not be printed."""

PLAIN = "diffusion-lens-plain"
LOOKS = {
    "β": "beta", "±": "+-", "×": "x", "·": "-", "–": "-", "—": "-", "−": "-", "…": "...", "→": "->", "≥": ">=",
    "≤": "<=", "’": "'", "‘": "'", "“": '"', "”": '"', "•": "*", "½": "1/2", "²": "2", "³": "3", "°": " deg",
}  # fmt: skip
"""What a character becomes where a stream cannot hold it."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of encoders: look-alikes, then letters without their accents, then a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(LOOKS.get(letter) or _bare(letter) for letter in letters), error.end


def _bare(letter: str) -> str:
    return unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


def make_printable() -> None:
    """Let standard output and error print every text, whatever their encoding (cp1252, ASCII, …)."""
    codecs.register_error(PLAIN, _plain)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # closed, or replaced by something without an encoding
            stream.reconfigure(errors=PLAIN)  # type: ignore[union-attr]


def holds_unicode() -> bool:
    """Whether standard output can hold every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


@contextmanager
def keeping(name: str, values: Callable[[], Any], tell: Callable[[str], None]) -> Iterator[None]:
    """Print a result inside the block; where that fails or is interrupted, the result goes to a file of its own.

    Args:
        name: of the command, and of the file.
        values: the result as plain JSON values; only asked for where it is needed.
        tell: says where the result lies.
    """
    try:
        yield
        if sys.stdout is None:
            raise OSError("standard output is closed")
        sys.stdout.flush()
    except (OSError, UnicodeError, KeyboardInterrupt) as error:
        path = _keep(name, values())
        tell(f"The result could not be printed; it is kept in {path}.")
        _silence()
        if isinstance(error, KeyboardInterrupt):
            raise
        raise typer.Exit(NOT_WRITTEN) from None


def _keep(name: str, values: Any) -> Path:
    """Write into this folder, or where that cannot be, among the temporary files; nothing is replaced."""
    for folder in (Path(), Path(tempfile.gettempdir())):
        numbers = (f"{name}-result{'' if n == 0 else f'-{n}'}.json" for n in range(1_000))
        path = next(folder / file for file in numbers if not (folder / file).exists())
        try:
            write_json(path, values, indent=1)
        except OSError:
            continue
        return path
    raise OSError("the result can be written nowhere")


def _silence() -> None:
    """Send what is left in the buffer nowhere: the interpreter would try once more at its end, and complain."""
    with suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
