"""Methods beside each other: bias left against what was lost, and how each answers to its strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from diffusion_lens.base.types import LensError
from diffusion_lens.plots.theme import DASHES, OKABE_ITO, SYMBOLS, TEXT, Style, blank, percent, style
from diffusion_lens.results.sweeps import SweepPoint, SweepResult

FAINT = 0.5
LEGEND_ROOM = 14
"""Pixels that the legend needs for each method."""


def tradeoff_figure(
    results: Mapping[str, SweepResult],
    *,
    lost: str = "fid",
    fid_name: str = "FID",
    chosen: Mapping[str, float] | None = None,
    emphasised: Sequence[str] = (),
) -> go.Figure:
    """Bias left against what was lost, one curve over the strengths per method; the lower left corner is best.

    Args:
        results: method name → its sweep, all on the same seeds.
        lost: ``fid`` (against the unedited images), ``others`` (the mean share of images that did not keep their class
            of another attribute), or one other attribute's name.
        fid_name: names the distance and its features, e.g. ``FID, portraits features``.
        chosen: method name → the strength of its best setting, which gets a ring.
        emphasised: names drawn in full; the others are faint. Empty: all in full.
    """
    figure = blank(
        height=400 + LEGEND_ROOM * len(results), x_title="bias left (FD)", y_title=_lost_title(lost, fid_name)
    )
    for name, (result, look, opacity) in _looks(results, emphasised).items():
        kept = [(p, y) for p in result.points if (y := _lost(p, lost)) is not None and np.isfinite(p.fd)]
        _add(figure, name, look, opacity, [p.fd for p, _ in kept], [y for _, y in kept], [p for p, _ in kept], lost)
        ringed = [(p.fd, y) for p, y in kept if chosen and p.beta == chosen.get(name)]
        _ring(figure, name, look, opacity, ringed)
    _mark_noise(figure, results, vertical=True)
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero", tickformat="" if lost == "fid" else ".0%")
    return figure


def describe_tradeoff(results: Mapping[str, SweepResult], *, lost: str = "fid", fid_name: str = "FID") -> str:
    """For each method the point with the least bias, and what it lost there."""
    sentences = []
    for name, result in results.items():
        kept = [(p.fd, y, p) for p in result.points if (y := _lost(p, lost)) is not None and np.isfinite(p.fd)]
        if not kept:
            sentences.append(f"{name}: too few images for this comparison.")
            continue
        fd, y, point = min(kept, key=lambda row: row[0])
        cost = f"{fid_name} {y:.2f}" if lost == "fid" else f"{percent(y)} of images with another {_of(lost)}"
        noise = ", within noise" if fd <= point.fd_floor else ""
        sentences.append(f"{name}: least bias FD {fd:.3f}{noise} at strength {point.beta:g}, at the cost of {cost}.")
    return " ".join(sentences)


def strength_figure(
    results: Mapping[str, SweepResult],
    *,
    chosen: Mapping[str, float] | None = None,
    emphasised: Sequence[str] = (),
) -> go.Figure:
    """Bias left (FD) along each method's own range of strengths, from none to the largest that was tried.

    Strengths of different methods have no common unit, so every curve runs over 0 to 100 % of its method's own range:
    a low, flat curve is a broad, stable range of control. Arguments as in ``tradeoff_figure``.
    """
    height = 400 + LEGEND_ROOM * len(results)
    figure = blank(height=height, x_title="strength, share of the largest tried", y_title="bias left (FD)")
    for name, (result, look, opacity) in _looks(results, emphasised).items():
        kept = [p for p in result.points if np.isfinite(p.fd)]
        largest = max((abs(p.beta) for p in kept), default=0.0) or 1.0
        _add(figure, name, look, opacity, [p.beta / largest for p in kept], [p.fd for p in kept], kept, "fid")
        ringed = [(p.beta / largest, p.fd) for p in kept if chosen and p.beta == chosen.get(name)]
        _ring(figure, name, look, opacity, ringed)
    _mark_noise(figure, results, vertical=False)
    figure.update_xaxes(tickformat=".0%")
    figure.update_yaxes(rangemode="tozero")
    return figure


def describe_strengths(results: Mapping[str, SweepResult]) -> str:
    """Over how much of its range each method stays within noise of the target, or that it never does."""
    sentences = []
    for name, result in results.items():
        within = [p.beta for p in result.points if p.fd <= p.fd_floor]
        tried = f"{len(result.points)} strengths"
        said = f"within noise at {len(within)} of {tried}" if within else f"within noise at none of {tried}"
        reach = "" if not within else f" ({within[0]:g})" if len(within) == 1 else f" ({within[0]:g} to {within[-1]:g})"
        sentences.append(f"{name}: {said}{reach}.")
    return " ".join(sentences)


def _looks(
    results: Mapping[str, SweepResult], emphasised: Sequence[str]
) -> dict[str, tuple[SweepResult, Style, float]]:
    found, ordinary, controls = {}, 0, 0
    for name, result in results.items():
        look = style(controls, control=True) if result.is_control else _distinct(ordinary)
        controls, ordinary = controls + result.is_control, ordinary + (not result.is_control)
        found[name] = (result, look, 1.0 if not emphasised or name in emphasised else FAINT)
    return found


def _distinct(index: int) -> Style:
    """A style for each of many series: after the last colour they begin again with other markers and dashes."""
    colour, turn = index % len(OKABE_ITO), index // len(OKABE_ITO)
    return Style(
        OKABE_ITO[colour], SYMBOLS[(colour + turn) % len(SYMBOLS)], DASHES[(colour + 2 * turn) % len(DASHES)], ""
    )


def _add(
    figure: go.Figure, name: str, look: Style, opacity: float, x: list[float], y: list[float],
    points: list[SweepPoint], lost: str,
) -> None:  # fmt: skip
    strong = opacity == 1.0
    figure.add_scatter(
        name=name,
        legendgroup=name,
        mode="lines+markers",
        x=x,
        y=y,
        opacity=opacity,
        line={"color": look.colour, "dash": look.dash, "width": 2.5 if strong else 1.5},
        marker={"symbol": look.symbol, "size": 9 if strong else 7, "color": look.colour},
        customdata=[_point_text(p, lost) for p in points],
        hovertemplate=f"<b>{name}</b> %{{customdata}}<extra></extra>",
    )


def _ring(figure: go.Figure, name: str, look: Style, opacity: float, at: list[tuple[float, float]]) -> None:
    if at:
        figure.add_scatter(
            x=[x for x, _ in at],
            y=[y for _, y in at],
            legendgroup=name,
            showlegend=False,
            hoverinfo="skip",
            mode="markers",
            opacity=opacity,
            marker={"symbol": "circle-open", "size": 17, "color": look.colour, "line": {"width": 2.5}},
        )


def _mark_noise(figure: go.Figure, results: Mapping[str, SweepResult], *, vertical: bool) -> None:
    floor = max(p.fd_floor for r in results.values() for p in r.points)
    if np.isfinite(floor):
        look = {"fillcolor": TEXT, "opacity": 0.12, "line_width": 0}
        note = {"text": "within noise", "font": {"size": 12, "color": TEXT}}
        if vertical:
            figure.add_vrect(0, floor, annotation=note, annotation_position="top left", **look)
        else:
            figure.add_hrect(0, floor, annotation=note, annotation_position="bottom left", **look)


def _point_text(point: SweepPoint, lost: str) -> str:
    shares = ", ".join(f"{s.label} {percent(s.corrected)}" for s in point.shares)
    first, cost = point.shares[0], _lost(point, lost)
    told = "" if cost is None else f"<br>FID {cost:.3g}" if lost == "fid" else f"<br>lost {percent(cost)}"
    return (
        f"at {point.beta:g}<br>{shares}<br>FD {point.fd:.3f} (noise floor {point.fd_floor:.3f}){told}"
        f"<br>n = {first.n}, {first.n_uncertain} undecided"
    )


def _lost(point: SweepPoint, lost: str) -> float | None:
    if lost == "fid":
        return point.fid
    if lost == "others" and point.agreement:
        return 1 - float(np.mean(list(point.agreement.values())))
    if lost not in point.agreement:
        known = ", ".join(["fid", "others", *point.agreement])
        raise LensError(f"What was lost is measured as one of {known}; '{lost}' is not.")
    return 1 - point.agreement[lost]


def _of(lost: str) -> str:
    return "attribute changed" if lost == "others" else lost


def _lost_title(lost: str, fid_name: str) -> str:
    if lost == "fid":
        return f"{fid_name}, to the unedited images"
    return "other attributes changed, mean" if lost == "others" else f"images with another {lost}"
