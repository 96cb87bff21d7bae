"""The Sweep tab: its layout, and which event calls which handler."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from diffusion_lens.studio import state
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import sweep_handlers as handlers
from diffusion_lens.ui import texts
from diffusion_lens.ui.explore import Explore
from diffusion_lens.ui.explore_handlers import take_subject
from diffusion_lens.ui.figure import figure
from diffusion_lens.ui.gpu import lent


def layout(studio: Studio, tab: gr.Tab, explore: Explore) -> None:
    """Build the tab inside an open ``gr.Blocks``; it is filled when looked at, and shares its subject with Explore."""
    lens = studio.lens
    view = opening_view(studio)
    suggested = [texts.EMPTY_PROMPT if p == "" else p for p in lens.prompts if p is not None]
    gr.HTML(f'<p class="dl-intro">{texts.SWEEP_INTRO}</p>')
    with gr.Row(elem_classes="dl-choose"):
        prompt = gr.Dropdown(
            suggested, value=view.prompt or texts.EMPTY_PROMPT, label="Prompt", allow_custom_value=True, scale=4,
            min_width=260, visible=bool(suggested), elem_id="dl-sweep-prompt",
        )  # fmt: skip
        if not suggested:
            with gr.Column(scale=4, min_width=260):
                gr.HTML(texts.no_prompt())
        attribute = gr.Radio(list(state.steerable(lens)), value=view.attribute, label="Attribute (perceived)", scale=3,
                             min_width=200)  # fmt: skip
        measure = gr.Radio(list(handlers.MEASURES), value="log ratio", label="Axis", scale=3, min_width=200)
    with gr.Row(elem_classes="dl-choose"):
        grid = gr.Radio(list(handlers.GRIDS), value="shipped strengths", label="Strengths", scale=4, min_width=260)
        n = gr.Radio([16, 32, 64, 128, 256], value=32, label="Images per strength", scale=3, min_width=240)
        controls = gr.CheckboxGroup(
            list(handlers.CONTROLS), value=["random features"], label="Controls", scale=3, min_width=200
        )
    with gr.Row(elem_classes="dl-go"):
        start = gr.Button("Run sweep", variant="primary", elem_id="dl-run", scale=0, min_width=180)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="dl-stop-sweep", scale=0, min_width=180)
        status = gr.HTML("", elem_id="dl-sweep-status")
    plot = figure(elem_id="dl-sweep-plot")
    says, strip, table, download = (gr.HTML("") for _ in range(4))
    results, opened, busy = gr.State(()), gr.State(False), gr.State(False)
    shown: list[Any] = [plot, says, strip, table, download, status, results]
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read",
                             "concurrency_limit": 8}  # fmt: skip
    page, subject = explore.page, explore.controls[:2]
    tab.select(
        partial(handlers.look, studio), [*subject, prompt, attribute, measure, opened, busy],
        [prompt, attribute, *shown, opened], **quick,
    )  # fmt: skip
    gr.on(
        [prompt.input, attribute.input], partial(handlers.open_stored, studio), [prompt, attribute, measure], shown,
        trigger_mode="always_last", **quick,
    ).then(
        lambda page, prompt, attribute, *values: take_subject(studio, page, prompt, attribute, values),
        [page, prompt, attribute, *explore.controls], explore.changed, **quick,
    )  # fmt: skip
    measure.input(
        partial(handlers.change_measure, studio), [prompt, attribute, results, measure], plot, **quick
    )  # fmt: skip
    start.click(
        lent(120)(partial(handlers.run, studio)), [page, prompt, attribute, grid, n, controls, measure],
        [*shown, start, stop, busy], show_progress="hidden", concurrency_id="long", concurrency_limit=4,
        trigger_mode="once", api_visibility="private",
    )  # fmt: skip
    stop.click(lambda page: studio.stops.stop(f"{page.visitor}:sweep"), page, None, queue=False,
               show_progress="hidden", api_visibility="private")  # fmt: skip
