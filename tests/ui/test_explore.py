"""Explore without a browser: what a page may ask for, what it is shown, and that a mix is measured as it stands."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffusion_lens import ui
from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studio import curves, feature_rows, mix, state
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import explore_handlers as handlers
from diffusion_lens.ui import scene, words


@pytest.fixture(scope="module")
def studio(tiny_lens: DiffusionLens) -> Studio:
    """All visitors' studio on the tiny lens."""
    return Studio(tiny_lens)


@pytest.fixture
def view(tiny_lens: DiffusionLens) -> View:
    """The opening prompt and attribute, unchanged."""
    return state.default_view(tiny_lens)


def asks(view: View, **more: Any) -> dict[str, Any]:
    """What a page sends, through JSON."""
    return dict(json.loads(json.dumps({"view": state.to_values(view), "serial": 7, **more})))


def last(scenes: Any) -> dict[str, Any]:
    """Everything that a page was told, the newest of each."""
    told: dict[str, Any] = {}
    for news in scenes:
        told |= json.loads(json.dumps(news, allow_nan=False))
    return told


def outsider(lens: DiffusionLens, view: View) -> int:
    """A live feature that is not of the set."""
    known = set(feature_rows.members(lens, view))
    return next(i for i in range(32) if i not in known and lens.atlas.activity[i] > 0)


class TestAsking:
    @pytest.mark.parametrize("changes", [
        {}, {"prompt": ""}, {"beta": 2.25, "window": (1, 3), "sampler": "symmetric", "n_seeds": 16},
        {"own": ((1, -1.5), (30, 3.0)), "solo": (30,), "hold": ("age",)}, {"first_seed": 2**40, "n_features": 1},
        {"where": ("####", "#..#", "#..#", "####")},
    ])  # fmt: skip
    def test_a_view_comes_back_from_the_page(self, studio: Studio, view: View, changes: dict[str, Any]) -> None:
        wanted = replace(view, **changes)
        assert handlers.read_view(studio, asks(wanted)) == wanted

    @pytest.mark.parametrize("bad", [
        {"beta": "x"}, {"beta": None}, {"beta": 99}, {"own": [1]}, {"own": {"x": 1}},
        {"own": {"1": "nan"}}, {"own": {"99": 1}},
        {"window": 3}, {"window": [3, 1]}, {"hold": ["wealth"]}, {"attribute": "wealth"}, {"target": "robot"},
        {"sampler": ["asymmetric"]}, {"n_seeds": 1000}, {"prompt": "an astronaut"}, {"solo": [77]},
        {"where": ["..#."] * 9}, {"where": ["?..."] * 4}, {"where": ["....", "#"]},
    ])  # fmt: skip
    def test_what_cannot_be_drawn_is_one_sentence(self, studio: Studio, view: View, bad: dict[str, Any]) -> None:
        told = last(handlers.draw(studio, "a", {"view": {**state.to_values(view), **bad}, "serial": 3}))
        assert told["alert"].endswith(".") and told["serial"] == 3 and "pictures" not in told

    @pytest.mark.parametrize(
        "value", [None, [], "x", {"view": 5}, {"query": "?v=1&a=" + "x" * 5000}, {"query": "?v=9"}]
    )
    def test_anything_else_is_answered_too(self, studio: Studio, value: Any) -> None:
        told = last(handlers.draw(studio, "a", value))
        assert told.get("alert") or "pictures" in told

    def test_more_features_than_fit_are_refused(self, tiny_lens: DiffusionLens, view: View) -> None:
        with pytest.raises(LensError, match="64"):
            state.check(tiny_lens, replace(view, own=tuple((i % 32, 1.0) for i in range(65))))

    def test_a_link_sets_everything(self, studio: Studio, view: View) -> None:
        own = tuple((i, 2.0) for i in range(8))
        wanted = replace(view, prompt="a portrait of a nurse", beta=2.5, own=own)
        told = last(handlers.draw(studio, "a", {"query": state.to_query(wanted), "serial": 1}))
        assert told["adopt"] and state.from_values(studio.lens, told["view"]) == wanted
        assert set(range(8)) <= {row["id"] for row in told["rows"]["shown"]}, "none of them is dropped"


class TestShowing:
    def test_it_opens_unchanged_with_what_is_stored(self, studio: Studio) -> None:
        first = last([handlers.first_scene(studio)])
        view = state.from_values(studio.lens, first["view"])
        assert view.beta == state.scale(studio.lens.setting(view.attribute)).identity
        pictures = first["pictures"]
        assert pictures["stored"] and len(pictures["before"]["images"]) == view.n_seeds
        assert pictures["before"]["labels"] == pictures["after"]["labels"]

    def test_images_and_readings_are_those_of_the_lens(self, studio: Studio, view: View) -> None:
        wanted = replace(view, beta=3.0)
        told = last(handlers.draw(studio, "a", asks(wanted)))
        picture = studio.draw(wanted)
        for name, read in picture.after.readings.items():
            assert told["pictures"]["after"]["labels"][name] == np.where(read.certain, read.labels, -1).tolist()
        assert told["pictures"]["after"]["images"] == scene.picture_values(picture)["after"]["images"]
        assert told["serial"] == 7 and told["pending"] is False and told["curve"]["of"] == "this"
        assert state.to_query(wanted) in told["link"]

    def test_unedited_images_are_sent_once(self, studio: Studio, view: View) -> None:
        wanted = replace(view, beta=2.0)
        told = last(handlers.draw(studio, "a", asks(wanted)))
        key = told["pictures"]["before"]["key"]
        again = last(handlers.draw(studio, "a", asks(replace(wanted, beta=2.5), known=key)))
        assert "images" in told["pictures"]["before"] and "images" not in again["pictures"]["before"]

    def test_a_draft_is_drawn_in_few_steps_and_not_read(self, studio: Studio, view: View) -> None:
        _ = studio.lens.model
        studio.draw(view)
        wanted = replace(view, beta=3.0, window=(1, 3))
        (news,) = handlers.draw(studio, "a", asks(wanted, draft=True))
        shown = news["pictures"]
        assert shown["draft"] and shown["after"]["labels"] == {} and len(shown["after"]["images"]) == 8

    def test_a_newer_drawing_ends_the_older(self, studio: Studio, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
        def superseded(*_: Any, **__: Any) -> Any:
            raise Cancelled

        monkeypatch.setattr(Studio, "draft", superseded)
        _ = studio.lens.model
        studio.draw(view)
        assert list(handlers.draw(studio, "a", asks(view, draft=True))) == []

    def test_a_failing_run_leaves_the_app_usable(
        self, studio: Studio, view: View, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = asks(replace(view, beta=2.75))
        with monkeypatch.context() as patch:
            patch.setattr(DiffusionLens, "edit", lambda *_: 1 / 0)
            assert "ZeroDivisionError" in last(handlers.draw(studio, "a", wanted))["alert"]
        assert last(handlers.draw(studio, "a", wanted))["alert"] == ""

    def test_a_model_without_prompts_is_steered(self, prompt_free_lens: DiffusionLens) -> None:
        studio = Studio(prompt_free_lens)
        view = state.default_view(prompt_free_lens)
        told = last(handlers.draw(studio, "a", asks(replace(view, beta=2.0))))
        assert view.prompt is None and told["sentence"]["subject"] is None and "p=" not in told["link"]
        assert len(told["pictures"]["after"]["images"]) == 8


class TestFeatures:
    def test_a_feature_is_added_to_what_is_steered_already(self, studio: Studio, view: View) -> None:
        other = outsider(studio.lens, view)
        first = handlers.with_features(studio, asks(replace(view, beta=2.0, own=((1, 3.0),))), [other])
        assert first.beta == 2.0 and dict(first.own) == {1: 3.0, other: 6.0}
        assert handlers.with_features(studio, asks(first), [other, 1]) == first
        assert handlers.with_features(studio, asks(view), []) == view

    def test_solo_steers_these_alone(self, tiny_lens: DiffusionLens, view: View) -> None:
        features, _ = state.poles(tiny_lens, view)
        (turn,) = state.interventions(tiny_lens, replace(view, beta=3.0, solo=features.ids[:1]))
        scales = {i: gain for i, gain, _ in turn.coefficients()}
        assert scales.pop(features.ids[0]) == 3.0 and set(scales.values()) == {1.0}
        other = outsider(tiny_lens, view)
        (alone,) = state.interventions(tiny_lens, replace(view, beta=3.0, own=((other, 2.0),), solo=(other,)))
        assert alone.features.ids == (other,) and alone.beta == 2.0

    def test_what_a_feature_does_alone_is_read_in_this_setting(self, studio: Studio, view: View) -> None:
        feature = state.poles(studio.lens, view)[0].ids[0]
        here = replace(view, beta=2.0, own=((5, 3.0),), sampler="symmetric")
        told = last(handlers.alone(studio, "a", asks(here, alone=feature)))["alone"]
        picture = studio.draw(replace(here, own=((feature, 6.0),), solo=(feature,)))
        before, after = (row.readings["glasses"] for row in (picture.before, picture.after))
        n = int((before.certain & after.certain & (before.labels != after.labels)).sum())
        assert told["id"] == feature and told["says"].startswith("alone at 6, here: ")
        assert (f"glasses {n} of 8" in told["says"]) <= (n > 0)
        assert "feature" in last(handlers.alone(studio, "a", asks(view, alone="x")))["alert"]

    def test_a_brush_steers_where_it_painted(self, studio: Studio, view: View) -> None:
        lens = studio.lens
        where = ("##..", "##..", "....", "....")
        assert state.grid(lens) == (4, 4)
        (steer,) = state.interventions(lens, replace(view, beta=3.0, where=where))
        assert steer == replace(lens.intervention(view.attribute, view.target, 3.0), where=where)
        told = last(handlers.draw(studio, "a", asks(replace(view, beta=3.0, where=where))))
        assert told["curve"]["of"] == "recommended" and "x=1100-1100-0000-0000" in told["link"]

    def test_every_feature_is_found_by_number_and_named_ones_by_word(self, studio: Studio, view: View) -> None:
        told = handlers.find(studio, {"view": state.to_values(view), "text": "#17"})
        assert told["rows"][0]["id"] == 17 and len(told["rows"][0]["thumbs"]) <= 3
        lines = scene.searched(studio.lens)
        word = next(line.text.split()[-1] for line in lines)
        hits = feature_rows.search(studio.lens, lines, word)
        assert hits and all(word in hit.text for hit in hits)
        sizes = [hit.effect.difference for hit in hits if hit.effect]
        assert sizes == sorted(sizes, reverse=True) and len({hit.feature for hit in hits}) == len(hits)
        assert feature_rows.search(studio.lens, lines, "no such thing") == ()

    @pytest.mark.parametrize(
        "question", [None, 5, {}, {"n": "x"}, {"text": None}, {"ids": "12"}, {"ids": [1.5, "x", -1, 10**9]}]
    )
    def test_strange_questions_find_nothing(self, studio: Studio, question: Any) -> None:
        assert handlers.find(studio, question)["rows"] == []

    def test_all_rows_of_the_set_can_be_had(self, studio: Studio, view: View) -> None:
        told = handlers.find(studio, {"view": state.to_values(view), "n": 200})
        assert [row["id"] for row in told["rows"]] == list(feature_rows.members(studio.lens, view))


class TestMixes:
    def test_a_mix_is_measured_as_it_stands(self, studio: Studio, view: View) -> None:
        """Points are those of a sweep made by hand with the same interventions, on the same seeds."""
        lens = studio.lens
        mixed = replace(view, own=((outsider(lens, view), 4.0), (state.poles(lens, view)[0].ids[0], 1.0)))
        *_, event = mix.mix_events(studio, "a", mixed, n=16)
        main, control = event.results
        assert control.is_control and not main.is_control and len(control.points) == 3
        for point in main.points:
            images = lens.generate(
                lens.request(mixed.prompt, range(16)), *state.interventions(lens, replace(mixed, beta=point.beta))
            ).images
            assert np.array_equal(point.labels, lens.classify(images)[mixed.attribute].labels)
        curve = curves.curve_for(studio, replace(mixed, beta=2.0))
        assert curve is not None and curve.of == "this" and curve.points[0].n <= 16
        assert curves.curve_for(studio, view).of == "this"  # type: ignore[union-attr]
        another = curves.curve_for(studio, replace(mixed, sampler="symmetric"))
        assert another is not None and another.of == "recommended"

    def test_the_control_has_the_same_size_and_strengths(self, tiny_lens: DiffusionLens, view: View) -> None:
        features, opposite = state.poles(tiny_lens, replace(view, n_features=2))
        assert opposite is not None
        mixed = replace(view, n_features=2, beta=2.0, own=((features.ids[0], 3.0), (opposite.ids[0], 1.0)))
        found = state.interventions(tiny_lens, mixed)
        control = mix.control_of(found, tiny_lens.atlas.activity)
        ours, theirs = (sorted(gain for i in made for _, gain, _ in i.coefficients()) for made in (found, control))
        assert ours == theirs
        drawn = {f for i in control for f, _, _ in i.coefficients()}
        assert not drawn & {f for i in found for f, _, _ in i.coefficients()}

    def test_a_page_follows_the_measuring(self, studio: Studio, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mix.mix_events, "__defaults__", (8,))
        news = list(handlers.measure(studio, "a", asks(replace(view, sampler="symmetric"))))
        assert news[0]["measuring"]["done"] == 0 and news[-1]["measuring"] is None and news[-1]["curve"]["of"] == "this"

    def test_the_other_class_has_the_mirrored_curve(self, studio: Studio, view: View) -> None:
        there = curves.curve_for(studio, view)
        assert there is not None
        other = studio.lens.attribute_named(view.attribute).opposite(view.target)
        assert other is not None
        sweep: SweepResult = next(s for s in studio.sweeps(view.prompt, view.attribute) if not s.is_control)
        told = curves.told_betas(studio.lens, sweep, other)
        assert told is None or told == tuple(2 - beta for beta in sweep.betas)
        back = curves.of_results(studio.lens, [sweep], replace(view, target=other), "this")
        if back is not None:
            assert [p.share for p in back.points] == pytest.approx([1 - p.share for p in there.points][::-1])


def test_the_sentence_counts_in_tens(studio: Studio, view: View) -> None:
    told = scene.sentence(studio.lens, view)
    assert told["says"] and told["target"] == "men" and told["subject"] == "a doctor"
    assert words.in_ten("gender", "female", 0.91) == "9 women in 10"
    assert words.in_ten("gender", "female", 0.96) == "almost only women"
    assert words.in_ten("age", "old", 0.3) == "3 in 10 old people"
    assert words.subject("") == "nothing in particular" and words.subject("a portrait of a ceo") == "a CEO"


def test_other_tabs_read_and_set_what_is_on_screen(tiny_lens: DiffusionLens, view: View) -> None:
    import gradio as gr

    studio = Studio(tiny_lens)
    with gr.Blocks():
        made = ui.explore.layout(studio)
    values = {made.pane: asks(replace(view, beta=2.5))}
    assert made.view(values) == replace(view, beta=2.5) and made.subject(values) == (view.prompt, view.attribute)
    spec = made.edit_spec(values)
    assert spec is not None and spec.interventions == (tiny_lens.intervention(view.attribute, view.target, 2.5),)
    taken = made.take_subject(values, "a portrait of a nurse", "age")[made.pane]["value"]["view"]
    assert (taken["prompt"], taken["attribute"], taken["beta"]) == ("a portrait of a nurse", "age", 1.0)
    added = made.steer_features(values, [5, 6])[made.pane]["value"]["view"]
    assert added["own"] == {"5": 6.0, "6": 6.0} and added["beta"] == 2.5
    assert "value" not in made.steer_features(values, [10**6])[made.pane]
