"""Audits in the app: plans from what a visitor chose, their folders, and runs that can be stopped and taken up."""

from __future__ import annotations

from dataclasses import replace

from diffusion_lens.base.types import LensError
from diffusion_lens.studies.audit.freeze import Planned
from diffusion_lens.studio import state


def links_of(planned: Planned) -> dict[str, str]:
    """What opens an edit in the app: name → the part of an address after the app's own, for its first prompt.

    Only recommended steering of one attribute has a view of its own.
    """
    found = {}
    prompt = planned.prompts[0]
    for edit in planned.plan.edits:
        lens = next((s.lens for s in planned.subjects if s.lens is not None), None)
        if edit.kind != "steer" or len(edit.turns) != 1 or lens is None:
            continue
        turn = edit.turns[0]
        try:
            view = replace(
                state.default_view(lens, turn.attribute), prompt=prompt, target=turn.label, beta=turn.beta,
                first_seed=planned.plan.size.first_seed,
            )  # fmt: skip
            state.check(lens, view)
        except LensError:
            continue
        found[f"View: {edit.name}"] = state.to_query(view)
    return found
