"""What the Methods tab shows: a stored comparison, what a method is, and the same seeds three times."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from diffusion_lens.base.types import Attribute
from diffusion_lens.results.as_json import row_json
from diffusion_lens.results.comparison import Comparison
from diffusion_lens.results.comparison_tables import COLUMNS, PARTS, cells, columns_of, csv_text
from diffusion_lens.studio import compared
from diffusion_lens.studio.methods_live import Trio
from diffusion_lens.studio.studio import Row
from diffusion_lens.ui.downloads import data_address
from diffusion_lens.ui.html import html
from diffusion_lens.ui.panel import KEEP

if TYPE_CHECKING:
    from diffusion_lens.methods.protocol import Method

MEANING = {
    "strength": "the best setting, of the method's own scale",
    "rank": "of those at balance, 1 + the methods that surely keep more; equal ranks cannot be told apart",
    "margin": "what is kept above random features at their balance, paired over seeds",
    "fd": "distance of the shares from the target; 0 is balance",
    "fd_floor": "what FD reaches by chance at perfect balance",
    "log_ratio_corrected": "0 is balance, corrected for the classifier's error",
    "spd": "largest difference between two shares",
    "kept": "share of images whose other attributes stayed as they were",
    "certain": "share of images that the classifier decides",
    "subgroup_entropy": "how unsure the classifier is within each class",
    "activation_ratio": "size of the bottleneck, 1 is as it was; ! leaves the data's range",
    "seconds_to_fit": "once", "seconds_per_image": "on the machine that made the table",
}  # fmt: skip


@dataclass(frozen=True)
class CompareView:
    """The stored comparison of one attribute in one measure, or how to make one."""

    headline: str
    table: str = ""
    curves: str = ""
    more: str = ""
    measure: dict[str, Any] = KEEP


@dataclass(frozen=True)
class Counted:
    """How many images of a row are perceived as the target, with the 95 % interval of their share."""

    target: str
    k: int
    n: int
    undecided: int
    share: float
    low: float
    high: float
    even: float


@dataclass(frozen=True)
class SeedImage:
    """One seed's image in one of the rows; ``moved``: perceived as another class than unedited."""

    pixels: np.ndarray
    name: str
    moved: bool
    alt: str


@dataclass(frozen=True)
class TrioRow:
    """One of the three rows."""

    kind: str
    title: str
    counted: Counted
    images: tuple[SeedImage, ...]


def compare_view(comparison: Comparison | None, attribute: str, measure: str, target: str, problem: str) -> CompareView:
    """What the tab shows of a comparison; ``None``: there is none, or ``problem`` says what is wrong with it."""
    if comparison is None:
        return CompareView(html("methods.missing", attribute, problem), measure=gr.update(visible=False))
    known = compared.measures(comparison, target)
    measure = measure if measure in known else known[0]
    shown = compared.shown(comparison, measure)
    return CompareView(
        html("methods.headline", shown.headline),
        html("methods.table", shown),
        html("methods.curves", shown),
        everything(comparison),
        gr.update(choices=known, value=measure, visible=True),
    )


def everything(comparison: Comparison) -> str:
    """Every column in parts, and the numbers as files."""
    named, starred = {**MEANING, **comparison.labels}, compared.stars(comparison)
    parts = []
    for part in PARTS:
        fields = columns_of(comparison, part)
        columns = [(COLUMNS[field], named.get(field, "")) for field in fields]
        rows = [
            (
                row,
                [(text, starred.get(f) == row.method) for text, f in zip(cells(row, fields), fields, strict=True)][1:],
            )
            for row in comparison.rows
        ]
        parts.append((part, columns, rows))
    meanings = [(COLUMNS[field], named[field]) for field in columns_of(comparison) if field in named]
    rows_as_json = json.dumps([row_json(row) for row in comparison.rows], ensure_ascii=False)
    return html(
        "methods.everything", comparison, parts, meanings, data_address(csv_text(comparison), "text/csv"),
        data_address(rows_as_json, "application/json"),
    )  # fmt: skip


def method_html(method: Method, expected: float) -> str:
    """What a method is, where it comes from, and what its fit will cost."""
    return html(
        "methods.method", method,
        f"Fitting takes {_about(expected)}, once." if expected else "Nothing to wait for: it is fitted.",
    )  # fmt: skip


def _about(seconds: float) -> str:
    if seconds < 5:
        return "a few seconds"
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} minutes"


def trio_html(trio: Trio, attribute: Attribute) -> str:
    """The three rows, each with the share that it shows."""
    picture = trio.picture
    same = np.array_equal(picture.before.images, picture.after.images)
    still = " (which changes nothing: steer in Explore)" if same else ""
    towards = f"{trio.name}, {trio.strength_name} = {trio.wish.strength:g}, towards {trio.goal}"
    rows = (
        ("before", "Before, the model as it is", picture.before),
        ("lens", f"DiffLens as Explore is set, β = {picture.beta:g}{still}", picture.after),
        ("other", towards, trio.other),
    )
    return html("methods.trio", [_row(kind, title, row, trio, attribute) for kind, title, row in rows])


def _row(kind: str, title: str, row: Row, trio: Trio, attribute: Attribute) -> TrioRow:
    before, view = trio.picture.before, trio.picture.view
    images = []
    for i, seed in enumerate(view.seeds):
        name, was = _name(row, i, attribute), _name(before, i, attribute)
        alt = f"Seed {seed}, {title}: perceived as {name}{f', was {was}' if name != was else ''}"
        images.append(SeedImage(row.images[i], name, name != was, alt))
    return TrioRow(kind, title, count(row, attribute, view.target), tuple(images))


def _name(row: Row, i: int, attribute: Attribute) -> str:
    return attribute.classes[int(row.labels[i])] if row.certain[i] else "uncertain"


def count(row: Row, attribute: Attribute, target: str) -> Counted:
    """The target's share among the decided images of a row."""
    from diffusion_lens.results.stats import share_interval

    column, n = attribute.index(target), int(row.certain.sum())
    k = int(((row.labels == column) & row.certain).sum())
    low, high = share_interval(k, n) if n else (0.0, 1.0)
    even = 1 / len(attribute.classes)
    return Counted(target, k, n, len(row.certain) - n, k / n if n else float("nan"), low, high, even)


def said(trio: Trio, attribute: Attribute) -> str:
    """One sentence for the status line."""
    picture = trio.picture
    target = picture.view.target
    counts = [count(row, attribute, target) for row in (picture.before, picture.after, trio.other)]
    before, lens, other = (f"{c.k} of {c.n}" for c in counts)
    flag = "" if trio.activation_ratio is None or 0.8 <= trio.activation_ratio <= 1.25 else (
        f" Pushed unusually hard ({trio.activation_ratio:.1f} ×): images may break."
    )  # fmt: skip
    return (
        f"Perceived as {target}: before {before}, DiffLens {lens}, {trio.name} {other}. Drawn in {trio.seconds:.1f} s."
        f"{flag} {len(picture.view.seeds)} images show what a method does, not how often."
    )
