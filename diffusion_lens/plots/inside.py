"""What lies inside the model: probe accuracy, attribution and activation by step, the atlas of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from diffusion_lens.base.types import Atlas, Attribution, LensError
from diffusion_lens.plots.theme import (
    CONTROL,
    DIVERGING,
    OKABE_ITO,
    SEQUENTIAL,
    TEXT,
    blank,
    colour_bar,
    percent,
    style,
)

CHOSEN = "#009E73"
"""Stands apart from both ends of the diverging scale and from cividis."""


def probe_figure(accuracy: Mapping[str, np.ndarray], *, chance: Mapping[str, float]) -> go.Figure:
    """Held-out accuracy of the linear probe at every denoising step, one line per attribute.

    Args:
        accuracy: attribute → ``[step]``.
        chance: attribute → accuracy of always guessing the commonest class, drawn as a thin dotted line.
    """
    figure = blank(x_title="denoising step (first is noise)", y_title="held-out accuracy")
    for index, (name, values) in enumerate(accuracy.items()):
        look = style(index)
        steps = np.arange(1, len(values) + 1)
        figure.add_scatter(
            name=name,
            legendgroup=name,
            mode="lines+markers",
            x=steps,
            y=values,
            line={"color": look.colour, "dash": look.dash, "width": 2},
            marker={"symbol": look.symbol, "size": 7, "color": look.colour},
            hovertemplate=f"<b>{name}</b><br>step %{{x}}: %{{y:.1%}} (guessing {percent(chance[name])})<extra></extra>",
        )
        figure.add_scatter(
            legendgroup=name,
            showlegend=False,
            mode="lines",
            x=steps[[0, -1]],
            y=[chance[name]] * 2,
            line={"color": look.colour, "dash": "dot", "width": 1},
            hovertemplate=f"guessing {name}: %{{y:.0%}}<extra></extra>",
        )
    figure.update_yaxes(tickformat=".0%")
    return figure


def describe_probe(accuracy: Mapping[str, np.ndarray], *, chance: Mapping[str, float]) -> str:
    """First, best and guessing accuracy per attribute."""
    parts = [
        f"{name} {percent(float(v[0]))} at the first step, best {percent(float(v.max()))} at step "
        f"{int(v.argmax()) + 1} (guessing {percent(chance[name])})"
        for name, v in accuracy.items()
    ]
    return f"Held-out accuracy of the linear probe: {'; '.join(parts)}."


def attribution_figure(attribution: Attribution, target: str, *, k: int = 15) -> go.Figure:
    """Attribution of the ``k`` strongest features for class ``target`` at every step, strongest on top."""
    ids, scores = _strongest(attribution, target, k)
    reach = float(np.abs(scores).max()) or 1.0
    signed = bool((scores < 0).any())
    figure = blank(height=110 + 22 * len(ids), x_title="denoising step (first is noise)", y_title="feature")
    figure.add_heatmap(
        z=scores,
        x=np.arange(1, scores.shape[1] + 1),
        y=[f"#{i}" for i in ids],
        zmin=-reach if signed else 0,
        zmax=reach,
        colorscale=DIVERGING if signed else SEQUENTIAL,
        hovertemplate=f"feature %{{y}}, step %{{x}}<br>attribution to {target}: %{{z:.4f}}<extra></extra>",
        colorbar=colour_bar(f"attribution to {target}"),
    )
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def describe_attribution(attribution: Attribution, target: str, *, k: int = 15) -> str:
    """The strongest features and the steps where they weigh most."""
    ids, scores = _strongest(attribution, target, k)
    top = ", ".join(f"#{i}" for i in ids[:3])
    peak = int(scores.sum(axis=0).argmax()) + 1
    return (
        f"The features with the largest attribution to {target} are {top}; the {len(ids)} shown weigh most at step "
        f"{peak} of {scores.shape[1]} ({attribution.method}, {attribution.n_images} images)."
    )


def step_profile_figure(profile: np.ndarray, steps: Sequence[int], *, feature: int) -> go.Figure:
    """Mean activation of one feature at each step read; ``profile [step]``, ``steps`` their indices from 0."""
    look = style(0)
    figure = blank(height=240, x_title="denoising step (first is noise)", y_title="mean activation")
    figure.add_scatter(
        mode="lines+markers",
        x=[s + 1 for s in steps],
        y=profile,
        cliponaxis=False,
        fill="tozeroy",
        fillcolor=look.band,
        line={"color": look.colour, "width": 2},
        marker={"symbol": look.symbol, "size": 7, "color": look.colour},
        hovertemplate=f"feature #{feature}, step %{{x}}: %{{y:.3g}}<extra></extra>",
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


def describe_step_profile(profile: np.ndarray, steps: Sequence[int], *, feature: int) -> str:
    """When the feature is most active."""
    if not np.any(profile):
        return f"Feature #{feature} never fires."
    best = int(np.argmax(profile))
    return f"Feature #{feature} is most active at step {steps[best] + 1} (mean activation {profile[best]:.3g})."


def atlas_figure(
    atlas: Atlas,
    *,
    scores: np.ndarray | None = None,
    score_name: str = "density",
    chosen: Sequence[int] = (),
    only: Sequence[int] | None = None,
) -> go.Figure:
    """The map of features: a point per decoder direction; its id is the point's ``customdata[0]``.

    Args:
        scores: what colours the points, ``[d_sae]``; default the density. Signed scores get a diverging scale.
        chosen: features drawn with a ring, e.g. the ones being turned.
        only: features shown in full; all others become small grey dots.
    """
    values = _scores(atlas, scores)
    live = np.flatnonzero(~atlas.dead)
    dead = np.flatnonzero(atlas.dead)
    signed = bool((values[live] < 0).any())
    reach = float(np.abs(values[live]).max(initial=0)) or 1.0
    figure = blank(height=460)
    if only is not None:
        _add_others(figure, atlas, np.setdiff1d(live, only))
        live = np.intersect1d(live, only)
    if len(dead):
        figure.add_scatter(
            name="dead",
            mode="markers",
            x=atlas.xy[dead, 0],
            y=atlas.xy[dead, 1],
            marker={"symbol": "x-thin", "size": 5, "line": {"width": 1, "color": CONTROL}},
            customdata=dead[:, None],
            hovertemplate="feature #%{customdata[0]}: never fires<extra></extra>",
        )
    order = live[np.argsort(np.abs(values[live]), kind="stable")]  # the strongest are drawn last, on top
    figure.add_scatter(
        name="features",
        mode="markers",
        x=atlas.xy[order, 0],
        y=atlas.xy[order, 1],
        marker={
            "size": 5 + 7 * np.abs(values[order]) / reach,
            "color": values[order],
            "colorscale": DIVERGING if signed else SEQUENTIAL,
            "cmin": -reach if signed else 0,
            "cmax": reach,
            "line": {"width": 0.5, "color": TEXT},
            "colorbar": colour_bar(score_name),
        },
        customdata=[[int(i), atlas.labels[i] or "no label", float(atlas.density[i])] for i in order],
        hovertemplate=f"feature #%{{customdata[0]}}: %{{customdata[1]}}<br>{score_name} %{{marker.color:.4g}}"
        "<br>fires on %{customdata[2]:.2%} of positions<extra></extra>",
    )
    _add_ring(figure, atlas, chosen)
    return figure


def atlas_groups_figure(atlas: Atlas, groups: Mapping[str, Sequence[int]], *, chosen: Sequence[int] = ()) -> go.Figure:
    """The same map, features told apart by what they control (colour and marker); all others small and grey.

    Args:
        groups: what is controlled → features; empty groups are left out.
        chosen: features drawn with a ring.
    """
    figure = blank(height=460)
    known = np.array([i for own in groups.values() for i in own], dtype=np.int64)
    _add_others(figure, atlas, np.setdiff1d(np.arange(len(atlas.density)), known))
    for index, (name, own) in enumerate(groups.items()):
        if not len(own):
            continue
        look, rows = style(index), np.array(own)
        figure.add_scatter(
            name=f"{name} ({len(own)})",
            mode="markers",
            x=atlas.xy[rows, 0],
            y=atlas.xy[rows, 1],
            marker={
                "symbol": look.symbol if index < len(OKABE_ITO) else f"{look.symbol}-open",
                "size": 11,
                "color": look.colour,
                "line": {"width": 0.5 if index < len(OKABE_ITO) else 2, "color": look.colour},
            },
            customdata=[[int(i), atlas.labels[i] or "no label"] for i in own],
            hovertemplate=f"feature #%{{customdata[0]}}, controls {name}: %{{customdata[1]}}<extra></extra>",
        )
    _add_ring(figure, atlas, chosen)
    figure.update_layout(showlegend=True)
    return figure


def describe_groups(atlas: Atlas, groups: Mapping[str, Sequence[int]], *, chosen: Sequence[int] = ()) -> str:
    """How many features control what, and which come first."""
    parts = [f"{name}: {len(own)} (first #{own[0]})" for name, own in groups.items() if len(own)]
    ring = f" Chosen: {', '.join(f'#{i}' for i in chosen[:10])}." if chosen else ""
    told = "; ".join(parts) or "none for sure"
    n = len(atlas.density)
    return f"Map ({atlas.layout}) of {n} features, marked by what turning one alone changes: {told}.{ring}"


def _add_others(figure: go.Figure, atlas: Atlas, rows: np.ndarray) -> None:
    figure.add_scatter(
        name="others",
        showlegend=False,
        mode="markers",
        x=atlas.xy[rows, 0],
        y=atlas.xy[rows, 1],
        marker={"size": 4, "color": CONTROL, "opacity": 0.5},
        customdata=rows[:, None],
        hovertemplate="feature #%{customdata[0]}<extra></extra>",
    )


def _add_ring(figure: go.Figure, atlas: Atlas, chosen: Sequence[int]) -> None:
    if chosen:
        rows = np.array(chosen)
        figure.add_scatter(
            name="chosen",
            showlegend=False,
            mode="markers",
            x=atlas.xy[rows, 0],
            y=atlas.xy[rows, 1],
            marker={"symbol": "circle-open", "size": 17, "color": CHOSEN, "line": {"width": 3}},
            customdata=rows[:, None],
            hovertemplate="chosen feature #%{customdata[0]}<extra></extra>",
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)


def describe_atlas(
    atlas: Atlas, *, scores: np.ndarray | None = None, score_name: str = "density", chosen: Sequence[int] = ()
) -> str:
    """How many features there are, which stand out, which are chosen."""
    values = np.where(atlas.dead, 0, _scores(atlas, scores))
    top = np.argsort(-np.abs(values), kind="stable")[:3]
    named = ", ".join(f"#{i} ({values[i]:.3g})" for i in top)
    ring = f" Chosen: {', '.join(f'#{i}' for i in chosen[:10])}." if chosen else ""
    return (
        f"Map ({atlas.layout}) of {len(values)} features, {int(atlas.dead.sum())} of them dead; "
        f"near points write similar directions. Largest {score_name}: {named}.{ring}"
    )


def _strongest(attribution: Attribution, target: str, k: int) -> tuple[tuple[int, ...], np.ndarray]:
    total = attribution.total(target)
    if not 1 <= k <= total.size:
        raise LensError(f"Choose between 1 and {total.size} features; you asked for {k}.")
    ids = np.argsort(-total, kind="stable")[:k]
    return tuple(int(i) for i in ids), attribution.scores[attribution.attribute.index(target)][:, ids].T


def _scores(atlas: Atlas, scores: np.ndarray | None) -> np.ndarray:
    values = np.asarray(atlas.density if scores is None else scores, dtype=np.float64)
    if values.shape != atlas.density.shape:
        raise LensError(f"The map has {atlas.density.size} features; got scores of shape {values.shape}.")
    return values
