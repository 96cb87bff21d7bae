"""Results on disk: sweeps, attributions and the atlas, as JSON, WebP and safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import ValidationError

from diffusion_lens.base.files import load_metadata, load_tensors, read_json, save_tensors, write_json
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.sheets import load_sheets, save_sheets
from diffusion_lens.base.types import (
    Atlas,
    Attribute,
    Attribution,
    Change,
    GenerationRequest,
    LensError,
    LogRatio,
    Share,
    SweepPoint,
    SweepResult,
)

if TYPE_CHECKING:
    pass

T = TypeVar("T")
NO_IMAGES = np.zeros((0, 1, 1, 3), np.uint8)


def save_point(point: SweepPoint, folder: Path, stem: str) -> None:
    """Write one point as ``<stem>.json`` and its examples, lossless, as ``<stem>-examples…``."""
    if len(point.examples):
        save_sheets(point.examples, folder, f"{stem}-examples", lossless=True)
    write_json(folder / f"{stem}.json", _plain_point(point))


def load_point(folder: Path, stem: str) -> SweepPoint:
    """Read what ``save_point`` wrote, equal in every bit."""
    values = read_json(folder / f"{stem}.json")
    images = load_sheets(folder, f"{stem}-examples") if values["examples"] else NO_IMAGES
    return _read_point(values, images)


def save_sweep(result: SweepResult, folder: Path, stem: str) -> None:
    """Write ``<stem>.json`` and, where it has examples, ``<stem>-examples…`` (lossy)."""
    strips = [point.examples for point in result.points if len(point.examples)]
    if strips:
        save_sheets(np.concatenate(strips), folder, f"{stem}-examples", columns=max(map(len, strips)))
    write_json(folder / f"{stem}.json", sweep_to_plain(result))


def sweep_to_plain(result: SweepResult) -> dict[str, Any]:
    """A sweep as plain JSON values; of its examples only how many each point has."""
    values: dict[str, Any] = to_plain(dataclasses.replace(result, points=()))
    values["points"] = [_plain_point(point) for point in result.points]
    return values


def load_sweep(folder: Path, stem: str) -> SweepResult:
    """Read what ``save_sweep`` wrote (examples lossy); raises ``LensError`` that names a bad file."""
    path = folder / f"{stem}.json"
    values = read_json(path)
    try:
        return _read_sweep(values, folder, stem)
    except (KeyError, TypeError, AttributeError, ValidationError, ValueError) as error:
        if isinstance(error, LensError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LensError(f"{path} is not a stored sweep ({reason}); fit the lens again.") from None


def _read_sweep(values: dict[str, Any], folder: Path, stem: str) -> SweepResult:
    n = n_examples(values)
    images = load_sheets(folder, f"{stem}-examples") if n else NO_IMAGES
    if len(images) != n:
        raise LensError(f"{stem}-examples holds {len(images)} images, {stem}.json speaks of {n}.")
    return sweep_from_plain(values, images)


def n_examples(values: dict[str, Any]) -> int:
    """How many example images the plain values of a sweep speak of."""
    return sum(int(point["examples"]) for point in values["points"])


def sweep_from_plain(values: dict[str, Any], images: np.ndarray) -> SweepResult:
    """What ``sweep_to_plain`` made, with its ``n_examples`` images; foreign values raise as they come."""
    counts = [int(point["examples"]) for point in values["points"]]
    strips = np.split(images, np.cumsum(counts)[:-1]) if counts else []
    points = tuple(_read_point(point, strip) for point, strip in zip(values["points"], strips, strict=True))
    rest = {k: v for k, v in values.items() if k not in ("points", "attribute", "request")}
    return SweepResult(
        points=points,
        attribute=from_plain(Attribute, values["attribute"]),
        request=from_plain(GenerationRequest, values["request"]),
        **rest,
    )


def _plain_point(point: SweepPoint) -> dict[str, Any]:
    plain = to_plain(dataclasses.replace(point, examples=np.zeros(0)))
    plain["examples"] = len(point.examples)
    return plain


def _read_point(values: dict[str, Any], examples: np.ndarray) -> SweepPoint:
    nested: dict[str, Any] = {
        "shares": tuple(from_plain(Share, share) for share in values["shares"]),
        "log_ratio": from_plain(LogRatio, values["log_ratio"]) if values["log_ratio"] else None,
        "log_ratio_corrected": from_plain(LogRatio, values["log_ratio_corrected"])
        if values["log_ratio_corrected"]
        else None,
        "spillover": {name: tuple(map(float, shares)) for name, shares in values["spillover"].items()},
        "agreement": {name: float(share) for name, share in values["agreement"].items()},
        "changes": tuple(from_plain(Change, change) for change in values["changes"]),
        "labels": np.asarray(values["labels"], dtype=np.int64),
        "certain": np.asarray(values["certain"], dtype=bool),
        "examples": examples,
    }
    rest: dict[str, Any] = {name: None if v is None else float(v) for name, v in values.items() if name not in nested}
    return SweepPoint(**nested, **rest)


def save_attributions(path: Path, attributions: dict[str, Attribution]) -> None:
    """Write one ``[class, step, d_sae]`` array per attribute, float32, with its provenance in the header."""
    metadata = {
        name: json.dumps(to_plain(dataclasses.replace(a, scores=np.zeros(0)))) for name, a in attributions.items()
    }
    save_tensors(path, {name: a.scores.astype(np.float32) for name, a in attributions.items()}, metadata)


def load_attributions(path: Path) -> dict[str, Attribution]:
    """Read what ``save_attributions`` wrote, by attribute name."""
    arrays, metadata = load_tensors(path), load_metadata(path)
    found = {}
    for name, scores in arrays.items():
        values = json.loads(metadata[name])
        values.update(scores=scores, attribute=from_plain(Attribute, values["attribute"]))
        values["completeness_gap"] = float(values["completeness_gap"])
        found[name] = Attribution(**values)
    return found


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
    arrays, metadata = load_tensors(path), load_metadata(path)
    missing = [name for name in ATLAS_ARRAYS if name not in arrays]
    if missing or "atlas" not in metadata:
        raise LensError(f"{path.name} is not an atlas ({', '.join(missing) or 'no header'}); fit the lens again.")
    texts = json.loads(metadata["atlas"])
    texts.update(steps=tuple(texts["steps"]), labels=tuple(texts["labels"]))
    effects = {name.split(".", 1)[1]: array for name, array in arrays.items() if name.startswith("effects.")}
    fields: dict[str, Any] = {name: arrays[name] for name in ATLAS_ARRAYS}
    return Atlas(**fields, **texts, effects=effects)


def load_sweeps(folder: Path) -> tuple[SweepResult, ...]:
    """Every sweep of a lens folder's ``sweeps/``, by file name."""
    stems = sorted(path.stem for path in folder.glob("[0-9]*.json") if not path.stem.endswith("-examples"))
    return tuple(load_sweep(folder, stem) for stem in stems)
