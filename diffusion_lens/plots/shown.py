"""The figure that a result shows of itself: what ``result.plot()`` draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from diffusion_lens.base.types import LensError
from diffusion_lens.plots.compared import tradeoff_figure
from diffusion_lens.plots.measured import share_figure, sweep_figure
from diffusion_lens.results.comparison import Comparison
from diffusion_lens.results.measurement import Figures
from diffusion_lens.results.sweeps import SweepResult


def plot(result: object, **options: Any) -> go.Figure:
    """The figure of a result; raises ``LensError`` for a type that has none."""
    for kind, draw in _DRAWN.items():
        if isinstance(result, kind):
            return draw(result, **options)
    raise LensError(f"Nothing is drawn of a {type(result).__name__}; there are figures of {_names()}.")


def _shares(figures: Figures) -> go.Figure:
    reference = figures.measurement.reference
    groups = {} if reference is None else {"unedited": reference[figures.attribute.name].shares}
    return share_figure({**groups, "edited" if figures.edit else "unedited": figures.shares})


def _sweep(result: SweepResult) -> go.Figure:
    two = len(result.attribute.classes) == 2
    return sweep_figure([result], measure="log_ratio" if two else "share")


def _comparison(found: Comparison, *, lost: str = "fid") -> go.Figure:
    return tradeoff_figure({row.name: found.curves[row.method] for row in found.rows if row.method in found.curves},
                           lost=lost)  # fmt: skip


_DRAWN: dict[type, Callable[..., go.Figure]] = {Figures: _shares, SweepResult: _sweep, Comparison: _comparison}


def _names() -> str:
    return ", ".join(kind.__name__ for kind in _DRAWN)
