"""People who read: images set apart and shown blind, their answers, how far they agree with each other and the judge.

Disagreement is counted and shown, not averaged away; the judge's error is measured against the majority.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_lens.base.files import atomic_path
from diffusion_lens.base.text import as_csv, read_table
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.results import stats
from diffusion_lens.results.kappa import cohen_kappa, fleiss_kappa
from diffusion_lens.studies.audit.engine import Cell, Job
from diffusion_lens.studies.audit.record import Agreement

BLIND = "blind"
LABELS = "labels"
UNSURE = "can't say"
"""An answer that decides nothing; so does an empty cell."""

JUDGE = "the judge"


@dataclass(frozen=True)
class Answers:
    """What people said: rater → attribute → image number → class index, or -1 for "can't say"."""

    given: Mapping[str, Mapping[str, Mapping[int, int]]]
    digest: str

    @property
    def raters(self) -> tuple[str, ...]:
        """Who answered, sorted."""
        return tuple(sorted(self.given))


@dataclass(frozen=True, eq=False)
class People:
    """Answers beside what the judge read in the same images.

    Attributes:
        agreement: between people, and of their majority with the judge.
        errors: (classifier id, attribute) → counts ``[majority, read]`` of images that both decided.
        facts: who, how many images, and the digest of their answers.
    """

    agreement: tuple[Agreement, ...]
    errors: Mapping[tuple[str, str], np.ndarray]
    facts: Mapping[str, str]

    def confusion(self, classifier_id: str, attribute: Attribute) -> np.ndarray | None:
        """The judge's error by people's majority; ``None`` with too few images, or where it cannot be corrected for."""
        table = self.errors.get((classifier_id, attribute.name))
        if table is None:
            return None
        try:
            stats.error_rates(table)
        except LensError:
            return None
        return table


def image_name(number: int) -> str:
    """The file of a blind image."""
    return f"{number:05d}.png"


def blind_images(job: Job, cells: Sequence[Cell] | None = None) -> dict[int, bytes]:
    """Number → PNG of the images set apart, in the order in which they are shown; only those that are drawn."""
    by_key = {(c.subject, c.prompt, c.edit): c for c in (job.cells(partial=True) if cells is None else cells)}
    found = {}
    for number, (key, row) in enumerate(job.blind):
        if key in by_key and row in by_key[key].full:
            found[number] = by_key[key].full[row]
    return found


def write_sheet(job: Job, attributes: Sequence[Attribute]) -> Path:
    """Write the images set apart and a table with empty cells into ``blind/``; filled tables are left alone.

    Nothing there tells a condition: images are numbered in a seeded order over all of them.
    """
    folder = job.folder / BLIND
    images = blind_images(job)
    if not images:
        raise LensError("No image was set apart for people; plan some (readers.blind).")
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in images.items():
        with atomic_path(folder / image_name(number)) as partial:
            partial.write_bytes(data)
    path = folder / f"{LABELS}.csv"
    if not path.is_file():
        columns = ["file", "rater", *(a.name for a in attributes)]
        rows = [[image_name(number), "", *("" for _ in attributes)] for number in images]
        with atomic_path(path) as partial:
            partial.write_text(as_csv(columns, rows), encoding="utf-8")
    return path


def save_answers(
    job: Job, rater: str, answers: Mapping[int, Mapping[str, str]], attributes: Sequence[Attribute]
) -> Path:
    """Write one person's answers: image number → attribute → class, or ``UNSURE``."""
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in rater.strip())[:60] or "1"
    path = job.folder / BLIND / f"{LABELS}-{safe}.csv"
    rows = [
        [image_name(number), rater, *(own.get(a.name, "") for a in attributes)]
        for number, own in sorted(answers.items())
        if any(own.values())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        partial.write_text(as_csv(["file", "rater", *(a.name for a in attributes)], rows), encoding="utf-8")
    return path


def read_answers(paths: Sequence[Path], attributes: Sequence[Attribute], n: int) -> Answers | None:
    """What is in some tables of labels; ``None`` where nobody answered anything.

    A column ``rater`` tells people apart; without it, the first row of a file is the first person's, and so on.

    Raises:
        LensError: names the line of an unknown class, an image that was not set apart, or a second answer.
    """
    given: dict[str, dict[str, dict[int, int]]] = {}
    digest = hashlib.sha256()
    numbers = {image_name(i): i for i in range(n)}
    for path in sorted(paths):
        table = read_table(path)
        read = [a for a in attributes if a.name in table.columns]
        if "file" not in table.columns or not read:
            names = ", ".join(a.name for a in attributes)
            raise LensError(f"{path.name} needs a column 'file' and at least one of: {names}.")
        times: dict[str, int] = {}
        for row in table.rows:
            where, file = f"{path.name}, line {row.line}", Path(row.cells["file"].replace("\\", "/")).name
            if not any(row.cells[a.name] for a in read):
                continue
            if file not in numbers:
                raise LensError(f"{where}: '{file}' is none of the {n} images set apart; use the names of the sheet.")
            times[file] = times.get(file, 0) + 1
            rater = row.cells.get("rater", "") or f"{path.stem.removeprefix(LABELS).strip('-') or 'person'}"
            if not row.cells.get("rater", "") and times[file] > 1:
                rater = f"{rater} {times[file]}"
            for a in read:
                label = row.cells[a.name]
                if not label:
                    continue
                if label != UNSURE and label not in a.classes:
                    choices = ", ".join(a.classes)
                    raise LensError(f"{where}: '{label}' is no {a.name}; use one of {choices}, or {UNSURE}.")
                own = given.setdefault(rater, {}).setdefault(a.name, {})
                if numbers[file] in own:
                    raise LensError(f"{where}: {rater} has answered for {file} already; keep one row.")
                own[numbers[file]] = -1 if label == UNSURE else a.index(label)
                digest.update(f"{rater}\0{file}\0{a.name}\0{label}\n".encode())
    return Answers(given, digest.hexdigest()[:16]) if given else None


def label_files(job: Job, more: Sequence[Path] = ()) -> list[Path]:
    """The tables of labels that lie in the audit's folder, and ``more``."""
    return sorted({*(job.folder / BLIND).glob(f"{LABELS}*.csv"), *more})


def people_of(job: Job, more: Sequence[Path] = (), cells: Sequence[Cell] | None = None) -> People | None:
    """What people read of this job's images set apart; ``None`` where nobody has."""
    every = {a.name: a for subject in job.planned.subjects for a in subject.attributes}
    answers = read_answers(label_files(job, more), tuple(every.values()), len(job.blind))
    if answers is None:
        return None
    by_key = {(c.subject, c.prompt, c.edit): c for c in (job.cells(partial=True) if cells is None else cells)}
    judged: dict[str, dict[int, int]] = {name: {} for name in every}
    judges: dict[int, str] = {}
    for number, (key, row) in enumerate(job.blind):
        cell = by_key.get(key)
        if cell is not None:
            judges[number] = cell.measurement.classifier_id
            for name, read in cell.measurement.readings.items():
                judged[name][number] = int(read.labels[row]) if read.certain[row] else -1
    return compare(answers, tuple(every.values()), judged, judges)


def compare(
    answers: Answers,
    attributes: Sequence[Attribute],
    judged: Mapping[str, Mapping[int, int]],
    judges: Mapping[int, str],
) -> People:
    """Agreement of people with each other and with the judge.

    Args:
        judged: attribute → image number → the judge's class index, -1 undecided. judges: number → classifier id.
    """
    rows: list[Agreement] = []
    errors: dict[tuple[str, str], np.ndarray] = {}
    for attribute in attributes:
        k = len(attribute.classes)
        own = {rater: answers.given[rater].get(attribute.name, {}) for rater in answers.raters}
        own = {rater: given for rater, given in own.items() if given}
        if not own:
            continue
        for a, b in itertools.combinations(sorted(own), 2):
            rows.append(_cohen(attribute, (a, b), own[a], own[b]))
        if len(own) > 2:
            rows.append(_fleiss(attribute, own))
        majority = _majority(own, k)
        rows.append(_cohen(attribute, (_people(own), JUDGE), majority, judged[attribute.name]))
        for judge in sorted(set(judges.values())):
            table = np.zeros((k, k), np.int64)
            for number, true in majority.items():
                if judges.get(number) == judge and true >= 0 and judged[attribute.name].get(number, -1) >= 0:
                    table[true, judged[attribute.name][number]] += 1
            errors[judge, attribute.name] = table
    n = len({number for given in answers.given.values() for one in given.values() for number in one})
    facts = {"raters": ", ".join(answers.raters), "images": str(n), "answers": answers.digest}
    return People(tuple(rows), errors, facts)


def _people(own: Mapping[str, Mapping[int, int]]) -> str:
    return next(iter(own)) if len(own) == 1 else f"the majority of {len(own)} people"


def _majority(own: Mapping[str, Mapping[int, int]], k: int) -> dict[int, int]:
    """Number → the class that most named; -1 for a tie, or where nobody could say."""
    found = {}
    for number in sorted({number for given in own.values() for number in given}):
        votes = np.bincount([given[number] for given in own.values() if given.get(number, -1) >= 0], minlength=k)
        top = np.flatnonzero((votes == votes.max()) & (votes > 0))
        found[number] = int(top[0]) if len(top) == 1 else -1
    return found


def _cohen(
    attribute: Attribute, readers: tuple[str, str], first: Mapping[int, int], second: Mapping[int, int]
) -> Agreement:
    both = sorted(set(first) & set(second))
    table = np.zeros((len(attribute.classes),) * 2, np.int64)
    for number in both:
        if first[number] >= 0 and second[number] >= 0:
            table[first[number], second[number]] += 1
    n = int(table.sum())
    found = cohen_kappa(table) if n else None
    return _agreement(attribute, "Cohen", readers, found, n, n - int(np.trace(table)), len(both) - n)


def _fleiss(attribute: Attribute, own: Mapping[str, Mapping[int, int]]) -> Agreement:
    """Of the images that all of them decided."""
    both = sorted(set.intersection(*(set(given) for given in own.values())))
    counts = [
        np.bincount([given[number] for given in own.values()], minlength=len(attribute.classes))
        for number in both
        if all(given[number] >= 0 for given in own.values())
    ]
    found = fleiss_kappa(np.array(counts)) if counts else None
    differ = sum(int((row > 0).sum() > 1) for row in counts)
    return _agreement(attribute, "Fleiss", tuple(sorted(own)), found, len(counts), differ, len(both) - len(counts))


def _agreement(
    attribute: Attribute, kind: str, readers: tuple[str, ...], found: stats.Estimate | None, n: int, differ: int,
    undecided: int,
) -> Agreement:  # fmt: skip
    defined = found is not None and np.isfinite(found.value)
    return Agreement(
        attribute=attribute.name, kind=kind, readers=readers,  # type: ignore[arg-type]
        kappa=float(f"{found.value:.6g}") if defined and found else None,
        low=float(f"{found.interval[0]:.6g}") if defined and found else None,
        high=float(f"{found.interval[1]:.6g}") if defined and found else None,
        n=n, differ=differ, undecided=undecided,
    )  # fmt: skip
