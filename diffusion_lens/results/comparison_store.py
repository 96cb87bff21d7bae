"""A comparison on disk: compact JSON, every image's class in safetensors, and images of each method's best setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.files import read_json
from diffusion_lens.base.foreign import reading
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.sheets import load_sheets
from diffusion_lens.base.types import Attribute, GenerationRequest, LensError, Predictions
from diffusion_lens.results.comparison import UNSTEERED, CompareConfig, Comparison, Measured, MethodRow
from diffusion_lens.results.measurement import NO_IMAGES, Figures, Measurement
from diffusion_lens.results.measurement_files import FORMAT_VERSION, Missing, Queue, measured_beside, save_measured
from diffusion_lens.results.records import (
    n_examples_of_0_4,
    recorded_in_0_4,
    sweep_of,
    sweep_of_0_4,
    sweep_values,
)
from diffusion_lens.results.sweeps import SweepResult

TEXTS = ("rule", "lens_key", "sae_id", "model_id", "classifier_id")
ROW_VALUES = (
    "method", "name", "kind", "is_control", "goal", "strength", "strength_name", "n_tune", "inception",
    "image_likeness", "prompt_likeness", "subgroup_entropy", "norm_ratio", "seconds_to_fit", "seconds_per_image",
    "note",
)  # fmt: skip
"""Fields of a row that are kept as they are; its figures are kept as a measurement."""
NEWER_VALUES = ("reached", "explicit", "quality", "margin", "rank")
"""The same, of fields that comparisons stored before there was balance do not have."""
BEFORE_BALANCE = {"protocol": "points", "fit_on": "lens", "n_refine": 0, "n_further": 0, "n_explicit": 0}
"""What an older comparison's configuration leaves unsaid."""


def save_comparison(comparison: Comparison, folder: Path, stem: str = "comparison") -> Path:
    """Write a comparison; returns the path of its JSON.

    Of the curves' images those of strength 0 and of each method's best setting are kept.
    """
    measured: list[Measurement] = []
    rows, curves = [], {}
    for row in comparison.rows:
        rows.append(row_values(row))
        if row.figures is not None:
            measured.append(replace(row.figures.measurement, examples=NO_IMAGES))
    for key in comparison.curves:
        values, points = sweep_values(_without_most_images(comparison, key))
        curves[key] = values
        measured += points
    values = {
        "attribute": to_plain(comparison.attribute),
        "target": list(comparison.target),
        "rows": rows,
        "curves": curves,
        "labels": comparison.labels,
        "config": comparison.config.model_dump(mode="json"),
        **{name: getattr(comparison, name) for name in TEXTS},
    }
    return save_measured(folder, stem, values, measured)


def row_values(row: MethodRow) -> dict[str, Any]:
    """A row as plain JSON values, without its figures."""
    names = (*ROW_VALUES, *NEWER_VALUES)
    return {name: to_plain(getattr(row, name)) for name in names} | {"measured": row.figures is not None}


def row_of(values: Mapping[str, Any], figures: Figures | None) -> MethodRow:
    """What ``row_values`` took apart; foreign values raise as they come."""
    known = {name: values[name] for name in ROW_VALUES} | {name: values.get(name) for name in NEWER_VALUES}
    for name in ("image_likeness", "prompt_likeness", "explicit", "margin"):
        known[name] = None if known[name] is None else from_plain(Measured, known[name])
    return MethodRow(**known, figures=figures)


def _without_most_images(comparison: Comparison, key: str) -> SweepResult:
    row = comparison.row(key)
    wanted = {0.0, row.strength if row else 0.0}
    curve = comparison.curves[key]
    return replace(curve, points=tuple(
        p if p.beta in wanted else replace(p, measurement=replace(p.measurement, examples=NO_IMAGES))
        for p in curve.points
    ))  # fmt: skip


def load_comparison(folder: Path, stem: str, missing: Missing) -> Comparison:
    """Read a stored comparison; raises ``LensError`` that names a bad file.

    ``missing``: what comparisons of version 0.4 do not hold themselves.
    """
    path = folder / f"{stem}.json"
    values = read_json(path)
    with reading(path, "a stored comparison", "run: compare --store"):
        if values.get("format_version") not in (1, FORMAT_VERSION):
            raise LensError(f"{path} has another format than {FORMAT_VERSION}; run: compare --store.")
        read = _read_0_4 if values["format_version"] == 1 else _read
        return _check(read(values, folder, stem, missing))


def _read(values: dict[str, Any], folder: Path, stem: str, _: Missing) -> Comparison:
    queue = Queue(measured_beside(values, folder, stem))
    attribute, target = from_plain(Attribute, values["attribute"]), tuple(float(s) for s in values["target"])
    rows = tuple(
        row_of(row, queue.take()[0].figures(attribute.name, target) if row["measured"] else None)
        for row in values["rows"]
    )
    curves = {key: sweep_of(curve, queue.take(len(curve["points"]))) for key, curve in values["curves"].items()}
    return _comparison(values, stem, attribute, target, rows, curves)


def _comparison(
    values: Mapping[str, Any],
    stem: str,
    attribute: Attribute,
    target: tuple[float, ...],
    rows: tuple[MethodRow, ...],
    curves: dict[str, SweepResult],
) -> Comparison:
    return Comparison(
        config=CompareConfig.parse(_config_values(values["config"]), where=f"{stem}.json"),
        attribute=attribute,
        target=target,
        rows=rows,
        curves=curves,
        labels={str(key): str(text) for key, text in values["labels"].items()},
        **{name: str(values[name]) for name in TEXTS},
    )


def _config_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values} if "protocol" in values else {**BEFORE_BALANCE, **values}


def _read_0_4(values: dict[str, Any], folder: Path, stem: str, missing: Missing) -> Comparison:
    """A comparison of version 0.4: rows hold counts and no readings, so that their images have no order."""
    counts = {key: n_examples_of_0_4(curve) for key, curve in values["curves"].items()}
    images = load_sheets(folder, f"{stem}-examples") if any(counts.values()) else NO_IMAGES
    if len(images) != sum(counts.values()):
        raise LensError(f"{stem}-examples holds {len(images)} images, {stem}.json speaks of {sum(counts.values())}.")
    ends = np.cumsum([0, *counts.values()])
    parts = {key: images[a:b] for key, a, b in zip(counts, ends, ends[1:], strict=False)}
    curves = {key: sweep_of_0_4(curve, parts[key], missing) for key, curve in values["curves"].items()}
    attribute, target = from_plain(Attribute, values["attribute"]), tuple(float(s) for s in values["target"])
    curves = {key: replace(c, points=tuple(replace(p, target=target) for p in c.points)) for key, c in curves.items()}
    request = next((curve.request for curve in curves.values()), None)
    rows = tuple(_row_of_0_4(row, values, attribute, target, request, missing) for row in values["rows"])
    return _comparison(values, stem, attribute, target, rows, curves)


def _row_of_0_4(
    row: Mapping[str, Any],
    values: Mapping[str, Any],
    attribute: Attribute,
    target: tuple[float, ...],
    request: GenerationRequest | None,
    missing: Missing,
) -> MethodRow:
    plain = {**row, "norm_ratio": row["activation_ratio"]}
    if row["note"] or request is None:
        return row_of(plain, None)
    if tuple(share["label"] for share in row["shares"]) != attribute.classes:
        raise ValueError(f"the shares of {row['method']} are of other classes")
    counts = [int(share["count"]) for share in row["shares"]]
    labels = np.repeat(np.arange(len(counts) + 1), [*counts, int(row["n_uncertain"])])
    certain = labels < len(counts)
    first = int(values["config"]["first_seed"])
    measured = Measurement(
        request=replace(request, seeds=tuple(range(first, first + len(labels)))),
        edit=None,
        readings={
            attribute.name: Predictions.from_labels(labels * certain, certain, attribute, str(values["classifier_id"]))
        },
        confusion=missing.confusion,
        classifier_id=str(values["classifier_id"]),
        activation_ratio=float(row["activation_ratio"]),
        frechet=None if row["fid"] is None else float(row["fid"]),
        recorded=recorded_in_0_4(row["agreement"] or {}, (), {}),
    )
    return row_of(plain, measured.figures(attribute.name, target))


def _check(found: Comparison) -> Comparison:
    """Refuse parts that do not belong together (``ValueError``)."""
    names = [row.method for row in found.rows]
    if not names or names[0] != UNSTEERED or len(set(names)) < len(names):
        raise ValueError("its rows are not the unsteered one and one per method")
    if len(found.target) != len(found.attribute.classes) or found.config.attribute != found.attribute.name:
        raise ValueError("its target is of another attribute")
    if {row.method for row in found.rows[1:] if not row.note} != set(found.curves):
        raise ValueError("its curves are not those of its rows")
    if any(curve.attribute != found.attribute for curve in found.curves.values()):
        raise ValueError("a curve is of another attribute")
    return found
