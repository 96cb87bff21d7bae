"""Compare two in a real browser: by mouse and keyboard, and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness import chromium, listen, marks, served

from diffusion_lens.lens.lens import DiffusionLens

pytestmark = marks


@pytest.fixture(scope="module")
def address(tiny_lens: DiffusionLens, prompt_free_lens: DiffusionLens) -> Iterator[str]:
    with served(tiny_lens, prompt_free_lens) as url:
        yield url


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_two_rows_on_the_same_seeds_and_what_differs(address: str, width: int, theme: str) -> None:
    complaints: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=theme)
        page.set_default_timeout(60_000)
        listen(page, complaints)
        page.goto(f"{address}?tab=two")
        button = page.locator("#dl-two-go")
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#dl-two-table table")
        sources = page.locator("#dl-two-rows img").evaluate_all("all => all.map((i) => [i.src, i.alt])")
        assert len(sources) == 16 and sum(alt.startswith("A, seed") for _, alt in sources) == 8
        assert {source for source, _ in sources[:8]} != {source for source, _ in sources[8:]}
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        before = [source for source, _ in sources]
        page.locator("#dl-two-lens-B input").click()
        page.get_by_role("option", name="prompt-free").click()
        page.wait_for_function("() => !document.querySelector('#dl-two-prompt-B')?.offsetParent")
        button.click()
        page.wait_for_function("() => /Two models/.test(document.querySelector('#dl-two-table').innerText)")
        after = page.locator("#dl-two-rows img").evaluate_all("all => all.map((i) => i.src)")
        assert after[:8] == before[:8] and after[8:] != before[8:]
    assert complaints == []


def test_the_same_twice_is_told_in_a_sentence(address: str) -> None:
    with chromium() as browser:
        page: Any = browser.new_page(viewport={"width": 1280, "height": 720})
        page.set_default_timeout(60_000)
        page.goto(f"{address}?tab=two")
        shown = page.locator("#dl-two-prompt-A input").input_value()
        page.locator("#dl-two-prompt-B input").fill(shown)
        page.locator("#dl-two-prompt-B input").press("Enter")
        page.locator("#dl-two-go").click()
        page.wait_for_function(
            "() => /Both sides are the same/.test(document.querySelector('#dl-two-status').innerText)"
        )
