"""Whether an audit's JSON still says what was measured: its seals, its numbers, and a sample drawn again."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, Generation, LensError
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.results import stats
from diffusion_lens.results.sequential import images_for, sequence_interval
from diffusion_lens.studies.audit.conditions import make_edit
from diffusion_lens.studies.audit.engine import TINY, mean_colours, pixel_digest
from diffusion_lens.studies.audit.figures import codes
from diffusion_lens.studies.audit.freeze import Planned, freeze, prompts_of
from diffusion_lens.studies.audit.record import AuditRecord, CellRecord, content_digest

CLOSE = 1e-6
"""How far a share may be from what the readings give: rounding alone."""

SAMPLE = 12
"""Images drawn again, unless told otherwise."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it holds, and what was found."""

    what: str
    holds: bool
    found: str


@dataclass(frozen=True)
class Verified:
    """All checks of a record."""

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether all of them hold."""
        return all(check.holds for check in self.checks)

    @property
    def summary(self) -> str:
        """One sentence."""
        failed = [check.what for check in self.checks if not check.holds]
        if not failed:
            return f"Verified: {len(self.checks)} of {len(self.checks)} checks hold."
        return f"NOT verified: {', '.join(failed)} do{'es' if len(failed) == 1 else ''} not hold."


def verify(
    record: AuditRecord,
    folder: Path,
    *,
    options: RunOptions | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verified:
    """Check seals and numbers, then draw a sample again and compare pixels and readings.

    Args:
        folder: where files lie that the plan names. sample: images drawn again, chosen by ``seed``; 0 for none.

    Raises:
        LensError: what the plan names cannot be opened, or is no longer what was audited.
    """
    checks = [*check_seals(record), *check_numbers(record)]
    if sample and all(check.holds for check in checks):
        planned = freeze(record.plan, folder, options or RunOptions())
        checks += _redraw(record, planned, sample, seed, progress or Progress())
    elif sample:
        checks.append(Check("images drawn again", False, "not drawn: the record contradicts itself"))
    return Verified(tuple(checks))


def check_seals(record: AuditRecord) -> list[Check]:
    """The plan's digest, the content's digest, and that every seed is one of the plan's."""
    content = content_digest(record.plain())
    return [
        Check("plan's hash", record.plan.digest == record.plan_sha256, f"{record.plan.digest[:12]} of the plan"),
        Check("content's hash", content == record.content_sha256, f"{content[:12]} of the content"),
        _seeds(record),
    ]


def _seeds(record: AuditRecord) -> Check:
    plan, prompts = record.plan, set(prompts_of(record.plan))
    drawn = {s.name for s in record.subjects if s.kind != "images"}
    first = plan.size.first_seed
    for cell in record.cells:
        n = len(cell.seeds)
        expected = tuple(range(first, first + n)) if cell.subject in drawn else cell.seeds
        most = plan.size.most if plan.size.images is None else plan.size.images
        whole = n == most or cell.subject not in drawn or plan.size.until is not None
        lengths = {n, *(len(read) for read in cell.readings.values()), len(cell.pixels)}
        if cell.seeds != expected or len(lengths) != 1 or not whole or cell.prompt not in prompts:
            return Check("seeds", False, f"those of '{cell.prompt or ''}', {cell.edit}, are not the plan's")
    total = sum(len(cell.seeds) for cell in record.cells)
    return Check("seeds", True, f"{total:,} images in {len(record.cells)} conditions are the plan's")


def check_numbers(record: AuditRecord) -> list[Check]:
    """Whether counts, shares and their corrections are those of the readings, and words those of the shares."""
    cells = {(c.subject, c.prompt, c.edit): c for c in record.cells}
    subjects = {s.name: s for s in record.subjects}
    until = record.plan.size.until
    wrong: list[str] = []
    for row in record.shares:
        cell = cells.get((row.subject, row.prompt, row.edit))
        if cell is None or row.attribute not in cell.readings:
            wrong.append(f"{row.attribute} {row.label} of a condition that was not measured")
            continue
        classes = subjects[row.subject].attributes[row.attribute]
        read = np.asarray(cell.readings[row.attribute])
        counts = np.array([(read == i).sum() for i in range(len(classes))])
        column, n = classes.index(row.label), int(counts.sum())
        same = (row.count, row.decided, row.undecided) == (int(counts[column]), n, len(read) - n)
        if n and same:
            error = np.asarray(subjects[row.subject].error[row.attribute].counts)
            share = stats.shares(counts, len(read) - n, Attribute(row.attribute, tuple(classes)), error)[column]
            low, high = share.raw_interval
            if until is not None:
                wide = sequence_interval(share.count, n, made_for=images_for(until / 100))
                low, high = min(low, wide[0]), max(high, wide[1])
            pairs = [(row.share, share.raw), (row.corrected, share.corrected), (row.low, low), (row.high, high)]
            if until is None:
                own = zip((row.corrected_low, row.corrected_high), share.corrected_interval, strict=True)
                pairs += list(own)
            if row.reference is not None:
                pairs.append((row.difference, share.corrected - row.reference))
            same = all(told is not None and abs(told - value) <= CLOSE for told, value in pairs)
        if not same:
            wrong.append(f"{row.attribute} {row.label} under '{row.prompt or ''}', {row.edit}")
    found = f"{len(record.shares):,} shares follow from the readings" if not wrong else f"wrong: {wrong[0]}"
    return [Check("shares", not wrong, found), _verdicts(record)]


def _verdicts(record: AuditRecord) -> Check:
    rows = {(r.subject, r.prompt, r.edit, r.attribute, r.label): r for r in record.shares}
    for verdict in record.verdicts:
        for point in verdict.points:
            row = rows.get((verdict.subject, verdict.prompt, point.edit, verdict.attribute, verdict.label))
            mine = (point.share, point.low, point.high, point.n)
            if row is None or mine != (row.corrected, row.corrected_low, row.corrected_high, row.decided):
                return Check("page one", False, f"'{verdict.prompt or ''}', {point.edit}, is not what was measured")
            words = {r.word for key, r in rows.items() if key[:4] == (row.subject, row.prompt, row.edit, row.attribute)}
            word = "far" if "far" in words else row.word if len(words) == 1 else "can't tell"
            if point.word != word:
                return Check("page one", False, f"the word for '{verdict.prompt or ''}', {point.edit}")
    return Check("page one", True, f"{len(record.verdicts)} rows are what was measured")


def _redraw(record: AuditRecord, planned: Planned, sample: int, seed: int, progress: Progress) -> list[Check]:
    every = [(i, row) for i, cell in enumerate(record.cells) for row in range(len(cell.seeds))]
    chosen = np.random.default_rng(seed).permutation(len(every))[:sample]
    groups: dict[int, list[int]] = {}
    for i in chosen:
        place, row = every[int(i)]
        groups.setdefault(place, []).append(row)
    same = near = read = asked = 0
    worst, firsts = 0.0, list[str]()
    for (index, rows), bar in zip(sorted(groups.items()), progress.parts(len(groups)), strict=True):
        cell = record.cells[index]
        for row, (digest, tiny, reading) in zip(sorted(rows), _again(planned, cell, sorted(rows), bar), strict=True):
            kept = np.frombuffer(base64.b64decode(cell.tiny), np.uint8).reshape(-1, TINY, TINY, 3)[row]
            off = float(np.abs(tiny.astype(int) - kept.astype(int)).max())
            worst = max(worst, off)
            same += digest == cell.pixels[row]
            near += off <= record.tolerance["pixels"]
            if off > record.tolerance["pixels"]:
                firsts.append(f"seed {cell.seeds[row]} of '{cell.prompt or ''}', {cell.edit}")
            for name, code in reading.items():
                asked += 1
                read += code == cell.readings[name][row]
    n = len(chosen)
    told = f"{same} of {n} alike to the last bit, {near} within {record.tolerance['pixels']:g} levels of 255"
    return [
        Check("pixels", near == n, told + (f"; {firsts[0]} is not" if firsts else f"; furthest {worst:g}")),
        Check(
            "readings", read >= (1 - record.tolerance["readings"]) * asked, f"{read} of {asked} readings are the same"
        ),
    ]


def _again(
    planned: Planned, cell: CellRecord, rows: Sequence[int], progress: Progress
) -> list[tuple[str, np.ndarray, dict[str, int]]]:
    """Digest, mean colours and readings of some images of a cell, drawn in the batches that they were drawn in."""
    plan = planned.plan
    number = next(i for i, s in enumerate(planned.subjects) if s.name == cell.subject)
    subject, edit = planned.subjects[number], plan.conditions.index(cell.edit)
    made = None if edit == 0 else make_edit(plan.edits, edit - 1, subject, planned.folder)
    size, found = plan.size.batch_size, {}
    batches = sorted({row // size for row in rows})
    for batch, bar in zip(batches, progress.parts(len(batches)), strict=True):
        seeds = cell.seeds[batch * size : (batch + 1) * size]
        images: list[np.ndarray] = []

        def keep(part: Generation, into: list[np.ndarray] = images) -> None:
            into.extend(part.images)

        measured, _, _ = subject.measure(
            cell.prompt, seeds, made, batch_size=size, progress=bar, on_batch=keep
        )  # fmt: skip
        read = {name: codes(measured, name) for name in cell.readings}
        for place, image in enumerate(images):
            values = {name: int(own[place]) for name, own in read.items()}
            found[batch * size + place] = (bytes(pixel_digest(image)).hex(), mean_colours(image), values)
    missing = [row for row in rows if row not in found]
    if missing:
        raise LensError(f"Image {missing[0]} of '{cell.prompt or ''}' cannot be had again.")
    return [found[row] for row in rows]
