"""Single features turned alone: effects against a plain run, grouping on tables of known truth, names in the atlas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens_fixtures import PROMPTS
from scipy.stats import binomtest

from diffusion_lens import dissect as module
from diffusion_lens.artifacts import verify
from diffusion_lens.dissect import (
    DissectConfig,
    Dissection,
    dissect,
    groups,
    name_of,
    paired_effects,
    q_values,
    store_in_lens,
    to_atlas,
)
from diffusion_lens.generate import Cancelled
from diffusion_lens.lens import DiffusionLens
from diffusion_lens.types import Attribute, FeatureSet, Intervention, LensError, Predictions

GLASSES = Attribute("glasses", ("none", "glasses"))


def config(**changes: Any) -> DissectConfig:
    """A dissection of seconds."""
    values: dict[str, Any] = {"prompt": PROMPTS[0], "n": 20, "beta": 8.0, "batch_size": 20, **changes}
    return DissectConfig(**values)


def made(effects: dict[str, np.ndarray], p_values: dict[str, np.ndarray], **changes: Any) -> Dissection:
    """A dissection of known numbers."""
    n = len(next(iter(effects.values())))
    classes = {"glasses": ("none", "glasses"), "beard": ("no beard", "beard")}
    values: dict[str, Any] = {
        "features": tuple(range(n)), "classes": {name: classes[name] for name in effects}, "effects": effects,
        "low": {k: v - 0.1 for k, v in effects.items()}, "high": {k: v + 0.1 for k, v in effects.items()},
        "p_values": p_values, "flips": {k: np.abs(v[:, 0]) for k, v in effects.items()}, "sae_id": "s",
        "source": "test", "alpha": 0.05, **changes,
    }  # fmt: skip
    return Dissection(**values)


def test_a_feature_is_turned_alone_on_the_same_seeds(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    feature = int(np.argmax(tiny_lens.atlas.density))
    found = dissect(tiny_lens, config(features=(feature,)), tmp_path)
    seeds = range(10_000_000, 10_000_020)
    alone = FeatureSet((feature,), (0.0,), "", "", tiny_lens.sae.sae_id)
    turn = Intervention(alone, "scale", 8.0)
    before, after = (
        tiny_lens.classify(tiny_lens.generate(PROMPTS[0], *edits, seeds=seeds, batch_size=20).images)
        for edits in ((), (turn,))
    )
    assert found.features == (feature,) and set(found.classes) == {"gender", "age", "glasses"}
    for name, p in before.items():
        both = p.certain & after[name].certain
        for label in range(len(p.attribute.classes)):
            shares = [float((q.labels[both] == label).mean()) for q in (p, after[name])]
            assert found.effects[name][0, label] == pytest.approx(shares[1] - shares[0])
        assert found.flips[name][0] == pytest.approx((p.labels != after[name].labels)[both].mean())


def test_paired_effects_by_hand() -> None:
    def reading(labels: list[int], certain: list[bool]) -> Predictions:
        return Predictions(np.eye(2)[labels], np.array(certain), GLASSES, "c")

    before, after = [0] * 12 + [1] * 4, [0] * 4 + [1] * 12
    moved = paired_effects(reading(before, [True] * 16), reading(after, [True] * 15 + [False]))
    assert moved[0] == pytest.approx([-8 / 15, 8 / 15])
    assert (moved[1] < moved[0]).all() and (moved[2] > moved[0]).all()
    assert moved[3] == pytest.approx([binomtest(8, 8).pvalue] * 2)
    nothing = paired_effects(reading(before, [False] * 16), reading(after, [True] * 16))
    assert np.isnan(nothing[0]).all() and nothing[3].tolist() == [1.0, 1.0]


def test_groups_hold_each_feature_where_its_largest_sure_effect_lies() -> None:
    glasses = np.array([[-0.4, 0.4], [-0.3, 0.3], [0.1, -0.1], [0.5, -0.5]])
    beard = np.array([[0.1, -0.1], [-0.35, 0.35], [0.0, 0.0], [0.2, -0.2]])
    sure = np.full((4, 2), 1e-6)
    unsure = np.ones((4, 2))
    unsure[1] = 1e-6
    p_glasses = sure.copy()
    p_glasses[2] = 0.6
    found = made({"glasses": glasses, "beard": beard}, {"glasses": p_glasses, "beard": unsure})
    grouped = groups(found)
    assert [(e.feature, e.label) for e in grouped["glasses"]] == [(3, "none"), (0, "glasses")]
    assert [(e.feature, e.label) for e in grouped["beard"]] == [(1, "beard")]
    first = grouped["glasses"][1]
    assert first.difference == pytest.approx(0.4) and first.interval == pytest.approx((0.3, 0.5))
    assert first.specificity == pytest.approx(0.4 / 0.5) and name_of(first) == "glasses: glasses +40 points"


def test_false_discoveries_are_held_down() -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(size=(200, 2))
    effects = {"glasses": rng.normal(size=(200, 2))}
    found = made(effects, {"glasses": noise})
    assert sum(map(len, groups(found).values())) <= 2  # 20 would pass at 5 % without adjustment
    flat = np.sort(noise.ravel())
    slow = np.minimum.accumulate((flat * len(flat) / np.arange(1, len(flat) + 1))[::-1])[::-1]
    np.testing.assert_allclose(np.sort(q_values(found)["glasses"].ravel()), np.minimum(slow, 1))


def test_the_atlas_takes_effects_and_names(tiny_lens: DiffusionLens) -> None:
    atlas = tiny_lens.atlas
    found = made(
        {"glasses": np.array([[-0.4, 0.4], [0.0, 0.0]])}, {"glasses": np.array([[1e-9, 1e-9], [1.0, 1.0]])},
        features=(5, 7), sae_id=atlas.sae_id,
    )  # fmt: skip
    new = to_atlas(found, atlas)
    assert new.labels[5] == "glasses: glasses +40 points" and new.labels[7] == atlas.labels[7]
    assert new.effects["glasses"][5] == pytest.approx([-0.4, 0.4]) and np.isnan(new.effects["glasses"][6]).all()
    assert "turning it alone" in new.label_source
    with pytest.raises(LensError, match="another SAE"):
        to_atlas(made({"glasses": np.zeros((1, 2))}, {"glasses": np.ones((1, 2))}), atlas)


def test_a_stopped_dissection_goes_on_and_another_is_refused(
    tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = [int(i) for i in np.flatnonzero(tiny_lens.atlas.density > 0)[:3]]
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        dissect(tiny_lens, config(features=tuple(live)), tmp_path, on_step=stop)
    assert seen == [(1, 3), (2, 3)]
    measured: list[int] = []
    real = module.measure_feature

    def count(lens: Any, settings: Any, base: Any, feature: int) -> Any:
        measured.append(feature)
        return real(lens, settings, base, feature)

    monkeypatch.setattr(module, "measure_feature", count)
    found = dissect(tiny_lens, config(features=tuple(live)), tmp_path)
    assert measured == live[2:] and found.features == tuple(live)
    with pytest.raises(LensError, match="another dissection"):
        dissect(tiny_lens, config(features=tuple(live), beta=3.0), tmp_path)


def test_live_features_are_chosen(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    least = float(np.sort(tiny_lens.atlas.density)[-2])
    found = dissect(tiny_lens, config(min_density=least), tmp_path)
    assert set(found.features) == set(np.flatnonzero(tiny_lens.atlas.density >= least).tolist())
    with pytest.raises(LensError, match="Name features"):
        dissect(tiny_lens, config(features=(10_000,)), tmp_path)


def test_effects_can_live_in_the_lens(
    tiny_lens: DiffusionLens, copied_lens: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copied_lens()
    feature = int(np.argmax(tiny_lens.atlas.density))
    found = dissect(tiny_lens, config(features=(feature,)), tmp_path)
    store_in_lens(found, folder)
    verify(folder)
    opened = DiffusionLens.from_pretrained(folder)
    np.testing.assert_allclose(opened.atlas.effects["glasses"][feature], found.effects["glasses"][0], rtol=1e-6)
