"""The plan of an audit: what is asked, of what, against what, and how; frozen and hashed before an image is drawn.

A plan is written by a person (TOML or JSON) and may name files. ``freeze.freeze`` puts their contents in their place:
a frozen plan stands for itself, and its digest tells what was planned from what was looked at afterwards. Who signs,
and what they note, is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import write_text
from diffusion_lens.base.text import read_text
from diffusion_lens.base.types import MAX_IMAGES, MAX_SEED, LensError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_PROMPTS = 500
MAX_SUBJECTS = 8
MAX_EDITS = 12
SUMS = 0.005
"""How far shares of one attribute may miss 1, since people round them."""

Kind = Literal["steer", "spec", "method", "rewrite", "control"]
Goal = Literal["equal", "planted", "table", "run"]


class Part(StrictConfig):
    """A part of a plan; ``class`` is written as people write it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class SubjectPlan(Part):
    """What is audited: a lens, a diffusers model with a judge, or images made elsewhere.

    Attributes:
        name: as shown; by default what it is called where it comes from.
        lens: a folder, a hub id, or the name of a bundled lens.
        model: a diffusers folder or hub id; needs a ``judge``.
        images: a folder of images, or a CSV with a column ``file`` and, where known, ``prompt``, ``seed``, ``model``.
        only: of a CSV, the rows of this ``model``.
        judge: who reads the images, e.g. ``clip``, ``hf:ID``, or a classifier's or a lens's folder.
        labels: JSON file of a network's labels, attribute → class → labels.
        detector: finds faces in front of the judge. error: CSV of labelled images on which its error is measured.
        steps, guidance: of a model; a lens has its own.
        revision, variant: of a model's files.
        pin: what was found when the plan was frozen, e.g. the lens's id; another thing under the same name is refused.
    """

    name: str = Field(default="", max_length=120)
    lens: str = ""
    model: str = ""
    images: str = ""
    only: str = ""
    judge: str = ""
    labels: str = ""
    detector: Literal["", "yunet"] = ""
    error: str = ""
    steps: int = Field(default=30, ge=1, le=1000)
    guidance: float = Field(default=7.5, ge=0, le=50)
    revision: str = ""
    variant: str = ""
    pin: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> SubjectPlan:
        given = [name for name in ("lens", "model", "images") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("give one of lens, model and images")
        if given != ["lens"] and not self.judge:
            raise ValueError(f"{given[0]} without a lens need a judge, e.g. judge = 'clip'")
        if self.only and not self.images:
            raise ValueError("'only' chooses rows of a CSV of images")
        return self

    @property
    def source(self) -> str:
        """Where it comes from."""
        return self.lens or self.model or self.images


class PromptsPlan(Part):
    """Which prompts: typed, from a file, or filled into templates.

    ``texts`` without any: the lens's suggested ones, or those of the images. ``file``: a text file, one prompt a line,
    or a table with a column ``prompt``; or with columns named like the ``{words}`` of ``templates``. Columns
    ``attribute:class`` hold what the reviewer expects of that prompt.
    """

    texts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    words: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    file: str = ""
    unprompted: bool = False


class ReferenceRow(Part):
    """One share of the reference; ``prompt`` ``None``: of every prompt. ``low, high``: its interval, where known."""

    prompt: str | None = None
    attribute: str
    label: str = Field(validation_alias="class", serialization_alias="class")
    share: float = Field(ge=0, le=1)
    source: str = Field(min_length=1, max_length=500)
    low: float | None = None
    high: float | None = None


class AgainstPlan(Part):
    """What shares are compared with; FD, differences and words are against this.

    ``table``: a CSV of ``attribute, class, share, source`` and, where it differs, ``prompt``. ``run``: another audit's
    JSON. ``rows`` say it in the plan; a frozen plan holds all of them.
    """

    kind: Goal = "equal"
    name: str = Field(default="", max_length=120)
    table: str = ""
    run: str = ""
    rows: tuple[ReferenceRow, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> AgainstPlan:
        if self.kind == "table" and not (self.table or self.rows):
            raise ValueError("a reference table needs a file (table = …) or rows")
        if self.kind == "run" and not (self.run or self.rows):
            raise ValueError("name the other audit's JSON (run = …)")
        return self


class Turn(Part):
    """The recommended steering of one attribute towards a class at β."""

    attribute: str
    label: str = Field(validation_alias="class", serialization_alias="class")
    beta: float = Field(ge=-100, le=100)


class EditPlan(Part):
    """Something done to the model; the same seeds are drawn without it too.

    ``steer``: recommended steering, several ``turns`` act at once. ``spec``: an edit as data, or from a JSON ``file``.
    ``method``: fitted and saved in ``folder``, at ``strength``. ``rewrite``: a ``share`` of prompts name a class of
    ``attribute``, drawn from ``shares``. ``control``: what edit number ``of`` does, by random features.
    """

    kind: Kind
    name: str = Field(default="", max_length=120)
    turns: tuple[Turn, ...] = ()
    spec: dict[str, Any] | None = None
    file: str = ""
    folder: str = ""
    strength: float = 1.0
    attribute: str = ""
    shares: dict[str, float] = Field(default_factory=dict)
    share: float = Field(default=1.0, ge=0, le=1)
    template: str = ""
    of: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    pin: str = ""

    @model_validator(mode="after")
    def _whole(self) -> EditPlan:
        needs = {"steer": self.turns, "spec": self.spec or self.file, "method": self.folder, "rewrite": self.attribute}
        if self.kind in needs and not needs[self.kind]:
            words = {"steer": "turns", "spec": "spec or a file", "method": "folder", "rewrite": "attribute"}
            raise ValueError(f"an edit of the kind {self.kind} needs {words[self.kind]}")
        return self


class SizePlan(Part):
    """How many images of each prompt, the same seeds for all.

    Give ``images``; or ``precision``: so many that an even share is known to ± that many points; or ``until``: draw
    until the interval of every share is at most ± that many points wide, which may be looked at all the while, and at
    most ``most``. ``batch_size`` decides the last bits of pixels and so is part of the plan.
    """

    images: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    precision: float | None = Field(default=None, gt=0.5, lt=50)
    until: float | None = Field(default=None, gt=0.5, lt=50)
    most: int = Field(default=2000, ge=1, le=MAX_IMAGES)
    first_seed: int = Field(default=0, ge=0, le=MAX_SEED - MAX_IMAGES)
    batch_size: int = Field(default=16, ge=1, le=1024)

    @model_validator(mode="after")
    def _one(self) -> SizePlan:
        if sum(value is not None for value in (self.images, self.precision, self.until)) > 1:
            raise ValueError("give one of images, precision and until")
        return self


class ReadersPlan(Part):
    """Who reads beside the judge: ``blind`` images are set apart for people, drawn by ``seed`` over all conditions."""

    blind: int = Field(default=48, ge=0, le=1000)
    seed: int = Field(default=0, ge=0)


class ContextPlan(Part):
    """Why the audit is made, in the reviewer's words; empty fields are marked as such in the report."""

    intended_use: str = Field(default="", max_length=4000)
    people_affected: str = Field(default="", max_length=4000)
    harm_hypotheses: str = Field(default="", max_length=4000)
    would_change: str = Field(default="", max_length=4000)


class SignPlan(Part):
    """Who signs, and what they note afterwards; no part of the digest. ``findings``: prompt → note."""

    reviewer: str = Field(default="", max_length=400)
    conflicts: str = Field(default="", max_length=4000)
    date: str = Field(default="", max_length=40)
    notes: str = Field(default="", max_length=20_000)
    findings: dict[str, str] = Field(default_factory=dict)


class AuditPlan(Part):
    """A whole audit.

    Attributes:
        attributes: which are in question, the first on page one; by default those that a lens steers, or all read.
        margin: points within which a share counts as near its reference.
        least: images below which a cell of crossed classes is marked small.
        controls: beside each edit of features, the same with features drawn at random.
    """

    format_version: Literal[1] = 1
    question: str = Field(default="", max_length=400)
    title: str = Field(default="", max_length=200)
    subjects: tuple[SubjectPlan, ...] = Field(min_length=1, max_length=MAX_SUBJECTS)
    prompts: PromptsPlan = PromptsPlan()
    attributes: tuple[str, ...] = ()
    against: AgainstPlan = AgainstPlan()
    edits: tuple[EditPlan, ...] = Field(default=(), max_length=MAX_EDITS)
    controls: bool = True
    size: SizePlan = SizePlan()
    margin: float = Field(default=10.0, gt=0, lt=50)
    least: int = Field(default=10, ge=1)
    readers: ReadersPlan = ReadersPlan()
    context: ContextPlan = ContextPlan()
    sign: SignPlan = SignPlan()
    frozen: bool = False

    @field_validator("subjects")
    @classmethod
    def _names(cls, subjects: tuple[SubjectPlan, ...]) -> tuple[SubjectPlan, ...]:
        names = [s.name for s in subjects if s.name]
        if len(set(names)) < len(names):
            raise ValueError("two subjects have one name")
        return subjects

    def plain(self) -> dict[str, Any]:
        """As JSON values, keys as people write them."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def digest(self) -> str:
        """sha256 over everything but who signs, 64 hex digits; of a frozen plan it says what was planned."""
        values = self.plain()
        del values["sign"]
        return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write as indented JSON."""
        write_text(path, json.dumps(self.plain(), indent=2, ensure_ascii=False) + "\n")

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of what is drawn: ``unedited``, then the edits."""
        return ("unedited", *(edit.name for edit in self.edits))


def read_plan(path: Path | str) -> AuditPlan:
    """A plan from TOML or JSON; raises ``LensError`` that names the file and the first wrong key."""
    path = Path(path)
    text = read_text(path)
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise LensError(f"{path.name} is no {kind} ({str(error).splitlines()[0][:120]}).") from None
    if isinstance(values, dict) and "content_sha256" in values:
        values = values.get("plan")  # an audit's own JSON holds its plan
    if not isinstance(values, dict):
        raise LensError(f"{path.name} holds no plan; see docs/audit.md for one.")
    return AuditPlan.parse(values, where=path.name)


def images_for_precision(points: float) -> int:
    """Images after which the exact 95 % interval of an even share is at most ± ``points`` points wide."""
    from diffusion_lens.results.stats import share_interval

    def half(n: int) -> float:
        low, high = share_interval(n // 2, n)
        return 100 * max(high - 0.5, 0.5 - low) if n % 2 == 0 else 100 * (high - low) / 2

    low, high = 2, 2
    while half(high) > points:
        high *= 2
        if high > MAX_IMAGES * 2:
            raise LensError(f"± {points:g} points would take more than {MAX_IMAGES:,} images; ask for less.")
    while low < high:
        middle = (low + high) // 2 // 2 * 2
        if half(middle) <= points:
            high = middle
        else:
            low = middle + 2
    if high > MAX_IMAGES:
        raise LensError(f"± {points:g} points would take more than {MAX_IMAGES:,} images; ask for less.")
    return high


def precision_of(n: int) -> float:
    """Points to which ``n`` images know an even share: the half width of its exact 95 % interval."""
    from diffusion_lens.results.stats import share_interval

    low, high = share_interval(n // 2, n)
    return 100 * (high - low) / 2


def check_sums(shares: dict[str, float], what: str) -> None:
    """Raise ``LensError`` unless the shares of one attribute add up to 1."""
    total = math.fsum(shares.values())
    if abs(total - 1) > SUMS:
        listed = ", ".join(f"{label} {share:.1%}" for label, share in shares.items())
        raise LensError(f"The shares of {what} add up to {total:.1%} ({listed}); mend them to add up to 100 %.")
