"""Audits in the app: plans from what a visitor chose, their folders, and runs that can be stopped and taken up."""

from __future__ import annotations

import base64
import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from diffusion_lens.base.files import disk_errors, read_json, write_json
from diffusion_lens.base.pictures import SUFFIXES
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Status
from diffusion_lens.base.types import Attribute, EditSpec, LensError
from diffusion_lens.base.words import duration
from diffusion_lens.studio import state
from diffusion_lens.studio.jobs import TELL_EVERY, stream
from diffusion_lens.studio.studio import Studio, import_engine

if TYPE_CHECKING:
    from diffusion_lens.studies.audit.engine import Job, Unit
    from diffusion_lens.studies.audit.freeze import Planned
    from diffusion_lens.studies.audit.plan import AuditPlan

FOLDER_VARIABLE = "DIFFUSION_LENS_AUDITS"
MAX_IMAGES = 6000
"""Images of one audit that the app draws; more belong on the command line."""

MAX_PROMPTS = 40
MAX_FILES = 1000
MAX_FILE_BYTES = 20 * 2**20
MAX_TOTAL_BYTES = 300 * 2**20
KEPT_DAYS = 14
"""Days after which an audit's folder is removed when another one begins."""

USUAL_SECONDS = 1 / 13
"""Per image of the bundled lens on two free cores, until this machine's own speed is known."""

ID = re.compile(r"[0-9a-f]{16}")
AGAINST = {
    "equal shares": "equal", "the shares planted in the training data": "planted", "a table of my own": "table",
}  # fmt: skip
SIZES = {"± 14 points": 14.0, "± 10 points": 10.0, "± 7 points": 7.0, "± 5 points": 5.0, "± 3 points": 3.0}
"""Precision by words; the exact number of images follows."""


@dataclass(frozen=True)
class Wish:
    """What a visitor chose, unchecked; paths are of files that they uploaded.

    Attributes:
        what: ``lens`` or ``images``. prompts: one a line. table: what shares are compared with, as CSV text.
        steering: attribute, class and β of recommended steering. shown: the edit on Explore's screen.
        judge: of images made elsewhere: this lens's own, or a network by name.
    """

    what: str = "lens"
    prompts: str = ""
    files: tuple[str, ...] = ()
    judge: str = ""
    attributes: tuple[str, ...] = ()
    against: str = "equal"
    table: str = ""
    question: str = ""
    steer: bool = False
    attribute: str = ""
    target: str = ""
    beta: float = 1.0
    shown: EditSpec | None = None
    rewrite: bool = False
    controls: bool = True
    precision: float = 10.0
    until: bool = False
    blind: int = 48
    context: Mapping[str, str] = field(default_factory=dict)
    sign: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline:
    """A plan before it runs: what it will draw, and for how long. ``too_large``: why it is one for the command line."""

    plan: AuditPlan
    images: int
    per_prompt: int
    seconds: float
    too_large: str
    measured: bool = False

    @property
    def time(self) -> str:
        """The time in words, and whose speed it goes by."""
        whose = "at this server's pace" if self.measured else "on two free cores"
        return f"{duration(self.seconds)} {whose}"


@dataclass(frozen=True)
class News:
    """How far an audit is. ``page``: the report so far, where a prompt was finished since. ``done``: all of it is."""

    share: float
    seconds_left: float | None
    page: str = ""
    done: bool = False
    files: str = ""


def audits_folder() -> Path:
    """Where audits of the app lie: ``$DIFFUSION_LENS_AUDITS``, else ``~/.cache/diffusion-lens/audits``."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "diffusion-lens" / "audits"


def read_images(files: Sequence[str]) -> tuple[list[Path], Path | None]:
    """Uploaded images, and the CSV among them; raises ``LensError`` for too many, too large, or other files."""
    paths = [Path(file) for file in files]
    images = [path for path in paths if path.suffix.lower() in SUFFIXES]
    tables = [path for path in paths if path.suffix.lower() == ".csv"]
    other = [path.name for path in paths if path not in images and path not in tables]
    if other:
        raise LensError(f"{other[0]} is neither an image nor a CSV; upload PNG, JPEG or WebP images.")
    if not images:
        raise LensError("Upload the images to audit, and perhaps a CSV with the columns file, prompt, seed and model.")
    if len(images) > MAX_FILES:
        raise LensError(f"The app takes up to {MAX_FILES:,} images; audit {len(images):,} with the command.")
    if len(tables) > 1:
        raise LensError("Upload one CSV beside the images.")
    names = [path.name for path in images]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LensError(f"Two of the images are called {twice}; name them apart.")
    sizes = [path.stat().st_size for path in images]
    if max(sizes) > MAX_FILE_BYTES or sum(sizes) > MAX_TOTAL_BYTES:
        raise LensError(
            f"An image may take {MAX_FILE_BYTES // 2**20} MB, all together {MAX_TOTAL_BYTES // 2**20} MB; make them "
            "smaller, or use the command."
        )
    return images, tables[0] if tables else None


def plan_of(studio: Studio, wish: Wish, *, images: str = "images") -> AuditPlan:
    """The plan that a visitor's choices stand for; ``images``: where uploaded ones will lie.

    Raises:
        LensError: what the plan, the prompts or the table get wrong.
    """
    from diffusion_lens.studies.audit.plan import AuditPlan

    lens = studio.lens
    prompts = [" ".join(line.split()) for line in wish.prompts.splitlines() if line.strip()]
    prompts = ["" if text == state.EMPTY_PROMPT else text for text in prompts]
    if len(prompts) > MAX_PROMPTS:
        raise LensError(f"The app takes up to {MAX_PROMPTS} prompts; audit {len(prompts)} with the command.")
    if wish.what == "images":
        judge = wish.judge or str(lens.folder)
        subject: dict[str, Any] = {"images": images, "judge": judge, "name": "uploaded images"}
        texts: list[str] = []
    else:
        subject, texts = {"lens": str(lens.folder)}, prompts
        if lens.prompts == (None,):
            texts = []
        elif not texts:
            raise LensError("Write one prompt or more, each on a line of its own.")
        for text in texts:
            state.check_prompt(lens, text)
    rows = _table_rows(wish.table) if wish.against == "table" else []
    values: dict[str, Any] = {
        "question": wish.question, "subjects": [subject], "prompts": {"texts": texts},
        "attributes": list(wish.attributes), "against": {"kind": wish.against, "rows": rows},
        "edits": _edits(wish) if wish.what == "lens" else [], "controls": wish.controls,
        "size": _size(wish), "readers": {"blind": wish.blind}, "context": dict(wish.context),
        "sign": dict(wish.sign),
    }  # fmt: skip
    return AuditPlan.parse(values, where="the audit")


def _size(wish: Wish) -> dict[str, Any]:
    if wish.what == "images":
        return {}
    return {"until": wish.precision, "most": 1000} if wish.until else {"precision": wish.precision}


def _edits(wish: Wish) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if wish.steer:
        found.append({
            "kind": "steer", "turns": [{"attribute": wish.attribute, "class": wish.target, "beta": wish.beta}]
        })  # fmt: skip
    if wish.shown is not None:
        found.append({"kind": "spec", "name": "as on screen in Explore", "spec": to_plain(wish.shown)})
    if wish.rewrite:
        found.append({"kind": "rewrite", "attribute": wish.attribute})
    return found


def _table_rows(text: str) -> list[dict[str, Any]]:
    """A reference table typed as CSV; read as from a file, so that mistakes name their line."""
    from diffusion_lens.studies.audit.against import read_reference

    if not text.strip():
        raise LensError("Write the reference table: attribute, class, share, source; a line for each class.")
    path = Path(gettempdir()) / f"reference-{secrets.token_hex(6)}.csv"
    try:
        path.write_text(text, encoding="utf-8")
        rows = read_reference(path)
    except LensError as error:
        raise LensError(str(error).replace(path.name, "The reference table")) from None
    finally:
        path.unlink(missing_ok=True)
    return [row.model_dump(mode="json", by_alias=True) for row in rows]


def subject_here(studio: Studio, plan: AuditPlan) -> tuple[Any, ...]:
    """The page's own lens as the plan's subject, opened already; empty where the plan is of something else."""
    from diffusion_lens.studies.audit.subjects import lens_subject

    own = plan.subjects[0]
    if len(plan.subjects) != 1 or not own.lens:
        return ()
    subject = lens_subject(own, studio.lens, studio.lens.classifier)
    if own.pin and own.pin.get("lens") != subject.pin["lens"]:
        raise LensError("This audit is of another lens than this page's; open that lens's page, or use the command.")
    return (subject,)


_paces: WeakKeyDictionary[Studio, float] = WeakKeyDictionary()
"""Seconds per image of each lens here, once an audit has drawn some."""


def outline(studio: Studio, wish: Wish) -> Outline:
    """What a plan will draw; everything but the opening of files is checked."""
    from diffusion_lens.results.sequential import images_for
    from diffusion_lens.studies.audit.plan import images_for_precision

    plan = plan_of(studio, wish)
    if wish.what == "images":
        images, _ = read_images(wish.files)
        return Outline(plan, len(images), len(images), 0.05 * len(images), "")
    size = plan.size
    per_prompt = size.images or 200
    if size.precision is not None:
        per_prompt = images_for_precision(size.precision)
    if size.until is not None:
        per_prompt = min(size.most, images_for(size.until / 100))
    features = sum(edit.kind in ("steer", "spec") for edit in plan.edits)
    conditions = 1 + len(plan.edits) + (features if plan.controls else 0)
    total = per_prompt * conditions * max(1, len(plan.prompts.texts))
    pace = _paces.get(studio)
    seconds = total * (USUAL_SECONDS if pace is None else pace)
    large = ""
    if total > MAX_IMAGES:
        large = f"{total:,} images are more than the {MAX_IMAGES:,} that the app draws in one audit."
    return Outline(plan, total, per_prompt, seconds, large, pace is not None)


def begin(studio: Studio, wish: Wish) -> str:
    """Freeze a plan in a new folder; returns its id, by which it can be taken up again.

    Raises ``LensError`` for whatever is wrong with the plan or its files.
    """
    found = outline(studio, wish)
    if found.too_large:
        raise LensError(f"{found.too_large} Use the command below.")
    import_engine()
    _prune()
    name = secrets.token_hex(8)
    folder = audits_folder() / name
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True)
            if wish.what == "images":
                _copy(wish.files, folder / "images")
        plan = found.plan
        job = open_job(studio, plan, folder)
        job.begin()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return name


def _copy(files: Sequence[str], folder: Path) -> None:
    images, table = read_images(files)
    folder.mkdir()
    for path in images:
        shutil.copyfile(path, folder / path.name)
    if table is not None:
        shutil.copyfile(table, folder / "images.csv")


def _prune() -> None:
    root = audits_folder()
    for folder in root.iterdir() if root.is_dir() else ():
        if ID.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > KEPT_DAYS * 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def folder_of(name: str) -> Path:
    """The folder of an audit; raises ``LensError`` for an id that is none."""
    text = name.strip().lower()
    folder = audits_folder() / text
    if not ID.fullmatch(text) or not (folder / "plan.json").is_file():
        raise LensError("There is no audit of this id here; check it, or begin a new one.")
    return folder


def open_job(studio: Studio, plan: AuditPlan, folder: Path) -> Job:
    """The job of a plan in its folder, with this page's lens where it is of it."""
    from diffusion_lens.model.run_options import RunOptions
    from diffusion_lens.studies.audit.engine import Job
    from diffusion_lens.studies.audit.freeze import freeze

    options = RunOptions(device=str(studio.lens.device))
    return Job(freeze(plan, folder, options, subject_here(studio, plan)), folder)


def take_up(studio: Studio, name: str) -> Job:
    """An audit that began here, as it was frozen."""
    from diffusion_lens.studies.audit.plan import read_plan

    folder = folder_of(name)
    import_engine()
    return open_job(studio, read_plan(folder / "plan.json"), folder)


def run_events(studio: Studio, visitor: str, name: str) -> Iterator[News]:
    """Go on with an audit; the report so far comes with every prompt that is finished, the whole one at the end.

    Closing the iterator stops it; what is finished stays. Raises ``Cancelled`` when the visitor stopped it.
    """
    folder_of(name)
    owner = f"{visitor}:audit"
    flag = studio.stops.start(owner)

    def job(emit: Callable[[News], None]) -> None:
        made = take_up(studio, name)
        last, finished = time.monotonic(), 0
        began = last

        def hear(status: Status) -> None:
            nonlocal last
            if time.monotonic() - last >= TELL_EVERY:
                last = time.monotonic()
                emit(News(status.share, status.seconds_left))

        def look(unit: Unit) -> None:
            nonlocal finished, began
            now = time.monotonic()
            _paces[studio] = (now - began) / len(made.block_seeds(unit))
            began = now
            done = len({cell.prompt for cell in made.cells(partial=True)})
            if done > finished:
                finished = done
                emit(News(0.0, None, page=page_so_far(made)))

        from diffusion_lens.studies.audit.engine import run_job

        with studio.work(owner, urgent=False, tell=hear, flag=flag) as progress:
            run_job(made, progress=progress, on_unit=look)
        page, files = finish(made)
        emit(News(1.0, 0.0, page=page, done=True, files=files))

    yield from stream(job, flag.set)


def page_so_far(job: Job) -> str:
    """The report of the prompts that are finished."""
    from diffusion_lens.studies.audit.figures import record_of
    from diffusion_lens.studies.audit.report import pictures_of, render

    cells = job.cells(partial=True)
    return render(record_of(job, partial=True), pictures_of(job, cells), unfinished=True)


def finish(job: Job) -> tuple[str, str]:
    """Write the report; returns the page and the path of a ZIP with all files."""
    from diffusion_lens.studies.audit.report import FILES, write_report

    write_report(job, links=links_of(job.planned))
    path = Path(gettempdir()) / f"audit-{job.folder.name}-{secrets.token_hex(4)}.zip"
    with disk_errors(path), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (*FILES, "plan.json"):
            archive.write(job.folder / name, f"audit/{name}")
    return (job.folder / "audit.html").read_text(encoding="utf-8"), str(path)


def sign(studio: Studio, name: str, values: Mapping[str, str]) -> tuple[str, str]:
    """Sign a finished audit: who, and what they note; the plan's digest stays. Returns page and ZIP as ``finish``."""
    job = take_up(studio, name)
    if not all(job.done(unit) for unit in job.wanted()):
        raise LensError("The audit is not finished; sign it when it is.")
    plan = job.planned.plan
    signed = plan.model_copy(update={"sign": type(plan.sign).parse(dict(values), where="the signature")})
    again = replace(job, planned=replace(job.planned, plan=signed))
    again.begin()
    return finish(again)


def finish_where_done(studio: Studio, name: str) -> tuple[str, str]:
    """The report of an audit that is finished, as ``finish``; two empty texts for one that is not."""
    job = take_up(studio, name)
    return finish(job) if all(job.done(unit) for unit in job.wanted()) else ("", "")


@dataclass(frozen=True)
class Blind:
    """Images to label without knowing what was drawn: numbers and data addresses, and what can be answered."""

    images: tuple[tuple[int, str], ...]
    attributes: tuple[Attribute, ...]


def blind_of(studio: Studio, name: str) -> Blind:
    """The images that an audit set apart for people."""
    from diffusion_lens.studies.audit.people import blind_images

    job = take_up(studio, name)
    found = blind_images(job)
    if not found:
        raise LensError("No image is there to label yet; start the audit, or plan images for people to read.")
    images = tuple((n, "data:image/png;base64," + base64.b64encode(data).decode()) for n, data in found.items())
    return Blind(images, job.planned.attributes)


def answer(studio: Studio, name: str, rater: str, attribute: str, answers: Mapping[str, str]) -> tuple[int, str]:
    """Keep a person's answers on one attribute; returns how many, and a sentence on agreement.

    ``answers``: image number → class or ``UNSURE``. Earlier answers on other attributes stay.
    """
    from diffusion_lens.studies.audit.people import UNSURE, people_of, save_answers

    job = take_up(studio, name)
    asked = next((a for a in job.planned.attributes if a.name == attribute), None)
    if asked is None or not rater.strip():
        raise LensError("Write your name, or initials, so that your answers stay apart from others'.")
    kept_path = job.folder / "answers" / f"{re.sub(r'[^A-Za-z0-9_-]', '-', rater.strip())[:60]}.json"
    kept: dict[str, dict[str, str]] = read_json(kept_path) if kept_path.is_file() else {}
    for number, label in answers.items():
        if not str(number).isdigit() or int(number) >= len(job.blind) or label not in (*asked.classes, UNSURE):
            raise LensError("These answers are not of this audit's images; load the images again.")
        kept.setdefault(str(int(number)), {})[attribute] = label
    write_json(kept_path, kept)
    save_answers(job, rater.strip()[:60], {int(n): own for n, own in kept.items()}, job.planned.attributes)
    people = people_of(job)
    told = []
    for row in people.agreement if people is not None else ():
        if row.attribute == attribute:
            value = "not defined" if row.kappa is None else f"{row.kappa:.2f} ({row.low:.2f} to {row.high:.2f})"
            told.append(f"{row.kind}'s κ of {' and '.join(row.readers)}: {value}, n = {row.n}")
    return len(answers), "; ".join(told)


def command_for(plan: AuditPlan) -> str:
    """What runs this plan elsewhere."""
    return "python -m diffusion_lens audit plan.json --out audit"


def links_of(planned: Planned) -> dict[str, str]:
    """What opens an edit in the app: name → the part of an address after the app's own, for its first prompt.

    Only recommended steering of one attribute has a view of its own.
    """
    found = {}
    prompt = planned.prompts[0]
    for edit in planned.plan.edits:
        lens = next((s.lens for s in planned.subjects if s.lens is not None), None)
        if edit.kind != "steer" or len(edit.turns) != 1 or lens is None:
            continue
        turn = edit.turns[0]
        try:
            view = replace(
                state.default_view(lens, turn.attribute), prompt=prompt, target=turn.label, beta=turn.beta,
                first_seed=planned.plan.size.first_seed,
            )  # fmt: skip
            state.check(lens, view)
        except LensError:
            continue
        found[f"View: {edit.name}"] = state.to_query(view)
    return found
