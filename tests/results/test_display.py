"""How results show themselves in a terminal, a table, a notebook and a figure."""

from __future__ import annotations

import numpy as np
import pytest
from dissected import dissection
from measured import counted, measured

import diffusion_lens
from diffusion_lens.base.types import Attribute, Generation, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results import display
from diffusion_lens.results.sweeps import SweepPoint, collect

GENDER = Attribute("gender", ("female", "male"))


def run() -> diffusion_lens.Measurement:
    """Ten images, three of them male, against five."""
    before = measured({GENDER: counted(GENDER, 5, 5)})
    images = np.zeros((3, 8, 8, 3), np.uint8)
    return measured({GENDER: counted(GENDER, 7, 3)}, examples=images, reference=before)


def test_reprs_are_short_and_say_what_was_measured(tiny_lens: DiffusionLens) -> None:
    assert repr(run()) == "Measurement(10 images of 'a portrait', unedited; gender)"
    assert repr(run()["gender"]) == "Figures(gender: 7 female, 3 male, 0 undecided)"
    base = tiny_lens.generate(tiny_lens.prompts[0], seeds=range(3), capture=True)
    sweep = tiny_lens.sweep(tiny_lens.prompts[0], "gender", n=12)
    for shown in (tiny_lens, base, base.activations, sweep, sweep.points[0], tiny_lens.atlas, tiny_lens.card(0),
                  tiny_lens.attributions["gender"], tiny_lens.measure(base).readings["gender"]):  # fmt: skip
        assert len(repr(shown)) < 1_200, type(shown)
    assert len(repr(tiny_lens)) < 200


def test_results_with_arrays_compare_and_hash_without_raising(tiny_lens: DiffusionLens) -> None:
    one, other = (tiny_lens.generate(tiny_lens.prompts[0], seeds=range(2)) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2
    assert run() != run() and isinstance(hash(run()), int)


def test_tables_hold_counts_intervals_and_what_moved() -> None:
    frame = run().to_frame()
    assert list(frame["class"]) == ["female", "male"] and list(frame["count"]) == [7, 3]
    assert list(frame["moved"]) == pytest.approx([0.2, -0.2]) and (frame["low"] < frame["share"]).all()
    assert list(run()["gender"].to_frame()["n"]) == [10, 10]
    points = [SweepPoint(measured({GENDER: counted(GENDER, 10 - k, k)}), GENDER, beta=float(k)) for k in (2, 8)]
    sweep = collect(points, target="male", setting="by hand")
    frame = sweep.to_frame()
    assert list(frame["beta"]) == [2, 2, 8, 8] and list(frame["count"]) == [8, 2, 2, 8]
    assert frame["log ratio"].iloc[-1] == pytest.approx(np.log(8 / 2), abs=0.02)


def test_a_notebook_shows_pictures_and_escapes_words() -> None:
    html = run()._repr_html_()
    assert html.count("data:image/webp;base64,") == 1 and "<th>corrected</th>" in html
    assert "&lt;b&gt;" in display.page("<b>") and "<b>bold" not in display.page("<b>bold")


def test_one_attribute_and_a_dissection_show_themselves() -> None:
    shown = run()["gender"]._repr_html_()
    assert "7 female, 3 male" in shown and "<td>7</td>" in shown and shown.count("<img") == 1
    found = dissection("an SAE")
    frame = found.to_frame()
    assert len(frame) == 5 * 7 and frame["sure"].sum() == 6 and set(frame["feature"]) == {1, 2, 3, 4, 5}
    assert list(frame[(frame["feature"] == 3) & frame["sure"]]["difference"]) == [-0.75, 0.75]
    html = found._repr_html_()
    assert "<td>gender</td>" in html and "<td>glasses</td>" in html and "5 features in 5 turns" in repr(found)


def test_figures_are_drawn_of_what_has_one() -> None:
    assert [trace.name for trace in run()["gender"].plot().data] or run()["gender"].plot().data
    assert run().plot("gender").data
    with pytest.raises(LensError, match="Nothing is drawn of a str"):
        display.plot("text")


def test_the_package_offers_its_names() -> None:
    for name in diffusion_lens.__all__:
        assert getattr(diffusion_lens, name) is not None
    assert diffusion_lens.Generation is Generation
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffusion_lens.nothing
