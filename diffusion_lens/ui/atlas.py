"""The Atlas tab: a map of all features, a table in step with it, and the card of the one chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.plots import (
    atlas_figure,
    atlas_groups_figure,
    describe_atlas,
    describe_groups,
    describe_step_profile,
    step_profile_figure,
)
from diffusion_lens.studio import atlas, cards, state
from diffusion_lens.studio.atlas import CONTROLS, EVERY
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import texts
from diffusion_lens.ui.explore import Explore
from diffusion_lens.ui.figure import clicked, figure, figure_value
from diffusion_lens.ui.html import html
from diffusion_lens.ui.panel import AT_ONCE, KEEP, READ, Component, Panel, Updates, Values

HEADERS = ["feature", "label", "score", "fires on"]
COMMAND = "python -m diffusion_lens dissect --store"


@dataclass(frozen=True)
class AtlasQuestion:
    """How the map is coloured, which features are shown, and which one is chosen."""

    colour: str
    show: str
    feature: int | None


@dataclass(frozen=True)
class MapView:
    """Map and table of one colouring and filter; ``evidence``: what is known of the filter's features."""

    plot: dict[str, str]
    rows: list[list[Any]]
    colour: str = KEEP
    evidence: str = KEEP


@dataclass(frozen=True)
class FeatureView:
    """The feature now chosen, everywhere it shows: its card, how it fires along the steps, a ring on the map."""

    card: str
    profile: dict[str, str] = KEEP
    plot: dict[str, str] = KEEP
    number: int = KEEP
    feature: int = KEEP
    steer: dict[str, Any] = KEEP


def map_view(lens: DiffusionLens, question: AtlasQuestion) -> MapView:
    """Map and table in a colouring."""
    rows = [
        [row.feature, row.name, row.score, f"{100 * row.density:.1f} %"]
        for row in atlas.table(lens, question.colour, question.show)
    ]
    return MapView(draw_map(lens, question), rows)


def filtered_view(lens: DiffusionLens, question: AtlasQuestion) -> MapView:
    """Map, table and evidence of a filter; what is controlled is told by colour at once."""
    colour = question.colour if atlas.members(lens, question.show) is None else CONTROLS
    view = map_view(lens, AtlasQuestion(colour, question.show, question.feature))
    return MapView(view.plot, view.rows, colour, evidence_html(lens, question.show))


def evidence_html(lens: DiffusionLens, show: str) -> str:
    """What the evidence is behind a filter, or how to get some."""
    said = atlas.evidence_for(lens, show)
    return html("atlas.not_measured", COMMAND) if said is None else html("atlas.evidence", said)


def draw_map(lens: DiffusionLens, question: AtlasQuestion) -> dict[str, str]:
    """The map, with a ring around the chosen feature."""
    chosen = [] if question.feature is None else [question.feature]
    if question.colour == CONTROLS and (groups := atlas.groups_shown(lens, question.show)) is not None:
        made = atlas_groups_figure(lens.atlas, groups, chosen=chosen)
        return figure_value(made, describe_groups(lens.atlas, groups, chosen=chosen))
    values, name = atlas.scores(lens, question.colour)
    only = atlas.members(lens, question.show)
    made = atlas_figure(lens.atlas, scores=values, score_name=name, chosen=chosen, only=only)
    title = {"text": name, "side": "top"}
    bar = {"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0.5, "len": 0.9, "title": title}
    made.update_traces(marker_colorbar=bar, selector={"name": "features"})  # fits any width
    return figure_value(made, describe_atlas(lens.atlas, scores=values, score_name=name, chosen=chosen))


def feature_view(lens: DiffusionLens, asked: Any, question: AtlasQuestion) -> FeatureView:
    """The feature that a visitor asks for, on the map of ``question``; a refusal where there is none such."""
    number = atlas.valid_feature(lens, asked)
    if number is None:
        last = lens.atlas.density.size - 1
        said = f"There is no feature “{asked}”; choose one from 0 to {last}."
        return FeatureView(html("parts.status", said, bad=True))
    card = lens.card(number)
    profile = figure_value(
        step_profile_figure(card.step_profile, card.steps, feature=number),
        describe_step_profile(card.step_profile, card.steps, feature=number),
    )
    return FeatureView(
        card=html("cards.large", card, cards.effects(lens, card)),
        profile=profile,
        plot=draw_map(lens, AtlasQuestion(question.colour, question.show, number)),
        number=number,
        feature=number,
        steer=gr.update(value=steer_label(number), interactive=True),
    )


def steer_label(feature: int) -> str:
    """What the button that takes a feature to Explore says."""
    return f"Turn feature #{feature} in Explore"


@dataclass(frozen=True, eq=False)
class AtlasTab(Panel):
    """The tab's components: an ``AtlasQuestion``, and what its views show."""

    lens: DiffusionLens
    explore: Explore
    tabs: Component
    colour: Component
    show_only: Component
    number: Component
    steer: Component
    evidence: Component
    plot: Component
    rows: Component
    card: Component
    profile: Component
    feature: Component

    def question(self, values: Values) -> AtlasQuestion:
        """How the map stands."""
        return AtlasQuestion(values[self.colour], values[self.show_only], values[self.feature])

    def choose(self, values: Values, feature: Any) -> Updates:
        """Show a feature, wherever it was chosen."""
        return self.show(feature_view(self.lens, feature, self.question(values)))

    def choose_on_map(self, values: Values, event: gr.EventData) -> Updates:
        """A click on the map."""
        return self.choose(values, clicked(event))

    def choose_in_table(self, values: Values, event: gr.SelectData) -> Updates:
        """A row of the table."""
        return self.choose(values, event.row_value[0] if event.row_value else None)

    def choose_number(self, values: Values) -> Updates:
        """A number typed in."""
        return self.choose(values, values[self.number])

    def recolour(self, values: Values) -> Updates:
        """Map and table in another colouring."""
        return self.show(map_view(self.lens, self.question(values)))

    def refilter(self, values: Values) -> Updates:
        """Other features shown."""
        return self.show(filtered_view(self.lens, self.question(values)))

    def steer_in_explore(self, values: Values) -> Updates:
        """To Explore, with the chosen feature steered alone."""
        return {self.tabs: gr.Tabs(selected="explore"), **self.explore.steer_feature(values, values[self.feature])}

    def connect(self) -> None:
        """Bind the events."""
        asked, chosen, shown = {self.colour, self.show_only, self.feature}, self.parts(FeatureView), self.parts(MapView)
        self.plot.point(self.choose_on_map, asked, chosen, **READ)
        self.rows.select(self.choose_in_table, asked, chosen, **READ)
        gr.on([self.number.submit, self.number.blur], self.choose_number, asked | {self.number}, chosen, **READ)
        self.colour.input(self.recolour, asked, shown, **READ)
        self.show_only.input(self.refilter, asked, shown, **READ)
        self.steer.click(
            self.steer_in_explore, self.explore.inputs | {self.feature}, self.explore.changed_parts | {self.tabs},
            **AT_ONCE,
        )  # fmt: skip


def build(studio: Studio, tabs: gr.Tabs, explore: Explore) -> None:
    """Build the tab inside an open ``gr.Blocks``, with the strongest feature of the first colouring chosen."""
    gr.HTML(html("parts.intro", texts.ATLAS_INTRO))
    _components(studio.lens, tabs, explore).connect()


def _components(lens: DiffusionLens, tabs: gr.Tabs, explore: Explore) -> AtlasTab:
    view = state.default_view(lens)
    first = AtlasQuestion(f"{view.attribute}: {view.target}", EVERY, None)
    rows_now = map_view(lens, first).rows
    chosen = feature_view(lens, rows_now[0][0], first)
    with gr.Row():
        colour = gr.Dropdown(
            atlas.colourings(lens), value=first.colour, label="Colour by", min_width=200, elem_id="dl-atlas-colour",
            interactive=True,
        )  # fmt: skip
        show_only = gr.Dropdown(
            [(text, value) for text, value in atlas.filters(lens)], value=first.show, label="Show", min_width=200,
            elem_id="dl-atlas-show", interactive=lens.dissection is not None,
        )  # fmt: skip
        number = gr.Number(
            chosen.number, label="Feature number", minimum=None, precision=None, min_width=140,
            elem_id="dl-feature-number", interactive=True,
        )  # fmt: skip
        steer = gr.Button(
            steer_label(chosen.number), variant="primary", elem_id="dl-turn-feature", min_width=200, interactive=True
        )
    evidence = gr.HTML(evidence_html(lens, first.show), elem_id="dl-atlas-evidence")
    with gr.Row(elem_id="dl-atlas"):
        with gr.Column(scale=5, min_width=320):
            plot = figure(chosen.plot, elem_id="dl-atlas-map", min_height=460)
            rows = gr.Dataframe(
                rows_now, headers=HEADERS, datatype=["number", "str", "number", "str"],
                interactive=False, max_height=320, show_search="search", label="Features, strongest first",
                type="array", elem_id="dl-atlas-table", buttons=[],
            )  # fmt: skip
        with gr.Column(scale=4, min_width=320):
            card = gr.HTML(chosen.card, elem_id="dl-atlas-card")
            profile = figure(chosen.profile, elem_id="dl-profile", min_height=240)
    return AtlasTab(
        lens=lens, explore=explore, tabs=tabs, colour=colour, show_only=show_only, number=number, steer=steer,
        evidence=evidence, plot=plot, rows=rows, card=card, profile=profile, feature=gr.State(chosen.feature),
    )  # fmt: skip
