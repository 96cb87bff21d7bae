"""In a real browser: along a stored flip-book a drag shows frame after frame, and nobody is asked for any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import marks, opened, served
from workbench import AFTER, SLIDER, drag, query, settled, strength

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import flip_books
from diffusion_lens.ui.explore_handlers import opening

PORTRAITS = Path(__file__).resolve().parents[2] / "assets" / "portraits"
PATIENCE = 60_000

pytestmark = marks

WATCH = """() => {
  window.frames_ = new Set();
  const pane = document.querySelector('.dx');
  const pixels = () => document.querySelector('[data-part=after] canvas').toDataURL();
  new MutationObserver(() => window.frames_.add(pixels())).observe(pane, { attributeFilter: ['data-frame'] });
  const asks = (r) => /queue.join|file=/.test(r.name);
  window.questions = () => performance.getEntriesByType('resource').filter(asks).length;
  window.asked = window.questions();
}"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The app on the bundled lens, whose model is never loaded: what is stored is enough."""
    lens = DiffusionLens.from_pretrained(PORTRAITS)
    if flip_books.page_values(Studio(lens), opening(Studio(lens))) is None:
        pytest.skip("no flip-book of the opening view is stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Studio, "warm_up", lambda self, patience=0.0: None)
        patch.setattr(Studio, "draw", lambda *_, **__: 1 / 0)
        with served(lens) as url:
            yield url


def test_a_drag_flips_through_stored_frames_without_a_request(address: str) -> None:
    with opened(address, PATIENCE) as page:
        settled(page)
        page.wait_for_function("() => document.querySelector('.dx').dataset.frame")
        page.evaluate(WATCH)
        drag(page, 3.0, moves=60)
        assert page.evaluate("window.frames_.size") >= 15
        assert page.evaluate("window.questions() - window.asked") == 0
        assert page.locator(".dx-busy, .dx-draft").count() == 0 and query(page)["b"] == "3"
        assert page.locator(".dx-changed").count() >= 4, "captions follow the frames' own readings"
        frame: Any = page.locator(".dx").get_attribute("data-frame")
        page.locator(SLIDER).press("ArrowLeft")
        assert page.locator(".dx").get_attribute("data-frame") != frame and strength(page) < 3
        page.locator(".dx-go").click()
        page.locator(".dx-pop .dx-item").first.click()
        settled(page)
        assert "50 %" in page.locator(".dx-said").inner_text() and page.locator(f"{AFTER} figure").count() == 8
