"""The Methods tab without a browser: stored tables, declared options, fits of any method beside DiffLens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import gradio as gr
import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS
from markupsafe import escape
from panels import Held, untouched, visitor

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.registry import METHODS
from diffusion_lens.studies.bench.run import CompareConfig, Comparison, run_compare
from diffusion_lens.studio import methods_live, state
from diffusion_lens.studio.fits import FITS_VARIABLE, KeptFits
from diffusion_lens.studio.methods_live import EVEN, MethodBench, News, Trio, Wish, option_fields, read_options
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import methods_tab, methods_views
from diffusion_lens.ui.methods_tab import CompareQuestion, MethodsTab


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits on 24 images."""
    monkeypatch.setattr(methods_live, "fit_seeds", lambda: range(9_000_000, 9_000_024))


@pytest.fixture(scope="module")
def comparison(tiny_lens: DiffusionLens, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A table of two methods."""
    config = CompareConfig(attribute="gender", prompt=PROMPTS[0], methods=("difflens", "bypass"), n=24, n_tune=12,
                           n_fit=8, options={}, n_examples=2)  # fmt: skip
    return run_compare(tiny_lens, config, tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def bench(tiny_lens: DiffusionLens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MethodBench]:
    """All visitors' bench on the tiny lens, which holds no comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FITS_VARIABLE, str(tmp_path_factory.mktemp("fits")))
        yield MethodBench(Studio(tiny_lens))


@pytest.fixture
def view(tiny_lens: DiffusionLens) -> View:
    """A turn that changes something."""
    return replace(state.default_view(tiny_lens), beta=3.0)


@dataclass(frozen=True)
class Beside:
    """Explore as the tab needs it: a view, or the sentence why there is none."""

    now: View | LensError
    inputs: frozenset[Any] = frozenset()

    def view(self, values: object) -> View:
        """What Explore shows."""
        if isinstance(self.now, LensError):
            raise self.now
        return self.now

    def subject(self, values: object) -> tuple[str | None, str]:
        """Prompt and attribute."""
        return ("", "gender") if isinstance(self.now, LensError) else (self.now.prompt, self.now.attribute)


def page(bench: MethodBench, now: View | LensError) -> tuple[MethodsTab, Held]:
    """The tab beside Explore, and what a browser holds of it."""
    with gr.Blocks() as demo, gr.Tabs(), gr.Tab("Methods"):
        tab = methods_tab.components(bench, partial(methods_tab.run, bench), cast(Any, Beside(now)))
    return tab, Held(demo)


def finished(news: Iterator[News]) -> Trio:
    """The pictures at the end of a stream."""
    *_, last = news
    assert last.trio is not None
    return last.trio


class TestStored:
    def test_without_a_comparison_the_page_says_how_to_make_one(self, bench: MethodBench) -> None:
        shown = methods_tab.compare_view(bench.studio, CompareQuestion("gender", ""))
        assert "python -m diffusion_lens compare --store" in shown.headline and "-a gender" in shown.headline
        assert (shown.table, shown.curves, shown.more) == ("", "", "") and shown.measure["visible"] is False

    def test_a_foreign_comparison_is_named_and_nothing_else_breaks(
        self, comparison: Comparison, copied_lens: Callable[[], Path]
    ) -> None:
        folder = copied_lens()
        DiffusionLens.from_pretrained(folder).store(comparison)
        lens = DiffusionLens.from_pretrained(folder)
        changed = DiffusionLens(folder, lens.manifest.model_copy(update={"sae_id": "another"}))
        shown = methods_tab.compare_view(Studio(changed), CompareQuestion("gender", ""))
        assert "measured on another SAE" in shown.headline and "Nothing to compare" in shown.headline

    def test_a_stored_comparison_is_shown(self, comparison: Comparison, copied_lens: Callable[[], Path]) -> None:
        folder = copied_lens()
        DiffusionLens.from_pretrained(folder).store(comparison)
        studio = Studio(DiffusionLens.from_pretrained(folder))
        for measure in ("share male", "distance from the target", "share nobody"):
            shown = methods_tab.compare_view(studio, CompareQuestion("gender", measure))
            assert shown.table.count('scope="row"') == len(comparison.rows) - 1, "no steering is the ring in every row"
            assert "24 images a row" in shown.table and "12 images a point" in shown.curves
            assert shown.curves.count("<svg") == len(comparison.curves)
            assert comparison.classifier_id in shown.more and "text/csv;base64" in shown.more
            assert "balance" in shown.headline
        assert shown.measure["value"] == shown.measure["choices"][0], "an unknown measure falls back to the first"
        assert "Nothing to compare" in methods_tab.compare_view(studio, CompareQuestion("age", "")).headline

    def test_a_method_that_could_not_run_says_why(self, comparison: Comparison) -> None:
        a, b, c = comparison.rows
        table = replace(comparison, rows=(a, replace(b, note="<no prompt>", figures=None), c))
        shown = methods_views.compare_view(table, "gender", "", "male", "")
        assert "not run: &lt;no prompt&gt;" in shown.table and "not run: &lt;no prompt&gt;" in shown.more


class TestOptions:
    def test_every_declared_option_is_drawn_and_read_back(self) -> None:
        for method in METHODS.values():
            fields = option_fields(method)
            assert {f.name for f in fields} == set(method.options.model_fields) - methods_live.HIDDEN
            told = json.loads(read_options(method, {f.name: f.default for f in fields}))
            assert told == method.options.model_validate({}).model_dump(mode="json"), method.key

    def test_kinds_and_limits_come_from_the_declaration(self) -> None:
        fields = {f.name: f for f in option_fields(METHODS["ddm"])}
        assert fields["iterations"].kind == "whole" and fields["iterations"].low == 1
        assert fields["alpha"].kind == "number" and fields["alpha"].title == "α"
        assert fields["indicator_on"].choices == ("denoised latent", "predicted noise")
        sae = {f.name: f for f in option_fields(METHODS["difflens"])}
        assert sae["n_features"].optional and sae["n_features"].kind == "whole" and sae["n_features"].default is None
        assert sae["mode"].optional and sae["mode"].kind == "choice"
        assert option_fields(METHODS["stereoclinic"])[-1].kind in ("whole", "number", "choice", "switch")
        assert "adapter" not in {f.name for f in option_fields(METHODS["fine-tuning"])}

    def test_wrong_options_are_one_sentence(self) -> None:
        with pytest.raises(LensError, match="options of DDM: 'iterations' is wrong"):
            read_options(METHODS["ddm"], {"iterations": 0})
        assert json.loads(read_options(METHODS["ddm"], {"iterations": 3.0}))["iterations"] == 3


class TestLive:
    def test_the_images_are_those_of_the_method_itself(self, bench: MethodBench, view: View) -> None:
        lens = bench.studio.lens
        wish = Wish("activation", 2.0, options=read_options(METHODS["activation"], {}))
        trio = finished(bench.events("a", view, wish))
        fitted = METHODS["activation"].fit(lens, view.attribute, view.target, prompts=lens.prompts,
                                           seeds=range(9_000_000, 9_000_024))  # fmt: skip
        plain = lens.generate(view.prompt, fitted.edit(2.0), seeds=view.seeds, batch_size=8)
        assert np.array_equal(trio.other.images, plain.images)
        assert np.array_equal(trio.picture.after.images, bench.studio.draw(view).after.images)
        assert trio.goal == f"{view.target} 100%"
        known = bench.known(view, wish)
        assert known is not None and known.lens is lens and bench.estimate(view, wish) == 0
        finished(bench.events("b", view, replace(wish, strength=1.0)))
        assert bench.known(view, wish) is known

    def test_strength_0_is_the_model_as_it_is(self, bench: MethodBench, view: View) -> None:
        trio = finished(bench.events("a", view, Wish("bypass", 0.0)))
        assert np.array_equal(trio.other.images, trio.picture.before.images)

    def test_weights_come_back(self, bench: MethodBench, view: View) -> None:
        unet = bench.studio.lens.model.denoiser
        before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        flags = [p.requires_grad for p in unet.parameters()]
        plain = bench.studio.draw(view)
        options = json.dumps({"iterations": 2, "batch_size": 4, "rank": 2})
        trio = finished(bench.events("a", view, Wish("fine-tuning", 1.5, even=True, options=options)))
        after = unet.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        assert [p.requires_grad for p in unet.parameters()] == flags
        fresh = Studio(bench.studio.lens).draw(view)
        assert np.array_equal(fresh.after.images, plain.after.images)
        assert not np.array_equal(trio.other.images, trio.picture.before.images)

    def test_others_draw_while_a_method_is_fitted(self, bench: MethodBench, view: View) -> None:
        unsteered = Studio(bench.studio.lens).draw(view)
        options = json.dumps({"iterations": 6, "batch_size": 4, "rank": 2})
        events = bench.events("a", view, Wish("ddm", 1.0, even=True, options=options))
        assert "Fitting DDM" in next(events).text
        drawn = bench.studio.draw(view, "b")  # the model that visitors see is not the one that is fitted
        assert np.array_equal(drawn.after.images, unsteered.after.images)
        assert finished(events).name == "DDM"

    def test_a_fit_can_be_stopped(self, bench: MethodBench, view: View) -> None:
        options = json.dumps({"iterations": 400, "batch_size": 4, "rank": 2})
        wish = Wish("ddm", 1.0, even=True, options=options)
        for n_events in (0, 1):  # as soon as there is a button to press, and while it is fitted
            events = bench.events("c", view, wish)
            for _ in range(n_events):
                next(events)
            bench.studio.stops.stop("c:methods")
            with pytest.raises(Cancelled):
                list(events)
            assert bench.known(view, wish) is None
        assert finished(bench.events("d", view, Wish("bypass", 0.5))), "bench and lane are free again"

    def test_long_fits_are_told_and_refused(self, bench: MethodBench, view: View) -> None:
        usual = bench.estimate(view, Wish("ddm", 1.0, options='{"iterations": 150}'))
        long = bench.estimate(view, Wish("ddm", 1.0, options='{"iterations": 15000}'))
        assert 0 < usual < 100 < long
        with pytest.raises(LensError, match="minutes; choose fewer iterations"):
            next(bench.events("a", view, Wish("ddm", 1.0, options='{"iterations": 100000}')))

    def test_a_fit_is_found_again_after_a_restart(self, bench: MethodBench, view: View) -> None:
        wish = Wish("latent-editing", 1.0, options=read_options(METHODS["latent-editing"], {}))
        first = finished(bench.events("a", view, wish))
        restarted = MethodBench(bench.studio)
        assert restarted.estimate(view, wish) == 0 and restarted._own is None
        again = finished(restarted.events("a", view, wish))
        assert np.array_equal(first.other.images, again.other.images)
        other = replace(wish, options=read_options(METHODS["latent-editing"], {"draw_seed": 5}))
        assert restarted.known(view, other) is None, "other options are another fit"


class TestKept:
    def test_the_longest_unused_go_first(self, bench: MethodBench, view: View, tmp_path: Path) -> None:
        fitted = METHODS["bypass"].fit(
            bench.studio.lens, view.attribute, view.target, prompts=bench.studio.lens.prompts, seeds=range(4)
        )
        kept = KeptFits(tmp_path, max_fits=2)
        names = [kept.name("bypass", "lens", i) for i in range(3)]
        for age, name in enumerate(names[:2]):
            kept.keep(name, fitted)
            os.utime(tmp_path / name, (1000.0 + age, 1000.0 + age))
        assert kept.load(names[0], METHODS["bypass"], bench.studio.lens) is not None
        kept.keep(names[2], fitted)
        assert [kept.has(name) for name in names] == [True, False, True], "the first was used since"
        small = KeptFits(tmp_path, max_bytes=1)
        small.keep(kept.name("bypass", "lens", 4), fitted)
        assert not list(tmp_path.iterdir())

    def test_what_cannot_be_read_is_dropped_and_fitted_again(self, bench: MethodBench, tmp_path: Path) -> None:
        kept = KeptFits(tmp_path)
        (tmp_path / "bypass-0").mkdir()
        (tmp_path / "bypass-0" / "method.json").write_text("{")
        assert kept.load("bypass-0", METHODS["bypass"], bench.studio.lens) is None
        assert not kept.has("bypass-0") and kept.load("bypass-1", METHODS["bypass"], bench.studio.lens) is None


class TestHandlers:
    def test_choices_leave_out_difflens_and_keep_what_was_chosen(self, bench: MethodBench, view: View) -> None:
        tab, held = page(bench, view)
        update = tab.choose_first(held.set({tab.method: "ddm"}))[tab.method]
        assert update["value"] == "ddm" and len(update["choices"]) == len(METHODS) - 1
        assert tab.choose_first(held.set({tab.method: None}))[tab.method]["value"] == methods_tab.FIRST_METHOD

    def test_a_method_says_what_it_is_and_what_it_costs(self, bench: MethodBench, view: View) -> None:
        tab, held = page(bench, view)
        for key, method in METHODS.items():
            told = tab.tell(held.set({tab.method: key}))
            assert str(escape(method.explanation)) in told[tab.about] and "Source:" in told[tab.about]
            assert told[tab.aim]["interactive"] == (method.aim == "class")
            assert told[tab.strength]["maximum"] == max(method.strengths)
            assert told[tab.strength]["value"] in method.strengths
            held.take(told)
            assert untouched(tab.tell_once(held.values)), "coming back to the tab changes nothing"

    def test_a_run_ends_with_three_rows(self, bench: MethodBench, view: View) -> None:
        tab, held = page(bench, view)
        values = held.set({tab.method: "bypass", tab.aim: EVEN, tab.strength: 0.75})
        first, *_, last = tab.try_method(values, {}, visitor("a"))
        assert last[tab.shown].count("<img") == 24 and last[tab.shown].count("dl-bar") == 3
        assert "95 %" in last[tab.shown]
        assert "before" in last[tab.status] and "how often" in last[tab.status]
        assert last[tab.start]["visible"] is True and last[tab.stop]["visible"] is False
        assert first[tab.stop]["visible"] is True

    @pytest.mark.parametrize(("key", "strength", "problem", "said"), [
        (None, 1.0, None, "Choose a method"), ("bypass", "x", None, "must be a number"),
        ("bypass", 9.0, None, "lies between"), ("bypass", float("nan"), None, "lies between"),
        ("magic", 1.0, None, "no method"), ("bypass", 0.5, LensError("β must lie."), "β must lie."),
    ])  # fmt: skip
    def test_bad_wishes_are_one_sentence(
        self, bench: MethodBench, view: View, key: Any, strength: Any, problem: Any, said: str
    ) -> None:
        tab, held = page(bench, problem or view)
        values = held.set({tab.method: key, tab.aim: EVEN, tab.strength: strength})
        *_, last = tab.try_method(values, {}, visitor("a"))
        assert said in last[tab.status] and 'role="alert"' in last[tab.status] and last[tab.shown] != ""
        assert not isinstance(last[tab.shown], str)
