"""Tables with numbers in their cells: spillover and confusion; and bias by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from diffusion_lens.base.types import Attribute, Change, LensError, Share, is_assumed
from diffusion_lens.plots.theme import DIVERGING, SEQUENTIAL, TEXT, blank, percent, points, span, style


def spillover_figure(columns: Mapping[str, Sequence[Change]]) -> go.Figure:
    """What else moved: classes of other attributes (rows) by what was steered (columns), in percentage points.

    ``columns`` maps what was steered to the changes measured; a star marks an interval that excludes zero.
    """
    rows = _change_rows(columns)
    cells = [[_find(changes, row) for changes in columns.values()] for row in rows]
    z = np.array([[np.nan if c is None else 100 * c.difference for c in line] for line in cells])
    reach = max(1.0, float(np.nanmax(np.abs(z)))) if np.isfinite(z).any() else 1.0
    figure = blank(height=60 + 46 * len(rows))
    figure.add_heatmap(
        z=z,
        x=list(columns),
        y=[f"{attribute}: {label}" for attribute, label in rows],
        zmin=-reach,
        zmax=reach,
        colorscale=DIVERGING,
        text=[["" if c is None else _cell(c) for c in line] for line in cells],
        texttemplate="%{text}",
        customdata=[["not measured" if c is None else _change_text(c) for c in line] for line in cells],
        hovertemplate="steered %{x}<br>%{customdata}<extra></extra>",
        xgap=2,
        ygap=2,
        textfont={"size": 12},
        showscale=False,
    )
    figure.update_xaxes(side="top", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def describe_spillover(columns: Mapping[str, Sequence[Change]]) -> str:
    """The classes that moved beyond their interval, largest first, per column."""
    sentences = []
    for name, changes in columns.items():
        clear = sorted((c for c in changes if _excludes_zero(c)), key=lambda c: -abs(c.difference))
        if not clear:
            sentences.append(f"Steering {name}: no other class moved beyond its 95 % interval.")
            continue
        parts = [f"{c.attribute} {c.label} {points(c.difference)} points" for c in clear[:4]]
        more = f" and {len(clear) - 4} more" if len(clear) > 4 else ""
        sentences.append(f"Steering {name} also moved {', '.join(parts)}{more}.")
    return " ".join(sentences)


def confusion_figure(counts: np.ndarray, attribute: Attribute) -> go.Figure:
    """How often each true class (row) is read as each class (column); ``counts [true, read]``."""
    counts = _check_confusion(counts, attribute)
    rates = _rates(counts)
    figure = blank(height=130 + 52 * len(counts), x_title="read as", y_title="true")
    figure.add_heatmap(
        z=rates,
        x=list(attribute.classes),
        y=list(attribute.classes),
        zmin=0,
        zmax=1,
        colorscale=SEQUENTIAL,
        text=[[_rate(r) for r in row] for row in rates],
        texttemplate="%{text}",
        customdata=counts,
        hovertemplate="true %{y}, read as %{x}: %{text} (%{customdata} images)<extra></extra>",
        xgap=2,
        ygap=2,
        showscale=False,
    )
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def describe_confusion(counts: np.ndarray, attribute: Attribute) -> str:
    """Share read rightly per class, and the commonest mistake; or that nobody measured it."""
    counts = _check_confusion(counts, attribute)
    if is_assumed(counts):
        return (
            "The error of this classifier was not measured but assumed to be none: corrected shares are the raw ones, "
            "and their intervals leave its error out."
        )
    rates = _rates(counts)
    right = ", ".join(f"{label} {_rate(rates[i, i])}" for i, label in enumerate(attribute.classes))
    wrong = np.where(np.eye(len(counts), dtype=bool), -1.0, np.nan_to_num(rates))
    i, j = np.unravel_index(int(wrong.argmax()), wrong.shape)
    worst = (
        f"the commonest mistake reads {attribute.classes[i]} as {attribute.classes[j]} ({_rate(rates[i, j])})"
        if wrong[i, j] > 0
        else "no image was misread"
    )
    return f"On {int(counts.sum())} labelled images, read rightly: {right}; {worst}."


def depth_figure(
    depths: Sequence[str],
    shares: Sequence[Share],
    *,
    training_share: float,
    name: str = "generated",
    others: Mapping[str, Sequence[Share]] | None = None,
) -> go.Figure:
    """Generated share of one class by depth of the model, with intervals, against its share in the training data.

    ``others``: further lines by name, e.g. at another guidance scale or with mid-block bypass.
    """
    lines = _depth_lines(depths, shares, name, others)
    figure = blank(x_title="depth of the model", y_title=f"share {shares[0].label}")
    for index, (title, line) in enumerate(lines.items()):
        look = style(index)
        values = np.array([s.corrected for s in line])
        ends = np.array([s.corrected_interval for s in line])
        figure.add_scatter(
            name=title,
            mode="lines+markers",
            x=list(depths),
            y=values.tolist(),
            error_y={"type": "data", "array": ends[:, 1] - values, "arrayminus": values - ends[:, 0], "thickness": 2},
            line={"color": look.colour, "width": 2, "dash": look.dash},
            marker={"symbol": look.symbol, "size": 10, "color": look.colour},
            customdata=[
                f"{percent(s.corrected)} ({span(s.corrected_interval)})<br>amplification "
                f"{points(s.corrected - training_share)} points<br>n = {s.n}, {s.n_uncertain} undecided"
                for s in line
            ],
            hovertemplate=f"{title}, %{{x}}<br>%{{customdata}}<extra></extra>",
        )
    figure.add_hline(
        y=training_share,
        line={"color": TEXT, "width": 1.5, "dash": "dot"},
        # a quarter of the way: between two depths, where no marker stands
        annotation={"text": f"training data {percent(training_share)}", "font": {"size": 12, "color": TEXT}, "x": 0.25},
        annotation_position="bottom left",
    )
    figure.update_layout(showlegend=len(lines) > 1)
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def describe_depth(
    depths: Sequence[str],
    shares: Sequence[Share],
    *,
    training_share: float,
    name: str = "generated",
    others: Mapping[str, Sequence[Share]] | None = None,
) -> str:
    """Amplification at the first and last depth of every line; whether their intervals exclude the training share."""
    lines = _depth_lines(depths, shares, name, others)
    sentences = []
    for title, line in lines.items():
        parts = []
        for depth, share in ((depths[0], line[0]), (depths[-1], line[-1])):
            low, high = share.corrected_interval
            clear = "beyond" if not low <= training_share <= high else "within"
            parts.append(
                f"at depth {depth} {percent(share.corrected)} ({points(share.corrected - training_share)} points, "
                f"{clear} its 95 % interval)"
            )
        sentences.append(f"{f'{title}: ' if len(lines) > 1 else ''}{'; '.join(parts)}")
    told = f"Share {shares[0].label} against {percent(training_share)} in the training data: "
    return f"{told}{'. '.join(sentences)}."


def _change_rows(columns: Mapping[str, Sequence[Change]]) -> list[tuple[str, str]]:
    rows = dict.fromkeys((c.attribute, c.label) for changes in columns.values() for c in changes)
    if not rows:
        raise LensError("No other attribute was measured; the classifier must read more than the steered one.")
    return list(rows)


def _find(changes: Sequence[Change], row: tuple[str, str]) -> Change | None:
    return next((c for c in changes if (c.attribute, c.label) == row), None)


def _excludes_zero(change: Change) -> bool:
    return not change.interval[0] <= 0 <= change.interval[1]


def _cell(change: Change) -> str:
    low, high = change.interval
    return f"{points(change.difference)}{' *' if _excludes_zero(change) else ''}<br>{points(low)} to {points(high)}"


def _change_text(c: Change) -> str:
    low, high = c.interval
    return (
        f"{c.attribute}: {c.label} {percent(c.before)} → {percent(c.after)}<br>{points(c.difference)} points "
        f"({points(low)} to {points(high)}), n = {c.n}"
    )


def _rate(rate: float) -> str:
    return "–" if np.isnan(rate) else f"{rate * 100:.1f} %"


def _rates(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def _check_confusion(counts: np.ndarray, attribute: Attribute) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.shape != (len(attribute.classes),) * 2:
        raise LensError(f"The confusion of {attribute.name} has one row and column per class; got {counts.shape}.")
    return counts


def _depth_lines(
    depths: Sequence[str], shares: Sequence[Share], name: str, others: Mapping[str, Sequence[Share]] | None
) -> dict[str, Sequence[Share]]:
    lines = {name: shares, **(others or {})}
    labels = {s.label for line in lines.values() for s in line}
    if not depths or any(len(line) != len(depths) for line in lines.values()) or len(labels) != 1:
        raise LensError("A depth plot takes one share of the same class per depth.")
    return lines
