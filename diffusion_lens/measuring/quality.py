"""Image quality beside balance: Fréchet distances with named features, CLIP-I, CLIP-T and the Inception score.

A Fréchet distance is "FID" only with Inception's features; with others the label says whose. Distances are
comparable at equal feature source and equal numbers of images alone, so both travel with every value.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from diffusion_lens.base.checkpoints import read_state_dict
from diffusion_lens.base.files import save_tensors
from diffusion_lens.base.pictures import SUFFIXES, open_image
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import MAX_IMAGES, LensError
from diffusion_lens.base.weights import weight_file
from diffusion_lens.judging.calibration import softmax
from diffusion_lens.judging.classify import Classifier, check_images
from diffusion_lens.judging.readers import ClipReader
from diffusion_lens.results import metrics
from diffusion_lens.results.stats import paired_bootstrap

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION = "Inception v3"
CHUNK = 64
STATISTICS_ERRORS = (
    SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, AttributeError, OSError
)  # fmt: skip
"""What a broken or foreign statistics file raises."""


@dataclass(frozen=True)
class FeatureSource:
    """A named function from ``uint8[n, H, W, 3]`` to features ``[n, d]``; ``probs`` adds class probabilities.

    ``both`` gives the two of them in one pass, where that saves one.
    """

    name: str
    features: Callable[[np.ndarray], np.ndarray]
    probs: Callable[[np.ndarray], np.ndarray] | None = None
    both: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def label(self) -> str:
        """What a Fréchet distance of these features is called."""
        return "FID" if self.name == INCEPTION else f"FID, {self.name} features"


def classifier_source(classifier: Classifier, name: str = "portraits") -> FeatureSource:
    """The penultimate layer of an image classifier, e.g. the bundled one."""
    return FeatureSource(name, classifier.features)


def clip_source(reader: ClipReader) -> FeatureSource:
    """CLIP image embeddings."""
    return FeatureSource("CLIP", reader.embed_images)


def inception_source(path: Path | str | None = None, *, device: str | torch.device = "cpu") -> FeatureSource:
    """Inception v3 as the original FID used it, from torch-fidelity (pool features, unbiased logits).

    Raises:
        LensError: torch-fidelity is not installed, or its weights are missing or damaged.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise LensError(
            "Inception features need torch-fidelity; install it with: pip install torch-fidelity."
        ) from None
    weights = weight_file(INCEPTION_FILE, "torch-fidelity's release v0.2.0", path)
    # torch-fidelity unpickles this file; reading it safely first refuses one that would run code.
    read_state_dict(weights)
    try:
        network = FeatureExtractorInceptionV3("lens", ["2048", "logits_unbiased"], str(weights)).to(device)
    except RuntimeError:
        raise LensError(f"{weights.name} is not torch-fidelity's Inception v3; fetch it again.") from None
    run = partial(_run_inception, network, device)

    def both(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, logits = run(images)
        return features, softmax(logits)

    return FeatureSource(INCEPTION, lambda images: both(images)[0], lambda images: both(images)[1], both)


@torch.inference_mode()
def _run_inception(network: Any, device: str | torch.device, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [network(chunk.permute(0, 3, 1, 2).to(device)) for chunk in check_images(images).split(CHUNK)]
    return tuple(torch.cat([part[i] for part in parts]).float().cpu().numpy() for i in (0, 1))  # type: ignore[return-value]


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean ``[d]`` and covariance ``[d, d]`` of features of ``n`` reference images; ``n`` is ``None`` if unknown."""

    source: str
    mean: np.ndarray
    cov: np.ndarray
    n: int | None

    @classmethod
    def of(cls, features: np.ndarray, source: str) -> FeatureStatistics:
        """Of features ``[n, d]``, with the unbiased covariance."""
        values = np.asarray(features, dtype=np.float64)
        if len(values) < 2:
            raise LensError(f"Reference statistics need >= 2 images; got {len(values)}.")
        return cls(source, values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False)), len(values))

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {"mean": self.mean.astype(np.float64), "cov": np.ascontiguousarray(self.cov, dtype=np.float64)}
        save_tensors(path, tensors, {"source": self.source, "n": str(self.n or 0)})

    def as_features(self) -> np.ndarray:
        """``2 d`` made-up rows with exactly this mean and covariance, so that one distance formula serves all."""
        values, vectors = np.linalg.eigh(self.cov)
        d = len(values)
        rows = np.sqrt(np.clip(values, 0, None) * (2 * d - 1) / 2)[:, None] * vectors.T
        return np.concatenate([self.mean + rows, self.mean - rows])


def load_statistics(path: Path | str, *, source: str = INCEPTION) -> FeatureStatistics:
    """Read saved statistics: our ``.safetensors``, or the ``.npz`` with ``mu, sigma`` of pytorch-fid and clean-fid.

    An ``.npz`` does not say whose features it holds: ``source`` does.
    """
    path = Path(path)
    if not path.is_file():
        raise LensError(f"There is no statistics file at {path}; check the path.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as table:
                mean, cov = (np.asarray(table[name], dtype=np.float64) for name in ("mu", "sigma"))
                read = FeatureStatistics(source, mean, cov, None)
        else:
            with safe_open(path, framework="numpy") as table:
                meta = table.metadata() or {}
                mean, cov = table.get_tensor("mean"), table.get_tensor("cov")
                read = FeatureStatistics(meta["source"], mean, cov, int(meta["n"]) or None)
    except STATISTICS_ERRORS:
        raise LensError(f"{path.name} holds no feature statistics (mean and covariance); make it again.") from None
    d = read.mean.size
    if read.mean.shape != (d,) or read.cov.shape != (d, d):
        raise LensError(f"{path.name} holds a mean of {read.mean.shape} and a covariance of {read.cov.shape}.")
    if not (np.isfinite(read.mean).all() and np.isfinite(read.cov).all()):
        raise LensError(f"{path.name} holds numbers that are not finite; make it again.")
    return read


def folder_statistics(
    folder: Path | str, source: FeatureSource, *, progress: Progress | None = None
) -> FeatureStatistics:
    """Statistics of all images directly in ``folder``, of any sizes; read a few at a time.

    ``progress`` counts images.
    """
    folder = Path(folder)
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not 2 <= len(paths) <= MAX_IMAGES:
        raise LensError(f"{folder} must hold 2 to {MAX_IMAGES:,} images; it holds {len(paths):,}.")
    rows: list[np.ndarray] = []
    for first in range(0, len(paths), CHUNK):
        images = [open_image(path) for path in paths[first : first + CHUNK]]
        # The order within a chunk does not matter to a mean and a covariance.
        for shape in sorted({image.shape for image in images}):
            rows.append(source.features(np.stack([image for image in images if image.shape == shape])))
        if progress is not None:
            progress.step(min(first + CHUNK, len(paths)), len(paths))
    return FeatureStatistics.of(np.concatenate(rows), source.name)


def load_reference(path: Path | str, source: FeatureSource, *, progress: Progress | None = None) -> FeatureStatistics:
    """Statistics of a folder of images, or from a statistics file; ``LensError`` where they are not of ``source``."""
    path = Path(path)
    if path.is_dir():
        return folder_statistics(path, source, progress=progress)
    if not path.exists():
        raise LensError(f"There is no folder of images and no statistics file at {path}; check the path.")
    found = load_statistics(path, source=source.name)
    _check_source(found, source)
    return found


@dataclass(frozen=True)
class FrechetResult:
    """A Fréchet distance with what it was measured on; ``n_reference`` is ``None`` if the file did not say."""

    value: float
    label: str
    n: int
    n_reference: int | None
    d: int

    @property
    def note(self) -> str:
        """What to bear in mind, or an empty string."""
        if min(self.n, self.n_reference or self.n) > self.d:
            return ""
        return f"Fewer images than the {self.d} feature dimensions: compare only with values at the same n."


def frechet(
    images: np.ndarray,
    reference: np.ndarray | FeatureStatistics | Path | str,
    source: FeatureSource,
    *,
    min_images: int = metrics.MIN_FRECHET,
) -> FrechetResult:
    """Fréchet distance of ``images uint8[n, H, W, 3]`` from a reference.

    ``reference`` is a stack of images (e.g. the unedited ones), saved statistics, or the path of a folder of
    images or of a statistics file.

    Raises:
        LensError: too few images on either side, or statistics of other features.
    """
    if isinstance(reference, (str, Path)):
        reference = load_reference(reference, source)
    other = source.features(reference) if isinstance(reference, np.ndarray) else reference
    return frechet_of_features(source.features(images), other, source, min_images=min_images)


def frechet_of_features(
    own: np.ndarray,
    reference: np.ndarray | FeatureStatistics,
    source: FeatureSource,
    *,
    min_images: int = metrics.MIN_FRECHET,
) -> FrechetResult:
    """``frechet`` where ``source`` has read the images already: features ``[n, d]`` from features or statistics."""
    n_reference: int | None
    if isinstance(reference, np.ndarray):
        other, n_reference = reference, len(reference)
    else:
        _check_source(reference, source)
        other, n_reference = reference.as_features(), reference.n
    if min(len(own), len(own) if n_reference is None else n_reference) < min_images:
        sizes = f"{len(own)} images and {n_reference or 'an unknown number of'} reference images"
        raise LensError(f"{source.label} needs >= {min_images} of each; got {sizes}.")
    value = metrics.frechet_distance(own, other, min_images=2)
    return FrechetResult(value, source.label, len(own), n_reference, own.shape[1])


def _check_source(found: FeatureStatistics, source: FeatureSource) -> None:
    if found.source != source.name:
        raise LensError(f"The statistics are of {found.source} features, not of {source.name}; make them again.")


def inception_score(images: np.ndarray, source: FeatureSource, *, splits: int = 10) -> tuple[float, float]:
    """Inception score of ``images``, mean and standard deviation over ``splits``; ``source`` must give ``probs``."""
    if source.probs is None:
        raise LensError(f"{source.name} gives no class probabilities; use inception_source for an Inception score.")
    return metrics.inception_score(source.probs(images), splits=splits)


@dataclass(frozen=True)
class ClipScore:
    """A mean CLIP similarity over ``n`` images.

    Attributes:
        value: ``(cos + 1) / 2``, the form in which DiffLens reports CLIP-I and CLIP-T.
        interval: its 95 % bootstrap interval over images.
        cosine: the raw mean cosine.
    """

    value: float
    interval: tuple[float, float]
    cosine: float
    n: int


def clip_i(edited: np.ndarray, original: np.ndarray, reader: ClipReader) -> ClipScore:
    """Similarity of each edited image to the unedited one of the same seed, both ``uint8[n, H, W, 3]``."""
    if len(edited) != len(original):
        raise LensError(f"CLIP-I compares pairs; got {len(edited)} edited and {len(original)} unedited images.")
    return clip_score(reader.embed_images(check_images(edited).numpy()), reader.embed_images(original))


def clip_t(images: np.ndarray, prompts: str | Sequence[str], reader: ClipReader) -> ClipScore:
    """Similarity of each image to its prompt: one for all images, or one per image."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(texts) not in (1, len(images)):
        raise LensError(f"CLIP-T needs one prompt, or one per image; got {len(texts)} for {len(images)} images.")
    rows = reader.embed_images(check_images(images).numpy())
    return clip_score(rows, np.broadcast_to(reader.embed_texts(texts), rows.shape))


def clip_score(a: np.ndarray, b: np.ndarray) -> ClipScore:
    """Of paired CLIP embeddings ``[n, d]``, where they are known already."""
    values = metrics.cosine_to_unit(a.astype(np.float64), b.astype(np.float64))
    estimate = paired_bootstrap(np.mean, values)
    return ClipScore(estimate.value, estimate.interval, 2 * estimate.value - 1, len(values))
