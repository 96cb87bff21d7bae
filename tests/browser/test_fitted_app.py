"""A lens fitted by one command to a Stable Diffusion pipeline that was saved to disk opens in the app and redraws."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_text_pipeline
from harness import served
from lens_fixtures import PROMPTS
from test_app import browser, complaints, page, pytestmark  # noqa: F401
from typer.testing import CliRunner
from workbench import BEFORE, drag, settled, sources

from diffusion_lens.cli.app import app
from diffusion_lens.fit.run import Models, load_config
from diffusion_lens.lens.lens import DiffusionLens


@pytest.fixture(scope="module")
def fitted(tiny_fit_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lens made by ``fit`` from flags alone."""
    folder = tmp_path_factory.mktemp("fitted")
    make_text_pipeline().save_pretrained(folder / "sd")
    (folder / "judge").mkdir()
    tiny_fit_models.classifier.save(folder / "judge")  # type: ignore[attr-defined]
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, [
            "fit", "--model", "sd", "--classifier", "judge", "--attributes", "gender,age", "--prompts", *PROMPTS,
            "--steps", "4", "--guidance", "2", "--images", "96", "--per-class", "12", "--sae-features", "32",
            "--sae-k", "4", "--sae-steps", "60", "--sweep-images", "16", "--quick", "--offline", "--out", "lens",
            "--device", "cpu",
        ])  # fmt: skip
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    return folder / "lens"


@pytest.fixture(scope="module")
def address(fitted: Path) -> Iterator[str]:
    """The app, served on the fitted lens."""
    with served(DiffusionLens.from_pretrained(fitted, offline=True)) as url:
        yield url


def test_the_flags_are_kept_beside_the_work_and_with_the_lens(fitted: Path) -> None:
    config = load_config(fitted.parent / "runs" / "fit" / "fit.json")
    lens = DiffusionLens.from_pretrained(fitted, offline=True)
    assert config.attributes == tuple(a.name for a in lens.attributes) == ("gender", "age")
    assert lens.prompts == config.prompts == PROMPTS
    assert lens.manifest.base_model.id == config.model_id == "sd" and lens.manifest.n_steps == config.n_steps == 4


def test_a_fitted_lens_shows_images_and_a_turn_redraws_them(page: Any) -> None:  # noqa: F811
    before, after = sources(page, BEFORE), sources(page)
    assert len(before) == len(after) == 8 and all(before) and all(after)
    drag(page, 5.0)
    settled(page)
    drawn = sources(page)
    assert len(drawn) == 8 and drawn != after and drawn != sources(page, BEFORE)
    page.get_by_role("tab", name="Atlas").click()
    page.locator("#dl-turn-feature").wait_for()
