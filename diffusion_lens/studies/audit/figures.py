"""From what was read to what the report says: shares against their reference, words, crossings, changes."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from diffusion_lens.base.types import Attribute, EditSpec, LensError, Share, is_assumed
from diffusion_lens.base.validity import count_faults
from diffusion_lens.results import metrics, stats
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.sequential import images_for, sequence_interval
from diffusion_lens.results.stats import Interval
from diffusion_lens.studies.audit.against import Reference, name_of, reference_for
from diffusion_lens.studies.audit.engine import Cell, Job
from diffusion_lens.studies.audit.people import People
from diffusion_lens.studies.audit.plan import AuditPlan
from diffusion_lens.studies.audit.record import (
    NOBODY,
    UNDECIDED,
    AuditRecord,
    CellRecord,
    ChangeRow,
    CrossRow,
    Distance,
    ErrorRecord,
    Point,
    QualityRecord,
    ShareRow,
    SideRow,
    SubjectRecord,
    Verdict,
    Word,
)
from diffusion_lens.studies.audit.subjects import Pictures, Subject, hardware, versions

LEAST_TOLD = 10
"""Decided images below which no word is given."""

COMMAND = "python -m diffusion_lens audit plan.json"


def word_of(low: float, high: float, margin: float) -> Word:
    """The rule of page one, for a difference from the reference known to lie within ``low`` to ``high``.

    ``far``: all of the interval lies beyond the margin; ``near``: all of it within; otherwise more images would tell.
    """
    if low > margin or high < -margin:
        return "far"
    return "near" if -margin <= low and high <= margin else "can't tell"


def difference(share: float, interval: Interval, reference: float, known: Interval | None) -> Interval:
    """The interval of share less reference; where the reference was measured too, errors add as squares (MOVER)."""
    if known is None:
        return interval[0] - reference, interval[1] - reference
    low = share - reference - math.hypot(share - interval[0], known[1] - reference)
    high = share - reference + math.hypot(interval[1] - share, reference - known[0])
    return max(-1.0, low), min(1.0, high)


class Reading:
    """The shares of a job's cells: the error of people's own measuring where there is one, intervals as planned."""

    def __init__(self, job: Job, people: People | None) -> None:
        self.job, self.plan, self.people = job, job.planned.plan, people
        self._known: dict[tuple[int, int, int, str], tuple[Share, ...]] = {}

    def confusion(self, subject: Subject, attribute: Attribute) -> tuple[np.ndarray, str]:
        """The judge's error and who measured it."""
        if self.people is not None:
            measured = self.people.confusion(subject.judge.classifier_id, attribute)
            if measured is not None:
                return measured, "people in this audit"
        table = subject.confusion[attribute.name]
        return table, "assumed" if is_assumed(table) else "labelled images"

    def shares(self, cell: Cell, attribute: Attribute) -> tuple[Share, ...]:
        """Shares of one attribute, in class order; intervals that hold while one looks, where drawing may stop."""
        key = (cell.subject, cell.prompt, cell.edit, attribute.name)
        if key not in self._known:
            table, _ = self.confusion(self.job.planned.subjects[cell.subject], attribute)
            read = cell.measurement.readings[attribute.name]
            found = stats.shares(read.counts, read.n_uncertain, attribute, table)
            until = self.plan.size.until
            self._known[key] = found if until is None else tuple(_widened(share, until / 100) for share in found)
        return self._known[key]


def _widened(share: Share, half_width: float) -> Share:
    """A share with the interval of a confidence sequence.

    The corrected interval widens on each side as the raw one does (our working form); it is never narrower than that
    of a fixed number of images.
    """
    if share.n == 0:
        return share
    low, high = sequence_interval(share.count, share.n, made_for=images_for(half_width))
    low, high = min(low, share.raw_interval[0]), max(high, share.raw_interval[1])

    def stretch(new: float, old: float) -> float:
        return abs(new - share.raw) / abs(old - share.raw) if abs(old - share.raw) > 1e-12 else 1.0

    c_low = share.corrected - (share.corrected - share.corrected_interval[0]) * stretch(low, share.raw_interval[0])
    c_high = share.corrected + (share.corrected_interval[1] - share.corrected) * stretch(high, share.raw_interval[1])
    return replace(share, raw_interval=(low, high), corrected_interval=(max(0.0, c_low), min(1.0, c_high)))


def record_of(job: Job, people: People | None = None, links: Mapping[str, str] | None = None, *,
              partial: bool = False) -> AuditRecord:  # fmt: skip
    """Everything that the report says of a finished job, sealed.

    Args:
        people: what they read of the images set apart.
        links: what opens a view → its address.
        partial: of the prompts that are finished so far.
    """
    planned, plan = job.planned, job.planned.plan
    cells, reading = job.cells(partial=partial), Reading(job, people)
    rows = [row for cell in cells for row in _share_rows(reading, cell)]
    attributes = planned.attributes
    return AuditRecord(
        made_by=versions().partition(",")[0],
        date=plan.sign.date or job.date,
        plan=plan,
        plan_sha256=plan.digest,
        subjects=tuple(_subject(reading, i, cells) for i in range(len(planned.subjects))),
        verdicts=tuple(_verdicts(reading, cells, attributes)),
        shares=tuple(rows),
        distances=tuple(_distance(reading, cell, a) for cell in cells for a in attributes),
        changes=tuple(row for cell in cells if cell.edit for row in _changes(job, cell)),
        crossings=tuple(_crossings(job, cells, attributes)),
        side_by_side=tuple(_sides(reading, cells, attributes)),
        quality=tuple(_quality(job, cell) for cell in cells),
        agreement=people.agreement if people is not None else (),
        people={} if people is None else dict(people.facts),
        cells=tuple(_cell(job, cell) for cell in cells),
        provenance=_provenance(job),
        links=dict(links or {}),
        limits=limits(plan, planned.subjects, reading),
    ).sealed()


def _finite(value: float | None) -> float | None:
    """A number for JSON, to 9 digits: what is further behind depends on the machine alone."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")


def _edge(value: float) -> float:
    return float(f"{value:.9g}")


def _share_rows(reading: Reading, cell: Cell) -> list[ShareRow]:
    planned, plan = reading.job.planned, reading.plan
    subject, prompt = planned.subjects[cell.subject], planned.prompts[cell.prompt]
    looked = bool((cell.faces >= 0).any())
    found = []
    for attribute in subject.attributes:
        reference = reference_for(plan.against, prompt, attribute)
        for column, share in enumerate(reading.shares(cell, attribute)):
            gap, word = _gap(share, reference, column, plan)
            found.append(
                ShareRow(
                    subject=subject.name, prompt=prompt, edit=plan.conditions[cell.edit], attribute=attribute.name,
                    label=share.label, images=cell.measurement.n, count=share.count, decided=share.n,
                    undecided=share.n_uncertain, invalid=sum(cell.measurement.n_invalid.values()),
                    no_face=int((cell.faces == 0).sum()) if looked else None,
                    several_faces=int((cell.faces > 1).sum()) if looked else None,
                    share=_finite(share.raw), low=_edge(share.raw_interval[0]), high=_edge(share.raw_interval[1]),
                    corrected=_finite(share.corrected), corrected_low=_edge(share.corrected_interval[0]),
                    corrected_high=_edge(share.corrected_interval[1]),
                    reference=None if reference is None else _edge(reference.shares[column]),
                    against=name_of(plan.against) if reference is None else reference.name,
                    source="" if reference is None else reference.source,
                    difference=None if gap is None else _finite(share.corrected - reference.shares[column]),  # type: ignore[union-attr]
                    difference_low=None if gap is None else _finite(gap[0]),
                    difference_high=None if gap is None else _finite(gap[1]), word=word,
                )
            )  # fmt: skip
    return found


def _gap(share: Share, reference: Reference | None, column: int, plan: AuditPlan) -> tuple[Interval | None, Word]:
    if reference is None:
        return None, "no reference"
    known = None if reference.intervals is None else reference.intervals[column]
    if share.n == 0:
        return None, "can't tell"
    gap = difference(share.corrected, share.corrected_interval, reference.shares[column], known)
    return gap, word_of(*gap, plan.margin / 100) if share.n >= LEAST_TOLD else "can't tell"


def _verdicts(reading: Reading, cells: Sequence[Cell], attributes: Sequence[Attribute]) -> list[Verdict]:
    """One row per attribute, prompt and subject.

    Of two classes the first is shown; of more, the one whose unedited share is furthest from its reference. The word
    speaks of all classes: far where one is, near where all are.
    """
    planned, plan = reading.job.planned, reading.plan
    found = []
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.prompt, cell.subject), []).append(cell)
    for attribute in attributes:
        for (p, s), group in groups.items():
            prompt = planned.prompts[p]
            reference = reference_for(plan.against, prompt, attribute)
            column = _shown(reading.shares(group[0], attribute), reference)
            found.append(
                Verdict(
                    subject=planned.subjects[s].name, prompt=prompt, attribute=attribute.name,
                    label=attribute.classes[column],
                    reference=None if reference is None else _edge(reference.shares[column]),
                    against=name_of(plan.against) if reference is None else reference.name,
                    points=tuple(_point(reading, cell, attribute, reference, column) for cell in group),
                )
            )  # fmt: skip
    return found


def _shown(shares: Sequence[Share], reference: Reference | None) -> int:
    if len(shares) == 2 or reference is None or shares[0].n == 0:
        return 0
    return int(np.argmax([abs(s.corrected - r) for s, r in zip(shares, reference.shares, strict=True)]))


def _point(reading: Reading, cell: Cell, attribute: Attribute, reference: Reference | None, column: int) -> Point:
    shares = reading.shares(cell, attribute)
    words = [_gap(share, reference, i, reading.plan)[1] for i, share in enumerate(shares)]
    word: Word = words[0]
    if reference is not None:
        word = "far" if "far" in words else "near" if set(words) == {"near"} else "can't tell"
    far = next((share.label for share, own in zip(shares, words, strict=True) if own == "far"), "")
    share = shares[column]
    return Point(
        edit=reading.plan.conditions[cell.edit], share=_finite(share.corrected),
        low=_edge(share.corrected_interval[0]), high=_edge(share.corrected_interval[1]), n=share.n,
        undecided=share.n_uncertain, word=word, leading=far if len(shares) > 2 and words[column] != "far" else "",
    )  # fmt: skip


def _distance(reading: Reading, cell: Cell, attribute: Attribute) -> Distance:
    planned, plan = reading.job.planned, reading.plan
    prompt = planned.prompts[cell.prompt]
    reference = reference_for(plan.against, prompt, attribute)
    figures = cell.measurement.figures(attribute.name, None if reference is None else reference.shares)
    none = reference is None
    low, high = (0.0, 2**0.5) if none else figures.fd_interval
    return Distance(
        subject=planned.subjects[cell.subject].name, prompt=prompt, edit=plan.conditions[cell.edit],
        attribute=attribute.name, against=name_of(plan.against) if reference is None else reference.name,
        fd=None if none else _finite(figures.fd), low=_edge(low), high=_edge(high),
        floor=None if none else _finite(figures.fd_floor), n=figures.n,
    )  # fmt: skip


def _steered(spec: EditSpec | None, plan: AuditPlan, edit: int) -> tuple[str, ...]:
    own = plan.edits[edit - 1]
    if own.kind == "control":
        own = plan.edits[own.of]
    if spec is not None and spec.method is not None:
        return (spec.method.attribute,)
    if own.kind == "rewrite":
        return (own.attribute,)
    if spec is None:
        return ()
    return tuple(dict.fromkeys(i.features.attribute for i in spec.interventions))


def _changes(job: Job, cell: Cell) -> list[ChangeRow]:
    plan = job.planned.plan
    steered = _steered(cell.measurement.edit, plan, cell.edit)
    return [
        ChangeRow(
            subject=job.planned.subjects[cell.subject].name, prompt=job.planned.prompts[cell.prompt],
            edit=plan.conditions[cell.edit], attribute=c.attribute, label=c.label, before=_finite(c.before),
            after=_finite(c.after), difference=_finite(c.difference), low=_finite(c.interval[0]),
            high=_finite(c.interval[1]), n=c.n, steered=c.attribute in steered,
            control=plan.edits[cell.edit - 1].kind == "control",
        )
        for c in cell.measurement.changes
    ]  # fmt: skip


def _crossings(job: Job, cells: Sequence[Cell], attributes: Sequence[Attribute]) -> list[CrossRow]:
    """Every combination of classes of two or more of the attributes, of each prompt and of all together."""
    planned = job.planned
    chosen = [group for size in range(2, len(attributes) + 1) for group in itertools.combinations(attributes, size)]
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.subject, cell.edit), []).append(cell)
    found = []
    for (s, e), group in groups.items():
        shown = [group, *([cell] for cell in group)] if len(group) > 1 else [group]
        for members in shown:
            pooled = len(members) > 1
            prompt = None if pooled else planned.prompts[members[0].prompt]
            for crossed in chosen:
                found += _crossed(
                    job, members, crossed, subject=planned.subjects[s].name, edit=planned.plan.conditions[e],
                    pooled=pooled, prompt=prompt,
                )  # fmt: skip
    return found


def _crossed(
    job: Job, members: Sequence[Cell], crossed: Sequence[Attribute], *, subject: str, edit: str, pooled: bool,
    prompt: str | None,
) -> list[CrossRow]:  # fmt: skip
    counts = np.zeros([len(a.classes) for a in crossed], np.int64)
    for member in members:
        read = [member.measurement.readings[a.name] for a in crossed]
        sure = np.logical_and.reduce([r.certain for r in read])
        np.add.at(counts, tuple(r.labels[sure] for r in read), 1)
    total, rows = int(counts.sum()), []
    for place in np.ndindex(*counts.shape):
        k = int(counts[place])
        low, high = stats.share_interval(k, total) if total else (0.0, 1.0)
        rows.append(
            CrossRow(
                subject=subject, edit=edit, pooled=pooled, prompt=prompt, attributes=tuple(a.name for a in crossed),
                classes=tuple(a.classes[i] for a, i in zip(crossed, place, strict=True)), count=k, decided=total,
                share=_edge(k / total) if total else None, low=_edge(low), high=_edge(high),
                small=k < job.planned.plan.least,
            )
        )  # fmt: skip
    return rows


def _sides(reading: Reading, cells: Sequence[Cell], attributes: Sequence[Attribute]) -> list[SideRow]:
    planned = reading.job.planned
    plain = {(cell.prompt, cell.subject): cell for cell in cells if cell.edit == 0}
    found = []
    for attribute in attributes:
        for p, prompt in enumerate(planned.prompts):
            for a, b in itertools.combinations(range(len(planned.subjects)), 2):
                if (p, a) not in plain or (p, b) not in plain:
                    continue
                pairs = zip(reading.shares(plain[p, a], attribute), reading.shares(plain[p, b], attribute), strict=True)
                for first, second in pairs:
                    known = first.n > 0 and second.n > 0
                    gap = difference(
                        second.corrected, second.corrected_interval, first.corrected, first.corrected_interval
                    ) if known else None  # fmt: skip
                    found.append(
                        SideRow(
                            prompt=prompt, attribute=attribute.name, label=first.label,
                            first=planned.subjects[a].name, second=planned.subjects[b].name,
                            difference=_finite(second.corrected - first.corrected) if known else None,
                            low=None if gap is None else _finite(gap[0]),
                            high=None if gap is None else _finite(gap[1]),
                        )
                    )  # fmt: skip
    return found


def _quality(job: Job, cell: Cell) -> QualityRecord:
    plan, one = job.planned.plan, cell.measurement
    kept = None
    if cell.edit:
        steered = _steered(one.edit, plan, cell.edit)
        others = [value for name, value in one.agreement.items() if name not in steered]
        kept = _finite(float(np.mean(others))) if others else None
    return QualityRecord(
        subject=job.planned.subjects[cell.subject].name, prompt=job.planned.prompts[cell.prompt],
        edit=plan.conditions[cell.edit], n=one.n, invalid=sum(one.n_invalid.values()),
        faults={str(k): v for k, v in count_faults(one.faults).items()}, kept=kept, frechet=_rounded(one.frechet),
        activation_ratio=_edge(one.activation_ratio),
    )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    """A Fréchet distance to 6 digits: its eigenvalues differ further behind from machine to machine."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def codes(one: Measurement, attribute: str) -> np.ndarray:
    """Class index per image ``int [n]``; -1 undecided, -2 shows nobody."""
    read = one.readings[attribute]
    found = np.where(read.certain, read.labels, UNDECIDED)
    bad = np.array([fault is not None for fault in one.faults or (None,) * one.n], bool)
    return np.where(bad, NOBODY, found)


def _cell(job: Job, cell: Cell) -> CellRecord:
    subject, prompt = job.planned.subjects[cell.subject], job.planned.prompts[cell.prompt]
    seeds = cell.measurement.request.seeds
    return CellRecord(
        subject=subject.name, prompt=prompt, edit=job.planned.plan.conditions[cell.edit], seeds=seeds,
        readings={a.name: tuple(codes(cell.measurement, a.name).tolist()) for a in subject.attributes},
        faces=tuple(cell.faces.tolist()) if (cell.faces >= 0).any() else None,
        pixels=tuple(bytes(row).hex() for row in cell.pixels), tiny=base64.b64encode(cell.tiny.tobytes()).decode(),
        files=tuple(subject.file(prompt, seed) for seed in seeds) if isinstance(subject, Pictures) else (),
    )  # fmt: skip


def _subject(reading: Reading, number: int, cells: Sequence[Cell]) -> SubjectRecord:
    subject = reading.job.planned.subjects[number]
    error = {}
    for attribute in subject.attributes:
        table, source = reading.confusion(subject, attribute)
        counts = tuple(tuple(int(n) for n in row) for row in np.asarray(table))
        error[attribute.name] = ErrorRecord(source=source, counts=counts)  # type: ignore[arg-type]
    return SubjectRecord(
        name=subject.name,
        kind="lens" if subject.lens is not None else "model" if subject.can_draw else "images",
        attributes={a.name: a.classes for a in subject.attributes},
        judge=subject.judge.classifier_id,
        error=error,
        facts=subject.facts(),
        said=tuple(dict.fromkeys(text for cell in cells if cell.subject == number for text in cell.said)),
    )


def _provenance(job: Job) -> dict[str, str]:
    plan = job.planned.plan
    size = plan.size
    n = f"{size.images} per prompt" if size.until is None else f"until ± {size.until:g} points, at most {size.most}"
    device = next((str(s.lens.device) for s in job.planned.subjects if s.lens is not None), "cpu")
    return {
        "Plan": f"sha256 {plan.digest}, frozen {job.date} before the first image",
        "Images": f"{n}, seeds from {size.first_seed} up, {size.batch_size} at once; the same for every condition",
        "Edits": "; ".join(f"{edit.name} ({edit.pin})" for edit in plan.edits) or "none",
        "Software": versions(),
        "Hardware": hardware(device),
        "Command": COMMAND,
    }


def limits(plan: AuditPlan, subjects: Sequence[Subject], reading: Reading) -> tuple[str, ...]:
    """What the numbers do not show; the first three stand on page one."""
    assumed = sorted({
        a.name for s in subjects for a in s.attributes
        if a.name in plan.attributes and reading.confusion(s, a)[1] == "assumed"
    })  # fmt: skip
    error = (
        f"The judge's error on {' and '.join(assumed)} was assumed to be none: it was not measured, so that shares may "
        "be further off than their intervals say."
        if assumed
        else "Shares are corrected for the judge's error as measured on labelled images; it may err otherwise on these."
    )
    sequence = (
        "Drawing stopped when intervals were narrow enough; they hold however often one looks. The corrected ones are "
        "widened as the raw ones are (our working form)."
        if plan.size.until is not None
        else "Each interval holds at 95 % by itself: of twenty, about one misses by chance."
    )
    return (
        "A judge read how pictures look. That says nothing about who anybody is, and its classes are few.",
        error,
        "Intervals speak of more seeds of the same prompts, not of other prompts, models or samplers.",
        "Shares are of decided images; undecided ones, and images that show nobody, are counted beside them.",
        sequence,
        f"Shares are compared with {name_of(plan.against)}. Which distribution is right is a choice for people, not a "
        "measurement.",
    )


def steers(job: Job, edit: int) -> tuple[str, ...]:
    """The attributes that an edit (from 1) is to move."""
    for s in range(len(job.planned.subjects)):
        if edit in job.edits_of(s):
            made = job.edit(s, edit)
            return _steered(None if made is None else made.spec, job.planned.plan, edit)
    raise LensError(f"No subject takes edit {edit}.")


__all__ = ["codes", "difference", "limits", "metrics", "record_of", "word_of"]
