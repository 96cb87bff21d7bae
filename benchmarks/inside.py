"""Benchmarks inside one process: slider moves, sweeps, the cost of an edit, attribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from timing import Result, interleaved, ratio

from diffusion_lens.base.types import GenerationRequest, Intervention, Sampler
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.features.reference import autograd_scores
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.generate import generate, record_trajectory
from diffusion_lens.studio.state import default_view
from diffusion_lens.studio.studio import DRAFT_STEPS, Studio

SLIDER_SECONDS = 1.5
DRAFT_SECONDS = 0.3
ATTRIBUTION_RATIO = 50.0
FEW_NODES = 10


def turn_of(lens: DiffusionLens, beta: float) -> Intervention:
    """The shipped turn of the first attribute."""
    name = lens.attributes[0].name
    return lens.intervention(name, lens.setting(name).target, beta)


def betas_of(lens: DiffusionLens) -> list[float]:
    """The shipped strengths but the one that changes nothing."""
    setting = lens.setting(lens.attributes[0].name)
    return [beta for beta in setting.betas if beta != setting.identity]


def request_of(lens: DiffusionLens, n: int, first: int = 70_000_000) -> GenerationRequest:
    """``n`` seeds of the first suggested prompt."""
    return lens.request(lens.prompts[0], range(first, first + n))


def slider(lens: DiffusionLens, repeats: int) -> Iterator[Result]:
    """A slider is let go: 8 edited images and their reading, the unedited run kept from before."""
    request = request_of(lens, 8)
    start = record_trajectory(lens.model, request, batch_size=8)
    betas = betas_of(lens)
    moves = iter(np.linspace(betas[0], betas[-1], repeats + 1).tolist())

    def move() -> None:
        edit = lens.edit(turn_of(lens, next(moves)))
        lens.classify(lens.generate(request, edit, batch_size=8, start=start).images)

    times = interleaved([move], repeats)[:, 0]
    p50, p95 = np.quantile(times, [0.5, 0.95]).tolist()
    yield Result(
        "slider release to 8 images, p50 (p50 to p95)", p50, "s", (p50, p95), f"≤ {SLIDER_SECONDS} s",
        p50 <= SLIDER_SECONDS, "edited images drawn and read; unedited ones kept", {"p50": p50, "p95": p95},
    )  # fmt: skip


def draft(lens: DiffusionLens, repeats: int) -> Iterator[Result]:
    """A slider is dragged off the flip-books: 8 images in few steps, not read."""
    studio = Studio(lens)
    view = default_view(lens)
    betas = betas_of(lens)
    moves = iter(np.linspace(betas[0], betas[-1], repeats + 1).tolist())
    times = interleaved([lambda: studio.draft(replace(view, beta=next(moves)))], repeats)[:, 0]
    p50, p95 = np.quantile(times, [0.5, 0.95]).tolist()
    yield Result(
        "dragging to a draft of 8 images, p50 (p50 to p95)", p50, "s", (p50, p95), f"≤ {DRAFT_SECONDS} s",
        p50 <= DRAFT_SECONDS, f"{DRAFT_STEPS} steps, never measured", {"p50": p50, "p95": p95},
    )  # fmt: skip


def sweep(lens: DiffusionLens, repeats: int) -> Iterator[Result]:
    """A β sweep of 16 seeds, against calling the stock pipeline once per β for as many unedited images."""
    request, betas = request_of(lens, 16), [*betas_of(lens)]
    pipe = lens.model.pipeline
    pipe.set_progress_bar_config(disable=True)

    def ours() -> None:
        start = record_trajectory(lens.model, request, batch_size=16)
        for beta in betas:
            generate(lens.model, request, edit=lens.edit(turn_of(lens, beta)), batch_size=16, start=start)

    def stock() -> None:
        for _ in range(len(betas) + 1):
            generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
            shared = {"generator": generators, "num_inference_steps": request.n_steps, "output_type": "np"}
            if lens.model.is_text:
                pipe([request.prompt] * 16, guidance_scale=request.guidance_scale, **shared)
            else:
                pipe(batch_size=16, **shared)

    times = interleaved([ours, stock], repeats)
    value, interval = ratio(times[:, 0], times[:, 1])
    images = 16 * (len(betas) + 1)
    details = {"ours_images_per_s": images / float(np.median(times[:, 0])),
               "stock_images_per_s": images / float(np.median(times[:, 1]))}  # fmt: skip
    note = (
        f"{details['ours_images_per_s']:.1f} edited images/s here, {details['stock_images_per_s']:.1f} unedited there"
    )
    yield Result(
        f"sweep of {len(betas) + 1} β: time against stock pipeline calls", value, "×", interval, note=note,
        details=details,
    )  # fmt: skip


def overhead(lens: DiffusionLens, repeats: int) -> Iterator[Result]:
    """A run edited at every step against an unedited one, for both samplers; and two full passes per step."""
    request = request_of(lens, 8)

    def run(sampler: Sampler | None) -> None:
        edit = None
        if sampler is not None:
            edit = lens.edit(replace(turn_of(lens, betas_of(lens)[-1]), window=None, sampler=sampler))
        generate(lens.model, request, edit=edit, batch_size=8)

    samplers: list[Sampler] = ["symmetric", "asymmetric"] if lens.model.is_ddim else ["symmetric"]
    works: list[Callable[[], object]] = [lambda: run(None), *(lambda s=s: run(s) for s in samplers)]
    times = interleaved(works, repeats)
    per_step = times / request.n_steps
    for column, sampler in enumerate(samplers, start=1):
        value, interval = ratio(times[:, column], times[:, 0])
        note = f"{1e3 * np.median(per_step[:, column]):.1f} ms a step, {1e3 * np.median(per_step[:, 0]):.1f} unedited"
        if sampler == "asymmetric":
            note += "; two full passes would be 2.0"
        yield Result(f"edited run against unedited, {sampler}", value, "×", interval, note=note)


def attribution(lens: DiffusionLens, repeats: int, n: int = 100) -> Iterator[Result]:
    """The closed form against loops of backward passes, one per class, step and node: ``n`` images, all steps.

    The first loop is the reference that ``check`` compares with; the second the cheapest fair one, in single
    precision with as few nodes as DiffLens' own code takes.
    """
    name = lens.attributes[0].name
    drawn = lens.generate(request_of(lens, n), capture=True)
    assert drawn.activations is not None
    h, probe, sae = drawn.activations.h, lens.probes[name], lens.sae
    steps = list(range(h.shape[1]))
    works: list[Callable[[], object]] = [
        lambda: integrated_gradients(sae, probe, h),
        lambda: autograd_scores(sae, probe, h, steps=steps),
        lambda: autograd_scores(sae, probe, h, steps=steps, nodes=FEW_NODES, dtype=torch.float32),
    ]
    times = interleaved(works, repeats, warm=0)
    fast, *slow = np.median(times, axis=0).tolist()
    for column, (loop, bar) in enumerate(
        [("the autograd reference", ATTRIBUTION_RATIO), (f"an autograd loop of {FEW_NODES} nodes, float32", None)], 1
    ):
        value, interval = ratio(times[:, column], times[:, 0])
        yield Result(
            f"attribution: time of {loop} against the closed form", value, "×", interval,
            "" if bar is None else f"≥ {bar:.0f} ×", None if bar is None else value >= bar,
            f"{fast:.2f} s against {slow[column - 1]:.1f} s, {n} samples",
            {"closed_s": fast, "loop_s": slow[column - 1]},
        )  # fmt: skip
