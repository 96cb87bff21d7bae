"""The class in a real browser: every station, guessed right and wrong, by keyboard and on a phone; and its handouts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import chromium, listen, marks, served

from diffusion_lens.base.assets import assets_folder
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.classroom import Classroom
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import handouts

PATIENCE = 90_000
PHONE = {"width": 390, "height": 844}

pytestmark = marks


@pytest.fixture(scope="module")
def lens() -> DiffusionLens:
    """The bundled lens, which serves every station."""
    return DiffusionLens.from_pretrained(assets_folder() / "portraits")


@pytest.fixture(scope="module")
def room(lens: DiffusionLens) -> Classroom:
    """The class outside the browser, to know what is right."""
    return Classroom(Studio(lens))


@pytest.fixture(scope="module")
def address(lens: DiffusionLens) -> Iterator[str]:
    """The app on the bundled lens."""
    with served(lens) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with chromium() as running:
        yield running


def opened(browser: Any, address: str, place: str, complaints: list[str], **options: Any) -> Any:
    """The class at a place, in a browser that was never here."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    listen(page, complaints)
    page.goto(f"{address}?tab=learn&station={place}")
    page.wait_for_selector(f'#dl-board [data-place="{place}"]')
    return page


def fill(page: Any, room: Classroom, number: int, *, right: bool) -> None:
    """A guess at a station."""
    lesson = room.lesson(number)
    if lesson.form == "share":
        page.locator("#dl-guess").fill(str(lesson.right if right else 90))
    elif lesson.form == "match":
        words = lesson.right if right else lesson.right[::-1]
        for select, word in zip(page.locator("#dl-board select").all(), words, strict=True):
            select.select_option(word)
    elif lesson.form == "choice":
        value = next(c.value for c in lesson.choices if (c.value == lesson.right) == right)
        page.locator(f'#dl-board input[value="{value}"]').check()
    else:
        page.locator('#dl-board input[value="even"]').check()
        page.locator("#dl-board textarea").fill("Because <b>everybody</b> uses it.")


@pytest.mark.parametrize("right", [True, False])
def test_all_stations_with_right_and_wrong_guesses(browser: Any, address: str, room: Classroom, right: bool) -> None:
    complaints: list[str] = []
    page = opened(browser, address, "1", complaints)
    for number in range(1, 6):
        lesson = room.lesson(number)
        page.wait_for_selector(f'#dl-board [data-place="{number}"] form')
        assert page.locator("#dl-live form").count() == 0 and page.locator("#dl-board .dl-headline").count() == 0
        fill(page, room, number, right=right)
        page.get_by_role("button", name=re.compile("This is my guess|Keep my choice")).click()
        page.get_by_role("button", name="Show what was measured").wait_for()
        page.wait_for_selector("#dl-drawn img")
        if number == 4:
            page.locator("#dl-live [data-beta]").first.click()
            page.wait_for_selector("#dl-drawn .dl-side")
        page.get_by_role("button", name="Show what was measured").click()
        page.locator("#dl-board .dl-headline").wait_for()
        assert page.locator("#dl-board .dl-headline").inner_text() == lesson.reveal.headline
        if lesson.right is not None:
            assert page.locator("#dl-board .dl-mark").first.inner_text() == ("✓" if right else "✗")
        assert f"station={number}" in page.url and lesson.keep in page.locator("#dl-board").inner_text()
        page.get_by_role("button", name=re.compile("^Next: ")).click()
    page.wait_for_selector("#dl-board .dl-quiz")
    for item in room.items:
        value = item.right if right else next(c.value for c in item.choices if c.value != item.right)
        page.locator(f'#dl-board input[name="{item.key}"][value="{value}"]').check()
    page.get_by_role("button", name="Compare with what was measured").click()
    page.locator("#dl-board .dl-why").first.wait_for()
    assert f"{8 if right else 0} of 8 right" in page.locator("#dl-board h2").inner_text()
    later = page.context.new_page()
    later.goto(page.url)
    later.wait_for_selector("#dl-board .dl-why")
    assert later.locator("#dl-board .dl-done").count() == 6  # the browser kept all of it
    page.context.close()
    assert complaints == []


def test_a_station_by_keyboard_on_a_phone(browser: Any, address: str, room: Classroom) -> None:
    complaints: list[str] = []
    page = opened(browser, address, "3", complaints, viewport=PHONE, has_touch=True)
    page.wait_for_selector("#dl-board form")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.locator("#dl-board input[type=radio]").first.focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "This is my guess"
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Show what was measured").wait_for()
    assert page.locator("#dl-board .dl-given b").inner_text() == room.lesson(3).choices[1].text
    assert page.evaluate("document.activeElement.closest('#dl-board') !== null")
    page.wait_for_selector("#dl-drawn img")
    page.locator("#dl-live input[type=radio]").nth(1).focus()
    page.keyboard.press("Space")
    page.wait_for_selector("#dl-drawn .dl-side")
    page.locator("#dl-class-beta").focus()
    page.keyboard.press("Home")
    page.locator("#dl-drawn h3", has_text="β = -4").wait_for()
    page.get_by_role("button", name="Show what was measured").focus()
    page.keyboard.press("Enter")
    page.locator("#dl-board .dl-headline").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.context.close()
    assert complaints == []


def test_the_teacher_s_page_previews_what_is_printed(browser: Any, address: str) -> None:
    complaints: list[str] = []
    page = opened(browser, address, "teach", complaints)
    page.get_by_role("button", name="Slides").click()
    page.frame_locator("#dl-board iframe").get_by_role("heading", name="Who appears in a model's images?").wait_for()
    assert page.locator("#dl-board .dl-save").get_attribute("href").startswith("blob:")
    page.context.close()
    assert complaints == []


@pytest.mark.parametrize(("kind", "pages"), [("worksheet", 2), ("key", 2), ("slides", 12)])
def test_handouts_print_on_as_many_pages_as_they_say(
    browser: Any, room: Classroom, tmp_path: Path, kind: str, pages: int
) -> None:
    page = browser.new_page()
    page.set_content(handouts.document(room, [kind, "https://example.org/lens/"]))
    made = page.pdf(path=str(tmp_path / f"{kind}.pdf"), prefer_css_page_size=True, print_background=True)
    page.close()
    assert len(re.findall(rb"/Type\s*/Page\b", made)) == pages
