"""An edit as data: told apart by what decides it, kept as JSON, and put into words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_lens.base.edits import describe
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.types import EditSpec, FeatureSet, FittedMethod, Intervention, LensError

FEATURES = FeatureSet((3, 1), (0.5, 0.25), "gender", "male", "0123456789abcdef")
OTHERS = FeatureSet((7,), (0.125,), "gender", "female", "0123456789abcdef")
STEER = Intervention(
    FEATURES, "scale", strength=1.0, opposite=OTHERS, overrides=((1, 2.0),), window=(2, 5),
    only_seeds=frozenset({2**62, 5}), hold=("tone", "gender"),
)  # fmt: skip
METHOD = FittedMethod(
    "lora", "LoRA", "a" * 16, "gender", ("female", "male"), (0.5, 0.5),
    (("adapter", ""), ("n", None), ("rank", 8), ("scale", 1.0), ("through", True)), ("a nurse", None), (4, 5), "b" * 12,
)  # fmt: skip
SPECS = [
    EditSpec((STEER, replace(STEER, mode="add", only_seeds=None)), "c" * 12),
    EditSpec(method=METHOD, strength=-0.5),
    EditSpec.of_custom("my own", [1, 2], {"a": 0.5}),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_comes_back_from_json(spec: EditSpec) -> None:
    back = from_plain(EditSpec, json.loads(json.dumps(to_plain(spec))))
    assert back == spec and hash(back) == hash(spec) and back.digest == spec.digest
    # Field by field too: equality looks at what decides the edit alone.
    assert (back.interventions, back.hold_digest, back.method) == (spec.interventions, spec.hold_digest, spec.method)
    assert describe(back) == describe(spec) and repr(back) == repr(spec)


def test_options_keep_their_types() -> None:
    back = from_plain(EditSpec, json.loads(json.dumps(to_plain(SPECS[1]))))
    assert back.method is not None
    assert [type(value) for _, value in back.method.options] == [str, type(None), int, float, bool]


def test_what_does_not_decide_an_edit_does_not_tell_it_apart() -> None:
    spec = EditSpec((STEER,))
    shuffled = FeatureSet((1, 3), (9.0, 8.0), "gender", "man", FEATURES.sae_id)
    assert EditSpec((replace(STEER, features=shuffled),)) == spec
    assert EditSpec((replace(STEER, overrides=((1, 2.0), (3, 1.0))),)) == spec
    assert spec not in (None, "text", EditSpec((replace(STEER, features=OTHERS, opposite=FEATURES),)))


@pytest.mark.parametrize(
    "changed",
    [
        EditSpec(method=METHOD, strength=0.5),
        EditSpec(method=replace(METHOD, digest="d" * 12), strength=-0.5),
        EditSpec((STEER,), "c" * 12),
        EditSpec((STEER,), "d" * 12),
        EditSpec.of_custom("my own", [1, 2], {"a": 0.25}),
        EditSpec.of_custom("my own"),
    ],
)
def test_what_decides_an_edit_tells_it_apart(changed: EditSpec) -> None:
    known = {*SPECS, EditSpec((STEER,))}
    assert changed not in known and changed.digest not in {spec.digest for spec in known}


def test_a_spec_is_of_one_kind() -> None:
    for values in ({}, {"interventions": (STEER,), "method": METHOD}):
        with pytest.raises(LensError, match="made of interventions"):
            EditSpec(**values)


def test_what_is_steered_is_not_held() -> None:
    assert SPECS[0].holds == ("tone",) and SPECS[0].sae_id == FEATURES.sae_id
    assert SPECS[1].holds == () and SPECS[1].sae_id is None


def test_specs_in_words() -> None:
    assert describe(SPECS[0]) == (
        "scale 2 and 1 mirrored features for gender=male by beta 2, 1 set apart, steps 2-4, asymmetric, 2 chosen "
        "images; add 2 and 1 mirrored features for gender=male by beta 1, 1 set apart, steps 2-4, asymmetric; "
        f"holding tone · {SPECS[0].digest}"
    )
    assert describe(SPECS[1]) == f"LoRA towards gender female 50%, male 50%, strength -0.5 · {SPECS[1].digest}"
    assert describe(SPECS[2]) == f"my own · {SPECS[2].digest}"
    assert repr(SPECS[0]) == f"EditSpec(2 interventions · {SPECS[0].digest})"
    assert repr(SPECS[1]) == f"EditSpec(lora, strength -0.5 · {SPECS[1].digest})"


def test_digests_are_the_same_in_every_process() -> None:
    code = "from tests.base.test_edits import SPECS; print(*(s.digest for s in SPECS))"
    root = Path(__file__).resolve().parents[2]
    for seed in ("1", "2"):  # of Python's own hashes, which must not matter
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
        )  # fmt: skip
        assert done.stdout.split() == [spec.digest for spec in SPECS]


@pytest.mark.parametrize("mode", ["scale", "add", "suppress"])
@pytest.mark.parametrize("beta", [-3.0, 0.0, 0.1, 0.3, 1.0, 1.1, 2.3, 100.0, -99.7])
def test_beta_and_strength_are_each_others(mode: Any, beta: float) -> None:
    steer = Intervention.at_beta(FEATURES, mode, beta, overrides=[(3, beta)])
    assert steer.beta == beta and replace(steer, strength=steer.strength) == steer
    assert steer.overrides == ((3, steer.strength),)
    assert steer.strength == pytest.approx(beta - 1 if mode == "scale" else beta)
    assert steer == Intervention(FEATURES, mode, strength=steer.strength, overrides=((3, steer.strength),))


@pytest.mark.parametrize(
    ("mode", "own", "mirrored"),
    [
        ("scale", (1.5, 0.0), (0.5, 0.0)),
        ("add", (1.0, 0.5), (1.0, -0.5)),
        ("suppress", (0.5, 0.0), (1.5, 0.0)),
    ],
)
def test_coefficients_of_each_mode(mode: Any, own: tuple[float, float], mirrored: tuple[float, float]) -> None:
    steer = Intervention(FEATURES, mode, strength=0.5, opposite=OTHERS)
    assert list(steer.coefficients()) == [(3, *own), (1, *own), (7, *mirrored)]
    # An override is told before the opposite pole mirrors it: -0.5 there is what 0.5 is here.
    apart = dict((i, rest) for i, *rest in replace(steer, overrides=((7, -0.5), (1, -0.5))).coefficients())
    assert apart == {3: list(own), 1: list(mirrored), 7: list(own)}
    assert {(gain, shift) for _, gain, shift in replace(steer, strength=0).coefficients()} == {(1.0, 0.0)}


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 101.0])
def test_strengths_out_of_range_are_refused(strength: float) -> None:
    for values in ({"strength": strength}, {"strength": 0.0, "overrides": ((3, strength),)}):
        with pytest.raises(LensError, match="beta must be a finite number between -100 and 100"):
            Intervention(FEATURES, "add", **values)
    with pytest.raises(LensError, match="it is 101"):
        Intervention(FEATURES, "scale", strength=100.0)


def test_a_strength_is_named_so_that_no_beta_is_taken_for_one() -> None:
    with pytest.raises(TypeError, match="positional"):
        Intervention(FEATURES, "scale", 2.0)  # type: ignore[misc]
