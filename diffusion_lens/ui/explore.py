"""The Explore tab: one component whose value is what is asked for, and which event calls which handler."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from diffusion_lens.base.types import EditSpec, LensError
from diffusion_lens.studio import state
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import explore_handlers as handlers
from diffusion_lens.ui import flip_books
from diffusion_lens.ui.gpu import lent
from diffusion_lens.ui.html import html
from diffusion_lens.ui.panel import AT_ONCE, Component, Updates, Values
from diffusion_lens.ui.scene import Scene
from diffusion_lens.ui.visitor import visitor_of

ON_LOAD = "window.dl.pane({ element, props, trigger, watch, server, events: ['draw', 'measure', 'halt', 'alone'] });"

LIVE: dict[str, Any] = {
    "show_progress": "hidden", "concurrency_id": "live", "concurrency_limit": 8, "api_visibility": "private",
    "trigger_mode": "multiple",
}  # fmt: skip
"""The page asks for the newest value alone; a drawing that is still running ends at its next step."""

MEASURING: dict[str, Any] = {**LIVE, "concurrency_id": "long", "concurrency_limit": 4, "trigger_mode": "once"}

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

Drawing = Callable[[str, Any], Iterator[Scene]]
"""``draw``, ``measure`` or ``alone`` of one studio: (visitor, question) → what to show, part by part."""


@dataclass(frozen=True, eq=False)
class Explore:
    """A workbench on a page: its component holds what is asked for (``handlers.asked``) and shows scenes."""

    studio: Studio
    pane: Component

    @property
    def inputs(self) -> set[Component]:
        """Every component that a view is read from."""
        return {self.pane}

    @property
    def subject_parts(self) -> set[Component]:
        """The components that hold prompt and attribute."""
        return {self.pane}

    @property
    def changed_parts(self) -> set[Component]:
        """Every component that another subject changes."""
        return {self.pane}

    def view(self, values: Values) -> View:
        """What is on screen, checked; raises ``LensError``, one sentence."""
        return handlers.read_view(self.studio, values[self.pane])

    def edit_spec(self, values: Values) -> EditSpec | None:
        """The edit on screen as data; ``None`` where nothing is steered."""
        return state.edit_spec(self.studio.lens, self.view(values))

    def subject(self, values: Values) -> tuple[str | None, str]:
        """Prompt as shown, and attribute."""
        try:
            view = self.view(values)
        except LensError:
            view = handlers.opening(self.studio)
        return None if view.prompt is None else state.shown_prompt(view.prompt), view.attribute

    def steer_features(self, values: Values, features: Sequence[int]) -> Updates:
        """More features, each steered clearly; what is steered already stays."""
        try:
            view = handlers.with_features(self.studio, values[self.pane], features)
        except LensError as error:
            return {self.pane: gr.update(scene={"serial": 0, "alert": str(error)})}
        return {self.pane: gr.update(value=handlers.asked(view))}

    def take_subject(self, values: Values, prompt: str | None, attribute: str) -> Updates:
        """Another tab's prompt and attribute; drawn when this tab is looked at."""
        try:
            view = handlers.with_subject(self.studio, values[self.pane], prompt, attribute)
        except LensError:
            return {self.pane: gr.skip()}
        return {self.pane: gr.update(value=handlers.asked(view))}


def layout(studio: Studio) -> Explore:
    """Build the tab inside an open ``gr.Blocks``."""
    flip_books.serve(studio)
    return workbench(studio, elem_id="dl-explore")


def workbench(studio: Studio, view: View | None = None, *, elem_id: str, compact: bool = False) -> Explore:
    """A workbench inside an open ``gr.Blocks``: images, slider and feature rows of a view; the opening one by default.

    ``compact`` leaves out the sentence and its options: for a page that sets the view itself, by
    ``gr.update(value=handlers.asked(view))``.
    """
    first = handlers.first_scene(studio) if view is None else {}
    shown = view or handlers.opening(studio)
    pane = gr.HTML(
        handlers.asked(shown), html_template=html("explore.pane", compact=compact), js_on_load=ON_LOAD,
        server_functions=[_finder(studio), _stripper(studio)], apply_default_css=False, elem_id=elem_id, scene=first,
        compact=compact,
    )  # fmt: skip
    _connect(studio, pane)
    return Explore(studio, pane)


def _finder(studio: Studio) -> Callable[[Any], dict[str, Any]]:
    def find(question: Any) -> dict[str, Any]:
        return handlers.find(studio, question)

    return find


def _stripper(studio: Studio) -> Callable[[Any], dict[str, Any]]:
    drawn = lent(30)(partial(handlers.strip, studio))

    def strip(question: Any) -> dict[str, Any]:
        return drawn(question)

    return strip


def _connect(studio: Studio, pane: Component) -> None:
    # Lent once, when the app is built, and not with every visitor's tab.
    draw: Drawing = lent(30)(partial(handlers.draw, studio))
    measure: Drawing = lent(120)(partial(handlers.measure, studio))
    alone: Drawing = lent(30)(partial(handlers.alone, studio))

    def on_draw(value: Any, request: gr.Request) -> Iterator[Any]:
        for shown in draw(visitor_of(request), value):
            yield gr.update(scene=shown)
        studio.seen.set()
        studio.warm_up()

    def on_measure(value: Any, request: gr.Request) -> Iterator[Any]:
        for shown in measure(visitor_of(request), value):
            yield gr.update(scene=shown)

    def on_alone(value: Any, request: gr.Request) -> Iterator[Any]:
        for shown in alone(visitor_of(request), value):
            yield gr.update(scene=shown)

    def on_halt(request: gr.Request) -> None:
        handlers.stop(studio, visitor_of(request))

    pane.draw(on_draw, pane, pane, **LIVE)
    pane.measure(on_measure, pane, pane, **MEASURING)
    pane.alone(on_alone, pane, pane, **LIVE)
    pane.halt(on_halt, None, None, **AT_ONCE)
