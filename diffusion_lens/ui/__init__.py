"""The interface: ``build(lens, …)`` makes the Gradio app, ``launch(lens, …)`` serves it; a page for each lens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

# isort: split
from diffusion_lens.ui.quick_start import gr, without_collector, without_servers  # first, so that gradio comes quickly

# isort: split
from diffusion_lens.lens.bundled import FIRST
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import (
    about,
    api,
    atlas,
    audit,
    compare_two,
    depth,
    explore,
    frame,
    front,
    learn,
    methods_tab,
    scan,
    sweep,
    texts,
)
from diffusion_lens.ui.figure import ASSETS
from diffusion_lens.ui.frame import LensLink
from diffusion_lens.ui.gpu import lent
from diffusion_lens.ui.lazy import built_when_looked_at
from diffusion_lens.ui.sessions import keep_tidy
from diffusion_lens.ui.theme import theme
from diffusion_lens.ui.visitor import visitor_of

QUEUE = 64
SESSIONS = 500
"""Visitors whose page is kept in memory; a sweep of one's own takes about half a megabyte."""

PATIENCE = 10.0
"""Seconds after which the first lens's model is loaded though nobody has come; a visitor's first view goes before."""


def build(*lenses: DiffusionLens) -> gr.Blocks:
    """The whole app, a page per lens. Launch it with ``launch_options``, or both at once with ``launch``."""
    return _assemble(_studios(lenses))


def _studios(lenses: Sequence[DiffusionLens]) -> list[Studio]:
    paths = page_paths([lens.manifest.name for lens in lenses])
    first = Studio(lenses[0])
    return [first, *(Studio(lens, first, path) for lens, path in zip(lenses[1:], paths[1:], strict=True))]


def _assemble(studios: Sequence[Studio]) -> gr.Blocks:
    with without_collector(), without_servers():
        with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
            _page(demo, studios, 0)
            api.Endpoints(studios).connect()
        for i, studio in enumerate(studios[1:], start=1):
            with demo.route(studio.lens.manifest.name, studio.path, show_in_navbar=False):
                _page(demo, studios, i)
        demo.queue(max_size=QUEUE, api_open=False)
    return demo


def page_paths(names: Sequence[str]) -> list[str]:
    """Where each lens's page lies under the app's address: the first at the root, the others by name."""
    paths = [""]
    for name in names[1:]:
        path = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "lens"
        while path in paths:
            path += "-next"
        paths.append(path)
    return paths


def _page(demo: gr.Blocks, studios: Sequence[Studio], i: int) -> None:
    """One lens's page, inside an open context of its own."""
    studio = studios[i]
    if len(studios) > 1:
        gr.components.Navbar(visible=False)  # the header has its own, which also says what takes no prompt
    frame.bar([LensLink(s.lens.manifest.name, s.path, s.lens.prompts == (None,), s is studio) for s in studios])
    with gr.Tabs(selected="explore", overflow_behavior="wrap", elem_id="dl-tabs") as tabs:
        with gr.Tab("Explore", id="explore"):
            tab = explore.layout(studio)
        with gr.Tab("Measure", id="measure"), gr.Tabs(overflow_behavior="wrap", elem_id="dl-measure"):
            _measure(studios, i, tab)
        with gr.Tab("Atlas", id="atlas") as atlas_tab:
            draw_strip: atlas.DrawStrip = lent(30)(partial(atlas.draw_strip, studio))
            built_when_looked_at(atlas_tab, lambda _: atlas.build(studio, draw_strip, tabs, tab))
        learn.layout(studio, _bundled_beside(studios, i))
        with gr.Tab("Audit", id="audit") as audit_tab:
            run_audit: audit.Run = lent(120)(partial(audit.run, studio))
            built_when_looked_at(audit_tab, lambda values: audit.build(studio, run_audit, tab, values), tab.inputs)
        with gr.Tab("About", id="about") as about_tab:
            built_when_looked_at(about_tab, lambda _: about.build(studio))
    _connect(demo, studio)


def _measure(studios: Sequence[Studio], i: int, tab: explore.Explore) -> None:
    """The tabs under Measure; their ids are part of addresses (``?tab=sweep``)."""
    studio = studios[i]
    # Lent once, when the app is built, and not with every visitor's tab.
    draw_two: compare_two.Drawn = lent(60)(partial(compare_two.draw, studios))
    measure_points: sweep.Run = lent(120)(partial(sweep.run, studio))
    with gr.Tab("Sweep", id="sweep") as sweep_tab:
        built_when_looked_at(
            sweep_tab, lambda values: sweep.build(studio, measure_points, sweep_tab, tab, values), tab.subject_parts
        )
    with gr.Tab("Methods", id="methods") as methods:
        methods_tab.layout(studio, methods, tab)
    with gr.Tab("Compare two", id="two") as two_tab:
        built_when_looked_at(two_tab, lambda _: compare_two.build(studios, i, draw_two))
    with gr.Tab("Where it lives", id="scan") as scan_tab:
        built_when_looked_at(scan_tab, lambda _: scan.build(studio))
    with gr.Tab("Depth", id="depth") as depth_tab:
        built_when_looked_at(depth_tab, lambda _: depth.build())


def _bundled_beside(studios: Sequence[Studio], i: int) -> str | None:
    """The page of the lens that ships with everything stored; ``None`` where it is this page, or not open."""
    return next((s.path for k, s in enumerate(studios) if k != i and s.lens.manifest.name == FIRST), None)


def _connect(demo: gr.Blocks, studio: Studio) -> None:
    def leave(request: gr.Request) -> None:
        studio.stops.leave(visitor_of(request))

    demo.unload(leave)


def launch(*lenses: DiffusionLens, **options: Any) -> None:
    """Serve the app until it is stopped; ``options`` go to gradio's ``launch``, e.g. ``server_port=8000``.

    The first page shows stored results; torch and the models load in the background once somebody has seen it.
    """
    studios = _studios(lenses)
    demo = _assemble(studios)
    demo.launch(**{**launch_options(), **front.options(studios), **options, "prevent_thread_lock": True})
    keep_tidy(demo)
    studios[0].warm_up(PATIENCE)
    if not options.get("prevent_thread_lock"):
        demo.block_thread()


def launch_options() -> dict[str, Any]:
    """What ``gr.Blocks.launch`` needs for the app's look."""
    return {
        "theme": theme(),
        "css_paths": [ASSETS / name for name in ("app.css", "tabs.css", "learn.css", "audit.css")],
        "head": frame.head(),
        "footer_links": [],
        "ssr_mode": False,
        "state_session_capacity": SESSIONS,
        "max_file_size": front.MAX_FILE,
    }
