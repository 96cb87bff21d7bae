"""The atlas against a slow, obvious twin and hand-made responses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion_lens.base.types import Atlas, Attribute, Attribution, LensError, Predictions
from diffusion_lens.features.atlas import (
    AtlasConfig,
    Responses,
    build_atlas,
    choose_images,
    feature_card,
    name_features,
    place,
)
from diffusion_lens.features.sae import SAEConfig, SparseAutoencoder
from diffusion_lens.results.records import load_atlas, save_atlas

N, STEPS, C, Y, X, D = 12, 3, 5, 2, 4, 16
CONFIG = AtlasConfig(n_top=3, n_random=2, layout="pca", seed=1)
GENDER = Attribute("gender", ("female", "male"))


def make_sae(layout: str = "position") -> SparseAutoencoder:
    width = C if layout == "position" else C * Y * X
    cfg = SAEConfig(
        d_in=width, d_sae=D, k=2, layout=layout, hook_name="mid_block", model_id="tiny", spatial=(Y, X)  # type: ignore[arg-type]
    )  # fmt: skip
    sae = SparseAutoencoder(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = F.normalize(torch.randn(D, width, generator=generator), dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc[-1] = -100.0
    return sae.requires_grad_(False)


def activations() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, STEPS, C, Y, X)).astype(np.float16)


def batches() -> Iterator[np.ndarray]:
    h = activations()
    yield h[:5]
    yield h[5:5]
    yield h[5:]


def slow_acts(sae: SparseAutoencoder) -> np.ndarray:
    """Feature activations ``[n, step, y, x, d_sae]`` one position at a time."""
    h = torch.from_numpy(activations()).float()
    found = np.zeros((N, STEPS, Y, X, D), np.float32)
    for n, t, y, x in np.ndindex(N, STEPS, Y, X):
        found[n, t, y, x] = sae.encode(h[n, t, :, y, x][None])[0].numpy()
    return found


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return build_atlas(make_sae(), batches, range(STEPS), {}, CONFIG)


def test_numbers_equal_the_slow_twin(atlas: Atlas) -> None:
    acts = slow_acts(make_sae())
    np.testing.assert_allclose(atlas.density, (acts > 0).mean(axis=(0, 1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(atlas.step_profile, acts.mean(axis=(0, 2, 3)).T, rtol=1e-4, atol=1e-6)
    maps = acts.mean(axis=1)
    for feature in range(D):
        score = maps[..., feature].max(axis=(1, 2))
        expected = [int(i) for i in np.argsort(-score, kind="stable")[:3] if score[i] > 0]
        assert [i for i in atlas.top_images[feature] if i >= 0] == expected
        for place_, image in enumerate(atlas.top_images[feature]):
            if image >= 0:
                np.testing.assert_allclose(atlas.heatmaps[feature, place_], maps[image, ..., feature], atol=2e-3)
        for place_, image in enumerate(atlas.random_images[feature]):
            if image >= 0:
                assert score[image] > 0
                np.testing.assert_allclose(atlas.random_heatmaps[feature, place_], maps[image, ..., feature], atol=2e-3)


def test_near_misses_never_fire_and_come_closest(atlas: Atlas) -> None:
    sae = make_sae()
    acts = slow_acts(sae)
    h = torch.from_numpy(activations()).float()
    pre = sae.hidden_pre(h.permute(0, 1, 3, 4, 2)).numpy().max(axis=(1, 2, 3))
    for feature in range(D):
        silent = [i for i in range(N) if acts[i, ..., feature].max() == 0]
        expected = sorted(silent, key=lambda i: -pre[i, feature])[:2]
        assert [i for i in atlas.near_images[feature] if i >= 0] == expected


def test_a_dead_feature_has_no_examples_but_near_misses(atlas: Atlas) -> None:
    assert atlas.dead[-1] and not atlas.dead[:-1].all()
    assert set(atlas.top_images[-1]) == set(atlas.random_images[-1]) == {-1}
    assert (atlas.near_images[-1] >= 0).all()
    assert not atlas.heatmaps[-1].any()


def test_the_map_layout_has_one_number_per_image() -> None:
    atlas = build_atlas(make_sae("map"), batches, range(STEPS), {}, CONFIG)
    assert atlas.heatmaps.shape == (D, 3, 1, 1)
    live = int(np.flatnonzero(atlas.density > 0)[0])
    sae = make_sae("map")
    acts = sae.encode(torch.from_numpy(activations()).float().flatten(0, 1).flatten(1)).view(N, STEPS, D).mean(1)
    assert atlas.heatmaps[live, 0, 0, 0] == pytest.approx(float(acts[:, live].max()), rel=1e-2)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(LensError, match="at least one image"):
        build_atlas(make_sae(), lambda: iter(()), range(STEPS), {}, CONFIG)


def test_random_examples_follow_the_seed() -> None:
    score = np.ones((30, 4), np.float32)
    responses = Responses(score, np.full((30, 4), -np.inf), np.ones(4), np.ones((4, 1)))
    first, again, other = (choose_images(responses, AtlasConfig(seed=s))[1] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("layout", ["pca", "umap"])
def test_a_layout_keeps_neighbours_together_and_repeats(layout: str) -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(3, 20)), 15, axis=0)
    directions = (centres + 0.05 * rng.normal(size=centres.shape)) * rng.uniform(1, 9, (45, 1))
    xy, again = (place(directions, layout=layout, seed=3) for _ in range(2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(xy, again)
    assert xy.shape == (45, 2) and xy.dtype == np.float32 and np.abs(xy).max() <= 1.0
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    same = np.kron(np.eye(3), np.ones((15, 15))).astype(bool)
    assert distance[same].mean() < distance[~same].mean() / 2


def test_labels_go_to_the_class_that_a_feature_tells_apart() -> None:
    labels = np.repeat([0, 1], 20)
    probs = np.eye(2)[labels]
    certain = np.ones(40, bool)
    certain[:2] = False
    noise = np.random.default_rng(0).normal(size=40)
    score = np.stack([labels * 1.0, 1.0 - labels, noise, np.zeros(40)], axis=1)
    score[:2, 0] = 99.0
    names, source = name_features(score, {"gender": Predictions(probs, certain, GENDER, "c")})
    assert names == ("gender: male", "gender: female", "", "")
    assert "40 images" in source


def test_too_few_of_a_class_give_no_label() -> None:
    labels = np.array([1] * 9 + [0] * 31)
    score = (labels * 1.0)[:, None]
    assert name_features(score, {"gender": Predictions(np.eye(2)[labels], np.ones(40, bool), GENDER, "c")})[0] == ("",)


def test_an_atlas_reads_back(atlas: Atlas, tmp_path: Path) -> None:
    effect = np.full((D, 2), np.nan, np.float32)
    effect[3] = (-0.25, 0.25)
    with_effect = Atlas(**{**atlas.__dict__, "effects": {"gender": effect}, "effect_source": "on 8 images"})
    save_atlas(tmp_path / "atlas.safetensors", with_effect)
    found = load_atlas(tmp_path / "atlas.safetensors")
    for name, value in with_effect.__dict__.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(found, name), value)
        elif name != "effects":
            assert getattr(found, name) == value
    np.testing.assert_array_equal(found.effects["gender"], effect)


def test_a_card_gathers_what_is_known(atlas: Atlas) -> None:
    pool = np.arange(N, dtype=np.uint8)[:, None, None, None] * np.ones((N, 8, 8, 3), np.uint8)
    scores = np.zeros((2, STEPS, D), np.float32)
    scores[1, :, 4] = (1.0, 2.0, 3.0)
    scores[1, :, 5] = 10.0
    attribution = Attribution(scores, 0.0, GENDER, "integrated_gradients", "zero", atlas.sae_id, 4)
    effect = np.full((D, 2), np.nan, np.float32)
    effect[4] = (-0.5, 0.5)
    full = Atlas(**{**atlas.__dict__, "effects": {"gender": effect}})
    card = feature_card(full, {"gender": attribution}, pool, 4)
    assert card.attribution["gender"] == {"female": 0.0, "male": 6.0}
    assert card.rank["gender"]["male"] == 2
    assert card.effects == {"gender": {"female": -0.5, "male": 0.5}}
    assert [int(image[0, 0, 0]) for image in card.top.images] == list(card.top.rows)
    assert card.top.heatmaps.shape == (len(card.top.rows), Y, X)
    assert feature_card(full, {"gender": attribution}, pool, 5).effects == {}
    glasses = Attribute("glasses", ("none", "glasses"))
    seen = Atlas(**{**atlas.__dict__, "effects": {"gender": effect, "glasses": -effect, "hats": effect}})
    both = feature_card(seen, {"gender": attribution}, pool, 4, nuisances=[glasses]).effects
    assert both == {**card.effects, "glasses": {"none": 0.5, "glasses": -0.5}}
    dead = feature_card(full, {}, pool, D - 1)
    assert dead.dead and dead.top.images.shape == (0, 8, 8, 3)
    with pytest.raises(LensError, match="no feature 16"):
        feature_card(full, {}, pool, D)
