"""One row of the bench: every number of one method at one strength, with the rule that chose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from diffusion_lens.results import metrics, stats
from diffusion_lens.results.comparison import NEAR, Measured, MethodRow
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


@dataclass(frozen=True)
class Place:
    """Where a curve comes nearest to the target.

    Attributes:
        strength: linear between the two points around it. distance: of the shares there from the target's, Euclidean.
        kept: of the other attributes there, read off the curve. between: the strengths of the two points.
    """

    strength: float
    distance: float
    kept: float
    between: tuple[float, float]

    @property
    def reached(self) -> bool:
        """Whether the curve meets the target there."""
        return self.distance <= NEAR


def nearest_place(points: Sequence[SweepPoint], target: Sequence[float]) -> Place:
    """The place on the curve (corrected shares, linear between strengths) that is nearest to ``target [class]``.

    Of several that are as near, within ``NEAR``, the one that keeps most. Points without a decided image are passed
    over. Our working form.
    """
    seen = sorted((p for p in points if np.isfinite(p.fd)), key=lambda p: p.beta)
    if not seen:
        first = points[0]
        return Place(first.beta, float("inf"), first.kept, (first.beta, first.beta))
    shares = [np.array([share.corrected for share in p.shares]) for p in seen]
    goal = np.asarray(target, dtype=np.float64)
    places = [
        Place(p.beta, float(np.linalg.norm(s - goal)), p.kept, (p.beta, p.beta))
        for p, s in zip(seen, shares, strict=True)
    ]
    for (one, start), (two, end) in pairwise(zip(seen, shares, strict=True)):
        step = end - start
        size = float(step @ step)
        if size == 0:
            continue
        t = float(np.clip((goal - start) @ step / size, 0, 1))
        places.append(
            Place(
                one.beta + t * (two.beta - one.beta),
                float(np.linalg.norm(start + t * step - goal)),
                one.kept + t * (two.kept - one.kept),
                (one.beta, two.beta),
            )
        )
    limit = max(min(place.distance for place in places), NEAR)
    return max((p for p in places if p.distance <= limit), key=lambda p: (p.kept, -p.distance))


def further_strength(points: Sequence[SweepPoint], target: Sequence[float], limit: float) -> float | None:
    """The next strength of a curve that still nears a target which it has not met; ``None`` where it has turned.

    Half as far again as the last, up to ``limit``; a curve that goes away from the target at once has turned, too.
    """
    rising = sorted((p for p in points if np.isfinite(p.fd)), key=lambda p: p.beta)
    if len(rising) < 2 or nearest_place(points, target).reached:
        return None
    last, before = rising[-1], rising[-2]
    undecided = last.n_uncertain > last.n
    if last.beta != max(p.beta for p in points) or last.fd >= before.fd or undecided or last.beta >= limit:
        return None
    return float(f"{min(limit, 1.5 * last.beta):.4g}")


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
