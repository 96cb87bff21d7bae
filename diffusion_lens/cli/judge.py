"""``check``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_lens.base.files import check_writable
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.console import (
    Bar,
    guarded,
    kept,
    progress,
    save_html,
    say,
    show_json,
    show_table,
    stored,
)
from diffusion_lens.cli.options import (
    HtmlOption,
    JsonOption,
    Opening,
    with_flags,
)

if TYPE_CHECKING:
    from diffusion_lens.studies.check.result import CheckReport, Row

NOT_PASSED = 1


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("check")(check)


@guarded
@with_flags
def check(
    full: Annotated[bool, typer.Option("--full", help="The figures to quote: large n, every row must hold.")] = False,
    part: Annotated[list[int] | None, typer.Option(help="Only this group of rows, 1 to 5; may be repeated.")] = None,
    opening: Opening = Opening(),
    store: Annotated[
        bool, typer.Option("--store", help="Keep the shares of part 1 in the lens, for the app's About tab.")
    ] = False,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Measure what a lens should do, row by row against its bar; exit status 0 only if it is passed.

    1 generated against planted shares, 2 the classifier, 3 the SAE, 4 attribution, 5 the sweep and its control.

    The quick check takes minutes and is a smoke test: a row fails only when its whole interval lies beyond the bar
    ("open" means that more images would tell), and it says how far off a share must be for that. The full check draws
    1,000 images per prompt and sweeps 500 per strength: hours on two cores; it tells rows as soon as they are
    measured, and --part by --part it need not be done at one go.

      python -m diffusion_lens check

      python -m diffusion_lens check --full --json > check.json

      python -m diffusion_lens check --full --part 1 --part 2 --store

      python -m diffusion_lens check --part 5 --html sweeps.html
    """
    from diffusion_lens.studies.check.run import PARTS, plain_report, run_check

    parts = tuple(part or PARTS)
    if store and not {1, 2} & set(parts):
        raise LensError("--store keeps the shares that parts 1 and 2 count: ask for one of them.")
    opened = opening.open()
    if store:
        check_writable(opened.folder)
    with progress("checking") as bar:
        told = partial(_say_rows, bar) if full else None
        report = run_check(opened, full=full, parts=parts, progress=bar.work, on_rows=told)
    if html is not None and report.sweeps:
        from diffusion_lens.plots import describe_sweep, sweep_figure

        prompts = dict.fromkeys(sweep.request.prompt for sweep in report.sweeps)
        groups = [[s for s in report.sweeps if s.request.prompt == prompt] for prompt in prompts]
        save_html(html, "Sweeps of the check", [(sweep_figure(g), describe_sweep(g)) for g in groups])
    counted = (report.counted,) if store and report.counted is not None else ()
    with stored(opened, counted), kept("check", lambda: plain_report(report)):
        if as_json:
            show_json(plain_report(report))
            say(report.summary)
        else:
            _show_report(report)
    raise typer.Exit(0 if report.holds else NOT_PASSED)


def _show_report(report: CheckReport) -> None:
    from diffusion_lens.studies.check.run import TITLES, row_texts

    columns = ("what", "bar", "value", "95 % interval", "n", "verdict")
    for number in sorted({row.part for row in report.rows}):
        rows = [row for row in report.rows if row.part == number]
        show_table(f"{number}. {TITLES[number]}", columns, [row_texts(row)[1:] for row in rows])
        for row in rows:
            if row.note:
                typer.echo(f"   {row.name}: {row.note}")
    typer.echo(report.summary)


def _say_rows(bar: Bar, rows: Sequence[Row]) -> None:
    """Tell what was measured while the rest is under way: a full check takes hours on two cores."""
    from diffusion_lens.studies.check.run import row_texts

    for row in rows:
        _, name, bar_text, value, interval, _, verdict = row_texts(row)
        span = "" if interval == "–" else f" ({interval})"
        bar.say(f"{verdict}: {name} {value}{span}, bar {bar_text}{'; ' if row.note else ''}{row.note}")
