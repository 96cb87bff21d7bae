"""Tabs that are built when somebody first looks at them: the first page comes sooner, in the server and the browser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import gradio as gr

from diffusion_lens.ui.panel import READ, Component, Updates, Values


def built_when_looked_at(tab: gr.Tab, build: Callable[[Values], None], takes: Iterable[Component] = ()) -> None:
    """Build the contents of ``tab`` once for each visitor, when they first select it, from what ``takes`` hold then.

    Controls in it must say ``interactive=True``: gradio guesses that before it knows the events of what comes late.
    """
    looked_at = gr.State(False)
    # Through the queue: gradio tells of a state that changed with queued events alone.
    tab.select(lambda: True, None, looked_at, **READ)
    inputs = set(takes)

    @gr.render(inputs=inputs or None, triggers=[looked_at.change], show_progress="hidden", concurrency_id="read")
    def contents(values: Values | None = None) -> None:
        build(values or {})


def once_built(handler: Callable[..., Updates], takes: set[Component], gives: set[Component]) -> Any:
    """Call a handler once what is being built stands in the browser: for what must wait for the model."""
    return gr.HTML("", js_on_load="trigger('built')", visible="hidden").built(handler, takes, gives, **READ)
