"""One row of the bench: every number of one method at one strength, with the rule that chose it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffusion_lens.base.types import Attribute, Generation, SweepPoint
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.measuring.sweep import Reading, read_images
from diffusion_lens.results import metrics, stats
from diffusion_lens.results.comparison import NORM_FLAG, Measured, MethodRow


@dataclass
class Clock:
    """Seconds spent inside a stream of generations, and whether any of them reported an activation ratio."""

    seconds: float = 0.0
    saw_ratio: bool = False


def timed(parts: Iterable[Generation], clock: Clock) -> Iterator[Generation]:
    """The same stream, with the time that drawing took (reading the images is not counted)."""
    stream = iter(parts)
    while True:
        begin = time.perf_counter()
        part = next(stream, None)
        clock.seconds += time.perf_counter() - begin
        if part is None:
            return
        clock.saw_ratio = clock.saw_ratio or part.activation_ratio is not None
        yield part


@dataclass(frozen=True)
class Sight:
    """What was seen of one run: the reading, and embeddings ``[n, d]`` for likeness."""

    reading: Reading
    embeddings: np.ndarray


Embed = Callable[[np.ndarray], np.ndarray]


def look(parts: Iterable[Generation], classifier: Classifier, embed: Embed | None, n_examples: int) -> Sight:
    """Read a run batch by batch; ``embed`` is CLIP's where there is one, else the classifier's features serve."""
    rows: list[np.ndarray] = []

    def note(stream: Iterable[Generation]) -> Iterator[Generation]:
        for part in stream:
            if embed is not None:
                rows.append(embed(part.images))
            yield part

    reading = read_images(note(parts), classifier, n_examples)
    return Sight(reading, np.concatenate(rows) if rows else reading.features)


def choose(points: Sequence[SweepPoint]) -> SweepPoint:
    """The best point by ``RULE``; points without a decided image are passed over."""
    seen = [p for p in points if np.isfinite(p.fd)] or list(points)
    least = min(p.fd for p in seen)
    close = [p for p in seen if p.fd <= max(least, p.fd_floor)] if np.isfinite(least) else seen
    return max(close, key=lambda p: (kept(p.agreement), -p.fd))


def kept(agreement: Mapping[str, float]) -> float:
    """Mean agreement over the other attributes; 1 where none is read."""
    return float(np.mean(list(agreement.values()))) if agreement else 1.0


def share_statistics(labels: np.ndarray, certain: np.ndarray, target: np.ndarray) -> tuple[Measured | None, ...]:
    """``(FD, SPD)`` with bootstrap intervals over decided images; ``None`` below ``stats.MIN_PAIRS`` of them.

    Near 0 both are biased upwards, as any distance is: read them beside the noise floor.
    """
    decided = labels[certain]
    if len(decided) < stats.MIN_PAIRS:
        return None, None
    columns = [(decided == index).astype(float) for index in range(len(target))]

    def fd(*classes: np.ndarray, axis: int) -> np.ndarray:
        gaps = [c.mean(axis=axis) - t for c, t in zip(classes, target, strict=True)]
        return np.sqrt(sum(gap**2 for gap in gaps))

    def spd(*classes: np.ndarray, axis: int) -> np.ndarray:
        means = np.stack([c.mean(axis=axis) for c in classes])
        return means.max(axis=0) - means.min(axis=0)

    found = [stats.paired_bootstrap(statistic, *columns) for statistic in (fd, spd)]
    return tuple(Measured(e.value, e.interval) for e in found)


def likeness(a: np.ndarray, b: np.ndarray) -> Measured | None:
    """Mean ``(cos + 1) / 2`` of paired embeddings with its interval; ``None`` for too few images."""
    if len(a) < stats.MIN_PAIRS:
        return None
    estimate = stats.paired_bootstrap(np.mean, metrics.cosine_to_unit(a.astype(np.float64), b.astype(np.float64)))
    return Measured(estimate.value, estimate.interval)


def heads_score(reading: Reading, attribute: str) -> float | None:
    """Mean Inception score over the heads of the other attributes; ``None`` below 10 images or without others.

    The steered attribute's own head is left out: it would reward balance, which FD measures already.
    """
    n = len(reading.features)
    others = [p for name, p in reading.predictions.items() if name != attribute]
    if n < 10 or not others:
        return None
    return float(np.mean([metrics.inception_score(p.probs, splits=max(1, min(10, n // 10)))[0] for p in others]))


def measure_row(
    sight: Sight,
    base: Sight,
    prompt_rows: np.ndarray,
    attribute: Attribute,
    confusion: np.ndarray,
    target: np.ndarray,
    **told: Any,
) -> MethodRow:
    """All image metrics of one run against the unedited run of the same seeds.

    ``prompt_rows [d]`` or ``[1, d]`` stands for the prompt; ``told`` are the fields that say what was run.
    """
    own = sight.reading.predictions[attribute.name]
    shares = stats.shares(own.counts, own.n_uncertain, attribute, confusion)
    raw, corrected = stats.log_ratios(shares)
    fd, spd = share_statistics(own.labels, own.certain, target)
    n, n_classes = len(own.labels), len(attribute.classes)
    entropies = metrics.subgroup_entropy(own.probs, own.labels, n_classes)
    before = base.reading.predictions
    agreement = {
        name: metrics.agreement(before[name], p)
        for name, p in sight.reading.predictions.items()
        if name != attribute.name
    }
    enough = n >= metrics.MIN_FRECHET
    row = MethodRow(
        n=n, n_uncertain=own.n_uncertain, shares=shares, log_ratio=raw, log_ratio_corrected=corrected, fd=fd, spd=spd,
        fd_floor=metrics.fd_null_floor(int(own.counts.sum()), target),
        fid=metrics.frechet_distance(base.reading.features, sight.reading.features) if enough else None,
        inception=heads_score(sight.reading, attribute.name),
        image_likeness=likeness(sight.embeddings, base.embeddings),
        prompt_likeness=likeness(sight.embeddings, np.broadcast_to(prompt_rows, sight.embeddings.shape)),
        subgroup_entropy={c: float(e) for c, e in zip(attribute.classes, entropies, strict=True) if np.isfinite(e)},
        agreement=agreement, kept=kept(agreement), certain=float(own.certain.mean()), **told,
    )  # fmt: skip
    return flag(row, sight.reading.activation_ratio)


def flag(row: MethodRow, ratio: float) -> MethodRow:
    """The row with its activation ratio, and whether that leaves the data's range."""
    return replace(row, activation_ratio=ratio, flagged=not 1 / NORM_FLAG <= ratio <= NORM_FLAG)
