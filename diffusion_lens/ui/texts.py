"""What the app says. One place, plain words."""

from __future__ import annotations

from html import escape

TITLE = "Diffusion Lens"
TAGLINE = "Open a diffusion model, turn the features that decide who appears, and measure what happens."


NO_PROMPT = "This model takes no prompt: it draws from everything it learnt."
WAKING = "The model is waking up; this is the nearest stored result."
NO_STRIP = "The model is waking up; open the options again in a moment to see the steps."
STOPPED = "Stopped; what was measured stays."
MEASURED = "Measured: the curve is of exactly what is on screen."
LOAD_FIRST = "Stored sweep, measured when this lens was made: {setting}."
OTHER_SETTING = (
    "These stored sweeps were made with another setting than the one the sliders turn; run the sweep to measure it."
)
OTHER_CONTROL = "Stored sweep; its control was drawn in another way than a control run now (see About)."
NO_STORED = "No sweep of this prompt and attribute is stored. Press “Run sweep” to measure one."
SWEEP_INTRO = (
    "How the balance of the images moves with β, on the same seeds at every strength. A control turns as many "
    "features drawn at random, or the two directions swapped: what moves there is not due to these features."
)
ATLAS_INTRO = (
    "Every point is a feature; near points write similar directions into the model. Click a point; or walk through "
    "the table with the arrow keys and press Enter."
)
FAILED = "That went wrong on our side ({kind}). Nothing you set is lost; try again."


def section(step: tuple[str, str, str]) -> str:
    """The heading of one step of the story."""
    number, name, what = step
    return (
        f'<h2 class="dl-step"><span class="dl-number" aria-hidden="true">{number}</span>{name}'
        f"<small>{what}</small></h2>"
    )


def no_prompt() -> str:
    """What stands in the prompt's place where the model takes none."""
    return f'<p class="dl-no-prompt"><b>Prompt</b><br>{NO_PROMPT}</p>'


def status(text: str, *, bad: bool = False) -> str:
    """A line that screen readers read out when it changes."""
    kind = "dl-status dl-bad" if bad else "dl-status"
    mark = '<span aria-hidden="true">⚠ </span>' if bad else ""
    return f'<p class="{kind}" role="{"alert" if bad else "status"}">{mark}{escape(text)}</p>'


def seconds(left: float | None) -> str:
    """``about 20 s left``, or nothing."""
    if left is None:
        return ""
    return f", about {left:.0f} s left" if left < 90 else f", about {left / 60:.0f} min left"
