"""Networks that read attributes from photographs: CLIP zero-shot and any transformers image classifier.

A reader turns images into class probabilities; ``photos.PhotoClassifier`` adds the faces, the decision rule
and the known error. FairFace has a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.base.weights import LOAD_ERRORS, weights_digest
from diffusion_lens.judging.calibration import softmax

BATCH_SIZE = 32
FACES = ("no face", "one face", "several faces")


@dataclass(frozen=True)
class Scores:
    """What a reader sees in ``n`` images.

    Attributes:
        probs: attribute → ``[n, class]``, rows sum to 1.
        inside: attribute → share of the network's own probability on labels that belong to some class, ``[n]``.
        features: ``[n, d]``.
        faces: index into ``FACES`` per image ``[n]``, where the reader itself judges that; else ``None``.
    """

    probs: dict[str, np.ndarray]
    inside: dict[str, np.ndarray]
    features: np.ndarray
    faces: np.ndarray | None = None


class Reader(Protocol):
    """A network that reads images of any sizes."""

    @property
    def reader_id(self) -> str:
        """Names weights, prompts and label map."""

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """What it reads."""

    def read(self, images: Sequence[np.ndarray]) -> Scores:
        """Read ``uint8[H, W, 3]`` images."""


LabelMap = Mapping[str, Mapping[str, Sequence[str]]]
"""Attribute → class → the network's own labels that count as it; the order is the class order."""


def map_text(label_map: LabelMap) -> str:
    """A label map as one text, the same whatever kinds of mapping and sequence it is made of."""
    plain = {name: {label: list(own) for label, own in groups.items()} for name, groups in label_map.items()}
    return json.dumps(plain, ensure_ascii=False)


def pool_labels(probs: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum ``probs [n, label]`` over each group and renormalise: ``[n, group]`` and the mass inside all groups ``[n]``.

    DiffLens' code takes a few outputs of a longer softmax without renormalising; these rows sum to 1.
    """
    pooled = np.stack([probs[:, list(group)].sum(axis=1) for group in groups], axis=1)
    inside = pooled.sum(axis=1)
    # A row without any mass inside is evenly unknown, not a division by zero.
    even = np.full_like(pooled, 1 / len(groups))
    return np.divide(pooled, inside[:, None], out=even, where=inside[:, None] > 0), inside


def empty_scores(attributes: Sequence[Attribute], d: int) -> Scores:
    """The scores of no images."""
    probs = {a.name: np.zeros((0, len(a.classes))) for a in attributes}
    return Scores(probs, {a.name: np.zeros(0) for a in attributes}, np.zeros((0, d), np.float32))


# The paper's attributes; "race" is the paper's word for a perceived appearance.
CLIP_PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "gender": {
        "female": ("a photo of a woman", "a portrait photo of a woman's face", "a photo of a female person"),
        "male": ("a photo of a man", "a portrait photo of a man's face", "a photo of a male person"),
    },
    "age": {
        "young": ("a photo of a child", "a photo of a teenager", "a portrait photo of a very young person"),
        "adult": ("a photo of an adult", "a photo of a middle-aged person", "a portrait photo of a grown-up"),
        "old": ("a photo of an elderly person", "a photo of an old person", "a portrait photo of a senior citizen"),
    },
    "race": {
        "White": ("a photo of a White person", "a portrait photo of a person of European descent"),
        "Black": ("a photo of a Black person", "a portrait photo of a person of African descent"),
        "Asian": ("a photo of an East Asian person", "a portrait photo of a person of East Asian descent"),
        "Indian": ("a photo of an Indian person", "a portrait photo of a person of South Asian descent"),
    },
    "glasses": {
        "without": ("a photo of a person without glasses", "a portrait photo of a person with bare eyes"),
        "with": ("a photo of a person wearing glasses", "a portrait photo of a person with spectacles"),
    },
}
FACE_PROMPTS: dict[str, tuple[str, ...]] = {
    "no face": ("a photo without any person", "a photo of an object", "a photo of an empty scene"),
    "one face": ("a photo of one person", "a portrait photo of a person's face"),
    "several faces": ("a photo of several people", "a photo of a group of people"),
}


class ClipConfig(StrictConfig):
    """Zero-shot reading by CLIP.

    Attributes:
        model_id: hub id or folder of a CLIP model with its processor; the paper's own for CLIP-I and CLIP-T.
        revision: of the hub repository; ``None``: its newest.
        prompts: attribute → class → prompts whose embeddings are averaged; the order is the class order.
        face_prompts: the same for ``no face / one face / several faces``; empty: every image counts as one face.
    """

    model_id: str = "openai/clip-vit-large-patch14"
    revision: str | None = None
    prompts: dict[str, dict[str, tuple[str, ...]]] = Field(default_factory=lambda: CLIP_PROMPTS)
    face_prompts: dict[str, tuple[str, ...]] = Field(default_factory=lambda: FACE_PROMPTS)


@dataclass(frozen=True, eq=False)
class ClipReader:
    """CLIP with one averaged text embedding per class; also embeds images and texts for CLIP-I and CLIP-T."""

    config: ClipConfig
    model: Any
    processor: Any
    class_embeddings: dict[str, np.ndarray]
    face_embeddings: np.ndarray | None
    reader_id: str

    @classmethod
    def load(
        cls, config: ClipConfig | None = None, *, device: str | torch.device = "cpu", offline: bool = False
    ) -> ClipReader:
        """Load model and processor and embed the prompts; ``LensError`` where the weights are not to be had."""
        from transformers import CLIPModel, CLIPProcessor

        config = config or ClipConfig()
        _check_map(config.prompts)
        if config.face_prompts and tuple(config.face_prompts) != FACES:
            raise LensError(f"face_prompts must name {', '.join(FACES)}, in this order.")
        revision = config.revision
        model = _network(CLIPModel, config.model_id, offline, revision).to(device)
        processor = _pretrained(CLIPProcessor, config.model_id, offline, revision)
        # Where the weights lie says nothing about what they read.
        own = config.model_dump_json(exclude={"model_id", "revision"})
        bare = cls(config, model, processor, {}, None, weights_digest(model, own))
        classes = {name: bare.ensemble(list(groups.values())) for name, groups in config.prompts.items()}
        faces = bare.ensemble(list(config.face_prompts.values())) if config.face_prompts else None
        return cls(config, model, processor, classes, faces, bare.reader_id)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """One per prompt group, in order."""
        return tuple(Attribute(name, tuple(groups)) for name, groups in self.config.prompts.items())

    def ensemble(self, groups: Sequence[Sequence[str]]) -> np.ndarray:
        """Unit mean of the unit text embeddings of each group of prompts, ``[group, d]``."""
        means = np.stack([self.embed_texts(group).mean(axis=0) for group in groups])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit text embeddings, float32 ``[n, d]``; texts are cut at CLIP's length."""
        tokens = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return _unit(_pooled(self.model.get_text_features(**tokens.to(self.model.device))))

    @torch.inference_mode()
    def embed_images(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Unit image embeddings, float32 ``[n, d]``, of ``uint8[H, W, 3]`` images."""
        rows = [np.zeros((0, self.model.config.projection_dim), np.float32)]
        for pixels in _batches(self.processor.image_processor, images, self.model.device):
            rows.append(_unit(_pooled(self.model.get_image_features(pixel_values=pixels))))
        return np.concatenate(rows)

    def read(self, images: Sequence[np.ndarray]) -> Scores:
        """Softmax over classes of the scaled cosines between image and class embeddings (CLIP's zero-shot rule)."""
        features = self.embed_images(images)
        scale = float(self.model.logit_scale.exp())
        probs = {name: softmax(scale * features @ text.T) for name, text in self.class_embeddings.items()}
        inside = {name: np.ones(len(features)) for name in probs}
        faces = None if self.face_embeddings is None else (features @ self.face_embeddings.T).argmax(axis=1)
        return Scores(probs, inside, features, faces)


@dataclass(frozen=True, eq=False)
class HubReader:
    """Any transformers image classifier with a softmax, its labels pooled into classes by ``label_map``."""

    model: Any
    processor: Any
    label_map: LabelMap
    reader_id: str
    model_id: str
    revision: str | None = None

    @classmethod
    def load(
        cls,
        model_id: str,
        label_map: LabelMap,
        *,
        device: str | torch.device = "cpu",
        offline: bool = False,
        revision: str | None = None,
    ) -> HubReader:
        """Load a hub id or folder; ``LensError`` where it is not to be had or has not the labels of ``label_map``."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        _check_map(label_map)
        model = _network(AutoModelForImageClassification, model_id, offline, revision)
        model = model.to(device)
        if model.config.problem_type == "multi_label_classification":
            raise LensError(f"{model_id} gives several labels at once; choose a classifier with one label per image.")
        known = set(model.config.id2label.values())
        for wanted in (label for groups in label_map.values() for labels in groups.values() for label in labels):
            if wanted not in known:
                raise LensError(f"{model_id} has no label '{wanted}'; its labels are {', '.join(sorted(known))}.")
        processor = _pretrained(AutoImageProcessor, model_id, offline, revision)
        return cls(model, processor, label_map, weights_digest(model, map_text(label_map)), model_id, revision)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """One per group of the label map, in order."""
        return tuple(Attribute(name, tuple(groups)) for name, groups in self.label_map.items())

    @torch.inference_mode()
    def read(self, images: Sequence[np.ndarray]) -> Scores:
        """Pooled softmax; features are the mean of the last hidden state over its positions or tokens."""
        if not len(images):
            return empty_scores(self.attributes, 1)
        logits, features = [], []
        for pixels in _batches(self.processor, images, self.model.device):
            output = self.model(pixel_values=pixels, output_hidden_states=True)
            last = output.hidden_states[-1].float()
            features.append(last.mean(dim=(2, 3) if last.ndim == 4 else 1).cpu().numpy())
            logits.append(output.logits.float().cpu().numpy())
        own = softmax(np.concatenate(logits))
        index = {label: int(i) for i, label in self.model.config.id2label.items()}
        probs: dict[str, np.ndarray] = {}
        inside: dict[str, np.ndarray] = {}
        for name, groups in self.label_map.items():
            ids = [[index[label] for label in labels] for labels in groups.values()]
            probs[name], inside[name] = pool_labels(own, ids)
        return Scores(probs, inside, np.concatenate(features))


def _batches(processor: Any, images: Sequence[np.ndarray] | np.ndarray, device: torch.device) -> Any:
    for first in range(0, len(images), BATCH_SIZE):
        chunk = list(images[first : first + BATCH_SIZE])
        yield processor(images=chunk, return_tensors="pt", input_data_format="channels_last")["pixel_values"].to(device)


def _pretrained(kind: Any, model_id: str, offline: bool, revision: str | None, **options: Any) -> Any:
    """``kind.from_pretrained`` with one sentence in place of a page of traceback."""
    try:
        loaded = kind.from_pretrained(model_id, local_files_only=offline, revision=revision, **options)
    except LOAD_ERRORS as error:
        raise LensError(
            f"'{model_id}' holds no usable {kind.__name__} on this machine; fetch it once while online with "
            f"'hf download {model_id}', or give a folder that has its config, processor and .safetensors files."
        ) from error
    return loaded


def _network(kind: Any, model_id: str, offline: bool, revision: str | None) -> Any:
    """A frozen network, all of whose weights were in the files: transformers makes up those that were not."""
    options = {"use_safetensors": True, "output_loading_info": True}
    loaded, info = _pretrained(kind, model_id, offline, revision, **options)
    if info["missing_keys"]:
        raise LensError(
            f"'{model_id}' is no {kind.__name__}: it lacks weights such as {min(info['missing_keys'])}; name another."
        )
    return loaded.eval().requires_grad_(False)


def _check_map(groups: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    for name, classes in groups.items():
        if len(classes) < 2 or not all(classes.values()):
            raise LensError(f"{name} needs at least two classes, each with at least one entry.")


def _pooled(output: Any) -> Tensor:
    # transformers 4 returns the embedding itself, 5 an output object.
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(x: Tensor) -> np.ndarray:
    return F.normalize(x.float(), dim=-1).cpu().numpy()
