"""The look all figures share: readable on light and dark pages and at 400 px, told apart without colour."""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's colours without black and yellow, which vanish on dark and on light pages."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot", "dash")
PATTERNS = ("", "/", "x", ".", "\\", "+")
CONTROL = "#8A8A8A"
TEXT = "#767676"
"""A grey with a contrast of at least 4 : 1 on white and on near-black."""

GRID = "rgba(128, 128, 128, 0.25)"
SEQUENTIAL = "Cividis"
DIVERGING = ((0.0, "#0072B2"), (0.5, "#F2F2F2"), (1.0, "#D55E00"))


@dataclass(frozen=True)
class Style:
    """How one series is drawn."""

    colour: str
    symbol: str
    dash: str
    pattern: str

    @property
    def band(self) -> str:
        """The colour of its interval: the same, mostly transparent."""
        return fade(self.colour, 0.18)


def style(index: int, *, control: bool = False) -> Style:
    """The style of series ``index``; controls are grey, dotted, with open markers."""
    if control:
        return Style(CONTROL, f"{SYMBOLS[index % len(SYMBOLS)]}-open", "dot", ".")
    i = index % len(OKABE_ITO)
    return Style(OKABE_ITO[i], SYMBOLS[i], DASHES[i], PATTERNS[i])


def fade(colour: str, alpha: float) -> str:
    """``#rrggbb`` as ``rgba(…)``."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"


def blank(*, height: int = 380, x_title: str = "", y_title: str = "") -> go.Figure:
    """An empty figure in the common look, transparent, legend on top."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True}
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": TEXT},
        colorway=OKABE_ITO,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0, 0, 0, 0)"},
        hoverlabel={"align": "left", "namelength": -1, "font": {"size": 13}},
        xaxis={**axis, "title": {"text": x_title, "font": {"size": 13}, "standoff": 6}},
        yaxis={**axis, "title": {"text": y_title, "font": {"size": 13}, "standoff": 6}},
    )
    return figure


def colour_bar(title: str, *, tickformat: str = "") -> dict[str, object]:
    """A slim colour bar with its title on its side."""
    return {
        "title": {"text": title, "side": "right", "font": {"size": 13}},
        "thickness": 12,
        "outlinewidth": 0,
        "tickformat": tickformat,
        "xpad": 4,
    }


def percent(share: float) -> str:
    """``0.5`` → ``50 %``; NaN → ``unknown``."""
    return "unknown" if math.isnan(share) else f"{share * 100:.0f} %"


def span(interval: tuple[float, float]) -> str:
    """``(0.4, 0.6)`` → ``40–60 %``."""
    return f"{interval[0] * 100:.0f}–{interval[1] * 100:.0f} %"


def points(difference: float) -> str:
    """``0.04`` → ``+4``: percentage points with their sign; never ``-0``."""
    rounded = round(difference * 100)
    return f"{rounded:+d}".replace("-", "−") if rounded else "0"
