"""Classifiers by description: one JSON file says which network reads, which classes, by which rule, how often wrongly.

A lens keeps the description of the classifier that judged it, not its weights: these are fetched where the lens is
opened, and the identity of weights and rule is compared. Only small local weights (tests, toys) travel with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import copy_file, read_json
from diffusion_lens.base.types import ASSUMED, LensError
from diffusion_lens.base.weights import weights_folder
from diffusion_lens.judging.classify import Classifier, HeadsClassifier
from diffusion_lens.judging.faces import FaceDetector, yunet_detector
from diffusion_lens.judging.fairface import FAIRFACE_FILE, PAPER_MAP, FairFaceReader
from diffusion_lens.judging.photos import PhotoClassifier
from diffusion_lens.judging.readers import (
    CLIP_PROMPTS,
    FACE_PROMPTS,
    ClipConfig,
    ClipReader,
    HubReader,
    LabelMap,
    Reader,
)

DESCRIPTION = "config.json"
WEIGHTS = "weights"
"""Folder of a network so small that it is kept with its description."""
SMALL_BYTES = 10_000_000
KINDS = "clip, clip:ID, fairface, fairface:FILE, hf:ID, a description (.json) or the folder of a saved classifier"
Map = dict[str, dict[str, tuple[str, ...]]]
Detector = Literal["yunet"]


class ClassifierSpec(StrictConfig):
    """A photo classifier without its weights.

    Attributes:
        kind: ``clip`` (zero-shot), ``fairface``, or ``transformers`` (any image classifier).
        model: hub id or folder; for FairFace its file. A folder ``weights`` beside the description is taken before.
        revision: of a hub repository; ``None``: its newest.
        labels: attribute → class → CLIP prompts, or the network's own labels. The order is the class order.
        faces: CLIP's prompts for no, one and several faces; empty: every image counts as one face.
        detector: finds faces in front of the network; ``None``: nobody looks (CLIP: by its prompts).
        crop: read the found face alone.
        temperatures, thresholds, confusion, uncertain: as in ``PhotoClassifier``.
    """

    kind: Literal["clip", "fairface", "transformers"]
    model: str
    revision: str | None = None
    labels: Map = Field(min_length=1)
    faces: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    detector: Detector | None = None
    crop: bool = False
    temperatures: dict[str, float] = Field(default_factory=dict)
    thresholds: dict[str, float] = Field(default_factory=dict)
    confusion: dict[str, tuple[tuple[int, ...], ...]] = Field(default_factory=dict)
    uncertain: dict[str, tuple[int, ...]] = Field(default_factory=dict)


def open_classifier(
    source: str | Path, *, device: str = "cpu", offline: bool = False, revision: str | None = None
) -> Classifier:
    """A classifier by name (``clip``, ``clip:ID``, ``fairface:FILE``), by description, or from its folder.

    Raises:
        LensError: no such source, or its weights are missing (the sentence says which, and where they go).
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, device, offline)
    if path.suffix == ".json" and path.is_file():
        return build(ClassifierSpec.load(path), path.parent, device=device, offline=offline)
    return build(named_spec(str(source), revision=revision), device=device, offline=offline)


def named_spec(
    text: str,
    *,
    labels: LabelMap | None = None,
    detector: Detector | None = None,
    revision: str | None = None,
) -> ClassifierSpec:
    """The description behind ``clip[:ID]``, ``fairface[:FILE]`` or ``hf:ID``.

    ``labels``: attribute → class → prompts or labels; CLIP and FairFace have some of their own, the paper's classes.
    """
    kind, _, model = text.partition(":")
    own: Map | None = None if labels is None else _plain(labels)
    if kind == "clip":
        chosen = model or ClipConfig().model_id
        return ClassifierSpec(
            kind="clip", model=chosen, revision=revision, labels=own or CLIP_PROMPTS,
            faces={} if detector else FACE_PROMPTS, detector=detector,
        )  # fmt: skip
    if kind == "fairface":
        file, shown = model or FAIRFACE_FILE, own or _plain(PAPER_MAP)
        return ClassifierSpec(kind="fairface", model=file, labels=shown, detector=detector, crop=True)
    if kind == "hf" and model:
        if own is None:
            raise LensError(
                f"Say which labels of {model} make which class, with --labels FILE: JSON like "
                '{"gender": {"female": ["woman"], "male": ["man"]}}.'
            )
        return ClassifierSpec(
            kind="transformers", model=model, revision=revision, labels=own, detector=detector, crop=bool(detector)
        )
    if kind == "csv":
        raise LensError(
            "People's labels cannot judge images that are drawn later: give them as --labeller, and a network as "
            "--classifier."
        )
    raise LensError(f"There is no classifier '{text}'; choose {KINDS}.")


def build(
    spec: ClassifierSpec, base: Path | None = None, *, device: str = "cpu", offline: bool = False
) -> PhotoClassifier:
    """Load what ``spec`` describes; ``base`` is the folder of the description. ``LensError`` as ``open_classifier``."""
    beside = None if base is None else base / WEIGHTS
    place = str(beside) if beside is not None and beside.is_dir() else spec.model
    finder: FaceDetector | None = yunet_detector() if spec.detector else None
    made = PhotoClassifier(_reader(spec, place, device, offline), finder, spec.crop, detector_id=spec.detector or "")
    if spec.temperatures or spec.thresholds:
        made = made.with_rules(spec.temperatures, spec.thresholds)
    return made.with_confusion(
        {name: np.array(table, dtype=np.int64) for name, table in spec.confusion.items()},
        {name: np.array(row, dtype=np.int64) for name, row in spec.uncertain.items()},
    )


def _reader(spec: ClassifierSpec, place: str, device: str, offline: bool) -> Reader:
    if spec.kind == "clip":
        config = ClipConfig(model_id=place, revision=spec.revision, prompts=spec.labels, face_prompts=spec.faces)
        return ClipReader.load(config, device=device, offline=offline)
    if spec.kind == "fairface":
        file = Path(place)
        # A description that comes from another machine names a path that means nothing here.
        return FairFaceReader.load(
            file if file.is_file() else weights_folder() / file.name, label_map=spec.labels, device=device
        )
    return HubReader.load(place, spec.labels, device=device, offline=offline, revision=spec.revision)


def assumed_right(classifier: PhotoClassifier) -> PhotoClassifier:
    """The classifier with an error that was assumed, not measured: none, on ``ASSUMED`` images of every class.

    Corrected shares and their intervals are then those of the raw counts; nobody knows how far off they are.
    """
    n = {a.name: len(a.classes) for a in classifier.attributes}
    return classifier.with_confusion(
        {name: ASSUMED * np.eye(k, dtype=np.int64) for name, k in n.items()},
        {name: np.zeros(k, dtype=np.int64) for name, k in n.items()},
    )


def describe(classifier: Classifier) -> ClassifierSpec | None:
    """The description that opens ``classifier`` again; ``None`` for one that is no known reader or detector."""
    if not isinstance(classifier, PhotoClassifier):
        return None
    if classifier.detector is not None and classifier.detector_id != "yunet":
        return None
    reader, values = classifier.reader, {}
    if isinstance(reader, ClipReader):
        c = reader.config
        values = {
            "kind": "clip", "model": c.model_id, "revision": c.revision, "labels": c.prompts, "faces": c.face_prompts
        }  # fmt: skip
    elif isinstance(reader, FairFaceReader):
        values = {"kind": "fairface", "model": str(reader.path), "labels": _plain(reader.label_map)}
    elif isinstance(reader, HubReader):
        values = {
            "kind": "transformers", "model": reader.model_id, "revision": reader.revision,
            "labels": _plain(reader.label_map),
        }  # fmt: skip
    else:
        return None
    return ClassifierSpec(**values, **_rule(classifier))  # type: ignore[arg-type]


def _rule(classifier: PhotoClassifier) -> dict[str, Any]:
    def counts(tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: np.asarray(table).astype(np.int64).tolist() for name, table in tables.items()}

    return {
        "detector": "yunet" if classifier.detector is not None else None,
        "crop": classifier.crop,
        "temperatures": {name: float(value) for name, value in classifier.temperatures.items()},
        "thresholds": {name: float(value) for name, value in classifier.thresholds.items()},
        "confusion": counts(classifier.confusion),
        "uncertain": counts(classifier.uncertain),
    }


def save_classifier(classifier: Classifier, folder: Path) -> bool:
    """Store ``classifier`` so that ``open_classifier(folder)`` gives it again; ``False`` where it cannot be stored.

    A described one keeps its description only, and its weights where they are a local folder under 10 MB.
    """
    if isinstance(classifier, HeadsClassifier):
        classifier.save(folder)
        return True
    spec = describe(classifier)
    if spec is None:
        return False
    files = _small_files(Path(spec.model))
    for file in files:
        copy_file(file, folder / WEIGHTS / file.relative_to(spec.model))
    if files:
        spec = spec.model_copy(update={"model": WEIGHTS})
    spec.save(folder / DESCRIPTION)
    return True


def _small_files(folder: Path) -> list[Path]:
    """The files of a network in a local folder if they are small together; no pickles."""
    if not folder.is_dir():
        return []
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".json", ".txt", ".safetensors")]
    return found if sum(p.stat().st_size for p in found) < SMALL_BYTES else []


def _from_folder(folder: Path, device: str, offline: bool) -> Classifier:
    values = read_json(folder / DESCRIPTION)
    if isinstance(values, dict) and "kind" in values:
        return build(ClassifierSpec.load(folder / DESCRIPTION), folder, device=device, offline=offline)
    return HeadsClassifier.load(folder, device=device)


def _plain(labels: LabelMap) -> Map:
    return {name: {label: tuple(own) for label, own in groups.items()} for name, groups in labels.items()}
