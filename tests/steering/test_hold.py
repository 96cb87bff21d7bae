"""Attributes held still: their probes read what they read before, and everything else is as a slow twin makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from sae_helpers import AGE, GENDER, random_maps, random_probe, random_sae
from torch import Tensor

from diffusion_lens.base.edits import describe
from diffusion_lens.base.types import Attribute, FeatureSet, Intervention, LensError
from diffusion_lens.features.probes import Probe
from diffusion_lens.steering.hold import Hold, _directions, make_hold
from diffusion_lens.steering.intervene import FeatureEdit, make_edit

TONE = Attribute("tone", ("light", "medium", "brown", "dark"))
SAE = random_sae()
H = random_maps(4)
SEEDS = (11, 12, 13, 14)
N_STEPS = 3


@dataclass(frozen=True)
class Context:
    """What an edit reads of ``StepContext``."""

    index: int
    seeds: tuple[int, ...] = SEEDS
    n_steps: int = N_STEPS


def probe(attribute: Attribute, seed: int) -> Probe:
    made = random_probe(attribute, n_steps=N_STEPS)
    weight = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(seed))
    return replace(made, weight=weight)


PROBES = {"gender": probe(GENDER, 5), "age": probe(AGE, 6), "tone": probe(TONE, 7)}


def steer(beta: float = 2.5, hold: tuple[str, ...] = (), attribute: str = "gender", **changes: Any) -> Intervention:
    features = FeatureSet((1, 4, 7), (1.0, 1.0, 1.0), attribute, "male", SAE.sae_id)
    return Intervention.at_beta(features, "scale", beta, hold=hold, **changes)


def applied(edit: FeatureEdit, step: int = 0, **changes: Any) -> Tensor:
    return edit.apply(H, Context(step, **changes))  # type: ignore[arg-type]


def slow(change: Tensor, step: int, names: tuple[str, ...]) -> Tensor:
    """The residual of a least-squares fit of each image's change by the probes' rows, in float64."""
    rows = np.concatenate([PROBES[name].weight[step].double().numpy() for name in names])
    rows = np.concatenate([rows[:3] - rows[:3].mean(0), rows[3:] - rows[3:].mean(0)]) if len(names) == 2 else (
        rows - rows.mean(0)
    )  # fmt: skip
    flat = change.flatten(1).double().numpy()
    found, *_ = np.linalg.lstsq(rows.T, flat.T, rcond=1e-9)
    return torch.from_numpy(flat - (rows.T @ found).T).float().view_as(change)


@pytest.mark.parametrize("step", range(N_STEPS))
@pytest.mark.parametrize("names", [("age",), ("age", "tone")])
def test_the_edit_is_what_the_held_probes_do_not_read(step: int, names: tuple[str, ...]) -> None:
    plain = applied(make_edit([steer()], SAE), step) - H
    held = applied(make_edit([steer(hold=names)], SAE, PROBES), step) - H
    torch.testing.assert_close(held, slow(plain, step, names), atol=1e-5, rtol=1e-4)
    assert held.norm() < plain.norm()


def test_held_probes_read_the_same_and_others_do_not() -> None:
    edited = applied(make_edit([steer(hold=("age", "tone"))], SAE, PROBES), 1)
    for name in ("age", "tone"):
        torch.testing.assert_close(PROBES[name].probs(edited, 1), PROBES[name].probs(H, 1), atol=1e-5, rtol=0)
        assert not torch.allclose(PROBES[name].probs(edited, 2), PROBES[name].probs(H, 2), atol=1e-3)
    assert not torch.allclose(PROBES["gender"].probs(edited, 1), PROBES["gender"].probs(H, 1), atol=1e-2)


def test_the_identity_stays_bit_identical() -> None:
    edit = make_edit([steer(1.0, hold=("age", "tone"))], SAE, PROBES)
    assert torch.equal(applied(edit), H)
    some = applied(make_edit([steer(hold=("age",), only_seeds=frozenset({12}))], SAE, PROBES))
    assert torch.equal(some[[0, 2, 3]], H[[0, 2, 3]]) and not torch.equal(some[1], H[1])


def test_what_is_turned_is_not_held() -> None:
    gender, age = steer(hold=("age", "tone")), steer(0.2, hold=("gender", "tone"), attribute="age")
    both = make_edit([gender, age], SAE, PROBES)
    assert both.hold is not None and both.hold.names == ("tone",)
    assert make_edit([replace(gender, hold=("gender",))], SAE, PROBES).hold is None


def test_holding_shows_in_the_spec() -> None:
    plain, held = make_edit([steer()], SAE).spec, make_edit([steer(hold=("tone", "age"))], SAE, PROBES).spec
    assert held.holds == ("age", "tone") and "holding age, tone" in describe(held) and plain.digest != held.digest
    assert make_edit([steer(hold=("age", "tone", "age"))], SAE, PROBES).spec == held
    other = make_edit([steer(hold=("age", "tone"))], SAE, {**PROBES, "age": probe(AGE, 60)}).spec
    assert other != held  # the same words, other probes


def test_a_run_of_other_length_takes_the_head_at_the_same_part_of_the_way() -> None:
    hold, change = Hold((PROBES["age"],)), random_maps(2)
    for step, n_steps, head in ((0, 6, 0), (1, 6, 0), (2, 6, 1), (5, 6, 2), (0, 1, 0), (1, 2, 1)):
        torch.testing.assert_close(hold.free(change, step, n_steps), hold.free(change, head, N_STEPS))


@pytest.mark.parametrize("small", ["age", "tone"])
def test_attributes_count_alike_whatever_the_size_of_their_probes(small: str) -> None:
    """Weights a million times smaller read the same directions, and are held as still."""
    faint = {**PROBES, small: replace(PROBES[small], weight=PROBES[small].weight * 1e-6)}
    change = random_maps(3)
    for step in range(N_STEPS):
        held = Hold((faint["age"], faint["tone"])).free(change, step, N_STEPS)
        torch.testing.assert_close(held, slow(change, step, ("age", "tone")), atol=1e-5, rtol=1e-4)
        assert Hold((faint["age"], faint["tone"])).basis[step].shape == (30, 2 + 3)


@pytest.mark.parametrize(("weak", "count"), [(1.2e-4, 3), (0.8e-4, 2)])
def test_directions_far_weaker_than_the_strongest_are_rounding(weak: float, count: int) -> None:
    """Rows ±e₁, ±e₂, ±weak·e₃: singular values in the ratio 1 : 1 : weak, the strongest 1/√2."""
    rows = torch.diag(torch.tensor([1.0, 1.0, weak, 0.0]))[:3]
    found = _directions([torch.cat([rows, -rows])])
    torch.testing.assert_close(found @ found.T, torch.diag((torch.arange(4) < count).float()))


def test_the_strongest_direction_is_the_measure() -> None:
    rows = torch.diag(torch.tensor([1.0, 0.5e-4, 0.0]))[:2]
    found = _directions([torch.cat([rows, -rows])])
    torch.testing.assert_close(found @ found.T, torch.diag(torch.tensor([1.0, 0.0, 0.0])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_change_stays_in_its_own_precision(dtype: torch.dtype) -> None:
    hold, change = Hold((PROBES["age"],)), random_maps(2)
    freed = hold.free(change.to(dtype), 0, N_STEPS)
    assert freed.dtype == dtype
    torch.testing.assert_close(freed.float(), hold.free(change, 0, N_STEPS), atol=1e-2, rtol=1e-2)


def test_probes_that_say_nothing_hold_nothing() -> None:
    blank = replace(PROBES["age"], weight=torch.zeros_like(PROBES["age"].weight))
    change = random_maps(2)
    torch.testing.assert_close(Hold((blank,)).free(change, 0, N_STEPS), change)


def test_holding_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(LensError, match="'wealth' cannot be held still: the lens has probes of gender, age, tone"):
        make_edit([steer(hold=("wealth",))], SAE, PROBES)
    with pytest.raises(LensError, match="probes of nothing"):
        make_edit([steer(hold=("age",))], SAE)
    with pytest.raises(LensError, match="30 numbers per image"):
        Hold((PROBES["age"],)).free(torch.zeros(1, 4, 3, 2), 0, N_STEPS)
    assert make_hold(PROBES, ()) is None


def test_the_directions_of_the_same_probes_are_found_once() -> None:
    assert make_hold(PROBES, ("age", "tone")) is make_hold(PROBES, ("tone", "age"))
    assert make_hold(PROBES, ("age",)) is not make_hold({"age": probe(AGE, 60)}, ("age",))
