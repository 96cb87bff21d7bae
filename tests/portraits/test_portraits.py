"""The planted world, its drawing, and the recipe that trains a stock pipeline on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, StableDiffusionPipeline

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.portraits import world
from diffusion_lens.portraits.autoencoder import AutoencoderTrainConfig, encode_all, to_unit, train_autoencoder
from diffusion_lens.portraits.data import draw_many
from diffusion_lens.portraits.denoiser import (
    DenoiserTrainConfig,
    bottleneck_loss,
    denoising_loss,
    draw_timesteps,
    load_average,
    make_denoiser,
    tokenize,
    train_denoiser,
    without_text,
)
from diffusion_lens.portraits.draw import SKIN, VARIATION, WIDE, draw, sheet
from diffusion_lens.portraits.networks import SHIFT, DenoiserConfig, make_scheduler, make_tokenizer, make_unet
from diffusion_lens.portraits.recipe import open_parts, save_pipeline

TINY = DenoiserConfig(channels=(16, 16, 32), heads=2, text_width=16)
TINY_PLAIN = TINY.model_copy(update={"text_width": 0})


@pytest.fixture(scope="module")
def records() -> list[world.Record]:
    return [world.sample_record(seed) for seed in range(12_000)]


def test_every_share_table_sums_to_one() -> None:
    for profile in world.PROFILES.values():
        assert sum(profile.age) == pytest.approx(1)
        assert sum(profile.tone) == pytest.approx(1)
    for prompt in world.PROMPTS:
        for shares in world.planted_shares(prompt).values():
            assert shares.sum() == pytest.approx(1)


def test_planted_shares_of_the_empty_prompt_match_what_is_sampled(records: list[world.Record]) -> None:
    planted = world.planted_shares("")
    for attribute in world.ATTRIBUTES:
        counts = np.bincount([r[attribute] for r in records], minlength=len(attribute.classes))
        share = planted[attribute.name]
        error = np.sqrt(share * (1 - share) / len(records))
        assert np.all(np.abs(counts / len(records) - share) <= 4.5 * error + 1e-9), attribute.name


@pytest.mark.parametrize("noun", ["person", "firefighter", "judge"])
def test_planted_shares_of_a_caption_match_the_records_that_carry_it(noun: str) -> None:
    records = [world.sample_record(seed, noun=noun) for seed in range(6_000)]
    prompt = world.caption(noun)
    said_nothing = [r for r in records if world.sample_caption(r) == prompt]
    planted = world.planted_shares(prompt)
    for attribute in world.ATTRIBUTES:
        counts = np.bincount([r[attribute] for r in said_nothing], minlength=len(attribute.classes))
        share = planted[attribute.name]
        error = np.sqrt(share * (1 - share) / len(said_nothing))
        assert np.all(np.abs(counts / len(said_nothing) - share) <= 4.5 * error + 1e-9), attribute.name


def test_a_person_is_male_as_often_as_the_paper_measured_for_p2() -> None:
    assert world.planted_shares("a portrait of a person")["gender"][world.GENDER.index("male")] == pytest.approx(0.34)
    assert world.planted_shares("a portrait of a firefighter")["gender"][1] == pytest.approx(0.89)


def test_explicit_prompts_obey_their_words() -> None:
    shares = world.planted_shares("a portrait of an old female doctor with dark skin and glasses")
    assert shares["gender"].tolist() == [1, 0]
    assert shares["age"].tolist() == [0, 0, 1]
    assert shares["tone"].tolist() == [0, 0, 0, 1]
    assert shares["glasses"].tolist() == [0, 1]
    assert shares["beard"].tolist() == [1, 0]


def test_captions_never_lie(records: list[world.Record]) -> None:
    for record in records[:2_000]:
        noun, said = world.parse_prompt(world.sample_caption(record))
        assert noun == record.noun
        for attribute in world.STEERABLE:
            assert said[attribute.name] in ("", record.label(attribute))
        if said["glasses"]:
            assert record.label(world.GLASSES) == "glasses"


@pytest.mark.parametrize("prompt", ["a portrait of an astronaut", "a doctor", "portrait a of nurse", "a an nurse"])
def test_prompts_off_the_grammar_are_refused_with_an_example(prompt: str) -> None:
    with pytest.raises(LensError, match="write for example"):
        world.planted_shares(prompt)


def test_the_same_record_gives_the_same_picture_and_another_seed_another() -> None:
    record = world.sample_record(7)
    assert np.array_equal(draw(record), draw(record))
    assert draw(record).shape == (64, 64, 3)
    assert not np.array_equal(draw(record), draw(world.Record(record.noun, record.classes, 8)))


@pytest.mark.parametrize("attribute", world.ATTRIBUTES, ids=lambda a: a.name)
def test_every_attribute_is_visible(attribute: world.Attribute) -> None:
    record = next(
        r for r in (world.sample_record(s, balanced=True) for s in range(200)) if r.label(world.GENDER) == "male"
    )
    at = world.ATTRIBUTES.index(attribute)
    pictures = []
    for label in range(len(attribute.classes)):
        classes = (*record.classes[:at], label, *record.classes[at + 1 :])
        pictures.append(draw(world.Record(record.noun, classes, record.seed)).astype(int))
    for other in pictures[1:]:
        assert (np.abs(other - pictures[0]).max(axis=2) > 24).sum() >= 6


def test_skin_tones_are_drawn_from_light_to_dark() -> None:
    brightness = [sum(SKIN[tone]) for tone in world.TONE.classes]
    assert brightness == sorted(brightness, reverse=True)


def test_colours_vary_within_a_class_as_far_as_said() -> None:
    bare = {world.TONE: "light", world.AGE: "adult", world.GLASSES: "no glasses", world.BEARD: "no beard"}
    light = [r for r in map(world.sample_record, range(200)) if all(r.label(a) == c for a, c in bare.items())]
    for variation in (VARIATION, WIDE):  # the commonest red of the face's middle is plain skin's
        skins = [np.bincount(draw(r, variation)[30:42, 22:42, 0].ravel()).argmax() for r in light]
        furthest = np.abs(np.array(skins) / max(SKIN["light"]) - 1).max()
        assert 0.6 * variation.skin[1] < furthest < variation.skin[1] + 0.005


def test_drawing_in_bulk_does_not_depend_on_the_workers() -> None:
    alone = draw_many(1_100, first_seed=40, workers=1)
    shared = draw_many(1_100, first_seed=40, workers=2)
    assert np.array_equal(alone.images, shared.images)
    assert alone.captions == shared.captions
    assert np.array_equal(alone.images[5], draw(world.sample_record(45)))
    assert alone.labels[5].tolist() == list(world.sample_record(45).classes)


def test_balanced_drawings_are_balanced_and_beards_are_male() -> None:
    labels = np.array([world.sample_record(seed, balanced=True).classes for seed in range(6_000)])
    for attribute in (world.GENDER, world.AGE, world.TONE, world.CLOTHING):
        share = np.bincount(labels[:, world.ATTRIBUTES.index(attribute)]) / len(labels)
        assert np.allclose(share, 1 / len(attribute.classes), atol=0.03)
    bearded = labels[:, world.ATTRIBUTES.index(world.BEARD)] == 1
    assert np.all(labels[bearded, 0] == world.GENDER.index("male"))


def test_sheet_has_room_for_every_picture() -> None:
    page = sheet(np.zeros((5, 64, 64, 3), dtype=np.uint8), 3)
    assert page.size == (3 * 66 + 2, 2 * 66 + 2)


def test_every_caption_word_is_one_token_and_unknown_words_are_bytes() -> None:
    tokenizer = make_tokenizer()
    for word in world.vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word
    assert len(tokenizer("astronaut").input_ids) > 3
    assert tokenizer("a portrait of a CEO").input_ids == tokenizer("a portrait of a ceo").input_ids


def test_tokenize_pads_as_the_stock_pipeline() -> None:
    tokenizer = make_tokenizer()
    ids = tokenize(tokenizer, ["a portrait of a nurse", "", "a portrait of a nurse"])
    assert ids.shape == (3, 16)
    assert torch.equal(ids[0], ids[2])
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 15


def _latents(n: int = 24) -> torch.Tensor:
    return torch.randn(n, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [TINY, TINY_PLAIN], ids=["text", "unconditional"])
def test_lowest_skips_stay_silent_in_training(shape: DenoiserConfig) -> None:
    config = DenoiserTrainConfig(shape=shape, n_steps=3, batch_size=4)
    nets = train_denoiser(_latents(), ["a portrait of a nurse"] * 24, config, device=torch.device("cpu"))
    unet, plain = nets.unet, make_unet(shape.model_copy(update={"lowest_skip": True}))
    for block, stock in zip(unet.up_blocks[0].resnets, plain.up_blocks[0].resnets, strict=True):
        assert not block.conv1.weight[:, 32:].any() and not block.conv_shortcut.weight[:, 32:].any()
        assert block.conv1.weight[:, :32].any() and stock.conv1.weight[:, 32:].any()


def test_the_schedule_is_the_shifted_straight_path_from_pure_noise() -> None:
    ours = make_scheduler()
    signal, spread = ours.alphas_cumprod.sqrt(), (1 - ours.alphas_cumprod).sqrt()
    for t in (1, 20, 500, 999):  # the straight path mixes 1 - u of the image with u of noise
        u = t / 1000
        assert signal[t - 1] / spread[t - 1] == pytest.approx((1 - u) / u / SHIFT, rel=1e-3)
    assert ours.alphas_cumprod[-1] < 1e-8
    ours.set_timesteps(16)
    assert ours.timesteps[0] == 999
    assert torch.equal(DDIMScheduler.from_config(ours.config).alphas_cumprod, ours.alphas_cumprod)


def test_timesteps_are_uniform_but_for_those_around_the_middle() -> None:
    source = torch.Generator().manual_seed(0)
    even, middle = (draw_timesteps(20_000, 1000, share, 0.2, source) for share in (0.0, 1.0))
    assert even.min() >= 0 and max(even.max(), middle.max()) <= 999
    assert torch.histc(even.float(), 10).sub(2000).abs().max() < 200
    assert middle.float().median() == pytest.approx(1000 / (1 + np.exp(-0.2)), abs=10)
    assert ((middle < 100) | (middle >= 900)).float().mean() < 0.1


def test_the_error_of_areas_counts_beside_that_of_pixels() -> None:
    error = torch.zeros(2, 1, 4, 8)
    error[0, 0, 1, 2] = 4.0  # alone in its area: an average of a quarter
    error[1, 0, :, 4:] = 2.0  # a whole area
    ratio = torch.tensor([0.0, 10.0]).view(2, 1, 1, 1)
    fine = (16 + 16 * 4) / 64
    areas = (0.25**2 / 1 + 2.0**2 / 17) / 4  # four areas, the second image's divided by 1 + (10 / 5)⁴
    assert denoising_loss(error, ratio, 0.0) == pytest.approx(fine)
    assert denoising_loss(error, ratio, 5.0).item() == pytest.approx(fine + 5 * 16 * areas)
    white = torch.randn(200, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    assert denoising_loss(white, torch.zeros(200, 1, 1, 1), 3.0).item() == pytest.approx(4.0, rel=0.02)


def test_the_bottleneck_is_asked_for_the_averages_of_its_blocks() -> None:
    clean = torch.zeros(2, 1, 4, 4)
    clean[0, 0, :2, :2] = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # one block of average 4
    clean[1, 0, 2:, 2:] = 2.0
    told = torch.zeros(2, 1, 2, 2)
    told[1, 0, 1, 1] = 0.5
    ratio = torch.tensor([0.0, 5.0]).view(2, 1, 1, 1)
    expected = 4 * (4.0**2 / 1 + 1.5**2 / 2) / 8  # 4 latent pixels a block, eight blocks, the second's by 1 + (5 / 5)²
    assert bottleneck_loss(told, clean, ratio).item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [TINY, TINY_PLAIN], ids=["text", "unconditional"])
def test_reading_the_bottleneck_trains_it_and_leaves_no_trace(shape: DenoiserConfig) -> None:
    config = DenoiserTrainConfig(shape=shape, n_steps=2, batch_size=4, bottleneck_weight=0.0)
    captions = ["a portrait of a nurse"] * 24
    plain, read = (
        train_denoiser(
            _latents(), captions, config.model_copy(update={"bottleneck_weight": w}), device=torch.device("cpu")
        )
        for w in (0.0, 2.0)
    )
    assert len(plain.parameters()) == len(read.parameters())
    assert not read.unet.mid_block._forward_hooks
    weights = [dict(nets.unet.mid_block.named_parameters()) for nets in (plain, read)]
    assert any(not torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def test_training_learns_and_is_seeded_and_resumes(tmp_path: Path) -> None:
    captions = [world.caption(noun) for noun in list(world.PROFILES) * 2]
    config = DenoiserTrainConfig(shape=TINY, n_steps=6, batch_size=4)
    device = torch.device("cpu")
    once = train_denoiser(_latents(), captions, config, device=device)
    again = train_denoiser(_latents(), captions, config, device=device, checkpoint=tmp_path, checkpoint_every=3)
    assert all(torch.equal(p, q) for p, q in zip(once.parameters(), again.parameters(), strict=True))
    averaged = load_average(tmp_path, TINY)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), averaged.parameters(), strict=True))
    steps: list[int] = []
    longer = config.model_copy(update={"n_steps": 8})
    train_denoiser(
        _latents(), captions, longer, device=device, checkpoint=tmp_path, resume=True,
        progress=Progress(lambda status: steps.append(status.done)),
    )  # fmt: skip
    assert steps == [8]
    with pytest.raises(LensError, match="another shape"):
        load_average(tmp_path, TINY.model_copy(update={"channels": (16, 16, 48)}))
    with pytest.raises(LensError, match="no checkpoint"):
        load_average(tmp_path / "elsewhere", TINY)


def test_autoencoder_learns_to_reconstruct() -> None:
    images = torch.from_numpy(draw_many(48, first_seed=0, workers=1).images)
    losses: list[float] = []
    config = AutoencoderTrainConfig(width=16, n_steps=100, batch_size=16)
    model = train_autoencoder(
        images,
        config,
        device=torch.device("cpu"),
        progress=Progress(lambda status: losses.append(float(status.note.split()[1]))),
    )
    assert losses[-1] < losses[0]
    latents = encode_all(model, images, device=torch.device("cpu"))
    assert latents.shape == (48, 8, 16, 16)
    assert to_unit(images).abs().max() <= 1


@pytest.mark.parametrize("shape", [TINY, TINY_PLAIN], ids=["text", "unconditional"])
def test_saved_pipelines_are_stock_and_single_precision(shape: DenoiserConfig, tmp_path: Path) -> None:
    device = torch.device("cpu")
    vae = train_autoencoder(
        torch.zeros(4, 64, 64, 3, dtype=torch.uint8),
        AutoencoderTrainConfig(width=16, n_steps=1, batch_size=2),
        device=device,
    )
    config = DenoiserTrainConfig(shape=shape, n_steps=1, batch_size=2)
    nets = train_denoiser(_latents(4), ["a portrait of a nurse"] * 4, config, device=device)
    folder = save_pipeline(nets, vae, tmp_path / "pipe")
    kind = StableDiffusionPipeline if shape.text_width else LDMPipeline
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    asked = {"prompt": ["a portrait of a nurse"] * 2} if shape.text_width else {"batch_size": 2}
    assert np.shape(pipe(**asked, num_inference_steps=2, output_type="np").images) == (2, 64, 64, 3)
    assert all(
        p.dtype == torch.float32 for m in pipe.components.values() if hasattr(m, "parameters") for p in m.parameters()
    )
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
    assert all(f.stat().st_size < 10_000_000 for f in folder.rglob("*") if f.is_file())
    assert (folder / "planted.json").exists()


def test_the_unconditional_denoiser_may_start_from_the_text_conditional_one() -> None:
    text = make_denoiser(TINY, 1)
    plain = without_text(text, TINY_PLAIN, 2)
    fresh = make_denoiser(TINY_PLAIN, 2)
    first, last = text.unet.state_dict(), plain.unet.state_dict()
    same = [k for k, v in last.items() if k in first and torch.equal(first[k], v)]
    assert {"conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"} <= {*same}
    own = [k for k in last if k not in first]
    assert own and all(torch.equal(last[k], fresh.unet.state_dict()[k]) for k in own)
    assert plain.text_encoder is None and plain.unet(torch.zeros(1, 8, 16, 16), 3).sample.shape == (1, 8, 16, 16)
    with pytest.raises(LensError, match="another shape"):
        without_text(text, TINY_PLAIN.model_copy(update={"channels": (16, 16, 48)}), 0)


def test_a_saved_pipeline_can_be_trained_further(tmp_path: Path) -> None:
    device = torch.device("cpu")
    vae = train_autoencoder(
        torch.zeros(4, 64, 64, 3, dtype=torch.uint8),
        AutoencoderTrainConfig(width=16, n_steps=1, batch_size=2),
        device=device,
    )
    config = DenoiserTrainConfig(shape=TINY, n_steps=1, batch_size=2)
    nets = train_denoiser(_latents(4), ["a portrait of a nurse"] * 4, config, device=device)
    opened, kept = open_parts(save_pipeline(nets, vae, tmp_path / "pipe"))
    for part, again in zip(nets.parameters(), opened.parameters(), strict=True):
        assert torch.equal(part, again)
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), kept.parameters(), strict=True))
    again_saved = save_pipeline(opened, kept, tmp_path / "again")
    assert not any("_name_or_path" in path.read_text() for path in again_saved.rglob("config.json"))
    before = [p.detach().clone() for p in opened.parameters()]
    further = train_denoiser(_latents(4), ["a portrait of a nurse"] * 4, config, device=device, start=opened)
    assert any(not torch.equal(p, q) for p, q in zip(before, further.parameters(), strict=True))
    with pytest.raises(LensError, match="holds no pipeline"):
        open_parts(tmp_path)
