"""An audit: what a model shows under some prompts, as one self-contained HTML page, JSON and CSV."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusion_lens.base.edits import describe
from diffusion_lens.base.files import write_json, write_text
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.text import as_csv
from diffusion_lens.base.types import Attribute, Intervention, LensError, is_assumed
from diffusion_lens.base.weights import weights_digest
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.observe import observe
from diffusion_lens.model.generate import Edit
from diffusion_lens.portraits import world
from diffusion_lens.portraits.draw import sheet
from diffusion_lens.results import stats
from diffusion_lens.results.as_json import figures_json
from diffusion_lens.results.measurement import Figures, Measurement
from diffusion_lens.results.stats import Estimate
from diffusion_lens.studies.audit.rows import (
    Discrepancy,
    ImageQuality,
    Measures,
    Seen,
    discrepancies,
    image_quality,
    joined,
    measure_rows,
    see,
)
from diffusion_lens.studies.check.world import has_truth

FILES = ("audit.html", "audit.json", "audit.csv", "measures.csv")
EXAMPLES = 16
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "statsmodels")
LIMITS = (
    "An image classifier read how pictures look. It says nothing about who anybody is, and its classes are few.",
    "Shares are of decided images; undecided ones are counted beside them and left out.",
    "The correction supposes that the classifier errs on generated images as it did on labelled held-out ones.",
    "Intervals speak of more seeds of the same prompts, not of other prompts, models or samplers.",
    "Balance is one possible target. Which distribution is right is a choice for people, not a measurement.",
)


@dataclass(frozen=True, eq=False)
class Finding:
    """One prompt, unedited or edited (then measured against the unedited images).

    ``planted``: attribute → class → share in the training data (empty: not known).
    """

    measurement: Measurement
    planted: dict[str, dict[str, float]]

    @property
    def prompt(self) -> str | None:
        """What was asked for."""
        return self.measurement.request.prompt

    @property
    def edit(self) -> str | None:
        """How it was edited, in words; ``None``: unedited."""
        return None if self.measurement.edit is None else describe(self.measurement.edit)

    @property
    def examples(self) -> np.ndarray:
        """The first images ``uint8 [m, H, W, 3]``."""
        return self.measurement.examples

    @property
    def evaluations(self) -> dict[str, Figures]:
        """Attribute → what was read, nuisances included."""
        return {name: self.measurement[name] for name in self.measurement.readings}


@dataclass(frozen=True)
class Pooled:
    """Mean over prompts of one class's share as read; ``interval`` speaks of these prompts alone."""

    attribute: str
    label: str
    edit: str | None
    estimate: Estimate


@dataclass(frozen=True)
class Crossing:
    """Decided images per pair of classes ``int [first, second]``, all prompts together."""

    first: Attribute
    second: Attribute
    edit: str | None
    counts: np.ndarray


@dataclass(frozen=True)
class Audit:
    """Everything that a report says.

    Attributes:
        facts: what was measured with: lens, model, sampler, seeds, software, in the order shown.
        confusion: attribute → counts ``[true, read]`` of the classifier on labelled held-out images.
        files: path in the lens folder → sha256.
        command: reproduces the audit.
        discrepancies: FD hard and soft of the steered attributes, per prompt and pooled.
        quality: FID, Inception score and CLIP scores, where they were asked for.
    """

    title: str
    date: str
    reviewer: str
    notes: str
    command: str
    facts: dict[str, str]
    attributes: tuple[Attribute, ...]
    steered: tuple[str, ...]
    findings: tuple[Finding, ...]
    pooled: tuple[Pooled, ...]
    crossings: tuple[Crossing, ...]
    confusion: dict[str, np.ndarray]
    files: dict[str, str]
    discrepancies: tuple[Discrepancy, ...] = ()
    quality: ImageQuality | None = None
    limits: tuple[str, ...] = LIMITS

    @property
    def assumed(self) -> tuple[str, ...]:
        """Attributes whose classifier's error was assumed to be none, not measured."""
        return tuple(name for name, counts in self.confusion.items() if is_assumed(counts))


def audit(
    lens: DiffusionLens,
    prompts: Sequence[str | None],
    seeds: Sequence[int],
    *,
    turns: Sequence[Intervention] = (),
    title: str = "",
    reviewer: str = "",
    notes: str = "",
    command: str = "",
    date: str | None = None,
    batch_size: int = 16,
    measures: Measures | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Draw every prompt on the same seeds, read the images, and put together what a reviewer needs.

    Args:
        turns: draw every prompt a second time with these, and report what moved.
        date: ISO date of the report; today (UTC) by default.
        measures: which image qualities are read off the same images; none by default.
        progress: of all prompts; may be cancelled.

    Raises:
        LensError: no prompt, a prompt given twice, a classifier whose error is unknown, or too few images for
            what ``measures`` asks.
    """
    if not prompts or len(set(prompts)) != len(prompts):
        raise LensError("An audit needs one or more different prompts.")
    edit = lens.edit(*turns) if turns else None
    if measures is not None:
        measures.check(prompts, len(seeds), edited=edit is not None)
    runs = [(prompt, e) for prompt in prompts for e in ((None, edit) if edit else (None,))]
    findings: list[Finding] = []
    seen: list[Seen] = []
    truth = has_truth(lens)
    for (prompt, e), bar in zip(runs, (progress or Progress()).parts(len(runs)), strict=True):
        request = lens.request(prompt, seeds)
        batches: list[Seen] = []
        found = observe(
            lens.model, request, e, lens.classifier, reference=None if e is None else findings[-1].measurement,
            batch_size=batch_size, n_examples=EXAMPLES, progress=bar,
            on_batch=None if measures is None else partial(see, measures, batches),
        )  # fmt: skip
        seen.append(joined(batches))
        findings.append(Finding(replace(found, features=None), _planted(prompt or "") if truth and e is None else {}))
    named = [(finding.prompt, finding.edit) for finding in findings]
    steered = tuple(a.name for a in lens.attributes)
    return Audit(
        title=title or f"Audit of {lens.manifest.name}",
        date=date or datetime.now(timezone.utc).date().isoformat(),
        reviewer=reviewer,
        notes=notes,
        command=command,
        facts=_facts(lens, seeds, edit),
        attributes=tuple(lens.classifier.attributes),
        steered=steered,
        findings=tuple(findings),
        pooled=_pooled(lens, findings),
        crossings=_crossings(lens, findings),
        confusion={name: np.asarray(table) for name, table in lens.classifier.confusion.items()},
        files={name: seal.sha256 for name, seal in sorted(lens.manifest.files.items())},
        discrepancies=discrepancies(named, [f.measurement.readings for f in findings], steered),
        quality=None if measures is None else image_quality(measures, named, seen, len(seeds)),
    )


def _planted(prompt: str) -> dict[str, dict[str, float]]:
    try:
        shares = world.planted_shares(prompt)
    except LensError:
        return {}
    return {a.name: dict(zip(a.classes, map(float, shares[a.name]), strict=True)) for a in world.ATTRIBUTES}


def _facts(lens: DiffusionLens, seeds: Sequence[int], edit: Edit | None) -> dict[str, str]:
    m, model = lens.manifest, lens.model
    scheduler = type(model.pipeline.scheduler).__name__
    run = f"{seeds[0]} to {seeds[-1]}" if list(seeds) == list(range(seeds[0], seeds[-1] + 1)) else _list(seeds)
    return {
        "Lens": f"{m.name}, {m.lens_id}",
        "Model": m.base_model.id + (f" at {m.base_model.revision}" if m.base_model.revision else ""),
        "U-Net weights": weights_digest(model.denoiser, scheduler, str(model.dtype)),
        "Sparse autoencoder": f"{m.sae_id} at {m.hook_name}",
        "Classifier": lens.classifier.classifier_id,
        "Sampler": f"{scheduler}, {m.n_steps} steps, guidance {m.guidance_scale:g}",
        "Images": f"{len(seeds)} per prompt, seeds {run}",
        "Edit": "none" if edit is None else describe(edit.spec),
        "Software": ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)]),
        "Device": f"{lens.device}, {platform.machine()}",
    }


def _list(seeds: Sequence[int]) -> str:
    shown = ", ".join(map(str, seeds[:8]))
    return shown if len(seeds) <= 8 else f"{shown}, …"


def _groups(findings: Sequence[Finding]) -> dict[str | None, list[Measurement]]:
    """Edit in words (``None``: unedited) → its measurements, prompt by prompt."""
    groups: dict[str | None, list[Measurement]] = {}
    for finding in findings:
        groups.setdefault(finding.edit, []).append(finding.measurement)
    return groups


def _pooled(lens: DiffusionLens, findings: Sequence[Finding]) -> tuple[Pooled, ...]:
    """Every steered class over all prompts; empty where a prompt has too few decided images, or is the only one."""
    rows = []
    for edit, group in _groups(findings).items():
        for a in lens.attributes:
            found = [one.readings[a.name] for one in group]
            if len(group) < 2 or min(int(p.certain.sum()) for p in found) < stats.MIN_PAIRS:
                continue
            for column, label in enumerate(a.classes):
                values = [np.where(p.certain, p.labels == column, np.nan) for p in found]
                estimate = stats.pooled_share(values)
                rows.append(Pooled(a.name, label, edit, estimate))
    return tuple(rows)


def _crossings(lens: DiffusionLens, findings: Sequence[Finding]) -> tuple[Crossing, ...]:
    rows = []
    for edit, group in _groups(findings).items():
        for a, b in combinations(lens.attributes, 2):
            counts = sum(one.crossings(a.name, b.name) for one in group)
            rows.append(Crossing(a, b, edit, np.asarray(counts)))
    return tuple(rows)


def write_report(found: Audit, folder: str | Path) -> tuple[Path, ...]:
    """Write the page, every number as JSON, and the tables of shares and of measures; returns their paths."""
    page, values, *tables = paths = tuple(Path(folder) / name for name in FILES)
    write_text(page, render(found))
    write_json(values, audit_json(found), indent=1)
    for path, text in zip(tables, (table_text(found), measures_text(found)), strict=True):
        write_text(path, text)
    return paths


def audit_json(found: Audit) -> dict[str, Any]:
    """Every number of a report as plain JSON values."""
    plain: dict[str, Any] = {
        field.name: to_plain(getattr(found, field.name)) for field in fields(found) if field.name != "findings"
    }
    plain["findings"] = [
        {
            "prompt": finding.prompt,
            "edit": finding.edit,
            "evaluations": {name: figures_json(own) for name, own in finding.evaluations.items()},
            "planted": finding.planted,
        }
        for finding in found.findings
    ]
    return plain


COLUMNS = (
    "prompt", "edit", "attribute", "class", "count", "decided", "undecided", "share", "share_low", "share_high",
    "corrected", "corrected_low", "corrected_high", "planted",
)  # fmt: skip


def table_text(found: Audit) -> str:
    """One CSV line per prompt, edit, attribute and class; shares between 0 and 1."""
    rows: list[tuple[Any, ...]] = []
    for finding in found.findings:
        for name, evaluation in finding.evaluations.items():
            for s in evaluation.shares:
                planted = finding.planted.get(name, {}).get(s.label, "")
                numbers = (s.raw, *s.raw_interval, s.corrected, *s.corrected_interval)
                own = (finding.prompt, finding.edit, name, s.label, s.count, s.n, s.n_uncertain)
                rows.append((*own, *(f"{x:.6g}" for x in numbers), planted))
    return as_csv(COLUMNS, rows)


MEASURE_COLUMNS = ("prompt", "edit", "pooled", "measure", "value", "low", "high", "floor", "n", "with")


def measures_text(found: Audit) -> str:
    """One CSV line per prompt, edit and measure: FD, and image quality where it was asked for.

    ``low``, ``high``: a 95 % interval; ``floor``: what 95 % of balanced models stay below. Empty: not measured.
    """
    rows: list[tuple[Any, ...]] = []
    for row in measure_rows(found.discrepancies, found.quality):
        numbers = (None if x is None else f"{x:.6g}" for x in (row.value, row.low, row.high, row.floor))
        rows.append((
            row.prompt, row.edit, "yes" if row.pooled else "no", row.measure, *numbers, row.n, row.source
        ))  # fmt: skip
    return as_csv(MEASURE_COLUMNS, rows)


def render(found: Audit) -> str:
    """The audit as one HTML page that needs nothing from elsewhere, no script included."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    pictures = [_picture(finding.examples) for finding in found.findings]
    captions = [_caption(finding, found.steered) for finding in found.findings]
    return environment.get_template("audit.html").render(
        audit=found, findings=list(zip(found.findings, pictures, captions, strict=True))
    )


def _percent(value: float) -> str:
    return f"{value * 100:.1f}" if np.isfinite(value) else "–"


def _picture(images: np.ndarray) -> str:
    """A contact sheet as a data address."""
    buffer = io.BytesIO()
    sheet(images, min(8, len(images))).save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _caption(finding: Finding, steered: Sequence[str]) -> str:
    """What the pictures are, and what was read in all images of this prompt: their alt text."""
    parts = []
    for name in steered:
        counted: Mapping[str, int] = {s.label: s.count for s in finding.evaluations[name].shares}
        parts.append(f"{name}: " + ", ".join(f"{count} {label}" for label, count in counted.items()))
    kind = "edited" if finding.edit else "unedited"
    return f"The first {len(finding.examples)} {kind} images. Of all images, {'; '.join(parts)}."
