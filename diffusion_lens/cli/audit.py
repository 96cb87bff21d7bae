"""``audit`` and ``verify``."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.text import read_text
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.console import (
    SHARE_COLUMNS,
    guarded,
    kept,
    progress,
    say,
    share_row,
    show_json,
    show_table,
    span,
)
from diffusion_lens.cli.image_quality import QualityFlags
from diffusion_lens.cli.options import (
    DEFAULT_RUN,
    JsonOption,
    Opening,
    Series,
    batch_of,
    checked_prompt,
    parse_turn,
    with_flags,
)
from diffusion_lens.model.run_options import RunOptions

if TYPE_CHECKING:
    from diffusion_lens.studies.audit.engine import Job
    from diffusion_lens.studies.audit.plan import AuditPlan
    from diffusion_lens.studies.audit.record import AuditRecord
    from diffusion_lens.studies.audit.rows import ImageQuality, QualityRow

FAILED = 1
SCHEMAS = ("plan", "report")


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("audit")(audit)
    app.command("verify")(verify)


def run_plan(plan: AuditPlan, folder: Path, out: Path, running: RunOptions, people: list[Path]) -> AuditRecord:
    """Run a plan, or go on with it, in ``out``, together with whoever else works there; writes the report.

    ``folder``: where files lie that the plan names.
    """
    from diffusion_lens.base.processes import launched
    from diffusion_lens.studies.audit.engine import run_job
    from diffusion_lens.studies.audit.people import write_sheet
    from diffusion_lens.studies.audit.report import write_report
    from diffusion_lens.studio.audit import links_of

    processes = launched()
    running = running.model_copy(update={"device": processes.device(running.device)})
    job = open_job(plan, folder, out, running)
    with progress("drawing and reading") as bar:
        run_job(job, processes=processes, progress=bar.work)
    record, paths = write_report(job, more=people, links=links_of(job.planned))
    if job.planned.plan.readers.blind and processes.is_main:
        write_sheet(job, job.planned.attributes)
    if processes.is_main:
        say("Wrote " + ", ".join(map(str, paths)))
        say(f"Images for people to label: {out / 'blind'}; fill labels.csv there and give the same command again.")
    return record


def open_job(plan: AuditPlan, folder: Path, out: Path, running: RunOptions) -> Job:
    """The job of a plan in ``out``; one that began there is taken as it was frozen, if the plan is still the same.

    Raises ``LensError`` where the plan has changed since.
    """
    from diffusion_lens.cli.options import hide_loading_bars
    from diffusion_lens.studies.audit.engine import Job
    from diffusion_lens.studies.audit.freeze import freeze

    hide_loading_bars()
    job = Job(freeze(plan, folder, running), out)
    job.begin()
    return job


def show_record(record: AuditRecord) -> None:
    """Print page one: a line per prompt, attribute and condition."""
    rows = [
        (
            verdict.prompt or "", verdict.subject, point.edit, f"{verdict.attribute}: {verdict.label}",
            "–" if point.share is None else f"{point.share:.1%} ({span((point.low, point.high))})",
            "–" if verdict.reference is None else f"{verdict.reference:.1%}", str(point.n), str(point.undecided),
            point.word,
        )
        for verdict in record.verdicts
        for point in verdict.points
    ]  # fmt: skip
    against = next((v.against for v in record.verdicts), "no reference")
    show_table(
        f"{record.plan.title}, against {against}",
        ("prompt", "subject", "images", "class", "share, corrected (95 %)", "reference", "n", "undecided", "word"),
        rows,
    )


def check_plan_alone(prompt: list[str] | None, turn: list[str] | None) -> None:
    """Raise ``LensError`` where flags say again what a plan says."""
    if prompt or turn:
        raise LensError("A plan says what is audited: leave --prompt and --turn out, or write them into it.")


def show_schema(which: str) -> None:
    """Print the JSON schema of a plan or of a report's JSON."""
    from diffusion_lens.studies.audit.tables import schema

    if which not in SCHEMAS:
        raise LensError(f"--schema is {' or '.join(SCHEMAS)}; '{which}' is neither.")
    typer.echo(schema(which), nl=False)


def read_notes(notes: str) -> str:
    """Notes as typed, or from the file after ``@``."""
    return read_text(notes[1:]) if notes.startswith("@") else notes


@guarded
@with_flags
def verify(
    report: Annotated[Path, typer.Argument(help="The audit.json that a report lies beside.")],
    images: Annotated[int, typer.Option("--images", "-n", help="Images to draw again; 0 checks numbers alone.")] = 12,
    seed: Annotated[int, typer.Option(help="Chooses which images are drawn again.")] = 0,
    running: RunOptions = DEFAULT_RUN,
    as_json: JsonOption = False,
) -> None:
    """Check an audit: its hashes, every share against its readings, and a sample of its images drawn again.

    Exit status 0 only where everything holds.

    python -m diffusion_lens verify audit/audit.json

    python -m diffusion_lens verify audit/audit.json -n 48 --seed 7
    """
    from diffusion_lens.cli.options import hide_loading_bars
    from diffusion_lens.studies.audit.record import read_record
    from diffusion_lens.studies.audit.verify import verify as check

    hide_loading_bars()
    record = read_record(report)
    with progress("drawing again") as bar:
        found = check(record, report.parent, options=running, sample=images, seed=seed, progress=bar.work)
    with kept("verify", lambda: to_plain(found)):
        if as_json:
            show_json({"holds": found.holds, **to_plain(found)})
        else:
            rows = [(check.what, "holds" if check.holds else "does NOT hold", check.found) for check in found.checks]
            show_table(f"{record.plan.title}, {record.date}", ("what", "", "found"), rows)
    say(found.summary)
    raise typer.Exit(0 if found.holds else FAILED)


@guarded
@with_flags
def audit(
    plan: Annotated[
        Path | None, typer.Argument(help="A plan (TOML or JSON) that says everything; without one, the flags do.")
    ] = None,
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
    people: Annotated[
        list[Path] | None,
        typer.Option("--people", help="A CSV of people's labels of the images set apart; repeatable."),
    ] = None,
    opening: Opening = Opening(),
    schema: Annotated[str, typer.Option("--schema", help="Print the JSON schema of a plan or a report.")] = "",
    card: Annotated[
        bool, typer.Option("--model-card", help="Print the section for a model card instead of the figures.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a report on who appears under some prompts: one HTML page, JSON and CSV.

    A plan is frozen and hashed before the first image is drawn; started again, or by several processes at once
    (accelerate launch -m diffusion_lens audit plan.toml), it goes on where it was. See docs/audit.md.

    python -m diffusion_lens audit plan.toml --out audit

    python -m diffusion_lens audit -p 'a portrait of a doctor' -p 'a portrait of a nurse' -n 500 --out report

    python -m diffusion_lens audit --turn gender=male:0.5 --reviewer 'A. Reviewer' --notes @notes.txt

    python -m diffusion_lens audit --turn gender=male:0.5 -n 500 --fid unedited --fid-features classifier
    """
    if schema:
        show_schema(schema)
        return
    if plan is not None:
        check_plan_alone(prompt, turn)
        _audit_plan(plan, out, opening.running, people or [], card=card, as_json=as_json)
        return
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
            notes=read_notes(notes),
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


def _audit_plan(plan: Path, out: Path, running: RunOptions, people: list[Path], *, card: bool, as_json: bool) -> None:
    from diffusion_lens.studies.audit.plan import read_plan
    from diffusion_lens.studies.audit.tables import model_card

    record = run_plan(read_plan(plan), plan.parent, out, running, people)
    with kept("audit", record.plain):
        if card:
            typer.echo(model_card(record), nl=False)
        elif as_json:
            show_json(record.plain())
        else:
            show_record(record)


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
