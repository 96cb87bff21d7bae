"""The Sweep tab without a browser: stored sweeps, runs point by point, one subject with Explore."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html import unescape
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from lens_fixtures import PROMPTS
from panels import Held, untouched, visitor

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studio import jobs, state
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio, foreign_lines
from diffusion_lens.ui import explore, sweep
from diffusion_lens.ui.sweep import Subject, SweepRequest, SweepTab, sweep_view
from diffusion_lens.ui.visitor import visitor_of

NURSE = "a portrait of a nurse"
SHIPPED = "recommended strengths"


@pytest.fixture(scope="module")
def studio(tiny_lens: DiffusionLens) -> Studio:
    """All visitors' studio on the tiny lens."""
    return Studio(tiny_lens)


@pytest.fixture
def view(tiny_lens: DiffusionLens) -> View:
    """The opening prompt and attribute, at the identity."""
    return state.default_view(tiny_lens)


@pytest.fixture
def page(studio: Studio) -> Iterator[tuple[SweepTab, Held]]:
    """The tab beside Explore, on the opening's subject, and what a browser holds of both."""
    first = state.default_view(studio.lens)
    with gr.Blocks() as demo:
        beside = explore.layout(studio)
        tab = sweep._components(studio, partial(sweep.run, studio), beside, Subject(first.prompt, first.attribute))
    yield tab, Held(demo)


def asked(view: View, **changes: Any) -> SweepRequest:
    """What a visitor asks for."""
    return replace(SweepRequest(view.prompt, view.attribute, SHIPPED, 16, [], "log ratio"), **changes)


def stored(studio: Studio, prompt: str | None, attribute: str) -> tuple[SweepResult, ...]:
    """The stored sweeps of a prompt, which must be there."""
    results = studio.sweeps(prompt, attribute)
    assert results
    return results


def choices(tab: SweepTab, request: SweepRequest) -> dict[Any, Any]:
    """The controls that ask for a sweep."""
    return {getattr(tab, name): value for name, value in vars(request).items()}


class TestStored:
    def test_stored_sweeps_are_shown_at_once(self, studio: Studio, view: View) -> None:
        results = stored(studio, view.prompt, view.attribute)
        shown = sweep_view(results, "log ratio")
        assert shown.plot is not None and shown.plot["alt"] in unescape(shown.says) and len(results) == 2
        assert shown.strip.count("<img") == 4 * len(results[0].points) and shown.table.count("<table") == 2
        assert "text/csv;base64" in shown.download and "application/json;base64" in shown.download
        assert "Stored" in sweep.stored_status(studio, results)

    def test_the_tab_opens_with_them(self, page: tuple[SweepTab, Held]) -> None:
        tab, held = page
        assert held.values[tab.plot]["alt"] and "Stored sweep" in held.values[tab.status]
        assert held.values[tab.results] == () and held.values[tab.busy] is False

    def test_a_prompt_without_sweep_says_so(self, page: tuple[SweepTab, Held]) -> None:
        tab, held = page
        shown = tab.change_subject(held.set({tab.prompt: NURSE}))
        assert shown[tab.plot] is None and shown[tab.results] == () and "Run sweep" in shown[tab.status]

    def test_the_other_axis_shows_the_same_sweeps(self, page: tuple[SweepTab, Held]) -> None:
        tab, held = page
        shown = tab.change_measure(held.set({tab.measure: "share"}))
        assert list(shown) == [tab.plot] and "share male" in shown[tab.plot]["alt"] and "%" in shown[tab.plot]["alt"]

    def test_a_model_without_prompts_has_its_sweep(self, prompt_free_lens: DiffusionLens) -> None:
        assert sweep_view(stored(Studio(prompt_free_lens), None, "gender"), "share").plot is not None

    def test_a_sweep_of_another_setting_is_named(self, copied_lens: Any) -> None:
        folder = copied_lens()
        assert foreign_lines(Studio(DiffusionLens.from_pretrained(folder))) == []
        lens = DiffusionLens.from_pretrained(folder)
        text = json.loads((folder / "lens.json").read_text())
        text["settings"]["gender"]["n_features"] += 1
        changed = Studio(replace(lens, manifest=type(lens.manifest).model_validate(text)))
        assert len(changed.foreign) == 2, "its sweep and the control"
        assert "3 features" in foreign_lines(changed)[0] and "ships 4 features" in foreign_lines(changed)[0]
        assert "another setting" in sweep.stored_status(changed, stored(changed, PROMPTS[0], "gender"))


class TestSubject:
    def test_the_tab_follows_explore(self, page: tuple[SweepTab, Held]) -> None:
        tab, held = page
        assert untouched(tab.follow_explore(held.values)), "it stands on Explore's subject already"
        moved = held.take(tab.explore.take_subject(held.values, NURSE, "age"))
        assert untouched(tab.follow_explore({**moved, tab.busy: True})), "a sweep is running"
        shown = tab.follow_explore(moved)
        assert (shown[tab.prompt]["value"], shown[tab.attribute]["value"]) == (NURSE, "age")
        assert "Run sweep" in shown[tab.status]

    def test_explore_follows_the_tab(self, page: tuple[SweepTab, Held]) -> None:
        tab, held = page
        taken = tab.tell_explore(held.set({tab.prompt: NURSE}))
        assert taken[tab.explore.pane]["value"]["view"]["prompt"] == NURSE


class TestRuns:
    def test_what_goes_to_a_lent_gpu_and_back_can_be_sent(self, studio: Studio, view: View) -> None:
        request = asked(view, n=2)
        assert pickle.loads(pickle.dumps(request)) == request
        for sent in sweep.run(studio, "a", request):
            assert pickle.dumps(sent)

    def test_points_come_one_by_one(self, page: tuple[SweepTab, Held], view: View) -> None:
        tab, held = page
        request = asked(view, grid="5 strengths", controls=["random features"])
        steps = list(tab.run_sweep(held.set(choices(tab, request)), visitor("a")))
        seen = [[len(r.points) for r in step[tab.results]] for step in steps if isinstance(step[tab.results], tuple)]
        assert seen == [[1], [2], [3], [4], [5], *([5, n] for n in range(1, 6))]
        last = steps[-1]
        assert "Done" in last[tab.status] and last[tab.start]["visible"] is True and last[tab.busy] is False
        assert steps[0][tab.start]["visible"] is False and steps[0][tab.busy] is True

    def test_the_numbers_are_those_of_the_lens(self, studio: Studio, view: View) -> None:
        *_, last = jobs.sweep_events(studio, "a", sweep.read_job(studio, asked(view)))
        expected = studio.lens.sweep(view.prompt, "gender", n=16)
        assert last.done == pytest.approx(1.0)
        assert [p.shares for p in last.results[0].points] == [p.shares for p in expected.points]

    def test_stop_keeps_what_was_measured(self, page: tuple[SweepTab, Held], view: View) -> None:
        tab, held = page
        run = tab.run_sweep(held.set(choices(tab, asked(view, grid="9 strengths", n=64))), visitor("b"))
        steps = [next(run)]
        while not isinstance(steps[-1][tab.results], tuple):
            steps.append(next(run))
        tab.stop_run(visitor("b"))
        steps += list(run)
        assert "Stopped" in steps[-1][tab.status] and steps[-1][tab.stop]["visible"] is False
        assert tab.studio.draw(view), "the lane is free again"

    def test_stop_counts_as_soon_as_its_button_is_there(self, page: tuple[SweepTab, Held], view: View) -> None:
        tab, held = page
        run = tab.run_sweep(held.set(choices(tab, asked(view, grid="9 strengths", n=256))), visitor("early"))
        assert next(run)[tab.stop]["visible"] is True
        tab.stop_run(visitor("early"))  # before the first image was asked for
        *_, last = run
        assert "Stopped" in last[tab.status] and last[tab.stop]["visible"] is False

    def test_nobody_without_a_name_stops_another(self, page: tuple[SweepTab, Held], view: View) -> None:
        """Two who act before their page has told its name run side by side, and end by themselves."""
        tab, held = page
        values = dict(held.set(choices(tab, asked(view, grid="5 strengths"))))
        first = tab.run_sweep(values, visitor(None))
        next(first)
        *_, second = tab.run_sweep(values, visitor(None))
        *_, first_last = first
        assert "Done" in first_last[tab.status] and "Done" in second[tab.status]

    def test_leaving_ends_the_work(self, studio: Studio, view: View) -> None:
        events = jobs.sweep_events(studio, "gone", sweep.read_job(studio, asked(view, grid="9 strengths", n=256)))
        next(events)
        events.close()
        with studio.lane.hold(urgent=False):
            pass  # free: the job's thread has let go

    @pytest.mark.parametrize(("changes", "said"), [
        ({"prompt": "an astronaut"}, "never saw"), ({"n": 10**6}, "images per strength"),
        ({"attribute": "wealth"}, "does not steer"),
    ])  # fmt: skip
    def test_bad_sweeps_are_refused(
        self, page: tuple[SweepTab, Held], view: View, changes: dict[str, Any], said: str
    ) -> None:
        tab, held = page
        (step,) = tab.run_sweep(held.set(choices(tab, asked(view, **{"prompt": NURSE, **changes}))), visitor("a"))
        assert said in step[tab.status] and 'role="alert"' in step[tab.status]
        assert step[tab.start]["visible"] is True and step[tab.busy] is False


def test_a_visitor_always_has_a_name() -> None:
    assert visitor_of(visitor("me")) == "me"
    names = {visitor_of(visitor(None)), visitor_of(visitor("")), visitor_of(SimpleNamespace())}  # type: ignore[arg-type]
    assert len(names) == 3 and all(names)
