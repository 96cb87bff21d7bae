"""What single features control, on the Atlas and on cards, as plain functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dissected import dissection, keep_in

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.manifest import verify
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import atlas_tab, cards


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


def ids(rows: list[list[object]]) -> list[object]:
    """The feature numbers of a table."""
    return [row[0] for row in rows]


class TestAtlas:
    def test_features_are_grouped_by_what_they_control(self, studio: Studio) -> None:
        told = dict((value, text) for text, value in atlas_tab.filters(studio))
        assert told["glasses"] == "controls glasses (2)" and told["gender"] == "controls gender (1)"
        assert told["age"] == "controls age (0)" and "(1)" in told[atlas_tab.NOTHING]
        assert atlas_tab.members(studio, "glasses") == [1, 2] and atlas_tab.members(studio, "age") == []
        assert atlas_tab.members(studio, atlas_tab.NOTHING) == [4], "what never fires was not tested"
        assert atlas_tab.members(studio, atlas_tab.EVERY) is None

    def test_a_filter_shows_its_features_alone_strongest_first(self, studio: Studio) -> None:
        colour, plot, rows, said = atlas_tab.refilter(studio, "glasses", "gender: male", 3)
        assert colour == atlas_tab.CONTROLS and ids(rows) == [1, 2] and [row[2] for row in rows] == [50.0, 25.0]
        names = [trace["name"] for trace in json.loads(plot["figure"])["data"]]
        assert names == ["others", "glasses (2)", "chosen"] and "glasses: 2 (first #1)" in plot["alt"]
        assert "#1: glasses +50 points" in said and "4 features tested on 32 paired images" in said
        colour, plot, rows, _ = atlas_tab.refilter(studio, atlas_tab.EVERY, "gender: male", 3)
        assert colour == "gender: male" and len(rows) == len(studio.lens.atlas.density)

    def test_an_attribute_that_nothing_controls_says_so_with_the_evidence(self, studio: Studio) -> None:
        _, plot, rows, said = atlas_tab.refilter(studio, "age", "gender: male", None)
        assert rows == [] and "none for sure" in plot["alt"]
        assert "No feature tested moves age for sure (the largest: #4" in said and "32 paired images" in said

    def test_features_that_move_it_beside_something_else_stand_in(self, copied_lens: Callable[[], Path]) -> None:
        lens = DiffusionLens.from_pretrained(copied_lens())
        found = dissection(lens.manifest.sae_id)
        found.effects["age"][:2] = [[0.2, 0.0, -0.2], [-0.1, 0.0, 0.1]]
        found.q_values["age"][:2] = 1e-5
        lens.store(found)
        studio = Studio(lens)
        told = dict((value, text) for text, value in atlas_tab.filters(studio))
        assert told["age"] == "moves age beside others (2)" and told["glasses"] == "controls glasses (2)"
        _, plot, rows, said = atlas_tab.refilter(studio, "age", "gender: male", None)
        assert [row[:3] for row in rows] == [
            [1, "age: young +20 points at β = 5", 20.0], [2, "age: old +10 points at β = 5", 10.0]
        ]  # fmt: skip
        assert "age: 2 (first #1)" in plot["alt"]
        assert "2 features move it for sure beside something that moves further, the furthest #1: young +20" in said

    def test_colours_tell_groups_apart(self, studio: Studio) -> None:
        assert atlas_tab.CONTROLS in atlas_tab.colourings(studio)
        data = json.loads(atlas_tab.drawn(studio, atlas_tab.CONTROLS, None)["figure"])["data"]
        groups = {trace["name"]: trace for trace in data}
        assert set(groups) == {"others", "gender (1)", "glasses (2)"}
        looks = {(t["marker"]["color"], t["marker"]["symbol"]) for n, t in groups.items() if n != "others"}
        assert len(looks) == 2
        assert {c[0] for c in groups["glasses (2)"]["customdata"]} == {1, 2}
        values, name = atlas_tab.scores(studio, atlas_tab.CONTROLS)
        assert values[[1, 2, 3, 4, 5]].tolist() == pytest.approx([50, 25, 75, 0, 0]) and "points" in name

    def test_any_other_colour_keeps_the_filter(self, studio: Studio) -> None:
        plot, rows = atlas_tab.recolour(studio, "age: old", None, "glasses")
        assert set(ids(rows)) == {1, 2}
        features = next(t for t in json.loads(plot["figure"])["data"] if t["name"] == "features")
        assert {c[0] for c in features["customdata"]} <= {1, 2}
        card, _, plot, number, *_ = atlas_tab.chosen(studio, atlas_tab.CONTROLS, 2, "glasses")
        assert number == 2 and "Feature #2" in card and "glasses" in plot["alt"]

    def test_what_a_page_sends_as_filter_is_not_trusted(self, studio: Studio) -> None:
        _, _, rows, said = atlas_tab.refilter(studio, "<script>", "gender: male", None)
        assert rows == [] and "<script>" not in said

    def test_a_lens_without_a_dissection_says_how_to_make_one(self, plain: Studio) -> None:
        assert atlas_tab.filters(plain) == [("all features", atlas_tab.EVERY)]
        assert atlas_tab.CONTROLS not in atlas_tab.colourings(plain)
        assert "dissect --store" in atlas_tab.said(plain, atlas_tab.EVERY)
        assert len(atlas_tab.table(plain, "gender: male", "glasses")) == len(plain.lens.atlas.density)

    def test_opening_fills_the_filters_once(self, studio: Studio) -> None:
        first = atlas_tab.opened(studio, "gender: male", None)
        assert len(first) == len(atlas_tab.opened(studio, "gender: male", 3)) == 10
        assert [value for _, value in first[-2]["choices"]] == ["", "gender", "age", "glasses", atlas_tab.NOTHING]
        assert first[-2]["interactive"] and "glasses 2" in first[-1] and "None for age" in first[-1]


class TestCards:
    def test_a_card_tells_every_attribute_with_interval_and_test(self, studio: Studio) -> None:
        card = cards.large_card(studio.lens, 1)
        sure, rest = card.split("<details", 1)
        assert "glasses: glasses</th><td>5</td><td>+50 (+40 to +60)</td><td>&lt; 0.001</td>" in sure
        assert "Nothing sure on gender, age." in sure and "age: adult" in rest and "All 7 effects measured" in rest
        assert "age: adult" not in sure.split("Effect when it alone")[1]
        assert "false discovery rate 5%" in card

    def test_cards_say_when_nothing_moved_or_could(self, studio: Studio) -> None:
        assert "Nothing that the classifier reads moved for sure on 32 paired images" in cards.large_card(
            studio.lens, 4
        )
        silent = cards.large_card(studio.lens, 5)
        assert "never fires on these 32 images" in silent and "not tested" in silent
        other = cards.large_card(studio.lens, 9)
        assert "Not measured for this feature" in other or "without a test of chance" in other

    def test_untested_effects_of_a_fit_are_shown_as_such(self, plain: Studio) -> None:
        measured = np.flatnonzero(np.isfinite(plain.lens.atlas.effects["glasses"]).all(axis=1))
        card = plain.lens.card(int(measured[0]))
        assert set(card.effects) == {"gender", "age", "glasses"}
        assert "without a test of chance" in cards.large_card(plain.lens, int(measured[0]))
