"""Where an attribute lives: sites by steps, how well it is read there and how far it is steered from there."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from diffusion_lens.plots.theme import DIVERGING, SEQUENTIAL, TEXT, blank, percent, points, span
from diffusion_lens.results.scan import Cell, Scan

ROW, GAP = 30, 56
"""Pixels a site, and between both maps."""
DARK = "#1A1A1A"


def scan_figure(scan: Scan, attribute: str) -> go.Figure:
    """Two maps of sites by steps: a probe's accuracy, and points that the target class moved; * where it is sure."""
    about = next(a for a in scan.attributes if a.name == attribute)
    sites, steps = [_short(s.name) for s in scan.sites], [s.label for s in scan.steps]
    rows = [scan.column(attribute, s.name) for s in scan.sites]
    figure = make_subplots(
        rows=2, cols=1, vertical_spacing=GAP / _height(scan),
        subplot_titles=("A probe reads it: % right", f"Steered there: points more {about.target}"),
    )  # fmt: skip
    chance = 1 / len(about.classes)
    read = [[c for c in row if c.reading is not None] for row in rows]
    figure.add_trace(
        go.Heatmap(
            x=[steps[c.steps] for c in read[0]], y=sites, z=[[_share(c) for c in row] for row in read],
            zmin=chance, zmax=1, colorscale=SEQUENTIAL, showscale=False,
            text=[[_accuracy(c) for c in row] for row in read], texttemplate="%{text}",
            customdata=[[_read_text(c) for c in row] for row in read], hovertemplate="%{customdata}<extra></extra>",
        ),
        row=1, col=1,
    )  # fmt: skip
    figure.add_trace(
        go.Heatmap(
            x=steps, y=sites, z=[[100 * c.steering.direction.change for c in row] for row in rows],
            zmin=-100, zmax=100, colorscale=[list(stop) for stop in DIVERGING], showscale=False,
            text=[[_change(c) for c in row] for row in rows], texttemplate="%{text}", textfont={"color": DARK},
            customdata=[[_moved_text(c, about.target) for c in row] for row in rows],
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=2, col=1,
    )  # fmt: skip
    look = blank().layout
    figure.update_layout(
        height=_height(scan), template="none", paper_bgcolor=look.paper_bgcolor, plot_bgcolor=look.plot_bgcolor,
        font=look.font, hoverlabel=look.hoverlabel, margin={"l": 8, "r": 12, "t": 30, "b": 52},
    )  # fmt: skip
    figure.update_annotations(font={"size": 13, "color": TEXT})
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False, ticks="")
    figure.update_xaxes(type="category", showgrid=False, automargin=True, ticks="")
    figure.update_xaxes(
        title={"text": "denoising steps, from noise", "font": {"size": 13}, "standoff": 8}, row=2, col=1
    )
    return figure


def _height(scan: Scan) -> int:
    return 82 + GAP + 2 * ROW * max(2, len(scan.sites))


def _short(site: str) -> str:
    """A site's name where there is little room; the table has it whole."""
    for long, short in (
        ("transformer_blocks.", "block "), ("down_blocks.", "down "), ("up_blocks.", "up "), ("mid_block", "middle"),
        (":output:across", " + skip"), (".attentions.", ", attention "),
    ):  # fmt: skip
        site = site.replace(long, short)
    return site


def describe_scan(scan: Scan, attribute: str) -> str:
    """Where the attribute is read best, where it is steered best, and whether these are one place."""
    about = next(a for a in scan.attributes if a.name == attribute)
    read = scan.reads_best(attribute)
    best = max((scan.best(attribute, s.name) for s in scan.sites), key=lambda c: c.steering.score)
    assert read.reading is not None
    told = (
        f"{attribute.capitalize()} is read best at {read.site}, steps {scan.steps[read.steps].label}: "
        f"{percent(read.reading.accuracy)} right ({span(read.reading.interval)}; {percent(read.reading.shuffled)} "
        "with shuffled labels)."
    )
    if not best.steering.is_sure:
        return f"{told} No site moves it further than a random direction of the same length does."
    own = best.steering.direction
    return (
        f"{told} It is steered best at {best.site}, steps {scan.steps[best.steps].label}: {points(own.change)} points "
        f"more {about.target} ({points(own.interval[0])} to {points(own.interval[1])}, n = {own.n}; random direction "
        f"{points(best.steering.control.change)}), {percent(own.kept)} of the other attributes kept."
    )


def _share(cell: Cell) -> float:
    return math.nan if cell.reading is None else cell.reading.accuracy


def _accuracy(cell: Cell) -> str:
    return "" if cell.reading is None else f"{100 * cell.reading.accuracy:.0f}{' *' if cell.reading.is_sure else ''}"


def _change(cell: Cell) -> str:
    change = cell.steering.direction.change
    return "–" if math.isnan(change) else f"{points(change)}{' *' if cell.steering.is_sure else ''}"


def _read_text(cell: Cell) -> str:
    if cell.reading is None:
        return "a probe reads one step"
    read = cell.reading
    return (
        f"{cell.site}<br>{percent(read.accuracy)} right ({span(read.interval)}), n = {read.n}"
        f"<br>shuffled labels {percent(read.shuffled)} ({span(read.shuffled_range)} in {read.n_shuffles})"
    )


def _moved_text(cell: Cell, target: str) -> str:
    own, control = cell.steering.direction, cell.steering.control
    if own.n == 0:
        return f"{cell.site}<br>no image was decided both times ({own.n_uncertain} undecided)"
    return (
        f"{cell.site}<br>{points(own.change)} points more {target} "
        f"({points(own.interval[0])} to {points(own.interval[1])}), n = {own.n}, {own.n_uncertain} undecided"
        f"<br>random direction {points(control.change)} "
        f"({points(control.interval[0])} to {points(control.interval[1])})"
        f"<br>{percent(own.kept)} of the other attributes kept (random: {percent(control.kept)})"
    )
