"""One row of the bench: every number of one method at one strength, with the rule that chose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_lens.results import metrics, stats
from diffusion_lens.results.comparison import Measured, MethodRow
from diffusion_lens.results.measurement import Figures, Measurement
from diffusion_lens.results.sweeps import SweepPoint


@dataclass(frozen=True)
class Run:
    """One run on the final seeds.

    Attributes:
        embeddings: of its images ``[n, d]``, for likeness. seconds: to draw one of them.
        saw_edit: whether ``|h'| / |h|`` was measured on the way.
    """

    measurement: Measurement
    embeddings: np.ndarray = field(repr=False)
    seconds: float
    saw_edit: bool


def choose(points: Sequence[SweepPoint]) -> SweepPoint:
    """The best point by ``RULE``; points without a decided image are passed over."""
    seen = [p for p in points if np.isfinite(p.fd)] or list(points)
    least = min(p.fd for p in seen)
    close = [p for p in seen if p.fd <= max(least, p.fd_floor)] if np.isfinite(least) else seen
    return max(close, key=lambda p: (p.kept, -p.fd))


def likeness(a: np.ndarray, b: np.ndarray) -> Measured | None:
    """Mean ``(cos + 1) / 2`` of paired embeddings with its interval; ``None`` for too few images."""
    if len(a) < stats.MIN_PAIRS:
        return None
    estimate = stats.paired_bootstrap(np.mean, metrics.cosine_to_unit(a.astype(np.float64), b.astype(np.float64)))
    return Measured(estimate.value, estimate.interval)


def heads_score(figures: Figures) -> float | None:
    """Mean Inception score over the heads of the other attributes; ``None`` below 10 images or without others.

    The steered attribute's own head is left out: it would reward balance, which FD measures already.
    """
    n, own = figures.measurement.n, figures.attribute.name
    others = [p for name, p in figures.measurement.readings.items() if name != own]
    if n < 10 or not others:
        return None
    return float(np.mean([metrics.inception_score(p.probs, splits=max(1, min(10, n // 10)))[0] for p in others]))


def measure_row(run: Run, base: Run, prompt_rows: np.ndarray, figures: Figures, **fields: Any) -> MethodRow:
    """All image metrics of one run against the unedited run of the same seeds.

    Args:
        figures: what the run says of the steered attribute, FD from the target.
        prompt_rows: ``[d]`` or ``[1, d]``, stands for the prompt.
        fields: those of ``MethodRow`` that say what was run.
    """
    classes = figures.attribute.classes
    entropies = metrics.subgroup_entropy(figures.predictions.probs, figures.labels, len(classes))
    return MethodRow(
        figures=figures,
        inception=heads_score(figures),
        image_likeness=likeness(run.embeddings, base.embeddings),
        prompt_likeness=likeness(run.embeddings, np.broadcast_to(prompt_rows, run.embeddings.shape)),
        subgroup_entropy={c: float(e) for c, e in zip(classes, entropies, strict=True) if np.isfinite(e)},
        seconds_per_image=run.seconds,
        **fields,
    )
