"""Shares: the β sweep and share bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from diffusion_lens.base.types import LensError, LogRatio, Share
from diffusion_lens.plots.theme import TEXT, Style, blank, percent, span, style
from diffusion_lens.results.sweeps import Balance, SweepPoint, SweepResult

Measure = Literal["log_ratio", "share"]

PATTERN = {"fillmode": "overlay", "fgcolor": "#FFFFFF", "fgopacity": 0.6, "size": 6}


@dataclass(frozen=True)
class _Curve:
    """Points of one sweep with a finite value: β, value and interval ends ``[point]``, in rising β.

    ``adjusted`` says which values stand in for those of a zero count; they are ringed.
    """

    beta: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    points: tuple[SweepPoint, ...]
    adjusted: np.ndarray

    def drawn_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Interval ends with the infinite ones cut one unit beyond all that is finite."""
        known = np.concatenate([self.value, self.low, self.high])
        known = known[np.isfinite(known)]
        return np.maximum(self.low, known.min() - 1), np.minimum(self.high, known.max() + 1)


def sweep_figure(
    results: Sequence[SweepResult],
    *,
    measure: Measure = "log_ratio",
    corrected: bool = True,
    balance: Balance | None = None,
) -> go.Figure:
    """Log ratio (or the target's share) against β, one line with its band per sweep, controls in grey.

    Args:
        results: sweeps of one attribute; their ``setting`` names them in the legend.
        measure: ``log_ratio`` needs a two-class attribute, ``share`` shows the share of the sweep's target.
        corrected: after correction for the classifier's error (else as read).
        balance: marks the β that meets a target share, with its interval.
    """
    _check_sweeps(results, measure)
    figure = blank(x_title="strength β", y_title=_measure_title(results[0], measure, corrected))
    ordinary = 0
    for index, result in enumerate(results):
        look = style(index if result.is_control else ordinary, control=result.is_control)
        ordinary += not result.is_control
        _add_curve(figure, result, _curve(result, measure, corrected), look)
    level = 0.0 if measure == "log_ratio" else 1 / len(results[0].attribute.classes)
    figure.add_hline(
        y=level,
        line={"color": TEXT, "width": 1.5, "dash": "dot"},
        annotation={"text": "balance", "font": {"size": 12, "color": TEXT}},
        annotation_position="bottom right",
    )
    if measure == "share":
        figure.update_yaxes(tickformat=".0%", range=[0, 1])
    if balance is not None:
        _mark_balance(figure, balance)
    return figure


def describe_sweep(
    results: Sequence[SweepResult],
    *,
    measure: Measure = "log_ratio",
    corrected: bool = True,
    balance: Balance | None = None,
) -> str:
    """Where each sweep starts and ends, where it crosses balance, and how wide its interval is."""
    _check_sweeps(results, measure)
    sentences = []
    for result in results:
        curve = _curve(result, measure, corrected)
        name = f"Control '{result.setting}'" if result.is_control else f"'{result.setting}'"
        if not len(curve.beta):
            sentences.append(f"{name}: no image was decided.")
            continue
        ends = " to ".join(
            f"{percent(v) if measure == 'share' else format(v, '+.2f')} at β = {b:g}"
            for b, v in ((curve.beta[0], curve.value[0]), (curve.beta[-1], curve.value[-1]))
        )
        crossing = _crossing_text(curve, 0.0 if measure == "log_ratio" else 1 / len(result.attribute.classes))
        sentences.append(f"{name}: {_measure_title(result, measure, corrected)} goes from {ends}{crossing}.")
    if balance is not None:
        sentences.append(balance.note)
    return " ".join(sentences)


def share_figure(
    groups: Mapping[str, Sequence[Share]], *, planted: Mapping[str, float] | None = None, corrected: bool = True
) -> go.Figure:
    """Bars of class shares with 95 % intervals, one series per group (e.g. before and after).

    ``planted`` draws a tick at the share a class had in the training data.
    """
    labels = [share.label for share in next(iter(groups.values()))]
    figure = blank(height=110 + 34 * len(labels) * max(1, len(groups)), x_title="share of decided images")
    for index, (name, shares) in enumerate(groups.items()):
        look = style(index)
        values = np.array([s.corrected if corrected else s.raw for s in shares])
        ends = np.array([s.corrected_interval if corrected else s.raw_interval for s in shares])
        figure.add_bar(
            name=name,
            orientation="h",
            y=labels,
            x=values,
            error_x={"type": "data", "array": ends[:, 1] - values, "arrayminus": values - ends[:, 0], "color": TEXT},
            marker={"color": look.colour, "pattern": {**PATTERN, "shape": look.pattern}},
            customdata=[_share_text(s) for s in shares],
            hovertemplate=f"<b>{name}</b><br>%{{customdata}}<extra></extra>",
        )
    if planted:
        known = [label for label in labels if label in planted]
        figure.add_scatter(
            name="planted",
            mode="markers",
            y=known,
            x=[planted[label] for label in known],
            marker={"symbol": "line-ns", "size": 26, "line": {"width": 3, "color": TEXT}},
            hovertemplate="planted %{y}: %{x:.0%}<extra></extra>",
        )
    figure.update_xaxes(tickformat=".0%", range=[0, 1.02], dtick=0.25)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(barmode="group", bargap=0.25)
    return figure


def describe_shares(
    groups: Mapping[str, Sequence[Share]], *, planted: Mapping[str, float] | None = None, corrected: bool = True
) -> str:
    """Every group's shares with intervals, and the planted ones."""
    sentences = []
    for name, shares in groups.items():
        parts = [
            f"{s.label} {percent(s.corrected if corrected else s.raw)}"
            f" ({span(s.corrected_interval if corrected else s.raw_interval)})"
            for s in shares
        ]
        sentences.append(f"{name}: {', '.join(parts)}, from {shares[0].n} decided images.")
    if planted:
        sentences.append("Planted: " + ", ".join(f"{label} {percent(p)}" for label, p in planted.items()) + ".")
    return " ".join(sentences)


def _add_curve(figure: go.Figure, result: SweepResult, curve: _Curve, look: Style) -> None:
    name = f"{result.setting} (control)" if result.is_control else result.setting
    if len(curve.beta) > 1:
        low, high = curve.drawn_ends()
        figure.add_scatter(
            x=np.concatenate([curve.beta, curve.beta[::-1]]),
            y=np.concatenate([high, low[::-1]]),
            fill="toself",
            fillcolor=look.band,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    figure.add_scatter(
        name=name,
        legendgroup=name,
        mode="lines+markers",
        x=curve.beta,
        y=curve.value,
        line={"color": look.colour, "dash": look.dash, "width": 2.5},
        marker={"symbol": look.symbol, "size": 9, "color": look.colour},
        customdata=[_point_text(p) for p in curve.points],
        hovertemplate=f"<b>{name}</b><br>%{{customdata}}<extra></extra>",
    )
    if curve.adjusted.any():
        figure.add_scatter(
            name=f"{name}: zero count adjusted",
            legendgroup=name,
            mode="markers",
            x=curve.beta[curve.adjusted],
            y=curve.value[curve.adjusted],
            marker={"symbol": "circle-open", "size": 17, "color": look.colour, "line": {"width": 1.5}},
            hoverinfo="skip",
        )


def _mark_balance(figure: go.Figure, balance: Balance) -> None:
    figure.add_vrect(*balance.interval, fillcolor=TEXT, opacity=0.12, line_width=0)
    reached = f"β = {balance.beta:.2f}" if balance.reached else "target not reached"
    figure.add_vline(
        x=balance.beta,
        line={"color": TEXT, "width": 1.5},
        annotation={"text": reached, "font": {"size": 12, "color": TEXT}},
        annotation_position="bottom right",
    )


def _curve(result: SweepResult, measure: Measure, corrected: bool) -> _Curve:
    rows = []
    for point in result.points:
        value = _value(point, result, measure, corrected)
        if value is not None and np.isfinite(value[0]):
            rows.append((point.beta, *value, point))
    columns = np.array([row[:4] for row in rows], dtype=np.float64).reshape(-1, 4)
    points = tuple(row[4] for row in rows)
    ratios = [p.log_ratio_corrected if corrected else p.log_ratio for p in points]
    adjusted = [measure == "log_ratio" and ratio is not None and ratio.haldane for ratio in ratios]
    return _Curve(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3], points, np.array(adjusted, dtype=bool))


def _value(
    point: SweepPoint, result: SweepResult, measure: Measure, corrected: bool
) -> tuple[float, float, float] | None:
    if measure == "share":
        share = point.shares[result.attribute.index(result.target)]
        ends = share.corrected_interval if corrected else share.raw_interval
        return (share.corrected if corrected else share.raw, *ends)
    ratio = point.log_ratio_corrected if corrected else point.log_ratio
    return None if ratio is None else (ratio.value, *ratio.interval)


def _point_text(point: SweepPoint) -> str:
    shares = "<br>".join(_share_text(s) for s in point.shares)
    ratio = _ratio_text(point.log_ratio_corrected)
    first = point.shares[0]
    return (
        f"β = {point.beta:g}<br>{shares}{ratio}<br>FD {point.fd:.3f} (noise floor {point.fd_floor:.3f})"
        f"<br>n = {first.n}, {first.n_uncertain} undecided"
    )


def _share_text(share: Share) -> str:
    return (
        f"{share.label}: {percent(share.corrected)} ({span(share.corrected_interval)}), "
        f"as read {percent(share.raw)} ({share.count}/{share.n})"
    )


def _ratio_text(ratio: LogRatio | None) -> str:
    if ratio is None:
        return ""
    note = f"<br>{ratio.note}" if ratio.note else ""
    return f"<br>ln({ratio.numerator}/{ratio.denominator}) = {ratio.text}{note}"


def _measure_title(result: SweepResult, measure: Measure, corrected: bool) -> str:
    read = "" if corrected else ", as read"
    if measure == "share":
        return f"share {result.target}{read}"
    first, second = result.attribute.classes
    return f"ln({second} / {first}){read}"


def _crossing_text(curve: _Curve, level: float) -> str:
    above = curve.value > level
    turns = np.flatnonzero(above[1:] != above[:-1])
    if not len(turns):
        return " without crossing balance"
    i = int(turns[0])
    return f" and crosses balance between β = {curve.beta[i]:g} and {curve.beta[i + 1]:g}"


def _check_sweeps(results: Sequence[SweepResult], measure: Measure) -> None:
    if not results:
        raise LensError("There is no sweep to plot; run one first.")
    if any(r.attribute != results[0].attribute for r in results):
        raise LensError("Sweeps of different attributes cannot share an axis; plot one attribute at a time.")
    if measure == "log_ratio" and len(results[0].attribute.classes) != 2:
        raise LensError(f"{results[0].attribute.name} has more than two classes; plot a share instead of a log ratio.")
