"""The Methods tab: every method's stored numbers, and any of them live beside DiffLens."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from diffusion_lens.results.comparison_tables import PARTS
from diffusion_lens.studio import state
from diffusion_lens.studio.methods_live import MethodBench, OptionField, option_fields
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import methods_handlers as handlers
from diffusion_lens.ui import texts
from diffusion_lens.ui.explore import Explore, Strength
from diffusion_lens.ui.figure import figure
from diffusion_lens.ui.gpu import lent

INTRO = (
    "Which way of steering works best, how well, and what does it cost? Every method is fitted on the same images, "
    "tuned on the same seeds by the same rule, and judged on others by the lens's image classifier. On the bundled "
    "lens that classifier also labelled what the probes learned from. Where a method beats DiffLens, the table says so."
)
TRY = ("2", "Try one", "on the prompt and seeds of Explore, beside DiffLens")
TABLE = ("1", "Compare", "all methods at their best setting")


def layout(studio: Studio, tab: gr.Tab, explore: Explore) -> None:
    """Build the tab inside an open ``gr.Blocks``; ``explore`` is the view that methods are tried on."""
    bench = MethodBench(studio)
    gr.HTML(f'<p class="dl-intro">{INTRO}</p>')
    _table(studio, tab)
    _live(bench, tab, explore)


def _table(studio: Studio, tab: gr.Tab) -> None:
    names = list(state.steerable(studio.lens))
    first = opening_view(studio).attribute
    gr.HTML(texts.section(TABLE))
    with gr.Row(elem_classes="dl-choose"):
        attribute = gr.Radio(names, value=first, label="Attribute (perceived)", scale=3, min_width=200,
                             elem_id="dl-bench-attribute")  # fmt: skip
        part = gr.Radio(list(PARTS), value="balance", label="Columns", scale=4, min_width=260)
        lost = gr.Radio(list(handlers.LOSSES), value=next(iter(handlers.LOSSES)), label="What was lost", scale=4,
                        min_width=260)  # fmt: skip
    verdict = gr.HTML("", elem_id="dl-bench-verdict")
    table = gr.HTML("", elem_id="dl-bench-table")
    with gr.Row(elem_id="dl-bench-plots", visible=False) as plots:
        with gr.Column(min_width=320):
            gr.HTML('<h3 class="dl-plot-title">Bias left against what was lost <small>lower left is best; the ring is '
                    "the best setting</small></h3>")  # fmt: skip
            trade = figure(elem_id="dl-tradeoff", min_height=120)
            trade_says = gr.HTML("")
        with gr.Column(min_width=320):
            gr.HTML('<h3 class="dl-plot-title">Along the strength <small>low and flat is a broad, stable range of '
                    "control</small></h3>")  # fmt: skip
            across = figure(elem_id="dl-strengths", min_height=120)
            across_says = gr.HTML("")
    notes = gr.HTML("")
    gr.on(
        [tab.select, attribute.input, part.input, lost.input], partial(handlers.compared, studio),
        [attribute, part, lost], [verdict, table, trade, trade_says, across, across_says, notes, plots],
        show_progress="hidden", api_visibility="private", concurrency_id="read", concurrency_limit=8,
    )  # fmt: skip


def _live(bench: MethodBench, tab: gr.Tab, explore: Explore) -> None:
    gr.HTML(texts.section(TRY))
    with gr.Row(elem_classes="dl-choose"):
        method = gr.Dropdown([], label="Method", interactive=True, scale=4, min_width=220, elem_id="dl-method")
        aim = gr.Radio(list(handlers.AIMS), value=handlers.AIMS[0], label="Aim at", scale=3, min_width=220)
        strength = Strength(0, 1, 0.5, step=0.025, label="Strength", scale=5, min_width=240, buttons=[],
                            elem_id="dl-method-strength", info="0 leaves the model as it is")  # fmt: skip
    about = gr.HTML("", elem_id="dl-method-about")
    options = gr.Accordion("Options of this method", open=False, elem_id="dl-method-options")
    with gr.Row(elem_classes="dl-go"):
        start = gr.Button("Draw beside DiffLens", variant="primary", elem_id="dl-method-run", scale=0, min_width=200)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="dl-method-stop", scale=0, min_width=160)
        status = gr.HTML(texts.status("Choose a method and draw."), elem_id="dl-method-status")
    shown = gr.HTML("", elem_id="dl-trio")
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read",
                             "concurrency_limit": 8}  # fmt: skip
    view = [explore.page, *explore.controls]

    def tell(key: str | None, aim: str, page: Any, *values: Any) -> tuple[Any, ...]:
        return handlers.describe(bench, page, key, aim, values)

    def tell_once(shown: str, key: str | None, aim: str, page: Any, *values: Any) -> tuple[Any, ...]:
        return handlers.describe(bench, page, key, aim, values, shown or "")

    described = [about, aim, strength]
    tab.select(handlers.start_methods, method, method, **quick).then(
        tell_once, [about, method, aim, *view], described, **quick
    )
    method.input(tell, [method, aim, *view], described, **quick)
    with options:

        @gr.render(inputs=[method], triggers=[method.change], show_progress="hidden", concurrency_id="read")
        def draw_options(key: str | None) -> None:
            fields = option_fields(bench.method(key)) if key else ()
            made = []
            with gr.Row(elem_classes="dl-options"):
                for field in fields:
                    made.append(_component(field, key or ""))

            def draw(page: Any, key: str | None, aim: str, strength: Any, *rest: Any) -> Any:
                values, told = rest[: len(explore.controls)], rest[len(explore.controls) :]
                yield from handlers.run(bench, page, key, aim, strength, told, values)

            start.click(
                lent(120)(draw), [explore.page, method, aim, strength, *explore.controls, *made],
                [shown, status, start, stop], show_progress="hidden", concurrency_id="long", concurrency_limit=4,
                trigger_mode="once", api_visibility="private",
            )  # fmt: skip

    stop.click(lambda page: bench.studio.stops.stop(f"{page.visitor}:methods"), explore.page, None, queue=False,
               show_progress="hidden", api_visibility="private")  # fmt: skip


def _component(field: OptionField, key: str) -> Any:
    """The control that an option asks for."""
    common: dict[str, Any] = {"label": field.title, "info": field.info or None, "min_width": 180,
                              "key": f"{key} {field.name}"}  # fmt: skip
    if field.kind == "choice":
        blank = [("the lens's own", "")] if field.optional else []
        choices = [*blank, *((choice, choice) for choice in field.choices)]
        return gr.Dropdown(choices, value=field.default or "", interactive=True, **common)
    if field.kind == "switch":
        return gr.Checkbox(bool(field.default), interactive=True, **common)
    if field.kind == "text":
        return gr.Textbox(field.default or "", interactive=True, max_lines=1, max_length=200, **common)
    # Limits are checked by the options themselves, which say what is wrong in one sentence.
    if field.optional:
        # said beside the field: a hint inside it is gone once something is typed
        common["info"] = " ".join(filter(None, (field.info, "Empty: the lens's own.")))
    return gr.Number(field.default, interactive=True, **common)
