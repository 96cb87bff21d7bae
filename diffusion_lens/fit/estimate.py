"""What a fit will cost in time, disk and memory, from a measurement of seconds on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from diffusion_lens.base.words import duration
from diffusion_lens.features.train_sae import train_sae
from diffusion_lens.fit.choose import candidates
from diffusion_lens.fit.config import FitConfig
from diffusion_lens.fit.flip_books import SEEDS
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.model.denoise import BatchRun, Capture
from diffusion_lens.model.generate import request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.flip_book import LENS_BYTES

EDITED = 1.7
"""An edited run beside an unedited one: most edits run the up path twice."""
PROBE_PASSES = 70
MAPS = 8
"""Float32 maps that the atlas keeps of a feature, about."""
SWEEP_BYTES = 10**6
"""A stored sweep, with its example images, about."""
FRAMES = 41 * SEEDS
"""Of a flip-book, about."""
UMAP_SECONDS = (15.0, 0.006)


@dataclass(frozen=True)
class StageCost:
    """Seconds and bytes on disk that one stage is expected to take."""

    stage: str
    seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a fit will cost, from a short measurement on this machine; expect it right within a factor of two.

    Attributes:
        stages: their time, and their disk in the work folder.
        memory_bytes: at most, with the models; ``model_bytes`` of it are the models' weights.
        lens_bytes: of the finished lens, which is written beside one that it replaces.
    """

    stages: tuple[StageCost, ...]
    memory_bytes: int
    model_bytes: int = 0
    lens_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(cost.seconds for cost in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Of all stages together, in the work folder."""
        return sum(cost.disk_bytes for cost in self.stages)

    def text(self) -> str:
        """One line per stage and a total."""
        rows = [f"{c.stage:12} {duration(c.seconds):>10} {c.disk_bytes / 1e6:>10,.0f} MB" for c in self.stages]
        total = f"{'together':12} {duration(self.seconds):>10} {self.disk_bytes / 1e6:>10,.0f} MB"
        lens = f"{'the lens':12} {'':>10} {self.lens_bytes / 1e6:>10,.0f} MB"
        memory = f"memory: about {self.memory_bytes / 1e9:.1f} GB, {self.model_bytes / 1e9:.1f} of it the models"
        return "\n".join([*rows, total, lens, memory])


@dataclass(frozen=True)
class Speed:
    """Measured: seconds per image and denoising step, per decoded image, per SAE step; multiply-adds per second."""

    step: float
    decode: float
    sae_step: float
    multiply_adds: float


def measure_speed(config: FitConfig, model: DiffusionModel) -> Speed:
    """Run two denoising steps of one batch, decode one image, take three SAE steps on noise."""
    n, seeds = config.batch_size, range(config.batch_size)
    wanted = request(model, config.draws[0], seeds, max(2, config.n_steps), config.guidance_scale)
    _ = model.hook_shape
    begun = time.perf_counter()
    h = BatchRun(model, wanted, capture=Capture((0, 1))).read(lambda done: None).h
    step = (time.perf_counter() - begun) / 2 / n
    begun = time.perf_counter()
    model.decode(model.noise([0]))
    decode = time.perf_counter() - begun
    width = h.shape[2] if config.sae.layout == "position" else int(np.prod(h.shape[2:]))
    samples = torch.randn(config.sae.batch_size + 64, width, generator=torch.Generator().manual_seed(0))
    short = config.sae.model_copy(update={"n_steps": 3})
    begun = time.perf_counter()
    train_sae(
        samples, short, model_id=model.model_id, hook_name=model.hook_name, spatial=model.spatial, device=model.device
    )
    sae_step = (time.perf_counter() - begun) / 3
    return Speed(step, decode, sae_step, 6 * config.sae.batch_size * width * config.sae.d_sae / sae_step)


def estimate(config: FitConfig, model: DiffusionModel, classifier: Classifier, speed: Speed | None = None) -> Estimate:
    """What fitting ``config`` will take; measures the machine unless told its ``speed``."""
    speed = speed or measure_speed(config, model)
    classes = {a.name: len(a.classes) for a in classifier.attributes if a.name in config.attributes}
    images = {name: min(config.n_images, config.per_class * n) for name, n in classes.items()}
    collected = min(config.n_images, sum(images.values()))
    numbers = config.n_steps * int(np.prod(model.hook_shape))
    dense = numbers * config.sae.d_sae / speed.multiply_adds
    run = config.n_steps * speed.step
    image_bytes = 3 * _side(model) ** 2
    setting = {s.attribute: len(s.betas) for s in config.settings}
    n_chosen = sum(name not in setting for name in config.attributes) * max(1, len(config.choose.prompts))
    tried = sum(len(s.betas) - 1 for s in candidates("", "", config.choose)) * EDITED + 1
    edited = (run * EDITED + speed.decode) * config.sweep_images
    strengths = sum(setting.get(name, len(config.choose.betas)) - 1 for name in config.swept)
    n_sweeps = len(config.sweeps) * (2 if config.sweep_controls else 1)
    books = len(config.sweeps) * len(config.swept) * FRAMES if config.flip_books else 0
    effects = 2 * config.effect_features * len(config.attributes) * config.effect_images
    probe = sum(n * classes[name] for name, n in images.items()) * numbers * 3 * PROBE_PASSES / speed.multiply_adds
    stages = (
        StageCost("sample", config.n_images * (run + speed.decode), config.n_images * image_bytes),
        StageCost("label", config.n_images * 0.003, 0),
        StageCost("collect", collected * run, collected * numbers * 2),
        StageCost("sae", config.sae.n_steps * speed.sae_step, 8 * config.sae.d_sae * model.d_in),
        StageCost("probes", probe, 4 * sum(classes.values()) * numbers),
        StageCost("attribution", len(classes) * min(config.attribution_images, collected) * dense * 2, 0),
        StageCost("atlas", config.pool_images * dense * 4 + _layout_seconds(config), config.pool_images * image_bytes),
        StageCost("settings", n_chosen * config.choose.n_images * (run * tried + speed.decode * tried), 0),
        StageCost("effects", effects * (run * EDITED + speed.decode), 0),
        StageCost("sweeps", n_sweeps * strengths * edited, 0),
        StageCost("flip-books", books * (run * EDITED + speed.decode), books * image_bytes),
    )
    largest = max(images.values(), default=0) * numbers * 6
    weights = _weights(model)
    lens = (
        stages[3].disk_bytes + stages[4].disk_bytes + stages[6].disk_bytes
        + 4 * config.sae.d_sae * (config.n_steps * sum(classes.values()) + int(np.prod(model.spatial)) * MAPS)
        + n_sweeps * SWEEP_BYTES + (LENS_BYTES if config.flip_books else 0) + (weights if config.bundle_pipeline else 0)
    )  # fmt: skip
    return Estimate(stages, int(weights + max(largest, 1e9)), weights, lens)


def _weights(model: DiffusionModel) -> int:
    """Bytes of all parts of the pipeline."""
    parts = [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())


def _layout_seconds(config: FitConfig) -> float:
    fixed, each = UMAP_SECONDS
    return fixed + each * config.sae.d_sae if config.atlas.layout == "umap" else 0.1


def _side(model: DiffusionModel) -> int:
    scale = getattr(model.pipeline, "vae_scale_factor", 8) if model.kind != "pixel" else 1
    return int(model.latent_shape[1] * scale)
