"""What the workbench shows of a view, as plain values for its script: words, pictures, curve, feature rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import effects_of, is_sure
from diffusion_lens.studio import feature_rows, state
from diffusion_lens.studio.about import counted_shares, planted_shares
from diffusion_lens.studio.curves import Curve, CurvePoint, curve_for, mix_key
from diffusion_lens.studio.feature_rows import Line
from diffusion_lens.studio.pictures import data_uri
from diffusion_lens.studio.previews import Preview
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Picture, Row, Studio
from diffusion_lens.ui import words

THUMB = 64
Scene = dict[str, Any]


def frame(studio: Studio, view: View) -> Scene:
    """What stands around the pictures: the sentence's words and choices, the slider's ends, the feature rows."""
    return {
        "view": state.to_values(view),
        "sentence": sentence(studio.lens, view),
        "choices": choices(studio.lens, view.attribute),
        "scale": scale_values(studio.lens, view),
        "rows": rows(studio.lens, view),
        "link": studio.path + state.to_query(view),
    }


def scale_values(lens: DiffusionLens, view: View) -> dict[str, float]:
    """The slider's ends, its step and the strength that changes nothing."""
    ends = state.scale(lens.setting(view.attribute))
    return {"low": ends.low, "high": ends.high, "step": ends.step, "identity": ends.identity}


def sentence(lens: DiffusionLens, view: View) -> dict[str, Any]:
    """The words of the first line; ``says`` is empty where nothing was counted."""
    shares = counted_shares(lens).get((view.prompt or "", view.attribute))
    says = note = ""
    share = None
    if shares is not None:
        most = max(shares, key=lambda s: s.corrected)
        says = words.in_ten(view.attribute, most.label, most.corrected)
        own = next(s for s in shares if s.label == view.target)
        share = own.corrected
        low, high = most.corrected_interval
        note = f"{most.corrected:.0%} of {most.n:,} images ({low:.0%} to {high:.0%}), {most.n_uncertain} uncertain"
    return {
        "subject": None if view.prompt is None else words.subject(view.prompt),
        "target": words.people(view.attribute, view.target),
        "says": says,
        "note": note,
        "share": share,
        "attribute": words.attribute_name(view.attribute),
        "perceived": "as an image classifier perceives them",
    }


@lru_cache(maxsize=32)
def choices(lens: DiffusionLens, attribute: str) -> dict[str, Any]:
    """Everything that the sentence, the chips and the options can be set to."""
    counted = counted_shares(lens)
    prompts = []
    for prompt in lens.prompts:
        if prompt is None:
            continue
        shares = counted.get((prompt, attribute))
        most = max(shares, key=lambda s: s.corrected) if shares else None
        said = words.in_ten(attribute, most.label, most.corrected) if most else ""
        prompts.append({"value": state.shown_prompt(prompt), "name": words.subject(prompt), "says": said})
    targets = [
        {"attribute": a.name, "title": words.attribute_name(a.name),
         "classes": [{"value": c, "name": words.people(a.name, c)} for c in a.classes]}
        for a in lens.attributes if a.name in state.steerable(lens)
    ]  # fmt: skip
    own = lens.attribute_named(attribute)
    planted = planted_shares(lens)
    return {
        "prompts": prompts,
        "targets": targets,
        "classes": list(own.classes),
        "people": [words.people(attribute, c) for c in own.classes],
        "one": [words.one(attribute, c) for c in own.classes],
        "holdable": [{"value": n, "name": words.attribute_name(n)} for n in state.holdable(lens, attribute)],
        "n_steps": lens.manifest.n_steps,
        "seed_counts": list(state.SEED_COUNTS),
        "max_features": min(state.MAX_FEATURES, lens.atlas.density.size),
        "max_own": state.MAX_OWN,
        "grid": list(state.grid(lens)),
        "words": list(lens.manifest.vocabulary or ()),
        "planted": {state.shown_prompt(p): by[attribute] for p, by in planted.items() if attribute in by},
        "now": [words.now(attribute, c) for c in own.classes],
        "reads": classes_read(lens),
        "d_sae": int(lens.atlas.density.size),
    }


def rows(lens: DiffusionLens, view: View, n: int = feature_rows.SHOWN) -> dict[str, Any]:
    """The feature rows: how many move together, and those shown."""
    every = feature_rows.members(lens, view)
    ids = feature_rows.shown(lens, view, n)
    return {"total": len(every), "shown": [row_values(lens, view, i) for i in ids]}


def row_values(lens: DiffusionLens, view: View, feature: int) -> dict[str, Any]:
    """One feature row; ``place`` is that in the set, which is missing for one that was added to it."""
    plain = replace(mix_key(lens, view), own=(), solo=())
    places = _places(lens, plain)
    return {**_row_values(lens, plain, feature), "place": places.get(feature)}


@lru_cache(maxsize=64)
def _places(lens: DiffusionLens, view: View) -> dict[int, int]:
    return {feature: i for i, feature in enumerate(feature_rows.members(lens, view))}


@lru_cache(maxsize=2048)
def _row_values(lens: DiffusionLens, view: View, feature: int) -> dict[str, Any]:
    row = feature_rows.feature_row(lens, view, feature)
    return {
        "id": feature,
        "name": words.feature_name(row.card, row.effect),
        "says": words.feature_says(row, view.attribute),
        "role": row.role,
        "thumbs": [thumb(image) for image in row.thumbs],
    }


def thumb(image: np.ndarray) -> str:
    """A thumbnail as an inline image."""
    small = np.asarray(Image.fromarray(image).resize((THUMB, THUMB), Image.Resampling.LANCZOS))
    return data_uri(small)


@lru_cache(maxsize=8)
def searched(lens: DiffusionLens) -> tuple[Line, ...]:
    """What a search looks into: every label, and every effect of a single feature that is no chance."""
    labels = [Line(i, label.lower(), None) for i, label in enumerate(lens.atlas.labels) if label]
    found = lens.dissection
    if found is None:
        return tuple(labels)
    effects = (e for i in found.ids() for e in effects_of(found, i) if is_sure(found, e) and e.difference > 0)
    return (*labels, *(Line(e.feature, words.sought(e), e) for e in effects))


def found(lens: DiffusionLens, view: View, text: str) -> list[dict[str, Any]]:
    """Rows of the features that a search finds, each named by what was searched for."""
    made = []
    for line in feature_rows.search(lens, searched(lens), text):
        row = row_values(lens, view, line.feature)
        made.append(row if line.effect is None else {**row, "name": words.effect_name(line.effect)})
    return made


def picture_values(picture: Picture, known: str = "") -> Scene:
    """Both rows of images with what was read in them; the unedited images are left out where the page has them."""
    key = before_key(picture.view, picture.stored)
    before = {"key": key, **row_of(picture.before, picture.view.attribute)}
    if known != key:
        before["images"] = [data_uri(image) for image in picture.before.images]
    after = {
        "images": [data_uri(image) for image in picture.after.images],
        **row_of(picture.after, picture.view.attribute),
    }
    return {
        "beta": picture.beta,
        "stored": picture.stored,
        "seconds": round(picture.seconds, 2),
        "before": before,
        "after": after,
        "ratio": None if picture.activation_ratio is None else round(float(picture.activation_ratio), 3),
        "seeds": list(picture.view.seeds),
        "draft": "",
    }


def preview_values(preview: Preview[Row]) -> Scene:
    """Images that were not read: of a tiny autoencoder."""
    view = preview.view
    before: Scene = {"key": ""}
    if isinstance(preview.before, Row):
        before |= {"images": [data_uri(i) for i in preview.before.images], **row_of(preview.before, view.attribute)}
    else:
        before |= {"images": [data_uri(i) for i in preview.before], "labels": {}, "sure": []}
    after = None
    if preview.after is not None:
        after = {"images": [data_uri(image) for image in preview.after], "labels": {}, "sure": []}
    return {"beta": view.beta, "stored": False, "seconds": 0, "before": before, "after": after, "ratio": None,
            "seeds": list(view.seeds), "draft": f"preview by {preview.name}"}  # fmt: skip


def draft_values(view: View, images: np.ndarray, steps: int) -> Scene:
    """Edited images in few steps, not read; the unedited row stays."""
    after = {"images": [data_uri(image) for image in images], "labels": {}, "sure": []}
    return {"beta": view.beta, "stored": False, "seconds": 0, "before": None, "after": after, "ratio": None,
            "seeds": list(view.seeds), "draft": f"draft in {steps} steps"}  # fmt: skip


def before_key(view: View, stored: bool) -> str:
    """Names the unedited images of a view."""
    return f"{view.prompt}|{view.first_seed}|{view.n_seeds}|{view.attribute}|{int(stored)}"


def row_of(row: Row, attribute: str) -> Scene:
    """What was read in a row: attribute → class indices, -1 where undecided, and how sure of the steered one."""
    read = {name: np.where(p.certain, p.labels, -1).tolist() for name, p in row.readings.items()}
    read.setdefault(attribute, np.where(row.certain, row.labels, -1).tolist())
    sure = [] if row.confidence is None else np.rint(100 * row.confidence).astype(int).tolist()
    return {"labels": read, "sure": sure}


def curve_values(studio: Studio, view: View, curve: Curve | None = None) -> Scene | None:
    """The curve under the slider; ``None`` where nothing was measured."""
    curve = curve or curve_for(studio, view)
    if curve is None:
        return None
    two = len(studio.lens.attribute_named(view.attribute).classes) == 2
    return {
        "of": curve.of,
        "two": two,
        "even": 1 / len(studio.lens.attribute_named(view.attribute).classes),
        "setting": curve.setting,
        "points": [_point_values(p) for p in curve.points],
        "control": [_point_values(p) for p in curve.control],
    }


def _point_values(point: CurvePoint) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return round(value, 4) if np.isfinite(value) else None

    return {
        "beta": point.beta, "share": finite(point.share), "low": finite(point.low), "high": finite(point.high),
        "ratio": finite(point.ratio), "ratio_low": finite(point.ratio_low), "ratio_high": finite(point.ratio_high),
        "adjusted": point.adjusted, "n": point.n, "uncertain": point.n_uncertain,
    }  # fmt: skip


def classes_read(lens: DiffusionLens) -> Mapping[str, list[str]]:
    """Attribute → classes, of everything the classifier reads, for naming side effects."""
    every = [*lens.attributes, *(a.attribute() for a in lens.manifest.nuisances)]
    return {a.name: list(a.classes) for a in every}
