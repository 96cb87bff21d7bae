"""The stored sweep as a small drawing beside the grid, with a mark at the strength on screen."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from diffusion_lens.base.types import ADJUSTED
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio

SIZES = {"dl-wide": (720.0, 200.0), "dl-tall": (360.0, 200.0)}
"""Width and height on a screen and on a phone; the style sheet shows one of them."""

LEFT, RIGHT, TOP, BOTTOM = 36.0, 8.0, 10.0, 32.0


@dataclass(frozen=True)
class Series:
    """One sweep on the drawing's axes: β, value and its interval (ends may be infinite), ``[point]`` each.

    ``adjusted`` says which values stand in for those of a zero count.
    """

    beta: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    adjusted: np.ndarray


def series(result: SweepResult) -> Series:
    """Log ratio of two classes, or the target's share of more; corrected for the classifier's error."""
    two = len(result.attribute.classes) == 2
    column = result.attribute.index(result.target)
    rows = []
    for point in result.points:
        share, ratio = point.shares[column], point.log_ratio_corrected
        if two and ratio is not None:
            rows.append((point.beta, ratio.value, *ratio.interval, ratio.haldane))
        elif not two:
            rows.append((point.beta, share.corrected, *share.corrected_interval, False))
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    beta, value, low, high, adjusted = table[np.isfinite(table[:, 1])].T
    return Series(beta, value, low, high, adjusted.astype(bool))


def curve_html(studio: Studio, view: View, beta: float) -> str:
    """The stored sweep of this prompt and attribute towards this class; empty where none is stored."""
    results = [r for r in studio.sweeps(view.prompt, view.attribute) if r.target == view.target]
    main = next((r for r in results if not r.is_control), None)
    if main is None or len(series(main).beta) < 2:
        return ""
    control = next((r for r in results if r.is_control), None)
    two = len(main.attribute.classes) == 2
    own = series(main)
    level = 0.0 if two else 1 / len(main.attribute.classes)
    at = float(np.interp(beta, own.beta, own.value))
    first, second = main.attribute.classes[:2]
    what = f"ln({second} / {first})" if two else f"share {main.target}"
    n = max(p.shares[0].n for p in main.points)
    alt = (
        f"{what} against β in the stored sweep: {own.value[0]:+.2f} at β = {own.beta[0]:g}, "
        f"{own.value[-1]:+.2f} at β = {own.beta[-1]:g}, about {at:+.2f} at β = {beta:g}. Balance is {level:.2g}."
    )
    key = "" if control is None else ", <span class='dl-key'>┄</span> random features"
    key += f"; ○ {ADJUSTED[2:]}" if own.adjusted.any() else ""
    words = (f"more {second}", f"more {first}") if two else ("", "")
    rises = bool(own.value[-1] >= own.value[0])
    drawings = []
    for kind, size in SIZES.items():
        frame = _Frame.around(own, level, two, size)
        grey = "" if control is None else frame.line(series(control), "dl-control")
        drawings.append(
            f'<svg class="{kind}" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{escape(alt)}">'
            f"{frame.axes(level)}{frame.band(own)}{grey}{frame.line(own, 'dl-main')}{frame.words(*words, rises=rises)}"
            f"{frame.mark(beta, at)}</svg>"
        )
    return (
        f'<figure class="dl-curve"><figcaption><b>{escape(what)} against β</b>, stored sweep, up to {n} images per '
        f"strength{key}</figcaption>{''.join(drawings)}</figure>"
    )


@dataclass(frozen=True)
class _Frame:
    """Data to drawing coordinates."""

    x: tuple[float, float]
    y: tuple[float, float]
    size: tuple[float, float]

    @classmethod
    def around(cls, own: Series, level: float, two: bool, size: tuple[float, float]) -> _Frame:
        if not two:
            return cls((float(own.beta[0]), float(own.beta[-1])), (0.0, 1.0), size)
        reach = max(1.2, float(np.abs([own.value.min(), own.value.max()]).max()) + 0.5)
        return cls((float(own.beta[0]), float(own.beta[-1])), (level - reach, level + reach), size)

    def at(self, beta: float, value: float) -> tuple[float, float]:
        u = (np.clip(beta, *self.x) - self.x[0]) / (self.x[1] - self.x[0])
        v = (np.clip(value, *self.y) - self.y[0]) / (self.y[1] - self.y[0])
        width, height = self.size
        return LEFT + float(u) * (width - LEFT - RIGHT), height - BOTTOM - float(v) * (height - TOP - BOTTOM)

    def line(self, s: Series, kind: str) -> str:
        places = [self.at(b, v) for b, v in zip(s.beta, s.value, strict=True)]
        dots = "".join(
            f'<circle class="{kind}{" dl-adjusted" if mark else ""}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
            for (x, y), mark in zip(places, s.adjusted, strict=True)
        )
        return f'<polyline class="{kind}" points="{_points(places)}"/>{dots if kind == "dl-main" else ""}'

    def band(self, s: Series) -> str:
        upper = [self.at(b, v) for b, v in zip(s.beta, s.high, strict=True)]
        lower = [self.at(b, v) for b, v in zip(s.beta, s.low, strict=True)]
        return f'<polygon class="dl-band" points="{_points(upper + lower[::-1])}"/>'

    def axes(self, level: float) -> str:
        parts = []
        for value in (self.y[0], level, self.y[1]):
            _, y = self.at(self.x[0], value)
            kind = "dl-level" if value == level else "dl-grid"
            text = f"{value:+.1f}" if self.y[0] < 0 else f"{value:.0%}"
            label = "0" if value == 0 else text.replace("-", "−")
            parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{self.size[0] - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
        for beta in (self.x[0], self.x[1]):
            x, _ = self.at(beta, self.y[0])
            anchor = "start" if beta == self.x[0] else "end"
            number = f"{beta:g}".replace("-", "−")
            parts.append(f'<text x="{x:.1f}" y="{self.size[1] - BOTTOM + 14}" text-anchor="{anchor}">{number}</text>')
        return "".join(parts)

    def words(self, above: str, below: str, *, rises: bool) -> str:
        """What up and down mean, in the two corners that the line does not run through."""
        if not above:
            return ""
        left, right = f'x="{LEFT + 6}"', f'x="{self.size[0] - RIGHT - 6}" text-anchor="end"'
        high, low = (left, right) if rises else (right, left)
        return (
            f'<text {high} y="{TOP + 10}">{escape(above)} ↑</text>'
            f'<text {low} y="{self.size[1] - BOTTOM - 5}">{escape(below)} ↓</text>'
        )

    def mark(self, beta: float, value: float) -> str:
        x, y = self.at(beta, value)
        anchor = "end" if x > self.size[0] - 40 else "start" if x < LEFT + 30 else "middle"
        return (
            f'<line class="dl-now" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{self.size[1] - BOTTOM}"/>'
            f'<circle class="dl-now" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f'<text class="dl-strong" x="{x:.1f}" y="{self.size[1] - 4}" text-anchor="{anchor}">β = {beta:g}</text>'
        )


def _points(places: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
