"""The frame of every page: the bar with the model, the tabs, Share and the theme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr

from diffusion_lens.ui import texts
from diffusion_lens.ui.figure import ASSETS
from diffusion_lens.ui.html import html

SCRIPTS = ("app.js", "steps.js", "explore.js")
STYLES = ("frame.css", "explore.css", "compare_two.css", "steps.css")
"""Files of the page's head, in order."""


@dataclass(frozen=True)
class LensLink:
    """A lens of this app in the bar.

    ``path``: of its page, "" for the first; ``prompt_free``: it takes no prompt; ``here``: this is its page.
    """

    name: str
    path: str
    prompt_free: bool
    here: bool


def bar(lenses: Sequence[LensLink]) -> None:
    """Build the bar inside an open ``gr.Blocks``, before the tabs with ``elem_id="dl-tabs"``."""
    gr.HTML(html("frame.bar", texts.TITLE, texts.TAGLINE, list(lenses)), elem_id="dl-frame", apply_default_css=False)


def head() -> str:
    """The page's own styles and scripts, for ``head``."""

    def read(name: str) -> str:
        return (ASSETS / name).read_text(encoding="utf-8")

    styles = "".join(f"<style>{read(name)}</style>" for name in STYLES)
    return styles + "".join(f"<script>{read(name)}</script>" for name in SCRIPTS)
