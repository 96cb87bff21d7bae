"""Images that methods are fitted on: drawn once, with every step's bottleneck and latents, read by the probes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.features.probes import Probe
from diffusion_lens.model.generate import Capture, record_trajectory, request
from diffusion_lens.model.pipelines import DiffusionModel

MIN_PER_CLASS = 2
"""Examples of a class that a fit needs at least."""


@dataclass(frozen=True)
class Drawn:
    """One batch of unedited images of one prompt.

    Attributes:
        h: float16 ``[n, step, c, y, x]``, the conditional half.
        states: latents before every step, ``[step, n, c, y, x]``.
    """

    prompt: str | None
    seeds: tuple[int, ...]
    h: Tensor
    states: Tensor


class Draws:
    """The images of one set of prompts and seeds, drawn on first use and kept for every method of a bench.

    Seed ``i`` rides with prompt ``i mod len(prompts)``. ``seconds`` is what drawing took; ``uses`` counts readers.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[str | None],
        seeds: Sequence[int],
        n_steps: int,
        guidance_scale: float,
        *,
        batch_size: int = 16,
    ) -> None:
        self.model, self.n_steps, self.guidance_scale = model, n_steps, guidance_scale
        self.prompts, self.seeds = tuple(prompts), tuple(int(s) for s in seeds)
        self.batch_size = batch_size
        self.seconds, self.uses = 0.0, 0
        self._batches: tuple[Drawn, ...] | None = None
        self._found: dict[Hashable, Any] = {}
        if not self.prompts or not self.seeds:
            raise LensError("A fit needs at least one prompt and one seed.")

    def check(self, model: DiffusionModel, prompts: Sequence[str | None], seeds: Sequence[int]) -> None:
        """Raise ``LensError`` where these are draws of another model, or of other prompts or seeds."""
        same = self.model is model and self.prompts == tuple(prompts) and self.seeds == tuple(int(s) for s in seeds)
        if not same:
            raise LensError("These draws are of another model, or of other prompts or seeds; draw them again.")

    def plan(self) -> list[tuple[str | None, tuple[int, ...]]]:
        """Prompt and seeds of every batch."""
        parts = []
        for number, prompt in enumerate(self.prompts):
            seeds = self.seeds[number :: len(self.prompts)]
            parts += [(prompt, seeds[i : i + self.batch_size]) for i in range(0, len(seeds), self.batch_size)]
        return parts

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` finds in these images, found once for all methods that ask by the same key."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    @property
    def steps_left(self) -> int:
        """Denoising steps that the next ``batches`` will take: 0 once drawn."""
        return 0 if self._batches is not None else len(self.plan()) * self.n_steps

    def batches(self, progress: Progress | None = None) -> tuple[Drawn, ...]:
        """All batches; ``progress`` counts ``steps_left`` and may stop the drawing."""
        self.uses += 1
        if self._batches is None:
            begin = time.perf_counter()
            plan = self.plan()
            bars = (progress or Progress()).parts(len(plan))
            self._batches = tuple(self._draw(*batch, bar) for batch, bar in zip(plan, bars, strict=True))
            self.seconds = time.perf_counter() - begin
        return self._batches

    def _draw(self, prompt: str | None, seeds: tuple[int, ...], progress: Progress) -> Drawn:
        run = record_trajectory(
            self.model,
            request(self.model, prompt, seeds, self.n_steps, self.guidance_scale),
            capture=Capture(),
            batch_size=len(seeds),
            progress=progress,
            max_bytes=2**40,
        )
        activations = run.generation.activations
        assert activations is not None
        # Cloned outside inference mode: training code may need gradients through what it makes of them.
        states = torch.stack([run.latents[i].clone() for i in range(self.n_steps)])
        return Drawn(prompt, seeds, torch.from_numpy(activations.h), states)


def read_classes(probe: Probe, h: Tensor) -> np.ndarray:
    """Probability of each class by the probe over all steps (our working form), float64 ``[n, class]``.

    ``softmax(Σ_t w_t log p_t)`` for ``h [n, step, c, y, x]``, steps weighted by how far the probe's held-out accuracy
    is above chance (all alike where it never is).
    """
    above = (probe.accuracy.double() - 1 / len(probe.attribute.classes)).clamp_min(0)
    weights = above / above.sum() if bool(above.sum() > 0) else torch.full_like(above, 1 / len(above))
    parts = [
        w * probe.probs(h[:, step].to(probe.weight), step).double().log() for step, w in enumerate(weights.tolist())
    ]
    return torch.stack(parts).sum(0).softmax(1).cpu().numpy()


def examples(batches: Sequence[Drawn], probe: Probe) -> Iterator[tuple[Drawn, np.ndarray]]:
    """Each batch with its images' most probable classes ``int64[n]``."""
    for batch in batches:
        yield batch, read_classes(probe, batch.h).argmax(axis=1)


def class_means(batches: Sequence[Drawn], probe: Probe, *, positions: bool = True) -> tuple[Tensor, np.ndarray]:
    """Mean bottleneck per class, ``[class, step, c, y, x]`` (``positions=False``: ``[class, step, c]``), and counts."""
    n_classes = len(probe.attribute.classes)
    total: Tensor | None = None
    counts = np.zeros(n_classes, dtype=np.int64)
    for batch, labels in examples(batches, probe):
        h = batch.h.float() if positions else batch.h.float().mean((3, 4))
        total = torch.zeros(n_classes, *h.shape[1:]) if total is None else total
        for label in range(n_classes):
            mine = labels == label
            total[label] += h[torch.from_numpy(mine)].sum(0)
            counts[label] += int(mine.sum())
    assert total is not None
    shape = (n_classes, *(1,) * (total.ndim - 1))
    return total / torch.from_numpy(counts).clamp_min(1).reshape(shape), counts


def check_examples(counts: np.ndarray, attribute: Attribute, wanted: Sequence[int]) -> None:
    """Raise ``LensError`` where a wanted class, or all others together, has too few examples."""
    for index in wanted:
        if counts[index] < MIN_PER_CLASS or counts.sum() - counts[index] < MIN_PER_CLASS:
            few = counts[index] < MIN_PER_CLASS
            name = attribute.classes[index]
            raise LensError(
                f"Only {int(counts[index] if few else counts.sum() - counts[index])} images read as "
                f"{'' if few else 'other than '}{name}; fit with more seeds, or with prompts that show it."
            )


def mean_differences(means: Tensor, counts: np.ndarray) -> Tensor:
    """``mean(h | c) − mean(h | ¬c)`` for every class, ``[class, …]`` as ``means``; others weighted by their counts."""
    weights = torch.from_numpy(counts).to(means)
    shape = (-1, *(1,) * (means.ndim - 1))
    total, n = (means * weights.reshape(shape)).sum(0), weights.sum()
    others = (total - means * weights.reshape(shape)) / (n - weights).clamp_min(1).reshape(shape)
    return means - others
