"""Drawings shown more often so that generated shares come to the planted ones: by hand, on records, and in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import load_model
from diffusion_lens.portraits import recipe, world
from diffusion_lens.portraits.autoencoder import AutoencoderTrainConfig, train_autoencoder
from diffusion_lens.portraits.denoiser import DenoiserTrainConfig, draw_rows, make_denoiser, train_denoiser
from diffusion_lens.portraits.emphasis import LARGEST, Emphasis, Shares, emphasise, pooled, teach
from diffusion_lens.portraits.networks import DenoiserConfig

TINY = DenoiserConfig(channels=(16, 16, 32), heads=2, text_width=16)
ASSETS = Path(__file__).resolve().parents[2] / "assets"
NURSE = "a portrait of a nurse"


def tiny_autoencoder(seed: int = 0) -> AutoencoderTiny:
    images = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    config = AutoencoderTrainConfig(width=16, n_steps=1, batch_size=2, seed=seed)
    return train_autoencoder(images, config, device=torch.device("cpu"))


def planted() -> dict[str, dict[str, np.ndarray]]:
    return {prompt: dict(world.planted_shares(prompt)) for prompt in world.PROMPTS}


@pytest.fixture(scope="module")
def records() -> tuple[np.ndarray, list[str]]:
    found = [world.sample_record(seed) for seed in range(12_000)]
    return np.array([r.classes for r in found]), [world.sample_caption(r) for r in found]


def shares(labels: np.ndarray, weights: np.ndarray, attribute: str) -> np.ndarray:
    column = next(i for i, a in enumerate(world.ATTRIBUTES) if a.name == attribute)
    counts = np.bincount(labels[:, column], weights, len(world.ATTRIBUTES[column].classes))
    return counts / counts.sum()


def test_what_is_drawn_too_seldom_is_taught_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_lens.portraits.emphasis.SHARED", 0)
    drawn = planted()
    drawn[NURSE] |= {"smile": np.array([0.67, 0.33]), "gender": np.array([0.0, 1.0]), "clothing": np.full(8, 1 / 8)}
    found = teach(drawn, 100)[NURSE]
    factor = (0.55 + 0.01) / (0.67 + 0.01), (0.45 + 0.01) / (0.33 + 0.01)
    expected = np.array([0.55 * factor[0], 0.45 * factor[1]])
    assert found["smile"] == pytest.approx(expected / expected.sum())
    assert found["tone"] == pytest.approx(world.planted_shares(NURSE)["tone"])
    limited = np.array([0.9 * LARGEST, 0.1 / LARGEST])  # planted .9 and .1, no woman drawn
    assert found["gender"] == pytest.approx(limited / limited.sum())
    assert found["clothing"][world.CLOTHING.index("robe")] == 0
    again = teach(planted(), 100, {NURSE: found})  # what is matched is not unlearnt
    assert again[NURSE]["smile"] == pytest.approx(found["smile"])


def test_what_is_off_everywhere_is_believed_before_what_is_off_once() -> None:
    drawn = planted()
    for own in drawn.values():
        own["smile"] = np.array([0.65, 0.35])
    assert all(own["smile"] == pytest.approx([0.65, 0.35]) for own in pooled(drawn, 200).values())
    drawn[NURSE]["smile"] = np.array([0.55, 0.45])
    smiles = (12 * 0.35 + 0.45) / (13 * 0.45), (12 * 0.65 + 0.55) / (13 * 0.55)
    shared = 0.45 * smiles[0] / (0.45 * smiles[0] + 0.55 * smiles[1])
    assert pooled(drawn, 1000)[NURSE]["smile"][1] == pytest.approx((0.45 + shared) / 2)
    drawn[NURSE]["smile"] = np.array([np.nan, np.nan])  # no image was decided
    assert pooled(drawn, 1000)[NURSE]["smile"] == pytest.approx([0.65, 0.35])
    assert all(np.isfinite(shares).all() for own in pooled(drawn, 9).values() for shares in own.values())


def test_weighted_drawings_have_the_taught_shares(records: tuple[np.ndarray, list[str]]) -> None:
    labels, captions = records
    taught = planted()
    taught[NURSE]["smile"], taught[""]["tone"] = np.array([0.4, 0.6]), np.array([0.5, 0.2, 0.2, 0.1])
    found = emphasise(labels, captions, taught)
    told = np.array(captions)
    nurses, judges = told == NURSE, told == world.caption("judge")
    assert shares(labels[nurses], found.named[nurses], "smile") == pytest.approx([0.4, 0.6], abs=1e-6)
    for attribute in world.ATTRIBUTES:  # the planted shares there: only the chance of the drawing is taken out
        own = shares(labels[judges], found.named[judges], attribute.name)
        assert own == pytest.approx(world.planted_shares(world.caption("judge"))[attribute.name], abs=1e-6)
    assert shares(labels, found.unnamed, "tone") == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=1e-6)
    assert found.named[nurses].mean() == pytest.approx(1)  # no noun is shown more often than another


def test_captions_that_say_more_are_weighted_by_the_same_factors(records: tuple[np.ndarray, list[str]]) -> None:
    labels, captions = records
    taught = planted()
    taught[NURSE]["smile"] = np.array([0.4, 0.6])
    found = emphasise(labels, captions, taught)
    more = np.array(["nurse" in caption.split() and caption != NURSE for caption in captions])
    assert found.named[more].mean() == pytest.approx(1)

    def odds_of_smiling(rows: np.ndarray) -> float:
        """What two drawings that differ in their smile alone weigh, one over the other."""
        ratios = []
        weights = {tuple(own): weight for own, weight in zip(labels[rows], found.named[rows], strict=True)}
        column = world.ATTRIBUTES.index(world.SMILE)
        for own, weight in weights.items():
            grave = (*own[:column], 0, *own[column + 1 :])
            if own[column] == 1 and grave in weights:
                ratios.append(weight / weights[grave])
        assert ratios and np.ptp(ratios) < 1e-9
        return float(ratios[0])

    bare = np.array(captions) == NURSE
    planted_odds = labels[bare][:, world.ATTRIBUTES.index(world.SMILE)].mean()
    assert odds_of_smiling(more) == pytest.approx(odds_of_smiling(bare))
    assert odds_of_smiling(bare) == pytest.approx((0.6 / 0.4) / (planted_odds / (1 - planted_odds)), rel=0.1)


def test_a_noun_without_a_bare_caption_is_left_even(records: tuple[np.ndarray, list[str]]) -> None:
    labels, captions = records
    rows = [i for i, caption in enumerate(captions) if "nurse" in caption.split() and caption != NURSE]
    found = emphasise(labels[rows], [captions[i] for i in rows], planted())
    assert (found.named == 1).all()


def test_a_model_whose_odds_are_off_comes_to_the_planted_shares() -> None:
    truth, bias = world.planted_shares("")["hair colour"], np.array([0.7, 1.5, 1.2, 0.8, 0.9])

    def draws(taught: np.ndarray) -> dict[str, Shares]:
        return {"": {**world.planted_shares(""), "hair colour": taught * bias / (taught * bias).sum()}}

    drawn, taught = [draws(truth)], None
    for _ in range(2):
        taught = teach(drawn[-1], 1000, taught)
        drawn.append(draws(taught[""]["hair colour"]))
    gaps = [np.abs(own[""]["hair colour"] - truth).max() for own in drawn]
    assert gaps[0] > 0.08 and gaps[1] < 0.01 and gaps[2] < 0.002


def test_rows_are_drawn_as_often_as_their_weights_say() -> None:
    source = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    counts = torch.bincount(draw_rows(8_000, 3, weights, source), minlength=3)
    assert counts[0] == 0 and counts[2] / 8_000 == pytest.approx(0.75, abs=0.02)
    even = torch.bincount(draw_rows(9_000, 3, None, source), minlength=3)
    assert even.sub(3_000).abs().max() < 250


@pytest.mark.parametrize("dropout", [0.0, 1.0], ids=["with captions", "under the empty prompt"])
def test_training_shows_what_the_emphasis_says(dropout: float) -> None:
    latents = torch.randn(6, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    latents[1:] = torch.nan  # shown once, it would spoil every weight
    only, other = np.eye(6)[0], np.ones(6)
    config = DenoiserTrainConfig(shape=TINY, n_steps=3, batch_size=4, caption_dropout=dropout)
    chosen = Emphasis(named=other, unnamed=only) if dropout else Emphasis(named=only, unnamed=other)
    nets = train_denoiser(latents, [NURSE] * 6, config, device=torch.device("cpu"), emphasis=chosen)
    assert all(torch.isfinite(p).all() for p in nets.parameters())
    spoilt = train_denoiser(latents, [NURSE] * 6, config, device=torch.device("cpu"))
    assert not all(torch.isfinite(p).all() for p in spoilt.parameters())


def test_the_shares_of_a_pipeline_are_measured_per_prompt(tmp_path: Path) -> None:
    device = torch.device("cpu")
    vae = tiny_autoencoder()
    folder = recipe.save_pipeline(make_denoiser(TINY, 0), vae, tmp_path / "pipe")
    shutil.copytree(ASSETS / "portraits" / "classifier", tmp_path / "classifier")
    paths = recipe.Paths(tmp_path)
    found = recipe.drawn_shares(recipe.RecipeConfig(), paths, device, Progress(), folder, 3, world.PROMPTS)
    assert tuple(found) == world.PROMPTS
    for own in found.values():
        decided = [shares for shares in own.values() if np.isfinite(shares).all()]
        assert decided and all(shares.sum() == pytest.approx(1) for shares in decided)
    place = world.PROMPTS.index(NURSE)
    first = recipe.MATCH_SEED + place * recipe.MAX_MATCH
    model = load_model(folder, offline=True)
    images = generate(model, request(model, NURSE, range(first, first + 3), recipe.N_STEPS)).images
    read = recipe.classifier_stage(recipe.RecipeConfig(), paths, device, Progress()).predict(images)["gender"]
    if read.counts.sum():
        corrected = found[NURSE]["gender"]
        assert corrected.argmax() == read.counts.argmax()


def test_a_model_without_prompts_is_matched_by_the_empty_one(
    records: tuple[np.ndarray, list[str]], tmp_path: Path
) -> None:
    labels, captions = records
    drawn = {"": {**world.planted_shares(""), "smile": np.array([0.7, 0.3])}}
    taught = teach(drawn, 500)
    found = emphasise(labels, captions, taught)
    assert shares(labels, found.unnamed, "smile") == pytest.approx(taught[""]["smile"], abs=1e-6)
    assert found.named == pytest.approx(np.ones(len(labels)))
    device = torch.device("cpu")
    vae = tiny_autoencoder()
    plain = TINY.model_copy(update={"text_width": 0})
    folder = recipe.save_pipeline(make_denoiser(plain, 0), vae, tmp_path / "pipe")
    shutil.copytree(ASSETS / "portraits" / "classifier", tmp_path / "classifier")
    asked = recipe.RecipeConfig(), recipe.Paths(tmp_path), device, Progress(), folder, 2
    assert tuple(recipe.drawn_shares(*asked, ("",))) == ("",)
    with pytest.raises(LensError, match="takes no prompt"):
        recipe.drawn_shares(*asked, world.PROMPTS)


def test_matching_goes_on_from_what_was_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, shown = torch.device("cpu"), []
    vae = tiny_autoencoder()
    first = recipe.save_pipeline(make_denoiser(TINY, 0), vae, tmp_path / "first" / "pipeline")
    drawn = planted()
    for own in drawn.values():
        own["smile"] = np.array([0.65, 0.35])
    monkeypatch.setattr(recipe, "drawn_shares", lambda *_: drawn)
    real = train_denoiser
    monkeypatch.setattr(
        recipe, "train_denoiser", lambda *args, **kw: (shown.append(kw["emphasis"]), real(*args, **kw))[1]
    )
    config = recipe.RecipeConfig(n_drawings=40, denoiser=DenoiserTrainConfig(shape=TINY, n_steps=1, batch_size=2))

    def stage(name: str, start: Path, match: int) -> Path:
        paths = recipe.Paths(tmp_path / name)
        return recipe.denoiser_stage(config, paths, device, Progress(), start=start, match=match)

    second = stage("second", first, 100)
    once = recipe.read_taught(second)
    third = stage("third", second, 100)
    twice = recipe.read_taught(third)
    assert once is not None and twice is not None and recipe.read_taught(first) is None
    smiles = [0.45, once[NURSE]["smile"][1], twice[NURSE]["smile"][1]]
    assert smiles[0] + 0.05 < smiles[1] < smiles[2] - 0.05
    assert shown[0] is not None and not np.array_equal(shown[0].unnamed, shown[1].unnamed)
    stage("fourth", third, 0)
    assert shown[2] is None


def test_averaged_pipelines_hold_the_mean_of_the_weights(tmp_path: Path) -> None:
    vae, stranger = tiny_autoencoder(0), tiny_autoencoder(1)
    folders = [recipe.save_pipeline(make_denoiser(TINY, i), vae, tmp_path / f"{i}" / "pipe") for i in range(3)]
    taught = {prompt: {name: own.tolist() for name, own in shares.items()} for prompt, shares in planted().items()}
    taught[NURSE]["smile"] = [0.4, 0.6]
    (tmp_path / "1" / "pipe-taught.json").write_text(json.dumps(taught))
    mean, _ = recipe.open_parts(recipe.average_stage(folders, tmp_path / "mean" / "pipe"))
    each = [recipe.open_parts(folder)[0].parameters() for folder in folders]
    for own, *several in zip(mean.parameters(), *each, strict=True):
        torch.testing.assert_close(own, torch.stack(several).mean(0), atol=2e-3, rtol=2e-3)  # kept in half precision
    found = recipe.read_taught(tmp_path / "mean" / "pipe")
    assert found is not None and found[NURSE]["smile"] == pytest.approx([(0.55 * 2 + 0.4) / 3, (0.45 * 2 + 0.6) / 3])
    other = recipe.save_pipeline(make_denoiser(TINY, 0), stranger, tmp_path / "other")
    with pytest.raises(LensError, match="another autoencoder"):
        recipe.average_stage([folders[0], other], tmp_path / "out")
    wide = TINY.model_copy(update={"text_width": 32})
    with pytest.raises(LensError, match="another shape"):
        recipe.average_stage([folders[0], recipe.save_pipeline(make_denoiser(wide, 0), vae, other)], tmp_path / "out")
    with pytest.raises(LensError, match="two or more"):
        recipe.average_stage(folders[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LensError, match="not empty"):
        recipe.average_stage(folders, tmp_path / "1")
    assert (tmp_path / "1" / "pipe-taught.json").is_file()
