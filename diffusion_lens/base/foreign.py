"""Reading what a stranger wrote: whatever a value of another type, shape or size leads to is told in one sentence.

A loader first checks what it reads against types (pydantic) and shapes (``check_array``), so that nothing wrong gets
further than the loader; what goes wrong all the same is caught by ``reading``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.types import Attribute, LensError

WRONG = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)
"""What values of other types, shapes and sizes raise in Python, numpy, torch and pydantic."""

MAX_COUNT = 10**9
"""Of anything that is counted; sums of thousands of counts then fit an int64."""


@contextmanager
def reading(path: Path, what: str, mend: str) -> Iterator[None]:
    """Turn what foreign values raise inside into a ``LensError``: ``path`` is not ``what`` (why); ``mend``.

    A ``LensError`` goes through as it is.
    """
    try:
        yield
    except LensError:
        raise
    except WRONG as error:
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        raise LensError(f"{path} is not {what} ({why}); {mend}.") from None


def check_array(name: str, array: np.ndarray, shape: Sequence[int | None], *, finite: bool = False) -> np.ndarray:
    """The array, if it holds numbers and has ``shape`` (``None``: any length); else ``ValueError`` that names it.

    ``finite``: NaN and infinity are wrong too.
    """
    fits = len(shape) == array.ndim and all(n in (None, own) for n, own in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind not in "biuf":
        wanted = ["any" if n is None else n for n in shape]
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)} and should be numbers {wanted}")
    if finite and not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
    return array


def check_rows(name: str, rows: np.ndarray, n: int, *, least: int = 0) -> np.ndarray:
    """The array, if it holds whole numbers from ``least`` to ``n − 1``; else ``ValueError`` that names it."""
    if rows.dtype.kind not in "iu" or (rows.size and not least <= int(rows.min()) <= int(rows.max()) < n):
        raise ValueError(f"{name} points to what is not there")
    return rows


def count_tables(values: Mapping[str, Any], attributes: Iterable[Attribute] = ()) -> dict[str, np.ndarray]:
    """Attribute → confusion matrix ``int64 [true, read]`` from lists; ``ValueError`` for what cannot be counts.

    Those of ``attributes`` have a row per class; others are square.
    """
    classes = {a.name: len(a.classes) for a in attributes}
    return {str(name): _count_table(str(name), own, classes.get(name)) for name, own in values.items()}


def _count_table(name: str, values: Any, n: int | None) -> np.ndarray:
    table, what = np.asarray(values), f"the confusion of '{name[:40]}'"
    n = len(table) if n is None else n
    check_array(what, table, (n, n))
    if table.dtype.kind not in "iu" or not (table.size and 0 <= int(table.min()) <= int(table.max()) <= MAX_COUNT):
        raise ValueError(f"{what} does not hold counts")
    return table.astype(np.int64)
