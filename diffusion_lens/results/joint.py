"""Several attributes steered at once: the result, read and written without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.foreign import check_array, reading
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.types import Change, Share

TOGETHER = "together"


@dataclass(frozen=True)
class JointTable:
    """Images per combination of classes, among those decided in every attribute.

    ``counts`` has one axis per attribute, in the order of ``attributes``; ``n`` images were drawn.
    """

    attributes: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    counts: np.ndarray
    n: int

    @property
    def shares(self) -> np.ndarray:
        """``counts`` over their sum; NaN where nothing was decided."""
        total = int(self.counts.sum())
        return self.counts / total if total else np.full(self.counts.shape, np.nan)


@dataclass(frozen=True)
class JointResult:
    """What came of steering several attributes.

    Attributes:
        before, after: the intersectional tables. shares: attribute → its corrected shares afterwards.
        spillover: what was steered, alone and ``together`` → changes of every class the classifier reads
            (``plots.spillover_figure`` draws it).
        interference: attribute → class → change of its share together, minus that when steered alone.
        shared_features: features that more than one attribute turns.
        order_matters: share of images with another class of anything when the interventions' order is reversed.
        steered: attribute → its target and strength, in words. prompt, sae_id: what was drawn, and by whose features.
    """

    before: JointTable
    after: JointTable
    shares: dict[str, tuple[Share, ...]]
    spillover: dict[str, tuple[Change, ...]]
    interference: dict[str, dict[str, float]]
    shared_features: tuple[int, ...]
    order_matters: float
    description: str
    steered: dict[str, str]
    prompt: str | None
    sae_id: str


def save_joint(result: JointResult, path: Path) -> None:
    """Write one JSON file."""
    write_json(path, to_plain(result))


def load_joint(path: Path) -> JointResult:
    """Read what ``save_joint`` wrote; raises ``LensError`` that names a bad file."""
    values = read_json(path)
    with reading(path, "a stored result of steering together", "run together --store again"):
        told = from_plain(_Stored, values)
        read: dict[str, Any] = {field.name: getattr(told, field.name) for field in fields(told)}
        return JointResult(**read | {"before": told.before.table(), "after": told.after.table()})


@dataclass(frozen=True)
class _StoredTable:
    """A ``JointTable`` as plain values."""

    attributes: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    counts: list[Any]
    n: int

    def table(self) -> JointTable:
        """The table; ``ValueError`` where its counts are not of its classes."""
        counts = check_array("counts", np.asarray(self.counts), [len(own) for own in self.classes])
        if len(self.attributes) != len(self.classes) or counts.dtype.kind not in "iu" or self.n < 0:
            raise ValueError("its counts are not of its classes")
        return JointTable(self.attributes, self.classes, counts.astype(np.int64), self.n)


@dataclass(frozen=True)
class _Stored:
    """A ``JointResult`` as plain values."""

    before: _StoredTable
    after: _StoredTable
    shares: dict[str, tuple[Share, ...]]
    spillover: dict[str, tuple[Change, ...]]
    interference: dict[str, dict[str, float]]
    shared_features: tuple[int, ...]
    order_matters: float
    description: str
    steered: dict[str, str]
    prompt: str | None
    sae_id: str
