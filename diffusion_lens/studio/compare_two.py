"""Two prompts, two lenses or two edits side by side on the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from diffusion_lens.base.types import Attribute, Change, LensError
from diffusion_lens.studio.state import View, check
from diffusion_lens.studio.studio import Row, Studio


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two: a lens, and a view of it."""

    studio: Studio
    view: View

    @property
    def edits(self) -> bool:
        """Whether anything is steered."""
        setting = self.studio.lens.setting(self.view.attribute)
        return any(beta != setting.identity for beta in (self.view.beta, *(b for _, b in self.view.own)))


@dataclass(frozen=True, eq=False)
class Read:
    """One attribute as both classifiers read it.

    Attributes:
        names: of each side's images, ``uncertain`` where it was not decided.
        differ: whether an image and its pair read differently, bool ``[n]``; none does where they are no pairs, or
            where one of them was not decided.
        changes: every class's share in the second less that in the first, on pairs decided twice, with 95 % intervals;
            empty where they are no pairs.
    """

    attribute: Attribute
    names: tuple[tuple[str, ...], tuple[str, ...]]
    differ: np.ndarray
    changes: tuple[Change, ...]


@dataclass(frozen=True, eq=False)
class Two:
    """Both sides drawn.

    Attributes:
        paired: whether images of one seed start from the same noise and are read by one classifier: only then is a
            column a pair.
        reads: every attribute that both classifiers read with the same classes, those that are steered first.
    """

    sides: tuple[Side, Side]
    rows: tuple[Row, Row]
    paired: bool
    reads: tuple[Read, ...]


def compare_two(first: Side, second: Side, visitor: str = "") -> Iterator[Row | Two]:
    """The first side's row, then both: each drawn in full, the second on the seeds of the first.

    Raises:
        LensError: a view that cannot be drawn, or two that are the same.
        Cancelled: when the visitor asked for another comparison meanwhile.
    """
    second = replace(second, view=replace(second.view, first_seed=first.view.first_seed, n_seeds=first.view.n_seeds))
    for side in (first, second):
        check(side.studio.lens, side.view)
    if first.studio is second.studio and _drawn(first) == _drawn(second):
        raise LensError("Both sides are the same; change the prompt, the lens or the steer of one.")
    rows = []
    for side in (first, second):
        row = side.studio.draw(side.view, f"{visitor}:two").after
        rows.append(row)
        if side is first:
            yield row
    yield two_of((first, second), (rows[0], rows[1]))


def _drawn(side: Side) -> tuple[object, ...]:
    """What decides a side's images; where nothing is steered, how it would be does not."""
    view = side.view
    return (view.prompt, view) if side.edits else (view.prompt,)


def two_of(sides: tuple[Side, Side], rows: tuple[Row, Row]) -> Two:
    """Everything that can be said of two rows on the same seeds."""
    lenses = [side.studio.lens.manifest for side in sides]
    same_noise = lenses[0].base_model == lenses[1].base_model and lenses[0].n_steps == lenses[1].n_steps
    paired = same_noise and lenses[0].classifier_id == lenses[1].classifier_id
    steered = [side.view.attribute for side in sides]
    names = [name for name in dict.fromkeys([*steered, *rows[0].readings]) if _alike(rows, name)]
    return Two(sides, rows, paired, tuple(_read(rows, name, paired) for name in names))


def _alike(rows: tuple[Row, Row], name: str) -> bool:
    own = [row.readings.get(name) for row in rows]
    return own[0] is not None and own[1] is not None and own[0].attribute == own[1].attribute


def _read(rows: tuple[Row, Row], name: str, paired: bool) -> Read:
    from diffusion_lens.results import metrics

    first, second = (row.readings[name] for row in rows)
    classes = first.attribute.classes
    told = tuple(
        tuple(classes[k] if sure else "uncertain" for k, sure in zip(own.labels, own.certain, strict=True))
        for own in (first, second)
    )
    both = first.certain & second.certain
    differ = both & (first.labels != second.labels) if paired else np.zeros(len(both), dtype=bool)
    return Read(first.attribute, (told[0], told[1]), differ, metrics.changes(first, second) if paired else ())


def counted(row: Row, name: str, label: str) -> tuple[int, int]:
    """How many images of a row read as a class, of how many decided."""
    own = row.readings[name]
    return int((own.certain & (own.labels == own.attribute.index(label))).sum()), int(own.certain.sum())
