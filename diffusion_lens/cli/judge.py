"""``check`` and ``audit``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_lens.base.files import check_writable
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.text import read_text
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.console import (
    SHARE_COLUMNS,
    Bar,
    guarded,
    kept,
    progress,
    save_html,
    say,
    share_row,
    show_json,
    show_table,
    stored,
)
from diffusion_lens.cli.image_quality import QualityFlags
from diffusion_lens.cli.options import (
    HtmlOption,
    JsonOption,
    Opening,
    Series,
    batch_of,
    checked_prompt,
    parse_turn,
    with_flags,
)

if TYPE_CHECKING:
    from diffusion_lens.studies.audit.rows import ImageQuality, QualityRow
    from diffusion_lens.studies.check.result import CheckReport, Row

NOT_PASSED = 1


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("check")(check)
    app.command("audit")(audit)


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
    """Measure every claim about a lens against its bar; exit status 0 only if it is passed.

    1 generated against planted shares, 2 the classifier, 3 the SAE, 4 attribution, 5 the sweep and its control.

    The quick check takes minutes: a row fails only when its whole interval lies beyond the bar ("open" means that
    more images would tell). The full check draws 1,000 images per prompt and sweeps 500 per strength: hours on two
    cores; it tells rows as soon as they are measured, and --part by --part it need not be done at one go.

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


@guarded
@with_flags
def audit(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="May be repeated; the lens's suggestions by default.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")] = Path("audit"),
    turn: Annotated[
        list[str] | None,
        typer.Option("--turn", help="Also draw with this turn, as attribute=class:β."),
    ] = None,
    series: Series = Series(200),
    title: Annotated[str, typer.Option(help="Title of the report.")] = "",
    reviewer: Annotated[str, typer.Option(help="Who signs it.")] = "",
    notes: Annotated[str, typer.Option(help="The reviewer's notes, or @FILE to read them from a file.")] = "",
    judging: QualityFlags = QualityFlags(),
    opening: Opening = Opening(),
    as_json: JsonOption = False,
) -> None:
    """Write a report on who appears under some prompts: one HTML page, JSON and CSV.

    python -m diffusion_lens audit -p 'a portrait of a doctor' -p 'a portrait of a nurse' -n 500 --out report

    python -m diffusion_lens audit --turn gender=male:0.5 --reviewer 'A. Reviewer' --notes @notes.txt

    python -m diffusion_lens audit --turn gender=male:0.5 -n 500 --fid unedited --fid-features classifier
    """
    from diffusion_lens.studies.audit.run import audit as measure
    from diffusion_lens.studies.audit.run import write_report

    opened = opening.open()
    prompts = [checked_prompt(opened, p) for p in prompt] if prompt else list(opened.prompts)
    turns = [parse_turn(opened, text) for text in turn or ()]
    size = batch_of(opened, series.batch_size)
    with progress("reading the reference images") as bar:
        measures = judging.open(opened, bar.work)
    with progress("drawing and reading") as bar:
        found = measure(
            opened,
            prompts,
            series.seeds,
            turns=turns,
            title=title,
            reviewer=reviewer,
            notes=_read_notes(notes),
            command=_command(opening.lens, prompt or [], turn or [], replace(series, batch_size=size), judging),
            batch_size=size,
            measures=measures,
            progress=bar.work,
        )
    paths = write_report(found, out)
    say("Wrote " + ", ".join(map(str, paths)))
    if as_json:
        show_json(to_plain(found, without="examples"))
    else:
        for finding in found.findings:
            kind = ", edited" if finding.edit else ""
            for name in found.steered:
                rows = map(share_row, finding.evaluations[name].shares)
                show_table(f"'{finding.prompt or ''}'{kind}: {name}", SHARE_COLUMNS, rows)
        if found.quality is not None:
            _show_quality(found.quality)


def _read_notes(notes: str) -> str:
    if not notes.startswith("@"):
        return notes
    return read_text(notes[1:])


def _show_quality(quality: ImageQuality) -> None:
    columns = ["images", "n"]
    columns += [f"{quality.fid} from {quality.reference}"] if quality.fid else []
    columns += ["Inception score"] if quality.inception_score else []
    columns += ["CLIP-I (cos + 1)/2", "cosine", "CLIP-T (cos + 1)/2", "cosine"] if quality.clip else []
    show_table("Image quality", columns, [_quality_row(row, quality) for row in quality.rows])
    for note in quality.notes:
        typer.echo(f"   {note}")


def _quality_row(row: QualityRow, quality: ImageQuality) -> list[str]:
    whose = "all prompts together" if row.pooled else f"'{row.prompt or ''}'"
    cells = [whose + (", edited" if row.edit else ""), str(row.n)]
    if quality.fid:
        cells.append("–" if row.fid is None else f"{row.fid.value:.4g}")
    if quality.inception_score:
        cells.append("–" if row.inception_score is None else "{:.3f} ± {:.3f}".format(*row.inception_score))
    if quality.clip:
        for score in (row.clip_i, row.clip_t):
            cells += ["–", "–"] if score is None else [f"{score.value:.4f}", f"{score.cosine:.4f}"]
    return cells


def _command(lens: str, prompts: list[str], turns: list[str], series: Series, judging: QualityFlags) -> str:
    parts = ["python", "-m", "diffusion_lens", "audit", *(["--lens", lens] if lens else [])]
    for flag, values in (("--prompt", prompts), ("--turn", turns)):
        for value in values:
            parts += [flag, value]
    for flag, number in asdict(series).items():
        parts += [f"--{flag.replace('_', '-')}", str(number)]
    return shlex.join(parts + judging.words())
