"""Results as plain JSON values, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import TypeAdapter

T = TypeVar("T")


def to_plain(value: Any, *, without: str | None = None) -> Any:
    """Dataclasses, arrays and numbers as plain JSON values; non-finite numbers become text (``"inf"``).

    ``without``: a field that is left out wherever a dataclass has it, such as ``examples``.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.name != without]
        return {name: to_plain(getattr(value, name), without=without) for name in names}
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): to_plain(v, without=without) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(to_plain(v, without=without) for v in value)
    if isinstance(value, list | tuple):
        return [to_plain(v, without=without) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_plain(kind: type[T], values: Any) -> T:
    """Plain values as a dataclass; foreign values raise pydantic's ``ValidationError``."""
    return cast(T, _adapter(cast(Hashable, kind)).validate_python(values))


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    """Made once per type: making one takes longer than reading the hundreds of shares of a sweep."""
    return TypeAdapter(cast(Any, kind))
