"""Depth at equal size: what is planted, equal sizes, intervals over trainings, flips by hand, a tiny run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sae_helpers import GENDER
from scipy.stats import t

from diffusion_lens.base.files import write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError
from diffusion_lens.judging.classify import train_heads
from diffusion_lens.portraits import world
from diffusion_lens.portraits.networks import make_autoencoder
from diffusion_lens.results.depth_apart import ApartResult, SeedFlips, Training, load_apart, over_trainings
from diffusion_lens.studies.depth_apart import (
    ApartConfig,
    NetworkShape,
    count_flips,
    fold,
    make_network,
    parameters,
    planted_records,
    run_apart,
)


def test_depths_are_of_one_size_and_sizes_of_one_depth() -> None:
    config = ApartConfig()
    sizes = [parameters(shape) for shape in config.depths.values()]
    assert max(sizes) / min(sizes) < 1.05
    assert len({shape.layers for shape in config.depths.values()}) == 3
    assert len({shape.layers for shape in config.sizes.values()}) == 1
    own = [parameters(shape) for shape in config.sizes.values()]
    assert own[1] / own[0] > 1.5 and own[2] / own[1] > 1.5
    network = make_network(NetworkShape(layers=1, channels=(8, 16)))
    assert parameters(NetworkShape(layers=1, channels=(8, 16))) == sum(p.numel() for p in network.parameters())


def test_minorities_are_planted_as_asked() -> None:
    config = ApartConfig(n_drawings=1_000)
    records = list(planted_records(config))
    assert len(records) == 1_000
    male = [r.label(world.GENDER) == "male" for r in records]
    blond = [r.label(world.HAIR_COLOUR) == "blond hair" for r in records]
    assert np.mean(male) == pytest.approx(0.4168, abs=0.001)
    both = [m and b for m, b in zip(male, blond, strict=True)]
    assert sum(both) in (8, 9) and np.mean(blond) == pytest.approx(0.1485, abs=0.001)
    with pytest.raises(LensError, match="make them smaller"):
        next(planted_records(ApartConfig(male=0.9, blond_female=0.2)))


def test_folding_loses_nothing() -> None:
    x = torch.arange(2 * 8 * 16 * 16).reshape(2, 8, 16, 16).float()
    folded = fold(x)
    assert folded.shape == (2, 32, 8, 8)
    assert torch.equal(torch.nn.functional.pixel_shuffle(folded, 2), x)


def test_intervals_are_over_trainings() -> None:
    values = [0.02, -0.01, 0.05]
    found = over_trainings(values)
    assert found is not None and found.value == pytest.approx(0.02)
    half = t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert found.interval == pytest.approx((0.02 - half, 0.02 + half))
    assert over_trainings([0.1]) is None and over_trainings([0.1, float("nan")]) is None
    rng = np.random.default_rng(0)
    inside = sum(
        a.interval[0] <= 0.3 <= a.interval[1] for _ in range(400) if (a := over_trainings(rng.normal(0.3, 1, 3)))
    )
    assert inside / 400 == pytest.approx(0.95, abs=0.03)


def made(network: str, layers: int, seed: int, male: int, blond: int) -> Training:
    """A training of 100 decided images."""
    return Training(
        network, layers, (8, 16), 1000, seed, {"male": (male, 100), "blond male": (blond, 100)}, 100, 0, 0.1
    )


def test_verdicts_pair_trainings_of_one_seed() -> None:
    trainings = tuple(
        training
        for seed in range(3)
        for training in (made("shallow", 1, seed, 40 + seed, 2), made("deep", 4, seed, 30 + seed, seed))
    )
    flips = tuple(SeedFlips("shallow", "deep", "male", seed, 12, 2 + seed, 90) for seed in range(3))
    result = ApartResult(
        trainings, flips, {"depth": ("shallow", "deep")}, {"male": 0.42, "blond male": 0.0085}, {}, "judge"
    )
    found = result.difference("depth", "male")
    assert found is not None and found.value == pytest.approx(-0.10) and found.interval == pytest.approx((-0.1, -0.1))
    assert "deep draws surely fewer male faces than shallow: -10.0 points" in result.verdict("depth", "male")
    assert "neither surely fewer nor more blond male faces" in result.verdict("depth", "blond male")
    amplified = result.amplification("deep", "male")
    assert amplified is not None and amplified.value == pytest.approx(0.31 - 0.42)
    net = result.net_flips("depth", "male")
    assert net is not None and net.value == pytest.approx(np.mean([10 / 90, 9 / 90, 8 / 90]))


def test_flips_by_hand() -> None:
    def read(male: list[int], gender: list[int], blond: list[int], hair: list[int]) -> dict[str, np.ndarray]:
        names = ("male", "gender known", "blond", "hair known")
        return {name: np.array(own) for name, own in zip(names, (male, gender, blond, hair), strict=True)}

    before = read([1, 1, 0, 0, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1])
    after = read([0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 1], [1, 0, 1, 1, 1])
    found = count_flips("a", "b", "male", 0, before, after)
    assert (found.left, found.joined, found.n) == (1, 1, 4)
    rare = count_flips("a", "b", "blond male", 0, before, after)
    assert (rare.left, rare.joined, rare.n) == (1, 0, 3)


def test_a_tiny_run_comes_back(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (40, 64, 64, 3), dtype=torch.uint8)
    labels = torch.randint(0, 2, (40, len(world.ATTRIBUTES)))
    judge = train_heads(images, labels, world.ATTRIBUTES, n_steps=1, batch_size=4, widths=(8, 8, 8, 16))
    assert any(a.name == GENDER.name for a in judge.attributes)
    shapes = {f"{n}": NetworkShape(layers=n, channels=(8, 8)) for n in (1, 2)}
    config = ApartConfig(
        depths=shapes, sizes={"own": shapes["2"], "more": NetworkShape(layers=2, channels=(8, 16))}, n_drawings=200,
        n_trainings=2, n_steps=2, train_batch=4, n=10, sampling_steps=2,
    )  # fmt: skip
    vae = make_autoencoder(8).eval()
    device = torch.device("cpu")
    result = run_apart(config, vae, judge, tmp_path, device=device)
    assert {t.network for t in result.trainings} == {"1", "2", "more"} and len(result.trainings) == 6
    assert result.families == {"depth": ("1", "2"), "size": ("2", "more")}
    again = run_apart(config, vae, judge, tmp_path, device=device)
    assert again == result == load_apart(tmp_path / "depth-apart.json")
    with pytest.raises(LensError, match="another experiment"):
        run_apart(config.model_copy(update={"n_steps": 3}), vae, judge, tmp_path, device=device)
    write_json(tmp_path / "bad.json", to_plain([1]))
    with pytest.raises(LensError, match="no stored experiment"):
        load_apart(tmp_path / "bad.json")
