"""The SAE: hand-made values, ties, edits by difference, round trips, and parity with the published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_helpers import SPATIAL, random_maps, random_sae
from safetensors import safe_open

from diffusion_lens.base.types import LensError
from diffusion_lens.features.sae import SAEConfig, SparseAutoencoder, from_published

LAYOUTS = ("position", "map")


def test_two_by_two_by_hand() -> None:
    sae = random_sae(d_in=2, d_sae=2, k=1, spatial=(1, 1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.0]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_dec.copy_(torch.tensor([1.0, -1.0]))
    x = torch.tensor([[3.0, 1.0], [0.0, 0.0], [-9.0, -9.0]])
    # x - b_dec: (2, 2), (-1, 1), (-10, -8); + b_enc: (2.5, 2), (-.5, 1), (-9.5, -8)
    assert torch.equal(sae.encode(x), torch.tensor([[2.5, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    # s + b_dec
    assert torch.equal(sae(x), torch.tensor([[3.5, -1.0], [1.0, 0.0], [1.0, -1.0]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_and_dense_codes_agree(layout: str) -> None:
    sae = random_sae(layout)
    x = sae.to_samples(random_maps(4))
    values, indices = sae.encode_sparse(x)
    dense = sae.encode(x)
    for row in range(len(x)):
        pre = sae.hidden_pre(x[row])
        slow = torch.zeros(sae.cfg.d_sae)
        for feature in sorted(range(sae.cfg.d_sae), key=lambda i, pre=pre: -float(pre[i]))[: sae.cfg.k]:
            slow[feature] = max(float(pre[feature]), 0.0)
        # One row at a time and all rows at once round differently in the last bits.
        assert torch.allclose(dense[row], slow, atol=1e-5)
    torch.testing.assert_close(sae.decode_sparse(values, indices), sae.decode(dense))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_and_back(layout: str) -> None:
    sae, h = random_sae(layout), random_maps(3)
    samples = sae.to_samples(h)
    assert samples.shape == ((3 * 6, 5) if layout == "position" else (3, 30))
    assert torch.equal(sae.from_samples(samples), h)


def test_position_samples_are_positions() -> None:
    h = random_maps(2)
    assert torch.equal(random_sae().to_samples(h)[6 + 2 * 1 + 1], h[1, :, 1, 1])


def test_other_map_sizes_pass_by_position_only() -> None:
    wider = torch.zeros(1, 5, 4, 4)
    assert random_sae().to_samples(wider).shape == (16, 5)
    with pytest.raises(LensError, match="5, 3, 2"):
        random_sae("map").to_samples(wider)
    with pytest.raises(LensError, match="mid_block"):
        random_sae().to_samples(torch.zeros(1, 6, 3, 2))


def test_ties_keep_k_features_and_edits_see_the_same_ones() -> None:
    sae = random_sae(k=2)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1.0)
    h = random_maps(2)
    acts = sae.encode(sae.to_samples(h))
    assert ((acts > 0).sum(1) == 2).all()
    everything = torch.zeros(1, 12)
    delta = sae.edit_delta(h, range(12), everything, everything)
    torch.testing.assert_close(delta, sae.from_samples(-acts @ sae.W_dec))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_edit_delta_is_the_difference_of_two_full_decodes(layout: str) -> None:
    sae, h = random_sae(layout), random_maps(3)
    ids = [7, 0, 3]
    scale = torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 0.5, 1.0]])
    shift = torch.tensor([[0.0, 0.0, 0.4], [0.0, 0.0, 0.0], [1.0, 0.0, -2.0]])
    acts = sae.encode(sae.to_samples(h)).reshape(3, -1, 12)
    turned = acts.clone()
    for image in range(3):
        for j, feature in enumerate(ids):
            turned[image, :, feature] = scale[image, j] * acts[image, :, feature] + shift[image, j]
    slow = sae.from_samples((sae.decode(turned) - sae.decode(acts)).flatten(0, 1))
    delta = sae.edit_delta(h, ids, scale, shift)
    torch.testing.assert_close(delta, slow, atol=1e-5, rtol=1e-5)
    assert torch.equal(delta[1], torch.zeros_like(h[1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_identity_is_bit_identical(layout: str) -> None:
    sae, h = random_sae(layout), random_maps(3)
    delta = sae.edit_delta(h, [1, 2], torch.ones(1, 2), torch.zeros(1, 2))
    assert delta.shape == h.shape
    assert torch.equal(h + delta, h)


def test_a_pure_shift_is_one_vector_everywhere() -> None:
    sae, h = random_sae(), random_maps(3)
    delta = sae.edit_delta(h, [4], torch.ones(1, 1), torch.full((1, 1), 2.5))
    torch.testing.assert_close(delta, (2.5 * sae.W_dec[4])[None, :, None, None].expand_as(h))


def test_half_precision_maps_come_back_in_half_precision() -> None:
    sae, h = random_sae(), random_maps(2).half()
    assert sae.edit_delta(h, [4], torch.full((1, 1), 2.0), torch.zeros(1, 1)).dtype == torch.float16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_captured_activations(layout: str) -> None:
    sae, h = random_sae(layout), random_maps(4, 3)
    codes = sae.codes(h.numpy())
    grid = SPATIAL if layout == "position" else (1, 1)
    assert codes.values.shape == codes.indices.shape == (4, 3, *grid, 4)
    acts = sae.encode(sae.to_samples(h[2, 1][None])).reshape(*grid, 12)
    rebuilt = torch.zeros(*grid, 12).scatter(
        -1, torch.as_tensor(codes.indices[2, 1]).long(), torch.as_tensor(codes.values[2, 1])
    )
    torch.testing.assert_close(rebuilt, acts)


def test_codes_take_the_size_of_the_maps_that_they_read() -> None:
    sae, h = random_sae(spatial=(1, 1)), random_maps(3, 2)
    codes, known = sae.codes(h), random_sae().codes(h)
    assert (codes.values == known.values).all() and codes.values.shape == (3, 2, *SPATIAL, 4)


def test_a_folded_scale_does_for_x_what_was_done_for_scaled_x() -> None:
    plain, folded = random_sae(), random_sae()
    folded.fold_scale(0.18)
    x = plain.to_samples(random_maps(4))
    torch.testing.assert_close(folded.encode(x), plain.encode(x * 0.18))
    torch.testing.assert_close(folded(x), plain(x * 0.18) / 0.18)
    assert folded.sae_id != plain.sae_id


def test_save_and_load(tmp_path: Path) -> None:
    sae = random_sae("map")
    sae.save(tmp_path)
    back = SparseAutoencoder.load(tmp_path)
    x = sae.to_samples(random_maps(2))
    assert back.cfg == sae.cfg and back.sae_id == sae.sae_id
    assert torch.equal(back(x), sae(x))
    assert not any(p.requires_grad for p in back.parameters())


def test_id_follows_weights_and_configuration() -> None:
    sae = random_sae()
    first = sae.sae_id
    assert random_sae().sae_id == first and len(first) == 16
    assert random_sae(hook_name="other").sae_id != first
    with torch.no_grad():
        sae.W_dec[3, 1] += 1e-3
    assert sae.sae_id != first


def test_configuration_faults_are_named() -> None:
    good = random_sae("map").cfg.model_dump()
    for change, word in (({"k": 13}, "k must"), ({"d_in": 31}, "d_in"), ({"spatial": (0, 2)}, "spatial")):
        with pytest.raises(LensError, match=word):
            SAEConfig.parse({**good, **change})


@pytest.mark.parametrize("case", ["p2_form", "sd_form_full_map_kernel"])
def test_parity_with_the_published_form(case: str) -> None:
    path = Path(__file__).parents[1] / "data" / f"difflens_{case}.safetensors"
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        record = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name.removeprefix("sae/"): value for name, value in record.items() if name.startswith("sae/")}
    spatial = (settings["map"], settings["map"])
    sae = from_published(state, k=settings["k"], spatial=spatial, hook_name="mid_block", model_id="published")
    h = record["h"]
    x = sae.to_samples(h)
    grid = sae.cfg.code_grid
    codes = sae.encode(x).reshape(len(h), *grid, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(codes, record["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.from_samples(sae(x)), record["reconstruction"], rtol=1e-5, atol=1e-5)
    ids = record["features"].tolist()
    bias = state["decoder.bias"][None, :, None, None]
    one, none = torch.ones(1, len(ids)), torch.zeros(1, len(ids))
    scaled = h + sae.edit_delta(h, ids, one * settings["scale"], none)
    torch.testing.assert_close(scaled + bias, record["edited/multiply_all/with_decoder_bias"], rtol=1e-5, atol=1e-5)
    added = h + sae.edit_delta(h, ids, one, one * settings["add"])
    torch.testing.assert_close(added + bias, record["edited/add_all/with_decoder_bias"], rtol=1e-5, atol=1e-5)


def test_a_published_checkpoint_of_another_form_is_refused() -> None:
    state = {"encoder.weight": torch.zeros(8, 4, 3, 3), "encoder.bias": torch.zeros(8), "decoder.bias": torch.zeros(4)}
    with pytest.raises(LensError, match=r"decoder\.weight"):
        from_published(state, k=2, spatial=(8, 8), hook_name="mid_block", model_id="m")
    state["decoder.weight"] = torch.zeros(8, 4, 3, 3)
    with pytest.raises(LensError, match="kernel"):
        from_published(state, k=2, spatial=(8, 8), hook_name="mid_block", model_id="m")
