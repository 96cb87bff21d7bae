"""Import gradio, and build an app with it, without what takes half the time and serves nobody here.

At import gradio writes an editor's stub file for each of its components, which means parsing its own sources; while
an app is built it makes a web server at every turn, of which the launch uses none; and the collector of cyclic
garbage runs again and again over what all stays.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COMPONENT_TYPE = "ComponentMeta"
"""The metaclass of gradio's components, under which the stubs are written."""


@contextmanager
def without_stubs() -> Iterator[None]:
    """Let gradio's components find no source file, as those do that are made in a notebook: they write no stub."""
    found = inspect.getfile

    def getfile(thing: Any) -> str:
        if type(thing).__name__ == COMPONENT_TYPE:
            raise OSError("no source file is asked for")
        return found(thing)

    vars(inspect)["getfile"] = getfile
    try:
        yield
    finally:
        vars(inspect)["getfile"] = found


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector still while much is made that stays."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


with without_stubs(), without_collector():
    import gradio as gr
    from gradio.routes import App


@contextmanager
def without_servers() -> Iterator[None]:
    """Build ``gr.Blocks`` without a web server at every turn; ``launch`` and mounting make their own."""
    made = vars(App)["create_app"]
    app: Any = App
    app.create_app = staticmethod(lambda *_, **__: None)
    try:
        yield
    finally:
        app.create_app = made


__all__ = ["gr", "without_collector", "without_servers", "without_stubs"]
