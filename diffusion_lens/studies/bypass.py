"""Does mid-block bypass improve images? (Hakemi et al., arXiv 2505.17560, version 1.) Measured against drawings.

Of every λ, window and ramp, unguided and guided, on the same seeds: Fréchet distance, precision and recall in the
judge's features, spread, and entropy over attributes. Differences are paired over seeds; their intervals hold together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import save_tensors
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import EditSpec, LensError, Predictions
from diffusion_lens.base.workspace import Workspace, digest
from diffusion_lens.measuring.observe import observe
from diffusion_lens.methods.bypass import BypassEdit, BypassOptions
from diffusion_lens.model.generate import request
from diffusion_lens.portraits.data import draw_prompt
from diffusion_lens.results import metrics
from diffusion_lens.results.bypass import BypassPoint, BypassResult
from diffusion_lens.results.comparison import Measured
from diffusion_lens.studies.bench.shared import JudgedLens

N_BOOT = 400
NEIGHBOURS = 3


class Window(StrictConfig):
    """When the mid-block is passed by, as shares of the steps, and how λ grows there."""

    first: float = 0.0
    last: float = 0.6
    ramp: Literal["linear", "cosine", "constant"] = "linear"


Setting = tuple[float, Window | None, float]
"""Guidance scale, window and λ; no window is no bypass."""


class BypassConfig(StrictConfig):
    """What is drawn: every λ in every window at every guidance scale, ``n`` images each on the same seeds."""

    prompt: str | None = ""
    strengths: tuple[float, ...] = (0.1, 0.25, 0.5)
    windows: tuple[Window, ...] = (Window(), Window(last=1.0), Window(first=0.5, last=1.0, ramp="constant"))
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    n: int = Field(default=400, ge=50, le=20_000)
    n_drawings: int = Field(default=2_000, ge=50, le=100_000)
    first_seed: int = 12_000_000
    batch_size: int = Field(default=50, ge=1)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one setting's images are read as."""

    features: np.ndarray
    readings: Mapping[str, Predictions]


def run_bypass(lens: JudgedLens, config: BypassConfig, work: Path, *, progress: Progress | None = None) -> BypassResult:
    """Measure every setting; finished ones in ``work`` are read back. Raises ``LensError`` off the drawn world."""
    pieces = Workspace(work)
    drawn = draw_prompt(config.prompt or "", config.n_drawings)
    reference = lens.classifier.features(drawn)
    scales = config.guidance_scales if config.prompt else config.guidance_scales[:1]
    settings: list[Setting] = [(scale, None, 0.0) for scale in scales]
    settings += [(scale, w, s) for scale in scales for w in config.windows for s in config.strengths]
    found: dict[Setting, Drawn] = {}
    for setting, bar in zip(settings, (progress or Progress()).parts(len(settings)), strict=True):
        found[setting] = _draw(lens, config, pieces, setting, bar)
    compared = len(settings) - len(scales)
    points = tuple(
        _point(setting, one, found[(setting[0], None, 0.0)], reference, compared) for setting, one in found.items()
    )
    return BypassResult(
        points, config.prompt, "the image classifier's features", len(reference), config.first_seed,
        lens.manifest.base_model.id, lens.classifier.classifier_id, config.model_dump(mode="json"),
    )  # fmt: skip


def _draw(
    lens: JudgedLens,
    config: BypassConfig,
    pieces: Workspace,
    setting: Setting,
    progress: Progress,
) -> Drawn:
    scale, window, strength = setting
    seeds = range(config.first_seed, config.first_seed + config.n)
    wanted = request(lens.model, config.prompt, seeds, lens.manifest.n_steps, scale)

    def make() -> dict[str, np.ndarray]:
        found = observe(
            lens.model, wanted, _edit(window, strength), lens.classifier, n_examples=0, batch_size=config.batch_size,
            progress=progress,
        )  # fmt: skip
        if found.features is None:
            raise LensError("This classifier has no image features, so there is no space to measure quality in.")
        arrays: dict[str, np.ndarray] = {"features": found.features}
        for name, p in found.readings.items():
            arrays |= {f"{name}.labels": p.labels, f"{name}.certain": p.certain}
        return arrays

    told = (wanted, config.n, window and window.model_dump(), strength, lens.classifier.classifier_id)
    arrays = pieces.piece(f"{digest(told)}.safetensors", make, save_tensors, _load, progress)
    readings = {
        a.name: Predictions.from_labels(
            arrays[f"{a.name}.labels"], arrays[f"{a.name}.certain"], a, lens.classifier.classifier_id
        )
        for a in lens.classifier.attributes
    }
    return Drawn(arrays["features"], readings)


def _load(path: Path) -> dict[str, np.ndarray]:
    from diffusion_lens.base.files import load_tensors

    return load_tensors(path)


def _edit(window: Window | None, strength: float) -> BypassEdit | None:
    if window is None or not strength:
        return None
    options = BypassOptions(**window.model_dump())
    spec = EditSpec.of_custom("mid-block bypass", strength, options.model_dump(mode="json"))
    return BypassEdit(strength, options, spec)


def _point(setting: Setting, one: Drawn, base: Drawn, reference: np.ndarray, compared: int) -> BypassPoint:
    scale, window, strength = setting
    precision, recall = metrics.precision_recall(reference, one.features, k=NEIGHBOURS)
    gain = wider = None
    if window is not None:
        level = 1 - 0.05 / compared
        gain = paired_gain(base.features, one.features, partial(metrics.frechet_distance, reference), level=level)
        wider = paired_gain(one.features, base.features, metrics.mean_distance, level=level)
    sure = np.all([p.certain for p in one.readings.values()], axis=0)
    return BypassPoint(
        guidance_scale=scale, first=window.first if window else 0.0, last=window.last if window else 0.0,
        ramp=window.ramp if window else "", strength=strength,
        frechet=metrics.frechet_distance(reference, one.features), gain=gain, precision=precision, recall=recall,
        diversity=float(metrics.mean_distance(one.features)), wider=wider, entropy=spread(one.readings),
        n=len(sure), n_uncertain=int((~sure).sum()),
    )  # fmt: skip


def spread(readings: Mapping[str, Predictions]) -> float:
    """Mean over attributes of the entropy of the shares of decided images, in nats; NaN where none is decided."""
    values = []
    for p in readings.values():
        counts = p.counts
        shares = counts / max(1, counts.sum())
        values.append(float(metrics.entropy(shares[None])[0]) if counts.sum() else float("nan"))
    return float(np.mean(values))


def paired_gain(
    first: np.ndarray, second: np.ndarray, statistic: object, *, level: float, n_boot: int = N_BOOT, seed: int = 0
) -> Measured:
    """``statistic(first) − statistic(second)`` with a bootstrap over seeds: both sets are redrawn alike.

    A distance of ``n`` images is too large by a share that depends on ``n`` alone; it cancels in the difference. Basic
    (reflected) intervals: redrawn sets have repeats, which moves both statistics, and so the percentiles, up.
    """
    measure = statistic if callable(statistic) else float
    value = float(measure(first)) - float(measure(second))
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_boot):
        rows = rng.integers(len(first), size=len(first))
        draws.append(float(measure(first[rows])) - float(measure(second[rows])))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Measured(value, (float(2 * value - high), float(2 * value - low)))


def said_of(results: Sequence[BypassResult]) -> str:
    """The verdicts of all models and prompts."""
    return " ".join(
        f"{one.model_id}, {'no prompt' if one.prompt is None else repr(one.prompt)}: {one.verdict}" for one in results
    )
