"""The Atlas tab: a map of all features, a table in step with it, and the card of the one chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
import numpy as np

from diffusion_lens.plots import atlas_figure, describe_atlas, describe_step_profile, step_profile_figure
from diffusion_lens.ui import cards, state, texts
from diffusion_lens.ui.figure import clicked, figure, figure_value
from diffusion_lens.ui.studio import Studio

HEADERS = ["feature", "label", "attribution", "fires on"]
ROWS = 200
DENSITY = "how often it fires"


def colourings(studio: Studio) -> list[str]:
    """What the map can be coloured by: every class's attribution, and density."""
    lens = studio.lens
    return [f"{a.name}: {c}" for a in lens.attributes if a.name in lens.attributions for c in a.classes] + [DENSITY]


def scores(studio: Studio, colour: str) -> tuple[np.ndarray, str]:
    """The numbers behind a colouring ``[d_sae]``, and their name."""
    lens = studio.lens
    name, _, label = colour.partition(": ")
    if colour == DENSITY or name not in lens.attributions:
        return np.asarray(lens.atlas.density, dtype=np.float64), "density"
    return lens.attributions[name].total(label), f"attribution to {label}"


def table(studio: Studio, colour: str) -> list[list[Any]]:
    """The strongest features in the chosen colouring, strongest first."""
    values, _ = scores(studio, colour)
    atlas = studio.lens.atlas
    order = np.argsort(-values, kind="stable")[:ROWS]
    return [
        [int(i), atlas.labels[i] or "–", float(f"{values[i]:.3g}"), f"{100 * float(atlas.density[i]):.1f} %"]
        for i in order
    ]


def drawn(studio: Studio, colour: str, feature: int | None) -> dict[str, str]:
    """The map, with a ring around the chosen feature."""
    values, name = scores(studio, colour)
    chosen = [] if feature is None else [feature]
    atlas = studio.lens.atlas
    made = atlas_figure(atlas, scores=values, score_name=name, chosen=chosen)
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


def chosen(studio: Studio, colour: str, feature: Any) -> tuple[Any, ...]:
    """Card, step profile, map, number, state, button: for the feature now chosen."""
    number = valid(studio, feature)
    if number is None:
        last = studio.lens.atlas.density.size - 1
        said = texts.status(f"There is no feature “{feature}”; choose one from 0 to {last}.", bad=True)
        return said, gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
    card = studio.lens.card(number)
    profile = figure_value(
        step_profile_figure(card.step_profile, card.steps, feature=number),
        describe_step_profile(card.step_profile, card.steps, feature=number),
    )
    button = gr.update(value=f"Turn feature #{number} in Explore", interactive=True)
    return cards.large_card(studio.lens, number), profile, drawn(studio, colour, number), number, number, button


def recolour(studio: Studio, colour: str, feature: int | None) -> tuple[Any, ...]:
    """Map and table in another colouring."""
    return drawn(studio, colour, feature), table(studio, colour)


def from_map(studio: Studio, colour: str, event: gr.EventData) -> tuple[Any, ...]:
    """A click on the map."""
    return chosen(studio, colour, clicked(event))


def from_table(studio: Studio, colour: str, event: gr.SelectData) -> tuple[Any, ...]:
    """A row of the table."""
    row = event.row_value
    return chosen(studio, colour, row[0] if row else None)


def layout(studio: Studio) -> tuple[gr.State, gr.Button]:
    """Build the tab; returns the chosen feature and the button that takes it to Explore."""
    view = state.default_view(studio.lens)
    colour_now = f"{view.attribute}: {view.target}"
    first = table(studio, colour_now)[0][0]
    opened = chosen(studio, colour_now, first)
    gr.HTML(f'<p class="dl-intro">{texts.ATLAS_INTRO}</p>')
    with gr.Row():
        colour = gr.Dropdown(colourings(studio), value=colour_now, label="Colour by", min_width=200)
        number = gr.Number(first, label="Feature number", minimum=None, precision=None, min_width=140,
                           elem_id="dl-feature-number")  # fmt: skip
        turn = gr.Button(f"Turn feature #{first} in Explore", variant="primary", elem_id="dl-turn-feature",
                         min_width=200)  # fmt: skip
    with gr.Row(elem_id="dl-atlas"):
        with gr.Column(scale=5, min_width=320):
            plot = figure(opened[2], elem_id="dl-atlas-map", min_height=460)
            rows = gr.Dataframe(
                table(studio, colour_now), headers=HEADERS, datatype=["number", "str", "number", "str"],
                interactive=False, max_height=320, show_search="search", label="Features, strongest first",
                type="array", elem_id="dl-atlas-table", buttons=[],
            )  # fmt: skip
        with gr.Column(scale=4, min_width=320):
            card = gr.HTML(opened[0], elem_id="dl-atlas-card")
            profile = figure(opened[1], elem_id="dl-profile", min_height=240)
    feature = gr.State(first)
    outputs: list[Any] = [card, profile, plot, number, feature, turn]
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read",
                             "concurrency_limit": 8}  # fmt: skip

    def click(colour: str, event: gr.EventData) -> tuple[Any, ...]:
        return from_map(studio, colour, event)

    def select(colour: str, event: gr.SelectData) -> tuple[Any, ...]:
        return from_table(studio, colour, event)

    plot.point(click, colour, outputs, **quick)
    rows.select(select, colour, outputs, **quick)
    gr.on([number.submit, number.blur], partial(chosen, studio), [colour, number], outputs, **quick)
    colour.input(partial(recolour, studio), [colour, feature], [plot, rows], **quick)
    return feature, turn
