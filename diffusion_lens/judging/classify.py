"""Image → perceived attribute, with a known error and an "uncertain" answer.

``Classifier`` is what the rest of the project sees. ``HeadsClassifier`` is the bundled one for drawn portraits, one
softmax head per attribute, in two architectures: a residual network that judges and a separable one that labels, so
that what learns from labels does not learn the judge's own mistakes. A classifier reads how a picture *looks*; it
says nothing about who anybody is, and its confusion matrix travels with it so that counts can be corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import atomic_path
from diffusion_lens.base.precision import mixed_precision
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.resume import Checkpoint
from diffusion_lens.base.types import Attribute, LensError, Predictions, Reading
from diffusion_lens.base.validity import discard, find_constant
from diffusion_lens.base.weights import weights_digest
from diffusion_lens.judging.calibration import UNKNOWN, fit_rules, measure, softmax

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Architecture = Literal["residual", "separable"]


class Classifier(Protocol):
    """Anything that reads perceived attributes from images and states how often it errs."""

    @property
    def classifier_id(self) -> str:
        """Names the weights and decision rule; equal ids read every image alike."""

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes it reads, nuisances included."""

    @property
    def confusion(self) -> Mapping[str, np.ndarray]:
        """Attribute → counts ``[true class, predicted class]`` of certain, labelled, held-out images."""

    def read(self, images: np.ndarray) -> Reading:
        """Read ``uint8[n, H, W, 3]``, predictions and features in one pass."""

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        """Read ``uint8[n, H, W, 3]``; pictures of one flat colour are never certain (``base.validity``)."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """Float features ``[n, d]`` of ``uint8[n, H, W, 3]``, for Fréchet distances."""


class HeadsConfig(StrictConfig):
    """Everything about a ``HeadsClassifier`` that is not a weight.

    Attributes:
        attributes: what is read; their order is the order of label columns.
        architecture: which network its weights are of.
        image_size: side the images are brought to before they are read.
        widths: channels of the stem and of the three residual blocks; the last is the feature size.
        temperatures: attribute → divisor of the logits (1 before calibration).
        thresholds: attribute → least calibrated probability that counts as certain (0 before calibration).
        confusion: attribute → counts ``[true][predicted]`` of certain held-out images.
        uncertain: attribute → held-out images left undecided, per true class.
    """

    attributes: tuple[Attribute, ...]
    architecture: Architecture = "residual"
    image_size: int = Field(64, ge=16, le=512)
    widths: tuple[int, int, int, int] = (32, 64, 80, 112)
    temperatures: dict[str, float] = Field(default_factory=dict)
    thresholds: dict[str, float] = Field(default_factory=dict)
    confusion: dict[str, tuple[tuple[int, ...], ...]] = Field(default_factory=dict)
    uncertain: dict[str, tuple[int, ...]] = Field(default_factory=dict)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with GroupNorm and a 1×1 shortcut; ``[n, c, s, s] → [n, d, s/stride, s/stride]``."""

    def __init__(self, c: int, d: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, d, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, d)
        self.conv2 = nn.Conv2d(d, d, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, d)
        self.shortcut = nn.Conv2d(c, d, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class HeadsNetwork(nn.Module):
    """Stem at half size, three residual blocks, mean over positions, one linear layer shared by all heads."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        stem = config.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 5, 2, 2, bias=False), nn.GroupNorm(8, stem), nn.ReLU())
        self.blocks = nn.Sequential(*(ResidualBlock(c, d, 2) for c, d in pairwise(config.widths)))
        self.heads = nn.Linear(config.widths[-1], sum(len(a.classes) for a in config.attributes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, 3, s, s]`` in [-1, 1] → features ``[n, d]`` and the logits of all heads ``[n, classes]``."""
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return features, self.heads(features)


class SeparableBlock(nn.Module):
    """Depthwise 5×5, then 1×1 to three times the width and back, beside the identity; ``[n, c, s, s]`` → the same.

    The block of ConvNeXt (Liu et al. 2022, arXiv 2201.03545), narrower.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 5, 1, 2, groups=c)
        self.norm = nn.GroupNorm(1, c)
        self.widen = nn.Conv2d(c, 3 * c, 1)
        self.narrow = nn.Conv2d(3 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return x + self.narrow(F.gelu(self.widen(self.norm(self.depthwise(x)))))


class SeparableNetwork(nn.Module):
    """Stem to a quarter of the size, three stages of two separable blocks, mean over positions, the same heads."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        stem = config.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, 2, 1), nn.GELU(), nn.Conv2d(stem, stem, 3, 2, 1), nn.GroupNorm(1, stem)
        )
        stages: list[nn.Module] = []
        for place, (c, d) in enumerate(pairwise(config.widths)):
            reduce = nn.Conv2d(c, d, 1) if place == 0 else nn.Conv2d(c, d, 2, 2)
            stages += [reduce, SeparableBlock(d), SeparableBlock(d)]
        self.stages = nn.Sequential(*stages, nn.GroupNorm(1, config.widths[-1]))
        self.heads = nn.Linear(config.widths[-1], sum(len(a.classes) for a in config.attributes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, 3, s, s]`` in [-1, 1] → features ``[n, d]`` and the logits of all heads ``[n, classes]``."""
        features = self.stages(self.stem(x)).mean(dim=(2, 3))
        return features, self.heads(features)


NETWORKS: Mapping[Architecture, type[HeadsNetwork] | type[SeparableNetwork]] = {
    "residual": HeadsNetwork,
    "separable": SeparableNetwork,
}


@dataclass(frozen=True, eq=False)
class HeadsClassifier:
    """The bundled image classifier: ``network`` plus the decision rule and known error in ``config``."""

    config: HeadsConfig
    network: HeadsNetwork | SeparableNetwork
    classifier_id: str
    batch_size: int = 64

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes it reads, in head order."""
        return self.config.attributes

    @property
    def confusion(self) -> dict[str, np.ndarray]:
        """Attribute → counts ``[true, predicted]`` of certain held-out images; empty before ``calibrate``."""
        return {name: np.array(rows, dtype=np.int64) for name, rows in self.config.confusion.items()}

    @property
    def uncertain(self) -> dict[str, np.ndarray]:
        """Attribute → held-out images left undecided, per true class ``[class]``."""
        return {name: np.array(row, dtype=np.int64) for name, row in self.config.uncertain.items()}

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return self.network.heads.weight.device

    def to(self, device: str | torch.device) -> HeadsClassifier:
        """The same classifier on ``device`` (the network itself moves)."""
        self.network.to(device)
        return self

    def read(self, images: np.ndarray) -> Reading:
        """Read ``uint8[n, H, W, 3]`` in one pass; other sizes are resized to ``image_size``."""
        features, logits = self.logits(images)
        predictions = {a.name: self._decide(a, logits[a.name]) for a in self.attributes}
        return Reading(discard(predictions, find_constant(check_images(images).numpy())), features)

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        """Attribute → predictions for ``uint8[n, H, W, 3]``."""
        return self.read(images).predictions

    def features(self, images: np.ndarray) -> np.ndarray:
        """The penultimate layer, float32 ``[n, d]``: the features of "FID, portraits features"."""
        return self.logits(images)[0]

    @torch.inference_mode()
    def logits(self, images: np.ndarray | Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Features ``[n, d]`` and, per attribute, uncalibrated logits ``[n, class]``, both float32."""
        pixels = check_images(images)
        rows: list[tuple[Tensor, Tensor]] = []
        for chunk in pixels.split(self.batch_size):
            rows.append(tuple(t.cpu() for t in self.network(_prepare(chunk.to(self.device), self.config.image_size))))
        n_classes = [len(a.classes) for a in self.attributes]
        if not rows:
            empty = torch.zeros(0, sum(n_classes))
            rows = [(torch.zeros(0, self.config.widths[-1]), empty)]
        features = torch.cat([f for f, _ in rows]).numpy()
        parts = torch.cat([z for _, z in rows]).split(n_classes, dim=1)
        return features, {a.name: z.numpy() for a, z in zip(self.attributes, parts, strict=True)}

    def _decide(self, attribute: Attribute, logits: np.ndarray) -> Predictions:
        probs = softmax(logits, self.config.temperatures.get(attribute.name, 1.0))
        certain = probs.max(axis=1) >= self.config.thresholds.get(attribute.name, 0.0)
        return Predictions(probs, certain, attribute, self.classifier_id)

    def with_confusion(
        self, confusion: Mapping[str, np.ndarray], uncertain: Mapping[str, np.ndarray]
    ) -> HeadsClassifier:
        """The same classifier with its error measured anew: see ``calibration.measure``."""
        counts = {
            "confusion": {k: tuple(tuple(int(c) for c in row) for row in table) for k, table in confusion.items()},
            "uncertain": {k: tuple(int(c) for c in row) for k, row in uncertain.items()},
        }
        return replace(self, config=self.config.model_copy(update=counts))

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        self.config.save(folder / "config.json")
        with atomic_path(folder / "model.safetensors") as partial:
            save_file({k: v.contiguous().cpu() for k, v in self.network.state_dict().items()}, partial)

    @classmethod
    def load(cls, folder: Path | str, *, device: str | torch.device = "cpu") -> HeadsClassifier:
        """Read a saved classifier; raises ``LensError`` that names a missing, broken or foreign file."""
        folder = Path(folder)
        config = HeadsConfig.load(folder / "config.json")
        path = folder / "model.safetensors"
        if not path.is_file():
            raise LensError(f"model.safetensors is missing from {folder}; copy the classifier's folder again.")
        try:
            state = load_file(path)
            with torch.device("meta"):  # memory is given to what the file holds, not to what its configuration claims
                empty = NETWORKS[config.architecture](config)
            wanted = {name: value.shape for name, value in empty.state_dict().items()}
            if {name: value.shape for name, value in state.items()} != wanted:
                raise ValueError
            network = _build(config)
            network.load_state_dict(state)
        except (SafetensorError, RuntimeError, ValueError, OverflowError, TypeError):
            raise LensError(f"{path} does not fit its config.json; copy the classifier's folder again.") from None
        return _finish(config, network, device)


def train_heads(
    images: Tensor,
    labels: Tensor,
    attributes: Sequence[Attribute],
    *,
    n_steps: int,
    batch_size: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    augment: Augmentation | None = None,
    progress: Progress | None = None,
    widths: tuple[int, int, int, int] = (32, 64, 80, 112),
    architecture: Architecture = "residual",
    image_size: int | None = None,
    checkpoint: Path | None = None,
) -> HeadsClassifier:
    """Train a ``HeadsClassifier`` on ``images uint8[N, S, S, 3]``, ``labels int64[N, attribute]`` (−1 = unknown).

    AdamW with a one-cycle learning rate, summed cross entropies of all heads. ``augment`` defaults to
    ``mild_augmentation``, which keeps the reading right on generated images that are softer or noisier than
    drawn ones. ``image_size``: the side that images are brought to, their own by default. ``checkpoint``: a file that
    the training's state is kept in, so that a killed one goes on. Call ``calibrate`` on held-out images next.
    """
    pixels = check_images(images)
    _check_labels(labels, attributes, len(pixels))
    config = HeadsConfig(
        attributes=tuple(attributes), architecture=architecture, image_size=image_size or pixels.shape[1], widths=widths
    )
    network = _build(config, seed).to(device)
    pixels, labels = pixels.to(device), labels.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=n_steps, pct_start=0.2)
    change = mild_augmentation if augment is None else augment
    told = f"{config.model_dump_json()} {len(pixels)} images, {n_steps} steps of {batch_size}, lr {lr:g}, seed {seed}"
    parts = {"network": network, "optimiser": optimiser, "schedule": schedule}
    saver, first = Checkpoint(checkpoint, told, parts), 0
    if (saved := saver.load(pixels.device)) is not None:
        first = saved["step"]
        generator.set_state(saved["generator"].cpu())
    for step in range(first, n_steps):
        rows = torch.randint(len(pixels), (batch_size,), generator=generator, device=device)
        batch = change(_prepare(pixels[rows], config.image_size), generator)
        with mixed_precision(batch.device):
            logits = network(batch)[1]
        loss = heads_loss(logits.float(), labels[rows], attributes)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        saver.save({"step": step + 1, "generator": generator.get_state()})
        if progress is not None:
            progress.step(step + 1, n_steps)
    return _finish(config, network, device)


def heads_loss(logits: Tensor, labels: Tensor, attributes: Sequence[Attribute]) -> Tensor:
    """Sum over attributes of the mean cross entropy of known labels; ``logits [n, classes], labels [n, attribute]``."""
    parts = logits.split([len(a.classes) for a in attributes], dim=1)
    terms = [F.cross_entropy(z, y, ignore_index=UNKNOWN, reduction="sum") for z, y in zip(parts, labels.T, strict=True)]
    return (torch.stack(terms) / (labels != UNKNOWN).sum(dim=0).clamp(min=1)).sum()


def mild_augmentation(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur, noise, brightness, contrast, shift (±3 px of 64) and scale (±5 %), each image on its own.

    ``images [n, 3, s, s]`` in [-1, 1]. Colour is kept: hue tells skin tone and hair colour apart.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator, device=images.device)

    scale, shift = uniform(0.95, 1.05), uniform(-0.1, 0.1, 2)
    affine = torch.stack([scale, 0 * scale, shift[:, 0], 0 * scale, scale, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=images.device) / 16
    kernel = torch.outer(taps, taps).expand(3, 1, 5, 5)
    soft = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    images = torch.lerp(images, soft, uniform(-0.3, 1.0, 1, 1, 1).clamp(min=0))
    images = images * uniform(0.92, 1.08, 1, 1, 1) + uniform(-0.08, 0.08, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise * uniform(-0.04, 0.08, 1, 1, 1).clamp(min=0)).clamp(-1, 1)


def calibrate(
    classifier: HeadsClassifier,
    images: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    *,
    max_uncertain: float = 0.03,
    ceiling: float = 0.9,
    fit_share: float = 0.3,
    seed: int = 0,
) -> HeadsClassifier:
    """Fit temperatures and certainty thresholds, then measure the confusion on other images.

    ``labels int [n, attribute]`` (−1 = unknown) of held-out ``images uint8[n, H, W, 3]``. A random ``fit_share``
    of them sets temperature and threshold, the rest fill ``confusion`` and ``uncertain``. See ``choose_threshold``.
    """
    known = torch.as_tensor(labels, dtype=torch.int64)
    _check_labels(known, classifier.attributes, len(images))
    truth = known.numpy()
    _, logits = classifier.logits(images)
    order = np.random.default_rng(seed).permutation(len(images))
    fit, rest = np.split(order, [max(1, int(fit_share * len(images)))])
    temperatures, thresholds = fit_rules(
        {name: z[fit] for name, z in logits.items()},
        truth[fit],
        classifier.attributes,
        max_uncertain=max_uncertain,
        ceiling=ceiling,
    )
    config = classifier.config.model_copy(update={"temperatures": temperatures, "thresholds": thresholds})
    decided = replace(classifier, config=config, classifier_id=_identity(config, classifier.network))
    predictions = {a.name: decided._decide(a, logits[a.name][rest]) for a in classifier.attributes}
    predictions = discard(predictions, find_constant(check_images(images).numpy()[rest]))
    return decided.with_confusion(*measure(predictions, truth[rest], classifier.attributes))


def check_images(images: np.ndarray | Tensor) -> Tensor:
    """``images`` as a uint8 tensor ``[n, H, W, 3]``; raises ``LensError`` for any other type or shape."""
    pixels = torch.as_tensor(images)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise LensError(f"Images must be uint8 [n, height, width, 3]; got {pixels.dtype} {tuple(pixels.shape)}.")
    return pixels


def _check_labels(labels: Tensor, attributes: Sequence[Attribute], n: int) -> None:
    if labels.shape != (n, len(attributes)):
        raise LensError(f"Labels must be [{n}, {len(attributes)}], one per attribute; they are {tuple(labels.shape)}.")
    for column, attribute in zip(labels.T, attributes, strict=True):
        if n and not (column.min() >= UNKNOWN and column.max() < len(attribute.classes)):
            raise LensError(f"Labels of {attribute.name} must lie from -1 to {len(attribute.classes) - 1}.")


def _prepare(pixels: Tensor, size: int) -> Tensor:
    """uint8 ``[n, H, W, 3]`` → float ``[n, 3, size, size]`` in [-1, 1], channels last."""
    x = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


def _build(config: HeadsConfig, seed: int = 0) -> HeadsNetwork | SeparableNetwork:
    """A freshly initialised network; built on "meta" so that torch's global generator is never drawn from."""
    with torch.device("meta"):
        network = NETWORKS[config.architecture](config)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if p.ndim > 1:
            nn.init.kaiming_normal_(p, nonlinearity="relu" if p.ndim == 4 else "linear", generator=generator)
        else:
            nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
    return network


def _identity(config: HeadsConfig, network: nn.Module) -> str:
    # The first architecture is left unsaid, as it was before there were two: ids of older classifiers stay.
    unsaid = {"confusion", "uncertain"} | ({"architecture"} if config.architecture == "residual" else set())
    return weights_digest(network, config.model_dump_json(exclude=unsaid))


def _finish(
    config: HeadsConfig, network: HeadsNetwork | SeparableNetwork, device: str | torch.device
) -> HeadsClassifier:
    network.eval().requires_grad_(False).to(device)
    return HeadsClassifier(config, network, _identity(config, network))
