"""A plotly figure in a page, drawn by plotly's own script from its package, with a button that saves it as PNG."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import plotly
import plotly.graph_objects as go

from diffusion_lens.base.assets import assets_folder

ASSETS = assets_folder()
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def figure(value: dict[str, str] | None = None, *, elem_id: str, min_height: int = 380) -> gr.HTML:
    """A place for a figure; set it to ``figure_value(...)``."""
    gr.set_static_paths([PLOTLY])
    return gr.HTML(
        value,
        html_template='<div class="dl-figure" role="img"></div>'
        '<button type="button" class="dl-png" hidden>PNG<span class="dl-hidden"> of this figure</span></button>',
        js_on_load=(ASSETS / "figure.js").read_text(encoding="utf-8"),
        elem_id=elem_id,
        min_height=min_height,
        plotly=f"gradio_api/file={PLOTLY.as_posix()}",
    )


def figure_value(made: go.Figure, alt: str) -> dict[str, str]:
    """What a figure component shows: the figure as JSON and the sentence that stands for it."""
    return {"figure": str(made.to_json()), "alt": alt}
