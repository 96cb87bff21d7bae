"""In a real browser: the Atlas filtered by what features control, and the depth experiment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dissected import keep_depth, keep_in
from harness import marks, opened, served, visit
from workbench import settled

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.ui import depth

PATIENCE = 60_000
SHOTS = os.environ.get("DL_SHOTS")

pytestmark = marks


@pytest.fixture(scope="module")
def address(tiny_lens: DiffusionLens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app on a tiny lens that was dissected, with a depth experiment stored."""
    folder = tmp_path_factory.mktemp("dissected")
    tiny_lens.save_pretrained(folder / "lens")
    keep_in(folder / "lens")
    keep_depth(folder / "depth.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "STORED", folder / "depth.json")
        with served(DiffusionLens.from_pretrained(folder / "lens")) as url:
            yield url


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The app, opened; the test fails if the console or a script complained."""
    with opened(address, PATIENCE) as tab:
        yield tab


def shoot(page: Any, name: str) -> None:
    """Keep a picture where ``DL_SHOTS`` names a folder."""
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def test_the_atlas_is_searched_by_words_and_by_keyboard(page: Any) -> None:
    visit(page, "atlas")
    page.wait_for_selector("#dl-atlas-map svg .dl-dot")
    assert page.locator("#dl-atlas-map .dl-dot").count() == 32, "every feature is a dot"
    page.locator("#dl-atlas-search").get_by_role("textbox").press_sequentially("glasses")
    page.wait_for_function("() => /fit “glasses”/.test(document.querySelector('#dl-atlas-hits').innerText)")
    assert page.locator("#dl-atlas-map .dl-hit").count() == page.locator("#dl-atlas-hits li").count()
    first = page.locator("#dl-atlas-hits [data-feature]").first
    assert first.get_attribute("data-feature") == "1" and "confirmed" in first.inner_text()
    first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function("() => /#2/.test(document.querySelector('#dl-atlas-head h2').innerText)")
    assert "feature=2" in page.url and "tab=atlas" in page.url
    page.wait_for_selector("#dl-atlas-strip img")
    assert page.locator("#dl-atlas-strip img").count() == 12
    assert "-25" in page.locator("#dl-atlas-card .dl-bars").inner_text() or "+25" in (
        page.locator("#dl-atlas-card .dl-bars").inner_text()
    )
    shoot(page, "atlas")


def test_an_own_label_stays_in_this_browser_and_travels_as_a_file(page: Any, tmp_path: Path) -> None:
    visit(page, "atlas")
    own = page.locator("#dl-atlas-own")
    own.get_by_label("What you see").fill("<b>round</b> glasses")
    own.get_by_label("Initials").fill("ab")
    own.get_by_role("button", name="Save").click()
    page.wait_for_function("() => /Yours: “<b>round/.test(document.querySelector('#dl-atlas-own').innerText)")
    with page.expect_download() as file:
        own.get_by_role("button", name="Export").click()
    kept = tmp_path / "labels.json"
    file.value.save_as(kept)
    assert "round" in kept.read_text() and "round" not in page.locator("#dl-atlas-head").inner_text()
    page.evaluate("localStorage.clear()")
    own.get_by_label("File of labels").set_input_files(kept)
    page.wait_for_function("() => /1 labels read/.test(document.querySelector('#dl-atlas-own').innerText)")
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    own.get_by_label("File of labels").set_input_files(bad)
    page.wait_for_function("() => /This is no file of labels/.test(document.querySelector('#dl-atlas-own').innerText)")


def test_what_the_lasso_catches_is_steered_together_in_explore(page: Any) -> None:
    visit(page, "atlas")
    page.wait_for_selector("#dl-atlas-map svg .dl-dot")
    page.get_by_role("button", name="Lasso").click()
    box = page.locator("#dl-atlas-map svg").bounding_box()
    x, y, w, h = box["x"], box["y"], box["width"], box["height"]
    page.mouse.move(x + 4, y + 4)
    page.mouse.down()
    for px, py in ((x + w - 4, y + 4), (x + w - 4, y + h - 4), (x + 4, y + h - 4), (x + 4, y + 8)):
        page.mouse.move(px, py, steps=4)
    page.mouse.up()
    page.locator("#dl-together:visible").wait_for()
    assert "features)" in page.locator("#dl-together").inner_text()
    page.locator("#dl-turn-feature").click()
    page.wait_for_function("() => dl.tab() === 'explore'")
    settled(page)


def test_depth_is_shown_with_its_caveat(page: Any) -> None:
    visit(page, "depth")
    page.wait_for_function("() => document.querySelectorAll('#dl-depth-plot .scatterlayer .trace').length === 4")
    shoot(page, "depth")
    assert "cannot show that depth as such" in page.locator(".dl-caveat").inner_text()
    page.get_by_label("Show mid-block bypass").uncheck()
    page.wait_for_function("() => document.querySelectorAll('#dl-depth-plot .scatterlayer .trace').length === 2")
    page.locator("input[type=radio][value=age]:visible").check()
    page.wait_for_function("() => /share young/.test(document.querySelector('#dl-depth-table').innerText)")
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    shoot(page, "depth-phone")
