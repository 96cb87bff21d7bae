"""A headless Chromium and a served app, for every browser test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from diffusion_lens import ui
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.studio import import_engine

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--no-first-run"]  # fmt: skip

marks = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


@contextmanager
def served(*lenses: DiffusionLens) -> Iterator[str]:
    """The app on these lenses; its address."""
    import_engine()
    demo = ui.build(*lenses)
    _, url, _ = demo.launch(
        **ui.launch_options(), prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, share=False
    )
    yield url
    demo.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium."""
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield running
        running.close()


def visit(tab: Any, name: str) -> None:
    """Open a tab by its id, those under Measure too, and wait until it is chosen."""
    tab.wait_for_function("() => document.querySelector('#dl-bar-tabs [role=tab]')")
    tab.evaluate("name => dl.go(name)", name)
    tab.wait_for_function("name => dl.tab() === name", arg=name)


def left(text: str) -> bool:
    """Whether this is what gradio says of a page that was left while it listened."""
    return "signal is aborted without reason" in text or "Connection errored out" in text


def listen(tab: Any, complaints: list[str]) -> None:
    """Note what the console and failed scripts say."""
    tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" and not left(m.text) else None)
    tab.on("pageerror", lambda e: complaints.append(str(e)))


@contextmanager
def opened(address: str, patience: int) -> Iterator[Any]:
    """The app, opened and showing images; fails if the console or a script complained."""
    complaints: list[str] = []
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(patience)
        listen(tab, complaints)
        tab.goto(address)
        tab.wait_for_selector("[data-part=after] img")
        yield tab
    assert complaints == []
