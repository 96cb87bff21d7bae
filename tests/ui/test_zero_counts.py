"""A log ratio that stands in for one of a zero count is marked wherever it is shown, and its open end is told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from diffusion_lens.base.types import ADJUSTED, Attribute, GenerationRequest, LogRatio, Predictions
from diffusion_lens.cli.measure import show_sweep
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.sweeps import SweepPoint, collect
from diffusion_lens.studio import curves
from diffusion_lens.ui import scene
from diffusion_lens.ui.html import html

GENDER = Attribute("gender", ("female", "male"))
ASKED = GenerationRequest("a portrait", tuple(range(8)), 3, 1.0, "m")


def point(beta: float, n_male: int) -> SweepPoint:
    probs = np.eye(2)[[0] * (8 - n_male) + [1] * n_male]
    reading = Predictions(probs, np.ones(8, bool), GENDER, "c")
    known = {"gender": 10_000 * np.eye(2, dtype=int)}
    return SweepPoint(Measurement(ASKED, None, {"gender": reading}, known, "c"), GENDER, beta=beta)


NONE_MALE = point(0.0, 0)
SWEEP = collect((NONE_MALE, point(1.0, 4), point(2.0, 6)), target="male", setting="30 features")


def test_the_text_of_a_ratio() -> None:
    ratio = LogRatio(0.4, (0.1, 0.72), "male", "female", False)
    assert (ratio.text, ratio.note) == ("+0.40 (+0.10 to +0.72)", "")
    assert replace(ratio, interval=(-np.inf, 0.72), haldane=True).text == "+0.40* (below +0.72)"
    assert replace(ratio, interval=(0.1, np.inf)).text == "+0.40 (above +0.10)"
    assert replace(ratio, interval=(-np.inf, np.inf)).text == "+0.40 (not bounded)"


def test_strips_table_and_terminal_keep_the_mark(capsys: pytest.CaptureFixture[str]) -> None:
    assert NONE_MALE.log_ratio_corrected is not None and NONE_MALE.log_ratio_corrected.haldane
    table = html("sweep.table", [SWEEP])
    assert table.count("-2.83* (below -0.5") == 1 and ADJUSTED in table
    assert ADJUSTED not in html("sweep.table", [replace(SWEEP, points=SWEEP.points[1:])])
    show_sweep(SWEEP)
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "-2.83*" in printed and "zero count adjusted" in printed


def test_the_curve_keeps_points_with_an_open_interval() -> None:
    points = curves._points(SWEEP, SWEEP.betas, "male")
    assert [p.beta for p in points] == [0, 1, 2] and [p.adjusted for p in points] == [True, False, False]
    assert points[0].ratio_low == -np.inf and np.isfinite([p.ratio for p in points]).all()
    sent = [scene._point_values(p) for p in points]
    assert sent[0]["ratio_low"] is None and sent[0]["adjusted"] and sent[0]["ratio"] is not None
    assert all(p["ratio_high"] is not None for p in sent)
    json.dumps(sent, allow_nan=False)
