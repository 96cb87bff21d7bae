"""Several attributes at once: the joint table by hand, one edit that equals its parts, spillover and order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lens_fixtures import AGE, GENDER, PROMPTS

from diffusion_lens.base.edits import describe
from diffusion_lens.base.progress import Cancelled, Progress, Status
from diffusion_lens.base.types import LensError, Predictions
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.denoise import StepContext
from diffusion_lens.plots import spillover_figure
from diffusion_lens.results.joint import TOGETHER, JointResult, load_joint
from diffusion_lens.results.manifest import verify
from diffusion_lens.steering.intervene import draw_classes
from diffusion_lens.studies.joint import Steer, joint_edit, joint_table, parse_steer, steer_together
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import together

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
    assert result.description == describe(both.spec)


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
    seen: list[float] = []

    def stop(status: Status) -> None:
        seen.append(status.share)
        if len(seen) == 6:
            raise Cancelled

    with pytest.raises(Cancelled):
        steer_together(tiny_lens, PROMPTS[0], STEERS, range(4), batch_size=4, progress=Progress(stop))
    assert seen == pytest.approx([i / 20 for i in range(1, 7)])


def test_a_stored_result_reads_back_and_is_shown(
    result: JointResult, tiny_lens: DiffusionLens, copied_lens: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copied_lens()
    lens = DiffusionLens.from_pretrained(folder)
    assert lens.together is None and together.COMMAND in together.together_view(Studio(lens)).sentence
    assert lens.store(result) == folder / "together" / "together.json"
    verify(folder)
    again = lens.together
    assert again is not None
    with pytest.raises(LensError, match="measured on another SAE"):
        lens.store(replace(result, sae_id="another"))
    for table, other in ((again.before, result.before), (again.after, result.after)):
        np.testing.assert_array_equal(table.counts, other.counts)
        assert (table.attributes, table.classes, table.n) == (other.attributes, other.classes, other.n)
    for name in ("shares", "spillover", "interference", "steered", "order_matters", "prompt", "description"):
        assert getattr(again, name) == getattr(result, name)
    shown = together.together_view(Studio(DiffusionLens.from_pretrained(folder)))
    said, matrix, rows = shown.sentence, shown.matrix, shown.table
    assert "gender to female 50%, male 50%; strength 3" in said and matrix is not None
    assert rows.count("<tr>") == 1 + 2 * 3
    first, last = (rows.split("<tr>")[i] for i in (2, -1))
    moves = [abs(a - b) for a, b in zip(result.after.shares.ravel(), result.before.shares.ravel(), strict=True)]
    label = ", ".join(c[k] for c, k in zip(result.before.classes, np.unravel_index(int(np.argmax(moves)), (2, 3)),
                                           strict=True))  # fmt: skip
    assert f'"row">{label}<' in first and f'"row">{label}<' not in last
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(LensError, match="not a stored result"):
        load_joint(tmp_path / "bad.json")


def test_the_sentence_tells_the_largest_interference(result: JointResult) -> None:
    told = together.describe(replace(result, interference={"gender": {"male": 0.1}, "age": {"old": -0.3}}))
    assert "age old ends -30 points elsewhere" in told


def test_steers_are_read_from_words(tiny_lens: DiffusionLens) -> None:
    assert parse_steer(tiny_lens, "age=old:0.5") == ("age", Steer("old", 0.5))
    name, steer = parse_steer(tiny_lens, "gender=even:1")
    assert name == "gender" and steer == Steer({"female": 0.5, "male": 0.5}, 1.0)
    for text in ("gender", "gender=male", "gender=male:x", "gender=male:nan", "glasses=none:1"):
        with pytest.raises(LensError, match=r"Write a steer|ships no setting"):
            parse_steer(tiny_lens, text)
