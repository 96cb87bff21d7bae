"""``observe``: the only loop that draws images, reads them, and lets them go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Fault, Generation, GenerationRequest, Predictions
from diffusion_lens.base.validity import discard, faults_of, require_valid
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.model.generate import Edit, Trajectory, generate_batches, record_trajectory
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.measurement import NO_IMAGES, Measurement

OnBatch = Callable[[Generation], None]
"""Sees every batch before its images are let go: for what a classifier does not read, such as CLIP embeddings."""


def observe(
    model: DiffusionModel,
    request: GenerationRequest,
    edit: Edit | None,
    classifier: Classifier,
    *,
    reference: Measurement | None = None,
    start: Trajectory | None = None,
    batch_size: int = 16,
    n_examples: int = 8,
    progress: Progress | None = None,
    on_batch: OnBatch | None = None,
    allow_none: bool = False,
) -> Measurement:
    """Draw a request, batch by batch, and read each batch in one pass of the classifier.

    Args:
        reference: the unedited run of the same request, for everything that is measured against it.
        start: a recorded unedited run from which an edited one restarts, bit for bit as from noise.
        n_examples: images kept, the first ones.
        progress: of the drawing; may be cancelled at every step.
        allow_none: count a run in which no image shows anybody, for one that is a part of more.

    Raises:
        LensError: what ``generate`` refuses, a reference of another request or classifier, or no image that shows
            anybody.
    """
    parts = generate_batches(model, request, edit=edit, batch_size=batch_size, progress=progress, start=start)
    return read(
        parts, request, classifier, reference=reference, n_examples=n_examples, on_batch=on_batch,
        allow_none=allow_none,
    )  # fmt: skip


def read(
    parts: Iterable[Generation],
    request: GenerationRequest,
    classifier: Classifier,
    *,
    reference: Measurement | None = None,
    n_examples: int = 8,
    on_batch: OnBatch | None = None,
    allow_none: bool = False,
) -> Measurement:
    """A ``Measurement`` of images as they come, in the order of the request's seeds."""
    readings: list[dict[str, Predictions]] = []
    features: list[np.ndarray] = []
    examples: list[np.ndarray] = []
    ratios: list[tuple[float, int]] = []
    faults: list[Fault | None] = []
    edit, wanted = None, n_examples
    for part in parts:
        seen, wrong = classifier.read(part.images), faults_of(part)
        faults.extend(wrong)
        readings.append(discard(seen.predictions, wrong))
        if seen.features is not None:
            features.append(seen.features)
        examples.append(part.images[: max(0, wanted)])
        wanted -= len(part.images)
        edit = part.edit
        ratios.append((1.0 if part.activation_ratio is None else part.activation_ratio, len(part.images)))
        if on_batch is not None:
            on_batch(part)
    if not allow_none:
        require_valid(faults)
    found = Measurement(
        request=request,
        edit=edit,
        readings=join_predictions(readings),
        confusion=classifier.confusion,
        classifier_id=classifier.classifier_id,
        faults=tuple(faults) if any(faults) else (),
        activation_ratio=sum(r * n for r, n in ratios) / sum(n for _, n in ratios),
        features=np.concatenate(features) if features else None,
        examples=np.concatenate(examples) if n_examples > 0 else NO_IMAGES,
    )
    return found if reference is None else found.against(reference)


def join_predictions(parts: Sequence[dict[str, Predictions]]) -> dict[str, Predictions]:
    """Batches of readings as one, in order."""
    return {
        name: replace(
            first,
            probs=np.concatenate([p[name].probs for p in parts]),
            certain=np.concatenate([p[name].certain for p in parts]),
        )
        for name, first in parts[0].items()
    }


@dataclass(frozen=True, eq=False)
class Baseline:
    """The unedited run of a request, shared by edited runs of the same seeds; ``start`` is what they restart from."""

    measurement: Measurement
    start: Trajectory | None = None

    @property
    def request(self) -> GenerationRequest:
        """What was drawn."""
        return self.measurement.request


def observe_baseline(
    model: DiffusionModel,
    request: GenerationRequest,
    classifier: Classifier,
    *,
    restart_steps: Sequence[int] = (),
    batch_size: int = 16,
    n_examples: int = 8,
    progress: Progress | None = None,
) -> Baseline:
    """Draw and read the unedited images; keep the latents before ``restart_steps`` for edited runs."""
    steps = sorted({step for step in restart_steps if step > 0})
    if not steps:
        found = observe(
            model, request, None, classifier, batch_size=batch_size, n_examples=n_examples, progress=progress
        )
        return Baseline(found)
    start = record_trajectory(model, request, steps=steps, batch_size=batch_size, progress=progress)
    return Baseline(read([start.generation], request, classifier, n_examples=n_examples), start)
