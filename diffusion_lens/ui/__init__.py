"""The interface: ``build(lens)`` makes the Gradio app, ``launch(lens)`` serves it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from diffusion_lens.lens import DiffusionLens
from diffusion_lens.ui import about, atlas_tab, explore, explore_handlers, sweep_tab, texts
from diffusion_lens.ui.figure import ASSETS
from diffusion_lens.ui.studio import Studio
from diffusion_lens.ui.theme import theme

QUEUE = 64
SESSIONS = 500
"""Visitors whose page is kept in memory; a sweep of one's own takes about half a megabyte."""

WARM_UP_DELAY = 1.5
"""Seconds between the launch and the loading of torch, so that the first page is served before."""


def build(lens: DiffusionLens) -> gr.Blocks:
    """The whole app on one lens. Launch it with ``launch_options``, or both at once with ``launch``."""
    return _assemble(Studio(lens))


def _assemble(studio: Studio) -> gr.Blocks:
    lens = studio.lens
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(texts.header(lens.manifest.name))
        with gr.Tabs(selected="explore") as tabs:
            with gr.Tab("Explore", id="explore"):
                tab = explore.layout(studio)
            with gr.Tab("Sweep", id="sweep"):
                sweep_tab.layout(studio, tab.page)
            with gr.Tab("Atlas", id="atlas"):
                feature, turn = atlas_tab.layout(studio)
            with gr.Tab("About", id="about") as about_tab:
                about.layout(studio, about_tab)
        _connect(demo, studio, tab, tabs, feature, turn)
    demo.queue(max_size=QUEUE, api_open=False)
    return demo


def _connect(
    demo: gr.Blocks, studio: Studio, tab: explore.Explore, tabs: gr.Tabs, feature: gr.State, turn: gr.Button
) -> None:
    def arrive(request: gr.Request) -> tuple[Any, ...]:
        query = {str(k): str(v) for k, v in dict(request.query_params).items()}
        return explore_handlers.open_link(studio, str(request.session_hash), query)

    def leave(request: gr.Request) -> None:
        for work in ("draw", "sweep", "balance"):
            studio.stops.stop(f"{request.session_hash}:{work}")

    def take(page: explore_handlers.Page, feature: int | None, *values: Any) -> tuple[Any, ...]:
        return (gr.Tabs(selected="explore"), *explore_handlers.turn_feature(studio, page, feature, values))

    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    demo.load(arrive, None, [*tab.changed, tab.status], **quick).then(
        lambda page, *values: (yield from explore_handlers.draw_linked(studio, page, *values)),
        [tab.page, *tab.controls], tab.outputs, concurrency_id="live", concurrency_limit=8, **quick,
    )  # fmt: skip
    turn.click(take, [tab.page, feature, *tab.controls], [tabs, *tab.changed], **quick).then(**tab.live)
    demo.unload(leave)


def launch(lens: DiffusionLens, **options: Any) -> None:
    """Serve the app until it is stopped; ``options`` go to gradio's ``launch``, e.g. ``server_port=8000``.

    The first page shows stored results; torch and the model load in the background meanwhile.
    """
    studio = Studio(lens)
    demo = _assemble(studio)
    demo.launch(**{**launch_options(), **options, "prevent_thread_lock": True})
    studio.warm_up(WARM_UP_DELAY)
    if not options.get("prevent_thread_lock"):
        demo.block_thread()


def launch_options() -> dict[str, Any]:
    """What ``gr.Blocks.launch`` needs for the app's look."""
    script = (ASSETS / "app.js").read_text(encoding="utf-8")
    return {
        "theme": theme(),
        "css_paths": [ASSETS / "app.css"],
        "head": f"<script>{script}</script>",
        "footer_links": [],
        "ssr_mode": False,
        "state_session_capacity": SESSIONS,
    }
