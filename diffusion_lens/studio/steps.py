"""One image as it comes out of the noise, step by step: what a window of steps is chosen on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diffusion_lens.base.types import LensError
from diffusion_lens.studio.state import View, check
from diffusion_lens.studio.studio import BASE_BYTES, Studio

MAX_SHOWN = 24
"""Of a run of more steps, as many evenly spread ones are shown."""


@dataclass(frozen=True, eq=False)
class StepStrip:
    """The unedited image of one seed before each step shown, and when it is finished.

    Attributes:
        steps: indices of the steps, rising. images: ``uint8 [len(steps), H, W, 3]``, noise first, each as it stands
            before that step, decoded as it is. final: ``uint8 [H, W, 3]``.
        n_steps: of the whole run.
    """

    seed: int
    steps: tuple[int, ...]
    images: np.ndarray
    final: np.ndarray
    n_steps: int


def step_strip(studio: Studio, view: View, seed: int, visitor: str = "") -> StepStrip:
    """Draw the view's prompt without an edit from ``seed`` and keep what there is before every step.

    Raises ``LensError`` for a view that cannot be drawn or a seed that is not one of its, and ``Cancelled`` when the
    visitor asked for another one meanwhile.
    """
    check(studio.lens, view)
    if seed not in view.seeds:
        raise LensError(
            f"Seed {seed} is not one of those on screen; choose one of {view.seeds[0]} to {view.seeds[-1]}."
        )
    with studio.work(f"{visitor}:steps", urgent=True) as progress:
        import torch

        from diffusion_lens.model.generate import record_trajectory

        request = studio.lens.request(view.prompt, view.seeds)
        n, known = request.n_steps, studio.bases.get(request)
        if known is None:
            alone = replace(request, seeds=(seed,))
            start = record_trajectory(studio.lens.model, alone, batch_size=1, progress=progress, max_bytes=BASE_BYTES)
        else:  # drawn for the screen already, with the others
            start = known.start
        row = start.generation.request.seeds.index(seed)
        every = sorted(start.latents)
        places = {round(i * (len(every) - 1) / (min(len(every), MAX_SHOWN) - 1 or 1)) for i in range(MAX_SHOWN)}
        shown = [every[place] for place in sorted(places) if place < len(every)]
        model = studio.lens.model
        noisy = torch.stack([start.latents[step][row] for step in shown]).to(model.device)
        return StepStrip(seed, tuple(shown), model.decode(noisy), start.generation.images[row], n)
