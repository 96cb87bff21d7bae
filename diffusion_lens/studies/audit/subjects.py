"""What an audit opens: a lens, a diffusers model with a judge, or images made elsewhere; all are read in one way."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_lens.base.assets import assets_folder
from diffusion_lens.base.files import read_json, sha256_of
from diffusion_lens.base.pictures import SUFFIXES, open_picture
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.text import read_table
from diffusion_lens.base.types import (
    ASSUMED,
    MAX_IMAGES,
    Attribute,
    Fault,
    Generation,
    GenerationRequest,
    LensError,
    Reading,
    as_whole,
)
from diffusion_lens.base.validity import find_constant
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.judging.described import build, named_spec, open_classifier
from diffusion_lens.judging.labelled import calibrate_from_folder
from diffusion_lens.judging.photos import PhotoReading
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.observe import OnBatch, observe, read
from diffusion_lens.methods.protocol import lens_key
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.pipelines import DiffusionModel, load_model
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.studies.audit.plan import SubjectPlan
from diffusion_lens.studies.check.world import has_truth

if TYPE_CHECKING:
    from diffusion_lens.base.text import Table

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "pillow")
INDEX = "images.csv"
"""The table that a folder of images may hold."""
BLANK = 64
"""Side of the black square that stands for an unreadable image: it is counted, and shows nobody."""


@dataclass(frozen=True, eq=False)
class Noting:
    """A judge that notes how many faces it found, for as long as one block is read."""

    judge: Classifier
    faces: list[np.ndarray] = field(default_factory=list)

    @property
    def classifier_id(self) -> str:
        """The judge's own."""
        return self.judge.classifier_id

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """The judge's own."""
        return self.judge.attributes

    @property
    def confusion(self) -> Mapping[str, np.ndarray]:
        """The judge's own."""
        return self.judge.confusion

    def read(self, images: np.ndarray) -> Reading:
        """As the judge; ``faces`` grows by ``int [n]``, -1 where nobody looked for faces."""
        seen = self.judge.read(images)
        found = seen.faces if isinstance(seen, PhotoReading) else None
        self.faces.append(np.full(len(images), -1) if found is None else np.asarray(found))
        return seen

    def predict(self, images: np.ndarray) -> Any:
        """As the judge."""
        return self.read(images).predictions

    def features(self, images: np.ndarray) -> np.ndarray:
        """As the judge."""
        return self.judge.features(images)


@dataclass(frozen=True, eq=False)
class Subject(ABC):
    """Something to audit, opened.

    Attributes:
        name: as shown. judge: who reads its images.
        suggested: prompts where the plan names none. focus: attributes in question where the plan names none.
        pin: what it is, by name → digest or version; kept in the plan.
    """

    plan: SubjectPlan
    name: str
    judge: Classifier
    suggested: tuple[str | None, ...]
    focus: tuple[str, ...]
    pin: Mapping[str, str]

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """Everything that is read."""
        return tuple(self.judge.attributes)

    @property
    def can_draw(self) -> bool:
        """Whether there is a model behind it."""
        return True

    @property
    def lens(self) -> DiffusionLens | None:
        """The lens that can edit it, where there is one."""
        return None

    @property
    def has_truth(self) -> bool:
        """Whether it is a model of the planted world, read by a classifier of that world."""
        return False

    @cached_property
    def confusion(self) -> dict[str, np.ndarray]:
        """Attribute → error of the judge, counts ``[true, read]``; where it was never measured, assumed to be none."""
        known = {name: np.asarray(table) for name, table in self.judge.confusion.items()}
        return {a.name: known.get(a.name, ASSUMED * np.eye(len(a.classes), dtype=np.int64)) for a in self.attributes}

    def check_prompt(self, prompt: str | None) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ``LensError`` for a prompt that it has no images for."""

    def seeds(self, prompt: str | None, wanted: Sequence[int]) -> tuple[int, ...]:
        """Which of the ``wanted`` seeds it has images of."""
        return tuple(wanted)

    @abstractmethod
    def request(self, prompt: str | None, seeds: Sequence[int]) -> GenerationRequest:
        """What is read under a prompt."""

    @abstractmethod
    def measure(
        self,
        prompt: str | None,
        seeds: Sequence[int],
        edit: Edit | None,
        *,
        batch_size: int,
        progress: Progress | None,
        on_batch: OnBatch,
    ) -> tuple[Measurement, np.ndarray, tuple[str, ...]]:
        """What is read in these images, faces ``int [n]`` (-1: not looked for), and notes on files."""

    def facts(self) -> dict[str, str]:
        """What it is and how it is read, in the order shown."""
        return {"Judge": self.judge.classifier_id}


@dataclass(frozen=True, eq=False)
class Drawn(Subject):
    """A model that draws: a lens's, or any diffusers model."""

    opened: DiffusionLens | None = None
    options: RunOptions | None = None
    folder: Path = Path()

    @property
    def lens(self) -> DiffusionLens | None:
        """The lens; ``None`` for a model without one."""
        return self.opened

    @cached_property
    def model(self) -> DiffusionModel:
        """The diffusion model, loaded on first use."""
        if self.opened is not None:
            return self.opened.model
        return load_model(
            _place(self.plan.model, self.folder), options=self.options, revision=self.plan.revision or None,
            variant=self.plan.variant or None, keep_scheduler=False,
        )  # fmt: skip

    @property
    def has_truth(self) -> bool:
        """Whether the lens opens a model of the planted world."""
        return self.opened is not None and has_truth(self.opened)

    def check_prompt(self, prompt: str | None) -> None:
        """Raise ``LensError`` for words that the model never saw, and for a prompt where none is taken."""
        if self.opened is None:
            return
        if (prompt is None) != (self.opened.prompts == (None,)):
            raise LensError(
                f"{self.name} takes no prompt; leave the prompts out."
                if prompt is not None
                else f"{self.name} needs prompts; name some."
            )
        if prompt is not None:
            self.opened.check_words(prompt)

    def request(self, prompt: str | None, seeds: Sequence[int]) -> GenerationRequest:
        """What is drawn."""
        if self.opened is not None:
            return self.opened.request(prompt, seeds)
        guidance = self.plan.guidance if self.model.is_text else 1.0
        return GenerationRequest(prompt, tuple(seeds), self.plan.steps, guidance, self.model.model_id)

    def measure(
        self,
        prompt: str | None,
        seeds: Sequence[int],
        edit: Edit | None,
        *,
        batch_size: int,
        progress: Progress | None,
        on_batch: OnBatch,
    ) -> tuple[Measurement, np.ndarray, tuple[str, ...]]:
        """Draw and read."""
        noting = Noting(self.judge)
        found = observe(
            self.model, self.request(prompt, seeds), edit, noting, batch_size=batch_size, n_examples=0,
            progress=progress, on_batch=on_batch, allow_none=True,
        )  # fmt: skip
        return found, np.concatenate(noting.faces), ()

    def facts(self) -> dict[str, str]:
        """Model, sites, sampler, judge."""
        if self.opened is None:
            scheduler = type(self.model.pipeline.scheduler).__name__
            return {
                "Model": self.plan.model + (f" at {self.plan.revision}" if self.plan.revision else ""),
                "Weights": self.pin.get("weights", ""),
                "Sampler": f"{scheduler}, {self.plan.steps} steps, guidance {self.plan.guidance:g}",
                **super().facts(),
            }
        m = self.opened.manifest
        return {
            "Lens": f"{m.name}, {self.pin['lens']} (model, autoencoder, probes and attributions)",
            "Model": m.base_model.id + (f" at {m.base_model.revision}" if m.base_model.revision else ""),
            "Sites": f"{m.hook_name}, sparse autoencoder {m.sae_id}",
            "Sampler": f"{m.scheduler}, {m.n_steps} steps, guidance {m.guidance_scale:g}",
            **super().facts(),
        }


@dataclass(frozen=True)
class Picture:
    """One image file of a table, and the seed and prompt that it is known by."""

    file: str
    prompt: str | None
    seed: int


@dataclass(frozen=True, eq=False)
class Pictures(Subject):
    """Images made elsewhere."""

    base: Path = Path()
    pictures: tuple[Picture, ...] = ()

    @property
    def can_draw(self) -> bool:
        """There is no model."""
        return False

    @cached_property
    def _by_prompt(self) -> dict[str | None, dict[int, Picture]]:
        found: dict[str | None, dict[int, Picture]] = {}
        for picture in self.pictures:
            found.setdefault(picture.prompt, {})[picture.seed] = picture
        return found

    def check_prompt(self, prompt: str | None) -> None:
        """Raise ``LensError`` where no image has this prompt."""
        if prompt not in self._by_prompt:
            known = ", ".join(f"'{p}'" for p in list(self._by_prompt)[:5] if p is not None) or "none"
            raise LensError(f"{self.name} has no image of the prompt '{prompt or ''}'; its prompts are {known}.")

    def seeds(self, prompt: str | None, wanted: Sequence[int]) -> tuple[int, ...]:
        """The images' own seeds, as many as are wanted."""
        return tuple(sorted(self._by_prompt.get(prompt, {})))[: len(wanted)]

    def count(self, prompt: str | None) -> int:
        """Images of one prompt."""
        return len(self._by_prompt.get(prompt, {}))

    def file(self, prompt: str | None, seed: int) -> str:
        """The name of an image's file."""
        return self._by_prompt[prompt][seed].file

    def measure(
        self,
        prompt: str | None,
        seeds: Sequence[int],
        edit: Edit | None,
        *,
        batch_size: int,
        progress: Progress | None,
        on_batch: OnBatch,
    ) -> tuple[Measurement, np.ndarray, tuple[str, ...]]:
        """Open and read; images of any sizes. A file that cannot be read is counted, and shows nobody."""
        noting, said = Noting(self.judge), []
        request = self.request(prompt, seeds)

        def parts() -> Iterator[Generation]:
            waiting: list[tuple[int, np.ndarray, Fault | None]] = []
            for place, seed in enumerate(seeds):
                pixels, fault, note = self._open(self.file(prompt, seed))
                if note:
                    said.append(note)
                if waiting and (waiting[0][1].shape != pixels.shape or len(waiting) == batch_size):
                    yield _generation(request, waiting)
                    waiting = []
                waiting.append((seed, pixels, fault))
                if progress is not None:
                    progress.step(place + 1, len(seeds))
            if waiting:
                yield _generation(request, waiting)

        found = read(parts(), request, noting, n_examples=0, on_batch=on_batch, allow_none=True)
        return found, np.concatenate(noting.faces), tuple(said)

    def request(self, prompt: str | None, seeds: Sequence[int]) -> GenerationRequest:
        """Which images are meant; nobody knows how they were drawn, so that steps and guidance mean nothing."""
        return GenerationRequest(prompt, tuple(seeds), 1, 0.0, self.name)

    def _open(self, name: str) -> tuple[np.ndarray, Fault | None, str]:
        """Pixels, what is wrong with them, and a sentence for the report where anything is to be said."""
        try:
            picture = open_picture(self.base / name, mend="it was counted as showing nobody")
        except LensError as error:
            return np.zeros((BLANK, BLANK, 3), np.uint8), "constant", str(error)
        return picture.pixels, find_constant([picture.pixels])[0], f"{name}: {picture.note}." if picture.note else ""

    def facts(self) -> dict[str, str]:
        """How many images, of which content, and who reads them."""
        return {
            "Images": f"{len(self.pictures)} files, content {self.pin['images']}",
            **super().facts(),
        }


def _generation(request: GenerationRequest, waiting: Sequence[tuple[int, np.ndarray, Fault | None]]) -> Generation:
    seeds = tuple(seed for seed, _, _ in waiting)
    images = np.stack([pixels for _, pixels, _ in waiting])
    return Generation(images, replace(request, seeds=seeds), faults=tuple(fault for _, _, fault in waiting))


def open_subject(plan: SubjectPlan, folder: Path, options: RunOptions) -> Subject:
    """Open what a plan names; ``folder``: where its files lie.

    Raises:
        LensError: it cannot be opened, or is another thing than the frozen plan pins.
    """
    if plan.lens:
        found: Subject = _open_lens(plan, folder, options)
    else:
        judge = open_judge(plan, folder, options.device)
        found = _open_model(plan, judge, folder, options) if plan.model else _open_images(plan, judge, folder)
    for name, value in plan.pin.items():
        if found.pin.get(name) != value:
            raise LensError(
                f"{plan.source} is no longer what was planned: its {name} is {found.pin.get(name)}, the plan says "
                f"{value}. Restore it, or plan anew into another folder."
            )
    return found


def _open_lens(plan: SubjectPlan, folder: Path, options: RunOptions) -> Drawn:
    lens = DiffusionLens.from_pretrained(_place(plan.lens, folder), options=options)
    judge: Classifier = open_judge(plan, folder, str(lens.device)) if plan.judge else lens.classifier
    return lens_subject(plan, lens, judge)


def lens_subject(plan: SubjectPlan, lens: DiffusionLens, judge: Classifier) -> Drawn:
    """An open lens as a subject, read by ``judge``."""
    pin = {"lens": lens_key(lens), "judge": judge.classifier_id}
    focus = tuple(a.name for a in lens.attributes if a.name in {b.name for b in judge.attributes})
    return Drawn(plan, plan.name or lens.manifest.name, judge, lens.prompts, focus, pin, lens)


def _open_model(plan: SubjectPlan, judge: Classifier, folder: Path, options: RunOptions) -> Drawn:
    made = Drawn(
        plan, plan.name or Path(plan.model).name, judge, (), tuple(a.name for a in judge.attributes), {}, None,
        options, folder,
    )  # fmt: skip
    stored = made.model.stored
    if made.model.is_text is False:
        object.__setattr__(made, "suggested", (None,))
    weights = "" if stored is None else _short(stored.digests())
    object.__setattr__(made, "pin", {"weights": weights, "judge": judge.classifier_id})
    return made


def _short(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def open_judge(plan: SubjectPlan, folder: Path, device: str) -> Classifier:
    """The judge that a plan names, with its error measured where labelled images are given."""
    text, place = plan.judge, _place(plan.judge, folder)
    path = Path(place)
    if (path / "lens.json").is_file():
        judge = open_classifier(path / "classifier", device=device)
    elif plan.labels or plan.detector:
        labels = read_json(folder / plan.labels) if plan.labels else None
        spec = named_spec(text, labels=labels, detector=plan.detector or None, revision=plan.revision or None)
        judge = build(spec, device=device)
    else:
        judge = open_classifier(place, device=device)
    if plan.error:
        judge = calibrate_from_folder(judge, folder / plan.error)  # type: ignore[type-var]
    return judge


def _place(source: str, folder: Path) -> str:
    """A folder beside the plan or where the command runs, a bundled lens by name, or what was given (a hub id)."""
    found = next((p for p in (folder / source, Path(source), assets_folder() / source) if p.exists()), None)
    return source if found is None else str(found)


def _open_images(plan: SubjectPlan, judge: Classifier, folder: Path) -> Pictures:
    base, pictures = list_pictures(folder / plan.images, plan.only)
    prompts = tuple(dict.fromkeys(picture.prompt for picture in pictures))
    content = hashlib.sha256()
    for picture in pictures:
        path = base / picture.file
        digest = sha256_of(path) if path.is_file() else ""
        content.update(f"{picture.file}\0{picture.prompt}\0{picture.seed}\0{digest}\n".encode())
    pin = {"images": content.hexdigest()[:16], "judge": judge.classifier_id}
    name = plan.name or plan.only or (folder / plan.images).stem
    return Pictures(plan, name, judge, prompts, tuple(a.name for a in judge.attributes), pin, base, pictures)


def list_pictures(path: Path, only: str = "") -> tuple[Path, tuple[Picture, ...]]:
    """The images of a folder (its ``images.csv`` says more of them), or of a CSV, and the folder that they lie in.

    Raises:
        LensError: no image, a table without a column ``file``, a row that repeats a file or a seed, a file outside.
    """
    if path.is_dir() and not (path / INDEX).is_file():
        if only:
            raise LensError(f"{path} has no {INDEX}, which alone tells images of one model from another's.")
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise LensError(f"There is no image in {path}; name a folder with PNG, JPEG or WebP files, or a CSV.")
        _check_many(len(files), path)
        return path, tuple(Picture(file, None, seed) for seed, file in enumerate(files))
    table_path = path / INDEX if path.is_dir() else path
    if not table_path.is_file():
        raise LensError(f"There are no images at {path}; name a folder of images, or a CSV with a column 'file'.")
    return table_path.parent, _rows(read_table(table_path), table_path, only)


def _rows(table: Table, path: Path, only: str) -> tuple[Picture, ...]:
    if "file" not in table.columns:
        raise LensError(f"{path.name} needs a column 'file'; its columns are {', '.join(table.columns)}.")
    if only and "model" not in table.columns:
        raise LensError(f"{path.name} has no column 'model', of which only '{only}' was asked for.")
    rows = [row for row in table.rows if not only or row.cells["model"] == only]
    if not rows:
        known = ", ".join(dict.fromkeys(row.cells.get("model", "") for row in table.rows))
        raise LensError(
            f"{path.name} names no image" + (f" of the model '{only}'; its models are {known}." if only else ".")
        )
    _check_many(len(rows), path)
    models = {row.cells.get("model", "") for row in rows}
    if len(models) > 1:
        raise LensError(
            f"{path.name} holds images of {len(models)} models ({', '.join(sorted(models)[:4])}); audit each as a "
            "subject of its own, with only = 'NAME'."
        )
    found: list[Picture] = []
    files: dict[str, int] = {}
    seeds: dict[tuple[str | None, int], int] = {}
    counts: dict[str | None, int] = {}
    root = path.parent.resolve()
    for row in rows:
        where, file = f"{path.name}, line {row.line}", row.cells["file"].replace("\\", "/")
        if not file:
            raise LensError(f"{where}: the cell 'file' is empty; name an image or delete the row.")
        if file in files:
            raise LensError(f"{where}: {file} stands in line {files[file]} too; keep one, or its image counts twice.")
        if not (path.parent / file).resolve().is_relative_to(root):
            raise LensError(f"{where}: {file} lies outside the CSV's folder; move the image beside the CSV.")
        files[file] = row.line
        text = row.cells.get("prompt", "")
        prompt = " ".join(text.split()) if text else None
        cell = row.cells.get("seed", "")
        seed = _seed(cell, where) if cell else counts.get(prompt, 0)
        counts[prompt] = max(counts.get(prompt, 0), seed) + 1
        if (prompt, seed) in seeds:
            raise LensError(
                f"{where}: seed {seed} of '{prompt or ''}' stands in line {seeds[prompt, seed]} too; mend the seeds, "
                "or leave the column out."
            )
        seeds[prompt, seed] = row.line
        found.append(Picture(file, prompt, seed))
    return tuple(found)


def models_in(path: Path) -> tuple[str, ...]:
    """The models that a CSV of images names, in order; one empty name where it has no such column."""
    table_path = path / INDEX if path.is_dir() else path
    if not table_path.is_file():
        return ("",)
    return tuple(dict.fromkeys(row.cells.get("model", "") for row in read_table(table_path).rows)) or ("",)


def _seed(cell: str, where: str) -> int:
    try:
        seed = as_whole(float(cell) if "." in cell else int(cell), "A seed")
    except ValueError:
        raise LensError(f"{where}: '{cell}' is no seed; write a whole number from 0 up.") from None
    if seed < 0:
        raise LensError(f"{where}: a seed is a whole number from 0 up; it is {cell}.")
    return seed


def _check_many(n: int, path: Path) -> None:
    if n > MAX_IMAGES:
        raise LensError(f"{path} holds {n:,} images; an audit takes up to {MAX_IMAGES:,}.")


def hardware(device: str) -> str:
    """The kind of machine that draws."""
    if device.startswith("cuda"):
        import torch

        return f"{device}, {torch.cuda.get_device_name(torch.device(device))}"
    return f"{device}, {platform.machine()}"


def versions() -> str:
    """This project, Python and the libraries that decide pixels and numbers."""
    own = sys.modules[__name__.partition(".")[0]].__version__
    libraries = (f"{name} {version(name)}" for name in PACKAGES)
    return ", ".join([f"diffusion-lens {own}", f"Python {platform.python_version()}", *libraries])
