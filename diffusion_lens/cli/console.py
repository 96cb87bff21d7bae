"""What commands say: results on standard output, everything else on standard error."""

from __future__ import annotations

import errno
import functools
import html
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from diffusion_lens.base.files import check_writable, disk_sentence, write_text
from diffusion_lens.base.progress import Progress, Status
from diffusion_lens.base.types import LensError, LogRatio, Share
from diffusion_lens.base.words import duration
from diffusion_lens.cli.output import holds_unicode, keeping

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from diffusion_lens.lens.lens import DiffusionLens

P = ParamSpec("P")
R = TypeVar("R")

MISTAKE = 2
WRITTEN = ("out", "html", "work")
"""Names of the arguments of commands that are paths to write to."""
STOPPED = 130
PATIENCE = 0.5
"""Seconds before a progress bar appears."""
WIDE = 160
"""Columns of a table that goes to a file."""
LINE_EVERY = 30.0
"""Seconds between progress lines where standard error is a file."""


class Screen(Console):
    """A console that tells of a closed pipe, in place of ending the program."""

    def on_broken_pipe(self) -> None:
        """Called by rich where a write found no reader."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


def say(text: str) -> None:
    """One line for the person, on standard error; where nobody listens any more, nothing is said."""
    with suppress(OSError, ValueError):
        Screen(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


@contextmanager
def stored(lens: DiffusionLens, results: Iterable[object]) -> Iterator[None]:
    """Store results in a lens, then let the block print them; where they cannot be stored they are printed all the
    same, and what is wrong is said last.
    """
    fault: LensError | None = None
    try:
        for result in results:
            say(f"Wrote {lens.store(result)}")
    except LensError as error:
        fault = error
    yield
    if fault is not None:
        raise fault


def kept(name: str, values: Callable[[], Any]) -> AbstractContextManager[None]:
    """A block that prints a result; where that fails, the result is kept in a file (``output.keeping``)."""
    return keeping(name, values, say)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose ``LensError`` is one sentence and exit status 2, and whose Ctrl-C is one sentence and 130.

    What it is to write (its arguments ``WRITTEN``) is tried before it begins: nothing is computed for nothing.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            for name in WRITTEN:
                if isinstance(path := kwargs.get(name), Path):
                    check_writable(path)
            return command(*args, **kwargs)
        except LensError as error:
            say(str(error))
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            say("Stopped. What was finished is kept; no half-written file is left.")
            raise typer.Exit(STOPPED) from None
        except BrokenPipeError:
            raise  # whoever read the output has seen enough; typer ends quietly
        except OSError as error:
            say(disk_sentence(error) or f"{error.filename or 'The system'}: {error.strerror or error}.")
            raise typer.Exit(MISTAKE) from None
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            say("There is not enough memory; lower --batch-size or --images, or choose another --device.")
            raise typer.Exit(MISTAKE) from None

    return run


class Bar:
    """One progress bar with the time left; plain lines every half minute where standard error is a file.

    ``work`` is what is handed to the library; each of its named parts gets a bar of its own.
    """

    def __init__(self, title: str) -> None:
        self.name = self.title = title
        self.console = Screen(stderr=True)
        self.work = Progress(self._hear)
        self._begin()
        self._shown: RichProgress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """One line for the person, above the bar."""
        with suppress(OSError, ValueError):
            self.console.print(text, markup=False, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Take the bar down."""
        if self._shown is not None:
            self._shown.stop()
        self._shown = self._task = None

    def _hear(self, status: Status) -> None:
        note = f" ({status.note})" if status.note else ""
        self._show(f"{status.stage or self.name}{note}", status.stage_share)

    def _show(self, title: str, share: float) -> None:
        if title.split(" (")[0] != self.title.split(" (")[0]:
            self.close()
            self._begin()
        self.title, now = title, time.monotonic()
        if not self.console.is_terminal:
            self._line(share, now)
        elif self._shown is None and now - self.begun > PATIENCE:
            self._start()
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, completed=share, description=title)

    def _begin(self) -> None:
        self.begun = self.printed = time.monotonic()
        self._first: tuple[float, float] | None = None

    def _start(self) -> None:
        self._shown = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._shown.add_task(self.title, total=1.0)
        self._shown.start()

    def _line(self, share: float, now: float) -> None:
        if self._first is None:
            self._first = (share, now)  # what a resumed run had done before was not done in this time
        before, since = self._first
        if now - self.printed < LINE_EVERY or share <= before:
            return
        self.printed = now
        left = (now - since) / (share - before) * (1 - share)
        say(f"{self.title}: {share:.0%}, about {duration(left)} left")


@contextmanager
def progress(title: str) -> Iterator[Bar]:
    """A bar for the work in the block."""
    bar = Bar(title)
    try:
        yield bar
    finally:
        bar.close()


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console: Console = Screen(highlight=False)
    if not console.is_terminal:
        console = Screen(highlight=False, width=WIDE)
    console.print(table)


def show_json(values: Any) -> None:
    """Print plain values as JSON; characters that standard output cannot hold are escaped."""
    print(json.dumps(values, indent=1, ensure_ascii=not holds_unicode(), allow_nan=False))


def save_html(path: Path, title: str, figures: Sequence[tuple[go.Figure, str]]) -> None:
    """Write figures with the sentence that describes each as one page that needs nothing from elsewhere."""
    from plotly.io import to_html

    parts = []
    for number, (figure, sentence) in enumerate(figures):
        drawn = to_html(figure, full_html=False, include_plotlyjs=number == 0)
        label = html.escape(sentence, quote=True)
        parts.append(f'<figure role="img" aria-label="{label}">{drawn}<figcaption>{label}</figcaption></figure>')
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
    )
    style = (
        "<style>body{font-family:sans-serif;max-width:60rem;margin:1rem auto;padding:0 1rem}figure{margin:0}</style>"
    )
    page = f"<!doctype html><html lang='en'><head>{head}{style}</head><body><h1>{html.escape(title)}</h1>"
    write_text(path, page + "".join(parts) + "</body></html>\n")
    say(f"Wrote {path}")


def percent(value: float) -> str:
    """``64.2 %``."""
    return f"{value * 100:.1f} %"


def span(interval: tuple[float, float]) -> str:
    """``55.0 to 72.1 %``."""
    return f"{interval[0] * 100:.1f} to {interval[1] * 100:.1f} %"


def share_row(share: Share) -> tuple[str, ...]:
    """Label, count, share as read and corrected, each with its interval."""
    return (
        share.label,
        f"{share.count}/{share.n}",
        f"{percent(share.raw)} ({span(share.raw_interval)})",
        f"{percent(share.corrected)} ({span(share.corrected_interval)})",
    )


SHARE_COLUMNS = ("class", "decided images", "as read (95 %)", "corrected for the classifier's error (95 %)")


def ratio_text(ratio: LogRatio | None) -> str:
    """The ratio's own text, or a dash; its ``note`` explains the mark."""
    return "–" if ratio is None else ratio.text
