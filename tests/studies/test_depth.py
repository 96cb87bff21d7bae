"""The depth experiment on tiny networks: whole run, resumption, amplification and flips by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_lens.base.progress import Progress, Status
from diffusion_lens.base.types import LensError, Predictions
from diffusion_lens.judging.classify import HeadsClassifier, calibrate, train_heads
from diffusion_lens.model.generate import generate_batches
from diffusion_lens.plots import depth_figure, describe_depth
from diffusion_lens.portraits import world
from diffusion_lens.portraits.denoiser import DenoiserTrainConfig
from diffusion_lens.portraits.networks import DenoiserConfig, make_autoencoder
from diffusion_lens.results import stats
from diffusion_lens.results.depth import CAVEAT, DepthResult, depth_series, flips_of, load_depth
from diffusion_lens.studies import depth as module
from diffusion_lens.studies.depth import DepthConfig, count_flips, planned_images, run_depth

DOCTOR = "a portrait of a doctor"


def tiny(**changes: Any) -> DepthConfig:
    """Three depths, two optimiser steps, a handful of images."""

    def shape(*channels: int) -> DenoiserConfig:
        return DenoiserConfig(channels=channels, attention=(*(False,) * (len(channels) - 1), True), text_width=16)

    values: dict[str, Any] = {
        "shapes": {"2 levels": shape(16, 16), "3 levels": shape(16, 16, 16), "4 levels": shape(16, 16, 16, 16)},
        "train": DenoiserTrainConfig(n_steps=2, batch_size=4), "n_drawings": 12, "prompts": (DOCTOR,),
        "guidance_scales": (1.0, 2.0), "n": 12, "n_steps": 2, "attributes": ("gender", "age"), "batch_size": 12,
        **changes,
    }  # fmt: skip
    return DepthConfig(**values)


@pytest.fixture(scope="module")
def classifier() -> HeadsClassifier:
    """A network of random weights that claims to be right nine times in ten."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    labels = np.stack([rng.integers(0, len(a.classes), 40) for a in world.ATTRIBUTES], axis=1)
    made = train_heads(
        torch.from_numpy(images), torch.from_numpy(labels), world.ATTRIBUTES, n_steps=1, widths=(8, 8, 8, 16)
    )
    made = calibrate(made, images, labels)
    made = replace(made, config=made.config.model_copy(update={"thresholds": {}}))  # it decides about noise too
    confusion = {a.name: np.eye(len(a.classes), dtype=int) * 90 + 10 for a in world.ATTRIBUTES}
    return made.with_confusion(confusion, {a.name: np.zeros(len(a.classes)) for a in world.ATTRIBUTES})


@pytest.fixture(scope="module")
def run(classifier: HeadsClassifier, tmp_path_factory: pytest.TempPathFactory) -> tuple[DepthResult, Path]:
    """The experiment, and its folder."""
    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("depth")
    return run_depth(tiny(), make_autoencoder(8), classifier, work, device=torch.device("cpu")), work


def test_every_setting_is_measured(run: tuple[DepthResult, Path]) -> None:
    result, _ = run
    assert len(result.points) == 3 * 2 * 1 * 2 * 2  # depth, bypass, prompt, guidance, attribute
    assert len(result.flips) == (3 + 3) * 1 * 2 * 2
    assert list(result.parameters) == ["2 levels", "3 levels", "4 levels"]
    assert result.parameters["2 levels"] < result.parameters["3 levels"] < result.parameters["4 levels"]
    for point in result.points:
        np.testing.assert_allclose(point.planted, world.planted_shares(DOCTOR)[point.attribute])
        for share, planted, amplified, (low, high) in zip(
            point.shares, point.planted, point.amplification, point.intervals, strict=True
        ):
            assert amplified == pytest.approx(share.corrected - planted)
            assert low <= amplified <= high and share.n + share.n_uncertain == 12
    assert {p.majority for p in result.points if p.attribute == "gender"} == {"male"}
    assert "cannot show that depth as such" in result.caveat == CAVEAT


def test_the_result_is_stored_and_drawn(run: tuple[DepthResult, Path]) -> None:
    result, work = run
    assert load_depth(work / "depth.json") == result
    depths, shares, planted = depth_series(result, "gender", "male", prompt=DOCTOR, guidance_scale=2.0, bypass=True)
    assert depths == ["2 levels", "3 levels", "4 levels"] and planted == pytest.approx(0.72)
    assert len(depth_figure(depths, shares, training_share=planted).data) == 1
    assert "72" in describe_depth(depths, shares, training_share=planted)
    with pytest.raises(LensError, match="did not measure"):
        depth_series(result, "gender", "robot", prompt=DOCTOR, guidance_scale=2.0)
    (work / "other.json").write_text("{}")
    with pytest.raises(LensError, match="not a stored depth experiment"):
        load_depth(work / "other.json")


def test_what_guidance_cannot_change_is_drawn_once(run: tuple[DepthResult, Path]) -> None:
    config = tiny(prompts=("", DOCTOR))
    assert planned_images(config) == 3 * (1 + 2 + 2 + 2) * 12  # the empty prompt unbypassed; the rest at two scales
    assert planned_images(tiny()) == 12 * len(list((run[1] / "readings").glob("*/*.safetensors")))


def test_the_empty_prompt_is_the_same_at_every_scale(classifier: HeadsClassifier, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny(prompts=("",), n=10, attributes=("gender",))
    result = run_depth(config, make_autoencoder(8), classifier, tmp_path, device=torch.device("cpu"))
    model = module.load_model(tmp_path / "pipeline-2-levels", device=torch.device("cpu"), offline=True)
    images = [
        generate_batches(model, module.request(model, "", range(11_000_000, 11_000_010), 2, scale))
        for scale in (1.0, 2.0)
    ]
    first, second = (np.concatenate([part.images for part in parts]).astype(int) for parts in images)
    assert np.abs(first - second).max() <= 1, "both halves of a guided step are equal"
    counts = [p.shares for p in result.points if p.depth == "2 levels" and not p.bypass]
    assert counts[0] == counts[1] and len(list((tmp_path / "readings").iterdir())) == planned_images(config) // 10


def test_flips_are_found(run: tuple[DepthResult, Path]) -> None:
    result, _ = run
    assert len(flips_of(result, "gender", prompt=DOCTOR)) == 6 * 2


def test_nothing_is_made_twice(
    run: tuple[DepthResult, Path], classifier: HeadsClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, work = run

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was made again")

    for name in ("train_denoiser", "draw_many", "observe"):
        monkeypatch.setattr(module, name, never)
    assert run_depth(tiny(), make_autoencoder(8), classifier, work, device=torch.device("cpu")) == result
    with pytest.raises(LensError, match="another depth experiment"):
        run_depth(tiny(n=11), make_autoencoder(8), classifier, work, device=torch.device("cpu"))


def test_bypass_reaches_the_images(run: tuple[DepthResult, Path]) -> None:
    files = sorted((run[1] / "readings").glob("*/*.safetensors"))
    assert len(files) == 12 and len({path.read_bytes() for path in files}) > 6


def test_flips_by_hand() -> None:
    before = Predictions(np.eye(2)[[0, 0, 0, 1, 1, 0]], np.array([True] * 5 + [False]), world.GENDER, "c")
    after = Predictions(np.eye(2)[[1, 1, 0, 0, 1, 1]], np.ones(6, dtype=bool), world.GENDER, "c")
    flips = count_flips(("a", "b"), DOCTOR, 1.0, before, after)
    assert (flips.majority, flips.to_majority, flips.to_minority, flips.n) == ("male", 2, 1, 5)
    assert flips.p_value == pytest.approx(stats.mcnemar(before.labels[:5] == 1, after.labels[:5] == 1).p_value)
    nurse = count_flips(("a", "b"), "a portrait of a nurse", 1.0, before, after)
    assert (nurse.majority, nurse.to_majority, nurse.to_minority) == ("female", 1, 2)
    unsure = Predictions(np.eye(2)[[0]], np.array([False]), world.GENDER, "c")
    assert count_flips(("a", "b"), DOCTOR, 1.0, unsure, unsure).n == 0


def test_configurations_are_checked() -> None:
    with pytest.raises(LensError, match="at least three depths"):
        DepthConfig.parse({"shapes": {"one": {}}})
    with pytest.raises(LensError, match="no attribute"):
        DepthConfig.parse({"attributes": ["height"]})
    assert len({len(shape.channels) for shape in DepthConfig().shapes.values()}) == 3


def test_training_can_be_stopped(classifier: HeadsClassifier, tmp_path: Path) -> None:
    def stop(status: Status) -> None:
        if status.stage.startswith("2 levels"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_depth(
            tiny(), make_autoencoder(8), classifier, tmp_path, device=torch.device("cpu"), progress=Progress(stop)
        )
    assert not list(tmp_path.glob("pipeline-*"))
