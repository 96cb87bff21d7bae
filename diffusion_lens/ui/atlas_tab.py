"""The Atlas tab: a map of all features, a table in step with it, and the card of the one chosen."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from diffusion_lens.plots import (
    atlas_figure,
    atlas_groups_figure,
    describe_atlas,
    describe_groups,
    describe_step_profile,
    step_profile_figure,
)
from diffusion_lens.results.dissection import (
    Dissection,
    FeatureEffect,
    evidence,
    groups,
    moved_beside,
    name_of,
    summary,
)
from diffusion_lens.studio import state
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import cards, texts
from diffusion_lens.ui.figure import clicked, figure, figure_value

HEADERS = ["feature", "label", "score", "fires on"]
ROWS = 200
DENSITY = "how often it fires"
CONTROLS = "what turning it alone changes"
EVERY = ""
"""The filter that lets every feature through; any other is an attribute's name, or ``NOTHING``."""

NOTHING = "(nothing sure)"
COMMAND = "python -m diffusion_lens dissect --store"


def colourings(studio: Studio) -> list[str]:
    """What the map can be coloured by: every class's attribution, density, and measured effects where there are."""
    lens = studio.lens
    known = [f"{a.name}: {c}" for a in lens.attributes if a.name in lens.attributions for c in a.classes]
    return [*known, DENSITY, *([CONTROLS] if lens.dissection is not None else [])]


def filters(studio: Studio) -> list[tuple[str, str]]:
    """(text, value) of what can be shown: all features, those that control one thing, those that control nothing."""
    found = studio.lens.dissection
    if found is None:
        return [("all features", EVERY)]
    controlled = [(_filter_name(found, name), name) for name in found.classes]
    idle = len(members(studio, NOTHING) or ())
    return [("all features", EVERY), *controlled, (f"tested, nothing sure ({idle})", NOTHING)]


def members(studio: Studio, show: str) -> list[int] | None:
    """The features that a filter lets through, largest effect first; ``None``: all of them."""
    found = studio.lens.dissection
    if found is None or show == EVERY:
        return None
    if show == NOTHING:
        sure = {e.feature for own in groups(found).values() for e in own}
        return [i for i in found.ids(tested=True) if i not in sure]
    return [effect.feature for effect in _shown(found, show)]


def _shown(found: Dissection, show: str) -> tuple[FeatureEffect, ...]:
    """The effects behind a filter by attribute: of the features that control it, else of those that move it at all."""
    if show not in found.classes:
        return ()
    return groups(found)[show] or moved_beside(found, show)


def _filter_name(found: Dissection, name: str) -> str:
    own, beside = groups(found)[name], moved_beside(found, name)
    return f"moves {name} beside others ({len(beside)})" if beside and not own else f"controls {name} ({len(own)})"


def said(studio: Studio, show: str) -> str:
    """What the evidence is behind a filter, or how to get some."""
    found = studio.lens.dissection
    if found is None:
        return (
            '<p class="dl-says">What each feature controls (glasses, hair, beard, …) was not measured on this lens. '
            f"This measures it: <code>{COMMAND}</code></p>"
        )
    if show in found.classes:
        told = evidence(found, show)
    elif show == NOTHING:
        told = (
            f"These {len(members(studio, show) or ())} features were turned alone on {found.n} images, and nothing "
            "that the classifier reads moved for sure. They may act together, or on what nobody reads."
        )
    else:
        told = summary(found)
    return f'<p class="dl-says" role="status">{escape(told)}</p>'


def scores(studio: Studio, colour: str) -> tuple[np.ndarray, str]:
    """The numbers behind a colouring ``[d_sae]``, and their name."""
    lens = studio.lens
    name, _, label = colour.partition(": ")
    if colour == CONTROLS and lens.dissection is not None:
        return _moved(lens.dissection, len(lens.atlas.density)), "points moved for sure"
    if colour == DENSITY or name not in lens.attributions:
        return np.asarray(lens.atlas.density, dtype=np.float64), "density"
    return lens.attributions[name].total(label), f"attribution to {label}"


def _moved(found: Dissection, d_sae: int) -> np.ndarray:
    values = np.zeros(d_sae)
    for own in groups(found).values():
        for effect in own:
            values[effect.feature] = 100 * abs(effect.difference)
    return values


def table(studio: Studio, colour: str, show: str = EVERY) -> list[list[Any]]:
    """The strongest features in the chosen colouring, strongest first, among those that the filter lets through."""
    atlas, only, found = studio.lens.atlas, members(studio, show), studio.lens.dissection
    if colour == CONTROLS and found is not None and (own := _shown(found, show)):
        return [
            [
                e.feature,
                name_of(e),
                float(f"{100 * abs(e.difference):.3g}"),
                f"{100 * float(atlas.density[e.feature]):.1f} %",
            ]
            for e in own[:ROWS]
        ]
    values, _ = scores(studio, colour)
    order = np.argsort(-values, kind="stable")
    if only is not None:
        order = order[np.isin(order, only)]
    return [
        [int(i), atlas.labels[i] or "–", float(f"{values[i]:.3g}"), f"{100 * float(atlas.density[i]):.1f} %"]
        for i in order[:ROWS]
    ]


def drawn(studio: Studio, colour: str, feature: int | None, show: str = EVERY) -> dict[str, str]:
    """The map, with a ring around the chosen feature."""
    chosen = [] if feature is None else [feature]
    atlas, found = studio.lens.atlas, studio.lens.dissection
    if colour == CONTROLS and found is not None:
        own = {name: [e.feature for e in effects] for name, effects in groups(found).items()}
        if show == NOTHING:
            own = {"nothing sure": members(studio, show) or []}
        elif show != EVERY:
            own = {show: members(studio, show) or []}
        made = atlas_groups_figure(atlas, own, chosen=chosen)
        return figure_value(made, describe_groups(atlas, own, chosen=chosen))
    values, name = scores(studio, colour)
    made = atlas_figure(atlas, scores=values, score_name=name, chosen=chosen, only=members(studio, show))
    title = {"text": name, "side": "top"}
    bar = {"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0.5, "len": 0.9, "title": title}
    made.update_traces(marker_colorbar=bar, selector={"name": "features"})  # fits any width
    return figure_value(
        made,
        describe_atlas(atlas, scores=values, score_name=name, chosen=chosen),
    )


def valid(studio: Studio, feature: Any) -> int | None:
    """A feature's number, or ``None``: what comes from a page is not to be trusted."""
    if isinstance(feature, bool) or not isinstance(feature, int | float):
        return None
    if not np.isfinite(feature) or feature != int(feature):
        return None
    return int(feature) if 0 <= feature < studio.lens.atlas.density.size else None


def chosen(studio: Studio, colour: str, feature: Any, show: str = EVERY) -> tuple[Any, ...]:
    """Card, step profile, map, number, state, button: for the feature now chosen."""
    number = valid(studio, feature)
    if number is None:
        last = studio.lens.atlas.density.size - 1
        refusal = texts.status(f"There is no feature “{feature}”; choose one from 0 to {last}.", bad=True)
        return refusal, gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
    card = studio.lens.card(number)
    profile = figure_value(
        step_profile_figure(card.step_profile, card.steps, feature=number),
        describe_step_profile(card.step_profile, card.steps, feature=number),
    )
    button = gr.update(value=f"Turn feature #{number} in Explore", interactive=True)
    return cards.large_card(studio.lens, number), profile, drawn(studio, colour, number, show), number, number, button


def recolour(studio: Studio, colour: str, feature: int | None, show: str = EVERY) -> tuple[Any, ...]:
    """Map and table in another colouring."""
    return drawn(studio, colour, feature, show), table(studio, colour, show)


def refilter(studio: Studio, show: str, colour: str, feature: int | None) -> tuple[Any, ...]:
    """Colouring, map, table and evidence of another filter; what is controlled is told by colour at once."""
    if members(studio, show) is not None:
        colour = CONTROLS
    return colour, *recolour(studio, colour, feature, show), said(studio, show)


def from_map(studio: Studio, colour: str, show: str, event: gr.EventData) -> tuple[Any, ...]:
    """A click on the map."""
    return chosen(studio, colour, clicked(event), show)


def from_table(studio: Studio, colour: str, show: str, event: gr.SelectData) -> tuple[Any, ...]:
    """A row of the table."""
    row = event.row_value
    return chosen(studio, colour, row[0] if row else None, show)


def opened(studio: Studio, colour: str, feature: int | None) -> tuple[Any, ...]:
    """When the tab is first looked at: table, what ``chosen`` gives for the strongest feature, colours, filters."""
    if feature is not None:
        return (gr.skip(),) * 10
    rows = table(studio, colour)
    measured = studio.lens.dissection is not None
    return (
        rows, *chosen(studio, colour, rows[0][0]), gr.update(choices=colourings(studio)),
        gr.update(choices=filters(studio), interactive=measured), said(studio, EVERY),
    )  # fmt: skip


def layout(studio: Studio, tab: gr.Tab) -> tuple[gr.State, gr.Button]:
    """Build the tab inside an open ``gr.Blocks``; returns the chosen feature and the button that takes it to Explore.

    Its figures and its table are filled when it is first looked at: the first page need not wait for them.
    """
    view = state.default_view(studio.lens)
    gr.HTML(f'<p class="dl-intro">{texts.ATLAS_INTRO}</p>')
    with gr.Row():
        colour = gr.Dropdown(
            [f"{view.attribute}: {view.target}"], value=f"{view.attribute}: {view.target}", label="Colour by",
            min_width=200, elem_id="dl-atlas-colour",
        )  # fmt: skip
        show = gr.Dropdown(
            [("all features", EVERY)], value=EVERY, label="Show", min_width=200, elem_id="dl-atlas-show",
            interactive=False,
        )  # fmt: skip
        number = gr.Number(label="Feature number", minimum=None, precision=None, min_width=140,
                           elem_id="dl-feature-number")  # fmt: skip
        turn = gr.Button("Turn this feature in Explore", variant="primary", elem_id="dl-turn-feature", min_width=200,
                         interactive=False)  # fmt: skip
    evidence_line = gr.HTML("", elem_id="dl-atlas-evidence")
    with gr.Row(elem_id="dl-atlas"):
        with gr.Column(scale=5, min_width=320):
            plot = figure(elem_id="dl-atlas-map", min_height=460)
            rows = gr.Dataframe(
                headers=HEADERS, datatype=["number", "str", "number", "str"],
                interactive=False, max_height=320, show_search="search", label="Features, strongest first",
                type="array", elem_id="dl-atlas-table", buttons=[],
            )  # fmt: skip
        with gr.Column(scale=4, min_width=320):
            card = gr.HTML("", elem_id="dl-atlas-card")
            profile = figure(elem_id="dl-profile", min_height=240)
    feature = gr.State(None)
    outputs: list[Any] = [card, profile, plot, number, feature, turn]
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read",
                             "concurrency_limit": 8}  # fmt: skip

    def click(colour: str, show: str, event: gr.EventData) -> tuple[Any, ...]:
        return from_map(studio, colour, show, event)

    def select(colour: str, show: str, event: gr.SelectData) -> tuple[Any, ...]:
        return from_table(studio, colour, show, event)

    tab.select(partial(opened, studio), [colour, feature], [rows, *outputs, colour, show, evidence_line], **quick)
    plot.point(click, [colour, show], outputs, **quick)
    rows.select(select, [colour, show], outputs, **quick)
    gr.on([number.submit, number.blur], partial(chosen, studio), [colour, number, show], outputs, **quick)
    colour.input(partial(recolour, studio), [colour, feature, show], [plot, rows], **quick)
    show.input(partial(refilter, studio), [show, colour, feature], [colour, plot, rows, evidence_line], **quick)
    return feature, turn
