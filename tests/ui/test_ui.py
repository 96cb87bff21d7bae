"""The interface without a browser: views and links, the fair lane, handlers as plain functions."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lens_fixtures import PROMPTS

from diffusion_lens import ui
from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.bundled import lenses_to_open
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studio import state
from diffusion_lens.studio.lane import Lane, Stops
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.pictures import spotlight
from diffusion_lens.studio.recent import Recent
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import grid


@pytest.fixture(scope="module")
def studio(tiny_lens: DiffusionLens) -> Studio:
    """All visitors' studio on the tiny lens."""
    return Studio(tiny_lens)


@pytest.fixture
def view(tiny_lens: DiffusionLens) -> View:
    """The opening prompt and attribute, at the identity."""
    return state.default_view(tiny_lens)


class TestViews:
    @pytest.mark.parametrize("changes", [
        {}, {"prompt": ""}, {"beta": -3.75, "own": ((0, 2.5), (31, -4.0))}, {"window": (0, 2), "sampler": "symmetric"},
        {"window": None, "n_seeds": 16, "first_seed": 2**40, "n_features": 1}, {"hold": ("age",)},
        {"own": tuple((i, 2.0) for i in range(8)), "solo": (3, 5)},
        {"where": ("#...", "....", "....", "...#")},
    ])  # fmt: skip
    def test_links_open_the_view_they_were_made_of(
        self, tiny_lens: DiffusionLens, view: View, changes: dict[str, Any]
    ) -> None:
        from urllib.parse import parse_qsl

        wanted = replace(view, **changes)
        query = dict(parse_qsl(state.to_query(wanted).lstrip("?"), keep_blank_values=True))
        assert state.from_query(tiny_lens, query) == wanted

    def test_no_link_is_no_view(self, tiny_lens: DiffusionLens) -> None:
        assert state.from_query(tiny_lens, {"__theme": "dark"}) is None

    @pytest.mark.parametrize(("key", "value"), [
        ("v", "99"), ("a", "wealth"), ("t", "robot"), ("b", "nan"), ("b", "inf"), ("b", "1e9"), ("n", "100000"),
        ("s", "-1"), ("s", "1" * 30), ("k", "0"), ("w", "3-1"), ("w", "0-99"), ("w", "x"), ("m", "psychic"),
        ("f", "1:2,1:3"), ("f", "999999:1"), ("f", "x"), ("p", "astronaut"), ("p", "a " * 500),
        ("h", "wealth"), ("h", "gender"), ("h", "age,age"), ("o", "999999"), ("o", "x"), ("x", "11-00"), ("x", "what"),
        ("x", "0000-0000-0000-0000"),
    ])  # fmt: skip
    def test_broken_links_are_refused_in_one_sentence(
        self, tiny_lens: DiffusionLens, view: View, key: str, value: str
    ) -> None:
        query = {"v": "1", "p": str(view.prompt), "a": view.attribute, "t": view.target, "b": "1", "n": "8", "s": "0",
                 "k": "3", "m": "asymmetric", "w": "all"}  # fmt: skip
        assert state.from_query(tiny_lens, query) is not None
        with pytest.raises(LensError, match="opening view"):
            state.from_query(tiny_lens, {**query, key: value})

    def test_a_missing_part_of_a_link_is_refused(self, tiny_lens: DiffusionLens) -> None:
        with pytest.raises(LensError, match="incomplete"):
            state.from_query(tiny_lens, {"v": "1", "a": "gender"})

    def test_the_identity_lies_on_the_slider(self, tiny_lens: DiffusionLens) -> None:
        ends = state.scale(tiny_lens.setting("gender"))
        moves = (ends.identity - ends.low) / ends.step
        assert ends.low <= -4 and ends.high >= 6 and moves == pytest.approx(round(moves))

    def test_unknown_words_are_named_with_the_known_ones(self, tiny_lens: DiffusionLens) -> None:
        with pytest.raises(LensError, match=r"astronaut.*portrait"):
            state.check_prompt(tiny_lens, "a portrait of an astronaut")


class TestTurns:
    def test_nothing_is_turned_at_the_identity(self, tiny_lens: DiffusionLens, view: View) -> None:
        assert state.interventions(tiny_lens, view) == ()

    def test_the_set_is_the_shipped_turn(self, tiny_lens: DiffusionLens, view: View) -> None:
        (turn,) = state.interventions(tiny_lens, replace(view, beta=2.5))
        assert turn == tiny_lens.intervention(view.attribute, view.target, 2.5)

    def test_a_card_turns_its_own_feature_by_its_own_strength(self, tiny_lens: DiffusionLens, view: View) -> None:
        """Whatever pole a feature stands in, its card's number is what the feature is multiplied by."""
        features, opposite = state.poles(tiny_lens, view)
        assert opposite is not None
        for feature in (features.ids[0], opposite.ids[0]):
            (turn,) = state.interventions(tiny_lens, replace(view, own=((feature, 3.0),)))
            scales = {i: gain for i, gain, _ in turn.coefficients()}
            assert scales.pop(feature) == 3.0
            assert set(scales.values()) == {1.0}

    def test_a_feature_outside_the_set_is_turned_beside_it(self, tiny_lens: DiffusionLens, view: View) -> None:
        features, opposite = state.poles(tiny_lens, view)
        known = {*features.ids, *(opposite.ids if opposite else ())}
        other = next(i for i in range(32) if i not in known)
        alone = state.interventions(tiny_lens, replace(view, own=((other, 3.0),)))
        assert [t.features.ids for t in alone] == [(other,)]
        both = state.interventions(tiny_lens, replace(view, beta=2.0, own=((other, 3.0),)))
        assert len(both) == 2 and tiny_lens.edit(*both)


class TestDrawing:
    def test_images_are_those_of_the_lens(self, studio: Studio, view: View) -> None:
        wanted = replace(view, beta=3.0)
        picture = studio.draw(wanted)
        lens = studio.lens
        request = lens.request(view.prompt, range(8))
        turned = lens.generate(request, lens.intervention(view.attribute, view.target, 3.0), batch_size=8)
        assert np.array_equal(picture.before.images, lens.generate(request, batch_size=8).images)
        assert np.array_equal(picture.after.images, turned.images)
        assert np.array_equal(picture.after.labels, lens.classify(turned.images)[view.attribute].labels)

    def test_a_return_to_a_strength_is_not_drawn_again(self, studio: Studio, view: View) -> None:
        wanted = replace(view, beta=3.0)
        assert studio.draw(wanted).after.images is studio.draw(wanted).after.images

    def test_the_opening_shows_what_was_stored_on_the_same_seeds(self, studio: Studio) -> None:
        opened = opening_view(studio)
        picture = studio.stored(opened)
        assert picture is not None and picture.stored and picture.beta == opened.beta
        live = studio.draw(opened)
        assert np.array_equal(picture.before.labels, live.before.labels)
        assert np.array_equal(picture.after.labels, live.after.labels)

    def test_nothing_stored_is_shown_for_other_seeds_or_settings(self, studio: Studio, view: View) -> None:
        assert studio.stored(view) is not None
        for changes in ({"first_seed": 5}, {"own": ((0, 2.0),)}, {"sampler": "symmetric"}, {"prompt": ""},
                        {"n_features": 2}):  # fmt: skip
            assert studio.stored(replace(view, **changes)) is None

    def test_every_image_says_what_it_shows(self, studio: Studio, view: View) -> None:
        picture = studio.draw(replace(view, beta=3.0))
        html = grid.row_html(picture, studio.lens.attribute_named(view.attribute), edited=True)
        assert html.count("<img") == html.count(' alt="Seed ') == 8
        changed = (picture.before.labels != picture.after.labels) | (picture.before.certain != picture.after.certain)
        assert html.count("dl-moved") <= 8 and (html.count("dl-moved") > 0) == bool(changed.any())

    def test_the_page_of_another_visitor_is_never_touched(self, studio: Studio, view: View) -> None:
        """Two visitors draw at once; each gets their own view back."""
        views = [replace(view, beta=b, first_seed=s) for b, s in ((2.0, 0), (5.0, 100), (-3.0, 200))]
        pictures: dict[int, Any] = {}

        def visit(i: int) -> None:
            pictures[i] = studio.draw(views[i], f"visitor {i}")

        threads = [threading.Thread(target=visit, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, wanted in enumerate(views):
            assert pictures[i].view == wanted
            assert np.array_equal(pictures[i].after.images, Studio(studio.lens).draw(wanted).after.images)


class TestSweeps:
    def test_stored_sweeps_are_known_by_their_edits(self, copied_lens: Any) -> None:
        studio = Studio(DiffusionLens.from_pretrained(copied_lens()))
        main, control = studio.sweeps(PROMPTS[0], "gender")
        assert (main.control, control.control) == (None, "random")
        assert {m.control for m in studio.lens.sweeps} == {None, "random"}

        def foreign(*sweeps: SweepResult) -> tuple[SweepResult, ...]:
            other = Studio(studio.lens)
            other.lens = SimpleNamespace(  # type: ignore[assignment]
                sweeps=sweeps, settings=studio.lens.settings, intervention=studio.lens.intervention,
                atlas=studio.lens.atlas, fitted_from=studio.lens.fitted_from,
            )  # fmt: skip
            return other.foreign

        # Words decide nothing where the edit is known; draws of a control are told apart by their features.
        assert foreign(replace(main, setting="anything"), replace(control, setting="anything")) == ()
        strangers = (replace(main, control="random"), replace(control, control=None), replace(control, control_seed=9))
        assert foreign(main, *strangers, control) == strangers
        flipped = studio.lens.sweep(PROMPTS[0], "gender", n=4, betas=(2.0,), control="flip")
        assert flipped.is_control and flipped.control == "flip" and foreign(flipped) == ()
        # Results of version 0.4 have words alone, and a control of unknown draw.
        bare = [
            replace(r, points=tuple(replace(p, measurement=replace(p.measurement, edit=None)) for p in r.points))
            for r in (main, control)
        ]
        assert foreign(*bare) == ()
        wrong = replace(bare[0], setting="80 features, both poles, scale, symmetric, all steps")
        assert foreign(wrong) == (wrong,)


class TestSeveralLenses:
    def test_bundled_folders_are_found_the_first_page_in_front(self, tmp_path: Path) -> None:
        for name in ("another", "portraits", "half-made"):
            (tmp_path / name).mkdir()
        for name in ("another", "portraits"):
            (tmp_path / name / "lens.json").write_text("{}")
        both = (str(tmp_path / "portraits"), str(tmp_path / "another"))
        assert lenses_to_open((), "", tmp_path) == both
        assert lenses_to_open((), os.pathsep.join(("x", "y")), tmp_path) == ("x", "y")
        assert lenses_to_open(("a", "b", "a"), "x", tmp_path) == ("a", "b")
        assert lenses_to_open((), "", tmp_path / "nowhere") == (str(tmp_path / "nowhere" / "portraits"),)

    def test_pages_have_names_of_their_own(self) -> None:
        assert ui.page_paths(["x", "Portraits, no words", "portraits-no-words", "…"]) == [
            "", "portraits-no-words", "portraits-no-words-next", "lens"
        ]  # fmt: skip

    def test_each_lens_has_a_page_and_all_share_one_lane(
        self, tiny_lens: DiffusionLens, prompt_free_lens: DiffusionLens
    ) -> None:
        first, second = ui._studios([tiny_lens, prompt_free_lens])
        assert first.lane is second.lane and first.stops is second.stops
        one, two = ui.build(tiny_lens), ui.build(tiny_lens, prompt_free_lens)
        pages = two.get_config_file()["page"]
        assert list(pages) == ["", "prompt-free"]
        for kind in ("components", "dependencies"):
            assert len(pages[""][kind]) == len(one.get_config_file()["page"][""][kind]) + (kind == "components")


class TestLane:
    def test_one_at_a_time_and_urgent_work_first(self) -> None:
        lane, order = Lane(), []

        def job(name: str, urgent: bool) -> None:
            with lane.hold(urgent=urgent):
                order.append(name)

        with lane.hold(urgent=True):
            threads = []
            for name, urgent in (("sweep", False), ("slider", True)):
                threads.append(threading.Thread(target=job, args=(name, urgent)))
                threads[-1].start()
                while lane.waiting < len(threads):
                    time.sleep(0.001)
        for thread in threads:
            thread.join()
        assert order == ["slider", "sweep"]

    def test_a_sweep_gives_way_between_steps_and_goes_on(self) -> None:
        lane, order = Lane(), []

        def slider() -> None:
            with lane.hold(urgent=True):
                order.append("slider")

        with lane.hold(urgent=False) as turn:
            turn.give_way()
            order.append("step 1")
            thread = threading.Thread(target=slider)
            thread.start()
            while not lane.waiting:
                time.sleep(0.001)
            turn.give_way()
            order.append("step 2")
        thread.join()
        assert order == ["step 1", "slider", "step 2"]

    def test_an_error_frees_the_lane(self) -> None:
        lane = Lane()
        with pytest.raises(Cancelled), lane.hold(urgent=True):
            raise Cancelled
        with lane.hold(urgent=False):
            pass

    def test_a_visitor_stops_their_own_work_alone(self) -> None:
        stops = Stops()
        mine, yours = stops.start("me:sweep"), stops.start("you:sweep")
        stops.stop("me:sweep")
        stops.stop("nobody")
        assert mine.is_set() and not yours.is_set()
        assert yours is not stops.start("you:sweep") and yours.is_set(), "new work ends the old"


def test_caches_are_bounded() -> None:
    cache: Recent[int] = Recent(2, 0)
    for i in range(3):
        cache.put(i, i)
    assert cache.get(0) is None and cache.get(2) == 2
    assert cache.get(1) == 1
    cache.put(3, 3)
    assert cache.get(2) is None and cache.get(1) == 1, "what was used last stays"


def test_the_spotlight_keeps_lit_places_and_greys_dark_ones() -> None:
    image = np.zeros((96, 96, 3), np.uint8)
    image[..., 0] = 200
    heat = np.zeros((4, 4))
    heat[0, 0] = 2.0
    lit = spotlight(image, heat)
    assert np.abs(lit[2, 2].astype(int) - [200, 0, 0]).max() <= 12
    dark = lit[90, 90].astype(int)
    assert dark.max() - dark.min() <= 2
    assert np.array_equal(spotlight(image, np.zeros((4, 4))), image)


def test_the_app_is_built_and_limits_its_queue(tiny_lens: DiffusionLens) -> None:
    demo = ui.build(tiny_lens)
    assert demo._queue.max_size == ui.QUEUE
    assert any(fn.concurrency_id == "live" and fn.trigger_mode == "multiple" for fn in demo.fns.values())
    assert "script" in ui.launch_options()["head"]
