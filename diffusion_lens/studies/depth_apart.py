"""Depth at equal size, and size at equal depth (after Hakemi et al., Deeper Diffusion Models Amplify Bias, 2505.17560).

The source's unconditional setting is planted in drawings: a minority of less than 1 % (blond men) and one of 42 %
(men). Networks of several depths have equal parameter counts, their width falls as depth rises; networks of several
sizes have equal depth. Each is trained several times, so that intervals are over trainings; the same noise is drawn
from all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DModel
from pydantic import Field, TypeAdapter
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import read_json, save_tensors, write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.portraits import world
from diffusion_lens.portraits.autoencoder import decode_images, encode_all
from diffusion_lens.portraits.draw import draw
from diffusion_lens.portraits.networks import LATENT_CHANNELS, LATENT_SIZE, make_scheduler
from diffusion_lens.results.depth_apart import MINORITIES, ApartResult, SeedFlips, Training

FOLD = 2
"""Latent pixels a side that become channels: a quarter of the positions, so that a training takes a minute."""
GROUPS = 8
MALE, BLOND_MALE = MINORITIES


class NetworkShape(StrictConfig):
    """A U-Net of two levels: ``layers`` ResNet blocks per level and way, ``channels`` wide."""

    layers: int = Field(ge=1, le=16)
    channels: tuple[int, int]


class ApartConfig(StrictConfig):
    """What is trained and drawn.

    Attributes:
        depths: name → network, shallowest first, of equal parameter counts. sizes: smallest first, of equal depth.
        male, blond_male, blond_female: planted shares of all drawings (CelebA's: 41.68, 0.85 and 14 %).
        n_trainings: of every network, with seeds 0, 1, …; n: images of each, on the same noise.
    """

    depths: dict[str, NetworkShape] = Field(
        default_factory=lambda: {
            "1 block a level": NetworkShape(layers=1, channels=(56, 64)),
            "2 blocks a level": NetworkShape(layers=2, channels=(32, 64)),
            "4 blocks a level": NetworkShape(layers=4, channels=(40, 40)),
        }
    )
    sizes: dict[str, NetworkShape] = Field(
        default_factory=lambda: {
            "small": NetworkShape(layers=2, channels=(32, 40)),
            "medium": NetworkShape(layers=2, channels=(32, 64)),
            "large": NetworkShape(layers=2, channels=(48, 88)),
        }
    )
    male: float = Field(0.4168, gt=0, lt=1)
    blond_male: float = Field(0.0085, gt=0, lt=1)
    blond_female: float = Field(0.14, gt=0, lt=1)
    n_drawings: int = Field(default=8_000, ge=200)
    n_trainings: int = Field(default=3, ge=1, le=50)
    n_steps: int = Field(default=700, ge=1)
    train_batch: int = Field(default=64, ge=1)
    lr: float = Field(default=1.5e-3, gt=0)
    n: int = Field(default=400, ge=10, le=20_000)
    sampling_steps: int = Field(default=20, ge=1)
    first_seed: int = 13_000_000


def make_network(shape: NetworkShape) -> UNet2DModel:
    """The unconditional U-Net on folded latents, stock diffusers, attention at its coarser level and in the middle."""
    channels = LATENT_CHANNELS * FOLD**2
    return UNet2DModel(
        sample_size=LATENT_SIZE // FOLD,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=shape.channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=shape.layers,
        norm_num_groups=GROUPS,
        attention_head_dim=GROUPS,
    )


def parameters(shape: NetworkShape) -> int:
    """Weights of a network."""
    with torch.device("meta"):
        return sum(p.numel() for p in make_network(shape).parameters())


def planted_records(config: ApartConfig) -> Iterator[world.Record]:
    """Portraits with the planted joint shares of gender and blond hair; everything else as it comes, balanced."""
    cells = {
        ("male", True): config.blond_male,
        ("male", False): config.male - config.blond_male,
        ("female", True): config.blond_female,
        ("female", False): 1 - config.male - config.blond_female,
    }
    if min(cells.values()) <= 0:
        raise LensError("The planted shares of men, blond men and blond women leave nobody else; make them smaller.")
    left = {cell: round(config.n_drawings * share) for cell, share in cells.items()}
    left["female", False] += config.n_drawings - sum(left.values())  # what rounding leaves goes to the commonest
    seed = 0
    while any(left.values()):
        record = world.sample_record(seed, balanced=True)
        cell = (record.label(world.GENDER), record.label(world.HAIR_COLOUR) == "blond hair")
        seed += 1
        if left[cell]:
            left[cell] -= 1
            yield record


def fold(latents: Tensor) -> Tensor:
    """``[n, c, y, x]`` → ``[n, 4 c, y / 2, x / 2]``, without loss."""
    return F.pixel_unshuffle(latents, FOLD)


def run_apart(
    config: ApartConfig,
    vae: AutoencoderTiny,
    classifier: Classifier,
    work: Path,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> ApartResult:
    """Train every network ``n_trainings`` times, draw, read; finished trainings in ``work`` are read back.

    Raises ``LensError`` where ``work`` holds another experiment.
    """
    pieces = Workspace(work)
    identity = [config.model_dump(mode="json", exclude={"n_trainings"}), classifier.classifier_id]
    pieces.claim("config", identity, f"{work} holds another experiment; choose a new folder, or the same settings.")
    shapes = {**config.depths, **{n: s for n, s in config.sizes.items() if s not in config.depths.values()}}
    of = {s: n for n, s in ((n, s) for n, s in reversed(list(shapes.items())))}
    families = {"depth": tuple(config.depths), "size": tuple(of[s] for s in config.sizes.values())}
    drawing, training = (progress or Progress()).parts((1, 12))
    make = partial(_latents, config, vae, device, drawing)
    latents = torch.from_numpy(pieces.tensors("latents", make)["latents"]).to(device)
    plan = [(name, seed) for seed in range(config.n_trainings) for name in shapes]
    readings: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for (name, seed), bar in zip(plan, training.parts(len(plan), [f"{n}, training {s}" for n, s in plan]), strict=True):
        run = partial(_train_and_read, config, shapes[name], seed, latents, vae, classifier, device, bar)
        readings[name, seed] = pieces.piece(f"{_slug(name)}-{seed}.safetensors", run, save_tensors, _load, bar)
    trainings = tuple(_training(name, shapes[name], seed, readings[name, seed], config) for name, seed in plan)
    planted = {MALE: config.male, BLOND_MALE: config.blond_male}
    result = ApartResult(
        trainings, tuple(_all_flips(families, readings, config.n_trainings)), families, planted,
        config.model_dump(mode="json"), classifier.classifier_id,
    )  # fmt: skip
    write_json(work / "depth-apart.json", to_plain(result))
    TypeAdapter(ApartResult).validate_python(read_json(work / "depth-apart.json"))
    return result


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _load(path: Path) -> dict[str, np.ndarray]:
    from diffusion_lens.base.files import load_tensors

    return load_tensors(path)


def _latents(
    config: ApartConfig, vae: AutoencoderTiny, device: torch.device, progress: Progress
) -> dict[str, np.ndarray]:
    images = []
    for record in planted_records(config):
        images.append(draw(record))
        progress.step(len(images), config.n_drawings)
    return {"latents": encode_all(vae, torch.from_numpy(np.stack(images)), device=device).cpu().numpy()}


def _train_and_read(
    config: ApartConfig,
    shape: NetworkShape,
    seed: int,
    latents: Tensor,
    vae: AutoencoderTiny,
    classifier: Classifier,
    device: torch.device,
    progress: Progress,
) -> dict[str, np.ndarray]:
    learning, drawing = progress.parts((4, 1))
    network, losses = train_network(config, shape, seed, latents, device, learning)
    images = sample(network, vae, config, device, drawing)
    read = classifier.read(images).predictions
    gender, hair = read[world.GENDER.name], read[world.HAIR_COLOUR.name]
    return {
        "male": gender.labels == world.GENDER.index("male"),
        "blond": hair.labels == world.HAIR_COLOUR.index("blond hair"),
        "gender known": gender.certain,
        "hair known": hair.certain,
        "loss": np.array([np.mean(losses[-max(1, len(losses) // 10) :])]),
    }


def train_network(
    config: ApartConfig, shape: NetworkShape, seed: int, latents: Tensor, device: torch.device, progress: Progress
) -> tuple[UNet2DModel, list[float]]:
    """v-prediction on folded latents ``[N, c, y, x]``; the batches of a seed are the same for every network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(shape).to(device)
    generator = torch.Generator().manual_seed(1_000 + seed)
    scheduler = make_scheduler()
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.n_steps, pct_start=0.1)
    losses = []
    with torch.enable_grad():
        for _ in progress.each(range(config.n_steps)):
            rows = torch.randint(len(latents), (config.train_batch,), generator=generator)
            t = torch.randint(scheduler.config.num_train_timesteps, (config.train_batch,), generator=generator)
            x = fold(latents[rows.to(latents.device)].float())
            noise = torch.randn(x.shape, generator=generator).to(x)
            noised, target = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
            loss = F.mse_loss(network(noised, t.to(device)).sample, target)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return network.eval().requires_grad_(False), losses


@torch.inference_mode()
def sample(
    network: UNet2DModel, vae: AutoencoderTiny, config: ApartConfig, device: torch.device, progress: Progress
) -> np.ndarray:
    """``n`` images ``uint8 [n, 64, 64, 3]``; image ``i`` has the same noise in every network."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(config.sampling_steps)
    size = LATENT_SIZE // FOLD
    x = torch.stack([
        torch.randn(
            LATENT_CHANNELS * FOLD**2, size, size, generator=torch.Generator().manual_seed(config.first_seed + i)
        )
        for i in range(config.n)
    ])  # fmt: skip
    parts = []
    chunks = x.split(100)
    for chunk, bar in zip(chunks, progress.parts(len(chunks)), strict=True):
        latents = chunk.to(device)
        for t in bar.each(list(scheduler.timesteps)):
            latents = scheduler.step(network(latents, t).sample, t, latents).prev_sample
        parts.append(decode_images(vae, F.pixel_shuffle(latents, FOLD)))
    return np.concatenate(parts)


def _members(read: Mapping[str, np.ndarray], minority: str) -> tuple[np.ndarray, np.ndarray]:
    """Which images are of a minority, and which are decided."""
    male, sure = read["male"].astype(bool), read["gender known"].astype(bool)
    if minority == MALE:
        return male & sure, sure
    sure = sure & read["hair known"].astype(bool)
    return male & read["blond"].astype(bool) & sure, sure


def _training(
    name: str, shape: NetworkShape, seed: int, read: Mapping[str, np.ndarray], config: ApartConfig
) -> Training:
    counts = {}
    for minority in MINORITIES:
        inside, sure = _members(read, minority)
        counts[minority] = (int(inside.sum()), int(sure.sum()))
    return Training(
        name, shape.layers, shape.channels, parameters(shape), seed, counts, config.n,
        config.n - counts[BLOND_MALE][1], float(read["loss"][0]),
    )  # fmt: skip


def _all_flips(
    families: Mapping[str, Sequence[str]], readings: Mapping[tuple[str, int], Any], n_trainings: int
) -> Iterator[SeedFlips]:
    pairs = dict.fromkeys(pair for names in families.values() for pair in combinations(names, 2))
    for first, second in pairs:
        for minority in MINORITIES:
            for seed in range(n_trainings):
                yield count_flips(first, second, minority, seed, readings[first, seed], readings[second, seed])


def count_flips(
    first: str, second: str, minority: str, seed: int, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> SeedFlips:
    """Images of the same noise that left a minority, and that joined it, among those decided both times."""
    (was, knew), (is_now, knows) = (_members(read, minority) for read in (before, after))
    both = knew & knows
    left, joined = int((was & ~is_now & both).sum()), int((~was & is_now & both).sum())
    return SeedFlips(first, second, minority, seed, left, joined, int(both.sum()))
