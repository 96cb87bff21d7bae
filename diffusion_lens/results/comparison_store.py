"""A comparison on disk: one JSON with everything, and the images of each method's best setting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from diffusion_lens.base.files import atomic_path, read_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.sheets import load_sheets, save_sheets
from diffusion_lens.base.types import Attribute, LensError, SweepResult
from diffusion_lens.results.comparison import UNSTEERED, CompareConfig, Comparison, MethodRow
from diffusion_lens.results.records import NO_IMAGES, n_examples, sweep_from_plain, sweep_to_plain

FORMAT_VERSION = 1


def save_comparison(comparison: Comparison, folder: Path, stem: str = "comparison") -> Path:
    """Write ``<stem>.json`` and, where there are any, ``<stem>-examples…``; returns the JSON's path.

    Of the curves' images those of strength 0 and of each method's best setting are kept.
    """
    curves = {key: _without_most_images(comparison, key) for key in comparison.curves}
    strips = [p.examples for curve in curves.values() for p in curve.points if len(p.examples)]
    if strips:
        save_sheets(np.concatenate(strips), folder, f"{stem}-examples", columns=max(map(len, strips)))
    plain = to_plain({
        "format_version": FORMAT_VERSION,
        **{name: getattr(comparison, name) for name in (
            "attribute", "target", "rows", "labels", "rule", "lens_key", "sae_id", "model_id", "classifier_id",
        )},
        "config": comparison.config.model_dump(mode="json"),
        "curves": {key: sweep_to_plain(curve) for key, curve in curves.items()},
    })  # fmt: skip
    path = folder / f"{stem}.json"
    with atomic_path(path) as partial:  # compact: a curve holds every image's reading
        partial.write_text(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _without_most_images(comparison: Comparison, key: str) -> SweepResult:
    row = comparison.row(key)
    wanted = {0.0, row.strength if row else 0.0}
    curve = comparison.curves[key]
    none = np.zeros((0, *next((p.examples.shape[1:] for p in curve.points), NO_IMAGES.shape[1:])), np.uint8)
    return replace(curve, points=tuple(p if p.beta in wanted else replace(p, examples=none) for p in curve.points))


def load_comparison(folder: Path, stem: str = "comparison") -> Comparison:
    """Read what ``save_comparison`` wrote; raises ``LensError`` that names a bad file."""
    path = folder / f"{stem}.json"
    values = read_json(path)
    try:
        if values.get("format_version") != FORMAT_VERSION:
            raise LensError(f"{path} has another format than {FORMAT_VERSION}; run: compare --store.")
        return _check(_read(values, folder, stem))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, LensError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LensError(f"{path} is not a stored comparison ({reason}); run: compare --store.") from None


def _read(values: dict[str, Any], folder: Path, stem: str) -> Comparison:
    counts = {key: n_examples(curve) for key, curve in values["curves"].items()}
    images = load_sheets(folder, f"{stem}-examples") if any(counts.values()) else NO_IMAGES
    if len(images) != sum(counts.values()):
        raise LensError(f"{stem}-examples holds {len(images)} images, {stem}.json speaks of {sum(counts.values())}.")
    ends = np.cumsum([0, *counts.values()])
    parts = {key: images[a:b] for key, a, b in zip(counts, ends, ends[1:], strict=False)}
    return Comparison(
        config=CompareConfig.parse(values["config"], where=f"{stem}.json"),
        attribute=TypeAdapter(Attribute).validate_python(values["attribute"]),
        target=tuple(float(share) for share in values["target"]),
        rows=TypeAdapter(tuple[MethodRow, ...]).validate_python(values["rows"]),
        curves={key: sweep_from_plain(curve, parts[key]) for key, curve in values["curves"].items()},
        labels={str(key): str(text) for key, text in values["labels"].items()},
        **{name: str(values[name]) for name in ("rule", "lens_key", "sae_id", "model_id", "classifier_id")},
    )


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
    for row in found.rows:
        if not row.note and tuple(share.label for share in row.shares) != found.attribute.classes:
            raise ValueError(f"the shares of {row.method} are of other classes")
    return found
