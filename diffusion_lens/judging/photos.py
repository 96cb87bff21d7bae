"""Perceived attributes of real photographs, with every image counted.

``PhotoClassifier`` puts a reader (CLIP zero-shot by default, FairFace, any transformers classifier) behind the
``Classifier`` protocol. Images with no face, several faces or an undecided reading stay in the count as
uncertain; ``PhotoReading.tally`` tells them apart. The error is measured on labelled images by
``labelled.calibrate_from_folder``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diffusion_lens.base.types import Attribute, LensError, Predictions, Reading
from diffusion_lens.base.validity import discard, find_constant
from diffusion_lens.judging.calibration import softmax
from diffusion_lens.judging.classify import check_images
from diffusion_lens.judging.faces import FaceDetector, face_crop
from diffusion_lens.judging.readers import FACES, Reader, Scores

NO_FACE, ONE_FACE, SEVERAL_FACES = range(len(FACES))
THRESHOLD = 0.6
INSIDE = 0.5


@dataclass(frozen=True)
class PhotoReading(Reading):
    """Predictions for ``n`` images, their features ``[n, d]``, and how many faces each shows.

    ``faces [n]`` indexes ``readers.FACES``; it is ``None`` where nobody looked for faces.
    """

    faces: np.ndarray | None = None

    def tally(self, attribute: str) -> dict[str, int]:
        """Images per class, plus ``uncertain``, ``no face`` and ``several faces``; the counts sum to ``n``."""
        read = self.predictions[attribute]
        counts = {label: int(c) for label, c in zip(read.attribute.classes, read.counts, strict=True)}
        faces = np.full(len(read.certain), ONE_FACE) if self.faces is None else self.faces
        counts["uncertain"] = int((~read.certain & (faces == ONE_FACE)).sum())
        return counts | {FACES[i]: int((faces == i).sum()) for i in (NO_FACE, SEVERAL_FACES)}


@dataclass(frozen=True, eq=False)
class PhotoClassifier:
    """A reader, who looks for faces, when an image counts as decided, and how often that is wrong.

    Attributes:
        reader: the network.
        detector: finds faces; ``None`` leaves it to the reader (CLIP judges it from prompts, others do not).
        crop: read the found face alone instead of the whole image (FairFace needs it).
        temperatures: attribute → divisor of the log probabilities (1 where absent).
        thresholds: attribute → least probability that counts as certain (``THRESHOLD`` where absent).
        confusion: attribute → counts ``[true, predicted]`` of certain, labelled images; empty: not measured.
        uncertain: attribute → undecided labelled images per true class ``[class]``.
        detector_id: names the detector, since a function cannot name itself.
    """

    reader: Reader
    detector: FaceDetector | None = None
    crop: bool = False
    temperatures: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    confusion: Mapping[str, np.ndarray] = field(default_factory=dict)
    uncertain: Mapping[str, np.ndarray] = field(default_factory=dict)
    detector_id: str = "detector"

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """What the reader reads."""
        return self.reader.attributes

    @property
    def classifier_id(self) -> str:
        """Names the reader's weights, the decision rule, and whether and how faces are sought."""
        numbers = [sorted((k, float(v)) for k, v in own.items()) for own in (self.temperatures, self.thresholds)]
        rule = [self.reader.reader_id, *numbers]
        faces = [self.detector_id if self.detector else "", self.crop]
        return hashlib.sha256(repr([*rule, *faces]).encode()).hexdigest()[:16]

    def read(self, images: np.ndarray | Sequence[np.ndarray]) -> PhotoReading:
        """Read images ``uint8[n, H, W, 3]``, or a sequence of ``uint8[H, W, 3]`` of any sizes, in order."""
        photos = list(check_images(images).numpy()) if isinstance(images, np.ndarray) else list(images)
        flat = find_constant(photos)
        faces: np.ndarray | None = None
        if self.detector is not None:
            photos, faces = self._find_faces(photos)
        scores = self.reader.read(photos)
        if faces is None:
            faces = scores.faces
        usable = np.ones(len(photos), dtype=bool) if faces is None else faces == ONE_FACE
        predictions = {a.name: self._decide(a, scores, usable) for a in self.attributes}
        return PhotoReading(discard(predictions, flat), scores.features, faces)

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        """Attribute → predictions for ``uint8[n, H, W, 3]``; images without exactly one face are uncertain.

        Where there is not exactly one face the probabilities are even.
        """
        return self.read(images).predictions

    def features(self, images: np.ndarray) -> np.ndarray:
        """The reader's features ``[n, d]`` of ``uint8[n, H, W, 3]``."""
        features = self.read(images).features
        assert features is not None  # a reader has features
        return features

    def logits(self, images: np.ndarray | Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Attribute → log probabilities ``[n, class]`` at temperature 1, for fitting the decision rule."""
        plain = replace(self, temperatures={}).read(images).predictions
        return {name: _log(read.probs) for name, read in plain.items()}

    def with_rules(self, temperatures: Mapping[str, float], thresholds: Mapping[str, float]) -> PhotoClassifier:
        """The same reader under another decision rule; a measured error does not carry over."""
        return replace(self, temperatures=temperatures, thresholds=thresholds, confusion={}, uncertain={})

    def with_confusion(
        self, confusion: Mapping[str, np.ndarray], uncertain: Mapping[str, np.ndarray]
    ) -> PhotoClassifier:
        """The same classifier with its error given or measured: see ``calibration.measure``."""
        for attribute in self.attributes:
            k = len(attribute.classes)
            if attribute.name in confusion and np.shape(confusion[attribute.name]) != (k, k):
                raise LensError(
                    f"The confusion of {attribute.name} must be {k} by {k} counts, true class by read class."
                )
        return replace(self, confusion=confusion, uncertain=uncertain)

    def _find_faces(self, photos: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        assert self.detector is not None
        boxes = [self.detector(photo) for photo in photos]
        faces = np.minimum(np.array([len(b) for b in boxes], dtype=np.int64), SEVERAL_FACES)
        if self.crop:
            photos = [face_crop(p, b[0]) if len(b) == 1 else p for p, b in zip(photos, boxes, strict=True)]
        return photos, faces

    def _decide(self, attribute: Attribute, scores: Scores, usable: np.ndarray) -> Predictions:
        probs = softmax(_log(scores.probs[attribute.name]), self.temperatures.get(attribute.name, 1.0))
        # An even row keeps means of probabilities finite without leaning to any class.
        probs[~usable] = 1 / len(attribute.classes)
        sure = probs.max(axis=1) >= self.thresholds.get(attribute.name, THRESHOLD)
        certain = usable & sure & (scores.inside[attribute.name] >= INSIDE)
        return Predictions(probs, certain, attribute, self.classifier_id)


def _log(probs: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probs, 1e-12))
