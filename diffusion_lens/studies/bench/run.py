"""The bench: every method on the same prompt and seeds, tuned alike on other seeds, judged by the lens's classifier.

All methods see the same images while fitting, of the prompt that is compared, and are drawn at balance: what they keep
there can be ranked, what they keep at some strength of a grid cannot. No method is given the judge; whether the probes
that methods do use learned from its labels, the lens says. Resumable method by method, strength by strength.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.base.workspace import Workspace, digest
from diffusion_lens.judging.readers import ClipReader
from diffusion_lens.measuring.observe import observe
from diffusion_lens.measuring.sweep import sweep_points
from diffusion_lens.methods.protocol import Fitted, Method, Target, lens_key, target_shares
from diffusion_lens.methods.registry import find_methods
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.generate import Capture, generate, request
from diffusion_lens.results import metrics
from diffusion_lens.results.comparison import (
    BALANCE_RULE,
    RULE,
    UNSTEERED,
    CompareConfig,
    Comparison,
    Measured,
    MethodRow,
    ranked,
)
from diffusion_lens.results.comparison_store import row_of, row_values
from diffusion_lens.results.measurement import Figures, Measurement
from diffusion_lens.results.measurement_files import Missing, measured_beside, save_measured
from diffusion_lens.results.records import load_point, load_sweep, save_point, save_sweep
from diffusion_lens.results.stats import share_interval
from diffusion_lens.results.sweeps import SweepPoint, SweepResult, collect
from diffusion_lens.studies.bench.prompted import drawn_features, explicit_prompts
from diffusion_lens.studies.bench.rows import Run, choose, further_strength, measure_row, nearest_place
from diffusion_lens.studies.bench.shared import JudgedLens, Shared

__all__ = [
    "Bench", "CompareConfig", "Comparison", "JudgedLens", "Shared", "run_compare", "run_tables",
]  # fmt: skip

N_NORM = 16
FITTED = "fitted"
"""The piece that holds a fitted method."""


def point_name(strength: float) -> str:
    """The piece that holds one point of a method's curve."""
    return f"curve-{strength:g}"


def rounded(strength: float) -> float:
    """A strength with four digits: what is written is what was drawn."""
    return float(f"{strength:.4g}")


def row_name(method: Method) -> str:
    """The piece that holds a method's row and curve: other strengths make another."""
    return f"row-{digest(method.strengths)}"


class Bench:
    """One table in the making: methods are fitted, tuned and measured on what ``shared`` holds."""

    def __init__(self, shared: Shared, config: CompareConfig, folder: Path) -> None:
        self.shared, self.config, self.lens = shared, config, shared.lens
        found = [a for a in self.lens.classifier.attributes if a.name == config.attribute]
        if not found:
            known = ", ".join(a.name for a in self.lens.classifier.attributes)
            raise LensError(f"The classifier does not read '{config.attribute}'; it reads {known}.")
        self.attribute = found[0]
        even = {c: 1 / len(self.attribute.classes) for c in self.attribute.classes}
        self.target = target_shares(self.attribute, config.target or even)
        self.pieces = Workspace(folder).part(config.attribute.replace(" ", "-"), self.identity)

    @property
    def identity(self) -> tuple[str, ...]:
        """Names everything but the list of methods: results of equal identity belong to one table."""
        return (self.config.model_dump_json(exclude={"methods"}), *self.shared.identity)

    def goal(self, method: Method) -> Target:
        """What a method is fitted to; see ``CompareConfig.approach``."""
        classes = self.attribute.classes
        shift = self.config.approach == "shift" or (self.config.approach == "auto" and len(classes) == 2)
        if method.aim == "class" and shift:
            gap = np.array(self.target) - np.nan_to_num(self.shared.tuning.measurement.shares_read[self.attribute.name])
            return classes[int(gap.argmax())]
        return dict(zip(classes, self.target, strict=True))

    def fit(self, method: Method) -> Fitted:
        """The fitted method, made once."""
        return self.pieces.part(method.key).piece(
            FITTED, partial(self._fit, method), lambda path, fitted: fitted.save(path),
            lambda path: method.load(path, self.lens),
        )  # fmt: skip

    def _fit(self, method: Method) -> Fitted:
        values = self.config.options.get(method.key, {})
        options = method.options.parse(values, where=f"the options of {method.name}")
        return method.fit(
            self.lens, self.attribute.name, self.goal(method), options, prompts=self.shared.draws.prompts,
            seeds=self.shared.draws.seeds, draws=self.shared.draws,
            progress=self.shared.stage(f"{method.name}: fitting"),
        )  # fmt: skip

    def curve(self, method: Method, fitted: Fitted) -> SweepResult:
        """The tuning sweep over the method's own strengths and 0, every point made once."""
        goal = dict(zip(self.attribute.classes, self.target, strict=True))
        label = self.attribute.classes[int(np.argmax(fitted.record.target))]

        def measure(strength: float) -> SweepPoint:
            (point,) = sweep_points(
                self.lens.model, self.shared.tuning.request, lambda s: fitted.edit(s) if s else None,
                [strength], self.lens.classifier, self.attribute, label, baseline=self.shared.tuning,
                target_shares=goal, batch_size=self.config.batch_size, n_examples=self.config.n_examples,
                progress=self.shared.stage(f"{method.name}: {method.strength_name} {strength:g}"),
            )  # fmt: skip
            return point

        pieces = self.pieces.part(method.key)

        def at(strength: float) -> SweepPoint:
            return pieces.piece(point_name(strength), partial(measure, strength), save_point, load_point)

        points = [at(strength) for strength in (0.0, *method.strengths)]
        if self.config.protocol == "balance":
            points = self._finer(self._further(points, method, at), at)
        return collect(
            points, target=label, setting=method.name, is_control=method.is_control,
            provenance={"method": method.key, "fitted": fitted.digest, "strength": method.strength_name},
        )  # fmt: skip

    def _further(self, points: list[SweepPoint], method: Method, at: Callable[[float], SweepPoint]) -> list[SweepPoint]:
        """The curve drawn on until it meets the target, turns, or has had its ``n_further``."""
        for _ in range(self.config.n_further):
            strength = further_strength(points, self.target, method.limit)
            if strength is None:
                break
            points = [*points, at(strength)]
        return points

    def _finer(self, points: list[SweepPoint], at: Callable[[float], SweepPoint]) -> list[SweepPoint]:
        """The curve with the place nearest to the target measured, and again as it moves."""
        for _ in range(self.config.n_refine):
            place = nearest_place(points, self.target)
            strength, (low, high) = rounded(place.strength), place.between
            if high == low or min(strength - low, high - strength) <= 0.05 * (high - low):
                break
            points = [*points, at(strength)]
        return points

    def strength_of(self, curve: SweepResult) -> tuple[float, bool | None]:
        """The strength that is drawn on the final seeds, and whether the curve meets the target there."""
        if self.config.protocol == "points":
            return choose(curve.points).beta, None
        place = nearest_place(curve.points, self.target)
        return rounded(place.strength), place.reached

    def explicit(self, method: Method | None, edit: Edit | None) -> Measured | None:
        """Share of images of prompts that name a class which show it, with the edit on; ``None`` where none is drawn.

        A class per prompt, the same seeds for every method. Undecided images do not show it.
        """
        config, lens = self.config, self.lens
        asked = explicit_prompts(lens, config.prompt, self.attribute) if config.n_explicit else {}
        if not asked:
            return None
        seeds = config.seeds("explicit")
        shown: list[bool] = []
        for place, (label, prompt) in enumerate(asked.items()):
            own = seeds[place :: len(asked)]
            wanted = request(lens.model, prompt, own, lens.manifest.n_steps, lens.manifest.guidance_scale)
            who = "unsteered" if method is None else method.name
            try:
                read = observe(
                    lens.model, wanted, edit, lens.classifier, batch_size=config.batch_size, n_examples=0,
                    progress=self.shared.stage(f"{who}: {prompt}"),
                ).readings[self.attribute.name]  # fmt: skip
            except LensError:
                return None
            shown += (read.certain & (read.labels == self.attribute.index(label))).tolist()
        low, high = share_interval(sum(shown), len(shown))
        return Measured(sum(shown) / len(shown), (low, high))

    def finished(self, method: Method) -> tuple[MethodRow, SweepResult | None] | None:
        """The method's stored row and curve; None where there is none at its strengths."""
        pieces, key = self.pieces.part(method.key), row_name(method)
        return self._load_row(pieces.path(key)) if pieces.has(key) else None

    def _save_row(self, folder: Path, made: tuple[MethodRow, SweepResult | None]) -> None:
        row, curve = made
        if row.figures is None:
            write_json(folder / "row.json", row_values(row))
        else:
            save_measured(folder, "row", row_values(row), [row.figures.measurement])
        if curve is not None:
            save_sweep(curve, folder, "sweep", lossless=True)

    def _load_row(self, folder: Path) -> tuple[MethodRow, SweepResult | None]:
        values = read_json(folder / "row.json")
        if not values["measured"]:
            return row_of(values, None), None
        (measured,) = measured_beside(values, folder, "row")
        curve = load_sweep(folder, "sweep", Missing({})) if (folder / "sweep.json").is_file() else None
        return row_of(values, self._figures(measured)), curve

    def _figures(self, measured: Measurement) -> Figures:
        return measured.figures(self.attribute.name, self.target)

    def row(self, method: Method) -> tuple[MethodRow, SweepResult | None]:
        """Fit, tune and measure one method; a method that this lens cannot run gives a row that says why."""
        make = partial(self._make_row, method)
        return self.pieces.part(method.key).piece(row_name(method), make, self._save_row, self._load_row)

    def _make_row(self, method: Method) -> tuple[MethodRow, SweepResult | None]:
        fields: dict[str, Any] = {
            "method": method.key, "name": method.name, "kind": method.kind, "is_control": method.is_control,
            "strength_name": method.strength_name, "n_tune": self.config.n_tune,
        }  # fmt: skip
        try:
            fitted = self.fit(method)
            curve = self.curve(method, fitted)
        except LensError as error:
            return MethodRow(**fields, goal="", strength=0.0, note=str(error)), None
        strength, reached = self.strength_of(curve)
        return self._final(fitted, strength, {**fields, "reached": reached}), curve

    def _final(self, fitted: Fitted, strength: float, fields: dict[str, Any]) -> MethodRow:
        edit = fitted.edit(strength) if strength else None
        run = base = self.shared.unsteered
        if edit is not None:
            run = self.shared.draw("final", edit, f"{fitted.method.name}: final images", base.measurement)
        norm_ratio = None if run.saw_edit or edit is None else self.norm_ratio(edit)
        classes = zip(fitted.record.classes, fitted.record.target, strict=True)
        return self._measure(
            run, goal=", ".join(f"{c} {s:.0%}" for c, s in classes if s), strength=strength, norm_ratio=norm_ratio,
            seconds_to_fit=fitted.record.seconds, explicit=self.explicit(fitted.method, edit), **fields,
        )  # fmt: skip

    def _measure(self, run: Run, **fields: Any) -> MethodRow:
        base = self.shared.unsteered
        figures = self._figures(run.measurement if run is not base else base.measurement.against(base.measurement))
        row = measure_row(run, base, self.shared.prompt_rows, figures, **fields)
        features, drawn = run.measurement.features, self.drawn_features
        if features is None or drawn is None or len(features) < metrics.MIN_FRECHET:
            return row
        return replace(row, quality=metrics.frechet_distance(drawn, features))

    @cached_property
    def drawn_features(self) -> np.ndarray | None:
        """The judge's features of drawings of the prompt that show the target shares; ``None`` for other worlds."""
        return drawn_features(self.lens, self.config.prompt, self.attribute, self.target)

    def norm_ratio(self, edit: Edit) -> float:
        """Mean ``|h| / |h unedited|`` at the end of every step, for edits that change the model and not h itself."""
        few = replace(self.shared.request("final"), seeds=self.shared.request("final").seeds[:N_NORM])
        runs = [
            generate(self.lens.model, few, edit=e, capture=Capture(dtype=np.float32), batch_size=self.config.batch_size)
            for e in (edit, None)
        ]
        sizes = [np.linalg.norm(r.activations.h.reshape(*r.activations.h.shape[:2], -1), axis=2) for r in runs
                 if r.activations is not None]  # fmt: skip
        return float((sizes[0] / np.maximum(sizes[1], 1e-12)).mean())

    def unsteered_row(self) -> MethodRow:
        """The unedited images in the same table."""

        def make() -> tuple[MethodRow, None]:
            return self._measure(
                self.shared.unsteered, method=UNSTEERED, name="No steering", kind="", is_control=False, goal="",
                strength=0.0, strength_name="", n_tune=0, seconds_to_fit=0.0, explicit=self.explicit(None, None),
            ), None  # fmt: skip

        return self.pieces.piece(UNSTEERED, make, self._save_row, self._load_row)[0]

    def labels(self) -> dict[str, str]:
        """What the numbers are measured in."""
        judge = "the image classifier's features"
        likeness = ("CLIP-I", "CLIP-T") if self.shared.clip is not None and self.config.prompt else (
            f"(cos + 1) / 2 of {judge}, with and without the edit",
            f"(cos + 1) / 2 of {judge} and their mean over unedited images of the prompt on other seeds",
        )  # fmt: skip
        return {
            "quality": f"Fréchet distance to drawings of the prompt with the target shares, {judge}",
            "explicit": "images of prompts that name a class which show it, without the gate; with it, unedited",
            "fid": f"Fréchet distance to the unedited images of the same seeds, {judge}",
            "inception": "Inception score, mean over the image classifier's heads of the other attributes",
            "image_likeness": likeness[0],
            "prompt_likeness": likeness[1],
        }


OnRow = Callable[[str, MethodRow], None]


def run_compare(
    lens: JudgedLens,
    config: CompareConfig,
    folder: Path,
    *,
    clip: ClipReader | None = None,
    progress: Progress | None = None,
    on_row: OnRow | None = None,
) -> Comparison:
    """Fill the table of one attribute. ``folder`` keeps every finished piece, so a stopped run goes on where it was.

    Args:
        clip: measures CLIP-I and CLIP-T on real models; without it their named stand-ins are measured.
        progress: tells what is made by name; may be cancelled.
        on_row: called with (attribute, row) after every method.

    Raises:
        LensError: before anything is drawn, for unknown methods, options or attributes.
    """
    return run_tables(lens, [config], folder, clip=clip, progress=progress, on_row=on_row)[config.attribute]


def run_tables(
    lens: JudgedLens,
    configs: Sequence[CompareConfig],
    folder: Path,
    *,
    clip: ClipReader | None = None,
    progress: Progress | None = None,
    on_row: OnRow | None = None,
) -> dict[str, Comparison]:
    """``run_compare`` for several attributes; tables of one prompt share their unedited images. By attribute."""
    known: dict[tuple[str, ...], Shared] = {}
    benches = []
    for config in configs:
        for key, values in config.options.items():
            (method,) = find_methods([key])
            method.options.parse(values, where=f"the options of {method.name}")
        find_methods(config.methods)
        own = Shared(lens, config, folder, clip)
        benches.append(Bench(known.setdefault(own.identity, own), config, folder))
    bars = (progress or Progress()).parts(len(benches))
    return {bench.attribute.name: _table(bench, on_row, bar) for bench, bar in zip(benches, bars, strict=True)}


def _table(bench: Bench, on_row: OnRow | None, progress: Progress) -> Comparison:
    rows, curves = [], {}
    methods = (None, *find_methods(bench.config.methods))
    for method, bar in zip(methods, progress.parts(len(methods)), strict=True):
        bench.shared.bar = bar
        row, curve = (bench.unsteered_row(), None) if method is None else bench.row(method)
        rows.append(row)
        if curve is not None:
            curves[row.method] = curve
        if on_row is not None:
            on_row(bench.attribute.name, row)
    manifest = bench.lens.manifest
    rule = BALANCE_RULE if bench.config.protocol == "balance" else RULE
    return Comparison(
        bench.config, bench.attribute, bench.target, ranked(rows), curves, bench.labels(), rule, lens_key(bench.lens),
        manifest.sae_id, manifest.base_model.id, bench.lens.classifier.classifier_id,
    )  # fmt: skip
