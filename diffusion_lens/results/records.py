"""Sweeps, attributions and the atlas on disk, as JSON, WebP and safetensors; sweeps of version 0.4 are read too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.files import load_header, load_tensors, read_json, save_tensors
from diffusion_lens.base.foreign import check_array, reading
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.sheets import load_sheets
from diffusion_lens.base.types import (
    Atlas,
    Attribute,
    Attribution,
    Change,
    Control,
    GenerationRequest,
    LensError,
    Predictions,
)
from diffusion_lens.results.measurement import NO_IMAGES, Measurement, Recorded
from diffusion_lens.results.measurement_files import (
    FORMAT_VERSION,
    Missing,
    load_measured,
    measured_beside,
    save_measured,
)
from diffusion_lens.results.sweeps import SweepPoint, SweepResult

POINT = "point"
RESTORE = "restore it from the original"


def save_point(folder: Path, point: SweepPoint) -> None:
    """Write one point with its reference, examples lossless; ``load_point`` gives it back, labels for readings."""
    save_measured(folder, POINT, _point_values(point), [point.measurement], lossless=True)


def load_point(folder: Path) -> SweepPoint:
    """Read what ``save_point`` wrote."""
    values, (measurement,) = load_measured(folder, POINT)
    return _point(values, measurement)


def _point_values(point: SweepPoint) -> dict[str, Any]:
    return {"attribute": to_plain(point.attribute), "target": to_plain(point.target), "beta": point.beta}


def _point(values: Mapping[str, Any], measurement: Measurement) -> SweepPoint:
    target = None if values["target"] is None else tuple(float(share) for share in values["target"])
    return SweepPoint(measurement, from_plain(Attribute, values["attribute"]), target, beta=float(values["beta"]))


def save_sweep(result: SweepResult, folder: Path, stem: str, *, lossless: bool = False) -> None:
    """Write a sweep with every reading; examples lossy, for a lens, or as they are."""
    values, measurements = sweep_values(result)
    save_measured(folder, stem, values, measurements, lossless=lossless)


def sweep_values(result: SweepResult) -> tuple[dict[str, Any], list[Measurement]]:
    """A sweep as plain JSON values, and the measurements of its points."""
    values = {
        "points": [_point_values(point) for point in result.points],
        "target": result.target,
        "setting": result.setting,
        "is_control": result.is_control,
        "provenance": result.provenance,
        "control": result.control,
        "control_seed": result.control_seed,
    }
    return values, [point.measurement for point in result.points]


def sweep_of(values: Mapping[str, Any], measurements: list[Measurement]) -> SweepResult:
    """What ``sweep_values`` took apart; foreign values raise as they come."""
    points = tuple(_point(own, m) for own, m in zip(values["points"], measurements, strict=True))
    first = points[0]
    return SweepResult(
        points, first.attribute, str(values["target"]), first.request, str(values["setting"]), first.classifier_id,
        bool(values["is_control"]), dict(values["provenance"]), _control(values.get("control")),
        int(values.get("control_seed", 0)),
    )  # fmt: skip


def _control(name: object) -> Control | None:
    known: dict[object, Control | None] = {None: None, "": None, "random": "random", "flip": "flip"}
    if name not in known:
        raise LensError(f"'{name}' is no control of a sweep.")
    return known[name]


def load_sweep(folder: Path, stem: str, missing: Missing) -> SweepResult:
    """Read a stored sweep; raises ``LensError`` that names a bad file.

    ``missing``: what sweeps of version 0.4 do not hold themselves.
    """
    path = folder / f"{stem}.json"
    values = read_json(path)
    with reading(path, "a stored sweep", "fit the lens again"):
        if values.get("format_version") == FORMAT_VERSION:
            return sweep_of(values, measured_beside(values, folder, stem))
        images = load_sheets(folder, f"{stem}-examples") if n_examples_of_0_4(values) else NO_IMAGES
        return sweep_of_0_4(values, images, missing)


def n_examples_of_0_4(values: Mapping[str, Any]) -> int:
    """How many example images the plain values of a sweep of version 0.4 speak of."""
    return sum(int(point["examples"]) for point in values["points"])


def sweep_of_0_4(values: Mapping[str, Any], images: np.ndarray, missing: Missing) -> SweepResult:
    """A sweep of version 0.4 from its plain values and images; foreign values raise as they come."""
    if len(images) != n_examples_of_0_4(values):
        raise LensError(f"{len(images)} example images are kept, {n_examples_of_0_4(values)} are spoken of.")
    attribute = from_plain(Attribute, values["attribute"])
    request = from_plain(GenerationRequest, values["request"])
    strips = np.split(images, np.cumsum([int(point["examples"]) for point in values["points"]])[:-1])
    points = tuple(
        SweepPoint(_measurement_of_0_4(own, attribute, request, values["classifier_id"], strip, missing), attribute,
                   beta=float(own["beta"]))
        for own, strip in zip(values["points"], strips, strict=True)
    )  # fmt: skip
    return SweepResult(
        points, attribute, str(values["target"]), request, str(values["setting"]), str(values["classifier_id"]),
        bool(values["is_control"]), dict(values["provenance"]), _control(values["provenance"].get("control")),
    )  # fmt: skip


def _measurement_of_0_4(
    point: Mapping[str, Any],
    attribute: Attribute,
    request: GenerationRequest,
    classifier_id: str,
    examples: np.ndarray,
    missing: Missing,
) -> Measurement:
    """One point: the steered attribute image by image, of the others what was kept."""
    labels = np.asarray(point["labels"], dtype=np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(attribute.classes):
        raise LensError(f"A reading of {attribute.name} is of a class that it has not.")
    return Measurement(
        request=request,
        edit=None,
        readings={attribute.name: Predictions.from_labels(labels, point["certain"], attribute, classifier_id)},
        confusion=missing.confusion,
        classifier_id=classifier_id,
        activation_ratio=float(point["activation_ratio"]),
        frechet=None if point["fid"] is None else float(point["fid"]),
        examples=examples,
        recorded=recorded_in_0_4(point["agreement"], point["changes"], point["spillover"]),
    )


def recorded_in_0_4(agreement: Mapping[str, Any], changes: Any, shares: Mapping[str, Any]) -> Recorded:
    """What version 0.4 kept of the other attributes."""
    return Recorded(
        {name: float(share) for name, share in agreement.items()},
        tuple(from_plain(Change, change) for change in changes),
        {name: tuple(map(float, own)) for name, own in shares.items()},
    )


def save_attributions(path: Path, attributions: dict[str, Attribution]) -> None:
    """Write one ``[class, step, d_sae]`` array per attribute, float32, with its provenance in the header."""
    metadata = {
        name: json.dumps(to_plain(dataclasses.replace(a, scores=np.zeros(0)))) for name, a in attributions.items()
    }
    save_tensors(path, {name: a.scores.astype(np.float32) for name, a in attributions.items()}, metadata)


def load_attributions(path: Path) -> dict[str, Attribution]:
    """Read what ``save_attributions`` wrote, by attribute name."""
    found = {}
    with reading(path, "a file of attributions", RESTORE):
        for name, scores in load_tensors(path).items():
            told = from_plain(_Attributed, load_header(path, name))
            values = {field.name: getattr(told, field.name) for field in dataclasses.fields(told)}
            classes = len(told.attribute.classes)
            values["scores"] = check_array(name, scores, (classes, None, None), finite=True)
            found[name] = Attribution(**values)
    return found


@dataclass(frozen=True)
class _Attributed:
    """What the header says of an ``Attribution``."""

    completeness_gap: float
    attribute: Attribute
    method: str
    baseline: str
    sae_id: str
    n_images: int


ATLAS_ARRAYS = (
    "xy", "density", "step_profile", "top_images", "heatmaps", "random_images", "random_heatmaps", "near_images",
)  # fmt: skip


def save_atlas(path: Path, atlas: Atlas) -> None:
    """Write the atlas's arrays and effects; texts go to the header."""
    arrays = {name: getattr(atlas, name) for name in ATLAS_ARRAYS}
    arrays.update({f"effects.{name}": effect for name, effect in atlas.effects.items()})
    texts = ("steps", "labels", "label_source", "layout", "sae_id", "effect_source")
    save_tensors(path, arrays, {"atlas": json.dumps({name: getattr(atlas, name) for name in texts})})


def load_atlas(path: Path) -> Atlas:
    """Read what ``save_atlas`` wrote; raises ``LensError`` that names a file of another kind."""
    arrays = load_tensors(path)
    missing = [name for name in ATLAS_ARRAYS if name not in arrays]
    if missing:
        raise LensError(f"{path.name} is not an atlas ({', '.join(missing)}); fit the lens again.")
    with reading(path, "an atlas", "fit the lens again"):
        told = from_plain(_AtlasTexts, load_header(path, "atlas"))
        effects = {name.split(".", 1)[1]: array for name, array in arrays.items() if name.startswith("effects.")}
        _check_atlas(arrays, effects, told)
        fields: dict[str, Any] = {name: arrays[name] for name in ATLAS_ARRAYS}
        texts = {field.name: getattr(told, field.name) for field in dataclasses.fields(told)}
        return Atlas(**fields, **texts, effects=effects)


@dataclass(frozen=True)
class _AtlasTexts:
    """What the header says of an ``Atlas``."""

    steps: tuple[int, ...]
    labels: tuple[str, ...]
    label_source: str
    layout: str
    sae_id: str
    effect_source: str = ""


def _check_atlas(arrays: Mapping[str, np.ndarray], effects: Mapping[str, np.ndarray], told: _AtlasTexts) -> None:
    """Raise ``ValueError`` for arrays that are not of the same features, or of numbers that cannot be."""
    d, y, x = (*arrays["density"].shape, 0, 0, 0)[0], *(*arrays["heatmaps"].shape, 0, 0, 0, 0)[2:4]
    tops, randoms = ((*arrays[name].shape, 0, 0)[1] for name in ("top_images", "random_images"))
    shapes: dict[str, tuple[int | None, ...]] = {
        "xy": (d, 2), "density": (d,), "step_profile": (d, len(told.steps)), "top_images": (d, None),
        "heatmaps": (d, tops, y, x), "random_images": (d, None), "random_heatmaps": (d, randoms, y, x),
        "near_images": (d, None),
    }  # fmt: skip
    for name, shape in shapes.items():
        check_array(name, arrays[name], shape, finite=not name.endswith("heatmaps"))
    for name, effect in effects.items():
        check_array(f"effects.{name}", effect, (d, None))
    if len(told.labels) != d:
        raise ValueError(f"{len(told.labels)} labels are of {d} features")
