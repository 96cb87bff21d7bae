"""The tab "Two": two prompts, two lenses or two edits side by side on the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr

from diffusion_lens.base.types import LensError
from diffusion_lens.studio import state
from diffusion_lens.studio.compare_two import Read, Side, Two, compare_two, counted
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Row, Studio
from diffusion_lens.ui.errors import explain
from diffusion_lens.ui.html import html, points
from diffusion_lens.ui.panel import AT_ONCE, LONG, Component, Updates, Values
from diffusion_lens.ui.visitor import visitor_of

NAMES = ("A", "B")
INTRO = (
    "Two prompts, two lenses or two edits on the same seeds: draw both, and see where the classifier reads them "
    "differently. Set A and B; whatever you leave alike stays alike."
)
PAIRED = (
    "A column is one seed: both images start from the same noise. {n} images show what differs, not how often; "
    "● marks a 95 % interval that leaves out 0."
)
DRAWING, DRAWN = "Drawing both rows …", "Both rows are drawn at full steps."
UNPAIRED = (
    "These are two models: one seed is another noise in each, so a column is no pair, and rows of {n} images can be "
    "compared by their shares alone."
)


@dataclass(frozen=True)
class SideControls:
    """The components of one side."""

    lens: Component
    prompt: Component
    attribute: Component
    target: Component
    beta: Component

    @property
    def all(self) -> set[Component]:
        """Every one of them."""
        return {self.lens, self.prompt, self.attribute, self.target, self.beta}


@dataclass(frozen=True, eq=False)
class TwoTab:
    """The tab's components."""

    studios: Sequence[Studio]
    sides: tuple[SideControls, SideControls]
    n_seeds: Component
    first_seed: Component
    status: Component
    rows: Component
    table: Component

    @property
    def inputs(self) -> set[Component]:
        """Every component that a comparison is read from."""
        return {self.n_seeds, self.first_seed, *self.sides[0].all, *self.sides[1].all}


@dataclass(frozen=True)
class SideAsked:
    """One side as the controls hold it, unchecked."""

    lens: Any
    prompt: Any
    attribute: Any
    target: Any
    beta: Any


@dataclass(frozen=True)
class Asked:
    """A comparison as the controls hold it, unchecked: plain values, which a lent GPU's process can be sent."""

    sides: tuple[SideAsked, SideAsked]
    n_seeds: Any
    first_seed: Any


@dataclass(frozen=True)
class Shown:
    """What the tab shows; ``None`` leaves a part as it is."""

    status: str
    rows: str | None = None
    table: str | None = None


def asked_of(tab: TwoTab, values: Values) -> Asked:
    """What the controls hold."""
    first, second = (
        SideAsked(*(values[c] for c in (own.lens, own.prompt, own.attribute, own.target, own.beta)))
        for own in tab.sides
    )
    return Asked((first, second), values[tab.n_seeds], values[tab.first_seed])


def read_sides(studios: Sequence[Studio], asked: Asked) -> tuple[Side, Side]:
    """Both sides; raises ``LensError``, one sentence, for what cannot be drawn."""
    seeds = (_whole(asked.n_seeds, "The number of images"), _whole(asked.first_seed, "The first seed"))
    first, second = (_side(studios, own, *seeds) for own in asked.sides)
    return first, second


def _side(studios: Sequence[Studio], own: SideAsked, n_seeds: int, first_seed: int) -> Side:
    studio = _studio(studios, own.lens)
    lens, attribute = studio.lens, str(own.attribute)
    if attribute not in state.steerable(lens):
        raise LensError(f"The lens {lens.manifest.name} does not steer '{attribute}'; choose another attribute.")
    try:
        beta = float(own.beta)
    except (TypeError, ValueError):
        raise LensError(f"The steering strength must be a number; it is '{own.beta}'.") from None
    view = replace(
        state.default_view(lens, attribute), prompt=state.read_prompt(lens, own.prompt), target=str(own.target),
        beta=beta, n_seeds=n_seeds, first_seed=first_seed,
    )  # fmt: skip
    return Side(studio, view)


def _studio(studios: Sequence[Studio], name: Any) -> Studio:
    return next((studio for studio in studios if studio.lens.manifest.name == name), studios[0])


def _whole(value: Any, name: str) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LensError(f"{name} must be a whole number; it is '{value}'.") from None
    if not abs(number) < 2**63 or number != int(number):
        raise LensError(f"{name} must be a whole number; it is {value}.")
    return int(number)


Drawn = Callable[[str, Asked], Iterator[Shown]]


def title(side: Side, several: bool) -> str:
    """What a side draws: prompt, steer, and the lens where there are several."""
    view = side.view
    prompt = "without a prompt" if view.prompt is None else f"“{state.shown_prompt(view.prompt)}”"
    steer = f"pushed towards {view.target}, β = {view.beta:g}" if side.edits else "as the model draws it"
    return ", ".join([*([side.studio.lens.manifest.name] if several else []), prompt, steer])


def table_rows(two: Two) -> list[dict[str, Any]]:
    """Classes of what is steered, and of whatever else differs for sure between the rows, as texts."""
    steered = {side.view.attribute for side in two.sides}
    rows = []
    for read in two.reads:
        for k, label in enumerate(read.attribute.classes):
            change = read.changes[k] if read.changes else None
            sure = change is not None and not change.interval[0] <= 0 <= change.interval[1]
            if read.attribute.name not in steered and not sure:
                continue
            rows.append({
                "attribute": read.attribute.name, "label": label, "sure": sure,
                **{name: _count(row, read, label) for name, row in zip("ab", two.rows, strict=True)},
                "difference": "–" if change is None else (
                    f"{points(change.difference)} ({points(change.interval[0])} to {points(change.interval[1])})"
                ),
            })  # fmt: skip
    return rows


def _count(row: Row, read: Read, label: str) -> str:
    k, n = counted(row, read.attribute.name, label)
    return f"{k} of {n}"


def headline(two: Two) -> str:
    """How many pairs read differently, attribute by attribute, largest first."""
    if not two.paired:
        return "Two models, side by side."
    differing = sorted(((int(r.differ.sum()), r.attribute.name) for r in two.reads if r.differ.any()), reverse=True)
    if not differing:
        return "The classifier reads both rows alike, image by image."
    n = len(two.reads[0].differ)
    return f"Read differently, of {n} pairs: {', '.join(f'{name} in {k}' for k, name in differing)}."


def rows_html(sides: tuple[Side, Side], two: Two | None, first: Row | None, several: bool) -> str:
    """Both rows; empty places for what is not drawn yet. ``several``: the app has more lenses than one."""
    rows = two.rows if two is not None else (first, None)
    made = []
    for number, (name, side, row) in enumerate(zip(NAMES, sides, rows, strict=True)):
        told = title(side, several)
        if row is None:
            made.append(html("compare_two.waiting", name, told, side.view.n_seeds))
            continue
        read = row.readings[side.view.attribute]
        names = [
            read.attribute.classes[k] if sure else "uncertain"
            for k, sure in zip(read.labels, read.certain, strict=True)
        ]
        own = None if two is None else next((r for r in two.reads if r.attribute.name == side.view.attribute), None)
        differ = [False] * len(names) if own is None else own.differ.tolist()
        seeds = list(side.view.seeds)
        made.append(html("compare_two.row", name, told, seeds, row, names, differ, NAMES[1 - number]))
    return "".join(made)


def draw(studios: Sequence[Studio], visitor: str, asked: Asked) -> Iterator[Shown]:
    """Draw both sides, one row as soon as it is there; then what differs."""
    several = len(studios) > 1
    try:
        sides = read_sides(studios, asked)
        yield Shown(html("parts.status", DRAWING), rows_html(sides, None, None, several), "")
        for made in compare_two(*sides, visitor):
            if isinstance(made, Row):
                yield Shown(html("parts.status", DRAWING), rows_html(sides, None, made, several))
                continue
            note = (PAIRED if made.paired else UNPAIRED).format(n=made.sides[0].view.n_seeds)
            yield Shown(
                html("parts.status", DRAWN),
                rows_html(made.sides, made, None, several),
                html("compare_two.table", table_rows(made), headline(made), note),
            )
    except Exception as error:
        yield Shown(explain(error))


def change_lens(studios: Sequence[Studio], own: SideControls, values: Values) -> Updates:
    """Another lens on one side: its prompts, attributes and slider."""
    lens = _studio(studios, values[own.lens]).lens
    view = state.default_view(lens)
    suggested = [state.shown_prompt(p) for p in lens.prompts if p is not None]
    return {
        own.prompt: gr.update(choices=suggested, value=suggested[0] if suggested else None, visible=bool(suggested)),
        own.attribute: gr.update(choices=list(state.steerable(lens)), value=view.attribute),
        **change_attribute(studios, own, {**values, own.attribute: view.attribute}),
    }


def change_attribute(studios: Sequence[Studio], own: SideControls, values: Mapping[Component, Any]) -> Updates:
    """Another attribute on one side: its classes, unchanged."""
    lens = _studio(studios, values[own.lens]).lens
    attribute = str(values[own.attribute])
    if attribute not in state.steerable(lens):
        return {}
    view, ends = state.default_view(lens, attribute), state.scale(lens.setting(attribute))
    return {
        own.target: gr.update(choices=list(lens.attribute_named(attribute).classes), value=view.target),
        own.beta: gr.update(minimum=ends.low, maximum=ends.high, step=ends.step, value=ends.identity),
    }


def layout(studios: Sequence[Studio], here: int, drawn: Drawn) -> TwoTab:
    """Build the tab inside an open ``gr.Blocks``; ``here``: the lens of this page, which both sides begin with.

    ``drawn``: ``draw`` of these studios, lent once, when the app is built.
    """
    gr.HTML(html("parts.intro", INTRO))
    with gr.Row(equal_height=True, elem_id="dl-two-controls"):
        sides = tuple(
            _controls(studios, here, name, view) for name, view in zip(NAMES, first_sides(studios[here]), strict=True)
        )
    with gr.Row(elem_classes="dl-go"):
        n_seeds = gr.Radio(
            list(state.SEED_COUNTS), value=state.SEED_COUNTS[0], label="Images a row", interactive=True, scale=2
        )
        first_seed = gr.Number(0, label="First seed", precision=None, interactive=True, scale=1, min_width=120)
        go = gr.Button("Draw both", variant="primary", elem_id="dl-two-go")
    status = gr.HTML(html("parts.status", "Nothing is drawn yet."), elem_id="dl-two-status")
    rows = gr.HTML("", elem_id="dl-two-rows")
    table = gr.HTML("", elem_id="dl-two-table")
    tab = TwoTab(studios, (sides[0], sides[1]), n_seeds, first_seed, status, rows, table)
    for own in sides:
        outputs = {own.target, own.beta}
        own.attribute.input(partial(change_attribute, studios, own), {own.lens, own.attribute}, outputs, **AT_ONCE)
        own.lens.input(
            partial(change_lens, studios, own), {own.lens, own.attribute}, {own.prompt, own.attribute, *outputs},
            **AT_ONCE,
        )  # fmt: skip

    def press(values: Values, request: gr.Request) -> Iterator[Updates]:
        for news in drawn(visitor_of(request), asked_of(tab, values)):
            named = {status: news.status, rows: news.rows, table: news.table}
            yield {part: text for part, text in named.items() if text is not None}

    shown: Any = {status, rows, table}
    go.click(press, tab.inputs, shown, **LONG)
    return tab


def build(studios: Sequence[Studio], here: int, drawn: Drawn) -> None:
    """The same, for a tab that is built when it is looked at."""
    layout(studios, here, drawn)


def _halfway(ends: state.Scale) -> float:
    """A strength on the slider's steps between the one that changes nothing and the upper end."""
    return round(ends.identity + round((ends.high - ends.identity) / 2 / ends.step) * ends.step, 6)


def first_sides(studio: Studio) -> tuple[View, View]:
    """What the tab begins with: two prompts as the model draws them; without prompts, unchanged and pushed."""
    lens = studio.lens
    first = opening_view(studio)
    ends = state.scale(lens.setting(first.attribute))
    first = replace(first, beta=ends.identity)
    swept = dict.fromkeys(sweep.request.prompt for sweep in lens.sweeps)
    others = [prompt for prompt in (*swept, *lens.prompts) if prompt and prompt != first.prompt]
    return first, replace(first, prompt=others[0]) if others else replace(first, beta=_halfway(ends))


def _controls(studios: Sequence[Studio], here: int, name: str, view: View) -> SideControls:
    """One side's controls, set to a view."""
    lens = studios[here].lens
    ends = state.scale(lens.setting(view.attribute))
    suggested = [state.shown_prompt(p) for p in lens.prompts if p is not None]
    shown = None if view.prompt is None else state.shown_prompt(view.prompt)
    names = [studio.lens.manifest.name for studio in studios]
    with gr.Column(min_width=300, elem_classes="dl-two-side"):
        model = gr.Dropdown(
            names, value=names[here], label=f"{name}: lens", visible=len(names) > 1, interactive=True,
            elem_id=f"dl-two-lens-{name}",
        )  # fmt: skip
        prompt = gr.Dropdown(
            suggested, value=shown, label=f"{name}: prompt", allow_custom_value=True, visible=bool(suggested),
            interactive=True, elem_id=f"dl-two-prompt-{name}",
        )  # fmt: skip
        with gr.Row():
            attribute = gr.Radio(
                list(state.steerable(lens)), value=view.attribute, label="Attribute (perceived)", interactive=True
            )
            target = gr.Radio(
                list(lens.attribute_named(view.attribute).classes), value=view.target, label="Push towards",
                interactive=True,
            )  # fmt: skip
        beta = gr.Slider(
            ends.low, ends.high, view.beta, step=ends.step, label=f"{name}: steering strength (β)", buttons=[],
            info=f"{ends.identity:g} = unchanged", interactive=True, elem_id=f"dl-two-beta-{name}",
        )  # fmt: skip
    return SideControls(model, prompt, attribute, target, beta)
