"""Several attributes steered at once, as stored: every combination before and after, and the steers' side effects."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from diffusion_lens.base.types import LensError
from diffusion_lens.plots import describe_spillover, spillover_figure
from diffusion_lens.results.joint import JointResult
from diffusion_lens.studio import joint, state
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui.figure import figure, figure_value
from diffusion_lens.ui.html import html

COMMAND = "python -m diffusion_lens together --store"


@dataclass(frozen=True)
class TogetherView:
    """Sentence, matrix and table of the stored result, or how to make one."""

    sentence: str
    matrix: dict[str, str] | None = None
    table: str = ""


def together_view(studio: Studio) -> TogetherView:
    """What is stored."""
    try:
        result = studio.lens.together
    except LensError as error:
        return TogetherView(html("parts.status", str(error), bad=True))
    if result is None:
        return TogetherView(html("together.missing", COMMAND))
    matrix = figure_value(spillover_figure(result.spillover), describe_spillover(result.spillover))
    table = html("together.combinations", result.before, result.after, joint.combinations(result))
    return TogetherView(html("parts.sentence", describe(result)), matrix, table)


def describe(result: JointResult) -> str:
    """What was steered, whether the steers disturb each other, and whether their order matters."""
    goals = "; ".join(f"{name} to {goal}" for name, goal in result.steered.items())
    worst = joint.largest_interference(result)
    prompt = "no prompt" if result.prompt is None else f"“{state.shown_prompt(result.prompt)}”"
    return (
        f"{prompt}: {goals}. Steered together instead of alone, {worst.attribute} {worst.label} ends "
        f"{100 * worst.difference:+.0f} points elsewhere at most; {result.order_matters:.0%} of images change any "
        f"class when the order is reversed; {len(result.shared_features)} features are turned by more than one "
        "attribute."
    )


def build(studio: Studio) -> None:
    """Build the section inside an open ``gr.Blocks``, where the lens steers more than one attribute."""
    if len(studio.lens.settings) < 2:
        return
    shown = together_view(studio)
    with gr.Accordion("Several attributes at once: what each steer moves besides", open=False):
        gr.HTML(shown.sentence, elem_id="dl-together")
        figure(shown.matrix, elem_id="dl-spillover", min_height=60)
        gr.HTML(shown.table)
