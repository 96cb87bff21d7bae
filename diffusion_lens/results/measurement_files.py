"""Measurements on disk: compact JSON beside one safetensors file, and their example images as sheets.

Kept are an image's class and whether it was decided, not probabilities or features. A reference that several
measurements share is kept once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.files import load_tensors, read_json, save_tensors, write_json
from diffusion_lens.base.foreign import check_array, count_tables
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.sheets import load_sheets, save_sheets
from diffusion_lens.base.types import FAULTS, Attribute, EditSpec, Fault, GenerationRequest, LensError, Predictions
from diffusion_lens.results.measurement import NO_IMAGES, Measurement, Recorded


@dataclass(frozen=True)
class Missing:
    """What results of version 0.4 leave to the lens that holds them: the classifier's error, and the model's id."""

    confusion: Mapping[str, np.ndarray]
    model_id: str = ""


FORMAT_VERSION = 2
"""Of every result that holds measurements; version 0.4 wrote 1, or none."""


@dataclass(frozen=True)
class Packed:
    """Measurements as plain JSON values, arrays and images."""

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]
    images: np.ndarray


def pack(measurements: Sequence[Measurement]) -> tuple[Packed, list[int]]:
    """Measurements and their references, each once; and the place of every one asked for."""
    order: dict[_Key, Measurement] = {}

    def add(one: Measurement) -> None:
        key = _key(one)
        if one.reference is not None and _key(one.reference) != key:
            add(one.reference)
        if key not in order or one.reference is not None:
            order[key] = one

    for one in measurements:
        add(one)
    everyone = list(order.values())
    place = {key: i for i, key in enumerate(order)}
    first = everyone[0]
    values = {
        "attributes": [to_plain(a) for a in first.attributes],
        "confusion": {name: np.asarray(table).tolist() for name, table in first.confusion.items()},
        "classifier_id": first.classifier_id,
        "measurements": [_plain(one, place) for one in everyone],
    }
    names = [a.name for a in first.attributes]
    if any([a.name for a in one.attributes] != names or one.classifier_id != first.classifier_id for one in everyone):
        raise LensError("Measurements that are kept together must be of one classifier.")
    arrays = {
        "seeds": np.concatenate([np.array(one.request.seeds, np.int64) for one in everyone]),
        "labels": np.concatenate([one.readings[n].labels.astype(np.uint8) for one in everyone for n in names]),
        "certain": np.packbits(np.concatenate([one.readings[n].certain for one in everyone for n in names])),
    }
    shown = [one.examples for one in everyone if len(one.examples)]
    return Packed(values, arrays, np.concatenate(shown) if shown else NO_IMAGES), [place[_key(m)] for m in measurements]


def _plain(one: Measurement, place: Mapping[_Key, int]) -> dict[str, Any]:
    request = to_plain(one.request)
    request["seeds"] = one.n
    reference: str | int | None = None
    if one.reference is not None:
        reference = "itself" if _key(one.reference) == _key(one) else place[_key(one.reference)]
    return {
        "request": request,
        "edit": to_plain(one.edit),
        "activation_ratio": one.activation_ratio,
        "frechet": one.frechet,
        "examples": len(one.examples),
        "faults": {str(i): fault for i, fault in enumerate(one.faults) if fault is not None},
        "reference": reference,
        "recorded": None if one.recorded is None else to_plain(one.recorded),
    }


_Key = tuple[GenerationRequest, Any, bytes]


def _key(one: Measurement) -> _Key:
    """Equal for one run, loaded twice or measured against itself."""
    read = b"".join(p.labels.astype(np.uint8).tobytes() + p.certain.tobytes() for p in one.readings.values())
    return one.request, one.edit, read


def unpack(values: Mapping[str, Any], arrays: Mapping[str, np.ndarray], images: np.ndarray) -> list[Measurement]:
    """What ``pack`` packed, references included; foreign values raise as they come."""
    attributes = [from_plain(Attribute, a) for a in values["attributes"]]
    confusion = count_tables(values["confusion"], attributes)
    sizes = [int(one["request"]["seeds"]) for one in values["measurements"]]
    total = sum(sizes) * len(attributes)
    if min(sizes, default=0) < 0:
        raise ValueError("a measurement has fewer images than none")
    labels = check_array("labels", arrays["labels"], (None,))
    certain = np.unpackbits(arrays["certain"], count=total).astype(bool)
    if len(labels) != total or len(arrays["seeds"]) != sum(sizes):
        raise LensError(f"{len(labels)} readings are kept of {total} that are spoken of.")
    found: list[Measurement] = []
    seed = reading = image = 0
    for n, one in zip(sizes, values["measurements"], strict=True):
        readings = {}
        for attribute in attributes:
            own = slice(reading, reading + n)
            if n and labels[own].max() >= len(attribute.classes):
                raise LensError(f"A reading of {attribute.name} is of a class that it has not.")
            readings[attribute.name] = Predictions.from_labels(
                labels[own], certain[own], attribute, values["classifier_id"]
            )
            reading += n
        request = {**one["request"], "seeds": tuple(int(s) for s in arrays["seeds"][seed : seed + n])}
        seed, shown = seed + n, int(one["examples"])
        if not 0 <= image + shown <= len(images):
            raise LensError(f"{len(images)} example images are kept, more are spoken of.")
        made = Measurement(
            request=from_plain(GenerationRequest, request),
            edit=None if one["edit"] is None else from_plain(EditSpec, one["edit"]),
            readings=readings,
            confusion=confusion,
            classifier_id=values["classifier_id"],
            faults=_faults(one["faults"], n),
            activation_ratio=float(one["activation_ratio"]),
            frechet=None if one["frechet"] is None else float(one["frechet"]),
            examples=images[image : image + shown] if shown else NO_IMAGES,
            reference=None if one["reference"] in (None, "itself") else found[int(one["reference"])],
            recorded=None if one["recorded"] is None else from_plain(Recorded, one["recorded"]),
        )
        image += shown
        found.append(replace(made, reference=made) if one["reference"] == "itself" else made)
    return found


def _faults(kept: Mapping[str, Any], n: int) -> tuple[Fault | None, ...]:
    if not kept:
        return ()
    faults: list[Fault | None] = [None] * n
    for place, fault in kept.items():
        faults[int(place)] = FAULTS[FAULTS.index(fault)]
    return tuple(faults)


def save_measured(
    folder: Path, stem: str, values: Mapping[str, Any], measurements: Sequence[Measurement], *, lossless: bool = False
) -> Path:
    """Write ``<stem>.json``, ``<stem>.safetensors`` and, where there are examples, ``<stem>-examples…``.

    ``values``: what else the result holds, as plain JSON values. Returns the JSON's path.
    """
    packed, places = pack(measurements)
    if len(packed.images):
        save_sheets(packed.images, folder, f"{stem}-examples", lossless=lossless)
    save_tensors(folder / f"{stem}.safetensors", packed.arrays)
    path = folder / f"{stem}.json"
    write_json(path, {**values, "format_version": FORMAT_VERSION, "kept": packed.values, "places": places})
    return path


def load_measured(folder: Path, stem: str) -> tuple[dict[str, Any], list[Measurement]]:
    """The values and measurements that ``save_measured`` wrote."""
    values = read_json(folder / f"{stem}.json")
    return values, measured_beside(values, folder, stem)


class Queue:
    """Measurements handed out one by one; asking for more than there are is a ``LensError``."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self._rest = list(measurements)[::-1]

    def take(self, n: int = 1) -> list[Measurement]:
        """The next ``n``."""
        if n > len(self._rest):
            raise LensError("Fewer measurements are kept than are spoken of.")
        return [self._rest.pop() for _ in range(n)]


def measured_beside(values: Mapping[str, Any], folder: Path, stem: str) -> list[Measurement]:
    """The measurements that lie beside the JSON ``values`` of ``save_measured``."""
    kept = values["kept"]
    shown = any(one["examples"] for one in kept["measurements"])
    images = load_sheets(folder, f"{stem}-examples") if shown else NO_IMAGES
    found = unpack(kept, load_tensors(folder / f"{stem}.safetensors"), images)
    return [found[int(place)] for place in values["places"]]
