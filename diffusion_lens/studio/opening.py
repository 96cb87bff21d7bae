"""The first views of a lens: the one that its page opens with, and three to begin with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusion_lens.studio import state
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio

NEAR = 0.05
"""Of strengths whose shares are as near to balance as this, the gentlest is shown."""


@dataclass(frozen=True)
class FirstStep:
    """One of the views to begin with: ``ask`` what to guess before opening it, ``answer`` what to look for then."""

    view: View
    title: str
    ask: str
    answer: str


def opening_view(studio: Studio) -> View:
    """The stored prompt that is furthest from balance, at the stored strength nearest to it.

    Prompts that show the class steered towards too seldom go first: there is something to steer towards.
    """
    view = state.default_view(studio.lens)
    identity = state.scale(studio.lens.setting(view.attribute)).identity
    candidates: list[tuple[bool, float, View]] = []
    for result in studio.lens.sweeps:
        if result.is_control or (result.attribute.name, result.target) != (view.attribute, view.target):
            continue
        column, even = result.attribute.index(view.target), 1 / len(result.attribute.classes)
        off = {p.beta: abs(p.shares[column].corrected - even) for p in result.points}
        here = replace(view, prompt=result.request.prompt, first_seed=result.request.seeds[0])
        close = [beta for beta in off if off[beta] <= min(off.values()) + NEAR]
        shown = replace(here, beta=min(close, key=lambda beta: abs(beta - identity)))
        if identity in off and studio.stored(shown) is not None:
            seldom = next(p.shares[column].corrected for p in result.points if p.beta == identity) < even
            candidates.append((seldom, off[identity], shown))
    return max(candidates, key=lambda found: found[:2])[2] if candidates else view


def first_steps(studio: Studio) -> tuple[FirstStep, ...]:
    """Unchanged, balanced, and too far."""
    view = opening_view(studio)
    ends = state.scale(studio.lens.setting(view.attribute))
    ahead = view.beta - ends.identity or 1.0  # the way that leads to balance, and past it
    far = ends.high if ahead > 0 else ends.low
    return (
        FirstStep(
            replace(view, beta=ends.identity), "The model as it is",
            f"How many of the eight will be read as {view.target}?",
            "Nothing is turned, so both rows are the same. Eight images have a wide interval: that is the first "
            "lesson.",
        ),
        FirstStep(
            view, "Turned towards balance", "Which of the eight will change, and what else will change with them?",
            "The same seeds keep most of their picture. Read “What else changed” beside the share: a turn is never "
            "free.",
        ),
        FirstStep(
            replace(view, beta=far), "Turned too far", "Will the images only change class, or also look odd?",
            "A strong turn leaves the range the model was trained in; the share alone would not have told you.",
        ),
    )  # fmt: skip
