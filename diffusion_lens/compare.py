"""The bench: every method on the same prompt and seeds, tuned alike on other seeds, judged by a classifier that no
method has seen. Resumable method by method, strength by strength.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, TypeAdapter, model_validator

from diffusion_lens.artifacts import read_json, write_json
from diffusion_lens.classify import Classifier
from diffusion_lens.compare_rows import RULE, Clock, MethodRow, Sight, choose, flag, look, measure_row, timed
from diffusion_lens.config import StrictConfig
from diffusion_lens.denoise import Edit
from diffusion_lens.generate import Capture, OnStep, generate, generate_batches, request
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.protocol import Fitted, Method, OpenLens, Target, lens_key, target_shares
from diffusion_lens.methods.registry import find_methods
from diffusion_lens.readers import ClipReader
from diffusion_lens.records import load_point, load_sweep, save_point, save_sweep, to_plain
from diffusion_lens.sweep import Baseline, collect, measure_baseline, sweep_points
from diffusion_lens.types import Attribute, GenerationRequest, LensError, SweepPoint, SweepResult

OnStage = Callable[[str, int, int], None]
UNSTEERED = "unsteered"
N_NORM = 16


class JudgedLens(OpenLens, Protocol):
    """A lens with its judge; methods get the same lens as an ``OpenLens``."""

    @property
    def classifier(self) -> Classifier:
        """The image classifier that judges."""

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """Suggested prompts."""


class CompareConfig(StrictConfig):
    """One table: an attribute, a prompt, and how much is drawn for each purpose.

    Attributes:
        methods: keys, or ``all``. n: images of the final row; ``n_tune``: images per strength of the tuning curve;
            ``n_fit``: images a method may be fitted on. The three use seeds of their own.
        fit_prompts: prompts of the fitting images; ``None``: the lens's suggested ones.
        approach: ``draw`` gives each image a class drawn from the target shares; ``shift`` pushes all images towards
            the rarest class and lets the strength find the balance; ``auto`` shifts two classes and draws among more.
            Methods that aim at shares, or at nothing, get the target shares either way.
        target: class → share that FD is measured from; ``None`` is uniform.
        options: method key → options, in place of its defaults.
    """

    attribute: str
    prompt: str | None
    methods: tuple[str, ...] = ("all",)
    n: int = Field(default=1000, ge=10, le=20_000)
    first_seed: int = 7_000_000
    n_tune: int = Field(default=96, ge=10, le=20_000)
    first_tune_seed: int = 8_000_000
    n_fit: int = Field(default=128, ge=4, le=20_000)
    first_fit_seed: int = 9_000_000
    fit_prompts: tuple[str | None, ...] | None = None
    approach: Literal["auto", "draw", "shift"] = "auto"
    target: dict[str, float] | None = None
    options: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"difflens": {"attribution": "fitted"}})
    batch_size: int = Field(default=16, ge=1)
    n_examples: int = Field(default=8, ge=0)

    @model_validator(mode="after")
    def _separate(self) -> CompareConfig:
        spans = sorted(
            ((self.first_seed, self.n), (self.first_tune_seed, self.n_tune), (self.first_fit_seed, self.n_fit))
        )
        if any(start + n > spans[i + 1][0] for i, (start, n) in enumerate(spans[:-1])):
            raise ValueError("final, tuning and fitting seeds must not overlap")
        return self

    def seeds(self, purpose: Literal["final", "tune", "fit"]) -> range:
        """The seeds of one purpose."""
        first, n = {
            "final": (self.first_seed, self.n),
            "tune": (self.first_tune_seed, self.n_tune),
            "fit": (self.first_fit_seed, self.n_fit),
        }[purpose]
        return range(first, first + n)


@dataclass(frozen=True)
class Comparison:
    """A finished table: the unsteered row first, then a row per method; curves are the tuning sweeps.

    ``labels`` name the features and stand-ins behind FID, IS and the two likenesses.
    """

    config: CompareConfig
    attribute: Attribute
    target: tuple[float, ...]
    rows: tuple[MethodRow, ...]
    curves: dict[str, SweepResult]
    labels: dict[str, str]
    rule: str
    lens_key: str
    classifier_id: str


class Bench:
    """One run of the bench, with what its methods share: unedited images, and the images that fits may use."""

    def __init__(
        self, lens: JudgedLens, config: CompareConfig, folder: Path, clip: ClipReader | None, on_stage: OnStage | None
    ) -> None:
        self.lens, self.config, self.clip, self.on_stage = lens, config, clip, on_stage
        found = [a for a in lens.classifier.attributes if a.name == config.attribute]
        if not found:
            known = ", ".join(a.name for a in lens.classifier.attributes)
            raise LensError(f"The classifier does not read '{config.attribute}'; it reads {known}.")
        self.attribute = found[0]
        even = {c: 1 / len(self.attribute.classes) for c in self.attribute.classes}
        self.target = target_shares(self.attribute, config.target or even)
        self.folder = folder / f"{config.attribute.replace(' ', '-')}-{self.identity[:10]}"

    @property
    def identity(self) -> str:
        """Names everything but the list of methods: results of equal identity belong to one table."""
        told = [self.config.model_dump_json(exclude={"methods"}), lens_key(self.lens)]
        told += [self.lens.classifier.classifier_id, "" if self.clip is None else self.clip.reader_id]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @cached_property
    def draws(self) -> Draws:
        """Images that fits may use."""
        prompts = self.config.fit_prompts or tuple(self.lens.prompts)
        manifest = self.lens.manifest
        return Draws(
            self.lens.model, prompts, self.config.seeds("fit"), manifest.n_steps, manifest.guidance_scale,
            batch_size=self.config.batch_size,
        )  # fmt: skip

    def request(self, purpose: Literal["final", "tune"]) -> GenerationRequest:
        """What is drawn for tuning, or for the final row."""
        manifest, seeds = self.lens.manifest, self.config.seeds(purpose)
        return request(self.lens.model, self.config.prompt, seeds, manifest.n_steps, manifest.guidance_scale)

    @cached_property
    def tuning(self) -> Baseline:
        """The unedited images of the tuning seeds."""
        return measure_baseline(
            self.lens.model, self.request("tune"), self.lens.classifier, batch_size=self.config.batch_size,
            n_examples=self.config.n_examples, on_step=self.step("tuning images"),
        )  # fmt: skip

    @cached_property
    def unsteered(self) -> tuple[Sight, float]:
        """The unedited images of the final seeds, and seconds per image."""
        return self.draw(None, "unsteered images")[:2]

    @cached_property
    def prompt_rows(self) -> np.ndarray:
        """What stands for the prompt: CLIP's text embedding, or the mean features of its unedited tuning images."""
        if self.clip is not None and self.config.prompt:
            return self.clip.embed_texts([self.config.prompt])
        return self.tuning.reading.features.mean(axis=0, keepdims=True)

    def draw(self, edit: Edit | None, stage: str) -> tuple[Sight, float, bool]:
        """Draw and look at the final seeds → what was seen, seconds per image, whether |h'| was measured on the way."""
        clock = Clock()
        parts = generate_batches(
            self.lens.model, self.request("final"), edit=edit, batch_size=self.config.batch_size,
            on_step=self.step(stage),
        )  # fmt: skip
        embed = None if self.clip is None or not self.config.prompt else self.clip.embed_images
        sight = look(timed(parts, clock), self.lens.classifier, embed, self.config.n_examples)
        return sight, clock.seconds / self.config.n, clock.saw_ratio

    def step(self, stage: str) -> OnStep | None:
        """Progress of one stage."""
        report = self.on_stage
        return None if report is None else lambda done, total: report(stage, done, total)

    def goal(self, method: Method) -> Target:
        """What a method is fitted to; see ``CompareConfig.approach``."""
        classes = self.attribute.classes
        shift = self.config.approach == "shift" or (self.config.approach == "auto" and len(classes) == 2)
        if method.aim == "class" and shift:
            gap = np.array(self.target) - _shares(self.tuning.reading.predictions[self.attribute.name].counts)
            return classes[int(gap.argmax())]
        return dict(zip(classes, self.target, strict=True))

    def fit(self, method: Method) -> Fitted:
        """The fitted method, read back where it is stored."""
        folder = self.folder / method.key / "fitted"
        if (folder / "method.json").is_file():
            return method.load(folder, self.lens)
        values = self.config.options.get(method.key, {})
        options = method.options.parse(values, where=f"the options of {method.name}")
        fitted = method.fit(
            self.lens, self.attribute.name, self.goal(method), options, prompts=self.draws.prompts,
            seeds=self.draws.seeds, draws=self.draws, on_step=self.step(f"{method.name}: fitting"),
        )  # fmt: skip
        fitted.save(folder)
        return fitted

    def curve(self, method: Method, fitted: Fitted) -> SweepResult:
        """The tuning sweep over the method's own strengths and 0, read back where it is stored."""
        folder = self.folder / method.key / "curve"
        seeds = self.config.seeds("tune")
        points: list[SweepPoint] = []
        goal = dict(zip(self.attribute.classes, self.target, strict=True))
        label = self.attribute.classes[int(np.argmax(fitted.record.target))]
        for number, strength in enumerate((0.0, *method.strengths)):
            stem = f"{number:03d}"
            if not (folder / f"{stem}.json").is_file():
                (point,) = sweep_points(
                    self.lens.model, self.tuning.request, lambda s: fitted.edit(s, seeds) if s else None, [strength],
                    self.lens.classifier, self.attribute, label, baseline=self.tuning, target_shares=goal,
                    batch_size=self.config.batch_size, n_examples=self.config.n_examples,
                    on_step=self.step(f"{method.name}: {method.strength_name} {strength:g}"),
                )  # fmt: skip
                save_point(point, folder, stem)
            points.append(load_point(folder, stem))
        return collect(
            points, attribute=self.attribute, target=label, request=self.request("tune"), setting=method.name,
            classifier_id=self.lens.classifier.classifier_id, is_control=method.is_control,
            provenance={"method": method.key, "fitted": fitted.digest, "strength": method.strength_name},
        )  # fmt: skip

    def row(self, method: Method) -> tuple[MethodRow, SweepResult | None]:
        """Fit, tune and measure one method; a method that this lens cannot run gives a row that says why."""
        path, own = self.folder / method.key / "row.json", self.folder / method.key
        if path.is_file():
            row = TypeAdapter(MethodRow).validate_python(read_json(path))
            return row, None if row.note else load_sweep(own, "sweep")
        told: dict[str, Any] = {
            "method": method.key, "name": method.name, "kind": method.kind, "is_control": method.is_control,
            "strength_name": method.strength_name, "n_tune": self.config.n_tune,
        }  # fmt: skip
        try:
            fitted = self.fit(method)
            curve = self.curve(method, fitted)
        except LensError as error:
            row = MethodRow(**told, goal="", strength=0.0, n=0, n_uncertain=0, note=str(error))
            write_json(path, to_plain(row))
            return row, None
        row = self._final(fitted, choose(curve.points).beta, told)
        save_sweep(curve, own, "sweep")
        write_json(path, to_plain(row))
        return row, curve

    def _final(self, fitted: Fitted, strength: float, told: dict[str, Any]) -> MethodRow:
        edit = fitted.edit(strength, self.config.seeds("final")) if strength else None
        base, base_seconds = self.unsteered
        sight, seconds, measured = (base, base_seconds, True)
        if edit is not None:
            sight, seconds, measured = self.draw(edit, f"{fitted.method.name}: final images")
        classes = zip(fitted.record.classes, fitted.record.target, strict=True)
        row = measure_row(
            sight, base, self.prompt_rows, self.attribute, self.lens.classifier.confusion[self.attribute.name],
            np.array(self.target), goal=", ".join(f"{c} {s:.0%}" for c, s in classes if s), strength=strength,
            seconds_to_fit=fitted.record.seconds, seconds_per_image=seconds, **told,
        )  # fmt: skip
        return row if measured or edit is None else flag(row, self.norm_ratio(edit))

    def norm_ratio(self, edit: Edit) -> float:
        """Mean ``|h| / |h unedited|`` at the end of every step, for edits that change the model and not h itself."""
        few = replace(self.request("final"), seeds=self.request("final").seeds[:N_NORM])
        runs = [
            generate(self.lens.model, few, edit=e, capture=Capture(dtype=np.float32), batch_size=self.config.batch_size)
            for e in (edit, None)
        ]
        sizes = [np.linalg.norm(r.activations.h.reshape(*r.activations.h.shape[:2], -1), axis=2) for r in runs
                 if r.activations is not None]  # fmt: skip
        return float((sizes[0] / np.maximum(sizes[1], 1e-12)).mean())

    def unsteered_row(self) -> MethodRow:
        """The unedited images in the same table."""
        path = self.folder / UNSTEERED / "row.json"
        if not path.is_file():
            sight, seconds = self.unsteered
            row = measure_row(
                sight, sight, self.prompt_rows, self.attribute, self.lens.classifier.confusion[self.attribute.name],
                np.array(self.target), method=UNSTEERED, name="No steering", kind="", is_control=False, goal="",
                strength=0.0, strength_name="", n_tune=0, seconds_to_fit=0.0, seconds_per_image=seconds,
            )  # fmt: skip
            write_json(path, to_plain(row))
        return TypeAdapter(MethodRow).validate_python(read_json(path))

    def labels(self) -> dict[str, str]:
        """What the numbers are measured in."""
        judge = "the image classifier's features"
        likeness = ("CLIP-I", "CLIP-T") if self.clip is not None and self.config.prompt else (
            f"(cos + 1) / 2 of {judge}, with and without the edit",
            f"(cos + 1) / 2 of {judge} and their mean over unedited images of the prompt on other seeds",
        )  # fmt: skip
        return {
            "fid": f"Fréchet distance to the unedited images of the same seeds, {judge}",
            "inception": "Inception score, mean over the image classifier's heads of the other attributes",
            "image_likeness": likeness[0],
            "prompt_likeness": likeness[1],
        }


def run_compare(
    lens: JudgedLens,
    config: CompareConfig,
    folder: Path,
    *,
    clip: ClipReader | None = None,
    on_stage: OnStage | None = None,
) -> Comparison:
    """Fill the table of one attribute. ``folder`` keeps every finished piece, so a stopped run goes on where it was.

    Args:
        clip: measures CLIP-I and CLIP-T on real models; without it their named stand-ins are measured.
        on_stage: called with (stage, done, total); may raise ``Cancelled``.

    Raises:
        LensError: before anything is drawn, for unknown methods, options or attributes.
    """
    methods = find_methods(config.methods)
    for key, values in config.options.items():
        (method,) = find_methods([key])
        method.options.parse(values, where=f"the options of {method.name}")
    bench = Bench(lens, config, folder, clip, on_stage)
    rows, curves = [bench.unsteered_row()], {}
    for method in methods:
        row, curve = bench.row(method)
        rows.append(row)
        if curve is not None:
            curves[method.key] = curve
    return Comparison(
        config, bench.attribute, bench.target, tuple(rows), curves, bench.labels(), RULE, lens_key(lens),
        lens.classifier.classifier_id,
    )  # fmt: skip


def planned_images(config: CompareConfig) -> int:
    """Images that a whole table draws at most: for the final rows, the curves and the fits."""
    methods = find_methods(config.methods)
    curves = sum(len(method.strengths) for method in methods)
    return config.n * (len(methods) + 1) + config.n_tune * (curves + 1) + config.n_fit


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / max(1, int(counts.sum()))
