"""In a real browser: the Atlas filtered by what features control, and the depth experiment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dissected import keep_depth, keep_in
from harness import marks, opened, served, visit

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


def choose(page: Any, where: str, text: str) -> None:
    """Choose an option of a dropdown by keyboard."""
    box = page.locator(f"{where} input")
    box.focus()
    page.locator(where).get_by_role("listbox").or_(page.get_by_role("listbox")).first.wait_for()
    page.get_by_role("option", name=text).first.click()


def test_the_atlas_shows_what_features_control(page: Any) -> None:
    page.get_by_role("tab", name="Atlas").click()
    page.wait_for_function("() => /glasses 2/.test(document.querySelector('#dl-atlas-evidence')?.innerText ?? '')")
    choose(page, "#dl-atlas-show", "controls glasses (2)")
    page.wait_for_function(
        "() => /#1: glasses \\+50/.test(document.querySelector('#dl-atlas-evidence')?.innerText ?? '')"
    )
    page.wait_for_function("() => document.querySelectorAll('#dl-atlas-map .scatterlayer .trace').length >= 2")
    assert page.locator("#dl-atlas-colour input").input_value() == "what turning it alone changes"
    cells = page.locator("#dl-atlas-table [role=gridcell]")
    page.wait_for_function("() => document.querySelectorAll('#dl-atlas-table tbody tr').length <= 3")
    assert cells.first.inner_text().strip() == "1"
    cells.first.click()
    page.wait_for_function("() => /Feature #1/.test(document.querySelector('#dl-atlas-card h2').innerText)")
    card = page.locator("#dl-atlas-card").inner_text()
    assert "+50 (+40 to +60)" in card and "Nothing sure on gender, age." in card
    shoot(page, "atlas")
    choose(page, "#dl-atlas-show", "controls age (0)")
    page.wait_for_function(
        "() => /No feature tested moves age/.test(document.querySelector('#dl-atlas-evidence')?.innerText ?? '')"
    )


def test_depth_is_shown_with_its_caveat(page: Any) -> None:
    visit(page, "depth")
    page.wait_for_function("() => document.querySelectorAll('#dl-depth-plot .scatterlayer .trace').length === 4")
    shoot(page, "depth")
    assert "cannot show that depth as such" in page.locator(".dl-caveat").inner_text()
    page.get_by_label("Show mid-block bypass").uncheck()
    page.wait_for_function("() => document.querySelectorAll('#dl-depth-plot .scatterlayer .trace').length === 2")
    page.locator("[role=tabpanel]:visible").get_by_label("age").check()
    page.wait_for_function("() => /share young/.test(document.querySelector('#dl-depth-table').innerText)")
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    shoot(page, "depth-phone")
