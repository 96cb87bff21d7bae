"""The Atlas tab without a browser: filters, colours, the card of one feature, and what single features control."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from dissected import dissection, keep_in
from panels import Held, untouched

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.manifest import verify
from diffusion_lens.studio import atlas, cards, state
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import atlas as tab
from diffusion_lens.ui import explore
from diffusion_lens.ui.atlas import AtlasQuestion, AtlasTab, FeatureView, MapView
from diffusion_lens.ui.html import html


@pytest.fixture
def studio(copied_lens: Callable[[], Path]) -> Studio:
    """The tiny lens with a dissection of known numbers."""
    folder = copied_lens()
    keep_in(folder)
    verify(folder)
    return Studio(DiffusionLens.from_pretrained(folder))


@pytest.fixture
def plain(tiny_lens: DiffusionLens) -> Studio:
    """The tiny lens, never dissected."""
    return Studio(tiny_lens)


GENDER = "gender: male"


def ids(view: MapView) -> list[object]:
    """The feature numbers of a table."""
    return [row[0] for row in view.rows]


def filtered(studio: Studio, show: str, feature: int | None = None) -> MapView:
    """What a filter shows, from a map coloured by an attribution."""
    return tab.filtered_view(studio.lens, AtlasQuestion(GENDER, show, feature))


def traces(plot: dict[str, str]) -> dict[str, dict[str, Any]]:
    """A figure's series by name."""
    return {trace["name"]: trace for trace in json.loads(plot["figure"])["data"]}


@pytest.fixture
def page(plain: Studio) -> tuple[AtlasTab, Held]:
    """The tab beside Explore, and what a browser holds of both."""
    with gr.Blocks() as demo, gr.Tabs() as tabs, gr.Tab("Explore"):
        beside = explore.layout(plain)
        built = tab._components(plain.lens, tabs, beside)
    return built, Held(demo)


class TestFilters:
    def test_features_are_grouped_by_what_they_control(self, studio: Studio) -> None:
        texts = dict((value, text) for text, value in atlas.filters(studio.lens))
        assert texts["glasses"] == "controls glasses (2)" and texts["gender"] == "controls gender (1)"
        assert texts["age"] == "controls age (0)" and "(1)" in texts[atlas.NOTHING]
        assert atlas.members(studio.lens, "glasses") == [1, 2] and atlas.members(studio.lens, "age") == []
        assert atlas.members(studio.lens, atlas.NOTHING) == [4], "what never fires was not tested"
        assert atlas.members(studio.lens, atlas.EVERY) is None

    def test_a_filter_shows_its_features_alone_strongest_first(self, studio: Studio) -> None:
        shown = filtered(studio, "glasses", 3)
        assert shown.colour == atlas.CONTROLS and ids(shown) == [1, 2] and [row[2] for row in shown.rows] == [50, 25]
        assert list(traces(shown.plot)) == ["others", "glasses (2)", "chosen"]
        assert "glasses: 2 (first #1)" in shown.plot["alt"]
        assert "#1: glasses +50 points" in shown.evidence and "4 features tested on 32 paired" in shown.evidence
        every = filtered(studio, atlas.EVERY, 3)
        assert every.colour == GENDER and len(every.rows) == len(studio.lens.atlas.density)

    def test_an_attribute_that_nothing_controls_says_so_with_the_evidence(self, studio: Studio) -> None:
        shown = filtered(studio, "age")
        assert shown.rows == [] and "none for sure" in shown.plot["alt"]
        assert "No feature tested moves age for sure (the largest: #4" in shown.evidence
        assert "32 paired images" in shown.evidence

    def test_features_that_move_it_beside_something_else_stand_in(self, copied_lens: Callable[[], Path]) -> None:
        lens = DiffusionLens.from_pretrained(copied_lens())
        dissected = dissection(lens.manifest.sae_id)
        dissected.effects["age"][:2] = [[0.2, 0.0, -0.2], [-0.1, 0.0, 0.1]]
        dissected.q_values["age"][:2] = 1e-5
        lens.store(dissected)
        texts = dict((value, text) for text, value in atlas.filters(lens))
        assert texts["age"] == "moves age beside others (2)" and texts["glasses"] == "controls glasses (2)"
        shown = filtered(Studio(lens), "age")
        assert [row[:3] for row in shown.rows] == [
            [1, "age: young +20 points at β = 5", 20.0], [2, "age: old +10 points at β = 5", 10.0]
        ]  # fmt: skip
        assert "age: 2 (first #1)" in shown.plot["alt"]
        assert "2 features move it for sure beside something that moves further, the furthest #1: young +20" in (
            shown.evidence
        )

    def test_colours_tell_groups_apart(self, studio: Studio) -> None:
        assert atlas.CONTROLS in atlas.colourings(studio.lens)
        groups = traces(tab.draw_map(studio.lens, AtlasQuestion(atlas.CONTROLS, atlas.EVERY, None)))
        assert set(groups) == {"others", "gender (1)", "glasses (2)"}
        looks = {(t["marker"]["color"], t["marker"]["symbol"]) for n, t in groups.items() if n != "others"}
        assert len(looks) == 2
        assert {c[0] for c in groups["glasses (2)"]["customdata"]} == {1, 2}
        values, name = atlas.scores(studio.lens, atlas.CONTROLS)
        assert values[[1, 2, 3, 4, 5]].tolist() == pytest.approx([50, 25, 75, 0, 0]) and "points" in name

    def test_any_other_colour_keeps_the_filter(self, studio: Studio) -> None:
        shown = tab.map_view(studio.lens, AtlasQuestion("age: old", "glasses", None))
        assert set(ids(shown)) == {1, 2}
        assert {c[0] for c in traces(shown.plot)["features"]["customdata"]} <= {1, 2}
        chosen = tab.feature_view(studio.lens, 2, AtlasQuestion(atlas.CONTROLS, "glasses", None))
        assert chosen.number == 2 and "Feature #2" in chosen.card and "glasses" in chosen.plot["alt"]

    def test_what_a_page_sends_as_filter_is_not_trusted(self, studio: Studio) -> None:
        shown = filtered(studio, "<script>")
        assert shown.rows == [] and "<script>" not in shown.evidence

    def test_a_lens_without_a_dissection_says_how_to_make_one(self, plain: Studio) -> None:
        assert atlas.filters(plain.lens) == [("all features", atlas.EVERY)]
        assert atlas.CONTROLS not in atlas.colourings(plain.lens)
        assert "dissect --store" in tab.evidence_html(plain.lens, atlas.EVERY)
        assert len(atlas.table(plain.lens, GENDER, "glasses")) == len(plain.lens.atlas.density)

    def test_the_table_is_in_step_with_the_colours(self, plain: Studio) -> None:
        for colour in atlas.colourings(plain.lens):
            values, _ = atlas.scores(plain.lens, colour)
            order = [row.feature for row in atlas.table(plain.lens, colour)]
            assert order[0] == int(values.argmax()) and np.all(np.diff(values[order]) <= 0)


class TestChoosing:
    @pytest.mark.parametrize("bad", [None, -1, 32, 1.5, float("nan"), float("inf"), "3", True, [1]])
    def test_a_page_cannot_choose_what_is_not_there(self, page: tuple[AtlasTab, Held], bad: Any) -> None:
        built, held = page
        assert atlas.valid_feature(built.lens, bad) is None
        shown = built.choose_number(held.set({built.number: bad}))
        assert "no feature" in shown[built.card]
        assert untouched({part: value for part, value in shown.items() if part is not built.card})

    def test_choosing_shows_the_feature_everywhere(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        shown = built.choose_on_map(held.values, SimpleNamespace(_data={"id": 7.0}))
        assert set(shown) == built.parts(FeatureView)
        assert "Feature #7" in shown[built.card] and "#7" in shown[built.profile]["alt"]
        assert "#7" in shown[built.plot]["alt"] and "#7" in shown[built.steer]["value"]
        assert shown[built.number] == shown[built.feature] == 7
        row = built.choose_in_table(held.take(shown), SimpleNamespace(row_value=[4, "x", 0.1, "1 %"]))
        assert row[built.feature] == 4

    def test_the_tab_opens_on_the_strongest_feature(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        best = atlas.table(built.lens, held.values[built.colour])[0].feature
        assert held.values[built.feature] == held.values[built.number] == best
        assert f"Feature #{best}" in held.values[built.card] and f"#{best}" in held.values[built.plot]["alt"]

    def test_filters_and_colours_change_map_and_table(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        recoloured = built.recolour(held.set({built.colour: atlas.DENSITY}))
        assert "density" in recoloured[built.plot]["alt"] and recoloured[built.rows]
        assert built.refilter(held.values)[built.colour] == atlas.DENSITY, "all features keep their colour"

    def test_the_chosen_feature_goes_to_explore(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        known = cards.slots(built.lens, state.default_view(built.lens))
        other = next(i for i in range(32) if i not in known)
        shown = built.steer_in_explore(held.set({built.feature: other}))
        assert shown[built.explore.page].slots[0] == other and built.tabs in shown


def card_of(studio: Studio, feature: int) -> str:
    """The large card of a feature."""
    card = studio.lens.card(feature)
    return html("cards.large", card, cards.effects(studio.lens, card))


class TestCards:
    def test_a_card_tells_every_attribute_with_interval_and_test(self, studio: Studio) -> None:
        card = card_of(studio, 1)
        sure, rest = card.split("<details", 1)
        assert "glasses: glasses</th><td>5</td><td>+50 (+40 to +60)</td><td>&lt; 0.001</td>" in sure
        assert "Nothing sure on gender, age." in sure and "age: adult" in rest and "All 7 effects measured" in rest
        assert "age: adult" not in sure.split("Effect when it alone")[1]
        assert "false discovery rate 5%" in card

    def test_cards_say_when_nothing_moved_or_could(self, studio: Studio) -> None:
        assert "Nothing that the classifier reads moved for sure on 32 paired images" in card_of(studio, 4)
        silent = card_of(studio, 5)
        assert "never fires on these 32 images" in silent and "not tested" in silent
        other = card_of(studio, 9)
        assert "Not measured for this feature" in other or "without a test of chance" in other

    def test_untested_effects_of_a_fit_are_shown_as_such(self, plain: Studio) -> None:
        measured = np.flatnonzero(np.isfinite(plain.lens.atlas.effects["glasses"]).all(axis=1))
        card = plain.lens.card(int(measured[0]))
        assert set(card.effects) == {"gender", "age", "glasses"}
        assert "without a test of chance" in card_of(plain, int(measured[0]))
