"""Images labelled by people: a CSV beside them, human raters as a classifier, and a classifier's measured error.

The CSV has a column ``file`` (relative to the CSV) and one per attribute; an empty cell means unknown. A file may
have several rows, one per rater.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from diffusion_lens.base.pictures import open_image
from diffusion_lens.base.text import as_csv, read_table
from diffusion_lens.base.types import MAX_IMAGES, Attribute, LensError, Predictions, Reading
from diffusion_lens.base.validity import discard, find_constant
from diffusion_lens.judging.calibration import UNKNOWN, fit_rules, measure
from diffusion_lens.judging.classify import check_images
from diffusion_lens.judging.photos import PhotoClassifier

CHUNK = 64


@dataclass(frozen=True)
class LabelledImages:
    """Image files and how many raters chose each class; images are opened one by one, never all at once.

    ``votes`` maps an attribute to counts ``[n, class]``; a row of zeros is unlabelled. ``encoding``: the CSV's.
    """

    table: Path
    files: tuple[str, ...]
    votes: Mapping[str, np.ndarray]
    encoding: str = "utf-8"

    def image(self, index: int) -> np.ndarray:
        """One image ``uint8[H, W, 3]``; ``LensError`` where it is missing, no image, too large or outside."""
        try:
            return _open(self.table, self.files[index])
        except LensError as error:
            if self.encoding != "cp1252" or self.files[index].isascii():
                raise
            hint = f"{self.table.name} is not UTF-8 and was read as Windows-1252, which may have changed this name"
            raise LensError(f"{str(error).rstrip('.')}; {hint}.") from None

    def labels(self, attributes: Sequence[Attribute]) -> np.ndarray:
        """The majority's class index, ``int64[n, attribute]``; −1 where unlabelled or tied."""
        columns = []
        for attribute in attributes:
            votes = self.votes.get(attribute.name, np.zeros((len(self.files), len(attribute.classes)), dtype=np.int64))
            alone = (votes == votes.max(axis=1, keepdims=True)).sum(axis=1) == 1
            columns.append(np.where(alone, votes.argmax(axis=1), UNKNOWN))
        return np.stack(columns, axis=1)


def read_labelled(path: Path | str, attributes: Sequence[Attribute]) -> LabelledImages:
    """Read a label CSV; raises ``LensError`` that names the row at fault."""
    path = Path(path)
    if not path.is_file():
        raise LensError(f"There is no label file at {path}; check the path.")
    table = read_table(path)
    read = [a for a in attributes if a.name in table.columns]
    if "file" not in table.columns or not read:
        names = ", ".join(a.name for a in attributes)
        raise LensError(
            f"{path.name} needs a column 'file' and at least one of: {names}; its columns are "
            f"{', '.join(table.columns)} (parted by commas, semicolons or tabs)."
        )
    index: dict[str, int] = {}
    for row in table.rows:
        if not row.cells["file"]:
            raise LensError(f"{path.name}, line {row.line}: the cell 'file' is empty; name an image or delete the row.")
        index.setdefault(row.cells["file"], len(index))
    if not 1 <= len(index) <= MAX_IMAGES:
        raise LensError(f"{path.name} must name 1 to {MAX_IMAGES:,} images; it names {len(index):,}.")
    votes = {a.name: np.zeros((len(index), len(a.classes)), dtype=np.int64) for a in read}
    for row in table.rows:
        for attribute in read:
            label = row.cells[attribute.name]
            if label and label not in attribute.classes:
                choices, where = ", ".join(attribute.classes), f"{path.name}, line {row.line}"
                raise LensError(f"{where}: '{label}' is no {attribute.name}; use one of {choices}.")
            if label:
                votes[attribute.name][index[row.cells["file"]], attribute.index(label)] += 1
    return LabelledImages(path, tuple(index), votes, table.encoding)


def write_label_sheet(images: np.ndarray, folder: Path | str, attributes: Sequence[Attribute]) -> Path:
    """Write ``images uint8[n, H, W, 3]`` as PNG files and ``labels.csv`` with empty cells for a rater to fill."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:05d}.png" for i in range(len(check_images(images)))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name)
    text = as_csv(["file", *(a.name for a in attributes)], ([name, *("" for _ in attributes)] for name in names))
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return folder / "labels.csv"


@dataclass(frozen=True, eq=False)
class HumanLabels:
    """Human raters as a classifier: an image is found by its exact pixels, ``probs`` are the raters' shares.

    An image nobody labelled, or on which the raters tie, is uncertain. People err too: give ``confusion`` where
    their error is known (``with_confusion``), and no correction is made where it is not.
    """

    attributes: tuple[Attribute, ...]
    votes: Mapping[str, Mapping[str, np.ndarray]]
    classifier_id: str
    confusion: Mapping[str, np.ndarray] = field(default_factory=dict)
    uncertain: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_csv(cls, path: Path | str, attributes: Sequence[Attribute]) -> HumanLabels:
        """Read a label CSV; only attributes with a column are kept."""
        table = read_labelled(path, attributes)
        kept = tuple(a for a in attributes if a.name in table.votes)
        votes: dict[str, dict[str, np.ndarray]] = {a.name: {} for a in kept}
        digest = hashlib.sha256()
        for i in range(len(table.files)):
            key = _pixels_key(table.image(i))
            for a in kept:
                # Two files with equal pixels are one image to a rater.
                votes[a.name][key] = votes[a.name].get(key, 0) + table.votes[a.name][i]
                digest.update(f"{key} {a.name} {a.classes} {table.votes[a.name][i].tolist()}".encode())
        return cls(kept, votes, digest.hexdigest()[:16])

    def read(self, images: np.ndarray) -> Reading:
        """What people saw; without features."""
        return Reading(self.predict(images), None)

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        """Look up ``uint8[n, H, W, 3]``; see the class for unlabelled and tied images."""
        pixels = check_images(images).numpy()
        keys = [_pixels_key(image) for image in pixels]
        predictions = {}
        for a in self.attributes:
            none = np.zeros(len(a.classes))
            votes = np.array([self.votes[a.name].get(key, none) for key in keys]).reshape(len(keys), len(a.classes))
            total = votes.sum(axis=1, keepdims=True)
            even = np.full(votes.shape, 1 / len(a.classes))
            probs = np.divide(votes, total, out=even, where=total > 0)
            certain = (votes == votes.max(axis=1, keepdims=True)).sum(axis=1) == 1
            predictions[a.name] = Predictions(probs, certain, a, self.classifier_id)
        return discard(predictions, find_constant(pixels))

    def features(self, images: np.ndarray) -> np.ndarray:
        """People give no features; always a ``LensError`` that says what to use."""
        raise LensError("Human labels have no image features; compare image sets with CLIP or Inception features.")

    def with_confusion(self, confusion: Mapping[str, np.ndarray], uncertain: Mapping[str, np.ndarray]) -> HumanLabels:
        """The same labels with the raters' known error."""
        return replace(self, confusion=confusion, uncertain=uncertain)


T = TypeVar("T", bound="Measurable")


class Measurable(Protocol):
    """A classifier whose error can be filled in."""

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """What it reads."""

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        """Read ``uint8[n, H, W, 3]``."""

    def with_confusion(self: T, confusion: Mapping[str, np.ndarray], uncertain: Mapping[str, np.ndarray]) -> T:
        """Itself, with these counts."""


def calibrate_from_folder(classifier: T, path: Path | str) -> T:
    """Measure a classifier's error on the labelled images of a CSV.

    Attributes without a column in the CSV stay unmeasured, so that nothing is corrected by them.

    Raises:
        LensError: the CSV or an image cannot be used, or too few images are labelled.
    """
    table = read_labelled(path, classifier.attributes)
    return _measured(classifier, table, np.arange(len(table.files)))


def fit_from_folder(
    classifier: PhotoClassifier, path: Path | str, *, fit_share: float = 0.5, max_uncertain: float = 0.1, seed: int = 0
) -> PhotoClassifier:
    """Fit temperatures and thresholds on a random ``fit_share`` of labelled images; measure the error on the others.

    At most a share ``max_uncertain`` of the first part is left uncertain. ``LensError`` as ``calibrate_from_folder``.
    """
    table = read_labelled(path, classifier.attributes)
    attributes = _with_column(classifier, table)
    order = np.random.default_rng(seed).permutation(len(table.files))
    fit, rest = np.split(order, [max(1, int(fit_share * len(order)))])
    chunks = [classifier.logits([table.image(i) for i in fit[k : k + CHUNK]]) for k in range(0, len(fit), CHUNK)]
    logits = {a.name: np.concatenate([chunk[a.name] for chunk in chunks]) for a in attributes}
    rules = fit_rules(logits, table.labels(attributes)[fit], attributes, max_uncertain=max_uncertain)
    return _measured(classifier.with_rules(*rules), table, rest)


def _measured(classifier: T, table: LabelledImages, rows: np.ndarray) -> T:
    attributes = _with_column(classifier, table)
    parts: dict[str, list[Predictions]] = {a.name: [] for a in attributes}
    for k in range(0, len(rows), CHUNK):
        read = predict_any_size(classifier, [table.image(i) for i in rows[k : k + CHUNK]])
        for name, found in parts.items():
            found.append(read[name])
    joined = {name: _join(found) for name, found in parts.items() if found}
    return classifier.with_confusion(*measure(joined, table.labels(attributes)[rows], attributes))


def _with_column(classifier: Measurable, table: LabelledImages) -> list[Attribute]:
    return [a for a in classifier.attributes if a.name in table.votes]


def _join(parts: Sequence[Predictions], order: np.ndarray | slice = slice(None)) -> Predictions:
    probs = np.concatenate([part.probs for part in parts])[order]
    return replace(parts[0], probs=probs, certain=np.concatenate([part.certain for part in parts])[order])


def predict_any_size(classifier: Measurable, images: Sequence[np.ndarray]) -> dict[str, Predictions]:
    """Predictions for images ``uint8[H, W, 3]`` of different sizes, in order; one call per size."""
    shapes = sorted({image.shape for image in images})
    groups = [[i for i, image in enumerate(images) if image.shape == shape] for shape in shapes]
    parts = [classifier.predict(np.stack([images[i] for i in group])) for group in groups]
    order = np.argsort(np.concatenate([np.asarray(group) for group in groups]))
    return {name: _join([part[name] for part in parts], order) for name in parts[0]}


def _open(table: Path, name: str) -> np.ndarray:
    path = (table.parent / name).resolve()
    if "\\" in name and not path.exists():  # written on Windows
        path = (table.parent / name.replace("\\", "/")).resolve()
    if not path.is_relative_to(table.parent.resolve()):
        raise LensError(f"{table.name} names '{name}', which lies outside its folder; move the image beside the CSV.")
    return open_image(path)


def _pixels_key(image: np.ndarray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
