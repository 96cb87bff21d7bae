"""Painted edits: nothing moves outside the mask, bit for bit, and inside it moves as without one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from sae_helpers import AGE, GENDER, random_maps, random_probe, random_sae
from torch import Tensor

from diffusion_lens.base.edits import describe
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.types import EditSpec, FeatureSet, Intervention, LensError
from diffusion_lens.base.where import from_link, parse_where, positions, to_link, where_of
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.steering.intervene import FeatureEdit, make_edit

SEEDS = (11, 12, 13, 14)
SAE = random_sae()
H = random_maps(4)
GRID = (H.shape[2], H.shape[3])


def random_mask(seed: int) -> np.ndarray:
    mask = np.random.default_rng(seed).random(GRID) > 0.5
    mask.flat[0], mask.flat[-1] = True, False
    return mask


MASK = random_mask(0)
WHERE = where_of(MASK)
ALL, NONE = where_of(np.ones(GRID, bool)), where_of(np.zeros(GRID, bool))


@dataclass(frozen=True)
class Context:
    """What an edit reads of ``StepContext``."""

    index: int = 0
    seeds: tuple[int, ...] = SEEDS
    n_steps: int = 3


def steer(beta: float, *ids: int, sae: SparseAutoencoder = SAE, **changes: Any) -> Intervention:
    features = FeatureSet(ids, tuple(1.0 for _ in ids), "gender", "male", sae.sae_id)
    return Intervention.at_beta(features, "scale", beta, **changes)


def applied(edit: FeatureEdit, h: Tensor = H, **changes: Any) -> Tensor:
    return edit.apply(h, Context(**changes))  # type: ignore[arg-type]


def at(h: Tensor, mask: np.ndarray) -> Tensor:
    """``h [n, c, y, x]`` at the positions of a mask, ``[n, c, m]``."""
    return h[:, :, torch.from_numpy(mask)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


@pytest.mark.parametrize("layout", ["position", "map"])
def test_outside_bit_for_bit_and_inside_as_without_a_mask(layout: str) -> None:
    sae = random_sae(layout)
    h = H.clone()
    h[:, 0] = -0.0  # what adding nothing would lose
    whole = applied(make_edit([steer(3.0, 1, 4, 7, sae=sae)], sae), h)
    painted = applied(make_edit([steer(3.0, 1, 4, 7, sae=sae, where=WHERE)], sae), h)
    assert same_bits(at(painted, ~MASK), at(h, ~MASK)) and same_bits(at(painted, MASK), at(whole, MASK))
    assert not torch.equal(at(whole, ~MASK), at(h, ~MASK)), "the mask had something to keep out"


def test_all_true_is_no_mask_and_all_false_is_no_edit() -> None:
    whole, everywhere = steer(3.0, 1, 4, hold=("age",)), steer(3.0, 1, 4, hold=("age",), where=ALL)
    probes = {"age": probe(AGE, 6)}
    assert same_bits(applied(make_edit([everywhere], SAE, probes)), applied(make_edit([whole], SAE, probes)))
    assert same_bits(applied(make_edit([replace(whole, where=NONE)], SAE, probes)), H)
    assert EditSpec((everywhere,)) == EditSpec((whole,)) != EditSpec((replace(whole, where=WHERE),))


def test_several_masks_act_each_in_its_place_and_in_order_where_they_meet() -> None:
    other = random_mask(1)
    first, second = steer(3.0, 1, 2, where=WHERE), steer(0.0, 2, 6, where=where_of(other))
    third = Intervention.at_beta(first.features, "add", 0.7)
    out = applied(make_edit([first, second, third], SAE))
    for a in (False, True):
        for b in (False, True):
            here = (a == MASK) & (b == other)
            acting = [
                *([replace(first, where=None)] if a else []),
                *([replace(second, where=None)] if b else []),
                third,
            ]
            assert here.any() and same_bits(at(out, here), at(applied(make_edit(acting, SAE)), here))


def test_chosen_images_steps_and_batches_are_as_without_a_mask() -> None:
    edit = make_edit([steer(3.0, *range(8), where=WHERE, only_seeds=frozenset({12}), window=(1, 2))], SAE)
    assert same_bits(applied(edit), H)
    out = applied(edit, index=1)
    assert same_bits(out[[0, 2, 3]], H[[0, 2, 3]]) and not torch.equal(out[1], H[1])
    assert same_bits(applied(edit, H[1:2], index=1, seeds=(12,))[0], out[1])


def probe(attribute: Any, seed: int) -> Probe:
    made = random_probe(attribute, n_steps=3)
    return replace(made, weight=torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(seed)))


def test_what_is_held_is_held_by_the_painted_positions_alone() -> None:
    held = probe(AGE, 6)
    steered = steer(3.0, 1, 4, 7, hold=("age",), where=WHERE)
    out = applied(make_edit([steered], SAE, {"gender": probe(GENDER, 5), "age": held}))
    assert same_bits(at(out, ~MASK), at(H, ~MASK))
    change = (out - H).flatten(1).double()
    assert change.abs().max() > 0.01
    rows = held.weight[0].double()
    rows = rows - rows.mean(0)
    assert (change @ rows.T).abs().max() < 1e-3 * change.norm() * rows.norm()
    # The nearest such change: what was taken out lies in the span of the rows as seen at these positions.
    free = applied(make_edit([replace(steered, hold=())], SAE))
    taken = (free - out).flatten(1).double().numpy()
    seen = rows.numpy() * np.tile(MASK.flatten(), H.shape[1])
    solution, *_ = np.linalg.lstsq(seen.T, taken.T, rcond=None)
    np.testing.assert_allclose(seen.T @ solution, taken.T, atol=1e-4)


@pytest.mark.parametrize("where", [(), ("",), ("#.", "#"), ("ab",), "##", ("#" * 300,), tuple("#" for _ in range(300))])
def test_what_is_no_place_is_refused(where: Any) -> None:
    with pytest.raises(LensError, match="Where features are turned"):
        steer(2.0, 1, where=where)


def test_a_mask_of_another_map_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(LensError, match=rf"a map of 1 × 2 positions; the site has {GRID[0]} × {GRID[1]}"):
        make_edit([steer(2.0, 1, where=("#.",))], SAE)


def test_it_comes_back_from_json_and_is_told_in_words() -> None:
    spec = EditSpec((steer(2.0, 1, where=WHERE),))
    back = from_plain(EditSpec, to_plain(spec))
    assert back == spec and back.interventions == spec.interventions
    assert f"at {MASK.sum()} of {MASK.size} positions" in describe(spec)
    plain = to_plain(EditSpec((steer(2.0, 1),)))
    del plain["interventions"][0]["where"]  # as it was kept before there were masks
    assert from_plain(EditSpec, plain) == EditSpec((steer(2.0, 1),))


def test_edits_without_a_mask_keep_their_digests() -> None:
    features = FeatureSet((3, 1), (0.5, 0.25), "gender", "male", "0123456789abcdef")
    assert EditSpec((Intervention(features, "scale", strength=1.0),)).digest == "bb52cb5f75de"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("rows=0-1", ("####", "####", "....")),
        ("cols=2-3, rows=1", ("....", "..##", "....")),
        ("rows=2,cols=0", ("....", "....", "#...")),
        ("#..#/..../####", ("#..#", "....", "####")),
    ],
)
def test_places_as_a_person_types_them(text: str, where: tuple[str, ...]) -> None:
    found = parse_where(text, (3, 4))
    assert found == where and from_link(to_link(found)) == found
    assert positions(found).shape == (3, 4) and where_of(positions(found)) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows=3", "Rows of this site run from 0 to 2"),
        ("cols=2-1", "Cols of this site run from 0 to 3"),
        ("top left", "is no place"),
        ("##/##/##", "a map of 3 × 2"),
        ("", "Where features are turned"),
    ],
)
def test_a_place_that_is_none_is_refused_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(LensError, match=words):
        parse_where(text, (3, 4))


@pytest.mark.parametrize("sampler", ["symmetric", "asymmetric"])
def test_in_a_model_the_site_differs_inside_alone(tiny_lens: DiffusionLens, sampler: Any) -> None:
    """At the first edited step, where nothing else differs yet, the edited map is the unedited one outside."""
    grid = tiny_lens.sae.cfg.spatial
    where = parse_where("cols=0", grid)
    mask = positions(where)
    plain = tiny_lens.generate(tiny_lens.prompts[0], seeds=range(2), capture=True)
    assert plain.activations is not None
    h = torch.from_numpy(plain.activations.h[:, 1].astype(np.float32))
    turn = tiny_lens.intervention("gender", "male", 6.0, window=(1, 3), sampler=sampler, where=where)
    out = applied(tiny_lens.edit(turn), h, index=1, seeds=(0, 1))  # type: ignore[arg-type]
    assert same_bits(at(out, ~mask), at(h, ~mask)) and not torch.equal(out, h)
    drawn = tiny_lens.generate(tiny_lens.prompts[0], turn, seeds=range(2))
    whole = tiny_lens.generate(tiny_lens.prompts[0], replace(turn, where=None), seeds=range(2))
    none = tiny_lens.generate(tiny_lens.prompts[0], replace(turn, where=tuple("." * grid[1] for _ in range(grid[0]))),
                              seeds=range(2))  # fmt: skip
    np.testing.assert_array_equal(none.images, plain.images)
    assert not np.array_equal(drawn.images, plain.images) and not np.array_equal(drawn.images, whole.images)
    assert drawn.edit is not None
    np.testing.assert_array_equal(tiny_lens.generate(drawn.request, edit=drawn.edit).images, drawn.images)
