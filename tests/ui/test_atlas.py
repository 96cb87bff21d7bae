"""The Atlas tab without a browser: search over all features, the map of islands, the card of one feature."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from dissected import dissection, keep_in
from panels import Held, untouched, visitor

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import effects_of
from diffusion_lens.results.manifest import verify
from diffusion_lens.studio import atlas, atlas_map
from diffusion_lens.studio.atlas_map import LEVELS
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import atlas as tab
from diffusion_lens.ui import explore, words
from diffusion_lens.ui.atlas import AtlasQuestion, AtlasTab, FeatureView


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


@pytest.fixture
def page(plain: Studio) -> tuple[AtlasTab, Held]:
    """The tab beside Explore, and what a browser holds of both."""
    with gr.Blocks() as demo, gr.Tabs() as tabs, gr.Tab("Explore"):
        beside = explore.layout(plain)
        built = tab.components(plain, lambda visitor, feature: atlas.strip(plain, visitor, feature), tabs, beside)
    return built, Held(demo)


def found(studio: Studio, text: str) -> list[int]:
    """The features that a search finds, in order."""
    return [hit.feature for hit in atlas.search(studio.lens, text, words.sought)]


def sent(**data: Any) -> Any:
    """What a component sends."""
    return SimpleNamespace(_data=data)


class TestSearch:
    def test_measured_effects_come_first_the_largest_first(self, studio: Studio) -> None:
        hits = atlas.search(studio.lens, "glasses", words.sought)
        assert [hit.feature for hit in hits][:2] == [1, 2] and [hit.size for hit in hits][:2] == [0.5, 0.25]
        assert hits[0].confidence == "confirmed"
        labelled = {i for i, label in enumerate(studio.lens.atlas.labels) if "glasses" in label.split(": ")[-1].split()}
        assert labelled <= set(found(studio, "glasses")), "every guess is found too, however many there are"

    def test_words_are_found_from_their_beginning(self, studio: Studio) -> None:
        assert 3 in found(studio, "male") and 3 in found(studio, "MEN")
        assert 3 not in found(studio, "emal"), "a word is no part of another"

    def test_numbers_find_features_the_exact_one_first(self, plain: Studio) -> None:
        assert found(plain, "#3")[0] == 3 and set(found(plain, "3")) == {
            i for i in range(plain.lens.atlas.density.size) if str(i).startswith("3")
        }
        assert found(plain, "99999") == [] and found(plain, "  ") == []

    def test_what_a_page_sends_is_cut_and_escaped(self, plain: Studio) -> None:
        shown = tab.search_view(plain.lens, AtlasQuestion("<b>" * 100, "", None))
        assert "<b>&lt;b" not in shown.hits and "&lt;b&gt;" in shown.hits and len(shown.hits) < 5000

    def test_the_evidence_on_an_attribute_is_told(self, studio: Studio) -> None:
        told = atlas.evidence_for(studio.lens, "age")
        assert told is not None and "No feature tested moves age for sure (the largest: #4" in told
        assert atlas.evidence_for(studio.lens, "long hair") is None

    def test_hits_light_up_on_the_map(self, studio: Studio) -> None:
        shown = tab.search_view(studio.lens, AtlasQuestion("glasses", atlas.EVIDENCE, 3))
        assert shown.plot["hits"] == found(studio, "glasses") and shown.plot["chosen"] == 3
        assert f"{len(found(studio, 'glasses'))} of all features" in shown.hits
        before = tab.search_view(studio.lens, AtlasQuestion("", atlas.EVIDENCE, None))
        assert before.plot["hits"] == [] and "#3" in before.hits, "the list begins with what was measured"


class TestMap:
    def test_islands_hold_what_stands_for_their_class(self, studio: Studio) -> None:
        drawn = atlas_map.atlas_map(studio.lens)
        place = {(r.attribute, r.label): r for r in drawn.regions}
        for feature, name in ((1, ("glasses", "glasses")), (3, ("gender", "male"))):
            region = place[name]
            assert np.hypot(*(drawn.xy[feature] - (region.x, region.y))) <= region.r
            assert LEVELS[drawn.confidence[feature]] == "confirmed"
        assert (drawn.xy >= 0).all() and (drawn.xy <= (drawn.width, drawn.height)).all()
        again = atlas_map.atlas_map(studio.lens)
        assert np.array_equal(drawn.xy, again.xy), "the same map every time"

    def test_islands_do_not_overlap_and_every_feature_lies_in_its_own(self, plain: Studio) -> None:
        drawn = atlas_map.atlas_map(plain.lens)
        for k, one in enumerate(drawn.regions):
            for other in drawn.regions[k + 1 :]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.r + other.r
        inside = [np.hypot(*(drawn.xy - (r.x, r.y)).T) <= r.r for r in drawn.regions]
        assert (np.sum(inside, axis=0) == 1).all() and [int(own.sum()) for own in inside] == [
            r.n for r in drawn.regions
        ]

    def test_turned_down_a_feature_stands_for_what_it_took_away(self, plain: Studio) -> None:
        told = dissection(plain.lens.manifest.sae_id, betas=(-4.0,) * 5)
        grown = next(e for e in effects_of(told, 1) if e.attribute == "glasses" and e.label == "glasses")
        assert grown.difference > 0 and atlas_map.stands_for(told, grown) == ("glasses", "none")
        assert atlas_map.stands_for(told, replace(grown, difference=-0.5)) == ("glasses", "glasses")

    def test_a_feature_without_a_label_joins_those_whose_images_it_shares(self) -> None:
        images = np.array([[0, 1, 2], [0, 1, 2], [7, 8, 9], [8, 9, 7], [1, 2, 5], [9, 8, 4]])
        home = np.array([0, 0, 1, 1, -1, -1])
        atlas_map._join_nearest(home, images, 2, np.array([4, 5]))
        assert home.tolist() == [0, 0, 1, 1, 0, 1]

    def test_colours_are_shares_of_the_largest(self, plain: Studio) -> None:
        values = atlas.scores(plain.lens, atlas.DENSITY)
        assert values is not None and values.max() == 1 and values.min() >= 0
        assert atlas.scores(plain.lens, atlas.EVIDENCE) is None and atlas.scores(plain.lens, "magic: x") is None
        male = atlas.scores(plain.lens, "gender: male")
        assert male is not None and int(male.argmax()) == int(plain.lens.attributions["gender"].total("male").argmax())


class TestChoosing:
    @pytest.mark.parametrize("bad", [None, "7", -1, 10**9, 1.5, float("nan"), True, [3], {"id": 3}])
    def test_a_page_cannot_choose_what_is_not_there(self, page: tuple[AtlasTab, Held], bad: Any) -> None:
        built, held = page
        shown = built.choose(held.values, sent(id=bad))
        assert "no feature" in shown[built.head]
        assert untouched({part: value for part, value in shown.items() if part is not built.head})
        assert tab.peek(built.studio.lens, bad) == ""

    def test_choosing_shows_the_feature_everywhere(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        shown = built.choose(held.values, sent(id=7.0))
        assert set(shown) == built.parts(FeatureView)
        assert "#7" in shown[built.head] and "#7" in shown[built.profile]["alt"] and "#7" in shown[built.plot]["alt"]
        assert shown[built.plot]["chosen"] == shown[built.feature] == shown[built.own] == 7
        assert "#7" in shown[built.steer]["value"] and "aria-busy" in shown[built.strip]
        assert 'alt="Example 1 of feature 7' in tab.peek(built.studio.lens, 7)

    def test_the_strip_is_the_same_seeds_with_that_feature_alone(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        lens = built.studio.lens
        feature = int(lens.atlas.density.argmax())
        drawn = atlas.strip(built.studio, "a", feature)
        assert drawn.images.shape[:2] == (3, 4) and drawn.betas[1] == drawn.identity
        plain = lens.generate(drawn.prompt, seeds=drawn.seeds).images
        assert np.array_equal(drawn.images[1], plain) and not np.array_equal(drawn.images[2], plain)
        shown = built.draw_strip(held.set({built.feature: feature}), visitor("a"))[built.strip]
        assert shown.count("<img") == 12 and f"feature {feature} at strength" in shown

    def test_the_tab_opens_on_the_first_of_its_list(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        first = atlas.strongest(built.studio.lens)[0].feature
        assert held.values[built.feature] == first and f"#{first}" in held.values[built.head]

    def test_a_tapped_attribute_is_searched_for(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        chip = next(label.split(": ")[0] for label in built.studio.lens.atlas.labels if label)
        shown = built.find_chip(held.values, sent(chip=chip))
        assert shown[built.search] == chip and shown[built.plot]["hits"]
        assert built.recolour(held.set({built.colour: atlas.DENSITY}))[built.plot]["scores"] is not None

    def test_features_ringed_on_the_map_are_steered_together(self, page: tuple[AtlasTab, Held]) -> None:
        built, held = page
        alive = [int(i) for i in np.flatnonzero(~built.studio.lens.atlas.dead)[:3]]
        shown = built.catch(sent(ids=[*alive, alive[0], -4, "x", None, 10**7]))
        assert shown[built.caught] == tuple(alive) and "3 features" in shown[built.together]["value"]
        held.take({built.caught: shown[built.caught]})
        gone = built.steer_together(held.values)
        added = gone[built.explore.pane]["value"]["view"]["own"]
        assert [int(i) for i in added] == alive and built.tabs in gone
        assert built.catch(sent(ids=[]))[built.together]["visible"] is False
        assert built.catch(sent(ids="all"))[built.caught] == ()
        alone = built.add_to_explore(held.set({built.feature: alive[1]}))
        assert list(alone[built.explore.pane]["value"]["view"]["own"]) == [str(alive[1])]


class TestCards:
    def test_a_card_says_what_its_name_rests_on(self, studio: Studio, plain: Studio) -> None:
        sure = tab.feature_view(studio.lens, 1, AtlasQuestion("", "", None))
        assert "confirmed, n = 32, q &lt; .001" in sure.head and "At 5: more glasses (50 in 100)" in sure.head
        labels = plain.lens.atlas.labels
        guess = next(i for i, label in enumerate(labels) if label and not plain.lens.atlas.dead[i])
        bare = next(i for i, label in enumerate(labels) if not label and not plain.lens.atlas.dead[i])
        assert "a guess from images" in tab.feature_view(plain.lens, guess, AtlasQuestion("", "", None)).head
        assert tab.feature_view(plain.lens, bare, AtlasQuestion("", "", None)).head.count("no label") == 2

    def test_bars_are_of_significant_changes_alone_the_class_that_grew(self, studio: Studio) -> None:
        card = tab.feature_view(studio.lens, 1, AtlasQuestion("", "", None)).card
        bars, rest = card.split("<details", 1)
        assert (
            bars.count("dl-diverge") == 1
            and "+50" in bars
            and "+40 to +60" in bars
            and "left:50.0%;width:25.0%" in bars
        )
        assert "glasses: none" in rest and "All 7 effects measured" in rest and "false discovery rate 5%" in rest

    def test_cards_say_when_nothing_moved_or_could(self, studio: Studio, plain: Studio) -> None:
        def card(feature: int) -> str:
            return tab.feature_view(studio.lens, feature, AtlasQuestion("", "", None)).card

        assert "on 32 paired images, it changed nothing significantly" in card(4)
        assert "never fires on the 32 images" in card(5) and "not tested" in card(5)
        measured = np.flatnonzero(np.isfinite(plain.lens.atlas.effects["glasses"]).all(axis=1))
        told = tab.feature_view(plain.lens, int(measured[0]), AtlasQuestion("", "", None)).card
        assert "without a test of chance" in told

    def test_the_fixed_part_of_the_map_is_small_json(self, plain: Studio) -> None:
        names = list(plain.lens.atlas.labels)
        told = json.loads(tab.points(atlas_map.atlas_map(plain.lens), names))
        assert len(told["xy"]) == 2 * len(names) == 2 * len(told["confidence"]) and told["levels"] == list(LEVELS)
