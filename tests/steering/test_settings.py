"""From attributions to interventions: which features, which controls, told in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffusion_lens.base.types import Attribute, Attribution, FeatureSet, LensError
from diffusion_lens.results.manifest import Setting
from diffusion_lens.steering.settings import (
    LIKE,
    control_intervention,
    describe_setting,
    feature_sets,
    make_intervention,
    random_set,
)

GENDER = Attribute("gender", ("female", "male"))
AGE = Attribute("age", ("young", "adult", "old"))
SETTING = Setting(
    attribute="gender", target="male", n_features=2, poles="both", mode="scale", sampler="asymmetric",
    betas=(0.0, 1.0, 5.0),
)  # fmt: skip


def attribution_of(male: Sequence[float]) -> Attribution:
    scores = np.stack([-np.array(male), np.array(male)])[:, None].astype(np.float32)
    return Attribution(scores, 0.0, GENDER, "integrated_gradients", "zero", "sae", 4)


def test_poles_are_the_two_ends_of_the_ranking() -> None:
    features, opposite = feature_sets(attribution_of([5, -4, 3, -2, 1, 0]), SETTING, "male")
    assert features.ids == (0, 2) and opposite is not None and opposite.ids == (1, 3)
    assert opposite.scores == (4.0, 2.0) and opposite.target == "female"
    few, none = feature_sets(attribution_of([5, 0, 0]), SETTING, "male")
    assert few.ids == (0,) and none is None
    with pytest.raises(LensError, match="No feature speaks for gender = female"):
        feature_sets(attribution_of([5, 0, 0]), SETTING, "female")


def test_the_opposite_of_one_class_of_three_speaks_against_it() -> None:
    scores = np.array([[3.0, -1, 0, -2], [-3, 0, 4, 1], [0, 1, -4, 1]], np.float32)[:, None]
    attribution = Attribution(scores, 0.0, AGE, "integrated_gradients", "zero", "sae", 4)
    setting = SETTING.model_copy(update={"attribute": "age", "target": "young"})
    features, opposite = feature_sets(attribution, setting, "young")
    assert features.ids == (0,) and opposite is not None and opposite.ids == (3, 1)
    assert opposite.target == "other than young"


def test_the_opposite_of_one_class_of_three_is_ranked_over_the_window_too() -> None:
    young = np.array([[3.0, -5, -1], [3, -1, -2]], np.float32)  # [step, feature]
    attribution = Attribution(np.stack([young, -young, 0 * young]), 0.0, AGE, "lrp", "zero", "sae", 4)
    for window, worst in ((None, 1), ((1, 2), 2)):
        setting = SETTING.model_copy(update={"attribute": "age", "window": window, "n_features": 1})
        _, opposite = feature_sets(attribution, setting, "young")
        assert opposite is not None and opposite.ids == (worst,)


def test_among_equals_the_first_features_are_chosen() -> None:
    male = [9.0] + [-1.0] * 500
    _, opposite = feature_sets(attribution_of(male), SETTING, "male", 40)
    assert opposite is not None and opposite.ids == tuple(range(1, 41))


def test_controls_turn_other_live_features() -> None:
    turn = make_intervention(attribution_of([5, -4, 3, -2] + [0] * 8), SETTING, "male", 3.0)
    density = np.array([0.1] * 10 + [0.0, 0.0])
    control = control_intervention(turn, "random", density, 0)
    ids = {*control.features.ids, *(control.opposite.ids if control.opposite else ())}
    assert len(ids) == 4 and ids <= set(range(4, 10)) and control.strength == 3.0
    assert control == control_intervention(turn, "random", density, 0)
    assert control != control_intervention(turn, "random", density, 1)
    flipped = control_intervention(turn, "flip", density, 0)
    assert flipped.features == turn.opposite and flipped.opposite == turn.features
    with pytest.raises(LensError, match="Only 1 other live features"):
        random_set(turn.features, np.array([1.0] * 3), seed=0)


def test_random_features_are_as_active_as_those_they_stand_for() -> None:
    activity = np.geomspace(1e-3, 10.0, 400)[np.random.default_rng(3).permutation(400)]
    activity[::7] = 0.0
    order = np.argsort(-activity, kind="stable")
    features = FeatureSet(tuple(int(i) for i in order[:60:3]), (1.0,) * 20, "gender", "male", "s")
    drawn = random_set(features, activity, seed=1, avoid=(int(order[1]),))
    assert not {*drawn.ids} & {*features.ids, int(order[1])} and len({*drawn.ids}) == 20
    own, other = activity[list(features.ids)], activity[list(drawn.ids)]
    assert (other > 0).all() and np.abs(np.log(other / own)).max() < np.log(1.7)
    blind = np.random.default_rng(1).choice(np.flatnonzero(activity > 0), 20)
    assert own.sum() / activity[blind].sum() > 2, "the check above would pass for any draw"


def test_one_pole_and_another_number_of_features() -> None:
    attribution = attribution_of([5, -4, 3, -2, 1, 0])
    features, none = feature_sets(attribution, SETTING.model_copy(update={"poles": "one"}), "male")
    assert features.ids == (0, 2) and none is None
    features, opposite = feature_sets(attribution, SETTING, "male", 1)
    assert features.ids == (0,) and opposite is not None and opposite.ids == (1,)
    assert (opposite.attribute, opposite.sae_id) == ("gender", "sae")


def test_features_are_ranked_over_the_window_of_the_setting() -> None:
    male = np.array([[5.0, 0, -9, -1], [0, 2, -1, -3], [0, 2, -1, -3]], np.float32)  # [step, feature]
    attribution = Attribution(np.stack([-male, male]), 0.0, GENDER, "integrated_gradients", "zero", "sae", 4)
    for window, best, worst in ((None, 0, 2), ((1, 3), 1, 3)):
        setting = SETTING.model_copy(update={"window": window, "n_features": 1})
        features, opposite = feature_sets(attribution, setting, "male")
        assert features.ids == (best,) and opposite is not None and opposite.ids == (worst,)


def test_no_feature_stands_in_both_poles() -> None:
    """One that speaks for both classes belongs to the target."""
    scores = np.array([[2.0, 1, 0], [3.0, 0, 0]], np.float32)[:, None]
    features, opposite = feature_sets(Attribution(scores, 0.0, GENDER, "lrp", "zero", "sae", 4), SETTING, "male")
    assert features.ids == (0,) and opposite is not None and opposite.ids == (1,)


def test_an_intervention_takes_everything_from_its_setting() -> None:
    values: dict[str, Any] = {"mode": "add", "sampler": "symmetric", "window": (0, 1), "hold": ("age",)}
    made = make_intervention(attribution_of([5, -4, 3, -2]), SETTING.model_copy(update=values), "male", 0.5)
    assert {name: getattr(made, name) for name in values} == values
    assert made.strength == 0.5 and made.only_seeds is None
    assert made.features.ids == (0, 2) and made.opposite is not None and made.opposite.ids == (1, 3)
    few = make_intervention(
        attribution_of([5, -4, 3, -2]), SETTING, "male", 0.5, n_features=1, only_seeds=frozenset({3})
    )
    assert few.features.ids == (0,) and few.only_seeds == frozenset({3})


def nearest(activity: np.ndarray, own: int, taken: set[int]) -> set[int]:
    """The ``LIKE`` live features whose activity is fewest times more or less than ``own``'s, found one by one."""
    times = {i: max(a / activity[own], activity[own] / a) for i, a in enumerate(activity) if a > 0 and i not in taken}
    found: set[int] = set()
    while times and len(found) < LIKE:
        best = min(times, key=lambda i: times[i])
        found.add(best)
        del times[best]
    return found


def test_a_random_feature_is_any_of_the_nearest_in_activity_and_no_other() -> None:
    rng = np.random.default_rng(0)
    activity = np.exp(rng.uniform(-6, 3, 200))
    activity[rng.random(200) < 0.2] = 0.0
    for own in np.flatnonzero(activity)[:12].tolist():
        features = FeatureSet((own,), (1.0,), "gender", "male", "s")
        drawn = {random_set(features, activity, seed=seed).ids[0] for seed in range(120)}
        assert drawn == nearest(activity, own, {own})


def test_a_ratio_of_activities_counts_not_their_difference() -> None:
    far_in_ratio, far_in_difference = [0.01] * 20, [5.0] * 8
    activity = np.array([1.0, *far_in_ratio, *far_in_difference])
    features = FeatureSet((0,), (1.0,), "gender", "male", "s")
    assert {random_set(features, activity, seed=seed).ids[0] for seed in range(60)} == set(range(21, 29))


def test_the_most_active_feature_is_replaced_first_and_none_is_drawn_twice() -> None:
    activity = np.array([0.5, 4.0, 3.9, 3.8, 0.6, 0.55])
    features = FeatureSet((0, 1), (2.0, 1.0), "gender", "male", "s")
    for seed in range(30):
        rng, free = np.random.default_rng(seed), [2, 3, 4, 5]
        expected = []
        for own in (1, 0):
            like = sorted(free, key=lambda i, own=own: max(activity[i] / activity[own], activity[own] / activity[i]))
            expected.append(int(rng.choice(like)))
            free.remove(expected[-1])
        assert random_set(features, activity, seed=seed).ids == tuple(expected)


def test_a_control_says_what_it_is() -> None:
    features = FeatureSet((0,), (1.0,), "gender", "male", "the-sae")
    drawn = random_set(features, np.ones(9), seed=7)
    assert (drawn.scores, drawn.attribute, drawn.target, drawn.sae_id) == ((0.0,), "gender", "random (7)", "the-sae")
    exactly = random_set(features, np.array([1.0, 1.0, 0.0]), seed=0)
    assert exactly.ids == (1,), "one that is free is enough for one"


def test_controls_of_one_pole_and_of_both() -> None:
    both = make_intervention(attribution_of([5, -4, 3, -2] + [0] * 20), SETTING, "male", 3.0)
    activity = np.ones(24)
    one = replace(both, opposite=None)
    control = control_intervention(one, "random", activity, 5)
    assert control.opposite is None and control.features == random_set(one.features, activity, seed=5)
    with pytest.raises(LensError, match="has one pole only; exchange"):
        control_intervention(one, "flip", activity, 5)
    control = control_intervention(both, "random", activity, 5)
    assert both.opposite is not None
    assert control.features == random_set(both.features, activity, seed=5, avoid=both.opposite.ids)
    avoided = (*control.features.ids, *both.features.ids)
    assert control.opposite == random_set(both.opposite, activity, seed=6, avoid=avoided)
    few = np.array([1.0] * 8 + [0.0] * 16)
    for seed in range(20):
        drawn = control_intervention(both, "random", few, seed)
        assert drawn.opposite is not None
        assert sorted((*drawn.features.ids, *drawn.opposite.ids)) == [4, 5, 6, 7]


def test_a_setting_in_words() -> None:
    assert describe_setting(SETTING) == "2 features, both poles, scale, asymmetric, all steps"
    other = SETTING.model_copy(update={"poles": "one", "window": (3, 8), "hold": ("age", "tone"), "mode": "add"})
    text = "2 features, one pole, add, asymmetric, steps 3 to 7, holding age and tone"
    assert describe_setting(other) == text
    assert describe_setting(other, "random", 4) == f"{text}; control: random features as active (seed 4)"
    assert describe_setting(other, "random") == f"{text}; control: random features as active (seed 0)"
    assert describe_setting(other, "flip", 4) == f"{text}; control: poles exchanged"
