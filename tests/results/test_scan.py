"""The stored scan: accuracy by hand, the rule of the recommendation, a round trip, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scanned import make, moved

from diffusion_lens.base.types import LensError
from diffusion_lens.plots.scanned import describe_scan, scan_figure
from diffusion_lens.results.scan import (
    Moved,
    Steering,
    balanced_accuracy,
    load_scan,
    recommend,
    save_scan,
    table,
)
from diffusion_lens.results.stats import share_interval


def test_balanced_accuracy_counts_classes_alike() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    read = np.array([0] * 8 + [1, 0])
    accuracy, (low, high) = balanced_accuracy(labels, read, 2)
    assert accuracy == pytest.approx((1 + 0.5) / 2)
    a, b = share_interval(8, 8), share_interval(1, 2)
    assert low == pytest.approx(0.75 - np.hypot(1 - a[0], 0.5 - b[0]) / 2)
    assert high == pytest.approx(min(1.0, 0.75 + np.hypot(a[1] - 1, b[1] - 0.5) / 2))


def test_interval_of_balanced_accuracy_covers() -> None:
    rng = np.random.default_rng(0)
    true, sizes, covered = np.array([0.95, 0.6]), (60, 20), 0
    for _ in range(600):
        labels = np.repeat([0, 1], sizes)
        right = rng.random(len(labels)) < true[labels]
        _, (low, high) = balanced_accuracy(labels, np.where(right, labels, 1 - labels), 2)
        covered += low <= true.mean() <= high
    assert covered / 600 > 0.92


def test_a_class_that_does_not_occur_is_left_out() -> None:
    assert balanced_accuracy(np.zeros(5, int), np.zeros(5, int), 3)[0] == 1.0
    with pytest.raises(LensError, match="labelled"):
        balanced_accuracy(np.array([], int), np.array([], int), 2)


def test_one_site_is_recommended_where_it_serves_all() -> None:
    advice = recommend(make({("gender", "a"): 0.5, ("gender", "b"): 0.55, ("age", "a"): 0.4, ("age", "b"): 0.1}))
    assert advice.sites == ("a",)
    assert "Gender: at a" in advice.reason and "yes +50 points" in advice.reason


def test_two_sites_are_recommended_where_each_serves_one() -> None:
    advice = recommend(make({("gender", "a"): 0.5, ("gender", "b"): 0.1, ("age", "a"): 0.1, ("age", "b"): 0.4}))
    assert advice.sites == ("a", "b")


def test_what_is_lost_counts() -> None:
    low, high = make({("gender", "a"): 0.5}, kept=0.5), make({("gender", "a"): 0.5}, kept=1.0)
    score = [s.cell("gender", "a", 0).steering.score for s in (low, high)]
    assert score == pytest.approx([0.25, 0.5])


def test_an_effect_within_its_control_scores_nothing() -> None:
    assert Steering(moved(0.2, half=0.3), moved(0.0)).score == 0
    assert Steering(moved(0.2, half=0.05), moved(0.15, half=0.05)).score == 0
    assert Steering(moved(-0.5), moved(0.0)).score == 0
    nothing = Moved(float("nan"), (-1.0, 1.0), 0.0, 0, 40, 1.0)
    assert Steering(nothing, moved(0.0)).score == 0


def test_nothing_is_recommended_where_nothing_moved() -> None:
    advice = recommend(make({("gender", "a"): 0.0, ("gender", "b"): 0.01}))
    assert advice.sites == () and "random directions" in advice.reason


def test_a_round_trip(tmp_path: Path) -> None:
    found = make({("gender", "a"): 0.5, ("age", "a"): float("nan")})
    save_scan(found, tmp_path / "scan.json")
    again = load_scan(tmp_path / "scan.json")
    assert again.cell("gender", "a", 0) == found.cell("gender", "a", 0)
    assert np.isnan(again.cell("age", "a", 0).steering.direction.change)
    assert again.sites == found.sites and again.attributes == found.attributes and again.steps == found.steps


@pytest.mark.parametrize("change", [{"cells": []}, {"sites": []}, {"steps": 3}, {"attributes": None}])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "scan.json"
    save_scan(make({("gender", "a"): 0.5}), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LensError, match=r"scan\.json is not a stored scan"):
        load_scan(path)


def test_the_table_has_a_row_a_cell() -> None:
    rows = table(make({("gender", "a"): 0.5, ("gender", "b"): 0.1}))
    assert [r["site"] for r in rows] == ["a", "b"]
    assert rows[0]["change"] == 0.5 and rows[0]["control change"] == 0.0 and rows[0]["undecided"] == 2


def test_the_figure_and_its_words_say_the_same() -> None:
    found = make({("gender", "a"): 0.5, ("gender", "b"): 0.1})
    figure = scan_figure(found, "gender")
    reads, moves = figure.data
    assert list(reads.y) == ["a", "b"] and reads.z[0][0] == 0.9
    assert moves.text[0][0] == "+50 *"
    told = describe_scan(found, "gender")
    assert "steered best at a" in told and "+50 points more yes" in told and "n = 40" in told
