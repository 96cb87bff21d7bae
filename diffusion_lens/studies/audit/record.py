"""An audit's record: everything that its report says, as plain values with a published schema.

The page, the tables and the snippets are made from it, and ``verify`` reads it. Numbers that are not there are null,
never made up.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diffusion_lens.base.files import read_json, write_text
from diffusion_lens.base.types import LensError
from diffusion_lens.studies.audit.plan import AuditPlan, Part

Word = Literal["near", "far", "can't tell", "no reference"]
UNDECIDED = -1
NOBODY = -2
"""In place of a class: an image left undecided, and one that shows nobody."""

PIXEL_TOLERANCE = 6.0
"""Levels of 255 by which any mean colour of a redrawn image may differ on other hardware."""

READING_TOLERANCE = 0.05
"""Share of redrawn images that may be read otherwise on other hardware."""


class ShareRow(Part):
    """A class's share among the decided images of one prompt and edit, with its 95 % intervals, and its reference.

    ``corrected``: for the judge's known error. ``difference``: corrected share less reference.
    """

    subject: str
    prompt: str | None
    edit: str
    attribute: str
    label: str = Field(validation_alias="class", serialization_alias="class")
    images: int
    count: int
    decided: int
    undecided: int
    invalid: int
    no_face: int | None
    several_faces: int | None
    share: float | None
    low: float
    high: float
    corrected: float | None
    corrected_low: float
    corrected_high: float
    reference: float | None
    against: str
    source: str
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    word: Word

    def plain_values(self) -> tuple[Any, ...]:
        """The values in the order of the fields."""
        return tuple(getattr(self, name) for name in type(self).model_fields)


class Point(Part):
    """One condition of a verdict's row: corrected share with interval, decided images, and the word."""

    edit: str
    share: float | None
    low: float
    high: float
    n: int
    undecided: int
    word: Word
    leading: str = ""


class Verdict(Part):
    """One row of page one: a prompt, the class shown, its reference, and every condition."""

    subject: str
    prompt: str | None
    attribute: str
    label: str = Field(validation_alias="class", serialization_alias="class")
    reference: float | None
    against: str
    points: tuple[Point, ...]


class Distance(Part):
    """Fairness discrepancy of the shares as read from the stated reference; below ``floor`` it shows nothing."""

    subject: str
    prompt: str | None
    edit: str
    attribute: str
    against: str
    fd: float | None
    low: float
    high: float
    floor: float | None
    n: int


class ChangeRow(Part):
    """How a class's share moved on the same seeds; ``steered``: the edit was to move this attribute."""

    subject: str
    prompt: str | None
    edit: str
    attribute: str
    label: str = Field(validation_alias="class", serialization_alias="class")
    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None
    n: int
    steered: bool
    control: bool


class CrossRow(Part):
    """Images of one combination of classes among those decided in all of its attributes; ``pooled``: of all prompts."""

    subject: str
    edit: str
    pooled: bool
    prompt: str | None
    attributes: tuple[str, ...]
    classes: tuple[str, ...]
    count: int
    decided: int
    share: float | None
    low: float
    high: float
    small: bool


class SideRow(Part):
    """Two subjects side by side, unedited: the second's corrected share less the first's."""

    prompt: str | None
    attribute: str
    label: str = Field(validation_alias="class", serialization_alias="class")
    first: str
    second: str
    difference: float | None
    low: float | None
    high: float | None


class QualityRecord(Part):
    """What can be said of the images of one prompt and edit.

    ``kept``: share of images that kept their class in attributes that were not steered. ``frechet``: distance of the
    judge's features from the unedited images of the same seeds; null below 50 images. ``activation_ratio``: how hard
    the bottleneck was pushed, 1 where nothing was edited.
    """

    subject: str
    prompt: str | None
    edit: str
    n: int
    invalid: int
    faults: dict[str, int]
    kept: float | None
    frechet: float | None
    activation_ratio: float


class Agreement(Part):
    """How far two readers agree beyond chance; ``n``: images that both decided, ``differ``: read otherwise."""

    attribute: str
    kind: Literal["Cohen", "Fleiss"]
    readers: tuple[str, ...]
    kappa: float | None
    low: float | None
    high: float | None
    n: int
    differ: int
    undecided: int


class ErrorRecord(Part):
    """A judge's error: counts ``[true][read]`` and who measured it; ``assumed``: nobody, it is taken to be none."""

    source: Literal["labelled images", "people in this audit", "assumed"]
    counts: tuple[tuple[int, ...], ...]


class SubjectRecord(Part):
    """What was audited, and with what."""

    name: str
    kind: Literal["lens", "model", "images"]
    attributes: dict[str, tuple[str, ...]]
    judge: str
    error: dict[str, ErrorRecord]
    facts: dict[str, str]
    said: tuple[str, ...] = ()


class CellRecord(Part):
    """Every image of one subject, prompt and edit.

    ``readings``: attribute → class index per image, -1 undecided, -2 shows nobody. ``pixels``: 16 hex digits of each
    image's sha256. ``tiny``: mean colours of a 4 × 4 grid, base64 of ``uint8 [n, 4, 4, 3]``. ``files``: of images made
    elsewhere.
    """

    subject: str
    prompt: str | None
    edit: str
    seeds: tuple[int, ...]
    readings: dict[str, tuple[int, ...]]
    faces: tuple[int, ...] | None
    pixels: tuple[str, ...]
    tiny: str
    files: tuple[str, ...] = ()


class AuditRecord(Part):
    """The whole of an audit; ``content_sha256`` seals everything else."""

    format_version: Literal[1] = 1
    made_by: str
    date: str
    plan: AuditPlan
    plan_sha256: str
    subjects: tuple[SubjectRecord, ...]
    verdicts: tuple[Verdict, ...]
    shares: tuple[ShareRow, ...]
    distances: tuple[Distance, ...]
    changes: tuple[ChangeRow, ...]
    crossings: tuple[CrossRow, ...]
    side_by_side: tuple[SideRow, ...]
    quality: tuple[QualityRecord, ...]
    agreement: tuple[Agreement, ...]
    people: dict[str, str]
    cells: tuple[CellRecord, ...]
    provenance: dict[str, str]
    links: dict[str, str]
    limits: tuple[str, ...]
    tolerance: dict[str, float] = Field(
        default_factory=lambda: {"pixels": PIXEL_TOLERANCE, "readings": READING_TOLERANCE}
    )
    content_sha256: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON values, keys as people write them."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """The prompts that were measured, in order."""
        return tuple(dict.fromkeys(cell.prompt for cell in self.cells))

    def sealed(self) -> AuditRecord:
        """With the digest of its content."""
        return self.model_copy(update={"content_sha256": content_digest(self.plain())})

    def write(self, path: Path) -> None:
        """Write as compact JSON."""
        write_text(path, json.dumps(self.plain(), separators=(",", ":"), ensure_ascii=False) + "\n")


def content_digest(values: dict[str, Any]) -> str:
    """sha256 over a record's JSON values, all but the digest itself."""
    rest = {key: value for key, value in values.items() if key != "content_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_record(path: Path) -> AuditRecord:
    """A record from its JSON; raises ``LensError`` that names the first wrong key."""
    values = read_json(path)
    if not isinstance(values, dict) or "plan_sha256" not in values:
        raise LensError(f"{path} is no audit's JSON; name the audit.json that a report lies beside.")
    return AuditRecord.parse(values, where=path.name)
