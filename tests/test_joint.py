"""Several attributes at once: the joint table by hand, one edit that equals its parts, spillover and order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lens_fixtures import AGE, GENDER, PROMPTS

from diffusion_lens.denoise import StepContext
from diffusion_lens.generate import Cancelled
from diffusion_lens.intervene import draw_classes
from diffusion_lens.joint import TOGETHER, JointResult, Steer, joint_edit, joint_table, steer_together
from diffusion_lens.lens import DiffusionLens
from diffusion_lens.plots import spillover_figure
from diffusion_lens.types import LensError, Predictions

SEEDS = range(40, 64)
STEERS = {"gender": Steer({"female": 0.5, "male": 0.5}, 3.0), "age": Steer("old", 2.0)}


@pytest.fixture(scope="module")
def result(tiny_lens: DiffusionLens) -> JointResult:
    """Gender and age at once."""
    return steer_together(tiny_lens, PROMPTS[0], STEERS, SEEDS, batch_size=24)


def test_the_table_by_hand() -> None:
    gender = Predictions(np.eye(2)[[0, 1, 1, 0]], np.array([True, True, True, True]), GENDER, "c")
    age = Predictions(np.eye(3)[[2, 0, 0, 1]], np.array([True, True, True, False]), AGE, "c")
    table = joint_table([gender, age])
    assert table.counts.tolist() == [[0, 0, 1], [2, 0, 0]] and table.n == 4
    assert table.shares[1, 0] == pytest.approx(2 / 3)
    assert table.attributes == ("gender", "age") and table.classes[1] == AGE.classes
    nobody = Predictions(np.eye(2)[[0]], np.array([False]), GENDER, "c")
    assert np.isnan(joint_table([nobody]).shares).all()


def test_both_tables_count_the_same_images(result: JointResult, tiny_lens: DiffusionLens) -> None:
    plain = tiny_lens.classify(tiny_lens.generate(PROMPTS[0], seeds=SEEDS, batch_size=24).images)
    both = joint_edit(tiny_lens, STEERS, SEEDS)
    steered = tiny_lens.classify(tiny_lens.generate(PROMPTS[0], both, seeds=SEEDS, batch_size=24).images)
    for table, read in ((result.before, plain), (result.after, steered)):
        slow = np.zeros((2, 3), dtype=int)
        for i in range(len(SEEDS)):
            if read["gender"].certain[i] and read["age"].certain[i]:
                slow[read["gender"].labels[i], read["age"].labels[i]] += 1
        np.testing.assert_array_equal(table.counts, slow)
    assert [s.count for s in result.shares["age"]] == steered["age"].counts.tolist()
    assert result.description == both.description


def test_spillover_and_interference(result: JointResult) -> None:
    assert set(result.spillover) == {"gender", "age", TOGETHER}
    read = {(c.attribute, c.label) for c in result.spillover[TOGETHER]}
    assert ("glasses", "glasses") in read and ("gender", "male") in read
    for name, by_label in result.interference.items():
        for label, value in by_label.items():
            together, alone = (
                next(c.difference for c in result.spillover[key] if (c.attribute, c.label) == (name, label))
                for key in (TOGETHER, name)
            )
            assert value == pytest.approx(together - alone)
    assert len(spillover_figure(result.spillover).data) == 1


def test_one_edit_holds_every_attributes_own_turn(tiny_lens: DiffusionLens) -> None:
    seeds = tuple(range(6))
    h = torch.randn(6, 8, 4, 4)
    context = StepContext(1, 4, 500, seeds, None, 0.5, torch.zeros(6, 1, 1, 1))
    moved = joint_edit(tiny_lens, STEERS, seeds, draw_seed=5).apply(h, context)
    drawn = draw_classes(GENDER, {"female": 0.5, "male": 0.5}, seeds, 5)
    for label, group in drawn.items():
        own = tiny_lens.edit(
            tiny_lens.intervention("gender", label, 4.0), tiny_lens.intervention("age", "old", 3.0)
        ).apply(h, context)
        for i in group:
            torch.testing.assert_close(moved[i], own[i], rtol=1e-4, atol=1e-5)


def test_identity_strengths_change_nothing(tiny_lens: DiffusionLens) -> None:
    still = {name: Steer(steer.target, 0.0) for name, steer in STEERS.items()}
    plain, same = (
        tiny_lens.generate(PROMPTS[0], *edits, seeds=SEEDS, batch_size=24).images
        for edits in ((), (joint_edit(tiny_lens, still, SEEDS),))
    )
    np.testing.assert_array_equal(plain, same)


def test_scaling_does_not_care_about_order(result: JointResult) -> None:
    assert result.order_matters == 0.0
    assert all(isinstance(feature, int) for feature in result.shared_features)


def test_mistakes_and_progress(tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match="at least two"):
        steer_together(tiny_lens, PROMPTS[0], {"gender": Steer("male", 1.0)}, SEEDS)
    with pytest.raises(LensError, match="ships no setting"):
        steer_together(tiny_lens, PROMPTS[0], {**STEERS, "glasses": Steer("none", 1.0)}, SEEDS)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 6:
            raise Cancelled

    with pytest.raises(Cancelled):
        steer_together(tiny_lens, PROMPTS[0], STEERS, range(4), batch_size=4, on_step=stop)
    assert seen == [(i, 20) for i in range(1, 7)]
