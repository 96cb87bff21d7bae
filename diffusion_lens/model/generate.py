"""Prompt and seeds to images, with the bottleneck read and edited on the way.

Without an edit this equals the stock pipeline's own call. Under classifier-free guidance only the conditional
half is read and edited; the unconditional half is never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Generation, GenerationRequest, LensError, Seeds, as_seeds, as_whole
from diffusion_lens.model.denoise import BatchRun, Capture, Edit, OnLatents, StepContext, Trajectory, parts_of
from diffusion_lens.model.memory import in_batches
from diffusion_lens.model.pipelines import DiffusionModel, at_site

__all__ = [
    "Capture", "Edit", "OnLatents", "StepContext", "Trajectory",
    "generate", "generate_batches", "join", "record_trajectory", "request",
]  # fmt: skip

_Recorded = tuple[Generation, dict[int, Tensor], dict[int, tuple[Tensor, ...]]]
TRAJECTORY_BYTES = 256 * 2**20


def request(
    model: DiffusionModel, prompt: str | None, seeds: Seeds, n_steps: int, guidance_scale: float = 1.0
) -> GenerationRequest:
    """A ``GenerationRequest`` for this model."""
    return GenerationRequest(prompt, as_seeds(seeds), n_steps, guidance_scale, model.model_id)


def generate(
    model: DiffusionModel,
    request: GenerationRequest,
    *,
    edit: Edit | None = None,
    capture: Capture | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
    start: Trajectory | None = None,
    on_latents: OnLatents | None = None,
) -> Generation:
    """One image per seed of ``request``; see ``generate_batches`` for the arguments and errors."""
    parts = generate_batches(
        model, request, edit=edit, capture=capture, batch_size=batch_size, progress=progress, start=start,
        on_latents=on_latents,
    )  # fmt: skip
    return join(list(parts), request)


def generate_batches(
    model: DiffusionModel,
    request: GenerationRequest,
    *,
    edit: Edit | None = None,
    capture: Capture | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
    start: Trajectory | None = None,
    on_latents: OnLatents | None = None,
) -> Iterator[Generation]:
    """The same, one ``Generation`` per batch as soon as it is drawn; where memory runs out, the batch is halved once.

    Args:
        progress: of all batches; may be cancelled at every step.
        start: an unedited run of the same request (or of more seeds): the edited run restarts at its latest recorded
            step before the first edited one. Bit-identical to a run from noise in the same batches.
        on_latents: called before each batch is decoded, with its request and latents; may raise. Not
            called where nothing is drawn.

    Raises:
        LensError: a request for another model, a prompt where none is taken or none where one is needed, an
            asymmetric edit without DDIM or flow Euler steps, a step window that lies outside the run.
    """
    whole = for_request(edit, request)
    check(model, request, whole, capture, batch_size)
    if start is not None and edit is None and capture is None:
        yield _rows(start.generation, start.rows(request), request)
        return
    first = None if start is None or capture is not None else _restart_step(start, whole)
    restart = None if first is None else start

    def draw(part: GenerationRequest, told: Callable[[int], None]) -> Generation:
        own = for_request(edit, part)
        return BatchRun(model, part, own, capture, restart, first or 0).draw(told, on_latents=on_latents)

    yield from in_batches(model.room, request, batch_size, request.n_steps - (first or 0), draw, progress)


def for_request(edit: Edit | None, request: GenerationRequest) -> Edit | None:
    """The edit that a batch gets: most are the same for all, some (``for_request``) depend on its prompt or seeds."""
    choose = getattr(edit, "for_request", None)
    chosen: Edit | None = edit if choose is None else choose(request)
    return chosen


def record_trajectory(
    model: DiffusionModel,
    request: GenerationRequest,
    *,
    steps: Sequence[int] | None = None,
    capture: Capture | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
    max_bytes: int = TRAJECTORY_BYTES,
    on_latents: OnLatents | None = None,
) -> Trajectory:
    """Draw without an edit and keep the latents before ``steps`` (default: all that fit ``max_bytes``, evenly)."""
    check(model, request, None, capture, batch_size)
    per_step = len(request.seeds) * int(np.prod(model.latent_shape)) * model.dtype.itemsize
    fits = max(1, max_bytes // per_step)
    wanted = list(range(request.n_steps)) if steps is None else sorted(set(steps))
    kept = set(wanted[:: -(-len(wanted) // fits)])

    def draw(part: GenerationRequest, told: Callable[[int], None]) -> _Recorded:
        latents: dict[int, Tensor] = {}
        states: dict[int, tuple[Tensor, ...]] = {}

        def keep(index: int, x: Tensor, generators: list[torch.Generator]) -> None:
            if index in kept:
                latents[index] = x.cpu()
                if not model.splits_step:
                    states[index] = tuple(g.get_state() for g in generators)

        return BatchRun(model, part, capture=capture).draw(told, keep, on_latents), latents, states

    parts = list(in_batches(model.room, request, batch_size, request.n_steps, draw, progress))
    latents = {i: torch.cat([x[i] for _, x, _ in parts]) for i in parts[0][1]}
    states = {i: tuple(state for _, _, s in parts for state in s[i]) for i in parts[0][2]}
    return Trajectory(join([drawn for drawn, _, _ in parts], request), latents, states)


def join(parts: Sequence[Generation], request: GenerationRequest) -> Generation:
    """Batches of one request as one ``Generation``, in order."""
    first = parts[0]
    activations = first.activations
    if activations is not None:
        h = np.concatenate([p.activations.h for p in parts if p.activations is not None])
        activations = replace(activations, h=h, seeds=request.seeds)
    ratios = [(p.activation_ratio, len(p.images)) for p in parts if p.activation_ratio is not None]
    ratio = sum(r * n for r, n in ratios) / sum(n for _, n in ratios) if ratios else None
    images = np.concatenate([p.images for p in parts])
    faults = tuple(fault for p in parts for fault in p.faults or (None,) * len(p.images))
    return Generation(images, request, first.edit, activations, ratio, faults)


def _rows(whole: Generation, rows: Sequence[int], request: GenerationRequest) -> Generation:
    """Some images of an unedited run, as the answer to ``request``."""
    faults = tuple(whole.faults[row] for row in rows) if whole.faults else ()
    return Generation(whole.images[rows], request, faults=faults)


def check(
    model: DiffusionModel, request: GenerationRequest, edit: Edit | None, capture: Capture | None, batch_size: int
) -> None:
    """Raise ``LensError`` where this model cannot draw this request, before any work is done."""
    if request.model_id != model.model_id:
        raise LensError(f"This request is for the model '{request.model_id}', but '{model.model_id}' is loaded.")
    if model.is_text != (request.prompt is not None):
        needs = "needs a prompt; give '' for the empty one" if model.is_text else "takes no prompt; leave it out"
        raise LensError(f"This model {needs}.")
    if request.prompt is not None:
        model.check_prompt(request.prompt)
    if model.hook_name != "mid_block" and (edit is not None or capture is not None):
        _ = model.hook_shape  # refuses modules that cannot be read
    for site in () if edit is None or not hasattr(edit, "parts") else parts_of(edit, model):
        _ = at_site(model, site).hook_shape
    if as_whole(batch_size, "batch_size") < 1:
        raise LensError(f"batch_size must be at least 1; it is {batch_size}.")
    if edit is None:
        return
    if edit.sampler == "asymmetric" and not model.splits_step:
        name = type(model.pipeline.scheduler).__name__
        raise LensError(
            f"The asymmetric sampler needs DDIM or flow Euler and this model samples with {name}; choose symmetric."
        )
    if edit.window is not None and not 0 <= edit.window[0] < edit.window[1] <= request.n_steps:
        raise LensError(f"The step window {edit.window} does not lie inside the {request.n_steps} steps of this run.")


def _restart_step(start: Trajectory, edit: Edit | None) -> int | None:
    # An edit of the weights acts at every step, so only the very beginning is shared.
    if edit is None or getattr(edit, "model_context", None) is not None:
        return None
    return start.before(edit.window[0] if edit.window else 0)
