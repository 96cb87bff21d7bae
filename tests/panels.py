"""What a browser holds of a tab under test, and who acts in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr

from diffusion_lens.ui.panel import Updates


class Held:
    """Every component's value: as built, then as a visitor or a handler's updates change it."""

    def __init__(self, demo: gr.Blocks) -> None:
        self.values: dict[Any, Any] = {block: getattr(block, "value", None) for block in demo.blocks.values()}

    def set(self, changes: Updates) -> dict[Any, Any]:
        """All values once a visitor has changed some."""
        self.values.update(changes)
        return self.values

    def take(self, updates: Updates) -> dict[Any, Any]:
        """All values once a handler's updates have come; skipped ones and bare properties leave them as they are."""
        for component, update in updates.items():
            if not is_update(update):
                self.values[component] = update
            elif "value" in update:
                self.values[component] = update["value"]
        return self.values


def is_update(value: Any) -> bool:
    """Whether a handler gave properties (or nothing) back rather than a value."""
    return isinstance(value, dict) and value.get("__type__") == "update"


def untouched(updates: Updates) -> bool:
    """Whether a handler changed nothing."""
    return all(is_update(update) and set(update) == {"__type__"} for update in updates.values())


def visitor(name: str | None) -> Any:
    """A request of that session."""
    return SimpleNamespace(session_hash=name)
