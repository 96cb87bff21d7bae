"""What a stored comparison says: who reaches the target, what it cost, and what is no more than chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from measured import counted, measured

from diffusion_lens.base.types import Attribute, Predictions
from diffusion_lens.results.comparison import CompareConfig, Comparison, MethodRow
from diffusion_lens.results.measurement import Figures
from diffusion_lens.studio import compared

GENDER, HAIR = Attribute("gender", ("female", "male")), Attribute("hair", ("short", "long"))
N = 200


def figures(men: int, changed: int, *, of: int = 0) -> Figures:
    """``men`` of 200 images are read as male; hair of the images ``of`` to ``of + changed`` changed."""
    base = measured({GENDER: counted(GENDER, 180, 20), HAIR: np.zeros(N, int)})
    hair = np.zeros(N, int)
    hair[of : of + changed] = 1
    now = measured({GENDER: counted(GENDER, N - men, men), HAIR: hair})
    return Figures(replace(now, reference=base), GENDER)


def row(key: str, men: int, changed: int, **values: Any) -> MethodRow:
    """A row at strength 1."""
    return MethodRow(
        **{"method": key, "name": key, "kind": "", "is_control": key.startswith("control"), "goal": "even",
           "strength": 1.0, "strength_name": "x", "n_tune": 20, "figures": figures(men, changed), **values}
    )  # fmt: skip


def table(*rows: MethodRow) -> Comparison:
    """A comparison of these rows behind no steering."""
    config = CompareConfig(attribute="gender", prompt="a portrait of a nurse", n=N)
    return Comparison(config, GENDER, (0.5, 0.5), (row("unsteered", 20, 0, strength=0.0), *rows), {}, {}, "rule.", "l",
                      "s", "m", "c")  # fmt: skip


def test_the_headline_names_who_reaches_balance_and_what_costs_least() -> None:
    said = compared.headline(table(row("A", 100, 60), row("B", 102, 10), row("C", 40, 0), row("control-prompt", 98, 2)))
    assert said == (
        "On “a portrait of a nurse”, two of three methods and rewriting the prompt reach balance. Rewriting the prompt "
        "costs least (99% of other attributes kept; B 95%)."
    )


def test_a_difference_within_chance_is_not_called_less() -> None:
    said = compared.headline(table(row("A", 100, 12), row("B", 100, 10)))
    assert "Which costs least cannot be told: B and A change about as much" in said


def test_controls_that_reach_balance_are_named_and_nobody_is_praised_for_nothing() -> None:
    assert "so does control-random, a control" in compared.headline(
        table(row("A", 100, 0), row("control-random", 99, 0))
    )
    assert "none of two methods reaches balance" in compared.headline(
        table(row("A", 40, 0), row("B", 20, 0, strength=0.0))
    )
    assert "A alone of one methods" not in compared.headline(table(row("A", 100, 0)))


def test_what_was_kept_has_its_interval_over_images() -> None:
    found = compared.kept(row("A", 100, 50))
    assert found is not None and found.value == 0.75
    half = 1.96 * np.std([0] * 50 + [1] * 150, ddof=1) / np.sqrt(N)
    assert found.interval == pytest.approx((0.75 - half, 0.75 + half))


def test_the_star_needs_a_paired_interval_beyond_every_rival() -> None:
    near, far = row("A", 100, 4), row("B", 100, 60)
    stars = {r.row.method: r.starred for r in compared.shown(table(near, far, row("C", 30, 0)), "share male").results}
    assert stars == {"A": True, "B": False, "C": False}, "C keeps all and reaches nothing"
    close = compared.shown(table(near, row("B", 100, 6)), "share male").results
    assert not any(r.starred for r in close)


def test_the_noise_band_is_that_of_the_number_of_images() -> None:
    axis = compared.axis(table(row("A", 100, 0)), "share male", 200, [])
    assert axis.noise == (0.43, 0.57) and axis.goal == 0.5  # binomial, 95 % of 200 fair draws
    wide = compared.axis(table(row("A", 100, 0)), compared.DISTANCE, 20, [0.31])
    assert wide.high == pytest.approx(0.4) and wide.noise[1] > 0.2


def test_a_method_that_no_strength_helped_has_not_moved() -> None:
    shown = compared.shown(table(row("A", 20, 0, strength=0.0), row("B", 100, 30)), "share male")
    still, moved = shown.results
    assert not still.moved and still.lost is None and moved.lost == ("hair", pytest.approx(0.15))
    assert moved.before == pytest.approx(0.1, abs=0.01) and moved.after == pytest.approx(0.5, abs=0.01)


def test_undecided_is_a_class_of_its_own_when_counting_what_was_kept() -> None:
    own = figures(100, 0)
    unsure = np.ones(N, bool)
    unsure[:20] = False
    hair = Predictions.from_labels(np.zeros(N, int), unsure, HAIR, "hand")
    now = replace(own.measurement, readings={**own.measurement.readings, "hair": hair})
    kept = compared.kept_per_image(Figures(now, GENDER))
    assert kept is not None and kept.sum() == 180
