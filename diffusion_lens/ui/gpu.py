"""A GPU lent for the time of one call, on Spaces that lend them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def lent(duration: int) -> Callable[[F], F]:
    """``spaces.GPU(duration=…)`` where the ``spaces`` package is installed; otherwise nothing."""
    if find_spec("spaces") is None:
        return lambda handler: handler
    import spaces

    return spaces.GPU(duration=duration)
