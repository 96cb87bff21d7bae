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
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.registry import METHODS
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import DiffusionModel, load_model

CASES: dict[str, tuple[Callable[[], Any], str, dict[str, Any], tuple[int, int]]] = {
    "one stream": (make_pixart, "transformer_blocks.1:update", {}, (4, 4)),
    "two streams": (make_sd3, "transformer_blocks.1", {"max_sequence_length": 0}, (4, 4)),
    "joined": (make_z_image, "layers.1", {"size": (16, 32)}, (4, 8)),
}
GUIDANCE = 2.0


def fitted(kind: str, folder: Path) -> tuple[DiffusionLens, DiffusionModel]:
    """A lens of this kind, opened from its folder, and the model that it was fitted to."""
    make, site, load, _ = CASES[kind]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "pipeline")
    model = load_model(folder / "pipeline", offline=True, hook_name=site, model_id="tiny", **load)
    parts = [
        generate(model, request(model, p, range(10_000, 10_064), STEPS, GUIDANCE), batch_size=64).images
        for p in PROMPTS
    ]
    judge = classifier_of(*parts)
    config = quick(
        name=kind, model=str(folder / "pipeline"), model_id="tiny", hook_name=site, vocabulary=None,
        guidance_scale=GUIDANCE, settings=(SETTING,), **load,
    )  # fmt: skip
    fit(config, folder / "lens", work=folder / "work", models=Models(model, judge, judge))
    return DiffusionLens.from_pretrained(folder / "lens"), model


@pytest.fixture(scope="module")
def lens_of_two_streams(tmp_path_factory: pytest.TempPathFactory) -> DiffusionLens:
    """A lens on a tiny Stable Diffusion 3."""
    return fitted("two streams", tmp_path_factory.mktemp("two"))[0]


@pytest.mark.parametrize("kind", CASES)
def test_a_lens_is_fitted_to_image_tokens_and_opened_again(kind: str, tmp_path: Path) -> None:
    _, site, _, grid = CASES[kind]
    lens, model = fitted(kind, tmp_path)
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


@pytest.mark.parametrize("key", ["site-means", "activation", "h-distribution"])
def test_methods_learn_on_a_flow(key: str, lens_of_two_streams: DiffusionLens) -> None:
    lens, method = lens_of_two_streams, METHODS[key]
    draws = Draws(lens.model, PROMPTS, tuple(range(500, 524)), STEPS, GUIDANCE)
    told: dict[str, Any] = {"prompts": draws.prompts, "seeds": draws.seeds, "draws": draws}
    learned = method.fit(lens, "gender", "male", method.options(), **told)
    plain = lens.generate(PROMPTS[0], seeds=range(2)).images
    still, turned = (lens.generate(PROMPTS[0], edit=learned.edit(s), seeds=range(2)).images for s in (0.0, 3.0))
    assert np.array_equal(still, plain) and not np.array_equal(turned, plain)


def test_what_a_fit_takes_from_the_model_alone(tmp_path: Path) -> None:
    make_sd3().save_pretrained(tmp_path / "pipeline")
    model = load_model(tmp_path / "pipeline", offline=True, max_sequence_length=0)
    judge = classifier_of(np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8))
    config = default_config(model, judge, source="x", classifier="y", prompts=("a man",))
    assert (config.n_steps, config.guidance_scale, config.hook_name) == (28, 7.0, "transformer_blocks.1")
    assert config.max_sequence_length == 0 and config.choose.samplers == ("asymmetric",)
