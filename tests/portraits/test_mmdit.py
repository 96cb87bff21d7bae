"""The transformer of the Portraits world: what it is trained on is what the stock pipeline draws with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.judging.classify import HeadsClassifier
from diffusion_lens.portraits import recipe, world
from diffusion_lens.portraits.autoencoder import AutoencoderTrainConfig
from diffusion_lens.portraits.data import describe, draw_many
from diffusion_lens.portraits.denoiser import DenoiserTrainConfig, make_denoiser, tokenize
from diffusion_lens.portraits.mmdit import (
    FLOW_SHIFT,
    MOST_ZEROS,
    Batches,
    TransformerConfig,
    TransformerParts,
    TransformerTrainConfig,
    draw_zeros,
    encode_text,
    flow_loss,
    load_average_parts,
    make_flow_scheduler,
    make_parts,
    predict_velocity,
    sample_transformer,
    train_transformer,
)
from diffusion_lens.portraits.networks import DenoiserConfig, make_autoencoder

CPU = torch.device("cpu")
TINY = TransformerConfig(layers=2, heads=2, head_width=16, text_width=16)
TRAIN = TransformerTrainConfig(shape=TINY, n_steps=8, batch_size=4)
BUNDLED = Path(__file__).resolve().parents[2] / "assets" / "portraits-mmdit" / "pipeline"
FIREFIGHTER = "a portrait of a firefighter"
PROMPTS = ["a portrait of a nurse", "", "a portrait of an old female doctor with dark skin and glasses"]


@pytest.fixture(scope="module")
def parts() -> TransformerParts:
    """Tiny networks of random weights, gates included, so that every part tells."""
    found = make_parts(TINY, 0)
    for module in found.modules:
        module.eval()
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return found


@pytest.fixture(scope="module")
def pipe(parts: TransformerParts) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return recipe.make_pipeline(parts, make_autoencoder(16).eval())


def latents(n: int = 24) -> torch.Tensor:
    return torch.randn(n, 8, 16, 16, generator=torch.Generator().manual_seed(0)).half()


def captions(n: int = 24) -> list[str]:
    return [world.caption(noun) for noun in list(world.PROFILES) * 2][:n]


def same(one: TransformerParts, other: TransformerParts) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@torch.no_grad()
def test_texts_are_encoded_exactly_as_the_stock_pipeline_does(
    parts: TransformerParts, pipe: StableDiffusion3Pipeline
) -> None:
    text, pooled = encode_text(parts.encoders, tokenize(parts.tokenizer, PROMPTS))
    for n in (0, 1, MOST_ZEROS):
        stock, _, stock_pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, max_sequence_length=n, do_classifier_free_guidance=False
        )
        assert torch.equal(stock[:, :16], text)
        assert stock.shape[1] == 16 + n and not stock[:, 16:].any()
        assert torch.equal(stock_pooled, pooled)


@torch.no_grad()
def test_one_counted_token_of_zeros_stands_for_as_many_of_the_stock_pipeline(parts: TransformerParts) -> None:
    text, pooled = encode_text(parts.encoders, tokenize(parts.tokenizer, PROMPTS))
    noisy, at = latents(3).float(), torch.tensor([1000.0, 700.0, 3.0])
    counts = torch.tensor([0, 7, MOST_ZEROS])
    counted = predict_velocity(parts.transformer, noisy, at, text, pooled, counts)
    for i, n in enumerate(counts.tolist()):
        zeros = torch.zeros(1, n, text.shape[2])
        stock = parts.transformer(
            hidden_states=noisy[i : i + 1],
            timestep=at[i : i + 1],
            encoder_hidden_states=torch.cat([text[i : i + 1], zeros], dim=1),
            pooled_projections=pooled[i : i + 1],
        ).sample
        torch.testing.assert_close(counted[i : i + 1], stock, atol=2e-5, rtol=1e-4)
    uncounted = predict_velocity(parts.transformer, noisy, at, text, pooled, torch.zeros(3, dtype=torch.long))
    assert (uncounted[2] - counted[2]).abs().max() > 1e-3  # what is counted tells


def test_numbers_of_zeros_are_those_a_stock_call_may_ask_for() -> None:
    counts = draw_zeros(20_000, 0.4, torch.Generator().manual_seed(0))
    assert counts.min() == 0 and counts.max() == MOST_ZEROS
    assert (counts == 0).float().mean() == pytest.approx(0.4, abs=0.02)
    assert (counts == MOST_ZEROS).float().mean() == pytest.approx(0.3, abs=0.02)
    between = counts[(counts > 0) & (counts < MOST_ZEROS)].float()
    assert between.median() == pytest.approx(16, abs=2)  # evenly by logarithm


def test_the_path_is_the_schedulers_and_the_loss_the_velocitys(parts: TransformerParts) -> None:
    scheduler = make_flow_scheduler()
    u = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(scheduler.sigmas[:1000], FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u))
    batch = Batches(latents(), captions(), parts.tokenizer, TRAIN, None).draw(0)
    text, pooled = encode_text(parts.encoders, batch.ids)
    expected = []
    for i, at in enumerate(batch.at.tolist()):  # one by one, the scheduler's own mixing of noise and latents
        one = slice(i, i + 1)
        timestep = scheduler.timesteps[999 - at][None]
        noisy = scheduler.scale_noise(batch.clean[one], timestep, batch.noise[one])
        velocity = predict_velocity(parts.transformer, noisy, timestep, text[one], pooled[one], batch.zeros[one])
        expected.append((velocity - (batch.noise[one] - batch.clean[one])).square().mean())
    loss = flow_loss(parts, batch, 0.0, CPU)
    assert loss.item() == pytest.approx(
        torch.stack(expected).mean().item(), rel=0.02
    )  # half precision where it is fast


def test_a_step_draws_the_same_whatever_came_before() -> None:
    tokenizer = make_parts(TINY, 0).tokenizer
    one, other = (Batches(latents(), captions(), tokenizer, TRAIN, None) for _ in range(2))
    one.draw(3)
    assert torch.equal(one.draw(5).noise, other.draw(5).noise)
    assert not torch.equal(one.draw(5).noise, one.draw(6).noise)


def test_training_lowers_the_loss() -> None:
    config = TRAIN.model_copy(update={"n_steps": 60, "batch_size": 16, "lr": 3e-3, "ema_decay": 0.9})
    fresh, alike = make_parts(TINY, 0), 2 + 0.1 * latents()
    trained = train_transformer(alike, captions(), config, device=CPU)
    batch = Batches(alike, captions(), fresh.tokenizer, config, None).draw(1_000)
    before, after = (flow_loss(p, batch, config.coarse_weight, CPU).item() for p in (fresh, trained))
    assert after < 0.9 * before


def test_a_stopped_training_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = train_transformer(latents(), captions(), TRAIN, device=CPU)
    train_transformer(latents(), captions(), TRAIN, device=CPU, checkpoint=tmp_path, stop_after=5)
    resumed = train_transformer(latents(), captions(), TRAIN, device=CPU, checkpoint=tmp_path, resume=True)
    assert same(whole, resumed)
    assert same(resumed, load_average_parts(tmp_path, TINY))
    with pytest.raises(LensError, match="another shape"):
        load_average_parts(tmp_path, TINY.model_copy(update={"layers": 3}))
    with pytest.raises(LensError, match="no checkpoint"):
        train_transformer(latents(), captions(), TRAIN, device=CPU, checkpoint=tmp_path / "none", resume=True)


def test_a_saved_folder_is_stock_and_draws(parts: TransformerParts, tmp_path: Path) -> None:
    folder = recipe.save_pipeline(parts, make_autoencoder(16).eval(), tmp_path / "pipe")
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(["a portrait of a nurse"] * 2, num_inference_steps=2, output_type="np").images
    assert stock.shape == (2, 64, 64, 3)
    seeds = range(3, 6)
    drawn = np.concatenate(list(sample_transformer(pipe, PROMPTS[0], seeds, n_steps=2, batch_size=2)))
    alone = np.concatenate(list(sample_transformer(pipe, PROMPTS[0], range(5, 6), n_steps=2)))
    assert drawn.shape == (3, 64, 64, 3) and np.abs(drawn[2].astype(int) - alone[0]).max() <= 1
    assert all(
        p.dtype == torch.float32 for m in pipe.components.values() if hasattr(m, "parameters") for p in m.parameters()
    )
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
    assert not any("_name_or_path" in path.read_text() for path in folder.rglob("config.json"))
    assert (folder / "planted.json").exists()
    opened, _ = recipe.open_parts(folder)
    assert isinstance(opened, TransformerParts) and same(parts, opened)


def test_the_full_size_fits_the_files_of_a_hub(tmp_path: Path) -> None:
    folder = recipe.save_pipeline(make_parts(TransformerConfig(), 0), make_autoencoder(48), tmp_path / "pipe")
    sizes = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    assert max(sizes) < 10_000_000 and sum(sizes) < 20_000_000


def test_portraits_are_described_as_they_are_drawn() -> None:
    drawn = draw_many(30, first_seed=7, workers=1)
    labels, told = describe(30, first_seed=7)
    assert np.array_equal(labels, drawn.labels) and told == drawn.captions


@pytest.fixture
def small() -> recipe.RecipeConfig:
    return recipe.RecipeConfig(
        n_drawings=40,
        autoencoder=AutoencoderTrainConfig(width=16, n_steps=1, batch_size=2),
        denoiser=DenoiserTrainConfig(shape=DenoiserConfig(channels=(16, 16, 32), heads=2, text_width=16), n_steps=1),
        mmdit=TRAIN.model_copy(update={"n_steps": 2}),
    )


def test_latents_are_made_once_for_an_autoencoder(
    small: recipe.RecipeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = recipe.Paths(tmp_path)
    torch.manual_seed(0)
    one, other = (make_autoencoder(16).eval() for _ in range(2))
    monkeypatch.setattr(recipe, "DRAWN_AT_ONCE", 15)
    first = recipe.latents_stage(small, paths, one, CPU, Progress())
    assert first.shape == (40, 8, 16, 16) and first.dtype == torch.float16
    assert not torch.equal(first, recipe.latents_stage(small, paths, other, CPU, Progress()))
    monkeypatch.setattr(recipe, "draw_many", None)  # what lies there is read
    assert recipe.latents_stage(small, paths, other, CPU, Progress()).shape == first.shape


def test_the_stage_keeps_the_autoencoder_and_trains_a_transformer_further(
    small: recipe.RecipeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = recipe.Paths(tmp_path / "work")
    torch.manual_seed(0)
    vae = make_autoencoder(16).eval()
    unet = recipe.save_pipeline(make_denoiser(small.denoiser.shape, 0), vae, tmp_path / "unet")
    first = recipe.transformer_stage(small, paths, CPU, Progress(), start=unet)
    made, kept = recipe.open_parts(first)
    assert isinstance(made, TransformerParts)
    assert all(torch.equal(p.half(), q.half()) for p, q in zip(vae.parameters(), kept.parameters(), strict=True))

    def drawn(*_: object) -> dict[str, dict[str, np.ndarray]]:
        shares = {prompt: dict(world.planted_shares(prompt)) for prompt in world.PROMPTS}
        shares[""]["gender"] = np.array([0.4, 0.6])
        return shares

    monkeypatch.setattr(recipe, "drawn_shares", drawn)
    before = first.rename(tmp_path / "before")
    further, _ = recipe.open_parts(recipe.transformer_stage(small, paths, CPU, Progress(), start=before, match=500))
    assert not all(torch.equal(p, q) for p, q in zip(made.parameters(), further.parameters(), strict=True))
    taught = recipe.read_taught(paths.pipeline("mmdit"))
    assert taught is not None and taught[""]["gender"][0] > world.planted_shares("")["gender"][0]
    exported = recipe.export_stage(small, paths_with(paths, kept), "mmdit")
    again, _ = recipe.open_parts(exported)
    assert all(torch.equal(p, q) for p, q in zip(further.parameters(), again.parameters(), strict=True))
    with pytest.raises(LensError, match="no transformer to match"):
        recipe.transformer_stage(small, paths, CPU, Progress(), start=unet, match=500)
    with pytest.raises(LensError, match="--stage mmdit"):
        recipe.denoiser_stage(small, paths, CPU, Progress(), start=before)


def paths_with(paths: recipe.Paths, vae: AutoencoderTiny) -> recipe.Paths:
    vae.save_pretrained(paths.autoencoder)
    return paths


def test_shares_of_a_transformer_are_measured_on_the_stock_pipelines_samples(
    small: recipe.RecipeConfig, parts: TransformerParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = HeadsClassifier.load(BUNDLED.parents[1] / "portraits" / "classifier")
    monkeypatch.setattr(recipe, "classifier_stage", lambda *_: judge)
    folder = recipe.save_pipeline(parts, make_autoencoder(16).eval(), tmp_path / "pipe")
    found = recipe.drawn_shares(small, recipe.Paths(tmp_path), CPU, Progress(), folder, 4, PROMPTS[:2])
    assert set(found) == set(PROMPTS[:2])
    assert set(found[""]) == {a.name for a in world.ATTRIBUTES}


def test_the_bundled_pipeline_is_the_recipes_around_the_bundled_autoencoder() -> None:
    assert json.loads((BUNDLED / "planted.json").read_text()) == world.table()
    parts, vae = recipe.open_parts(BUNDLED)
    assert isinstance(parts, TransformerParts)
    fresh = make_parts(TransformerConfig(), 0)
    assert [p.shape for p in parts.parameters()] == [p.shape for p in fresh.parameters()]
    _, other = recipe.open_parts(BUNDLED.parents[1] / "portraits" / "pipeline")
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), other.parameters(), strict=True))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(BUNDLED, subfolder="scheduler")
    assert scheduler.config.shift == FLOW_SHIFT and not scheduler.config.use_dynamic_shifting


def test_the_bundled_pipeline_draws_what_its_prompt_says_with_any_number_of_zeros() -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(BUNDLED, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    judge = HeadsClassifier.load(BUNDLED.parents[1] / "portraits" / "classifier")
    asked = {"num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "np"}
    drawn = []
    for n in (0, MOST_ZEROS):  # the second is what the stock call adds by itself
        seeded = [torch.Generator().manual_seed(i) for i in range(8)]
        images = pipe([FIREFIGHTER] * 8, generator=seeded, max_sequence_length=n, **asked).images
        drawn.append((images * 255).round().astype(np.uint8))
    for images in drawn:
        worn = judge.predict(images)["clothing"].probs.argmax(axis=1)
        assert (worn == world.CLOTHING.index("turnout coat")).sum() >= 6
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() < 12
