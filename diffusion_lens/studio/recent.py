"""Values that are kept for a while, bounded in number and in bytes."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The latest few values by key, together no larger than ``max_bytes``; safe from several threads.

    A value that is larger alone is not kept.
    """

    def __init__(self, size: int, max_bytes: int) -> None:
        self._size = size
        self._max_bytes = max_bytes
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._bytes = 0
        self._guard = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """The value, now the latest; ``None`` where it is gone."""
        with self._guard:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: T) -> T:
        """Keep ``value`` and drop the oldest beyond the bounds."""
        size = bytes_of(value)
        with self._guard:
            self._bytes -= self._values.pop(key, (value, 0))[1]
            if size <= self._max_bytes:
                self._values[key] = (value, size)
                self._bytes += size
            while len(self._values) > self._size or self._bytes > self._max_bytes:
                self._bytes -= self._values.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Drop everything."""
        with self._guard:
            self._values.clear()
            self._bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def bytes(self) -> int:
        """Bytes of the arrays in all that is kept."""
        return self._bytes


def bytes_of(value: Any) -> int:
    """Bytes of all arrays and tensors in a value of dataclasses, mappings and sequences, each counted once."""
    seen: dict[int, int] = {}
    _collect(value, seen)
    return sum(seen.values())


def _collect(value: Any, seen: dict[int, int]) -> None:
    if id(value) in seen or isinstance(value, str | bytes | int | float | bool | None):
        return
    if hasattr(value, "nbytes"):
        seen[id(value)] = int(value.nbytes)
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, tuple | list):
        parts = list(value)
    else:
        return
    seen[id(value)] = 0
    for part in parts:
        _collect(part, seen)
