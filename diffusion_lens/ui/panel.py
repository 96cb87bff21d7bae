"""Handlers by name: a tab is a dataclass of its components, and what its handlers take and give back have their names.

A request is a dataclass whose fields are named like the components that it is read from; a view is one whose fields
are named like the components that it is shown in. Gradio hands a handler ``{component: value}`` and takes the same
back, so that no order of components is ever relied on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, TypeVar

import gradio as gr

R = TypeVar("R")
Component = Any
"""A gradio component; its events are made at run time, where no type checker sees them."""

Values = Mapping[Component, Any]
Updates = dict[Component, Any]


class Keep(Enum):
    """What a view says of a component that it leaves as it is."""

    KEEP = "keep"


KEEP: Any = Keep.KEEP

READ: dict[str, Any] = {
    "show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read", "concurrency_limit": 8,
}  # fmt: skip
"""Options of an event that looks something up."""

AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of an event that only changes controls, or stops something: it waits for nobody."""

LONG: dict[str, Any] = {
    "show_progress": "hidden", "api_visibility": "private", "concurrency_id": "long", "concurrency_limit": 4,
    "trigger_mode": "once",
}  # fmt: skip
"""Options of an event that measures or fits for seconds to minutes."""


@dataclass(frozen=True, eq=False)
class Panel:
    """Some components with names; the base of every tab."""

    def parts(self, *kinds: type) -> set[Component]:
        """The components of these requests or views, for ``inputs`` and ``outputs`` of an event."""
        return {getattr(self, field.name) for kind in kinds for field in fields(kind)}

    def read(self, values: Values, kind: type[R]) -> R:
        """The request that the components hold."""
        return kind(**{field.name: values[getattr(self, field.name)] for field in fields(kind)})  # type: ignore[arg-type]

    def show(self, view: Any) -> Updates:
        """What an event gives back to show a view."""
        named = {field.name: getattr(view, field.name) for field in fields(view)}
        return {getattr(self, name): gr.skip() if value is KEEP else value for name, value in named.items()}


def visible(shown: bool) -> dict[str, Any]:
    """The update that shows or hides a component."""
    return gr.update(visible=shown)
