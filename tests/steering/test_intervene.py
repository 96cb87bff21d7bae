"""Edits: every mode by a slow twin, both poles, overrides, several at once, chosen images, identity, drawn classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from sae_helpers import AGE, GENDER, random_maps, random_sae
from torch import Tensor

from diffusion_lens.base.edits import describe
from diffusion_lens.base.types import FeatureSet, Intervention, LensError
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.steering.intervene import FeatureEdit, draw_classes, make_edit

SEEDS = (11, 12, 13, 14)
SAE = random_sae()
H = random_maps(4)


@dataclass(frozen=True)
class Context:
    """What an edit reads of ``StepContext``."""

    index: int
    seeds: tuple[int, ...]


def features(*ids: int, target: str = "male", sae: SparseAutoencoder = SAE) -> FeatureSet:
    return FeatureSet(ids, tuple(1.0 for _ in ids), "gender", target, sae.sae_id)


def steer(mode: str, beta: float, *ids: int, **changes: Any) -> Intervention:
    return Intervention.at_beta(features(*ids), mode, beta, **changes)  # type: ignore[arg-type]


def applied(edit: FeatureEdit, h: Tensor = H, step: int = 0, seeds: tuple[int, ...] = SEEDS) -> Tensor:
    return edit.apply(h, Context(step, seeds))  # type: ignore[arg-type]


def slow(h: Tensor, change: dict[int, tuple[float, float]], sae: SparseAutoencoder = SAE) -> Tensor:
    """``h + decode(s') - decode(s)`` with dense codes; ``change``: feature → (scale, shift)."""
    acts = sae.encode(sae.to_samples(h))
    turned = acts.clone()
    for feature, (scale, shift) in change.items():
        turned[:, feature] = scale * acts[:, feature] + shift
    return h + sae.from_samples(sae.decode(turned) - sae.decode(acts))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "beta", "own", "mirrored"),
    [
        ("scale", 1.7, (1.7, 0.0), (0.3, 0.0)),
        ("scale", 0.0, (0.0, 0.0), (2.0, 0.0)),
        ("add", 0.8, (1.0, 0.8), (1.0, -0.8)),
        ("suppress", 0.25, (0.75, 0.0), (1.25, 0.0)),
        ("suppress", 1.0, (0.0, 0.0), (2.0, 0.0)),
    ],
)
def test_modes_and_poles(mode: str, beta: float, own: tuple[float, float], mirrored: tuple[float, float]) -> None:
    one = steer(mode, beta, 2, 5)
    both = steer(mode, beta, 2, 5, opposite=features(7, target="female"))
    close(applied(make_edit([one], SAE)), slow(H, {2: own, 5: own}))
    close(applied(make_edit([both], SAE)), slow(H, {2: own, 5: own, 7: mirrored}))
    assert not torch.equal(applied(make_edit([one], SAE)), H)


@pytest.mark.parametrize(("mode", "beta"), [("scale", 1.0), ("add", 0.0), ("suppress", 0.0)])
@pytest.mark.parametrize("layout", ["position", "map"])
def test_identity_is_bit_identical(mode: str, beta: float, layout: str) -> None:
    sae = random_sae(layout)
    pole = FeatureSet((1, 2), (1.0, 1.0), "gender", "male", sae.sae_id)
    other = FeatureSet((3,), (1.0,), "gender", "female", sae.sae_id)
    edit = make_edit([Intervention.at_beta(pole, mode, beta, opposite=other)], sae)  # type: ignore[arg-type]
    h = H.clone()
    h[0, 0, 0, 0] = -0.0
    out = applied(edit, h)
    assert out.numpy().tobytes() == h.numpy().tobytes()


def test_map_layout() -> None:
    sae = random_sae("map")
    pole = FeatureSet((4,), (1.0,), "gender", "male", sae.sae_id)
    close(applied(make_edit([Intervention.at_beta(pole, "scale", 3.0)], sae)), slow(H, {4: (3.0, 0.0)}, sae))


def test_overrides_replace_the_master_beta_in_either_pole() -> None:
    edit = make_edit(
        [steer("scale", 2.0, 1, 2, opposite=features(3, 4, target="female"), overrides=((2, 0.5), (4, 1.25)))], SAE
    )
    close(applied(edit), slow(H, {1: (2.0, 0), 2: (0.5, 0), 3: (0.0, 0), 4: (0.75, 0)}))


def test_several_interventions_act_one_after_the_other() -> None:
    first, second = steer("scale", 3.0, 1, 2), steer("add", 0.5, 2, 6)
    close(applied(make_edit([first, second], SAE)), slow(H, {1: (3.0, 0), 2: (3.0, 0.5), 6: (1.0, 0.5)}))
    close(applied(make_edit([second, first], SAE)), slow(H, {1: (3.0, 0), 2: (3.0, 1.5), 6: (1.0, 0.5)}))
    off_twice = [steer("suppress", 1.0, 2), steer("scale", 0.0, 2)]
    close(applied(make_edit(off_twice, SAE)), slow(H, {2: (0.0, 0)}))


def test_only_seeds_edits_those_images_alone() -> None:
    women = steer("scale", 2.5, 2, only_seeds=frozenset({12}))
    men = steer("add", 1.5, 5, only_seeds=frozenset({11, 14}))
    out = applied(make_edit([women, men], SAE))
    close(out[1], slow(H[1:2], {2: (2.5, 0)})[0])
    close(out[[0, 3]], slow(H[[0, 3]], {5: (1.0, 1.5)}))
    assert torch.equal(out[2], H[2])
    nobody = make_edit([steer("scale", 2.5, 2, only_seeds=frozenset())], SAE)
    assert torch.equal(applied(nobody), H)


def test_an_image_is_edited_alike_in_any_batch() -> None:
    edit = make_edit([steer("scale", 2.0, 2), steer("add", 1.0, 3, only_seeds=frozenset({13}))], SAE)
    alone = applied(edit, H[2:3], seeds=(13,))
    close(applied(edit)[2], alone[0])
    with pytest.raises(LensError, match="one seed per image"):
        applied(edit, H, seeds=(1, 2))


def test_windows() -> None:
    early, late = steer("scale", 2.0, 2, window=(1, 3)), steer("add", 1.0, 3, window=(5, 6))
    edit = make_edit([early, late], SAE)
    assert edit.window == (1, 6)
    assert make_edit([early, steer("add", 1.0, 3)], SAE).window is None
    for step in range(7):
        change = {2: (2.0, 0.0)} if 1 <= step < 3 else {3: (1.0, 1.0)} if step == 5 else {}
        close(applied(edit, step=step), slow(H, change))


def test_faults_are_named() -> None:
    good = steer("scale", 2.0, 1, 2)
    foreign = replace(good, features=replace(good.features, sae_id="0123456789abcdef"))
    with pytest.raises(LensError, match="0123456789abcdef"):
        make_edit([good, foreign], SAE)
    with pytest.raises(LensError, match="0123456789abcdef"):
        make_edit([replace(good, opposite=replace(features(5), sae_id="0123456789abcdef"))], SAE)
    with pytest.raises(LensError, match="Feature 12"):
        make_edit([steer("scale", 2.0, 12)], SAE)
    for overrides in (((3, 1.0),), ((1, 1.0), (1, 2.0))):
        with pytest.raises(LensError, match="override"):
            make_edit([replace(good, overrides=overrides)], SAE)
    with pytest.raises(LensError, match="one sampler"):
        make_edit([good, replace(good, sampler="symmetric")], SAE)
    with pytest.raises(LensError, match="at least one"):
        make_edit([], SAE)


def test_specs_tell_edits_apart() -> None:
    base = steer("scale", 2.0, 1, 2)
    same = make_edit([steer("scale", 2.0, 1, 2)], SAE).spec
    assert make_edit([base], SAE).spec == same
    assert "gender=male" in describe(same) and "beta 2" in describe(same)
    others = [
        replace(base, strength=1.0000001),
        replace(base, mode="add"),
        replace(base, overrides=((1, 2.5),)),
        replace(base, features=features(1, 3)),
        replace(base, opposite=features(9)),
        replace(base, window=(0, 5)),
        replace(base, sampler="symmetric"),
        replace(base, only_seeds=frozenset({1})),
        replace(base, only_seeds=frozenset({2})),
    ]
    specs = {same, *(make_edit([other], SAE).spec for other in others)}
    assert len(specs) == len({spec.digest for spec in specs}) == len({describe(spec) for spec in specs}) == 10
    assert make_edit([base, others[1]], SAE).spec != make_edit([others[1], base], SAE).spec


def test_drawn_classes_meet_the_target_and_part_the_images() -> None:
    target = {"young": 0.2, "old": 0.5, "adult": 0.3}
    drawn = draw_classes(AGE, target, range(4000), seed=3)
    assert tuple(drawn) == AGE.classes
    assert sorted(seed for images in drawn.values() for seed in images) == list(range(4000))
    for label, share in target.items():
        # Four standard errors at n = 4000 are at most 3.2 points.
        assert abs(len(drawn[label]) / 4000 - share) < 0.032


def test_a_draw_depends_on_the_image_alone() -> None:
    target = {"female": 0.5, "male": 0.5}
    whole = draw_classes(GENDER, target, range(200), seed=3)
    part = draw_classes(GENDER, target, [150, 7, 42], seed=3)
    for label in GENDER.classes:
        assert part[label] == whole[label] & {150, 7, 42}
    assert draw_classes(GENDER, target, range(200), seed=4) != whole


def test_extreme_and_faulty_targets() -> None:
    drawn = draw_classes(GENDER, {"male": 1.0}, range(50), seed=0)
    assert drawn == {"female": frozenset(), "male": frozenset(range(50))}
    for target in ({"male": 0.7}, {"male": 1.5, "female": -0.5}, {"male": float("nan")}):
        with pytest.raises(LensError, match="add up to 1"):
            draw_classes(GENDER, target, [1], seed=0)
    with pytest.raises(LensError, match="no class"):
        draw_classes(GENDER, {"other": 1.0}, [1], seed=0)
