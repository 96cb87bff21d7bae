"""Several attributes steered at once: the result, read and written without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import Change, LensError, Share

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
    try:
        read: dict[str, Any] = dict(values)
        for side in ("before", "after"):
            table = dict(values[side])
            read[side] = JointTable(
                tuple(table["attributes"]), tuple(tuple(own) for own in table["classes"]),
                np.asarray(table["counts"], dtype=np.int64), int(table["n"]),
            )  # fmt: skip
        read["shares"] = TypeAdapter(dict[str, tuple[Share, ...]]).validate_python(values["shares"])
        read["spillover"] = TypeAdapter(dict[str, tuple[Change, ...]]).validate_python(values["spillover"])
        interference = values["interference"].items()
        read["interference"] = {name: {k: float(v) for k, v in own.items()} for name, own in interference}
        read["shared_features"] = tuple(values["shared_features"])
        return JointResult(**read)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise LensError(f"{path} is not a stored result of steering together; run together --store again.") from None
