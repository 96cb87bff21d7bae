"""The Methods tab in a real browser: a stored table and its plots, and a method run live beside DiffLens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import marks, opened, served, visit
from lens_fixtures import PROMPTS

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studies.bench.run import CompareConfig, run_compare
from diffusion_lens.studio import methods_live
from diffusion_lens.studio.fits import FITS_VARIABLE

PATIENCE = 90_000

pytestmark = marks


@pytest.fixture(scope="module")
def address(tiny_lens: DiffusionLens, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app on a copy of the tiny lens that holds a comparison for gender, and none for age."""
    folder = tmp_path_factory.mktemp("compared") / "lens"
    tiny_lens.save_pretrained(folder)
    config = CompareConfig(attribute="gender", prompt=PROMPTS[0], methods=("difflens", "activation", "bypass"), n=24,
                           n_tune=12, n_fit=8, options={}, n_examples=2)  # fmt: skip
    DiffusionLens.from_pretrained(folder).store(run_compare(tiny_lens, config, tmp_path_factory.mktemp("work")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FITS_VARIABLE, str(tmp_path_factory.mktemp("fits")))
        patch.setattr(methods_live, "fit_seeds", lambda: range(9_000_000, 9_000_016))
        with served(DiffusionLens.from_pretrained(folder)) as url:
            yield url


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The Methods tab, open; the test fails if the console complained."""
    with opened(address, PATIENCE) as tab:
        visit(tab, "methods")
        tab.wait_for_selector("#dl-bench-table table")
        yield tab


def test_the_table_the_plots_and_a_method_live(page: Any, tmp_path: Path) -> None:
    rows = page.locator("#dl-bench-table tbody tr:not(.dl-bandname) th").all_inner_texts()
    assert [row.split("\n")[0] for row in rows] == ["DiffLens", "Activation", "Mid-block bypass"]
    assert page.locator("#dl-bench-table .dl-was").count() == 3, "no steering is the ring in every row"
    assert page.locator("#dl-bench-curves svg").count() == 3
    assert "balance" in page.locator("#dl-bench-verdict").inner_text()
    page.locator("#dl-bench-measure").get_by_label("distance").check()
    page.wait_for_function("() => /distance/.test(document.querySelector('#dl-bench-table caption').innerText)")
    page.get_by_text("All columns").click()
    assert "CLIP-I" in page.locator("#dl-bench-more").inner_text()
    with page.expect_download() as file:
        page.locator("#dl-bench-more").get_by_role("link", name="CSV").click()
    assert "unsteered" in Path(file.value.path()).read_text()
    page.wait_for_selector("#dl-method-about article")
    page.wait_for_selector("#dl-method-options label, #dl-method-options button", state="attached")
    page.wait_for_function("() => !document.querySelector('#dl-method-run').disabled")
    page.locator("#dl-method-run").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#dl-trio .dl-other img")
    assert page.locator("#dl-trio img").count() == 24
    alts = [i.get_attribute("alt") for i in page.locator("#dl-trio .dl-other img").all()]
    assert all(alt.startswith("Seed ") and "Activation" in alt for alt in alts)
    said = page.locator("#dl-method-status").inner_text()
    assert "DiffLens" in said and "how often" in said
    page.wait_for_selector("#dl-method-run")
    page.screenshot(path=tmp_path / "methods.png", full_page=True)
    page.locator("#dl-bench-attribute").get_by_label("age").check()
    page.wait_for_selector("#dl-bench-verdict .dl-empty")
    assert "python -m diffusion_lens compare --store" in page.locator("#dl-bench-verdict").inner_text()
    page.screenshot(path=tmp_path / "empty.png", full_page=True)
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
