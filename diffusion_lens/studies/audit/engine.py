"""How an audit runs: in pieces of one prompt, one edit and a few seeds, which any number of processes share.

Every piece is written once, whole, under its name; whoever works on one holds a lock that the system lets go of when
the process ends, so that the next run takes up what a killed one left. What is measured depends on the pieces alone,
never on who made them.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_lens.base.files import read_json
from diffusion_lens.base.processes import ALONE, Processes
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import FAULTS, Attribute, Fault, Generation, LensError, Predictions
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.measuring.observe import join_predictions
from diffusion_lens.model.denoise import Edit
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.sequential import narrow_enough
from diffusion_lens.studies.audit.conditions import applies, make_edit
from diffusion_lens.studies.audit.freeze import Planned

PLAN = "plan.json"
BEGAN = "began"
BATCHES = 2
"""Batches in a piece: small enough to share, large enough not to be lost in files."""

SHOWN = 16
"""Images of each prompt and edit that the report shows."""

THUMB = 96
LABEL_SIDE = 768
"""Longest sides in pixels of images in the report, and of those kept for people to label."""

TINY = 4
"""Side of the grid of mean colours that is kept of every image, to compare redrawn ones with."""

MAX_FEATURES = 2048
"""Most numbers of an image's features by the judge that are kept, for a distance between sets of images."""

WAIT = 0.2
"""Seconds between looks at what other processes have finished."""

EDITED = (
    "The plan has changed since this audit began in {folder} on {date}: restore it, or give another folder with --out, "
    "so that what was planned stays apart from what was thought of afterwards."
)

Blocks = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Unit:
    """One piece: indices of subject, prompt, edit (0: unedited) and block."""

    subject: int
    prompt: int
    edit: int
    block: int

    @property
    def key(self) -> str:
        """The piece's name."""
        return f"s{self.subject}-p{self.prompt}-e{self.edit}-b{self.block}"


@dataclass(frozen=True, eq=False)
class Cell:
    """Everything read of one subject under one prompt with one edit (0: none).

    Attributes:
        measurement: against the unedited images of the same seeds, where this is an edit.
        faces: found per image, -1 where nobody looked ``[n]``.
        pixels: first 8 bytes of a sha256 over each image ``uint8 [n, 8]``. tiny: its mean colours ``[n, 4, 4, 3]``.
        thumbs: the first images, small, as WebP. full: row → image as PNG, for people to label.
        said: sentences on single files.
    """

    subject: int
    prompt: int
    edit: int
    measurement: Measurement
    faces: np.ndarray
    pixels: np.ndarray
    tiny: np.ndarray
    thumbs: tuple[bytes, ...]
    full: dict[int, bytes]
    said: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """A frozen plan and the folder that its pieces lie in."""

    planned: Planned
    folder: Path
    _edits: dict[tuple[int, int], Edit] = field(default_factory=dict, repr=False)

    @property
    def work(self) -> Workspace:
        """Where the pieces lie."""
        return Workspace(self.folder / "work")

    def begin(self) -> None:
        """Write down the plan, once; raises ``LensError`` where another one began here."""
        plan = self.planned.plan
        path = self.folder / PLAN
        now = datetime.now(timezone.utc)
        own = {"digest": plan.digest, "date": now.date().isoformat()}
        kept = self.work.values(BEGAN, lambda: own)
        if kept["digest"] != plan.digest:
            raise LensError(EDITED.format(folder=self.folder, date=kept["date"]))
        if not path.is_file() or read_json(path) != plan.plain():
            plan.write(path)  # who signs may be written later

    @property
    def date(self) -> str:
        """The day on which the plan was frozen, before the first image."""
        return str(read_json(self.work.path(f"{BEGAN}.json"))["date"])

    @cached_property
    def seeds(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(subject, prompt) → seeds in order."""
        size = self.planned.plan.size
        n = size.most if size.images is None else size.images
        wanted = range(size.first_seed, size.first_seed + n)
        return {
            (s, p): subject.seeds(prompt, wanted)
            for s, subject in enumerate(self.planned.subjects)
            for p, prompt in enumerate(self.planned.prompts)
        }

    def block_seeds(self, unit: Unit) -> tuple[int, ...]:
        """The seeds of a piece."""
        size = BATCHES * self.planned.plan.size.batch_size
        return self.seeds[unit.subject, unit.prompt][unit.block * size : (unit.block + 1) * size]

    def n_blocks(self, subject: int, prompt: int) -> int:
        """Pieces of a prompt, of each edit."""
        return -(-len(self.seeds[subject, prompt]) // (BATCHES * self.planned.plan.size.batch_size))

    def edits_of(self, subject: int) -> tuple[int, ...]:
        """The edits that a subject can take, 0 first."""
        plan = self.planned.plan
        mine = self.planned.subjects[subject]
        return (0, *(i for i, edit in enumerate(plan.edits, 1) if applies(edit, mine)))

    @cached_property
    def every(self) -> tuple[Unit, ...]:
        """All pieces that there may be, prompt by prompt."""
        return tuple(
            Unit(s, p, e, b)
            for p in range(len(self.planned.prompts))
            for s in range(len(self.planned.subjects))
            for b in range(self.n_blocks(s, p))
            for e in self.edits_of(s)
        )

    def wanted(self) -> list[Unit]:
        """The pieces that are needed, as far as is known from those that are there."""
        if self.planned.plan.size.until is None:
            return list(self.every)
        found = []
        for p in range(len(self.planned.prompts)):
            for s in range(len(self.planned.subjects)):
                found += [Unit(s, p, e, b) for b in range(self.blocks_so_far(s, p)) for e in self.edits_of(s)]
        return found

    def blocks_so_far(self, subject: int, prompt: int) -> int:
        """Blocks of a prompt that are needed: up to the one after which every share is known well enough.

        Looks after each block, in order, so that every process stops at the same one.
        """
        last = self.n_blocks(subject, prompt)
        for block in range(last):
            units = [Unit(subject, prompt, e, block) for e in self.edits_of(subject)]
            if not all(self.done(unit) for unit in units):
                return block + 1
            if self._narrow(subject, prompt, block + 1):
                return block + 1
        return last

    def _narrow(self, subject: int, prompt: int, blocks: int) -> bool:
        until = self.planned.plan.size.until
        assert until is not None
        for e in self.edits_of(subject):
            parts = [self.load(Unit(subject, prompt, e, b)) for b in range(blocks)]
            for attribute in self.planned.attributes:
                counts = sum(
                    np.bincount(p[f"probs {attribute.name}"].argmax(1)[p[f"certain {attribute.name}"].astype(bool)],
                                minlength=len(attribute.classes))
                    for p in parts
                )  # fmt: skip
                counts = np.asarray(counts)
                n = int(counts.sum())
                if not all(narrow_enough(int(k), n, until / 100) for k in counts):
                    return False
        return True

    def done(self, unit: Unit) -> bool:
        """Whether a piece is there."""
        return self.work.has(f"{unit.key}.safetensors")

    def load(self, unit: Unit) -> dict[str, np.ndarray]:
        """A finished piece; raises ``LensError`` where it is not there."""

        def missing() -> dict[str, np.ndarray]:
            raise LensError(f"The piece {unit.key} is missing from {self.work.folder}; run the audit again.")

        return self.work.tensors(unit.key, missing)

    @contextmanager
    def claim(self, unit: Unit) -> Iterator[bool]:
        """Whether this process may make a piece; the claim ends with the block, or with the process."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.work.folder / "claims" / f"{unit.key}.lock")
        lock_folder = self.work.folder / "claims"
        lock_folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def make(self, unit: Unit, progress: Progress) -> None:
        """Draw and read one piece, and keep it."""
        self.work.tensors(unit.key, lambda: self._measure(unit, progress))

    def edit(self, subject: int, number: int) -> Edit | None:
        """The edit of a subject, made once; ``None`` for 0."""
        if number == 0:
            return None
        if (subject, number) not in self._edits:
            planned = self.planned
            self._edits[subject, number] = make_edit(
                planned.plan.edits, number - 1, planned.subjects[subject], planned.folder
            )
        return self._edits[subject, number]

    def _measure(self, unit: Unit, progress: Progress) -> dict[str, np.ndarray]:
        subject = self.planned.subjects[unit.subject]
        prompt, seeds = self.planned.prompts[unit.prompt], self.block_seeds(unit)
        first = unit.block * BATCHES * self.planned.plan.size.batch_size
        taking = _Taking(first, {row for key, row in self.blind if key == (unit.subject, unit.prompt, unit.edit)})
        found, faces, said = subject.measure(
            prompt, seeds, self.edit(unit.subject, unit.edit), batch_size=self.planned.plan.size.batch_size,
            progress=progress, on_batch=taking.take,
        )  # fmt: skip
        if found.features is not None and found.features.shape[1] <= MAX_FEATURES:
            taking.files["features"] = found.features.astype(np.float32)
        faults = found.faults or (None,) * len(seeds)
        arrays: dict[str, np.ndarray] = {
            "faults": np.array([0 if f is None else 1 + FAULTS.index(f) for f in faults], np.uint8),
            "faces": faces.astype(np.int8),
            "ratio": np.array([found.activation_ratio], np.float64),
            "said": np.frombuffer(json.dumps(said).encode(), np.uint8),
            **taking.arrays(),
        }
        for name, read in found.readings.items():
            arrays[f"probs {name}"] = read.probs.astype(np.float32)
            arrays[f"certain {name}"] = read.certain.astype(np.uint8)
        return arrays

    @cached_property
    def blind(self) -> tuple[tuple[tuple[int, int, int], int], ...]:
        """The images set apart for people, in the order in which they are shown: ((subject, prompt, edit), row).

        Drawn by the plan's seed over all conditions; where drawing may stop early, from what is drawn for sure.
        """
        plan = self.planned.plan
        first = BATCHES * plan.size.batch_size
        every = [
            ((s, p, e), row)
            for (s, p), seeds in self.seeds.items()
            for e in self.edits_of(s)
            for row in range(len(seeds) if plan.size.until is None else min(first, len(seeds)))
        ]
        order = np.random.default_rng(plan.readers.seed).permutation(len(every))
        return tuple(every[i] for i in order[: plan.readers.blind])

    def cells(self, *, partial: bool = False) -> tuple[Cell, ...]:
        """Everything measured, prompt by prompt; ``partial``: only what is finished, for a first look."""
        found = []
        for p in range(len(self.planned.prompts)):
            for s in range(len(self.planned.subjects)):
                until = self.planned.plan.size.until
                blocks = self.n_blocks(s, p) if until is None else self.blocks_so_far(s, p)
                if not blocks or (partial and not self._prompt_done(s, p, blocks)):
                    continue
                base: Measurement | None = None
                for e in self.edits_of(s):
                    cell = self._cell(s, p, e, blocks, base)
                    base = base or cell.measurement
                    found.append(cell)
        return tuple(found)

    def _prompt_done(self, subject: int, prompt: int, blocks: int) -> bool:
        units = (Unit(subject, prompt, e, b) for b in range(blocks) for e in self.edits_of(subject))
        return all(self.done(unit) for unit in units)

    def _cell(self, s: int, p: int, e: int, blocks: int, base: Measurement | None) -> Cell:
        subject, prompt = self.planned.subjects[s], self.planned.prompts[p]
        parts = [self.load(Unit(s, p, e, b)) for b in range(blocks)]
        seeds = tuple(seed for b in range(blocks) for seed in self.block_seeds(Unit(s, p, e, b)))
        readings = join_predictions(
            [_readings(part, subject.attributes, subject.judge.classifier_id) for part in parts]
        )
        codes = np.concatenate([part["faults"] for part in parts])
        faults: tuple[Fault | None, ...] = tuple(None if c == 0 else FAULTS[c - 1] for c in codes.tolist())
        edit = self.edit(s, e)
        sizes = [len(part["faults"]) for part in parts]
        measurement = Measurement(
            request=subject.request(prompt, seeds),
            edit=None if edit is None else edit.spec,
            readings=readings,
            confusion=subject.confusion,
            classifier_id=subject.judge.classifier_id,
            faults=faults if any(faults) else (),
            activation_ratio=float(np.average([float(part["ratio"][0]) for part in parts], weights=sizes)),
            features=np.concatenate([part["features"] for part in parts]) if "features" in parts[0] else None,
        )
        said = tuple(text for part in parts for text in json.loads(bytes(part["said"]).decode()))
        return Cell(
            s, p, e, measurement if base is None else measurement.against(base),
            np.concatenate([part["faces"] for part in parts]).astype(np.int64),
            np.concatenate([part["pixels"] for part in parts]),
            np.concatenate([part["tiny"] for part in parts]),
            tuple(bytes(part[f"thumb {row}"]) for part in parts for row in range(SHOWN) if f"thumb {row}" in part),
            {int(k.split()[1]): bytes(v) for part in parts for k, v in part.items() if k.startswith("full ")},
            said,
        )  # fmt: skip


def _readings(part: Blocks, attributes: Sequence[Attribute], classifier_id: str) -> dict[str, Predictions]:
    return {
        a.name: Predictions(part[f"probs {a.name}"], part[f"certain {a.name}"].astype(bool), a, classifier_id)
        for a in attributes
    }


class _Taking:
    """Takes what is kept of images as they pass: digests, mean colours, small ones to show, whole ones to label."""

    def __init__(self, first: int, whole: set[int]) -> None:
        self.row, self.whole = first, whole
        self.pixels: list[np.ndarray] = []
        self.tiny: list[np.ndarray] = []
        self.files: dict[str, np.ndarray] = {}

    def take(self, part: Generation) -> None:
        """One batch, in order."""
        for image in part.images:
            self.pixels.append(pixel_digest(image))
            self.tiny.append(mean_colours(image))
            if self.row < SHOWN:
                self.files[f"thumb {self.row}"] = _encoded(image, THUMB, "WEBP", quality=80)
            if self.row in self.whole:
                self.files[f"full {self.row}"] = _encoded(image, LABEL_SIDE, "PNG")
            self.row += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """What a piece keeps of it."""
        return {"pixels": np.stack(self.pixels), "tiny": np.stack(self.tiny), **self.files}


def pixel_digest(image: np.ndarray) -> np.ndarray:
    """The first 8 bytes of a sha256 over shape and pixels ``uint8 [H, W, 3]``, ``uint8 [8]``."""
    digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
    return np.frombuffer(digest[:8], np.uint8)


def mean_colours(image: np.ndarray) -> np.ndarray:
    """The mean colours of a grid of 4 × 4 over an image ``uint8 [H, W, 3]``, ``uint8 [4, 4, 3]``."""
    return np.asarray(Image.fromarray(image).resize((TINY, TINY), Image.Resampling.BOX))


def _encoded(image: np.ndarray, side: int, kind: str, **options: int) -> np.ndarray:
    picture = Image.fromarray(image)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


OnUnit = Callable[[Unit], None]


def run_job(
    job: Job,
    *,
    processes: Processes = ALONE,
    progress: Progress | None = None,
    on_unit: OnUnit | None = None,
) -> None:
    """Make every piece that is not there, together with whoever else works in the folder; returns when all are there.

    Args:
        processes: of a launcher; each begins at another place.
        progress: over all pieces; may be stopped at every step, what is finished stays.
        on_unit: called after each piece that this process made.

    Raises:
        LensError: another plan began in this folder, or what drawing refuses.
    """
    job.begin()
    every = job.every
    bars = dict(zip(every, (progress or Progress()).parts(len(every)), strict=True))
    told: set[Unit] = set()
    turn = processes.index * len(every) // max(1, processes.count)
    places = {unit: (place - turn) % len(every) for place, unit in enumerate(every)}
    while True:
        missing = sorted((u for u in job.wanted() if not job.done(u)), key=places.__getitem__)
        for unit in every:
            if unit not in told and job.done(unit):
                told.add(unit)
                bars[unit].found()
        if not missing:
            return
        made = False
        for unit in missing:
            with job.claim(unit) as mine:
                if not mine or job.done(unit):
                    continue
                job.make(unit, bars[unit])
            made = True
            told.add(unit)
            bars[unit].step(1, 1)
            if on_unit is not None:
                on_unit(unit)
        if not made:
            (progress or Progress()).check()
            time.sleep(WAIT)
