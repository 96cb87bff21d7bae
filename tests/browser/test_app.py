"""The app in a real browser: everything by keyboard, every tab opens, nothing on the console."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness import chromium, listen, marks, served, visit
from workbench import AFTER, BEFORE, SLIDER, alert, drag, query, settled, sources, strength

from diffusion_lens.lens.lens import DiffusionLens

PATIENCE = 60_000

pytestmark = marks


@pytest.fixture(scope="module")
def address(tiny_lens: DiffusionLens, prompt_free_lens: DiffusionLens) -> Iterator[str]:
    """The app, served on the tiny lenses: one takes prompts, the other none."""
    with served(tiny_lens, prompt_free_lens) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with chromium() as running:
        yield running


@pytest.fixture
def complaints() -> list[str]:
    """What the console and failed scripts said."""
    return []


@pytest.fixture
def page(browser: Any, address: str, complaints: list[str]) -> Iterator[Any]:
    """The app, opened and showing images; the test fails if anything complained."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    listen(tab, complaints)
    tab.goto(address)
    settled(tab)
    yield tab
    context.close()
    assert complaints == []


def test_a_sweep_streams_and_can_be_stopped(page: Any) -> None:
    visit(page, "sweep")
    page.wait_for_selector("#dl-sweep-plot .scatterlayer .point")
    page.get_by_label("9 strengths").check()  # long enough that Stop is there to be seen
    page.get_by_label("256").check()
    page.locator("#dl-run").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#dl-stop-sweep")
    page.locator("#dl-stop-sweep").click()
    page.wait_for_function("() => /Stopped/.test(document.querySelector('#dl-sweep-status').innerText)")
    page.wait_for_selector("#dl-run")


def test_a_feature_of_the_atlas_is_added_to_what_is_steered(page: Any) -> None:
    drag(page, 2.0)
    settled(page)
    beta = query(page)["b"]
    visit(page, "atlas")
    button = page.locator("#dl-turn-feature")
    button.wait_for()
    number = button.inner_text().split("#")[1].split()[0]
    button.press("Enter")
    page.wait_for_selector(f".dx-row.dx-own[data-id='{number}']")
    settled(page)
    assert query(page)["f"].startswith(f"{number}:") and query(page)["b"] == beta


def test_about_shows_the_classifiers_errors(page: Any) -> None:
    page.get_by_role("tab", name="About").click()
    page.wait_for_selector("#dl-errors .heatmaplayer")
    assert "perceived gender presentation" in page.locator(".dl-prose").inner_text()


def test_every_tab_has_an_address_and_back_leads_back(page: Any, address: str) -> None:
    assert page.url == address
    visit(page, "atlas")
    visit(page, "sweep")
    assert page.url == f"{address}?tab=sweep"
    page.go_back()
    page.wait_for_function("() => dl.tab() === 'atlas'")
    assert page.url == f"{address}?tab=atlas"
    page.go_back()
    page.wait_for_function("() => dl.tab() === 'explore'")
    page.go_forward()
    page.wait_for_function("() => dl.tab() === 'atlas'")
    page.goto(f"{address}?tab=depth")
    page.wait_for_function("() => window.dl?.tab() === 'depth'")


def test_the_theme_is_switched_by_keyboard_and_kept(page: Any) -> None:
    page.locator("#dl-share").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.body.classList.contains('dark')")
    page.reload()
    page.wait_for_function("() => document.body.classList.contains('dark')")


def test_it_opens_unchanged_with_an_invitation_and_nothing_to_scroll(page: Any, address: str) -> None:
    assert page.url == address and strength(page) == 1
    assert page.locator(".dx-invite").count() == 1 and "unchanged" in page.locator("[data-part=steered]").inner_text()
    assert sources(page, BEFORE) == sources(page, AFTER) and len(sources(page)) == 8
    for width, height in ((1280, 720), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        for part in (".dx-sentence", AFTER, SLIDER, ".dx-big"):
            box = page.locator(part).bounding_box()
            assert box["y"] >= 48 and box["y"] + box["height"] <= height, (part, width, box)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_slider_by_keyboard(page: Any) -> None:
    """At most eight tab stops lead to it; arrows, page keys and ends move it, images and address follow."""
    page.evaluate("document.activeElement.blur()")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "dl-slider":
            break
    assert page.evaluate("document.activeElement.id") == "dl-slider"
    before = sources(page)
    page.keyboard.press("ArrowRight")
    one = strength(page)
    page.keyboard.press("PageUp")
    assert strength(page) > one > 1
    page.keyboard.press("End")
    assert strength(page) == float(page.locator(SLIDER).get_attribute("aria-valuemax"))
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    moved = strength(page)
    page.wait_for_function("b => new URLSearchParams(location.search).get('b') === b", arg=f"{moved:g}")
    settled(page)
    assert sources(page) != before and f"β {moved:g}".replace("-", "−") in page.locator(SLIDER).get_attribute(
        "aria-valuetext"
    )
    page.keyboard.press("Control+z")
    settled(page)
    assert strength(page) == 1
    page.keyboard.press("Control+Shift+z")
    settled(page)
    assert strength(page) == moved


def test_a_drag_shows_drafts_and_then_the_full_images(page: Any) -> None:
    drag(page, 4.0, hold=True)
    page.wait_for_selector(f"{AFTER} .dx-draft")
    assert "not measured" in page.locator("[data-part=state]").inner_text()
    assert page.locator(f"{AFTER} figcaption").first.inner_text() == "draft"
    page.mouse.up()
    settled(page)
    assert query(page)["b"] == f"{strength(page):g}"
    alts = [b.get_attribute("aria-label") for b in page.locator(f"{AFTER} button").all()]
    assert all(alt.startswith("Seed ") and "steered: read as " in alt for alt in alts)
    page.locator(f"{AFTER} button").first.click()
    assert page.locator("dialog[open] table tbody tr").count() >= 3
    page.locator(".dx-cell").first.focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Steer only where painted").press("Enter")
    settled(page)
    assert query(page)["x"].startswith("110") and "where painted" in page.locator("[data-part=steered]").inner_text()


def test_feature_rows_steer_mute_solo_and_take_any_feature(page: Any) -> None:
    row = page.locator(".dx-row").first
    number = row.get_attribute("data-id")
    row.locator("input").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    settled(page)
    assert f"{number}:" in query(page)["f"] and "dx-own" in row.get_attribute("class")
    assert "not of this mix" in page.locator("[data-part=numbers]").inner_text()
    row.locator(".dx-alone").click()
    page.wait_for_selector(f".dx-row[data-id='{number}'] .dx-alone:has-text('here: ')")
    row.locator(".dx-mute").click()
    settled(page)
    assert query(page)["f"] == f"{number}:1" and row.locator(".dx-mute").get_attribute("aria-pressed") == "true"
    row.locator(".dx-remove").click()
    settled(page)
    assert "f" not in query(page)
    row.locator(".dx-solo").click()
    settled(page)
    assert query(page)["o"] == number
    row.locator(".dx-solo").click()
    settled(page)
    outside = next(str(i) for i in range(32) if not page.locator(f".dx-row[data-id='{i}']").count())
    page.locator(".dx-add").click()
    page.keyboard.type(outside)
    page.wait_for_selector(f".dx-hit:has-text('#{outside} ')")
    page.keyboard.press("Enter")
    settled(page)
    assert query(page)["f"].startswith(f"{outside}:") and page.locator(f".dx-own[data-id='{outside}']").count() == 1


def test_this_mix_is_measured_and_led_to_even(page: Any) -> None:
    page.locator(".dx-options").click()
    page.get_by_label("symmetric", exact=True).check()
    page.keyboard.press("Escape")
    settled(page)
    assert page.locator(".dx-line.dx-other").count() == 1, "the stored curve is of another sampler, and says so"
    page.locator(".dx-measure").click()
    page.wait_for_function(
        "() => /exactly what is on screen/.test(document.querySelector('[data-part=numbers]').innerText)"
    )
    assert page.locator(".dx-line.dx-other").count() == 0 and page.locator(".dx-control").count() == 1
    page.locator(".dx-go").click()
    page.locator(".dx-pop .dx-item").first.click()
    page.wait_for_selector(".dx-said")
    settled(page)
    assert "50 %" in page.locator(".dx-said").inner_text()


def test_words_of_the_sentence_are_its_controls(page: Any) -> None:
    page.locator(".dx-word").first.press("Enter")
    page.keyboard.type("a portrait of an astronaut")
    page.keyboard.press("Enter")
    assert "astronaut" in alert(page) and page.locator(".dx-vocabulary .dx-chip").count() > 3
    page.locator(".dx-pop input[type=search]").fill("a portrait of a nurse")
    page.keyboard.press("Enter")
    settled(page)
    assert page.locator("[data-part=alert]").inner_text() == "" and query(page)["p"] == "a portrait of a nurse"
    page.locator(".dx-word").nth(1).click()
    page.get_by_role("button", name="old people").click()
    page.wait_for_function("() => new URLSearchParams(location.search).get('a') === 'age'")
    settled(page)
    assert "old people" in page.locator(".dx-sentence").inner_text()


def test_a_link_opens_the_same_view(page: Any, address: str) -> None:
    page.goto(f"{address}?v=1&p=a+portrait+of+a+nurse&a=age&t=young&b=2.5&n=16&s=3&k=2&m=symmetric&w=0-2&f=1:2,3:4")
    settled(page)
    assert strength(page) == 2.5 and len(sources(page)) == 16
    assert query(page) == {"v": "1", "p": "a portrait of a nurse", "a": "age", "t": "young", "b": "2.5", "n": "16",
                           "s": "3", "k": "2", "m": "symmetric", "w": "0-2", "f": "1:2,3:4"}  # fmt: skip
    images = sources(page)
    visit(page, "atlas")
    page.go_back()
    page.wait_for_function("() => dl.tab() === 'explore'")
    settled(page)
    assert sources(page) == images and strength(page) == 2.5
    page.goto(f"{address}?v=1&b=x")
    assert "cannot be opened" in alert(page)


def test_two_lenses_side_by_side(page: Any, address: str) -> None:
    """From the first lens to the one that takes no prompt, β there by keyboard, its link, and back."""
    page.locator(".dl-model summary").press("Enter")
    page.get_by_role("navigation", name="Lenses").get_by_role("link", name="prompt-free").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/prompt-free")
    settled(page)
    assert "no prompt" in page.locator(".dx-sentence").inner_text()
    drag(page, 3.0)
    settled(page)
    moved = strength(page)
    assert page.url.startswith(f"{address}prompt-free?") and "p" not in query(page)
    page.reload()
    settled(page)
    assert strength(page) == moved
    page.locator(".dl-model summary").click()
    page.get_by_role("navigation", name="Lenses").get_by_role("link", name="tiny").click()
    page.wait_for_function("() => document.querySelector('.dx-word')")
    assert page.url == address


def test_the_sweep_tab_and_explore_have_one_subject(page: Any) -> None:
    page.locator(".dx-word").first.click()
    page.get_by_role("button", name="a nurse").click()
    settled(page)
    visit(page, "sweep")
    page.wait_for_function(
        "() => document.querySelector('#dl-sweep-prompt input')?.value === 'a portrait of a nurse'"
        " && /Run sweep/.test(document.querySelector('#dl-sweep-status').innerText)"
    )
    other = page.locator("#dl-sweep-prompt input")
    other.fill("a portrait of a doctor")
    other.press("Enter")
    page.wait_for_selector("#dl-sweep-plot .scatterlayer .point")
    visit(page, "explore")
    page.wait_for_function("() => /a doctor/.test(document.querySelector('.dx-sentence').innerText)")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(browser: Any, address: str, theme: str) -> None:
    tab = browser.new_page(viewport={"width": 320, "height": 700}, has_touch=True)
    tab.set_default_timeout(PATIENCE)
    tab.goto(f"{address}?__theme={theme}")
    settled(tab)
    for name in ("explore", "sweep", "atlas", "about"):
        visit(tab, name)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 320, name
    tab.close()
