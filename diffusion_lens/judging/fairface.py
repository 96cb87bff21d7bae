"""FairFace: a ResNet-34 whose 18 outputs read perceived race, gender and age from one face (Kärkkäinen & Joo, 2021).

The network has torchvision's key names, so that FairFace's own file loads without torchvision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffusion_lens.base.checkpoints import read_state_dict
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.base.weights import weight_file, weights_digest
from diffusion_lens.judging.calibration import softmax
from diffusion_lens.judging.readers import BATCH_SIZE, LabelMap, Scores, empty_scores, map_text, pool_labels

FAIRFACE_FILE = "res34_fair_align_multi_7_20190809.pt"
NUMBER_OF_RACES = re.compile(r"(?<![0-9])([47])(?![0-9])")
"""In a file's name."""
OUTPUTS: dict[str, tuple[str, ...]] = {
    "race": ("White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern"),
    "gender": ("Male", "Female"),
    "age": ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "70+"),
}
"""FairFace's own outputs in their order: 7 + 2 + 9."""

PAPER_MAP: LabelMap = {
    "gender": {"female": ("Female",), "male": ("Male",)},
    "age": {
        "young": ("0-2", "3-9", "10-19"),
        "adult": ("20-29", "30-39", "40-49", "50-59"),
        "old": ("60-69", "70+"),
    },
    "race": {
        "White": ("White",),
        "Black": ("Black",),
        "Asian": ("East Asian", "Southeast Asian"),
        "Indian": ("Indian",),
    },
}
"""DiffLens' classes. Two of FairFace's seven races have no place in its four: what lies there is counted as outside."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """ResNet's two-convolution block (He et al., 2016)."""

    def __init__(self, c: int, d: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, d, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(d)
        self.conv2 = nn.Conv2d(d, d, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(d)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or c != d:
            self.downsample = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet34(nn.Module):
    """ResNet-34 with ``n_outputs`` logits and the pooled features in front of them."""

    def __init__(self, n_outputs: int = 18) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 3, 1)
        self.layer2 = _stage(64, 128, 4, 2)
        self.layer3 = _stage(128, 256, 6, 2)
        self.layer4 = _stage(256, 512, 3, 2)
        self.fc = nn.Linear(512, n_outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised ``[n, 3, 224, 224]`` → features ``[n, 512]`` and logits ``[n, outputs]``."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        features = self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))
        return features, self.fc(features)


def _check_labels(label_map: LabelMap) -> None:
    for name, groups in label_map.items():
        for label in (label for labels in groups.values() for label in labels):
            if label not in OUTPUTS.get(name, ()):
                own = "; ".join(f"{head}: {', '.join(labels)}" for head, labels in OUTPUTS.items())
                raise LensError(f"FairFace has no {name} '{label}'; it reads {own}.")


def _check_races(file: str, label_map: LabelMap) -> None:
    """FairFace's two files have the same shapes; the other one's first outputs are four races, and its name alone
    tells. Raises ``LensError`` unless the file says that it reads seven, where races are read."""
    races = NUMBER_OF_RACES.search(file)
    if races is not None and races[1] != "7":
        raise LensError(f"{file} is FairFace's file of four races, whose outputs are others; use {FAIRFACE_FILE}.")
    if races is None and "race" in label_map:
        raise LensError(
            f"Nothing tells whether {file} reads FairFace's seven races or its four, which have the same outputs; give "
            f"{FAIRFACE_FILE} under its own name (or …_7_….safetensors), or leave race out of the labels."
        )


def _stage(c: int, d: int, n: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(c, d, stride), *(BasicBlock(d, d, 1) for _ in range(n - 1)))


@dataclass(frozen=True, eq=False)
class FairFaceReader:
    """FairFace with its outputs pooled into classes by ``label_map``; give it crops of one face."""

    network: ResNet34
    label_map: LabelMap
    reader_id: str
    path: Path
    size: int = 224

    @classmethod
    def load(
        cls, path: Path | str | None = None, *, label_map: LabelMap = PAPER_MAP, device: str | torch.device = "cpu"
    ) -> FairFaceReader:
        """Read FairFace's file (``weights_only``) or a ``.safetensors`` copy; ``LensError`` if missing or foreign."""
        weights = weight_file(FAIRFACE_FILE, "the FairFace repository's README", path)
        _check_labels(label_map)
        with torch.device("meta"):
            network = ResNet34()
        try:
            network.load_state_dict(read_state_dict(weights), assign=True)
        except RuntimeError:
            raise LensError(f"{weights.name} is not FairFace's ResNet-34 with 18 outputs; fetch it again.") from None
        _check_races(weights.name, label_map)
        network.eval().requires_grad_(False).to(device)
        return cls(network, label_map, weights_digest(network, map_text(label_map)), weights)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """One per group of the label map, in order."""
        return tuple(Attribute(name, tuple(groups)) for name, groups in self.label_map.items())

    @torch.inference_mode()
    def read(self, images: Sequence[np.ndarray]) -> Scores:
        """Read ``uint8[H, W, 3]`` face crops: a softmax per FairFace head, pooled and renormalised."""
        if not len(images):
            return empty_scores(self.attributes, 512)
        logits, features = [], []
        for first in range(0, len(images), BATCH_SIZE):
            pixels = np.stack([self._prepare(image) for image in images[first : first + BATCH_SIZE]])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.network.fc.weight.device)
            f, z = self.network(batch)
            features.append(f.cpu().numpy())
            logits.append(z.cpu().numpy())
        heads = np.split(np.concatenate(logits), np.cumsum([len(labels) for labels in OUTPUTS.values()])[:-1], axis=1)
        own = {name: softmax(z) for name, z in zip(OUTPUTS, heads, strict=True)}
        probs: dict[str, np.ndarray] = {}
        inside: dict[str, np.ndarray] = {}
        for name, groups in self.label_map.items():
            ids = [[OUTPUTS[name].index(label) for label in labels] for labels in groups.values()]
            probs[name], inside[name] = pool_labels(own[name], ids)
        return Scores(probs, inside, np.concatenate(features))

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        resized = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return ((np.asarray(resized, dtype=np.float32) / 255 - MEAN) / STD).astype(np.float32)
