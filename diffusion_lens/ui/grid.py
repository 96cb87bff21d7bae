"""A row of images, each with what the classifier reads in it, for pages that have no workbench."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_lens.base.types import Attribute
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Picture, Row
from diffusion_lens.ui.html import html


@dataclass(frozen=True)
class Cell:
    """One image ``uint8 [H, W, 3]``: ``alt`` names seed and change, ``changed`` that its class is another than before.

    ``name``: what it is read as.
    """

    image: np.ndarray
    alt: str
    name: str
    changed: bool


def row_html(picture: Picture, attribute: Attribute, *, edited: bool) -> str:
    """One row of images, each with what the classifier reads in it; edited images that changed class say so."""
    row = picture.after if edited else picture.before
    seeds = picture.view.seeds
    cells = [_cell(row, picture.before, i, seed, attribute, edited) for i, seed in enumerate(seeds)]
    return html("pictures.row", _title(picture.view, picture.beta, edited), cells, "after" if edited else "before")


def _title(view: View, beta: float, edited: bool) -> str:
    apart = "".join(f", #{i} at {b:g}" for i, b in view.own)
    return f"After, β = {beta:g}{apart}" if edited else "Before, the model as it is"


def _cell(row: Row, before: Row, i: int, seed: int, attribute: Attribute, edited: bool) -> Cell:
    name, was = _name(row, i, attribute), _name(before, i, attribute)
    changed = edited and was != name
    sure = "" if row.confidence is None else f", {row.confidence[i]:.0%} sure"
    alt = f"Seed {seed}, {'steered' if edited else 'as the model draws it'}: read as {name}{sure}"
    return Cell(row.images[i], alt + (f", was {was}" if changed else ""), name, changed)


def _name(row: Row, i: int, attribute: Attribute) -> str:
    return attribute.classes[int(row.labels[i])] if row.certain[i] else "uncertain"
