"""A lens on transformers of each kind, fitted end to end on tiny pipelines, and opened again from its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import SETTING, quick
from lens_fixtures import PROMPTS, STEPS, classifier_of
from tiny_transformers import make_pixart, make_sd3, make_z_image

from diffusion_lens.fit.defaults import default_config
from diffusion_lens.fit.run import Models, fit
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import load_model

CASES: dict[str, tuple[Callable[[], Any], str, dict[str, Any], tuple[int, int]]] = {
    "one stream": (make_pixart, "transformer_blocks.1:update", {}, (4, 4)),
    "two streams": (make_sd3, "transformer_blocks.1", {"max_sequence_length": 0}, (4, 4)),
    "joined": (make_z_image, "layers.1", {"size": (16, 32)}, (4, 8)),
}
GUIDANCE = 2.0


@pytest.mark.parametrize("kind", CASES)
def test_a_lens_is_fitted_to_image_tokens_and_opened_again(kind: str, tmp_path: Path) -> None:
    make, site, load, grid = CASES[kind]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipeline")
    model = load_model(tmp_path / "pipeline", offline=True, hook_name=site, model_id="tiny", **load)
    parts = [
        generate(model, request(model, p, range(10_000, 10_064), STEPS, GUIDANCE), batch_size=64).images
        for p in PROMPTS
    ]
    judge = classifier_of(*parts)
    config = quick(
        name=kind, model=str(tmp_path / "pipeline"), model_id="tiny", hook_name=site, vocabulary=None,
        guidance_scale=GUIDANCE, settings=(SETTING,), **load,
    )  # fmt: skip
    fit(config, tmp_path / "lens", work=tmp_path / "work", models=Models(model, judge, judge))

    lens = DiffusionLens.from_pretrained(tmp_path / "lens")
    assert lens.manifest.hook_name == site and lens.model.site == model.site
    assert lens.model.settings == model.settings and lens.model.spatial == grid
    assert lens.sae.cfg.d_in == model.d_in and lens.sae.cfg.spatial == grid
    assert lens.atlas.heatmaps.shape[2:] == grid
    plain = lens.generate(PROMPTS[0], seeds=[1, 2])
    assert np.array_equal(plain.images, generate(model, plain.request).images)
    turned = lens.generate(PROMPTS[0], lens.intervention("gender", "male", 6.0), seeds=[1, 2])
    assert (turned.images != plain.images).any() and turned.edit is not None
    assert np.array_equal(lens.reproduce(turned).images, turned.images)
    still = lens.generate(PROMPTS[0], lens.intervention("gender", "male", 1.0), seeds=[1, 2])
    assert np.array_equal(still.images, plain.images)


def test_what_a_fit_takes_from_the_model_alone(tmp_path: Path) -> None:
    make_sd3().save_pretrained(tmp_path / "pipeline")
    model = load_model(tmp_path / "pipeline", offline=True, max_sequence_length=0)
    judge = classifier_of(np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8))
    config = default_config(model, judge, source="x", classifier="y", prompts=("a man",))
    assert (config.n_steps, config.guidance_scale, config.hook_name) == (28, 7.0, "transformer_blocks.1")
    assert config.max_sequence_length == 0 and config.choose.samplers == ("asymmetric",)
