"""The Methods tab: every method's stored numbers, and any of them live beside DiffLens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr

from diffusion_lens.base.types import LensError
from diffusion_lens.results.comparison import Comparison
from diffusion_lens.studio import compared, state
from diffusion_lens.studio.methods_live import EVEN, MethodBench, OptionField, Wish, option_fields, read_options
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio, import_engine
from diffusion_lens.ui import methods_views, texts
from diffusion_lens.ui.errors import explain
from diffusion_lens.ui.explore import Explore, Strength
from diffusion_lens.ui.gpu import lent
from diffusion_lens.ui.html import html
from diffusion_lens.ui.methods_views import CompareView
from diffusion_lens.ui.panel import AT_ONCE, KEEP, LONG, READ, Component, Panel, Updates, Values, visible
from diffusion_lens.ui.visitor import visitor_of

INTRO = (
    "Which way of steering works best, how well, and what does it cost? Every method is fitted on the same images, "
    "tuned on the same seeds by the same rule, and judged on others by the lens's image classifier. On the bundled "
    "lens that classifier also labelled what the probes learned from."
)
AIMS = ("Explore's class", EVEN)
FIRST_METHOD = "activation"


@dataclass(frozen=True)
class CompareQuestion:
    """Which stored comparison, in which measure."""

    attribute: str
    measure: str


@dataclass(frozen=True)
class MethodQuestion:
    """Which method, towards what."""

    method: str | None
    aim: str


@dataclass(frozen=True)
class TryRequest(MethodQuestion):
    """A method as a visitor asks to see it, unchecked."""

    strength: Any


@dataclass(frozen=True)
class MethodView:
    """What the chosen method is, and the controls that it needs."""

    about: str = KEEP
    aim: dict[str, Any] = KEEP
    strength: dict[str, Any] = KEEP


@dataclass(frozen=True)
class RunView:
    """Where a run stands, and its pictures at the end."""

    shown: str = KEEP
    status: str = KEEP
    start: dict[str, Any] = KEEP
    stop: dict[str, Any] = KEEP


Run = Callable[[str, View, Wish], Iterator[RunView]]
"""``run`` of one bench: (visitor, view, wish) → where it stands, step by step."""


def stored(studio: Studio) -> tuple[Mapping[str, Comparison], str]:
    """The lens's comparisons by attribute, and what is wrong with them, if anything is."""
    try:
        return studio.lens.comparisons, ""
    except LensError as error:
        return {}, str(error)


def compare_view(studio: Studio, question: CompareQuestion) -> CompareView:
    """What is stored for an attribute."""
    found, problem = stored(studio)
    name = str(question.attribute)
    setting = studio.lens.settings.get(name)
    target = "" if setting is None else setting.target
    return methods_views.compare_view(found.get(name), name, str(question.measure), target, problem)


def run(bench: MethodBench, visitor: str, view: View, wish: Wish) -> Iterator[RunView]:
    """Fit where needed, then draw. Takes and gives plain values alone, which a lent GPU's process can be sent."""
    idle = RunView(start=visible(True), stop=visible(False))
    try:
        events = bench.events(visitor, view, wish)
        yield RunView(KEEP, html("parts.status", "Waiting for a turn …"), visible(False), visible(True))
        for news in events:
            if news.trio is None:
                yield RunView(status=html("parts.status", f"{news.text}{texts.seconds(news.seconds_left)}"))
                continue
            attribute = bench.studio.lens.attribute_named(view.attribute)
            said = html("parts.status", methods_views.said(news.trio, attribute))
            yield replace(idle, shown=methods_views.trio_html(news.trio, attribute), status=said)
    except Exception as error:
        yield replace(idle, status=explain(error))


def read_wish(bench: MethodBench, asked: TryRequest, options: Mapping[str, Any]) -> Wish:
    """What a visitor wants to see; raises ``LensError``, one sentence, for what cannot be."""
    if not asked.method:
        raise LensError("Choose a method first.")
    method = bench.method(asked.method)
    try:
        amount = float(asked.strength)
    except (TypeError, ValueError):
        raise LensError(f"The strength must be a number; it is '{asked.strength}'.") from None
    if not 0 <= amount <= max(method.strengths):
        raise LensError(
            f"The strength of {method.name} lies between 0 and {max(method.strengths):g}; it is {amount:g}."
        )
    return Wish(asked.method, amount, asked.aim == EVEN, read_options(method, options))


def method_choices() -> list[tuple[str, str]]:
    """(name, key) of every method but DiffLens, which always stands beside."""
    import_engine()
    from diffusion_lens.methods.registry import METHODS

    return [(method.name, key) for key, method in METHODS.items() if key != "difflens"]


def method_view(bench: MethodBench, view: View | None, question: MethodQuestion, attribute: str) -> MethodView:
    """Explanation, aim and strength of a method; ``view`` is Explore's, ``None`` where that cannot be drawn."""
    if not question.method:
        return MethodView()
    method = bench.method(question.method)
    top = max(method.strengths)
    comparison = stored(bench.studio)[0].get(attribute)
    row = comparison.row(method.key) if comparison else None
    value = row.strength if row and row.strength else method.strengths[len(method.strengths) // 2]
    expected = 0.0
    if view is not None:
        expected = bench.estimate(view, Wish(method.key, value, question.aim == EVEN, read_options(method, {})))
    only_even = method.aim != "class"
    return MethodView(
        methods_views.method_html(method, expected),
        gr.update(value=EVEN if only_even else question.aim, interactive=not only_even),
        gr.update(
            value=value, minimum=0, maximum=top, step=round(top / 40, 4), label=f"Strength: {method.strength_name}"
        ),
    )


@dataclass(frozen=True, eq=False)
class MethodsTab(Panel):
    """The tab's components: a ``CompareQuestion``, a ``TryRequest``, and what their views show."""

    bench: MethodBench
    draw_trio: Run
    explore: Explore
    attribute: Component
    measure: Component
    headline: Component
    table: Component
    curves: Component
    more: Component
    method: Component
    aim: Component
    strength: Component
    about: Component
    start: Component
    stop: Component
    status: Component
    shown: Component

    def compare(self, values: Values) -> Updates:
        """Another attribute or measure; or the tab is looked at."""
        return self.show(compare_view(self.bench.studio, self.read(values, CompareQuestion)))

    def choose_first(self, values: Values) -> Updates:
        """The choice of methods, once torch is there."""
        choices = method_choices()
        known = {key for _, key in choices}
        current = values[self.method]
        chosen = current if current in known else FIRST_METHOD
        return {self.method: gr.update(choices=choices, value=chosen, interactive=True)}

    def tell(self, values: Values) -> Updates:
        """What the chosen method is."""
        view = self._view(values)
        attribute = self.explore.subject(values)[1]
        return self.show(method_view(self.bench, view, self.read(values, MethodQuestion), attribute))

    def tell_once(self, values: Values) -> Updates:
        """The same on return to the tab; nothing new where the method stands explained already."""
        told = f'data-method="{values[self.method]}"' in str(values[self.about] or "")
        return self.show(MethodView()) if told else self.tell(values)

    def try_method(self, values: Values, options: Mapping[str, Any], request: gr.Request) -> Iterator[Updates]:
        """Fit and draw what the controls ask for."""
        try:
            view = self.explore.view(values)
            wish = read_wish(self.bench, self.read(values, TryRequest), options)
        except LensError as error:
            yield self.show(RunView(status=explain(error)))
            return
        for news in self.draw_trio(visitor_of(request), view, wish):
            yield self.show(news)

    def stop_run(self, request: gr.Request) -> None:
        """End the visitor's own fit or drawing."""
        self.bench.studio.stops.stop(f"{visitor_of(request)}:methods")

    def draw_options(self, key: str | None, start: Component) -> None:
        """The controls of a method's options, and the button that reads them."""
        fields = option_fields(self.bench.method(key)) if key else ()
        with gr.Row(elem_classes="dl-options"):
            made = {field.name: _component(field, key or "") for field in fields}

        def try_it(values: Values, request: gr.Request) -> Iterator[Updates]:
            yield from self.try_method(values, {name: values[made[name]] for name in made}, request)

        inputs = self.parts(TryRequest) | self.explore.inputs | set(made.values())
        start.click(try_it, inputs, self.parts(RunView), **LONG)

    def connect(self, tab: gr.Tab) -> None:
        """Bind the events; ``tab`` tells when it is looked at."""
        gr.on(
            [tab.select, self.attribute.input, self.measure.input], self.compare, self.parts(CompareQuestion),
            self.parts(CompareView), **READ,
        )  # fmt: skip
        asked, shown = self.parts(MethodQuestion) | self.explore.inputs, self.parts(MethodView)
        tab.select(self.choose_first, {self.method}, [self.method], **READ).then(
            self.tell_once, asked | {self.about}, shown, **READ
        )
        self.method.input(self.tell, asked, shown, **READ)
        self.stop.click(self.stop_run, None, None, **AT_ONCE)

    def _view(self, values: Values) -> View | None:
        try:
            return self.explore.view(values)
        except LensError:
            return None


def layout(studio: Studio, tab: gr.Tab, explore: Explore) -> None:
    """Build the tab inside an open ``gr.Blocks``; ``explore`` is the view that methods are tried on."""
    bench = MethodBench(studio)
    # Lent once, when the app is built, and not with every visitor's tab.
    made = components(bench, lent(120)(partial(run, bench)), explore)
    made.connect(tab)


def components(bench: MethodBench, draw_trio: Run, explore: Explore) -> MethodsTab:
    """The tab's components inside an open ``gr.Blocks``."""
    gr.HTML(html("parts.intro", INTRO))
    attribute, measure, headline, table, curves, more = _stored_part(bench.studio)
    gr.HTML(html("parts.section", "2", "Try one", "on the prompt and seeds of Explore, beside DiffLens"))
    with gr.Row(elem_classes="dl-choose"):
        method = gr.Dropdown([], label="Method", interactive=True, scale=4, min_width=220, elem_id="dl-method")
        aim = gr.Radio(list(AIMS), value=AIMS[0], label="Aim at", scale=3, min_width=220)
        strength = Strength(0, 1, 0.5, step=0.025, label="Strength", scale=5, min_width=240, buttons=[],
                            elem_id="dl-method-strength", info="0 leaves the model as it is")  # fmt: skip
    about = gr.HTML("", elem_id="dl-method-about")
    options = gr.Accordion("Options of this method", open=False, elem_id="dl-method-options")
    with gr.Row(elem_classes="dl-go"):
        start = gr.Button("Draw beside DiffLens", variant="primary", elem_id="dl-method-run", scale=0, min_width=200)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="dl-method-stop", scale=0, min_width=160)
        status = gr.HTML(html("parts.status", "Choose a method and draw."), elem_id="dl-method-status")
    shown = gr.HTML("", elem_id="dl-trio")
    made = MethodsTab(
        bench=bench, draw_trio=draw_trio, explore=explore, attribute=attribute, measure=measure, headline=headline,
        table=table, curves=curves, more=more, method=method, aim=aim, strength=strength, about=about, start=start,
        stop=stop, status=status, shown=shown,
    )  # fmt: skip
    with options:

        @gr.render(inputs=[method], triggers=[method.change], show_progress="hidden", concurrency_id="read")
        def draw_options(key: str | None) -> None:
            made.draw_options(key, start)

    return made


def _stored_part(studio: Studio) -> tuple[Component, ...]:
    names = list(state.steerable(studio.lens))
    first = opening_view(studio)
    gr.HTML(html("parts.section", "1", "Compare", "every method at its best setting"))
    with gr.Row(elem_classes="dl-choose"):
        attribute = gr.Radio(names, value=first.attribute, label="Attribute (perceived)", scale=3, min_width=200,
                             elem_id="dl-bench-attribute")  # fmt: skip
        labels = studio.lens.attribute_named(first.attribute).classes
        opening = compared.SHARE + first.target if len(labels) == 2 else compared.DISTANCE
        measure = gr.Radio([opening, compared.DISTANCE] if len(labels) == 2 else [opening], value=opening,
                           label="Show", scale=4, min_width=220, elem_id="dl-bench-measure")  # fmt: skip
    headline = gr.HTML("", elem_id="dl-bench-verdict")
    table, curves, more = (gr.HTML("", elem_id=f"dl-bench-{name}") for name in ("table", "curves", "more"))
    return attribute, measure, headline, table, curves, more


def _component(field: OptionField, key: str) -> Component:
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
