"""The report's figures as SVG: dots for shares, whiskers for their intervals, a tick for the reference."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from diffusion_lens.studies.audit.record import Point, Verdict

WIDTH, ROW, TOP = 400, 15, 4
LEFT, RIGHT = 6, 394
SHAPES = ("circle", "diamond", "square", "triangle")


def place(share: float) -> float:
    """Where a share stands, in the figure's units."""
    return LEFT + (RIGHT - LEFT) * share


def shape(number: int, x: float, y: float, *, control: bool = False) -> str:
    """The mark of condition ``number`` (0: unedited, hollow): told apart by shape, and not by colour alone."""
    css = "before" if number == 0 else "control" if control else "after"
    kind = SHAPES[number % len(SHAPES)]
    if kind == "circle":
        return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if kind == "square":
        return f'<rect class="{css}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    points = ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)) if kind == "diamond" else ((0, -5.5), (5.2, 4), (-5.2, 4))
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in points)
    return f'<polygon class="{css}" points="{path}"/>'


def mark(number: int, control: bool) -> Markup:
    """A condition's mark for a legend."""
    return Markup(
        f'<svg class="mark" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">'
        f"{shape(number, 7, 7, control=control)}</svg>"
    )


def dots(verdict: Verdict, controls: Sequence[bool]) -> Markup:
    """One row of page one: every condition's share on a line from 0 to 100 %, and where the reference stands."""
    height = 2 * TOP + ROW * len(verdict.points)
    parts = [f'<line class="axis" x1="{place(s):.1f}" x2="{place(s):.1f}" y1="0" y2="{height}"/>' for s in TICKS]
    if verdict.reference is not None:
        x = place(verdict.reference)
        parts.append(f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    for number, point in enumerate(verdict.points):
        y = TOP + ROW * (number + 0.5)
        if point.n:
            parts.append(
                f'<line class="span" x1="{place(point.low):.1f}" x2="{place(point.high):.1f}" y1="{y}" y2="{y}"/>'
            )
        if point.share is not None:
            parts.append(shape(number, place(point.share), y, control=controls[number]))
    return Markup(
        f'<svg class="dots" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(says(verdict))}" '
        f'preserveAspectRatio="none">{"".join(parts)}</svg>'
    )


TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def says(verdict: Verdict) -> str:
    """A row in one sentence, for those who do not see it."""
    told = "; ".join(f"{point.edit}: {_share(point)}, {point.word}" for point in verdict.points)
    reference = "no reference" if verdict.reference is None else f"{verdict.against} {verdict.reference:.0%}"
    return f"Share of {verdict.label}. {told}. Reference: {reference}."


def _share(point: Point) -> str:
    if point.share is None:
        return "no decided image"
    return f"{point.share:.0%} ({point.low:.0%} to {point.high:.0%})"
