"""Measure what is on screen: a sweep over β of exactly this mix of features, and of as many drawn at random."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from diffusion_lens.base.edits import describe
from diffusion_lens.base.types import FeatureSet, Intervention, LensError
from diffusion_lens.results.sweeps import SweepPoint, SweepResult, collect
from diffusion_lens.steering.settings import random_set
from diffusion_lens.studio import state
from diffusion_lens.studio.curves import mix_key
from diffusion_lens.studio.jobs import BALANCE_IMAGES, BALANCE_STRENGTHS, BATCH, EXAMPLES, Event, Teller, stream
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio, import_engine

if TYPE_CHECKING:
    from diffusion_lens.model.generate import Edit

CONTROL_STRENGTHS = 3
"""Of the random features: their curve is nearly flat, and every strength takes as long as one of the mix."""


def control_of(found: Sequence[Intervention], activity: np.ndarray, seed: int = 0) -> tuple[Intervention, ...]:
    """The same edit of as many random features, as active one by one; own strengths go to their counterparts.

    ``activity [d_sae]``: mean activation (``Atlas.activity``).
    """
    sets = [s for i in found for s in (i.features, i.opposite) if s is not None]
    taken = {feature for features in sets for feature in features.ids}
    drawn: dict[int, int] = {}
    for k, features in enumerate(sets):
        like = random_set(features, activity, seed=seed + k, avoid=(*taken, *drawn.values()))
        drawn |= dict(zip(sorted(features.ids, key=lambda i: -activity[i]), like.ids, strict=True))

    def counterpart(features: FeatureSet) -> FeatureSet:
        ids = tuple(drawn[i] for i in features.ids)
        return FeatureSet(ids, (0.0,) * len(ids), features.attribute, f"random ({seed})", features.sae_id)

    return tuple(
        replace(
            i, features=counterpart(i.features), opposite=i.opposite and counterpart(i.opposite),
            overrides=tuple((drawn[f], s) for f, s in i.overrides),
        )
        for i in found
    )  # fmt: skip


def strengths(studio: Studio, view: View) -> tuple[list[float], list[float]]:
    """The strengths at which a mix is measured, and those of its control."""
    setting = studio.lens.setting(view.attribute)
    betas = sorted({*setting.betas, setting.identity})
    if len(betas) > BALANCE_STRENGTHS:
        picked = {round(i * (len(betas) - 1) / (BALANCE_STRENGTHS - 1)) for i in range(BALANCE_STRENGTHS)}
        betas = sorted({*(betas[i] for i in sorted(picked)), setting.identity})
    spread = {round(i * (len(betas) - 1) / (CONTROL_STRENGTHS - 1)) for i in range(CONTROL_STRENGTHS)}
    return betas, [betas[i] for i in sorted(spread)]


def mix_events(studio: Studio, visitor: str, view: View, n: int = BALANCE_IMAGES) -> Iterator[Event]:
    """Measure ``n`` images per strength; what is measured is kept in ``studio.mixes``.

    Raises ``LensError`` for a view that cannot be drawn and ``Cancelled`` when stopped, also before the first event.
    """
    state.check(studio.lens, view)
    owner = f"{visitor}:mix"
    flag = studio.stops.start(owner)
    return stream(lambda emit: _measure(studio, owner, flag, view, n, emit), flag.set)


def _measure(
    studio: Studio, owner: str, flag: threading.Event, view: View, n: int, emit: Callable[[Event], None]
) -> None:
    import_engine()
    from diffusion_lens.measuring.observe import observe_baseline
    from diffusion_lens.measuring.sweep import sweep_points

    lens = studio.lens
    betas, few = strengths(studio, view)
    attribute = {a.name: a for a in lens.classifier.attributes}[view.attribute]

    def turns(beta: float) -> tuple[Intervention, ...]:
        return state.interventions(lens, replace(view, beta=beta))

    def edit_at(beta: float) -> Edit | None:
        found = turns(beta)
        return lens.edit(*found) if found else None

    def control_at(beta: float) -> Edit | None:
        found = turns(beta)
        return lens.edit(*control_of(found, lens.atlas.activity)) if found else None

    runs = [(betas, edit_at, "this mix"), (few, control_at, "random")]
    teller = Teller(emit)
    request = lens.request(view.prompt, range(n))
    with studio.work(owner, urgent=False, tell=teller.hear, flag=flag) as progress:
        counts = [max(1, sum(make(beta) is not None for beta in grid)) for grid, make, _ in runs]
        unedited, *bars = progress.parts((1, *counts))
        window = view.window
        base = observe_baseline(
            lens.model, request, lens.classifier, restart_steps=window[:1] if window else (), batch_size=BATCH,
            n_examples=EXAMPLES, progress=unedited,
        )  # fmt: skip
        finished: tuple[SweepResult, ...] = ()
        for (grid, make, name), bar in zip(runs, bars, strict=True):
            points: list[SweepPoint] = []
            for point in sweep_points(
                lens.model, request, make, grid, lens.classifier, attribute, view.target, baseline=base,
                batch_size=BATCH, n_examples=EXAMPLES, progress=bar,
            ):  # fmt: skip
                points.append(point)
                teller.results = (*finished, _result(studio, view, points, name == "random"))
                teller.send()
            finished = teller.results
    studio.mixes.put(mix_key(lens, view), finished)


def _result(studio: Studio, view: View, points: Sequence[SweepPoint], control: bool) -> SweepResult:
    lens = studio.lens
    told = state.edit_spec(lens, replace(view, beta=state.scale(lens.setting(view.attribute)).high))
    if told is None:
        raise LensError("Nothing is steered here, so there is nothing to measure; move a slider first.")
    return collect(
        points,
        target=view.target,
        setting=f"{describe(told)}{'; control: random features as active (seed 0)' if control else ''}",
        control="random" if control else None,
        provenance={"lens": lens.manifest.lens_id, "sae": lens.manifest.sae_id},
    )
