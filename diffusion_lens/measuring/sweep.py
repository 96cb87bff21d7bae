"""Strength × seeds: one ``SweepPoint`` per β on the same seeds, and the β that meets a target share.

The unedited images are drawn and read once. Edited runs restart from them where the first edited step allows
(bit-identical). Images are read batch by batch and dropped, but for a few examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from diffusion_lens.base.types import (
    Attribute,
    Change,
    Fault,
    Generation,
    GenerationRequest,
    LensError,
    Predictions,
    SweepPoint,
    SweepResult,
    as_number,
)
from diffusion_lens.base.validity import discard, faults_of, require_valid
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.model.generate import Edit, OnStep, Trajectory, generate_batches, record_trajectory
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results import metrics, stats

MakeEdit = Callable[[float], Edit | None]


class Draw(Protocol):
    """How images are made: ``generate.generate_batches``, or anything that answers like it."""

    def __call__(
        self,
        model: DiffusionModel,
        request: GenerationRequest,
        *,
        edit: Edit | None = None,
        batch_size: int = 16,
        on_step: OnStep | None = None,
        start: Trajectory | None = None,
    ) -> Iterator[Generation]:
        """One ``Generation`` per batch, in the order of the request's seeds."""
        ...


@dataclass(frozen=True)
class Reading:
    """What the classifier read in one run: predictions by attribute, features ``[n, d]``, a few images."""

    predictions: dict[str, Predictions]
    features: np.ndarray
    examples: np.ndarray
    activation_ratio: float


@dataclass(frozen=True)
class Baseline:
    """The unedited run of a request, to be shared by sweeps of one prompt and the same seeds."""

    request: GenerationRequest
    reading: Reading
    classifier_id: str
    start: Trajectory | None = None


def measure_baseline(
    model: DiffusionModel,
    request: GenerationRequest,
    classifier: Classifier,
    *,
    restart_steps: Sequence[int] = (),
    batch_size: int = 16,
    n_examples: int = 8,
    on_step: OnStep | None = None,
    draw: Draw = generate_batches,
) -> Baseline:
    """Draw and read the unedited images; keep the latents before ``restart_steps`` for edited runs."""
    steps = sorted({step for step in restart_steps if step > 0})
    if not steps:
        parts = draw(model, request, batch_size=batch_size, on_step=on_step)
        return Baseline(request, read_images(parts, classifier, n_examples), classifier.classifier_id)
    start = record_trajectory(model, request, steps=steps, batch_size=batch_size, on_step=on_step)
    reading = read_images([start.generation], classifier, n_examples)
    return Baseline(request, reading, classifier.classifier_id, start)


def read_images(parts: Iterable[Generation], classifier: Classifier, n_examples: int = 8) -> Reading:
    """Classify batch by batch; keeps the first ``n_examples`` images alone."""
    predictions: list[dict[str, Predictions]] = []
    features: list[np.ndarray] = []
    examples: list[np.ndarray] = []
    ratios: list[tuple[float, int]] = []
    faults: list[Fault | None] = []
    wanted = n_examples
    for part in parts:
        faults.extend(faults_of(part))
        predictions.append(discard(classifier.predict(part.images), faults_of(part)))
        features.append(classifier.features(part.images))
        examples.append(part.images[: max(0, wanted)])
        wanted -= len(part.images)
        ratios.append((1.0 if part.activation_ratio is None else part.activation_ratio, len(part.images)))
    require_valid(faults)
    joined = {
        name: replace(
            first,
            probs=np.concatenate([p[name].probs for p in predictions]),
            certain=np.concatenate([p[name].certain for p in predictions]),
        )
        for name, first in predictions[0].items()
    }
    ratio = sum(r * n for r, n in ratios) / sum(n for _, n in ratios)
    return Reading(joined, np.concatenate(features), np.concatenate(examples), ratio)


def sweep_points(
    model: DiffusionModel,
    request: GenerationRequest,
    make_edit: MakeEdit,
    betas: Sequence[float],
    classifier: Classifier,
    attribute: Attribute,
    target: str,
    *,
    baseline: Baseline | None = None,
    target_shares: Mapping[str, float] | None = None,
    batch_size: int = 16,
    n_examples: int = 8,
    on_step: OnStep | None = None,
    draw: Draw = generate_batches,
) -> Iterator[SweepPoint]:
    """Measure every β in rising order, each as soon as it is drawn.

    Args:
        make_edit: the edit at a β; ``None`` stands for "no edit" and reuses the unedited images.
        attribute: the steered attribute as the classifier knows it; ``target`` one of its classes.
        baseline: an unedited run of the same request to share; drawn first where missing.
        target_shares: label → share that FD is measured from; ``None`` is uniform.
        on_step: called with (steps done, steps in total) over the whole sweep; may raise ``Cancelled``.

    Raises:
        LensError: before anything is drawn, for repeated or missing β, an attribute the classifier does not
            read, or a classifier whose error cannot be corrected for.
    """
    grid = _check_grid(betas)
    attribute.index(target)
    _check_classifier(classifier, attribute)
    if baseline is not None and (baseline.request, baseline.classifier_id) != (request, classifier.classifier_id):
        raise LensError("This baseline was drawn for another request or classifier; measure one for this sweep.")
    goal = _target_vector(attribute, target_shares)
    edits = [make_edit(beta) for beta in grid]
    n_runs = sum(edit is not None for edit in edits) + (baseline is None)
    progress = _Progress(on_step, n_runs, request.n_steps * -(-len(request.seeds) // batch_size))

    def points() -> Iterator[SweepPoint]:
        base = baseline or measure_baseline(
            model,
            request,
            classifier,
            restart_steps=[e.window[0] for e in edits if e is not None and e.window is not None],
            batch_size=batch_size,
            n_examples=n_examples,
            on_step=progress.next_run(),
            draw=draw,
        )
        for beta, edit in zip(grid, edits, strict=True):
            reading = base.reading
            if edit is not None:
                parts = draw(
                    model, request, edit=edit, batch_size=batch_size, on_step=progress.next_run(), start=base.start
                )
                reading = read_images(parts, classifier, n_examples)
            yield measure_point(beta, reading, base.reading, attribute, classifier.confusion[attribute.name], goal)

    return points()


def measure_point(
    beta: float,
    reading: Reading,
    base: Reading,
    attribute: Attribute,
    confusion: np.ndarray,
    target_shares: np.ndarray | None = None,
) -> SweepPoint:
    """The numbers of one strength: shares, log ratios, FD, and what else moved against the unedited images.

    FD is taken from the counts of decided images, like its floor. ``fid`` is ``None`` below ``MIN_FRECHET`` images.
    """
    own = reading.predictions[attribute.name]
    n = int(own.counts.sum())
    shares = stats.shares(own.counts, own.n_uncertain, attribute, confusion)
    raw, corrected = stats.log_ratios(shares)
    others = {name: p for name, p in reading.predictions.items() if name != attribute.name}
    moved: list[Change] = []
    for name, predictions in others.items():
        moved.extend(metrics.changes(base.predictions[name], predictions))
    enough = len(reading.features) >= metrics.MIN_FRECHET
    goal = np.full(len(shares), 1 / len(shares)) if target_shares is None else target_shares
    return SweepPoint(
        beta=beta,
        shares=shares,
        log_ratio=raw,
        log_ratio_corrected=corrected,
        fd=metrics.fairness_discrepancy(np.array([s.raw for s in shares]), goal),
        fd_floor=metrics.fd_null_floor(n, goal),
        spillover={name: _decided_shares(p) for name, p in others.items()},
        agreement={name: metrics.agreement(base.predictions[name], p) for name, p in others.items()},
        activation_ratio=reading.activation_ratio,
        fid=metrics.frechet_distance(base.features, reading.features) if enough else None,
        examples=reading.examples,
        labels=own.labels.astype(np.int64),
        certain=own.certain,
        changes=tuple(moved),
    )


def collect(
    points: Iterable[SweepPoint],
    *,
    attribute: Attribute,
    target: str,
    request: GenerationRequest,
    setting: str,
    classifier_id: str,
    is_control: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> SweepResult:
    """All points as one result, in rising β; a cancelled sweep's points may be collected too."""
    rising = tuple(sorted(points, key=lambda p: p.beta))
    if not rising:
        raise LensError("This sweep has no points; let it measure at least one beta.")
    return SweepResult(rising, attribute, target, request, setting, classifier_id, is_control, dict(provenance or {}))


@dataclass
class _Progress:
    """Counts the steps of all runs of a sweep as one."""

    on_step: OnStep | None
    n_runs: int
    steps_per_run: int
    begun: int = 0

    def next_run(self) -> OnStep | None:
        """The callback for the run that begins now; a run that restarts late counts its fewer steps in full."""
        if self.on_step is None:
            return None
        report, before = self.on_step, self.begun * self.steps_per_run
        self.begun += 1

        def step(done: int, total: int) -> None:
            report(before + round(done / total * self.steps_per_run), self.n_runs * self.steps_per_run)

        return step


def _decided_shares(predictions: Predictions) -> tuple[float, ...]:
    counts = predictions.counts
    return tuple(float(c) for c in counts / counts.sum()) if counts.sum() else (float("nan"),) * len(counts)


def _check_grid(betas: Sequence[float]) -> list[float]:
    grid = sorted(as_number(beta, "beta", finite=False) for beta in np.ravel(np.asarray(betas, dtype=object)))
    if not grid or len(set(grid)) != len(grid) or not np.isfinite(grid).all():
        raise LensError("A sweep needs one or more different, finite betas.")
    return grid


def _check_classifier(classifier: Classifier, attribute: Attribute) -> None:
    if attribute not in classifier.attributes:
        known = ", ".join(a.name for a in classifier.attributes)
        raise LensError(f"The classifier does not read {attribute.name} with these classes; it reads {known}.")
    if attribute.name not in classifier.confusion:
        raise LensError(f"The classifier's error on {attribute.name} is not known; calibrate it on labelled images.")
    stats.error_rates(classifier.confusion[attribute.name])


def _target_vector(attribute: Attribute, shares: Mapping[str, float] | None) -> np.ndarray:
    if shares is None:
        return np.full(len(attribute.classes), 1 / len(attribute.classes))
    if set(shares) != set(attribute.classes):
        raise LensError(f"Give a target share for each of {', '.join(attribute.classes)}.")
    return np.array([shares[label] for label in attribute.classes])
