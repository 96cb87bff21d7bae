"""Several attributes steered at once, as stored: every combination before and after, and what each steer moves."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from diffusion_lens.base.types import LensError
from diffusion_lens.plots import describe_spillover, spillover_figure
from diffusion_lens.results.joint import JointResult
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import texts
from diffusion_lens.ui.figure import figure, figure_value

COMMAND = "python -m diffusion_lens together --store"


def combinations_html(result: JointResult) -> str:
    """Every combination of classes: its share before and after, largest move first."""
    before, after = result.before, result.after
    order = sorted(
        np.ndindex(before.counts.shape), key=lambda i: -abs(np.nan_to_num(after.shares[i] - before.shares[i]))
    )
    rows = [
        f"<tr><th scope='row'>{escape(', '.join(c[k] for c, k in zip(before.classes, i, strict=True)))}</th>"
        f"<td>{_share(float(before.shares[i]))} <small>({before.counts[i]})</small></td>"
        f"<td>{_share(float(after.shares[i]))} <small>({after.counts[i]})</small></td></tr>"
        for i in order
    ]
    return (
        "<div class='dl-scroll' tabindex='0'><table><caption>Every combination, among images decided in all of "
        f"{escape(', '.join(before.attributes))}: {int(before.counts.sum())} before and {int(after.counts.sum())} "
        f"after, of {before.n} on the same seeds</caption><thead><tr><th scope='col'>combination</th>"
        "<th scope='col'>before (images)</th><th scope='col'>after</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _share(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.0%}"


def says(result: JointResult) -> str:
    """What was steered, whether the steers disturb each other, and whether their order matters."""
    goals = "; ".join(f"{name} to {told}" for name, told in result.steered.items())
    worst = max(
        ((name, label, value) for name, own in result.interference.items() for label, value in own.items()),
        key=lambda item: abs(item[2]), default=("", "", 0.0),
    )  # fmt: skip
    prompt = "no prompt" if result.prompt is None else f"“{result.prompt or texts.EMPTY_PROMPT}”"
    return (
        f"{prompt}: {goals}. Steered together instead of alone, {worst[0]} {worst[1]} ends "
        f"{100 * worst[2]:+.0f} points elsewhere at most; {result.order_matters:.0%} of images change any class when "
        f"the order is reversed; {len(result.shared_features)} features are turned by more than one attribute."
    )


def shown(studio: Studio) -> tuple[Any, ...]:
    """Sentence, matrix and table of the stored result, or how to make one."""
    try:
        result = studio.lens.together
    except LensError as error:
        return texts.status(str(error), bad=True), None, ""
    if result is None:
        return f"<p class='dl-says'>Nothing is stored. This measures it: <code>{COMMAND}</code></p>", None, ""
    matrix = figure_value(spillover_figure(result.spillover), describe_spillover(result.spillover))
    return f"<p class='dl-says'>{escape(says(result))}</p>", matrix, combinations_html(result)


def layout(studio: Studio, tab: gr.Tab) -> None:
    """Build the section inside an open ``gr.Blocks``; it is filled when ``tab`` is looked at."""
    if len(studio.lens.settings) < 2:
        return
    with gr.Accordion("Several attributes at once: what each steer moves besides", open=False):
        told = gr.HTML("", elem_id="dl-together")
        matrix = figure(elem_id="dl-spillover", min_height=60)
        table = gr.HTML("")
    tab.select(
        partial(shown, studio), None, [told, matrix, table], show_progress="hidden", api_visibility="private",
        concurrency_id="read", concurrency_limit=8,
    )  # fmt: skip
