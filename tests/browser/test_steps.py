"""The steps of one image in the options, in a real browser: by mouse, by keyboard, and on a phone."""

from __future__ import annotations

import pytest
from harness import chromium, listen, marks, served
from workbench import query, settled

from diffusion_lens.lens.lens import DiffusionLens

pytestmark = marks


@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_of_the_steps_choose_which_are_steered(tiny_lens: DiffusionLens, width: int) -> None:
    _ = (tiny_lens.model, tiny_lens.sae, tiny_lens.classifier)
    complaints: list[str] = []
    with served(tiny_lens) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.set_default_timeout(60_000)
        listen(page, complaints)
        page.goto(address)
        settled(page)
        page.locator(".dx-options").click()
        steps = page.locator(".dx-strip button")
        steps.nth(3).wait_for()
        assert steps.count() == 4 and page.locator(".dx-strip small").inner_text().startswith("Steered in all 4 steps")
        steps.nth(0).click()  # the nearer end of the range goes in by one
        assert page.locator(".dx-strip small").inner_text() == "Steered in steps 2 to 4 of 4."
        steps.nth(3).focus()
        page.keyboard.press("Enter")
        assert page.locator(".dx-strip small").inner_text() == "Steered in steps 2 to 3 of 4."
        assert [b.get_attribute("aria-pressed") for b in steps.all()] == ["false", "true", "true", "false"]
        assert [b.get_attribute("aria-label") for b in steps.all()] == [f"Step {k} of 4" for k in range(1, 5)]
        assert page.locator(".dx-number input").nth(1).input_value() == "2"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.keyboard.press("Escape")
        settled(page)
        page.wait_for_function("() => /w=1-3/.test(location.search)")
        assert query(page)["w"] == "1-3"
    assert complaints == []
