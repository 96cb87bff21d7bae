"""Where on a site's map features are turned: as a person types it, as an array, and as it stands in a link."""

from __future__ import annotations

import re

import numpy as np

from diffusion_lens.base.types import LEFT, TURNED, LensError, check_where

Where = tuple[str, ...]
"""A text per row of the map, ``#`` where features are turned and ``.`` where not: ``Intervention.where``."""

RANGE = re.compile(r"(rows|cols)=(\d{1,4})(?:-(\d{1,4}))?")


def parse_where(text: str, grid: tuple[int, int]) -> Where:
    """``"rows=0-1,cols=2"`` or a picture of the map, ``"..##/..##"`` → positions of a map ``grid (y, x)``.

    Rows and columns count from 0, both ends included; what is not named reaches over all of them. Raises ``LensError``
    for what is neither, or lies outside the map.
    """
    if set(text) <= {TURNED, LEFT, "/"}:
        where = tuple(text.split("/"))
        check_where(where)
        check_grid(where, grid)
        return where
    chosen = {"rows": (0, grid[0] - 1), "cols": (0, grid[1] - 1)}
    for part in text.replace(" ", "").split(","):
        found = RANGE.fullmatch(part)
        if found is None:
            raise LensError(f"'{text}' is no place; write rows=0-1,cols=2-3, or a picture like '..##/..##'.")
        first = int(found[2])
        last = first if found[3] is None else int(found[3])
        limit = grid[0 if found[1] == "rows" else 1]
        if not first <= last < limit:
            raise LensError(f"{found[1].capitalize()} of this site run from 0 to {limit - 1}; '{part}' lies outside.")
        chosen[found[1]] = (first, last)
    turned = np.zeros(grid, dtype=bool)
    (top, bottom), (left, right) = chosen["rows"], chosen["cols"]
    turned[top : bottom + 1, left : right + 1] = True
    return where_of(turned)


def where_of(turned: np.ndarray) -> Where:
    """Positions bool ``[y, x]`` as texts."""
    return tuple("".join(TURNED if on else LEFT for on in row) for row in turned)


def positions(where: Where) -> np.ndarray:
    """Texts as bool ``[y, x]``."""
    return np.array([[sign == TURNED for sign in row] for row in where])


def check_grid(where: Where, grid: tuple[int, int]) -> None:
    """Raise ``LensError`` where the positions are those of another map than ``grid (y, x)``."""
    own = (len(where), len(where[0]))
    if own != grid:
        raise LensError(
            f"This edit is painted on a map of {own[0]} × {own[1]} positions; the site has {grid[0]} × {grid[1]}."
        )


def to_link(where: Where) -> str:
    """As it stands in a link: ``"0011-0011"``."""
    return "-".join(row.replace(TURNED, "1").replace(LEFT, "0") for row in where)


def from_link(text: str) -> Where:
    """What ``to_link`` wrote; raises ``LensError`` for anything else."""
    where = tuple(text.replace("1", TURNED).replace("0", LEFT).split("-"))
    check_where(where)
    return where
