"""The Explore tab: its layout, and which event calls which handler."""

from __future__ import annotations

from abc import ABCMeta
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from diffusion_lens.studio import cards, state
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import explore_handlers as handlers
from diffusion_lens.ui import grid, texts
from diffusion_lens.ui.explore_handlers import N_PLAIN, N_SLOTS, Page
from diffusion_lens.ui.gpu import lent
from diffusion_lens.ui.panel import Updates, Values

COPY = """() => {
  const link = document.querySelector('.dl-permalink');
  if (!link) return;
  (navigator.clipboard?.writeText(link.href) ?? Promise.reject()).then(
    () => { const b = document.querySelector('#dl-copy'); b.dataset.done = '1';
            setTimeout(() => delete b.dataset.done, 1500); },
    () => window.prompt('Copy this link', link.href));
}"""


# Made without gradio's metaclass, which would write a stub file beside this one.
Strength: Any = ABCMeta.__new__(
    type(gr.Slider),
    "Strength",
    (gr.Slider,),
    {
        "__doc__": "A slider whose limits are checked by the handlers, which say what is wrong in one sentence.",
        "is_template": True,  # drawn as the slider that it is
        "preprocess": lambda self, payload: payload,
    },
)


@dataclass(frozen=True)
class Explore:
    """The tab's components that others need.

    ``controls`` in the order of ``handlers.read_view``; ``outputs`` in the order of ``handlers.show``.
    """

    controls: list[Any]
    cards: list[Any]
    outputs: list[Any]
    page: gr.State
    status: gr.HTML
    changed: list[Any]
    live: dict[str, Any]
    studio: Studio

    @property
    def subject_parts(self) -> set[Any]:
        """The components that hold prompt and attribute."""
        return set(self.controls[:2])

    @property
    def inputs(self) -> set[Any]:
        """Every component that a view is read from."""
        return {self.page, *self.controls}

    @property
    def changed_parts(self) -> set[Any]:
        """Every component that another subject changes."""
        return set(self.changed)

    def subject(self, values: Values) -> tuple[str | None, str]:
        """Prompt as shown, and attribute."""
        return values[self.controls[0]], values[self.controls[1]]

    def view(self, values: Values) -> View:
        """The view that the controls ask for, checked; raises ``LensError``, one sentence."""
        return handlers.read_view(self.studio, values[self.page], [values[c] for c in self.controls])

    def steer_feature(self, values: Values, feature: int | None) -> Updates:
        """One feature of the atlas, steered alone."""
        controls = [values[c] for c in self.controls]
        updates = handlers.turn_feature(self.studio, values[self.page], feature, controls)
        return dict(zip(self.changed, updates, strict=True))

    def take_subject(self, values: Values, prompt: str | None, attribute: str) -> Updates:
        """Another tab's prompt and attribute."""
        controls = [values[c] for c in self.controls]
        updates = handlers.take_subject(self.studio, values[self.page], prompt, attribute, controls)
        return dict(zip(self.changed, updates, strict=True))


def layout(studio: Studio) -> Explore:
    """Build the tab inside an open ``gr.Blocks``."""
    lens = studio.lens
    view = opening_view(studio)
    slots = cards.slots(lens, view)
    page = gr.State(Page(slots=slots))
    values = handlers.control_values(studio, view, slots)
    subject, hold = _choose(studio, values)
    shown, checks, own = _features(studio, view, slots, values)
    beta, reset, balance, stop = _turn(studio, view)
    status, before, after, drawing, measures, link = _see(studio, view)
    advanced = _advanced(studio, values)
    controls = [*subject, *advanced, hold, beta, *checks, *own]
    outputs = [before, after, drawing, measures, status, link, page]
    live: dict[str, Any] = {
        "fn": lent(30)(partial(handlers.draw, studio)), "inputs": [page, *controls], "outputs": outputs,
        "show_progress": "minimal", "show_progress_on": status, "concurrency_id": "live", "concurrency_limit": 8,
        "api_visibility": "private",
    }  # fmt: skip
    tab = Explore(controls, shown, outputs, page, status, [*controls, *shown, page], live, studio)
    _wire(studio, tab, subject, advanced, checks, own, beta, hold, reset, balance, stop)
    return tab


def return_to(studio: Studio, tab: gr.Tab, explore: Explore) -> None:
    """Draw on return to the tab what another one has set meanwhile."""
    options = {**explore.live, "fn": lent(30)(partial(handlers.draw_pending, studio))}
    tab.select(**options)


def _choose(studio: Studio, values: list[Any]) -> tuple[list[Any], Any]:
    lens = studio.lens
    gr.HTML(texts.section(texts.CHOOSE))
    suggested = [state.EMPTY_PROMPT if p == "" else p for p in lens.prompts if p is not None]
    with gr.Row(elem_classes="dl-choose"):
        prompt = gr.Dropdown(
            suggested, value=values[0], label="Prompt", allow_custom_value=True, scale=3, min_width=240,
            visible=bool(suggested), elem_id="dl-prompt",
        )  # fmt: skip
        if not suggested:
            with gr.Column(scale=4, min_width=260):
                gr.HTML(texts.no_prompt())
        attribute = gr.Radio(
            list(state.steerable(lens)), value=values[1], label="Attribute (perceived)", scale=4, min_width=200
        )
        target = gr.Radio(
            list(lens.attribute_named(values[1]).classes), value=values[2], label="Turn towards", scale=3, min_width=200
        )
        free = state.holdable(lens, values[1])
        hold = gr.CheckboxGroup(
            list(free), value=values[N_PLAIN - 2], label=texts.HOLD, scale=3, min_width=170, visible=bool(free),
            elem_id="dl-hold",
        )  # fmt: skip
        n_seeds = gr.Radio(list(state.SEED_COUNTS), value=values[3], label="Images", scale=2, min_width=130)
    return [prompt, attribute, target, n_seeds], hold


def _features(
    studio: Studio, view: View, slots: tuple[int, ...], values: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    gr.HTML(texts.section(texts.FEATURES))
    ends = state.scale(studio.lens.setting(view.attribute))
    shown, checks, own = [], [], []
    html = handlers.card_values(studio, view, slots)
    with gr.Row(elem_id="dl-cards"):
        for k in range(N_SLOTS):
            with gr.Column(min_width=150, elem_classes="dl-slot"):
                shown.append(gr.HTML(html[k]))
                checks.append(gr.Checkbox(
                    values[N_PLAIN + k], label="turns with the set", container=False, visible=k < len(slots)
                ))  # fmt: skip
                own.append(Strength(
                    ends.low, ends.high, values[N_PLAIN + N_SLOTS + k], step=ends.step, buttons=[],
                    visible=k < len(slots) and not values[N_PLAIN + k],
                    label=f"β of #{slots[k]} alone" if k < len(slots) else "", elem_classes="dl-own",
                ))  # fmt: skip
    return shown, checks, own


def _turn(studio: Studio, view: View) -> tuple[Any, Any, Any, Any]:
    ends = state.scale(studio.lens.setting(view.attribute))
    gr.HTML(texts.section(texts.TURN))
    with gr.Row(elem_id="dl-turn", equal_height=True):
        beta = Strength(
            ends.low, ends.high, view.beta, step=ends.step, label="Strength β of the whole set", scale=6, min_width=240,
            elem_id="dl-beta", buttons=[], info=f"{ends.identity:g} leaves the model as it is",
        )  # fmt: skip
        with gr.Column(scale=3, min_width=220, elem_classes="dl-actions"):
            balance = gr.Button("Balance", variant="primary", elem_id="dl-balance")
            reset = gr.Button("Reset", elem_id="dl-reset")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="dl-stop")
    return beta, reset, balance, stop


def _advanced(studio: Studio, values: list[Any]) -> list[Any]:
    n_steps = studio.lens.manifest.n_steps
    with gr.Accordion("Advanced: features, sampler, steps, seeds", open=False), gr.Row():
        first_seed = gr.Number(values[4], label="First seed", precision=None, min_width=120)
        sampler = gr.Radio(
            ["asymmetric", "symmetric"], value=values[5], label="Sampler", min_width=200,
            info="asymmetric turns the predicted image alone, symmetric the direction too",
        )  # fmt: skip
        limit = min(state.MAX_FEATURES, studio.lens.atlas.density.size)
        n_features = Strength(1, limit, values[6], step=1, label="Features per pole", min_width=180)
        first_step = Strength(1, n_steps, values[7], step=1, label="Turn from step", min_width=180)
        last_step = Strength(1, n_steps, values[8], step=1, label="to step", min_width=180)
    return [first_seed, sampler, n_features, first_step, last_step]


def _see(studio: Studio, view: View) -> tuple[Any, ...]:
    picture = studio.stored(view)
    attribute = studio.lens.attribute_named(view.attribute)
    before = after = drawing = ""
    said = "Press a slider to draw."
    if picture is not None:
        before, after = (grid.row_html(picture, attribute, edited=e) for e in (False, True))
        drawing = handlers.drawing(studio, view, picture.beta)
        said = grid.summary(picture, attribute)
    gr.HTML(texts.section(texts.SEE))
    status = gr.HTML(texts.status(said), elem_id="dl-status")
    with gr.Row(elem_id="dl-see"):
        with gr.Column(scale=5, min_width=320):
            before_html = gr.HTML(before, elem_id="dl-before")
            after_html = gr.HTML(after, elem_id="dl-after")
            curve_html = gr.HTML(drawing, elem_id="dl-curve")
        with gr.Column(scale=3, min_width=280):
            # Filled on arrival: its intervals need scipy, which the first images need not wait for.
            measure_html = gr.HTML("", elem_id="dl-measures")
    with gr.Row(elem_classes="dl-share"):
        link = gr.HTML(texts.link(studio.path + state.to_query(view)))
        copy = gr.Button("Copy link", size="sm", elem_id="dl-copy")
        copy.click(None, js=COPY)
    return status, before_html, after_html, curve_html, measure_html, link


def _wire(
    studio: Studio, tab: Explore, subject: list[Any], advanced: list[Any], checks: list[Any], own: list[Any],
    beta: Any, hold: Any, reset: Any, balance: Any, stop: Any,
) -> None:  # fmt: skip
    inputs = [tab.page, *tab.controls]
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    live = tab.live
    sliders = [beta, *own, *advanced[2:]]
    prompt, attribute, target, n_seeds = subject
    gr.on(
        [*[s.release for s in sliders], *[s.input for s in sliders], prompt.input, n_seeds.input,
         hold.input, advanced[0].submit, advanced[0].blur, advanced[1].input],
        trigger_mode="always_last", **live,
    )  # fmt: skip
    for component, handler in ((attribute, handlers.change_attribute), (target, handlers.change_target)):
        component.input(lambda page, *values, h=handler: h(studio, page, values), inputs, tab.changed, **quick).then(
            **live
        )
    reset.click(lambda page, *values: handlers.reset(studio, page, values), inputs, tab.changed, **quick).then(**live)
    for check, slider in zip(checks, own, strict=True):
        check.input(lambda follows: gr.update(visible=not follows), check, slider, **quick).then(**live)
    running = balance.click(
        lent(120)(partial(handlers.balance, studio)), inputs, [beta, tab.status, stop], show_progress="minimal",
        show_progress_on=tab.status, concurrency_id="long", concurrency_limit=4, api_visibility="private",
        trigger_mode="once",
    )  # fmt: skip
    running.success(**live)
    stop.click(lambda page: studio.stops.stop(f"{page.visitor}:balance"), tab.page, None, **quick)
