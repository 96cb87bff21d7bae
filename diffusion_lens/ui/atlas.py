"""The Atlas tab: search and list on the left, a map of all features, the card of the one chosen on the right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
import numpy as np

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.plots import describe_step_profile, step_profile_figure
from diffusion_lens.results.dissection import FeatureEffect
from diffusion_lens.studio import atlas, atlas_map, cards, state
from diffusion_lens.studio.atlas import Strip
from diffusion_lens.studio.atlas_map import LEVELS, AtlasMap
from diffusion_lens.studio.cards import TestedEffects
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import words
from diffusion_lens.ui.explore import Explore
from diffusion_lens.ui.figure import ASSETS, figure, figure_value
from diffusion_lens.ui.html import html
from diffusion_lens.ui.lazy import once_built
from diffusion_lens.ui.panel import AT_ONCE, KEEP, READ, Component, Panel, Updates, Values
from diffusion_lens.ui.visitor import visitor_of

MAX_TOGETHER = 64
"""Features that can be steered together from the map."""

DrawStrip = Callable[[str, int], Strip]
"""``draw_strip`` of one studio: (visitor, feature) → the same seeds at three strengths."""


@dataclass(frozen=True)
class AtlasQuestion:
    """What is searched for, how the map is coloured, and which feature is chosen."""

    search: str
    colour: str
    feature: int | None


@dataclass(frozen=True)
class Tested:
    """What the name of a confirmed feature rests on: paired images, and its smallest q."""

    n: int
    q: float


@dataclass(frozen=True)
class SearchView:
    """The hits of a search, lit up on the map."""

    hits: str
    plot: dict[str, Any]


@dataclass(frozen=True)
class FeatureView:
    """The feature now chosen, everywhere it shows."""

    head: str
    strip: str = KEEP
    card: str = KEEP
    profile: dict[str, str] = KEEP
    plot: dict[str, Any] = KEEP
    feature: int = KEEP
    steer: dict[str, Any] = KEEP
    own: int = KEEP


@dataclass(frozen=True)
class LassoView:
    """Features caught on the map, and the button that steers them together."""

    caught: tuple[int, ...]
    together: dict[str, Any]


def search_view(lens: DiffusionLens, question: AtlasQuestion) -> SearchView:
    """What a search finds, over all features; what stands in the list before one."""
    text = " ".join(str(question.search or "").split())[: atlas.MAX_SEARCH]
    found = atlas.search(lens, text, words.sought) if text else atlas.strongest(lens)
    chips = lens.dissection.classes if lens.dissection is not None else {a.name: a.classes for a in lens.attributes}
    shown = html("atlas.hits", found, text, len(found), atlas.evidence_for(lens, text), list(chips), named)
    return SearchView(shown, plot_value(lens, question))


def plot_value(lens: DiffusionLens, question: AtlasQuestion) -> dict[str, Any]:
    """How the map stands: hits lit, one feature ringed, colours as whole percents (none: by evidence)."""
    text = str(question.search or "").strip()
    values = atlas.scores(lens, str(question.colour))
    return {
        "hits": [hit.feature for hit in atlas.search(lens, text, words.sought)] if text else [],
        "chosen": question.feature,
        "scores": None if values is None else np.rint(100 * values).astype(int).tolist(),
        "alt": describe_map(lens, question),
    }


def describe_map(lens: DiffusionLens, question: AtlasQuestion) -> str:
    """The map in a sentence."""
    sure = sum(atlas_map.confidence_of(lens, i) == "confirmed" for i in range(len(lens.atlas.density)))
    chosen = "" if question.feature is None else f" Chosen: #{question.feature}."
    return (
        f"Map of {len(lens.atlas.density)} features in islands by the class they stand for; {sure} are confirmed by "
        f"steering them alone. The list beside it holds the same features.{chosen}"
    )


def feature_view(lens: DiffusionLens, asked: Any, question: AtlasQuestion) -> FeatureView:
    """The feature that a visitor asks for; a refusal where there is none such."""
    number = atlas.valid_feature(lens, asked)
    if number is None:
        last = lens.atlas.density.size - 1
        said = f"There is no feature “{asked}”; choose one from 0 to {last}."
        return FeatureView(html("parts.status", said, bad=True))
    card = lens.card(number)
    effects = cards.effects(lens, card)
    profile = figure_value(
        step_profile_figure(card.step_profile, card.steps, feature=number),
        describe_step_profile(card.step_profile, card.steps, feature=number),
    )
    return FeatureView(
        head=html("atlas.head", card, name_of(lens, number), atlas_map.confidence_of(lens, number), _tested(effects)),
        strip=html("atlas.waiting"),
        card=html("atlas.card", card, effects, atlas.told_effects(lens, number)),
        profile=profile,
        plot=plot_value(lens, AtlasQuestion(question.search, question.colour, number)),
        feature=number,
        steer=gr.update(value=f"Add #{number} to Explore", interactive=True),
        own=number,
    )


def name_of(lens: DiffusionLens, feature: int) -> str:
    """A feature's name in plain words: its largest significant effect, else its label."""
    return named(atlas.main_effect(lens, feature), lens.atlas.labels[feature])


def named(effect: FeatureEffect | None, label: str) -> str:
    """What a feature does, as it was measured, or its label."""
    if effect is None:
        return label or "no label"
    if effect.difference > 0:
        return words.effect_name(effect)
    down = "Turned down" if effect.beta < 0 else "Turned up"
    return f"{down}, less {effect.label} ({-100 * effect.difference:.0f} in 100)"


def _tested(effects: Any) -> Tested:
    sure = effects.sure if isinstance(effects, TestedEffects) else ()
    return Tested(getattr(effects, "n", 0), min((e.q_value for e in sure), default=1.0))


def draw_strip(studio: Studio, visitor: str, feature: int) -> Strip:
    """Draw a feature's strip. Takes and gives plain values alone, which a lent GPU's process can be sent."""
    return atlas.strip(studio, visitor, feature)


def points(drawn: AtlasMap, labels: list[str]) -> str:
    """The map's fixed part as JSON, made once a page."""
    return json.dumps({
        "width": round(drawn.width, 2), "height": round(drawn.height, 2), "levels": list(LEVELS),
        "xy": np.round(drawn.xy, 2).ravel().tolist(), "confidence": drawn.confidence.tolist(), "labels": labels,
        "regions": [[r.label, r.attribute, round(r.x, 2), round(r.y, 2), round(r.r, 2), r.n] for r in drawn.regions],
    }, ensure_ascii=False, separators=(",", ":"))  # fmt: skip


def peek(lens: DiffusionLens, feature: Any) -> str:
    """What a point shows under the pointer; nothing for what is no feature."""
    number = atlas.valid_feature(lens, feature)
    return "" if number is None else html("atlas.peek", lens.card(number), name_of(lens, number))


def sent(event: gr.EventData) -> dict[str, Any]:
    """What a component of this tab sent, unchecked."""
    data = getattr(event, "_data", None)
    return data if isinstance(data, dict) else {}


@dataclass(frozen=True, eq=False)
class AtlasTab(Panel):
    """The tab's components: an ``AtlasQuestion``, and what its views show."""

    studio: Studio
    draw: DrawStrip
    explore: Explore
    tabs: Component
    search: Component
    colour: Component
    hits: Component
    plot: Component
    head: Component
    strip: Component
    card: Component
    profile: Component
    steer: Component
    together: Component
    own: Component
    feature: Component
    caught: Component

    def question(self, values: Values) -> AtlasQuestion:
        """How the tab stands."""
        return AtlasQuestion(values[self.search], values[self.colour], values[self.feature])

    def find(self, values: Values) -> Updates:
        """Another search."""
        return self.show(search_view(self.studio.lens, self.question(values)))

    def find_chip(self, values: Values, event: gr.EventData) -> Updates:
        """An attribute tapped above the list."""
        text = str(sent(event).get("chip", ""))[: atlas.MAX_SEARCH]
        question = AtlasQuestion(text, values[self.colour], values[self.feature])
        return {self.search: text, **self.show(search_view(self.studio.lens, question))}

    def choose(self, values: Values, event: gr.EventData) -> Updates:
        """A feature tapped on the map or in the list, or named by the address."""
        return self.show(feature_view(self.studio.lens, sent(event).get("id"), self.question(values)))

    def recolour(self, values: Values) -> Updates:
        """The map in another colouring."""
        return {self.plot: plot_value(self.studio.lens, self.question(values))}

    def draw_strip(self, values: Values, request: gr.Request) -> Updates:
        """The same seeds at three strengths of the chosen feature."""
        feature = values[self.feature]
        if feature is None:
            return {self.strip: ""}
        try:
            shown = self.draw(visitor_of(request), int(feature))
        except Cancelled:
            return {self.strip: gr.skip()}
        except LensError as error:
            return {self.strip: html("parts.status", str(error), bad=True)}
        prompt = "without a prompt" if shown.prompt is None else f"“{state.shown_prompt(shown.prompt)}”"
        return {self.strip: html("atlas.strip", shown, prompt)}

    def catch(self, event: gr.EventData) -> Updates:
        """Features ringed on the map."""
        asked = sent(event).get("ids")
        lens = self.studio.lens
        known = [atlas.valid_feature(lens, i) for i in asked] if isinstance(asked, list) else []
        found = tuple(dict.fromkeys(i for i in known if i is not None and not lens.atlas.dead[i]))
        caught = found[:MAX_TOGETHER]
        many = f"{len(caught)} features" if len(found) == len(caught) else f"the first {len(caught)} of {len(found)}"
        label = f"Steer these together ({many})"
        return self.show(LassoView(caught, gr.update(value=label, visible=bool(caught), interactive=bool(caught))))

    def add_to_explore(self, values: Values) -> Updates:
        """To Explore, with the chosen feature steered."""
        return self._to_explore(values, (values[self.feature],))

    def steer_together(self, values: Values) -> Updates:
        """To Explore, with all that were caught."""
        return self._to_explore(values, tuple(values[self.caught]))

    def _to_explore(self, values: Values, features: tuple[int, ...]) -> Updates:
        return {self.tabs: gr.Tabs(selected="explore"), **self.explore.steer_features(values, features)}

    def connect(self) -> None:
        """Bind the events. The strip is drawn after the card stands; another choice ends its drawing."""
        asked = {self.search, self.colour, self.feature}
        found, chosen = self.parts(SearchView), self.parts(FeatureView)
        self.search.input(self.find, asked, found, trigger_mode="always_last", **READ)
        self.hits.chip(self.find_chip, asked, found | {self.search}, **READ)
        self.colour.input(self.recolour, asked, {self.plot}, **READ)
        for part in (self.plot, self.hits):
            part.pick(self.choose, asked, chosen, trigger_mode="always_last", **READ).then(
                self.draw_strip, {self.feature}, {self.strip}, trigger_mode="always_last", show_progress="hidden",
                api_visibility="private", concurrency_id="live", concurrency_limit=8,
            )  # fmt: skip
        self.plot.lasso(self.catch, None, self.parts(LassoView), **READ)
        away = self.explore.changed_parts | {self.tabs}
        self.steer.click(self.add_to_explore, self.explore.inputs | {self.feature}, away, **AT_ONCE)
        self.together.click(self.steer_together, self.explore.inputs | {self.caught}, away, **AT_ONCE)
        once_built(self.draw_strip, {self.feature}, {self.strip})


def build(studio: Studio, draw: DrawStrip, tabs: gr.Tabs, explore: Explore) -> None:
    """Build the tab inside an open ``gr.Blocks``, with the first feature of the list chosen."""
    components(studio, draw, tabs, explore).connect()


def components(studio: Studio, draw: DrawStrip, tabs: gr.Tabs, explore: Explore) -> AtlasTab:
    """The tab's components."""
    lens = studio.lens
    colours = atlas.colourings(lens)
    first = AtlasQuestion("", colours[0], atlas.strongest(lens)[0].feature)
    found, chosen = search_view(lens, first), feature_view(lens, first.feature, first)
    drawn = atlas_map.atlas_map(lens)
    names = [name_of(lens, i) for i in range(len(lens.atlas.labels))]
    storage = f"dl-labels-{lens.manifest.sae_id}"
    script = (ASSETS / "atlas.js").read_text(encoding="utf-8")
    with gr.Row(elem_id="dl-atlas"):
        with gr.Column(scale=0, min_width=300, elem_id="dl-atlas-left"):
            search = gr.Textbox(
                "", label="Find a feature", placeholder="glasses, long hair, 716 …", max_length=atlas.MAX_SEARCH,
                max_lines=1, elem_id="dl-atlas-search", interactive=True,
            )  # fmt: skip
            hits = gr.HTML(
                found.hits, elem_id="dl-atlas-hits", apply_default_css=False, js_on_load=_part(script, "hits")
            )
        with gr.Column(scale=5, min_width=320, elem_id="dl-atlas-middle"):
            plot = gr.HTML(
                chosen.plot, html_template='<div class="dl-map"></div>', js_on_load=_part(script, "map"),
                elem_id="dl-atlas-map", apply_default_css=False, points=points(drawn, names),
                server_functions=[_named(partial(peek, lens))], storage=storage,
            )  # fmt: skip
            colour = gr.Dropdown(
                colours, value=first.colour, label="Colour by", min_width=200, elem_id="dl-atlas-colour",
                interactive=True,
            )  # fmt: skip
            together = gr.Button("Steer these together", visible=False, elem_id="dl-together", interactive=True)
            gr.HTML(html("atlas.layout"))
        with gr.Column(scale=3, min_width=320, elem_id="dl-atlas-right"):
            head = gr.HTML(chosen.head, elem_id="dl-atlas-head")
            steer = gr.Button(
                f"Add #{first.feature} to Explore", variant="primary", elem_id="dl-turn-feature", interactive=True
            )
            strip = gr.HTML(chosen.strip, elem_id="dl-atlas-strip")
            card = gr.HTML(chosen.card, elem_id="dl-atlas-card")
            with gr.Accordion("When it fires", open=False):
                profile = figure(chosen.profile, elem_id="dl-profile", min_height=240)
            own = gr.HTML(
                first.feature, html_template='<div class="dl-own-label"></div>', js_on_load=_part(script, "own"),
                elem_id="dl-atlas-own", apply_default_css=False, storage=storage,
            )  # fmt: skip
    return AtlasTab(
        studio=studio, draw=draw, explore=explore, tabs=tabs, search=search, colour=colour, hits=hits, plot=plot,
        head=head, strip=strip, card=card, profile=profile, steer=steer, together=together, own=own,
        feature=gr.State(first.feature), caught=gr.State(()),
    )  # fmt: skip


def _named(function: Any) -> Any:
    """A partial function with the name that the page's script calls it by."""
    function.__name__ = function.func.__name__
    return function


def _part(script: str, name: str) -> str:
    """The script of one component: its name tells atlas.js which."""
    return f"const part = {json.dumps(name)};\n{script}"
