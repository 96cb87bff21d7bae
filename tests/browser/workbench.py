"""What browser tests read off the workbench, and how they wait for it."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

AFTER, BEFORE = '[data-part="after"]', '[data-part="before"]'
SLIDER = "#dl-slider"


def settled(page: Any) -> None:
    """Wait until the images on screen are of the view that is set, read in full."""
    page.wait_for_selector(f"{AFTER} .dx-figure")
    page.wait_for_function(
        "() => document.querySelector('.dx').dataset.ready && !document.querySelector('.dx-busy, .dx-draft, .dx-stale')"
        " && document.querySelector('[data-part=after] :is(img[src], canvas:not([hidden]))')"
    )


def sources(page: Any, row: str = AFTER) -> list[str]:
    """The images of one row."""
    return [str(i.get_attribute("src")) for i in page.locator(f"{row} img").all()]


def strength(page: Any) -> float:
    """Where the slider stands."""
    return float(page.locator(SLIDER).get_attribute("aria-valuenow"))


def query(page: Any) -> dict[str, str]:
    """The address's values."""
    return {key: value[0] for key, value in parse_qs(urlsplit(page.url).query, keep_blank_values=True).items()}


def alert(page: Any) -> str:
    """What is wrong, once something is."""
    page.wait_for_function("() => document.querySelector('[data-part=alert]')?.textContent")
    return str(page.locator('[data-part="alert"]').inner_text())


def drag(page: Any, to: float, *, moves: int = 12, hold: bool = False) -> None:
    """Drag the thumb to a strength with the mouse, and let it go unless it is to be held."""
    slider = page.locator(SLIDER)
    box = slider.bounding_box()
    low, high = (float(slider.get_attribute(f"aria-value{end}")) for end in ("min", "max"))

    def x(beta: float) -> float:
        return float(box["x"] + 27 + (beta - low) / (high - low) * (box["width"] - 54))

    start, y = strength(page), box["y"] + box["height"] / 2
    page.mouse.move(x(start), y)
    page.mouse.down()
    for i in range(1, moves + 1):
        page.mouse.move(x(start + (to - start) * i / moves), y)
    if not hold:
        page.mouse.up()
