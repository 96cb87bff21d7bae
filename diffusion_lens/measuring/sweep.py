"""Strength × seeds: one ``SweepPoint`` per β, all on the same seeds.

The unedited images are drawn and read once. Edited runs restart from them where the first edited step allows
(bit-identical). Images are read batch by batch and dropped, but for a few examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, GenerationRequest, LensError, as_number
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.measuring.observe import Baseline, observe, observe_baseline
from diffusion_lens.model.generate import Edit
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results import stats
from diffusion_lens.results.sweeps import SweepPoint

MakeEdit = Callable[[float], Edit | None]


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
    progress: Progress | None = None,
) -> Iterator[SweepPoint]:
    """Measure every β in rising order, each as soon as it is drawn.

    Args:
        make_edit: the edit at a β; ``None`` stands for "no edit" and reuses the unedited images.
        attribute: the steered attribute as the classifier knows it; ``target`` one of its classes.
        baseline: an unedited run of the same request to share; drawn first where missing.
        target_shares: label → share that FD is measured from; ``None`` is uniform.
        progress: of the whole sweep; a run that restarts late counts as any other.

    Raises:
        LensError: before anything is drawn, for repeated or missing β, an attribute the classifier does not
            read, or a classifier whose error cannot be corrected for.
    """
    grid = _check_grid(betas)
    attribute.index(target)
    _check_classifier(classifier, attribute)
    if baseline is not None and baseline.measurement.classifier_id != classifier.classifier_id:
        raise LensError("This baseline was read by another classifier; measure one for this sweep.")
    if baseline is not None and baseline.request != request:
        raise LensError("This baseline was drawn for another request; measure one for this sweep.")
    goal = _target_vector(attribute, target_shares)
    edits = [make_edit(beta) for beta in grid]
    n_runs = sum(edit is not None for edit in edits) + (baseline is None)
    bars = iter((progress or Progress()).parts(n_runs))

    def points() -> Iterator[SweepPoint]:
        base = baseline or observe_baseline(
            model,
            request,
            classifier,
            restart_steps=[e.window[0] for e in edits if e is not None and e.window is not None],
            batch_size=batch_size,
            n_examples=n_examples,
            progress=next(bars),
        )
        for beta, edit in zip(grid, edits, strict=True):
            measured = base.measurement.against(base.measurement)
            if edit is not None:
                measured = observe(
                    model, request, edit, classifier, reference=base.measurement, start=base.start,
                    batch_size=batch_size, n_examples=n_examples, progress=next(bars),
                )  # fmt: skip
            yield SweepPoint(measured, attribute, goal, beta=beta)

    return points()


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


def _target_vector(attribute: Attribute, shares: Mapping[str, float] | None) -> tuple[float, ...] | None:
    if shares is None:
        return None
    if set(shares) != set(attribute.classes):
        raise LensError(f"Give a target share for each of {', '.join(attribute.classes)}.")
    return tuple(float(shares[label]) for label in attribute.classes)
