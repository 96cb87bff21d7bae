"""The app in a real browser: everything by keyboard, every tab opens, nothing on the console."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from harness import chromium, listen, marks, served, visit

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
    tab.wait_for_selector("#dl-after img")
    tab.wait_for_selector("#dl-measures .dl-bar")
    yield tab
    context.close()
    assert complaints == []


def status(page: Any) -> str:
    """The status line of Explore."""
    return str(page.locator("#dl-status p").inner_text())


def wait_for_status(page: Any, pattern: str) -> str:
    """Wait until the status line matches; returns it."""
    page.wait_for_function(
        "p => new RegExp(p).test(document.querySelector('#dl-status p')?.innerText ?? '')", arg=pattern
    )
    return status(page)


def sources(page: Any, row: str) -> list[str]:
    """The images of one row."""
    return [i.get_attribute("src") for i in page.locator(f"{row} img").all()]


def test_beta_by_keyboard_changes_images_and_ratio(page: Any) -> None:
    before, after = sources(page, "#dl-before"), sources(page, "#dl-after")
    measured = page.locator("#dl-measures").inner_text()
    assert len(before) == len(after) == 8
    slider = page.locator("#dl-beta input[type=range]")
    slider.focus()
    start = float(slider.input_value())
    for _ in range(16):
        page.keyboard.press("ArrowLeft")
    moved = float(slider.input_value())
    assert moved < start
    wait_for_status(page, f"β = {moved:g}: .*drawn in")
    assert sources(page, "#dl-after") != after
    assert page.locator("#dl-measures").inner_text() != measured
    assert f"b={moved:g}" in page.locator(".dl-permalink").get_attribute("href")
    alts = [i.get_attribute("alt") for i in page.locator("#dl-after img").all()]
    assert all(re.fullmatch(r"Seed \d+, after the turn: read as .+", alt) for alt in alts)


def test_one_feature_turns_alone_by_keyboard(page: Any) -> None:
    box = page.locator("#dl-cards input[type=checkbox]").first
    box.focus()
    page.keyboard.press("Space")
    slider = page.locator("#dl-cards input[type=range]:visible").first
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    own = slider.input_value()
    page.wait_for_function("v => document.querySelector('.dl-permalink').href.includes(v)", arg=f"%3A{float(own):g}")
    assert f"at {float(own):g}" in page.locator("#dl-after h3").inner_text()


def test_bad_input_is_said_and_loses_nothing(page: Any) -> None:
    prompt = page.locator("#dl-prompt input")
    prompt.fill("a portrait of an astronaut")
    prompt.press("Enter")
    said = wait_for_status(page, "never saw")
    assert "astronaut" in said and "portrait" in said
    assert len(sources(page, "#dl-after")) == 8
    prompt.fill("a portrait of a nurse")
    prompt.press("Enter")
    wait_for_status(page, "drawn in")
    number = page.locator("#dl-beta input[type=number]")
    number.fill("99")
    number.press("Enter")
    wait_for_status(page, "must lie between")
    page.locator("#dl-reset").focus()
    page.keyboard.press("Enter")
    wait_for_status(page, "β = 1: .*drawn in")


def test_a_link_opens_the_same_view(page: Any, address: str) -> None:
    page.goto(f"{address}?v=1&p=a+portrait+of+a+nurse&a=age&t=young&b=2.5&n=16&s=3&k=2&m=symmetric&w=0-2")
    wait_for_status(page, "β = 2.5: .*young.*drawn in")
    assert len(sources(page, "#dl-after")) == 16
    assert page.locator("#dl-prompt input").input_value() == "a portrait of a nurse"


def test_two_lenses_side_by_side(page: Any, address: str) -> None:
    """From the first lens to the one that takes no prompt, β there by keyboard, its link, and back."""
    page.locator(".dl-model summary").press("Enter")
    page.get_by_role("navigation", name="Lenses").get_by_role("link", name="prompt-free").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/prompt-free")
    page.get_by_text("takes no prompt").first.wait_for()
    assert page.locator("#dl-prompt input").count() == 0
    page.wait_for_selector("#dl-measures .dl-bar")
    before = sources(page, "#dl-after")
    slider = page.locator("#dl-beta input[type=range]")
    slider.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    moved = slider.input_value()
    wait_for_status(page, f"β = {float(moved):g}: .*drawn in")
    assert len(before) == 8 and sources(page, "#dl-after") != before
    link = page.locator(".dl-permalink").evaluate("link => link.href")
    assert link.startswith(f"{address}prompt-free?") and "p=" not in link
    page.goto(link)
    wait_for_status(page, f"β = {float(moved):g}: .*drawn in")
    page.locator(".dl-model summary").click()
    page.get_by_role("navigation", name="Lenses").get_by_role("link", name="tiny").click()
    page.wait_for_selector("#dl-prompt input")
    assert page.url == address


def test_the_sweep_tab_and_explore_have_one_subject(page: Any) -> None:
    prompt = page.locator("#dl-prompt input")
    prompt.fill("a portrait of a nurse")
    prompt.press("Enter")
    wait_for_status(page, "drawn in")
    visit(page, "sweep")
    page.wait_for_function(
        "() => document.querySelector('#dl-sweep-prompt input')?.value === 'a portrait of a nurse'"
        " && /Run sweep/.test(document.querySelector('#dl-sweep-status').innerText)"
    )
    other = page.locator("#dl-sweep-prompt input")
    other.fill("a portrait of a doctor")
    other.press("Enter")
    page.wait_for_selector("#dl-sweep-plot .scatterlayer .point")
    page.get_by_role("tab", name="Explore").click()
    page.wait_for_function("() => document.querySelector('.dl-permalink').href.includes('doctor')")
    assert prompt.input_value() == "a portrait of a doctor"


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


def test_the_atlas_by_mouse_and_by_keyboard(page: Any) -> None:
    page.get_by_role("tab", name="Atlas").click()
    point = page.locator("#dl-atlas-map .scatterlayer .trace:first-child .point").nth(3)
    point.wait_for()
    heading = page.locator("#dl-atlas-card h2")
    first = heading.inner_text()
    point.click(force=True)
    page.wait_for_function("t => document.querySelector('#dl-atlas-card h2').innerText !== t", arg=first)
    clicked = heading.inner_text()
    cell = page.locator("#dl-atlas-table [role=gridcell]").first
    cell.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function("t => document.querySelector('#dl-atlas-card h2').innerText !== t", arg=clicked)
    number = heading.inner_text().split("#")[1]
    page.locator("#dl-turn-feature").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#dl-cards .dl-slot:first-child article[aria-label^='Feature {number},']")
    wait_for_status(page, "drawn in")


def test_about_shows_the_classifiers_errors(page: Any) -> None:
    page.get_by_role("tab", name="About").click()
    page.wait_for_selector("#dl-errors .heatmaplayer")
    assert "perceived gender presentation" in page.locator(".dl-prose").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(browser: Any, address: str, theme: str) -> None:
    tab = browser.new_page(viewport={"width": 400, "height": 800})
    tab.set_default_timeout(PATIENCE)
    tab.goto(f"{address}?__theme={theme}")
    tab.wait_for_selector("#dl-after img")
    for name in ("Explore", "Sweep", "Atlas", "About"):
        visit(tab, name.lower())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400, name
    tab.close()


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
