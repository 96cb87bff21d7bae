"""Which stored flip-book belongs to a view, and what a page needs to flip through it without asking the server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.types import EditSpec, LensError, Predictions, beta_of, strength_of
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.flip_book import FlipBook
from diffusion_lens.results.kinds import kind_of
from diffusion_lens.studio.state import View, scale
from diffusion_lens.studio.studio import Picture, Row, Studio

NOTE = (
    "Stored frames, drawn at full steps and read as drawn; what you see is compressed, off by {error:.1f} of 255 "
    "levels on average."
)


@dataclass(frozen=True, eq=False)
class Book:
    """A stored flip-book as one view flips through it.

    Attributes:
        file: the sprite: ``columns`` frames a row, one per seed.
        target: the class towards which strengths count here, which may be the other one than the book was drawn with.
        betas: strengths of this view's slider, rising, from end to end; ``rows``: of the sprite, one per strength.
    """

    stored: FlipBook
    file: Path
    target: str
    betas: tuple[float, ...]
    rows: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Frames in a row of the sprite."""
        return len(self.stored.request.seeds)

    def nearest(self, beta: float) -> int:
        """The place in ``betas`` nearest to a strength."""
        return min(range(len(self.betas)), key=lambda i: abs(self.betas[i] - beta))

    def described(self) -> dict[str, Any]:
        """Everything but the sprite's address, as plain JSON values.

        ``labels``: attribute → a row per strength of class indices, one per seed, -1 where the classifier would not
        decide; ``sure``: its probability for the steered attribute, in hundredths.
        """
        own, rows = self.stored, list(self.rows)
        read = {a.name: np.where(own.certain[a.name], own.labels[a.name], -1)[rows] for a in own.attributes}
        return {
            "prompt": own.request.prompt,
            "attribute": own.attribute.name,
            "target": self.target,
            "betas": list(self.betas),
            "rows": rows,
            "identity": own.identity,
            "seeds": list(own.request.seeds),
            "columns": self.columns,
            "sprite_rows": len(own.betas),
            "cell": list(own.cell),
            "classes": {a.name: list(a.classes) for a in own.attributes},
            "labels": {name: table.tolist() for name, table in read.items()},
            "sure": np.rint(100 * own.confidence[rows]).astype(int).tolist(),
            "activation_ratio": [round(float(own.activation_ratio[row]), 3) for row in rows],
            "note": NOTE.format(error=own.error),
        }


def book_for(studio: Studio, view: View) -> Book | None:
    """The stored book whose frames are this view at every strength of its slider; ``None`` where none is stored.

    That is: the recommended turn alone, of the lens as it is now, on these seeds. A view of fewer seeds takes the
    first columns of the sprite.
    """
    for file, stored in _books(studio.lens):
        if (stored.request.prompt, stored.attribute.name) != (view.prompt, view.attribute):
            continue
        book = _as_viewed(studio.lens, file, stored, view)
        if book is not None:
            return book
    return None


def sprites(studio: Studio) -> list[Path]:
    """The files that a page may ask for."""
    return [file for file, _ in _books(studio.lens)]


def stored_picture(studio: Studio, view: View) -> Picture | None:
    """The stored frames nearest to a view, read as they were drawn; ``None`` where it has no book."""
    book = book_for(studio, view)
    if book is None:
        return None
    own, here = book.stored, book.nearest(view.beta)
    rows = (own.betas.index(own.identity), book.rows[here])
    before, after = (_row(own, number, view) for number in rows)
    ratio = float(own.activation_ratio[rows[1]])
    return Picture(view, book.betas[here], before, after, stored=True, activation_ratio=ratio)


def _row(book: FlipBook, number: int, view: View) -> Row:
    """One strength of a book, as far as its readings were kept: probabilities are of the steered attribute alone."""
    n = view.n_seeds
    readings = {
        a.name: Predictions.from_labels(book.labels[a.name][number, :n], book.certain[a.name][number, :n], a,
                                        book.classifier_id)
        for a in book.attributes
    }  # fmt: skip
    own = readings[view.attribute]
    return Row(_frames(book)[number, :n], own.labels, own.certain, book.confidence[number, :n], readings)


@lru_cache(maxsize=4)
def _frames(book: FlipBook) -> np.ndarray:
    return book.frames()


def _books(lens: DiffusionLens) -> Iterator[tuple[Path, FlipBook]]:
    kind = kind_of(FlipBook)
    for stem, found in lens.stored(FlipBook).items():
        yield (lens.folder / kind.main(stem)).with_suffix(".webp"), found


def _as_viewed(lens: DiffusionLens, file: Path, stored: FlipBook, view: View) -> Book | None:
    setting = lens.settings.get(view.attribute)
    if setting is None or tuple(view.seeds) != stored.request.seeds[: view.n_seeds]:
        return None
    if view.own or view.solo or view.where:
        return None
    shipped = (setting.n_features, setting.sampler, setting.window, set(setting.hold))
    if (view.n_features, view.sampler, view.window, set(view.hold)) != shipped:
        return None
    if lens.request(stored.request.prompt, stored.request.seeds) != stored.request:
        return None
    mirrored = beta_of(setting.mode, -strength_of(setting.mode, stored.furthest))
    if _turn(lens, view.attribute, view.target, stored.furthest) == stored.edit:
        pairs = list(zip(stored.betas, range(len(stored.betas)), strict=True))
    elif _turn(lens, view.attribute, view.target, mirrored) == stored.edit:
        told = [beta_of(setting.mode, -strength_of(setting.mode, beta)) for beta in stored.betas]
        pairs = sorted(zip(told, range(len(told)), strict=True))
    else:
        return None
    ends = scale(setting)
    inside = [(beta, row) for beta, row in pairs if ends.low <= beta <= ends.high]
    if not inside or (inside[0][0], inside[-1][0]) != (ends.low, ends.high):
        return None
    return Book(stored, file, view.target, tuple(beta for beta, _ in inside), tuple(row for _, row in inside))


@lru_cache(maxsize=256)
def _turn(lens: DiffusionLens, attribute: str, target: str, beta: float) -> str | None:
    """What tells the recommended turn from others, as ``FlipBook.edit`` does; ``None`` where there is none."""
    try:
        return EditSpec((lens.intervention(attribute, target, beta),)).digest
    except LensError:
        return None
