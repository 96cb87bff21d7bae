"""What every method of the bench is: declared options, a fit on a lens, and edits of any strength.

``method.fit(lens, attribute, target, options, prompts=…, seeds=…)`` gives a ``Fitted``, whose ``edit(strength)``
is an ``Edit``.
Strength 0 is the identity, bit for bit, for every method. No method is given the classifier that judges: ``OpenLens``
has none, and classes of images are read with the lens's probes. Those may have learned from that same classifier's
labels, and know its mistakes; ``Manifest.judged_apart`` says whether another one labelled.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import load_tensors, save_tensors
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Atlas, Attribute, Attribution, EditSpec, FittedMethod, LensError
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.edits import gated
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.manifest import Manifest, Setting

Kind = Literal[
    "SAE features", "neurons", "direction", "direction per step", "guidance", "weights", "bypass", "control"
]  # fmt: skip
Aim = Literal["class", "distribution", "none"]
Target = str | Mapping[str, float]

RECORD_FILE = "method.json"
TENSORS_FILE = "method.safetensors"
MAX_STRENGTH = 1e6
SINCE_0_5: dict[str, Any] = {"since": "0.5"}
"""Marks an option that version 0.4 did not have: left at its default it is not told, so that old edits are found."""


class OpenLens(Protocol):
    """The parts of a lens that a method may use: everything but the image classifier."""

    @property
    def manifest(self) -> Manifest:
        """What the lens holds and how its images are made."""

    @property
    def model(self) -> DiffusionModel:
        """The diffusion model."""

    @property
    def sae(self) -> SparseAutoencoder:
        """The sparse autoencoder of the bottleneck."""

    @property
    def probes(self) -> dict[str, Probe]:
        """Attribute → per-step probe."""

    @property
    def attributions(self) -> dict[str, Attribution]:
        """Attribute → shipped attribution."""

    @property
    def atlas(self) -> Atlas:
        """Map and densities of all features."""

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Attribute → how the lens steers it."""


class MethodOptions(StrictConfig):
    """Options that every method has; fields carry title and description, so that an interface can draw them."""

    gate: bool = Field(
        False,
        title="Leave explicit prompts alone",
        description="Prompts that name a class themselves are not edited.",
        json_schema_extra=SINCE_0_5,
    )
    draw_seed: int = Field(0, ge=0, title="Seed of the class draw", description="Decides each image's class.")

    def told(self) -> dict[str, Any]:
        """The options as plain JSON values, as records keep them: newer ones (``SINCE_0_5``) only where they differ."""
        values = self.model_dump(mode="json")
        new = {n: f for n, f in type(self).model_fields.items() if f.json_schema_extra == SINCE_0_5}
        return {n: v for n, v in values.items() if n not in new or getattr(self, n) != new[n].default}


@dataclass(frozen=True)
class Preset:
    """A named set of options, such as the published ones; ``differs`` says in a line what it is and what it is not."""

    options: Mapping[str, Any]
    differs: str


class FittedRecord(StrictConfig):
    """Where a fitted method comes from: everything but its tensors."""

    format_version: Literal[1] = 1
    method: str
    lens_key: str
    attribute: str
    classes: tuple[str, ...]
    target: tuple[float, ...]
    options: dict[str, Any]
    prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    seconds: float
    notes: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Task:
    """One fit: what a method's ``learn`` gets. ``shares`` is the target distribution ``[class]``."""

    lens: OpenLens
    attribute: Attribute
    shares: tuple[float, ...]
    options: Any
    draws: Draws
    progress: Progress

    def parts(self, work: int) -> list[Progress]:
        """The bar of the drawing that is left, and of ``work`` units, each about as long as a denoising step."""
        return self.progress.parts((self.draws.steps_left, work))

    @property
    def model(self) -> DiffusionModel:
        """The lens's diffusion model."""
        return self.lens.model

    @property
    def probe(self) -> Probe:
        """The probe of the steered attribute, on the model's device."""
        return probe_of(self.lens, self.attribute.name)

    @property
    def wanted(self) -> tuple[int, ...]:
        """Classes with a share in the target."""
        return tuple(i for i, share in enumerate(self.shares) if share > 0)


@dataclass(frozen=True, eq=False)
class Learned:
    """What a fit found: ``tensors`` to keep, and ``notes`` (plain JSON values) to show."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method fitted to a lens, an attribute and a target; makes edits of any strength."""

    method: Method
    lens: OpenLens
    record: FittedRecord
    tensors: Mapping[str, Tensor]

    @property
    def attribute(self) -> Attribute:
        """The steered attribute."""
        return Attribute(self.record.attribute, self.record.classes)

    @cached_property
    def options(self) -> Any:
        """The method's own options."""
        return self.method.options.parse(self.record.options, where=f"the options of {self.method.name}")

    @cached_property
    def digest(self) -> str:
        """12 hex digits over everything that decides the edits, save their strength."""
        told = self.record.model_dump_json(exclude={"seconds", "notes"})
        digest = hashlib.sha256(told.encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def edit(self, strength: float) -> Edit:
        """The edit of this strength; 0 changes nothing, bit for bit. What it does to an image its own seed decides."""
        if not np.isfinite(strength) or abs(strength) > MAX_STRENGTH:
            raise LensError(f"A strength is a finite number up to {MAX_STRENGTH:g}; it is {strength}.")
        made = self.method.build(self, float(strength))
        return gated(made, self.attribute) if self.options.gate and strength else made

    def spec(self, strength: float) -> EditSpec:
        """The edit of this strength as data: everything but the tensors, which its digest names."""
        record = self.record
        method = FittedMethod(
            record.method, self.method.name, record.lens_key, record.attribute, record.classes, record.target,
            tuple(sorted(record.options.items())), record.prompts, record.seeds, self.digest,
        )  # fmt: skip
        return EditSpec(method=method, strength=float(strength))

    def save(self, folder: Path) -> None:
        """Write ``method.json`` and, where there are tensors, ``method.safetensors``."""
        if self.tensors:
            save_tensors(folder / TENSORS_FILE, self.tensors, {"digest": self.digest})
        self.record.save(folder / RECORD_FILE)


class Method(ABC):
    """One way of steering.

    Attributes:
        key: its name on the command line. name: as shown. kind: what it edits.
        source, explanation: shown beside it; the explanation names its source and says what is our working form.
        options: the declared options. strengths: a grid for tuning, 0 left out; ``strength_name`` says what it is.
        aim: ``class`` steers each image to a class drawn for it, ``distribution`` pushes the whole set towards
            the target shares, ``none`` aims at no class.
        limit: the largest strength that it takes.
        presets: name → options worth starting from, the published ones first.
    """

    key: ClassVar[str]
    name: ClassVar[str]
    kind: ClassVar[Kind]
    source: ClassVar[str]
    explanation: ClassVar[str]
    options: ClassVar[type[MethodOptions]]
    strengths: ClassVar[tuple[float, ...]]
    strength_name: ClassVar[str] = "strength"
    limit: ClassVar[float] = MAX_STRENGTH
    aim: ClassVar[Aim] = "class"
    is_control: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Preset]] = {}

    @abstractmethod
    def learn(self, task: Task) -> Learned:
        """Whatever has to be found before any edit."""

    @abstractmethod
    def build(self, fitted: Fitted, strength: float) -> Edit:
        """The edit of one strength."""

    def fit(
        self,
        lens: OpenLens,
        attribute: str,
        target: Target,
        options: MethodOptions | None = None,
        *,
        prompts: Sequence[str | None],
        seeds: Sequence[int],
        progress: Progress | None = None,
        draws: Draws | None = None,
    ) -> Fitted:
        """Fit to a lens.

        Args:
            target: a class that every image is steered to, or class → share.
            prompts, seeds: the images a fit may draw, one per seed, shared out over the prompts.
            progress: of drawing and learning; may be cancelled.
            draws: those images if they are drawn already; ``seconds`` counts their drawing all the same.

        Raises:
            LensError: an attribute without a probe, an impossible target, foreign options or draws.
        """
        options = self.options.model_validate({}) if options is None else options
        if not isinstance(options, self.options):
            raise LensError(f"{self.name} takes {self.options.__name__}, not {type(options).__name__}.")
        found = probe_of(lens, attribute).attribute
        draws = draws or Draws(lens.model, prompts, seeds, lens.manifest.n_steps, lens.manifest.guidance_scale)
        draws.check(lens.model, prompts, seeds)
        task = Task(lens, found, target_shares(found, target), options, draws, progress or Progress())
        drawn_before, uses, begin = draws.seconds, draws.uses, time.perf_counter()
        learned = self.learn(task)
        seconds = time.perf_counter() - begin + (drawn_before if draws.uses > uses else 0.0)
        record = FittedRecord(
            method=self.key, lens_key=lens_key(lens), attribute=found.name, classes=found.classes,
            target=task.shares, options=options.told(), prompts=draws.prompts, seeds=draws.seeds,
            seconds=seconds, notes=dict(learned.notes),
        )  # fmt: skip
        tensors = {name: t.detach().cpu().contiguous() for name, t in learned.tensors.items()}
        return Fitted(self, lens, record, tensors)

    def load(self, folder: Path, lens: OpenLens) -> Fitted:
        """Read what ``Fitted.save`` wrote; raises ``LensError`` for another method's or another lens's."""
        record = FittedRecord.load(folder / RECORD_FILE)
        if record.method != self.key:
            raise LensError(f"{folder} holds the method '{record.method}', not '{self.key}'.")
        if record.lens_key != lens_key(lens):
            raise LensError(f"{folder} was fitted to another lens; fit {self.name} again.")
        path = folder / TENSORS_FILE
        tensors = {k: torch.from_numpy(v) for k, v in load_tensors(path).items()} if path.is_file() else {}
        return Fitted(self, lens, record, tensors)


def probe_of(lens: OpenLens, attribute: str) -> Probe:
    """The lens's probe of an attribute, on the model's device; raises ``LensError`` that lists them."""
    if attribute not in lens.probes:
        raise LensError(f"This lens does not steer '{attribute}'; it steers {', '.join(lens.probes)}.")
    return lens.probes[attribute].to(lens.model.device)


def target_shares(attribute: Attribute, target: Target) -> tuple[float, ...]:
    """A target as shares ``[class]``; a class name means all of it."""
    if isinstance(target, str):
        wanted = attribute.index(target)
        return tuple(float(i == wanted) for i in range(len(attribute.classes)))
    for label in target:
        attribute.index(label)
    shares = tuple(float(target.get(label, 0.0)) for label in attribute.classes)
    if min(shares) < 0 or not np.isclose(sum(shares), 1):
        raise LensError(f"The target shares of {attribute.name} must be 0 or more and add up to 1.")
    return shares


def lens_key(lens: OpenLens) -> str:
    """16 hex digits that name what methods are fitted to: model, SAE, probes, attributions, steps and hook.

    Results stored in a lens later (sweeps, comparisons) do not change it.
    """
    manifest = lens.manifest
    core = ("pipeline/", "sae/", "probes.", "attribution.")
    told = [manifest.base_model.id, manifest.base_model.revision, manifest.hook_name, manifest.n_steps, manifest.sae_id]
    told += sorted(f"{name} {seal.sha256}" for name, seal in manifest.files.items() if name.startswith(core))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
