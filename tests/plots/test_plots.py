"""Figures hold the numbers they were given, tell series apart without colour, and have a sentence each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from diffusion_lens import plots
from diffusion_lens.base.types import (
    Atlas,
    Attribute,
    Attribution,
    Change,
    GenerationRequest,
    LensError,
    LogRatio,
    Share,
)
from diffusion_lens.plots import theme
from diffusion_lens.results.sweeps import Balance, SweepResult

GENDER = Attribute("gender", ("female", "male"))
TONES = Attribute("skin tone", ("light", "mid", "dark"))


def share(label: str, p: float, corrected: float | None = None) -> Share:
    c = p if corrected is None else corrected
    return Share(label, round(200 * p), 200, 4, p, (p - 0.05, p + 0.05), c, (c - 0.08, c + 0.08))


@dataclass(frozen=True)
class FakePoint:
    """A sweep's point with the numbers it is given."""

    beta: float
    shares: tuple[Share, ...]
    log_ratio: LogRatio | None
    log_ratio_corrected: LogRatio | None
    fd: float
    fid: float | None
    fd_floor: float = 0.1
    agreement: Mapping[str, float] = field(default_factory=lambda: {"glasses": 0.9})
    activation_ratio: float = 1.0
    changes: tuple[Change, ...] = ()


def point(beta: float, p: float, *, fid: float | None = 1.0, fd: float = 0.2) -> Any:
    value = float(np.log(p / (1 - p)))
    raw = LogRatio(value / 2, (value / 2 - 0.3, value / 2 + 0.3), "male", "female", False)
    ratio = LogRatio(value, (value - 0.5, value + 0.5), "male", "female", True)
    return FakePoint(beta, (share("female", 1 - p), share("male", p)), raw, ratio, fd, fid)


def sweep(name: str, shares: list[float], *, control: bool = False) -> SweepResult:
    points = tuple(point(float(i), p, fd=abs(p - 0.5)) for i, p in enumerate(shares))
    return SweepResult(points, GENDER, "male", GenerationRequest("a portrait", (0, 1), 3, 1.0, "m"), name, "c", control)


FALLING = sweep("30 features", [0.8, 0.6, 0.3])
RANDOM = sweep("random features", [0.8, 0.8, 0.79], control=True)
CHANGES = (
    Change("glasses", "no", 0.8, 0.7, -0.1, (-0.15, -0.05), 190),
    Change("glasses", "yes", 0.2, 0.3, 0.1, (0.05, 0.15), 190),
    Change("age", "old", 0.2, 0.21, 0.01, (-0.03, 0.05), 190),
)


def named(figure: go.Figure, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def notes(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def atlas() -> Atlas:
    density = np.array([0.1, 0.0, 0.3, 0.2])
    one, heat = np.full((4, 1), -1), np.zeros((4, 1, 2, 2), np.float16)
    return Atlas(
        np.arange(8, dtype=np.float32).reshape(4, 2), density, np.zeros((4, 2)), (0, 5), one, heat, one, heat, one,
        ("", "", "beard", ""), "hand", "umap", "sae",
    )  # fmt: skip


def attribution() -> Attribution:
    scores = np.zeros((2, 3, 5))
    scores[1] = [[0, 1, 0, -1, 0.5], [0, 2, 0, 0, 0.5], [0, 1, 0.1, 0, 0.5]]
    return Attribution(scores, 1e-6, GENDER, "integrated_gradients", "zero", "sae", 8)


def every_figure() -> dict[str, tuple[go.Figure, str]]:
    groups = {"before": FALLING.points[0].shares, "after": FALLING.points[1].shares}
    columns = {"gender": CHANGES}
    curves = {"lens": FALLING, "control": RANDOM}
    accuracy, chance = {"gender": np.array([0.5, 0.9]), "age": np.array([0.6, 0.8])}, {"gender": 0.5, "age": 0.6}
    depths, deep = ["2", "4"], [share("male", 0.7), share("male", 0.9)]
    counts = np.array([[9, 1, 0], [0, 8, 2], [0, 0, 0]])
    return {
        "sweep": (plots.sweep_figure([FALLING, RANDOM]), plots.describe_sweep([FALLING, RANDOM])),
        "shares": (plots.share_figure(groups), plots.describe_shares(groups)),
        "tradeoff": (plots.tradeoff_figure(curves), plots.describe_tradeoff(curves)),
        "strengths": (plots.strength_figure(curves), plots.describe_strengths(curves)),
        "spillover": (plots.spillover_figure(columns), plots.describe_spillover(columns)),
        "confusion": (plots.confusion_figure(counts, TONES), plots.describe_confusion(counts, TONES)),
        "depth": (
            plots.depth_figure(depths, deep, training_share=0.7),
            plots.describe_depth(depths, deep, training_share=0.7),
        ),
        "probe": (plots.probe_figure(accuracy, chance=chance), plots.describe_probe(accuracy, chance=chance)),
        "attribution": (
            plots.attribution_figure(attribution(), "male", k=3),
            plots.describe_attribution(attribution(), "male", k=3),
        ),
        "profile": (
            plots.step_profile_figure(np.array([0.0, 2.0]), (0, 5), feature=7),
            plots.describe_step_profile(np.array([0.0, 2.0]), (0, 5), feature=7),
        ),
        "atlas": (plots.atlas_figure(atlas(), chosen=(2,)), plots.describe_atlas(atlas(), chosen=(2,))),
    }


@pytest.mark.parametrize("name", sorted(every_figure()))
def test_every_figure_is_transparent_serialisable_and_described(name: str) -> None:
    figure, sentence = every_figure()[name]
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"
    assert json.loads(figure.to_json())["data"]
    assert sentence.endswith(".") and len(sentence) < 400 and "nan" not in sentence
    assert all(trace.hovertemplate or trace.hoverinfo == "skip" for trace in figure.data)


def test_sweep_curve_and_band() -> None:
    figure = plots.sweep_figure([FALLING, RANDOM])
    curve = named(figure, "30 features")
    values = [p.log_ratio_corrected.value for p in FALLING.points if p.log_ratio_corrected]
    assert list(curve.x) == [0, 1, 2] and list(curve.y) == pytest.approx(values)
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert list(band.y) == pytest.approx([v + 0.5 for v in values] + [v - 0.5 for v in reversed(values)])
    assert notes(figure) == ["balance"]
    assert figure.layout.shapes[0].y0 == figure.layout.shapes[0].y1 == 0
    hover = curve.customdata[0]
    for text in ("β = 0", "male: 80 % (72–88 %)", "160/200", "n = 200, 4 undecided", "noise floor 0.100", "adjusted"):
        assert text in hover
    assert figure.layout.yaxis.title.text == "ln(male / female)"


def test_zero_counts_are_ringed_and_their_open_intervals_drawn_to_an_edge() -> None:
    open_below = LogRatio(-3.0, (-np.inf, -1.0), "male", "female", True)
    sure = LogRatio(1.0, (0.5, 1.5), "male", "female", False)
    points = tuple(
        replace(p, log_ratio_corrected=ratio) for p, ratio in zip(FALLING.points, (open_below, sure, sure), strict=True)
    )
    figure = plots.sweep_figure([replace(FALLING, points=points)])
    assert list(named(figure, "30 features: zero count adjusted").x) == [0]
    assert list(named(figure, "30 features").y) == [-3, 1, 1]
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert list(band.y) == [-1, 1.5, 1.5, 0.5, 0.5, -4]
    hover = named(figure, "30 features").customdata
    assert "-3.00* (below -1.00)" in hover[0] and "½ was added" in hover[0] and "*" not in hover[1]
    assert len(plots.sweep_figure([replace(FALLING, points=points[1:])]).data) == 2


def test_sweep_raw_and_share() -> None:
    raw = named(plots.sweep_figure([FALLING], corrected=False), "30 features")
    assert raw.y[0] == pytest.approx(np.log(4) / 2)
    figure = plots.sweep_figure([FALLING], measure="share")
    assert list(named(figure, "30 features").y) == [0.8, 0.6, 0.3]
    assert figure.layout.shapes[0].y0 == 0.5 and list(figure.layout.yaxis.range) == [0, 1]


def test_controls_share_the_plot_and_look_different() -> None:
    figure = plots.sweep_figure([RANDOM, FALLING])
    control, curve = named(figure, "random features (control)"), named(figure, "30 features")
    assert control.line.dash == "dot" and control.marker.symbol.endswith("-open")
    assert curve.line.color == theme.OKABE_ITO[0]  # a control does not use up a colour


def test_a_point_without_a_ratio_is_left_out() -> None:
    broken = replace(FALLING, points=(replace(FALLING.points[0], log_ratio_corrected=None), *FALLING.points[1:]))
    assert list(named(plots.sweep_figure([broken]), "30 features").x) == [1, 2]
    empty = replace(FALLING, points=(replace(FALLING.points[0], log_ratio_corrected=None),))
    assert "no image was decided" in plots.describe_sweep([empty])


def test_balance_is_marked_and_told() -> None:
    found = Balance(1.2, (1.0, 1.4), True, False, False, "male", 0.5, 0.5, (0.4, 0.6), 0.0, "A share is met.")
    figure = plots.sweep_figure([FALLING], balance=found)
    assert "β = 1.20" in notes(figure)
    assert [(s.x0, s.x1) for s in figure.layout.shapes[1:]] == [(1.0, 1.4), (1.2, 1.2)]
    assert plots.describe_sweep([FALLING], balance=found).endswith("A share is met.")
    missed = plots.sweep_figure([FALLING], balance=replace(found, reached=False))
    assert "target not reached" in notes(missed)


def test_sweep_sentence() -> None:
    sentence = plots.describe_sweep([FALLING, RANDOM])
    assert "goes from +1.39 at β = 0 to -0.85 at β = 2 and crosses balance between β = 1 and 2." in sentence
    assert "Control 'random features'" in sentence and "without crossing balance" in sentence


def test_sweep_refusals() -> None:
    with pytest.raises(LensError, match="no sweep"):
        plots.sweep_figure([])
    with pytest.raises(LensError, match="more than two classes"):
        plots.sweep_figure([replace(FALLING, attribute=TONES)])
    with pytest.raises(LensError, match="one attribute at a time"):
        plots.sweep_figure([FALLING, replace(FALLING, attribute=TONES)], measure="share")


def test_share_bars_and_planted_ticks() -> None:
    groups = {"before": (share("female", 0.2, 0.25), share("male", 0.8, 0.75))}
    figure = plots.share_figure(groups, planted={"male": 0.7})
    bars = named(figure, "before")
    assert list(bars.x) == [0.25, 0.75] and list(bars.error_x.array) == pytest.approx([0.08, 0.08])
    ticks = named(figure, "planted")
    assert (list(ticks.y), list(ticks.x)) == (["male"], [0.7])
    assert list(named(plots.share_figure(groups, corrected=False), "before").x) == [0.2, 0.8]
    sentence = plots.describe_shares(groups, planted={"male": 0.7})
    assert "female 25 % (17–33 %)" in sentence and "Planted: male 70 %." in sentence


def test_tradeoff() -> None:
    thin = replace(RANDOM, points=tuple(replace(p, fid=None) for p in RANDOM.points))
    figure = plots.tradeoff_figure({"lens": FALLING, "random": thin}, fid_name="FID, portraits features")
    assert list(named(figure, "lens").x) == pytest.approx([0.3, 0.1, 0.2]) and not len(named(figure, "random").x)
    assert figure.layout.yaxis.title.text.startswith("FID, portraits features")
    assert list(named(plots.tradeoff_figure({"lens": FALLING}, lost="glasses"), "lens").y) == pytest.approx([0.1] * 3)
    sentence = plots.describe_tradeoff({"lens": FALLING, "random": thin})
    assert "least bias FD 0.100, within noise at strength 1" in sentence and "random: too few images" in sentence
    with pytest.raises(LensError, match="one of fid, others, glasses"):
        plots.tradeoff_figure({"lens": FALLING}, lost="hats")


def test_methods_are_told_apart_and_the_best_settings_ringed() -> None:
    many = {f"method {i}": replace(FALLING, is_control=i > 11) for i in range(14)}
    figure = plots.tradeoff_figure(many, lost="others", chosen={"method 3": 1.0}, emphasised=["method 3"])
    looks = {(t.line.color, t.line.dash, t.marker.symbol) for t in figure.data if t.name}
    assert len(looks) == 14
    ring = next(t for t in figure.data if not t.name)
    assert [*ring.x, *ring.y] == pytest.approx([0.1, 0.1]) and ring.legendgroup == "method 3"
    assert {t.name for t in figure.data if t.name and t.opacity == 1} == {"method 3"}


def test_strengths_run_over_each_methods_own_range() -> None:
    figure = plots.strength_figure({"lens": FALLING}, chosen={"lens": 2.0})
    betas = np.array([p.beta for p in FALLING.points])
    assert list(named(figure, "lens").x) == pytest.approx(list(betas / betas.max()))
    assert list(named(figure, "lens").y) == pytest.approx([0.3, 0.1, 0.2])
    said = plots.describe_strengths({"lens": FALLING})
    within = [p.beta for p in FALLING.points if p.fd <= p.fd_floor]
    assert said == f"lens: within noise at {len(within)} of 3 strengths ({within[0]:g})."


def test_spillover_cells() -> None:
    figure = plots.spillover_figure({"gender": CHANGES, "age": CHANGES[:1]})
    heat = figure.data[0]
    assert list(heat.y) == ["glasses: no", "glasses: yes", "age: old"] and list(heat.x) == ["gender", "age"]
    assert heat.z[0][0] == pytest.approx(-10) and np.isnan(heat.z[2][1])
    assert heat.text[0][0] == "−10 *<br>−15 to −5" and heat.text[2][0] == "+1<br>−3 to +5"
    assert heat.zmin == -heat.zmax
    sentence = plots.describe_spillover({"gender": CHANGES, "age": CHANGES[2:]})
    assert "glasses no −10 points" in sentence and "age old" not in sentence.split("Steering age")[0]
    assert "Steering age: no other class moved" in sentence
    with pytest.raises(LensError, match="No other attribute"):
        plots.spillover_figure({"gender": ()})


def test_confusion_cells() -> None:
    counts = np.array([[9, 1, 0], [0, 8, 2], [0, 0, 0]])
    heat = plots.confusion_figure(counts, TONES).data[0]
    assert heat.text[0][0] == "90.0 %" and heat.text[2][2] == "–"
    assert "reads mid as dark (20.0 %)" in plots.describe_confusion(counts, TONES)
    assert "no image was misread" in plots.describe_confusion(np.eye(3) * 5, TONES)
    with pytest.raises(LensError, match="one row and column per class"):
        plots.confusion_figure(np.eye(2), TONES)


def test_depth_errors_and_sentence() -> None:
    shares = [share("male", 0.72), share("male", 0.9)]
    figure = plots.depth_figure(["2", "4"], shares, training_share=0.7)
    assert list(figure.data[0].error_y.arrayminus) == pytest.approx([0.08, 0.08])
    assert "training data 70 %" in notes(figure)
    sentence = plots.describe_depth(["2", "4"], shares, training_share=0.7)
    assert not figure.layout.showlegend
    both = {"training_share": 0.7, "name": "plain", "others": {"bypassed": shares[::-1]}}
    two = plots.depth_figure(["2", "4"], shares, **both)
    assert [line.name for line in two.data] == ["plain", "bypassed"] and two.layout.showlegend
    assert list(two.data[1].y) == [shares[1].corrected, shares[0].corrected]
    assert len({(line.marker.symbol, line.line.dash) for line in two.data}) == 2
    assert "bypassed: at depth 2 90 %" in plots.describe_depth(["2", "4"], shares, **both)
    with pytest.raises(LensError, match="one share of the same class"):
        plots.depth_figure(["2", "4"], shares, training_share=0.7, others={"short": shares[:1]})
    assert "at depth 2 72 % (+2 points, within" in sentence and "at depth 4 90 % (+20 points, beyond" in sentence
    with pytest.raises(LensError, match="one share of the same class"):
        plots.depth_figure(["2"], shares, training_share=0.7)


def test_probe_has_its_guessing_line() -> None:
    figure = plots.probe_figure({"gender": np.array([0.5, 0.9])}, chance={"gender": 0.6})
    accuracy, guessing = figure.data
    assert list(accuracy.x) == [1, 2] and list(guessing.y) == [0.6, 0.6] and guessing.line.dash == "dot"


def test_attribution_rows_and_scale() -> None:
    heat = plots.attribution_figure(attribution(), "male", k=2).data[0]
    assert list(heat.y) == ["#1", "#4"]
    assert np.asarray(heat.z).tolist() == [[1, 2, 1], [0.5, 0.5, 0.5]] and heat.zmin == 0
    signed = plots.attribution_figure(attribution(), "male", k=5).data[0]
    assert signed.zmin == -signed.zmax == -2
    assert "#1, #4, #2" in plots.describe_attribution(attribution(), "male", k=3)
    with pytest.raises(LensError, match="between 1 and 5"):
        plots.attribution_figure(attribution(), "male", k=6)


def test_atlas_points_carry_their_ids() -> None:
    figure = plots.atlas_figure(atlas(), scores=np.array([0.1, 9.0, -0.5, 0.2]), chosen=(3,))
    live = named(figure, "features")
    assert [row[0] for row in live.customdata] == [0, 3, 2] and live.customdata[2][1] == "beard"  # strongest on top
    assert named(figure, "dead").customdata[0][0] == 1
    assert live.marker.cmin == -0.5 and list(named(figure, "chosen").x) == [6]
    assert "4 features, 1 of them dead" in plots.describe_atlas(atlas())
    with pytest.raises(LensError, match="4 features"):
        plots.atlas_figure(atlas(), scores=np.ones(3))


def luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_reads_on_light_and_dark_pages() -> None:
    assert contrast(theme.TEXT, "#ffffff") >= 4.5
    assert contrast(theme.TEXT, "#0b0f19") >= 4.0


def test_series_differ_in_more_than_colour() -> None:
    looks = [theme.style(i) for i in range(len(theme.OKABE_ITO))]
    assert len({look.symbol for look in looks}) == len(looks)
    assert len({look.pattern for look in looks}) == len(looks)
    assert len({(look.symbol, look.dash) for look in looks}) == len(looks)
    assert len({theme.style(i, control=True).symbol for i in range(6)}) == 6
