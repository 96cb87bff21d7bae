"""The Methods tab without a browser: stored tables, declared options, fits of any method beside DiffLens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS
from measured import row_with

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.registry import METHODS
from diffusion_lens.results.comparison import Measured
from diffusion_lens.results.comparison_tables import NOT_MEASURED, PARTS
from diffusion_lens.studies.bench.run import CompareConfig, Comparison, run_compare
from diffusion_lens.studio import cards, methods_live, state
from diffusion_lens.studio.methods_live import EVEN, MethodBench, News, Trio, Wish, option_fields, read_options
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import explore_handlers, methods_views
from diffusion_lens.ui import methods_handlers as handlers
from diffusion_lens.ui.explore_handlers import N_PLAIN, Page

LOST = next(iter(handlers.LOSSES))


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
def bench(tiny_lens: DiffusionLens) -> MethodBench:
    """All visitors' bench on the tiny lens, which holds no comparison."""
    return MethodBench(Studio(tiny_lens))


@pytest.fixture
def view(tiny_lens: DiffusionLens) -> View:
    """A turn that changes something."""
    return replace(state.default_view(tiny_lens), beta=3.0)


def asked(bench: MethodBench, view: View, visitor: str = "a") -> tuple[Page, list[Any]]:
    """Explore's page and controls for a view."""
    slots = cards.slots(bench.studio.lens, view)
    return Page(visitor, slots), explore_handlers.control_values(bench.studio, view, slots)


def finished(news: Iterator[News]) -> Trio:
    """The pictures at the end of a stream."""
    *_, last = news
    assert last.trio is not None
    return last.trio


class TestStored:
    def test_without_a_comparison_the_page_says_how_to_make_one(self, bench: MethodBench) -> None:
        first, *rest = handlers.compared(bench.studio, "gender", "balance", LOST)
        assert "python -m diffusion_lens compare --store" in first and "-a gender" in first
        assert rest[:6] == ["", None, "", None, "", ""] and rest[6]["visible"] is False

    def test_a_foreign_comparison_is_named_and_nothing_else_breaks(
        self, comparison: Comparison, copied_lens: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = copied_lens()
        DiffusionLens.from_pretrained(folder).store(comparison)
        lens = DiffusionLens.from_pretrained(folder)
        changed = DiffusionLens(folder, lens.manifest.model_copy(update={"sae_id": "another"}))
        first, *_ = handlers.compared(Studio(changed), "gender", "balance", LOST)
        assert "measured on another SAE" in first and "Nothing to compare" in first

    def test_a_stored_comparison_is_shown(self, comparison: Comparison, copied_lens: Callable[[], Path]) -> None:
        folder = copied_lens()
        DiffusionLens.from_pretrained(folder).store(comparison)
        studio = Studio(DiffusionLens.from_pretrained(folder))
        for part in PARTS:
            verdict, table, trade, says, across, _, notes, plots = handlers.compared(studio, "gender", part, LOST)
            assert table.count("<tr") == 1 + len(comparison.rows) and ("Best value" in verdict or "No" in verdict)
            assert (
                plots["visible"] is True and "24 images per method" in table and "12 at every other strength" in table
            )
            figure = json.loads(trade["figure"])
            assert {t["name"] for t in figure["data"] if "name" in t} == {"DiffLens", "Mid-block bypass"}
            assert "DiffLens" in says and "strengths" in across["alt"] and comparison.classifier_id in notes
        assert "Nothing to compare" in handlers.compared(studio, "age", "balance", LOST)[0]

    def test_the_table_marks_the_best_and_says_what_is_missing(self, comparison: Comparison) -> None:
        a, b, c = (
            row_with(row, fd=Measured(fd, (fd, fd))) for row, fd in zip(comparison.rows, (0.4, 0, 0), strict=True)
        )
        rows = (a, replace(b, strength=1.0, kept=0.5, fid=None), replace(c, strength=1.0, kept=0.75, fid=None))
        table = replace(comparison, rows=rows)
        html = methods_views.table_html(table, "likeness")
        line = html.split(f"<th scope='row'>{c.name}</th>")[1].split("</tr>")[0]
        assert "★" in line.split("0.750")[0].split("<td")[-1]
        assert html.split(f"<th scope='row'>{b.name}</th>")[1].split("</tr>")[0].count(NOT_MEASURED) == 1
        silent = replace(table, rows=(a, replace(b, note="<no prompt>"), c))
        assert "not run: &lt;no prompt&gt;" in methods_views.table_html(silent, "balance")


class TestOptions:
    def test_every_declared_option_is_drawn_and_read_back(self) -> None:
        for method in METHODS.values():
            fields = option_fields(method)
            assert {f.name for f in fields} == set(method.options.model_fields) - methods_live.HIDDEN
            told = json.loads(read_options(method, tuple(f.default for f in fields)))
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
        fields = option_fields(METHODS["ddm"])
        values = [f.default for f in fields]
        values[[f.name for f in fields].index("iterations")] = 0
        with pytest.raises(LensError, match="options of DDM: 'iterations' is wrong"):
            read_options(METHODS["ddm"], tuple(values))
        values = [3.0 if f.name == "iterations" else f.default for f in fields]
        assert json.loads(read_options(METHODS["ddm"], tuple(values)))["iterations"] == 3


class TestLive:
    def test_the_images_are_those_of_the_method_itself(self, bench: MethodBench, view: View) -> None:
        lens = bench.studio.lens
        wish = Wish("activation", 2.0, options=read_options(METHODS["activation"], tuple(
            f.default for f in option_fields(METHODS["activation"]))))  # fmt: skip
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
        unet = bench.studio.lens.model.unet
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


class TestHandlers:
    def test_choices_leave_out_difflens_and_keep_what_was_chosen(self) -> None:
        update = handlers.start_methods("ddm")
        assert update["value"] == "ddm" and len(update["choices"]) == len(METHODS) - 1
        assert handlers.start_methods(None)["value"] == handlers.FIRST_METHOD

    def test_a_method_says_what_it_is_and_what_it_costs(self, bench: MethodBench, view: View) -> None:
        page, values = asked(bench, view)
        for key, method in METHODS.items():
            html, aim, strength = handlers.describe(bench, page, key, handlers.AIMS[0], values)
            assert methods_views.escape(method.explanation) in html and "Source:" in html
            assert aim["interactive"] == (method.aim == "class")
            assert strength["maximum"] == max(method.strengths) and strength["value"] in method.strengths
            again = handlers.describe(bench, page, key, handlers.AIMS[0], values, html)
            assert "value" not in again[2], "coming back to the tab changes nothing"

    def test_a_run_ends_with_three_rows(self, bench: MethodBench, view: View) -> None:
        page, values = asked(bench, view)
        steps = list(handlers.run(bench, page, "bypass", EVEN, 0.75, (), values))
        shown, status, start, stop = steps[-1]
        assert shown.count("<img") == 24 and shown.count("dl-bar") == 3 and "95 %" in shown
        assert "before" in status and "how often" in status
        assert start["visible"] is True and stop["visible"] is False and steps[0][3]["visible"] is True

    @pytest.mark.parametrize(("key", "strength", "place", "value", "said"), [
        (None, 1.0, None, None, "Choose a method"), ("bypass", "x", None, None, "must be a number"),
        ("bypass", 9.0, None, None, "lies between"), ("bypass", float("nan"), None, None, "lies between"),
        ("magic", 1.0, None, None, "no method"), ("bypass", 0.5, 0, "a portrait of an astronaut", "never saw"),
        ("control-prompt", 0.5, N_PLAIN - 1, 99, "β must lie"),
    ])  # fmt: skip
    def test_bad_wishes_are_one_sentence(
        self, bench: MethodBench, view: View, key: Any, strength: Any, place: Any, value: Any, said: str
    ) -> None:
        page, values = asked(bench, view)
        if place is not None:
            values[place] = value
        *_, (shown, status, start, _) = handlers.run(bench, page, key, EVEN, strength, (), values)
        assert said in status and 'role="alert"' in status and not isinstance(shown, str)
        assert start["visible"] is True
