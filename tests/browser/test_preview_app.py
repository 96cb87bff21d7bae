"""In a real browser: images of a tiny autoencoder come first, marked, and the full ones take their place."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import tiny_vae
from harness import marks, opened, served
from workbench import AFTER, drag, settled

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.run_options import RunOptions

PATIENCE = 60_000
SHOTS = os.environ.get("DL_SHOTS")

pytestmark = marks


@pytest.fixture
def gate() -> threading.Event:
    """The full decode waits until it is set."""
    return threading.Event()


@pytest.fixture
def address(gate: threading.Event, tiny_lens_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The app on a tiny lens with a preview, its full decode held back by ``gate``."""
    tiny_vae().save_pretrained(tmp_path / "little-one")
    options = RunOptions(device="cpu", preview=str(tmp_path / "little-one"))
    lens = DiffusionLens.from_pretrained(tiny_lens_folder, options=options)
    vae = lens.model.pipeline.vae
    hook = vae.decoder.register_forward_pre_hook(lambda module, args: gate.wait(PATIENCE / 1000) and None)
    with served(lens) as url:
        yield url
    hook.remove()


def test_a_preview_is_marked_and_replaced(gate: threading.Event, address: str) -> None:
    with opened(address, PATIENCE) as page:
        drag(page, 3.0)
        # the draft is decoded by the tiny autoencoder, and so stands while the full decode is held back
        page.wait_for_function(
            "() => /^draft in [0-9]+ steps: not measured$/.test(document.querySelector('[data-part=state]').innerText)"
        )
        assert page.locator(f"{AFTER} .dx-draft").count() == 8
        if SHOTS:
            page.screenshot(path=str(Path(SHOTS) / "preview.png"), full_page=True)
        gate.set()
        settled(page)
        assert page.locator(f"{AFTER} img").count() == 8 and page.locator(f"{AFTER} .dx-draft").count() == 0
