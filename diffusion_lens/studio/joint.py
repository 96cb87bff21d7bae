"""What a stored result of steering several attributes at once says: combinations of classes, and interference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_lens.results.joint import JointResult


@dataclass(frozen=True)
class Combination:
    """One class of each attribute: its share of the images decided in all, and how many those are."""

    classes: tuple[str, ...]
    before: float
    after: float
    n_before: int
    n_after: int


@dataclass(frozen=True)
class Interference:
    """How far a class's share together lies from its share when its attribute is steered alone."""

    attribute: str
    label: str
    difference: float


def combinations(result: JointResult) -> list[Combination]:
    """Every combination of classes, largest move first."""
    before, after = result.before, result.after
    rows = [
        Combination(
            tuple(classes[k] for classes, k in zip(before.classes, i, strict=True)), float(before.shares[i]),
            float(after.shares[i]), int(before.counts[i]), int(after.counts[i]),
        )
        for i in np.ndindex(before.counts.shape)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -abs(np.nan_to_num(row.after - row.before)))


def largest_interference(result: JointResult) -> Interference:
    """The class that ends furthest from where steering its attribute alone leaves it."""
    every = [
        Interference(attribute, label, difference)
        for attribute, by_class in result.interference.items()
        for label, difference in by_class.items()
    ]
    return max(every, key=lambda one: abs(one.difference), default=Interference("", "", 0.0))
