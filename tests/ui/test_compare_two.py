"""Compare two: the same seeds on both sides, pairs only where there are any, and what differs by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffusion_lens.base.types import Attribute, LensError, Predictions
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.compare_two import Side, Two, compare_two, two_of
from diffusion_lens.studio.state import default_view
from diffusion_lens.studio.studio import Row, Studio
from diffusion_lens.ui.compare_two import Asked, SideAsked, draw, first_sides, headline, table_rows, title


@pytest.fixture(scope="module")
def studio(tiny_lens: DiffusionLens) -> Studio:
    return Studio(tiny_lens)


def side(studio: Studio, beta: float = 1.0, **changes: Any) -> Side:
    return Side(studio, replace(default_view(studio.lens, changes.pop("attribute", "gender")), beta=beta, **changes))


def both(first: Side, second: Side) -> Two:
    *rows, two = compare_two(first, second, "somebody")
    assert len(rows) == 1 and isinstance(two, Two)
    np.testing.assert_array_equal(rows[0].images, two.rows[0].images)
    return two


def test_two_prompts_are_drawn_on_the_same_seeds(studio: Studio) -> None:
    doctor, nurse = studio.lens.prompts[:2]
    two = both(side(studio, prompt=doctor, first_seed=3), side(studio, prompt=nurse, first_seed=99, n_seeds=16))
    for row, prompt in zip(two.rows, (doctor, nurse), strict=True):
        drawn = studio.lens.generate(prompt, seeds=range(3, 11), batch_size=8)
        np.testing.assert_array_equal(row.images, drawn.images)
    assert two.paired and two.reads[0].attribute.name == "gender" and len(two.reads) == 3


def test_two_edits_show_what_each_does(studio: Studio) -> None:
    two = both(side(studio), side(studio, 6.0, attribute="age"))
    assert [r.attribute.name for r in two.reads][:2] == ["gender", "age"]
    turn = studio.lens.intervention("age", "old", 6.0)
    drawn = studio.lens.generate(two.sides[1].view.prompt, turn, seeds=range(8), batch_size=8)
    np.testing.assert_array_equal(two.rows[1].images, drawn.images)


def test_two_lenses_are_no_pairs(studio: Studio, prompt_free_lens: DiffusionLens) -> None:
    other = Studio(prompt_free_lens, studio)
    two = both(side(studio), side(other))
    assert not two.paired and two.reads
    assert all(not r.changes and not r.differ.any() for r in two.reads)
    assert "Two models" in headline(two) and all(row["difference"] == "–" for row in table_rows(two))
    assert "without a prompt" in title(two.sides[1], several=True) and "prompt-free" in title(two.sides[1], True)


def test_the_same_thing_twice_is_refused_and_so_is_what_cannot_be_drawn(studio: Studio) -> None:
    with pytest.raises(LensError, match="Both sides are the same"):
        list(compare_two(side(studio, 2.0), side(studio, 2.0)))
    with pytest.raises(LensError, match="Both sides are the same"):
        list(compare_two(side(studio), side(studio, attribute="age")))
    with pytest.raises(LensError, match="never saw"):
        list(compare_two(side(studio), side(studio, prompt="a zebra")))


GENDER = Attribute("gender", ("female", "male"))
HATS = Attribute("hats", ("none", "hat"))


def by_hand(**labels: tuple[list[int], list[int]]) -> tuple[Row, Row]:
    """Two rows with these labels; -1 is uncertain."""
    known = {"gender": GENDER, "hats": HATS}
    rows = []
    for number in range(2):
        readings = {
            name: Predictions.from_labels(np.maximum(own[number], 0), np.array(own[number]) >= 0, known[name], "c")
            for name, own in labels.items()
        }
        n = len(next(iter(readings.values())).certain)
        own = readings["gender"]
        rows.append(Row(np.zeros((n, 4, 4, 3), np.uint8), own.labels, own.certain, None, readings))
    return rows[0], rows[1]


def test_what_differs_by_hand(studio: Studio) -> None:
    gender = ([0, 0, 0, 0, 0, 0, 0, -1], [0, 1, 1, 1, 1, 1, 1, 1])
    hats = ([0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0])
    two = two_of((side(studio), side(studio, 2.0)), by_hand(gender=gender, hats=hats))
    read = two.reads[0]
    assert read.differ.tolist() == [False, True, True, True, True, True, True, False]
    assert read.names[0][-1] == "uncertain" and read.names[1][1] == "male"
    men = read.changes[1]
    assert (men.before, men.after, men.n) == (0.0, 6 / 7, 7) and men.interval[0] > 0
    assert headline(two) == "Read differently, of 8 pairs: gender in 6, hats in 1."
    rows = table_rows(two)
    assert [(r["attribute"], r["label"], r["a"], r["b"], r["sure"]) for r in rows] == [
        ("gender", "female", "7 of 7", "1 of 8", True), ("gender", "male", "0 of 7", "7 of 8", True),
    ]  # fmt: skip
    alike = two_of((side(studio), side(studio, 2.0)), by_hand(gender=(gender[0], gender[0])))
    assert headline(alike) == "The classifier reads both rows alike, image by image."


def asked(studio: Studio, *betas: Any, **changes: Any) -> Asked:
    name, prompt = studio.lens.manifest.name, studio.lens.prompts[0]
    first, second = (SideAsked(name, prompt, "gender", "male", beta) for beta in betas)
    return Asked((first, replace(second, **changes)), 8, 0)


def test_a_visitor_sees_row_by_row_and_then_what_differs(studio: Studio) -> None:
    begun, half, done = draw([studio], "somebody", asked(studio, 1, 6.0))
    assert begun.rows is not None and begun.rows.count("dl-two-blank") == 16 and "<img" not in begun.rows
    assert half.rows is not None and half.rows.count("<img") == 8 and half.table is None
    assert done.rows is not None and done.rows.count("<img") == 16 and done.table is not None
    assert "pushed towards male, β = 6" in done.rows and "as the model draws it" in done.rows
    assert done.rows.count('alt="A, seed') == 8 and "<table>" in done.table


@pytest.mark.parametrize(
    ("betas", "changes", "words"),
    [
        ((1, 1), {}, "Both sides are the same"),
        ((1, "much"), {}, "must be a number"),
        ((1, 99.0), {}, "must lie between"),
        ((1, 2.0), {"prompt": "a <b>zebra</b>"}, "never saw"),
        ((1, 2.0), {"attribute": "height"}, "does not steer"),
        ((1, 2.0), {"target": "neither"}, "no class of gender"),
    ],
)
def test_a_mistake_is_one_sentence(studio: Studio, betas: Any, changes: dict[str, Any], words: str) -> None:
    last = list(draw([studio], "somebody", asked(studio, *betas, **changes)))[-1]
    assert words in last.status and "dl-bad" in last.status and "<b>zebra" not in last.status


def test_it_begins_with_two_prompts_or_with_a_push(studio: Studio, prompt_free_lens: DiffusionLens) -> None:
    first, second = first_sides(studio)
    assert first.beta == second.beta == 1 and first.prompt != second.prompt and second.prompt
    still, pushed = first_sides(Studio(prompt_free_lens))
    assert still.beta == 1 < pushed.beta and still.prompt is pushed.prompt is None
