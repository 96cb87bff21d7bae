"""Drawing a flip-book: every strength on the same seeds, as the app draws it, each frame read by the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, GenerationRequest, LensError
from diffusion_lens.base.validity import discard, faults_of
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.measuring.sweep import MakeEdit
from diffusion_lens.model.generate import Edit, Trajectory, generate, record_trajectory
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.flip_book import MAX_SEEDS, MAX_STRENGTHS, FlipBook, make_sprite

Arrays = dict[str, np.ndarray]


def draw_flip_book(
    model: DiffusionModel,
    request: GenerationRequest,
    make_edit: MakeEdit,
    betas: Sequence[float],
    classifier: Classifier,
    attribute: Attribute,
    target: str,
    *,
    setting: str,
    sae_id: str,
    max_bytes: int,
    keep: Workspace,
    progress: Progress | None = None,
) -> FlipBook:
    """Draw and read ``request`` at every strength; all of a strength's seeds are one batch, as in the app.

    Args:
        make_edit: the edit at a β; ``None`` stands for "no edit", at exactly one of ``betas``.
        setting: the turn in words. max_bytes: of the sprite.
        keep: what is finished, a piece per strength: killed, the same call goes on.

    Raises:
        LensError: too many strengths or seeds, no unedited strength, or a sprite that does not fit ``max_bytes``.
    """
    rising = tuple(sorted(betas))
    edits = {beta: make_edit(beta) for beta in rising}
    unedited = [beta for beta in rising if edits[beta] is None]
    _check(rising, request, unedited)
    furthest = edits[rising[-1]] or edits[rising[0]]
    assert furthest is not None  # one strength alone changes nothing
    pages = _Pages(model, request, classifier, furthest.window)
    pieces = keep.part("frames", [to_plain(request), classifier.classifier_id])
    bars = (progress or Progress()).parts(len(rising))
    found = [
        pieces.tensors(_key(edits[beta]), partial(pages.draw, edits[beta], bar), bar)
        for beta, bar in zip(rising, bars, strict=True)
    ]

    def read(what: str) -> Arrays:
        return {a.name: np.stack([page[f"{what}.{a.name}"] for page in found]) for a in classifier.attributes}

    sprite, cell, error = make_sprite(np.stack([page["images"] for page in found]), max_bytes)
    return FlipBook(
        request, attribute, target, rising, unedited[0], replace(furthest.spec, hold_digest="").digest, setting,
        sae_id, classifier.classifier_id, classifier.attributes, read("labels"), read("certain"),
        read("confidence")[attribute.name], np.array([float(page["ratio"][0]) for page in found], np.float32), cell,
        sprite, error,
    )  # fmt: skip


def _check(betas: Sequence[float], request: GenerationRequest, unedited: Sequence[float]) -> None:
    if not 2 <= len(set(betas)) == len(betas) <= MAX_STRENGTHS:
        raise LensError(f"A flip-book has 2 to {MAX_STRENGTHS} different strengths; it is {len(betas)}.")
    if len(request.seeds) > MAX_SEEDS:
        raise LensError(f"A flip-book has at most {MAX_SEEDS} seeds; it is {len(request.seeds)}.")
    if len(unedited) != 1:
        raise LensError("A flip-book shows the model as it is, too; give the one strength that changes nothing.")


def _key(edit: Edit | None) -> str:
    return "unedited" if edit is None else edit.spec.digest


@dataclass
class _Pages:
    """Draws strengths; edited ones restart from the unedited run where the first edited step allows."""

    model: DiffusionModel
    request: GenerationRequest
    classifier: Classifier
    window: tuple[int, int] | None
    start: Trajectory | None = None

    def draw(self, edit: Edit | None, progress: Progress) -> Arrays:
        """Images ``uint8 [n, H, W, 3]`` of one strength, every attribute's reading ``[n]``, the activation ratio."""
        size = len(self.request.seeds)
        if self.window is not None and self.window[0] > 0 and self.start is None:
            self.start = record_trajectory(self.model, self.request, steps=[self.window[0]], batch_size=size)
        drawn = generate(
            self.model, self.request, edit=edit, batch_size=size, progress=progress, start=self.start
        )  # fmt: skip
        arrays: Arrays = {"images": drawn.images, "ratio": np.array([drawn.activation_ratio or 1.0])}
        for name, own in discard(self.classifier.predict(drawn.images), faults_of(drawn)).items():
            arrays[f"labels.{name}"] = own.labels.astype(np.uint8)
            arrays[f"certain.{name}"] = own.certain.astype(np.uint8)
            arrays[f"confidence.{name}"] = own.probs.max(axis=1).astype(np.float32)
        return arrays
