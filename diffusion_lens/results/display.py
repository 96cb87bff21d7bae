"""How results show themselves: as a table (pandas), as HTML in a notebook, as a figure.

Figures are drawn by ``plots``, which stands above the results; whoever puts the package together names the module
that draws (``draw_with``), and it is imported when the first figure is asked for.
"""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_lens.base.types import LensError, LogRatio, Share

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SHOWN = 8
"""Images in a notebook's row."""

_drawn_by: list[str] = []

PAGE = """
<div><b>{{ title }}</b>
{% if rows %}<table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>{% endif %}
{% for strip in strips %}<p>{{ strip.name }}<br><img alt="{{ strip.alt }}" src="{{ strip.address }}"></p>{% endfor %}
{% if note %}<p><small>{{ note }}</small></p>{% endif %}</div>
"""


def draw_with(module: str) -> None:
    """Name the module whose ``plot(result)`` draws figures of results."""
    _drawn_by[:] = [module]


def plot(result: object, **options: Any) -> go.Figure:
    """The figure of a result; raises ``LensError`` where nothing draws, or nothing is drawn of this type."""
    if not _drawn_by:
        raise LensError("Nothing is named that draws figures; import diffusion_lens first.")
    figure: go.Figure = importlib.import_module(_drawn_by[0]).plot(result, **options)
    return figure


def frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table."""
    import pandas as pd

    return pd.DataFrame.from_records(list(rows))


def share_row(share: Share) -> dict[str, Any]:
    """A share with its counts and intervals, as a row of a table."""
    return {
        "class": share.label, "count": share.count, "n": share.n, "undecided": share.n_uncertain, "share": share.raw,
        "low": share.raw_interval[0], "high": share.raw_interval[1], "corrected": share.corrected,
        "corrected low": share.corrected_interval[0], "corrected high": share.corrected_interval[1],
    }  # fmt: skip


def ratio_row(ratio: LogRatio | None) -> dict[str, Any]:
    """A log ratio with its interval, as columns of a table; empty where there is none."""
    if ratio is None:
        return {}
    low, high = ratio.interval
    return {
        "log ratio": ratio.value, "log ratio low": low, "log ratio high": high,
        "of": f"{ratio.numerator} / {ratio.denominator}", "zero count": ratio.haldane,
    }  # fmt: skip


def picture(images: np.ndarray) -> str:
    """Images ``uint8 [n, H, W, 3]`` side by side, as a data address."""
    from PIL import Image

    strip = Image.fromarray(np.concatenate(list(images[:SHOWN]), axis=1))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(
    title: str,
    rows: Sequence[dict[str, Any]] = (),
    pictures: Iterable[tuple[str, np.ndarray]] = (),
    note: str = "",
) -> str:
    """HTML for a notebook: a title, a table, rows of images with their names, and what to bear in mind."""
    import jinja2

    columns = list(dict.fromkeys(name for row in rows for name in row))
    strips = [
        {"name": name, "alt": f"{min(SHOWN, len(images))} images: {name}", "address": picture(images)}
        for name, images in pictures
        if len(images)
    ]
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    cells = [[_cell(row.get(name, "")) for name in columns] for row in rows]
    return template.render(title=title, columns=columns, rows=cells, strips=strips, note=note)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
