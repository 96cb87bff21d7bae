"""The report: one HTML page that needs nothing from elsewhere, and the files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusion_lens.base.files import write_text
from diffusion_lens.studies.audit.drawing import dots, mark
from diffusion_lens.studies.audit.engine import SHOWN, Cell, Job
from diffusion_lens.studies.audit.figures import record_of
from diffusion_lens.studies.audit.people import people_of
from diffusion_lens.studies.audit.record import NOBODY, UNDECIDED, AuditRecord, CellRecord, ChangeRow, Verdict
from diffusion_lens.studies.audit.tables import (
    bibtex,
    crossings_csv,
    images_csv,
    measures_csv,
    model_card,
    shares_csv,
    shown_prompt,
)

FILES = ("audit.html", "audit.json", "audit.csv", "measures.csv", "crossings.csv", "images.csv", "model-card.md")
MOST_BYTES = 1_900_000
"""Of all pictures together, so that a page stays under 3 MB; with many prompts each shows fewer."""

Pictures = Mapping[tuple[str, str | None, str], Sequence[bytes]]
"""(subject, prompt, edit) → its first images as WebP."""

MAPPING = (
    ("THUMB: use context", "Context: intended use, people affected"),
    ("THUMB: bias manifestation", "The verdict, Findings, Intersections"),
    ("THUMB: harm hypotheses", "Context: harm hypotheses, what would change the decision"),
    ("THUMB: audit strategy", "The verdict's rule, Provenance, Reader agreement, Verify"),
    (
        "AI Act, Annex XI, section 1, point 2(c): methods to detect identifiable biases",
        "Findings, Side effects, Intersections, The judge's known error",
    ),
    (
        "AI Act, Annex XI, section 2, point 1: evaluation strategies, criteria, metrics, results, limitations",
        "The verdict and its rule, Findings, Quality, Provenance, What these numbers do not show",
    ),
    ("AI Act, Annex XII, point 1: intended tasks and acceptable use", "Context: intended use"),
    ("AI Act, Annex XII, point 2(c): data used for testing, type and provenance", "Provenance, Images"),
)
"""Headings of other formats → the sections that speak of the same."""


@dataclass(frozen=True)
class Tally:
    """How many prompts of one condition are near, far and open, for the headline."""

    edit: str
    near: int
    far: int
    open: int

    @property
    def n(self) -> int:
        """Prompts with a reference."""
        return self.near + self.far + self.open


def pictures_of(job: Job, cells: Sequence[Cell]) -> dict[tuple[str, str | None, str], Sequence[bytes]]:
    """The images that a report shows, as many of each condition as fit."""
    planned, conditions = job.planned, job.planned.plan.conditions
    named = {(planned.subjects[c.subject].name, planned.prompts[c.prompt], conditions[c.edit]): c.thumbs for c in cells}
    n = SHOWN
    while n > 1 and sum(len(thumb) * 4 // 3 for own in named.values() for thumb in own[:n]) > MOST_BYTES:
        n -= 1
    return {key: own[:n] for key, own in named.items()}


def write_report(job: Job, folder: Path | None = None, *, more: Sequence[Path] = (),
                 links: Mapping[str, str] | None = None) -> tuple[AuditRecord, tuple[Path, ...]]:  # fmt: skip
    """Put together what a finished job measured, and write the page and all files beside it.

    Args:
        folder: where to; the job's own by default. more: tables of people's labels beside those in the job's folder.
    """
    cells = job.cells()
    record = record_of(job, people_of(job, more, cells), links)
    return record, write_files(record, pictures_of(job, cells), folder or job.folder)


def write_files(record: AuditRecord, pictures: Pictures, folder: Path) -> tuple[Path, ...]:
    """The page, the record, the tables and the model card's section; returns their paths."""
    page, values, *others = paths = tuple(folder / name for name in FILES)
    write_text(page, render(record, pictures))
    record.write(values)
    texts = (shares_csv, measures_csv, crossings_csv, images_csv, model_card)
    for path, text in zip(others, texts, strict=True):
        write_text(path, text(record))
    return paths


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"percent": percent, "points": points, "prompt": shown_prompt, "webp": _address, "number": _number}
    return made


def render(record: AuditRecord, pictures: Pictures, *, unfinished: bool = False) -> str:
    """The page; ``unfinished``: a look at an audit that is under way, which says so."""
    plan = record.plan
    controls = [False, *(edit.kind == "control" for edit in plan.edits)]
    main = plan.attributes[0] if plan.attributes else ""
    return _environment().get_template("report.html").render(
        record=record, plan=plan, main=[v for v in record.verdicts if v.attribute == main], main_name=main,
        others=[
            (name, [v for v in record.verdicts if v.attribute == name]) for name in plan.attributes if name != main
        ],
        conditions=list(zip(plan.conditions, controls, strict=True)), dots=lambda v: dots(v, controls), mark=mark,
        tallies=tallies(record, main), effects=side_effects(record.changes), crossings=_crossings(record),
        sheets=[(cell, pictures.get((cell.subject, cell.prompt, cell.edit), ())) for cell in record.cells],
        order=lambda rows: sorted(range(len(rows)), key=lambda i: -rows[i].count),
        told=lambda cell, row: reading_of(record, cell, row), bibtex=bibtex(record), mapping=MAPPING,
        many=len(record.subjects) > 1, unfinished=unfinished, n_images=sum(len(c.seeds) for c in record.cells),
        against=plan_against(record), has_controls=any(controls),
    )  # fmt: skip


def plan_against(record: AuditRecord) -> str:
    """What the shares are compared with, as said in every figure."""
    names = dict.fromkeys(v.against for v in record.verdicts)
    return " or ".join(names) or "no reference"


def tallies(record: AuditRecord, attribute: str) -> list[Tally]:
    """The headline's numbers, condition by condition."""
    found = []
    for edit in record.plan.conditions:
        words = [
            point.word for v in record.verdicts if v.attribute == attribute for point in v.points if point.edit == edit
        ]
        if words:
            found.append(Tally(edit, words.count("near"), words.count("far"), words.count("can't tell")))
    return found


def side_effects(changes: Sequence[ChangeRow]) -> list[tuple[str, list[ChangeRow], int]]:
    """Edit → changes in attributes that it was not to move, whose interval leaves 0 out, largest first; and how many
    were looked at."""
    found = []
    for edit in dict.fromkeys(row.edit for row in changes):
        own = [row for row in changes if row.edit == edit and (not row.steered or row.control)]
        moved = [row for row in own if row.low is not None and row.high is not None and (row.low > 0 or row.high < 0)]
        found.append((edit, sorted(moved, key=lambda row: -abs(row.difference or 0.0)), len(own)))
    return found


def _crossings(record: AuditRecord) -> list[tuple[str, list[tuple[str, list[Any]]]]]:
    """Attributes crossed → a list per subject and condition; pooled over prompts where there are several."""
    pooled = any(row.pooled for row in record.crossings)
    groups: dict[str, dict[str, list[Any]]] = {}
    for row in record.crossings:
        if row.pooled == pooled:
            whose = f"{row.subject}, {row.edit}" if len(record.subjects) > 1 else row.edit
            groups.setdefault(" × ".join(row.attributes), {}).setdefault(whose, []).append(row)
    return [(name, list(own.items())) for name, own in groups.items()]


def reading_of(record: AuditRecord, cell: CellRecord, row: int) -> str:
    """Every reading of one image, in words."""
    classes = next(s.attributes for s in record.subjects if s.name == cell.subject)
    told = []
    for name in cell.readings:
        code = cell.readings[name][row]
        if code == NOBODY:
            return f"seed {cell.seeds[row]}: shows nobody"
        told.append(f"{name} undecided" if code == UNDECIDED else classes[name][code])
    file = f"{cell.files[row]}, " if cell.files else ""
    return f"{file}seed {cell.seeds[row]}: {', '.join(told)}"


def percent(value: float | None) -> str:
    """``64 %``; a dash where there is no number."""
    return "–" if value is None else f"{value:.0%}"


def points(value: float | None) -> str:
    """A difference of shares in points: ``+12``."""
    return "–" if value is None else f"{100 * value:+.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _address(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()


__all__ = ["FILES", "Verdict", "render", "write_files", "write_report"]
