"""A sweep as images along the β axis, as a table, and as a file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from diffusion_lens.plots import describe_spillover
from diffusion_lens.results.sweeps import SweepPoint, SweepResult
from diffusion_lens.studio.pictures import data_uri
from diffusion_lens.studio.studio import as_json

SHOWN = 4


def strips_html(result: SweepResult | None) -> str:
    """One column of the same seeds per strength."""
    if result is None or not any(len(p.examples) for p in result.points):
        return ""
    columns = "".join(_column(point, result) for point in result.points)
    return (
        '<section class="dl-strips" aria-label="The same seeds at every strength" tabindex="0">'
        f'<h2>The same seeds along β</h2><div class="dl-axis">{columns}</div></section>'
    )


def _column(point: SweepPoint, result: SweepResult) -> str:
    images = "".join(
        f'<img src="{data_uri(image)}" decoding="sync" alt="{escape(_alt(point, result, i))}">'
        for i, image in enumerate(point.examples[:SHOWN])
    )
    return f'<div class="dl-column">{images}<p>β = {point.beta:g}</p></div>'


def _alt(point: SweepPoint, result: SweepResult, i: int) -> str:
    name = result.attribute.classes[int(point.labels[i])] if point.certain[i] else "uncertain"
    return f"Seed {result.request.seeds[i]} at β = {point.beta:g}: read as {name}"


def spillover_html(results: Sequence[SweepResult]) -> str:
    """What else moved at the ends of the sweep, beyond its interval."""
    main = next((r for r in results if not r.is_control), None)
    if main is None:
        return ""
    ends = {f"to β = {p.beta:g}": p.changes for p in (main.points[0], main.points[-1]) if p.changes}
    return f'<p class="dl-says"><b>Side effects.</b> {escape(describe_spillover(ends))}</p>' if ends else ""


def table_html(results: Sequence[SweepResult]) -> str:
    """Every point with its counts and intervals, for reading and for screen readers."""
    if not results:
        return ""
    parts = []
    for result in results:
        rows = "".join(_row(point, result) for point in result.points)
        ratio = "<th scope='col'>log ratio (95 %)</th>" if len(result.attribute.classes) == 2 else ""
        name = f"control: {result.control}" if result.is_control else result.setting
        parts.append(
            f"<table><caption>{escape(name)}</caption><thead><tr><th scope='col'>β</th>"
            f"<th scope='col'>share {escape(result.target)} (95 %)</th>{ratio}<th scope='col'>FD</th>"
            f"<th scope='col'>n</th><th scope='col'>uncertain</th></tr></thead><tbody>{rows}</tbody></table>"
        )
        notes = {p.log_ratio_corrected.note for p in result.points if p.log_ratio_corrected} - {""}
        parts += [f"<p>{escape(note)}</p>" for note in notes]
    return (
        f'<details class="dl-table"><summary>All numbers as a table</summary><div class="dl-scroll" tabindex="0">'
        f"{''.join(parts)}</div></details>"
    )


def _row(point: SweepPoint, result: SweepResult) -> str:
    share = point.shares[result.attribute.index(result.target)]
    low, high = share.corrected_interval
    cells = [f"{share.corrected:.0%} ({low:.0%} to {high:.0%})"]
    if len(result.attribute.classes) == 2:
        cells.append("–" if point.log_ratio_corrected is None else point.log_ratio_corrected.text)
    within = " (within noise)" if point.fd <= point.fd_floor else ""
    cells += [f"{point.fd:.3f}{within}", str(share.n), str(share.n_uncertain)]
    return f"<tr><th scope='row'>{point.beta:g}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def download_html(results: Sequence[SweepResult]) -> str:
    """A link that saves the sweep as JSON, straight from the page: nothing is kept on the server."""
    if not results:
        return ""
    text = base64.b64encode(as_json(tuple(results)).encode()).decode()
    name = f"sweep-{results[0].attribute.name}.json"
    href = f"data:application/json;base64,{text}"
    return f'<a class="dl-download" download="{escape(name)}" href="{href}">Download JSON</a>'
