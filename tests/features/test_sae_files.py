"""An SAE's folder: SAELens' form written and read, the form of version 0.4 with its id, everything else refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_helpers import random_maps, random_sae
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_lens.base.types import LensError
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.features.sae_identity import Origin, _smallest, fold, fold_decoder_norm

RECORDED = Path(__file__).parents[1] / "data" / "saelens_topk"
SHIPPED = Path(__file__).parents[2] / "assets"
SCALE = 0.1812250752695435


def weights_of(sae: SparseAutoencoder) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in sae.named_parameters()}


def write_04(folder: Path, sae: SparseAutoencoder, scale: float = SCALE) -> str:
    """The folder and the id of version 0.4, as its code made them."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {**sae.cfg.model_dump(mode="json"), "normalise": scale}
    digest = hashlib.sha256(json.dumps(cfg, sort_keys=True).encode())
    for name, value in sorted(weights_of(sae).items()):
        digest.update(name.encode())
        digest.update(value.numpy().data)
    sae_id = digest.hexdigest()[:16]
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=2))
    save_file(weights_of(sae), folder / "sae_weights.safetensors", metadata={"sae_id": sae_id})
    return sae_id


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def saelens_topk(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(feature_acts, sae_out)`` of SAELens' TopK, written down from its source; ``k`` largest before the ReLU."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    pre = (x - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=-1) if cfg["rescale_acts_by_decoder_norm"] else torch.ones(cfg["d_sae"])
    pre = pre * norm
    top = pre.topk(cfg["k"], dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    return acts, (acts / norm) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("layout", ["position", "map"])
@pytest.mark.parametrize("apply", [True, False])
def test_what_is_written_is_saelens_own_format(layout: str, apply: bool, tmp_path: Path) -> None:
    sae = random_sae(layout, apply_b_dec_to_input=apply)
    sae.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    values = json.loads((tmp_path / "cfg.json").read_text())
    metadata = values.pop("metadata")
    assert values == {
        "architecture": "topk", "d_in": sae.cfg.d_in, "d_sae": 12, "k": 4, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": apply, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }  # fmt: skip
    # Without a version from 6 on, SAELens takes the file for an older form and drops the metadata.
    assert int(metadata.pop("sae_lens_version").split(".")[0]) >= 6
    assert metadata == {
        "sae_lens_training_version": None, "model_name": "tiny", "hook_name": "mid_block", "layout": layout,
        "spatial": [3, 2],
    }  # fmt: skip
    x = sae.to_samples(random_maps(4))
    acts, out = saelens_topk(tmp_path, x)
    torch.testing.assert_close(acts, sae.encode(x))
    torch.testing.assert_close(out, sae(x))


@pytest.mark.parametrize("layout", ["position", "map"])
def test_save_and_load(layout: str, tmp_path: Path) -> None:
    sae = random_sae(layout, apply_b_dec_to_input=layout == "map")
    sae.save(tmp_path)
    back = SparseAutoencoder.load(tmp_path)
    assert back.cfg == sae.cfg and back.sae_id == sae.sae_id
    assert all(torch.equal(value, weights_of(sae)[name]) for name, value in weights_of(back).items())
    assert not any(p.requires_grad for p in back.parameters())


def test_a_topk_sae_that_saelens_made_is_read() -> None:
    """Recorded with SAELens 6.54.12: saved after training, decoder norms not folded."""
    expected = load_file(RECORDED / "expected.safetensors")
    sae = SparseAutoencoder.load(RECORDED)
    assert json.loads((RECORDED / "cfg.json").read_text())["rescale_acts_by_decoder_norm"]
    torch.testing.assert_close(sae.encode(expected["x"]), expected["feature_acts"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(expected["x"]), expected["sae_out"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))
    assert (sae.cfg.model_id, sae.cfg.hook_name, sae.cfg.spatial) == ("tiny", "mid_block", (3, 2))
    acts, out = saelens_topk(RECORDED, expected["x"])
    torch.testing.assert_close(acts, expected["feature_acts"])  # the twin of these tests is theirs
    torch.testing.assert_close(out, expected["sae_out"])


def test_what_saelens_does_not_say_is_left_open(tmp_path: Path) -> None:
    random_sae().save(tmp_path)
    save_file(weights_of(random_sae()), tmp_path / "sae_weights.safetensors")
    change_config(tmp_path, metadata={"sae_lens_version": "6.0.0", "hook_name": None})
    cfg = SparseAutoencoder.load(tmp_path).cfg
    assert (cfg.layout, cfg.spatial, cfg.hook_name, cfg.model_id) == ("position", (1, 1), "", "")
    change_config(tmp_path, metadata={"spatial": [3, 0]})
    with pytest.raises(LensError, match=r"cfg\.json: 'spatial\.1' is wrong"):
        SparseAutoencoder.load(tmp_path)


def test_what_saelens_has_defaults_for_may_be_missing(tmp_path: Path) -> None:
    random_sae().save(tmp_path)
    least = {"architecture": "topk", "d_in": 5, "d_sae": 12, "k": 4}
    (tmp_path / "cfg.json").write_text(json.dumps(least))
    save_file(weights_of(random_sae()), tmp_path / "sae_weights.safetensors")
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SparseAutoencoder.load(tmp_path).encode(x), random_sae().encode(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_precision_are_read_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    sae = random_sae()
    sae.save(tmp_path)
    change_config(tmp_path, dtype=str(dtype).removeprefix("torch."))
    other = {name: value.to(dtype) for name, value in weights_of(sae).items()}
    save_file(other, tmp_path / "sae_weights.safetensors")
    back = SparseAutoencoder.load(tmp_path)
    assert all(torch.equal(value, other[name].float()) for name, value in weights_of(back).items())


def test_decoder_norms_fold_exactly_as_an_obvious_twin() -> None:
    weights = weights_of(random_sae())
    folded = fold_decoder_norm(weights)
    for row, vector in enumerate(weights["W_dec"].double().numpy()):
        norm = np.sqrt((vector**2).sum())
        np.testing.assert_allclose(folded["W_dec"][row], vector / norm, rtol=1e-6)
        np.testing.assert_allclose(folded["W_enc"][:, row], weights["W_enc"][:, row].double() * norm, rtol=1e-6)
        np.testing.assert_allclose(folded["b_enc"][row], weights["b_enc"][row].double() * norm, rtol=1e-6)
    assert torch.equal(folded["b_dec"], weights["b_dec"])


@pytest.mark.parametrize("layout", ["position", "map"])
def test_an_sae_of_version_04_keeps_its_codes_and_its_id(layout: str, tmp_path: Path) -> None:
    old = random_sae(layout)
    sae_id = write_04(tmp_path / "old", old)
    sae = SparseAutoencoder.load(tmp_path / "old")
    x = old.to_samples(random_maps(4))
    torch.testing.assert_close(sae.encode(x), old.encode(x * SCALE))
    torch.testing.assert_close(sae(x), old(x * SCALE) / SCALE)
    assert sae.sae_id == sae_id
    sae.save(tmp_path / "new")
    back = SparseAutoencoder.load(tmp_path / "new")
    assert back.sae_id == sae_id and back.cfg == sae.cfg == old.cfg
    assert all(torch.equal(value, weights_of(sae)[name]) for name, value in weights_of(back).items())
    acts, out = saelens_topk(tmp_path / "new", x)
    torch.testing.assert_close(acts, sae.encode(x))
    torch.testing.assert_close(out, sae(x))


def test_an_sae_of_version_04_without_a_scale_keeps_its_id_too(tmp_path: Path) -> None:
    sae_id = write_04(tmp_path, random_sae(), 1.0)
    sae = SparseAutoencoder.load(tmp_path)
    assert sae.sae_id == random_sae().sae_id == sae_id and sae.origin is None


@pytest.mark.parametrize("scale", [SCALE, 0.9999, 7.3, 1e-6, 3e4])
def test_folded_weights_come_back_bit_for_bit(scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 3, shape, generator=generator)
        for name, shape in random_sae(d_in=64, d_sae=99).cfg.shapes().items()
    }
    weights["W_dec"][0, :3] = torch.tensor([0.0, -0.0, 1e-42])
    weights["W_enc"][0, :3] = torch.tensor([-1e-44, 1.1754944e-38, -1e-38])
    folded = fold(weights, scale)
    found = Origin.of(weights, scale).restore(folded)
    assert found is not None and found.keys() == weights.keys()
    assert all(torch.equal(found[name].view(torch.int32), value.view(torch.int32)) for name, value in weights.items())


def test_what_rounding_took_is_kept_in_as_few_bytes_as_hold_it(tmp_path: Path) -> None:
    for values, kind in (([127, -127], torch.int8), ([128, 0], torch.int32), ([0, -128], torch.int32)):
        kept = _smallest(torch.tensor(values, dtype=torch.int32))
        assert kept.dtype == kind and kept.tolist() == values
    old = random_sae()
    with torch.no_grad():
        old.W_dec[0, 0] = 1e-39  # folded, below what float32 keeps in full
    sae_id = write_04(tmp_path, old, 3e4)
    SparseAutoencoder.load(tmp_path).save(tmp_path)
    kept = load_file(tmp_path / "origin.safetensors")
    assert {name: value.dtype for name, value in kept.items()} == {
        "W_dec": torch.int32, "W_enc": torch.int8, "b_dec": torch.int8,
    }  # fmt: skip
    assert SparseAutoencoder.load(tmp_path).sae_id == sae_id


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec", "b_enc"])
@pytest.mark.parametrize("ulps", [-1, 1])
def test_the_old_id_is_for_the_old_weights_only(name: str, ulps: int, tmp_path: Path) -> None:
    """One bit of one weight, in memory or in the files: another SAE, whatever its files say."""
    sae_id = write_04(tmp_path / "old", random_sae())
    sae = SparseAutoencoder.load(tmp_path / "old")
    sae.save(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    for place in range(tensors[name].numel()):
        moved = {key: value.clone() for key, value in tensors.items()}
        moved[name].view(torch.int32).view(-1)[place] += ulps
        with torch.no_grad():
            sae.get_parameter(name).copy_(moved[name])
        assert sae.sae_id != sae_id
    save_file(moved, tmp_path / "sae_weights.safetensors", metadata={"sae_id": sae_id})
    with pytest.raises(LensError, match="does not belong"):
        SparseAutoencoder.load(tmp_path)
    save_file(moved, tmp_path / "sae_weights.safetensors")
    assert SparseAutoencoder.load(tmp_path).sae_id != sae_id
    sae.save(tmp_path)
    assert SparseAutoencoder.load(tmp_path).sae_id == sae.sae_id


def test_an_origin_is_no_name_to_be_borrowed(tmp_path: Path) -> None:
    sae_id = write_04(tmp_path / "old", random_sae())
    SparseAutoencoder.load(tmp_path / "old").save(tmp_path / "mine")
    random_sae(seed=4).save(tmp_path / "other")
    (tmp_path / "other" / "origin.safetensors").write_bytes((tmp_path / "mine" / "origin.safetensors").read_bytes())
    assert SparseAutoencoder.load(tmp_path / "other").sae_id == random_sae(seed=4).sae_id != sae_id
    (tmp_path / "mine" / "origin.safetensors").unlink()
    with pytest.raises(LensError, match="does not belong"):
        SparseAutoencoder.load(tmp_path / "mine")


def test_writing_over_an_sae_leaves_nothing_of_it(tmp_path: Path) -> None:
    write_04(tmp_path, random_sae())
    SparseAutoencoder.load(tmp_path).save(tmp_path)
    assert (tmp_path / "origin.safetensors").is_file()
    random_sae(seed=4).save(tmp_path)
    assert not (tmp_path / "origin.safetensors").exists()
    assert SparseAutoencoder.load(tmp_path).sae_id == random_sae(seed=4).sae_id


@pytest.mark.parametrize(
    ("lens", "sae_id"), [("portraits", "dad949d0a10216f9"), ("portraits-unconditional", "e2dd5410bff64fd3")]
)
def test_the_shipped_saes_keep_the_ids_of_version_04(lens: str, sae_id: str) -> None:
    folder = SHIPPED / lens / "sae"
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "topk"
    sae = SparseAutoencoder.load(folder)
    assert sae.sae_id == sae_id
    x = 5 * torch.randn(200, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
    acts, out = saelens_topk(folder, x)
    torch.testing.assert_close(acts, sae.encode(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(out, sae(x), atol=1e-5, rtol=1e-5)


ARCHITECTURES = ("standard", "gated", "jumprelu", "transcoder", "jumprelu_transcoder", "batchtopk", "temporal")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    random_sae().save(tmp_path)
    change_config(tmp_path, architecture=architecture)
    words = (
        f"{tmp_path} holds a SAELens SAE of architecture '{architecture}'; only TopK SAEs in the format of SAELens 6"
    )
    with pytest.raises(LensError, match=f"^{re.escape(words)}"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalize_activations": "layer_norm"}, "'layer_norm', which normalises every sample"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale', which rescales"),
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in', which expects"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening', which expects whitened"),
        ({"normalize_activations": ["new"]}, "which is not known here"),
        ({"normalize_activations": "new"}, "'new', which is not known here"),
        ({"reshape_activations": "hook_z"}, r"attention heads \(reshape_activations 'hook_z'\)"),
        ({"expansion": 4}, "'expansion' is wrong"),
        ({"finetuning_scaling_factor": True}, "'finetuning_scaling_factor' is wrong"),
        ({"k": 13}, "k must not exceed"),
        ({"k": None}, "'k' is wrong"),
        ({"d_sae": 13}, r"W_dec should be \[13, 5\]; found \[12, 5\]"),
        ({"d_in": 10**9}, "'d_in' is wrong"),
        ({"d_in": 10**30}, "'d_in' is wrong"),
        ({"architecture": {"topk": 1}}, "of architecture"),
        ({"metadata": 3}, "'metadata' is wrong"),
        ({"metadata": {"layout": "rows"}}, "'layout' is wrong"),
        ({"metadata": {"spatial": [10**9, 2]}}, r"'spatial\.0' is wrong"),
    ],
)
def test_what_would_be_read_wrong_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    random_sae().save(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(LensError, match=words) as told:
        SparseAutoencoder.load(tmp_path)
    assert str(told.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"d_in": 5, "num_latents": 12, "k": 4, "expansion_factor": 32}, "the format of sparsify"),
        ({"d_in": 5, "d_sae": 12, "activation_fn_str": "relu", "hook_name": "h"}, "SAELens before version 6"),
        ({"d_in": 5, "d_sae": 12, "k": 4}, "names no architecture"),
        ([1, 2], "does not hold a JSON object"),
    ],
)
def test_other_formats_are_refused_by_name(config: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(LensError, match=words) as told:
        SparseAutoencoder.load(tmp_path)
    assert str(told.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "words"),
    [("ae.pt", "dictionary_learning"), ("params.npz", "Gemma Scope"), ("x.txt", r"cfg\.json is missing")],
)
def test_other_formats_are_known_by_their_files(file: str, words: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(LensError, match=words) as told:
        SparseAutoencoder.load(tmp_path)
    assert str(tmp_path) in str(told.value)


def test_configurations_that_exhaust_a_reader_are_refused(tmp_path: Path) -> None:
    random_sae().save(tmp_path)
    path = tmp_path / "cfg.json"
    for text in ("[" * 100_000, '{"d_in": ' + "9" * 5000 + "}", '{"a": "\ud800"', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(LensError, match="not readable JSON"):
            SparseAutoencoder.load(tmp_path)
    path.write_text(json.dumps({"metadata": "x" * 2**20}))
    with pytest.raises(LensError, match="larger than any"):
        SparseAutoencoder.load(tmp_path)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    random_sae().save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)

    def refused(words: str) -> None:
        with pytest.raises(LensError, match=words):
            SparseAutoencoder.load(tmp_path)

    for part in (whole[:40], b"", whole[:-1], (2**60).to_bytes(8, "little") + whole[8:]):
        weights.write_bytes(part)
        refused(r"sae_weights\.safetensors is damaged")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("does not belong")
    for changes, words in (
        ({"W_enc": tensors["W_enc"].T.contiguous()}, r"W_enc should be \[5, 12\]; found \[12, 5\]"),
        ({"threshold": torch.ones(12)}, "holds 'threshold', which a TopK SAE does not have"),
        ({"b_enc": torch.full((12,), float("nan"))}, "b_enc is not finite"),
        ({"b_enc": torch.ones(12, dtype=torch.int64)}, "b_enc should be of type"),
    ):
        save_file({**tensors, **changes}, weights)
        refused(words)
    save_file({name: value for name, value in tensors.items() if name != "b_dec"}, weights)
    refused(r"b_dec should be \[5\]; found nothing")
    weights.unlink()
    refused("missing")


def test_a_damaged_origin_is_refused_by_name(tmp_path: Path) -> None:
    write_04(tmp_path, random_sae())
    SparseAutoencoder.load(tmp_path).save(tmp_path)
    path = tmp_path / "origin.safetensors"
    whole, ulps = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:50])
    with pytest.raises(LensError, match=r"origin\.safetensors is damaged"):
        SparseAutoencoder.load(tmp_path)
    for scale in (None, "nan", "-1", "0", "inf", "word"):
        save_file(ulps, path, metadata=None if scale is None else {"scale": scale})
        with pytest.raises(LensError, match="which scale"):
            SparseAutoencoder.load(tmp_path)
    save_file({**ulps, "b_dec": torch.zeros(6, dtype=torch.int8)}, path, metadata={"scale": "1.0"})
    with pytest.raises(LensError, match=r"b_dec should be \[5\]"):
        SparseAutoencoder.load(tmp_path)
    save_file({**ulps, "b_dec": torch.zeros(5)}, path, metadata={"scale": "1.0"})
    with pytest.raises(LensError, match="b_dec should be of type"):
        SparseAutoencoder.load(tmp_path)


def test_a_scale_of_version_04_that_overflows_is_refused(tmp_path: Path) -> None:
    write_04(tmp_path, random_sae(), 1e-39)
    with pytest.raises(LensError, match="not finite"):
        SparseAutoencoder.load(tmp_path)
    for scale in (0.0, -1.0):
        write_04(tmp_path, random_sae(), scale)
        with pytest.raises(LensError, match=r"cfg\.json: 'normalise' is wrong"):
            SparseAutoencoder.load(tmp_path)
