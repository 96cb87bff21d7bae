"""The sweep on a fake world whose truth is known, then once on the tiny text pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from measured import measured

from diffusion_lens.base.progress import Cancelled, Progress, Status
from diffusion_lens.base.types import (
    Attribute,
    EditSpec,
    Generation,
    GenerationRequest,
    LensError,
    Predictions,
    Reading,
)
from diffusion_lens.measuring import observe
from diffusion_lens.measuring.balance import balance, crossing
from diffusion_lens.measuring.observe import observe_baseline, read
from diffusion_lens.measuring.sweep import sweep_points
from diffusion_lens.model.generate import StepContext, request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results import metrics
from diffusion_lens.results.measurement_files import Missing
from diffusion_lens.results.records import load_sweep, save_sweep
from diffusion_lens.results.sweeps import SweepPoint, SweepResult, collect

GENDER = Attribute("gender", ("female", "male"))
GLASSES = Attribute("glasses", ("no", "yes"))
PERFECT = np.array([[500, 0], [0, 500]])
MODEL: Any = None  # the fake world needs none


def male_share(beta: float) -> float:
    return float(1 / (1 + np.exp(-(1.5 - 1.5 * beta))))


@dataclass(frozen=True)
class FakeEdit:
    beta: float
    sampler: str = "symmetric"
    window: tuple[int, int] | None = None

    @property
    def spec(self) -> EditSpec:
        return EditSpec.of_custom(f"fake {self.beta}")

    def apply(self, h: torch.Tensor, context: StepContext) -> torch.Tensor:
        return h


@dataclass
class FakeWorld:
    """Draws 4² striped images whose pixels are gender (red) and glasses (green); remembers its runs."""

    runs: list[str | None] = field(default_factory=list)

    def draw(
        self,
        model: DiffusionModel,
        request: GenerationRequest,
        *,
        edit: FakeEdit | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        start: Any = None,
    ) -> Iterator[Generation]:
        self.runs.append(edit.spec.custom.name if edit else None)
        total = request.n_steps * -(-len(request.seeds) // batch_size)
        for batch, offset in enumerate(range(0, len(request.seeds), batch_size)):
            seeds = request.seeds[offset : offset + batch_size]
            u = np.array([np.random.default_rng(s).random(2) for s in seeds])
            beta = edit.beta if edit else 0.0
            images = np.zeros((len(seeds), 4, 4, 3), np.uint8)
            images[..., 0] = (u[:, 0] < male_share(beta))[:, None, None]
            images[..., 1] = (u[:, 1] < 0.3)[:, None, None]
            images[:, 1::2, :, 2] = 9
            for step in range(request.n_steps):
                if progress is not None:
                    progress.step(batch * request.n_steps + step + 1, total)
            ratio = 1.0 + beta if edit else None
            yield Generation(images, replace(request, seeds=seeds), edit and edit.spec, activation_ratio=ratio)


@dataclass(frozen=True)
class PixelClassifier:
    """Reads the fake world's pixels; unsure where the blue channel says so."""

    confusion: dict[str, np.ndarray] = field(default_factory=lambda: {"gender": PERFECT, "glasses": PERFECT})
    classifier_id: str = "pixels"
    attributes: tuple[Attribute, ...] = (GENDER, GLASSES)

    def read(self, images: np.ndarray) -> Reading:
        return Reading(self.predict(images), self.features(images))

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        certain = images[:, 0, 0, 2] == 0
        return {
            a.name: Predictions(np.eye(2)[(images[:, 0, 0, i] > 0).astype(int)], certain, a, self.classifier_id)
            for i, a in enumerate(self.attributes)
        }

    def features(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float64)


def ask(n: int, n_steps: int = 3) -> GenerationRequest:
    return GenerationRequest("a portrait", tuple(range(n)), n_steps, 1.0, "fake")


def edit_at(beta: float) -> FakeEdit | None:
    return None if beta == 0 else FakeEdit(beta)


def run(world: FakeWorld, n: int, betas: list[float], **changes: Any) -> list[SweepPoint]:
    arguments: dict[str, Any] = {"batch_size": 16, **changes}
    with drawn_by(world):
        return list(sweep_points(MODEL, ask(n), edit_at, betas, PixelClassifier(), GENDER, "male", **arguments))


def drawn_by(world: FakeWorld) -> Any:
    """Let the one loop that draws draw from ``world``."""
    return patch.object(observe, "generate_batches", world.draw)


def result_of(points: list[SweepPoint]) -> SweepResult:
    return collect(points, target="male", setting="fake", provenance={"method": "fake"})


def test_unedited_images_are_drawn_once_and_points_come_in_order() -> None:
    world = FakeWorld()
    points = run(world, 80, [1.0, 0.0, 2.0])
    assert [p.beta for p in points] == [0, 1, 2]
    assert world.runs == [None, "fake 1.0", "fake 2.0"]
    first, second, _ = points
    u = np.array([np.random.default_rng(s).random(2) for s in range(80)])
    assert (first.labels == (u[:, 0] < male_share(0))).all()
    assert (second.labels == (u[:, 0] < male_share(1))).all()  # the same seeds, one by one
    assert second.shares[1].count == int(second.labels.sum()) and second.shares[1].n == 80
    assert second.fd == pytest.approx(np.sqrt(2) * abs(second.shares[1].raw - 0.5))
    assert second.fd_floor == metrics.fd_null_floor(80)
    assert second.log_ratio is not None and second.log_ratio.numerator == "male"


def test_what_else_moved() -> None:
    first, second = run(FakeWorld(), 80, [0.0, 1.0])
    assert first.agreement == {"glasses": 1.0} == second.agreement
    assert second.spillover["glasses"] == first.spillover["glasses"]
    assert {c.label: c.difference for c in second.changes} == {"no": 0, "yes": 0}
    assert (first.activation_ratio, second.activation_ratio) == (1.0, 2.0)
    assert first.fid == pytest.approx(0, abs=1e-9) and second.fid is not None and second.fid > 0.1
    assert first.examples.shape == (8, 4, 4, 3)
    assert (first.examples[:, 0, 0, 0] == first.labels[:8]).all()


def test_few_images_have_no_fid_and_batches_do_not_matter() -> None:
    points = run(FakeWorld(), 20, [0.0, 1.0], batch_size=16, n_examples=18)
    assert points[1].fid is None and len(points[1].examples) == 18
    others = run(FakeWorld(), 20, [0.0, 1.0], batch_size=7, n_examples=18)
    for a, b in zip(points, others, strict=True):
        assert a.shares == b.shares and (a.labels == b.labels).all() and (a.examples == b.examples).all()


def test_progress_counts_every_run_and_cancels() -> None:
    seen: list[float] = []
    run(FakeWorld(), 20, [0.0, 1.0, 2.0], progress=Progress(lambda status: seen.append(status.share)))
    assert seen == pytest.approx([(i + 1) / 18 for i in range(18)])  # 3 runs x 2 batches x 3 steps

    def stop(status: Status) -> None:
        if status.share > 7.5 / 18:
            raise Cancelled

    kept = []
    with pytest.raises(Cancelled), drawn_by(FakeWorld()):
        watched = Progress(stop)
        for point in sweep_points(
            MODEL, ask(20), edit_at, [0, 1, 2], PixelClassifier(), GENDER, "male", progress=watched
        ):
            kept.append(point)
    assert [p.beta for p in result_of(kept).points] == [0]


def test_a_baseline_is_shared_and_checked() -> None:
    world = FakeWorld()
    with drawn_by(world):
        base = observe_baseline(MODEL, ask(20), PixelClassifier())
    run(world, 20, [0.0, 1.0], baseline=base)
    assert world.runs == [None, "fake 1.0"]
    with pytest.raises(LensError, match="for another request"):
        run(world, 21, [0.0, 1.0], baseline=base)


def test_fd_is_taken_from_the_stated_target() -> None:
    (point,) = run(FakeWorld(), 40, [0.0], target_shares={"male": 0.8, "female": 0.2})
    assert point.fd == pytest.approx(np.sqrt(2) * abs(point.shares[1].raw - 0.8))
    with pytest.raises(LensError, match="Give a target share"):
        run(FakeWorld(), 40, [0.0], target_shares={"male": 1.0})


def test_a_point_without_decided_images_is_reported_not_invented() -> None:
    images = np.zeros((12, 4, 4, 3), np.uint8)
    images[..., 2] = 1
    images[:, 1::2, :, 2] = 9
    found = read([Generation(images, ask(12))], ask(12), PixelClassifier())
    point = SweepPoint(found.against(found), GENDER, beta=3.0)
    assert np.isnan(point.shares[0].raw) and np.isnan(point.fd) and point.log_ratio is None
    assert np.isnan(point.spillover["glasses"]).all() and point.changes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": [1.0, 1.0]}, "different, finite"),
        ({"betas": []}, "different, finite"),
        ({"target": "young"}, "no class of gender"),
        ({"attribute": Attribute("age", ("young", "old")), "target": "old"}, "does not read age"),
        ({"classifier": PixelClassifier({"glasses": PERFECT})}, "not known"),
        ({"classifier": PixelClassifier({"gender": np.full((2, 2), 50)})}, "mixes up"),
    ],
)
def test_refusals_come_before_anything_is_drawn(changes: dict[str, Any], message: str) -> None:
    world = FakeWorld()
    given: dict[str, Any] = {
        "betas": [0.0], "classifier": PixelClassifier(), "attribute": GENDER, "target": "male", **changes
    }  # fmt: skip
    with pytest.raises(LensError, match=message), drawn_by(world):
        sweep_points(MODEL, ask(4), edit_at, **given)
    assert world.runs == []


def test_a_sweep_survives_the_disk(tmp_path: Any) -> None:
    result = result_of(run(FakeWorld(), 60, [0.0, 1.0]))
    save_sweep(result, tmp_path, "s")
    back = load_sweep(tmp_path, "s", Missing({}))
    assert (back.betas, back.attribute, back.request) == (result.betas, result.attribute, result.request)
    assert back.provenance == {"method": "fake"}
    for a, b in zip(result.points, back.points, strict=True):
        assert (a.shares, a.log_ratio, a.changes, a.agreement) == (b.shares, b.log_ratio, b.changes, b.agreement)
        assert (a.labels == b.labels).all() and (a.certain == b.certain).all()


def test_crossing_by_hand() -> None:
    betas = np.array([0.0, 1.0, 2.0, 3.0])
    assert crossing(betas, np.array([0.2, 0.4, 0.8, 0.9]), 0.5, rising=True) == pytest.approx(1.25)
    assert crossing(betas, np.array([0.9, 0.8, 0.4, 0.2]), 0.5, rising=False) == pytest.approx(1.75)
    assert crossing(betas, np.array([0.2, 0.5, 0.5, 0.9]), 0.5, rising=True) == pytest.approx(1.5)  # plateau
    assert crossing(betas, np.array([0.5, 0.6, 0.7, 0.8]), 0.5, rising=True) == pytest.approx(0)
    assert crossing(betas, np.array([0.2, 0.3, 0.4, 0.5]), 0.5, rising=True) == pytest.approx(3)
    assert crossing(betas, np.array([0.2, 0.3, 0.3, 0.4]), 0.5, rising=True) == np.inf
    assert crossing(betas, np.array([0.4, 0.3, 0.2, 0.1]), 0.5, rising=False) == -np.inf


def point_from(labels: np.ndarray, beta: float) -> SweepPoint:
    return SweepPoint(measured({GENDER: labels}, confusion={"gender": PERFECT}), GENDER, beta=beta)


def simulated(seed: int, n: int, betas: list[float], confusion: np.ndarray = PERFECT) -> SweepResult:
    """Paired labels of a known curve, read by a classifier with the given error."""
    rng = np.random.default_rng(seed)
    u, v = rng.random((2, n))
    rates = confusion / confusion.sum(axis=1, keepdims=True)
    points = []
    for beta in betas:
        truth = (u < male_share(beta)).astype(int)
        points.append(point_from((v < rates[truth, 1]).astype(int), beta))
    return result_of(points)


def test_balance_meets_the_target_and_says_so() -> None:
    found = balance(simulated(0, 4000, [0, 0.5, 1, 1.5, 2]), PERFECT)
    assert found.reached and found.beta == pytest.approx(1.0, abs=0.06)
    assert found.interval[0] <= found.beta <= found.interval[1] and np.diff(found.interval) < 0.2
    assert found.share == pytest.approx(0.5)
    assert "met at β" in found.note and "50 % male" in found.note
    female = balance(simulated(0, 4000, [0, 0.5, 1, 1.5, 2]), PERFECT, label="female", target_share=0.3)
    assert female.beta == pytest.approx((1.5 + np.log(0.3 / 0.7)) / 1.5, abs=0.08)


def test_balance_corrects_for_the_classifier() -> None:
    confusion = np.array([[300, 200], [25, 475]])  # calls 40 % of "female" male
    result = simulated(1, 6000, [0, 0.5, 1, 1.5, 2], confusion)
    assert balance(result, confusion).beta == pytest.approx(1.0, abs=0.12)
    assert abs(balance(result, PERFECT).beta - 1.0) > 0.2


def test_balance_interval_coverage() -> None:
    confusion = np.array([[95, 5], [8, 92]])
    rates = confusion / 100
    hits = 0
    for trial in range(100):
        rng = np.random.default_rng(1000 + trial)
        labelled = np.stack([rng.multinomial(200, row) for row in rates])
        result = simulated(trial, 200, [0, 0.4, 0.8, 1.2, 1.6, 2.0], confusion)
        found = balance(result, labelled, n_boot=300, seed=trial)
        hits += found.interval[0] <= 1.0 <= found.interval[1]
    assert hits >= 90


def test_a_target_out_of_range_is_not_invented() -> None:
    found = balance(simulated(2, 500, [0, 0.2, 0.4]), PERFECT)
    assert not found.reached and found.beta == 0.4 and found.open_above
    assert "not reached between β = 0 and 0.4" in found.note
    near = balance(simulated(2, 100, [0, 0.5, 1.0]), PERFECT)
    assert near.interval[1] == 1.0 and near.open_above


def test_over_steering_shows_off_the_curve() -> None:
    points = list(simulated(3, 1000, [0, 0.5, 1, 1.5]).points)
    points.append(point_from(np.array([0, 1, 1, 1] * 250), 2.0))
    assert balance(result_of(points), PERFECT).off_curve > 0.1


def test_balance_refusals() -> None:
    with pytest.raises(LensError, match="needs >= 2 betas"):
        balance(simulated(0, 100, [1.0]), PERFECT)
    with pytest.raises(LensError, match="needs >= 2 betas"):
        balance(simulated(0, 9, [0.0, 1.0]), PERFECT)
    with pytest.raises(LensError, match="between 0 and 1"):
        balance(simulated(0, 100, [0.0, 1.0]), PERFECT, target_share=1.0)


@dataclass(frozen=True)
class Shift:
    """Adds ``beta`` to the bottleneck in the later steps."""

    beta: float
    sampler: str = "symmetric"
    window: tuple[int, int] | None = (2, 4)

    @property
    def spec(self) -> EditSpec:
        return EditSpec.of_custom("shift", self.beta)

    def apply(self, h: torch.Tensor, context: StepContext) -> torch.Tensor:
        return h + self.beta


@dataclass(frozen=True)
class BrightClassifier(PixelClassifier):
    """Bright or dark, by the red and the green channel."""

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        bright = images.mean(axis=(1, 2)) > 127
        return {
            a.name: Predictions(np.eye(2)[bright[:, i].astype(int)], np.ones(len(images), bool), a, self.classifier_id)
            for i, a in enumerate(self.attributes)
        }


def test_on_the_tiny_pipeline_restarts_are_bit_identical(text_model: DiffusionModel) -> None:
    asked = request(text_model, "a portrait", range(6), n_steps=4, guidance_scale=2.0)

    def make_edit(beta: float) -> Shift | None:
        return None if beta == 0 else Shift(beta)

    def points(**changes: Any) -> list[SweepPoint]:
        given: dict[str, Any] = {"batch_size": 3, **changes}
        return list(
            sweep_points(text_model, asked, make_edit, [0, 3.0, 6.0], BrightClassifier(), GENDER, "male", **given)
        )

    seen: list[float] = []
    shared = points(progress=Progress(lambda status: seen.append(status.share)))
    whole = observe_baseline(text_model, asked, BrightClassifier(), batch_size=3)
    assert whole.start is None
    kept = observe_baseline(text_model, asked, BrightClassifier(), batch_size=3, restart_steps=[2, 0])
    assert kept.start is not None and list(kept.start.latents) == [2]
    slow = points(baseline=whole)  # every run from noise
    for a, b in zip(shared, slow, strict=True):
        assert (a.examples == b.examples).all()
        assert a.activation_ratio == pytest.approx(b.activation_ratio)
    assert shared[0].activation_ratio == 1 != shared[1].activation_ratio
    assert (shared[0].examples != shared[2].examples).any()
    assert seen[-1] == pytest.approx(1.0) and seen == sorted(seen)
