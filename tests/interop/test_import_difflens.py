"""DiffLens' published artefacts against recorded numbers, slow twins and damaged files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_lens.base.edits import describe
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.features.probes import Probe, load_probes
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.interop.convert_p2 import convert
from diffusion_lens.interop.import_difflens import (
    P2_ATTRIBUTES,
    PublishedAttribute,
    import_difflens,
    load_features,
    load_h_classifier,
    load_sae,
)
from diffusion_lens.interop.p2_format import P2Config
from diffusion_lens.interop.published import PublishedEdit, attribution_published, edit_published
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.manifest import verify

DATA = Path(__file__).parents[1] / "data"
CASES = ("p2_form", "sd_form_full_map_kernel")
GENDER = P2_ATTRIBUTES[0]


class Case:
    """A recorded case: ``t`` its tensors by name, ``settings`` theirs, the SAE and probe read from it."""

    def __init__(self, name: str, folder: Path) -> None:
        with safe_open(DATA / f"difflens_{name}.safetensors", "pt") as file:
            self.settings: dict[str, Any] = json.loads(file.metadata()["settings"])
            self.t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = {key.removeprefix("sae/"): value for key, value in self.t.items() if key.startswith("sae/")}
        write_sae(folder, weights, k=self.settings["k"], expansion_factor=4)
        side = self.settings["map"]
        self.sae = load_sae(folder, model_id="recorded", spatial=(side, side))
        classes = tuple(f"class {i}" for i in range(self.settings["classes"]))
        self.probe = Probe(
            Attribute("recorded", classes),
            self.t["probe/weight"][None],
            self.t["probe/bias"][None],
            torch.zeros(1),
            self.settings["temperature"],
        )


def write_sae(folder: Path, weights: dict[str, Tensor], **config: Any) -> None:
    """A published SAE folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae.safetensors")
    values = {"normalize_decoder": True, "num_latents": 0, "multi_topk": False, **config}
    (folder / "cfg.json").write_text(json.dumps({"d_in": weights["decoder.bias"].numel(), **values}))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path / "sae")


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def code_map(case: Case, codes: Tensor) -> Tensor:
    """Codes of samples as the published map ``[n, d_sae, y, x]``."""
    y, x = case.sae.cfg.code_grid
    return codes.reshape(-1, y, x, case.sae.cfg.d_sae).permute(0, 3, 1, 2)


# --- recorded numbers


def test_codes_and_reconstruction(case: Case) -> None:
    samples = case.sae.to_samples(case.t["h"])
    codes = case.sae.encode(samples)
    assert relative(code_map(case, codes), case.t["codes"]) < 1e-5
    assert torch.equal(code_map(case, codes) > 0, case.t["codes"] > 0)
    assert relative(case.sae.from_samples(case.sae.decode(codes)), case.t["reconstruction"]) < 1e-5


@pytest.mark.parametrize(
    ("recorded", "mode", "setting"), [("multiply_all", "scale", "scale"), ("add_all", "add", "add")]
)
def test_edits_as_published(case: Case, recorded: str, mode: Any, setting: str) -> None:
    want = case.t[f"edited/{recorded}/with_decoder_bias"]
    ids, beta = case.t["features"].tolist(), case.settings[setting]
    assert relative(edit_published(case.sae, case.t["h"], [(ids, beta)], mode), want) < 1e-5


def test_the_corrected_edit_is_the_published_one_without_the_bias(case: Case) -> None:
    ids, beta = case.t["features"].tolist(), case.settings["scale"]
    corrected = case.t["h"] + case.sae.edit_delta(
        case.t["h"], ids, torch.full((1, len(ids)), beta), torch.zeros(1, len(ids))
    )
    bias = case.t["sae/decoder.bias"][None, :, None, None]
    assert relative(corrected, case.t["edited/multiply_all/with_decoder_bias"] - bias) < 1e-5
    identity = edit_published(case.sae, case.t["h"], [(ids, 1.0)], "scale")
    assert relative(identity, case.t["h"] + bias) < 1e-6


def test_attribution_as_published(case: Case) -> None:
    assert torch.equal(case.probe.logits(case.t["h"], 0).argmax(dim=1), case.t["ig/target"])
    scores = attribution_published(case.sae, case.probe, case.t["h"], 0)
    assert relative(scores, case.t["ig/left_riemann_10"]) < 1e-5


# --- slow twins


def test_attribution_of_any_target_against_autograd(case: Case) -> None:
    """The twin convolves, differentiates and adds, one point of the path at a time."""
    weight, bias = case.t["sae/decoder.weight"], case.t["sae/decoder.bias"]
    decode = F.conv2d if case.settings["kernel_size"] == 1 else F.conv_transpose2d
    targets = torch.tensor([1, 0, case.settings["classes"] - 1])
    total = torch.zeros_like(case.t["codes"])
    for j in range(10):
        codes = (case.t["codes"] * j / 10).requires_grad_()
        probs = case.probe.probs(decode(codes, weight, bias), 0)
        probs[range(3), targets].sum().backward()
        assert codes.grad is not None
        total += codes.grad * case.t["codes"] / 10
    assert relative(attribution_published(case.sae, case.probe, case.t["h"], 0, targets=targets), total) < 1e-5


def test_several_turns_follow_one_another(case: Case) -> None:
    weight, bias = case.t["sae/decoder.weight"], case.t["sae/decoder.bias"]
    decode = F.conv2d if case.settings["kernel_size"] == 1 else F.conv_transpose2d
    first, second = case.t["features"][:3].tolist(), case.t["features"][2:].tolist()
    codes = case.t["codes"].clone()
    codes[:, first] *= 1.5
    codes[:, second] *= 3.0
    want = case.t["h"] + decode(codes - case.t["codes"], weight, bias)
    assert relative(edit_published(case.sae, case.t["h"], [(first, 1.5), (second, 3.0)], "scale"), want) < 1e-5


def test_heads_count_from_the_clean_end(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for t in range(49):
        state[f"linears.{t}.weight"] = torch.randn(2, 12, generator=generator)
        state[f"linears.{t}.bias"] = torch.randn(2, generator=generator)
    torch.save(state, tmp_path / "best_gender.pth")
    h = torch.randn(4, 3, 2, 2, generator=generator)
    probe = load_h_classifier(tmp_path / "best_gender.pth", GENDER, temperature=8.0)
    assert probe.n_steps == 50 and probe.temperature == 8.0
    for step in (1, 17, 49):
        head = torch.nn.Linear(12, 2)
        head.load_state_dict({k: state[f"linears.{49 - step}.{k}"] for k in ("weight", "bias")})
        torch.testing.assert_close(probe.logits(h, step), head(h.flatten(1)).detach())
    assert torch.equal(probe.probs(h, 0), torch.full((4, 2), 0.5))
    assert probe.accuracy[0] == 0.5 and probe.accuracy[1:].isnan().all()
    straight = load_h_classifier(tmp_path / "best_gender.pth", GENDER, order="sampling")
    assert torch.equal(straight.weight[3], state["linears.3.weight"]) and not straight.weight[49].any()


def test_forty_eight_heads_leave_out_both_ends(tmp_path: Path) -> None:
    state = {f"linears.{t}.weight": torch.full((2, 4), float(t)) for t in range(48)}
    state |= {f"linears.{t}.bias": torch.zeros(2) for t in range(48)}
    save_file(state, tmp_path / "heads.safetensors")
    probe = load_h_classifier(tmp_path / "heads.safetensors", GENDER)
    assert probe.weight[1, 0, 0] == 47 and probe.weight[48, 0, 0] == 0
    assert not probe.weight[0].any() and not probe.weight[49].any()


# --- feature lists


def test_features_keep_their_published_order(case: Case, tmp_path: Path) -> None:
    torch.save(torch.tensor([7, 3, 11, 0]), tmp_path / "female.pt")
    torch.save([5, 2], tmp_path / "male.pt")
    found = load_features(tmp_path, GENDER, case.sae)
    assert found["female"].ids == (7, 3, 11, 0) and found["male"].ids == (5, 2)
    assert found["female"].scores == (1.0, 0.75, 0.5, 0.25)
    assert found["male"].sae_id == case.sae.sae_id and found["male"].target == "male"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([0.5, 1.0]), "feature numbers"),
        (torch.tensor([[1, 2]]), "feature numbers"),
        ([], "feature numbers"),
        ({"ids": [1]}, "feature numbers"),
        (torch.tensor([1, 5000]), "outside the SAE"),
        (torch.tensor([-1, 5]), "outside the SAE"),
        (torch.tensor([4, 4]), "twice"),
    ],
)
def test_odd_feature_lists_are_refused(case: Case, tmp_path: Path, value: Any, words: str) -> None:
    torch.save(value, tmp_path / "female.pt")
    with pytest.raises(LensError, match=words):
        load_features(tmp_path, GENDER, case.sae)


def test_a_missing_feature_list_is_named(case: Case, tmp_path: Path) -> None:
    with pytest.raises(LensError, match=r"female\.pt"):
        load_features(tmp_path, GENDER, case.sae)


# --- refusals


def test_pickles_with_code_are_refused_and_not_run(case: Case, tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(witness),)

    torch.save(Malicious(), tmp_path / "female.pt")
    (tmp_path / "heads.pth").write_bytes(pickle.dumps({"linears.0.weight": Malicious()}, protocol=2))
    with pytest.raises(LensError, match="would run code"):
        load_features(tmp_path, GENDER, case.sae)
    with pytest.raises(LensError, match="would run code"):
        load_h_classifier(tmp_path / "heads.pth", GENDER)
    assert not witness.exists()


def test_odd_sae_folders_are_refused(case: Case, tmp_path: Path) -> None:
    weights = {key.removeprefix("sae/"): value for key, value in case.t.items() if key.startswith("sae/")}
    folder, side = tmp_path / "odd", case.settings["map"]

    def load() -> SparseAutoencoder:
        return load_sae(folder, model_id="m", spatial=(side, side))

    with pytest.raises(LensError, match=r"cfg\.json is missing"):
        load()
    write_sae(folder, weights, k=8, expansion_factor=5)
    with pytest.raises(LensError, match="do not belong together"):
        load()
    write_sae(folder, {k: v for k, v in weights.items() if k != "encoder.bias"}, k=8, expansion_factor=4)
    with pytest.raises(LensError, match=r"encoder\.bias"):
        load()
    write_sae(folder, weights, k=8, expansion_factor=4, kernel=1)
    with pytest.raises(LensError, match="kernel"):
        load()
    write_sae(folder, weights, expansion_factor=4)
    with pytest.raises(LensError, match="'k'"):
        load()
    write_sae(folder, weights, k=8, expansion_factor=4)
    (folder / "sae.safetensors").write_bytes(b"junk")
    with pytest.raises(LensError, match=r"sae\.safetensors"):
        load()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"linears.0.weight": torch.zeros(2, 4)}, "linears.0"),
        ({"linears.0.weight": torch.zeros(2, 4), "linear.0.bias": torch.zeros(2)}, "linear"),
        ({"linears.1.weight": torch.zeros(2, 4), "linears.1.bias": torch.zeros(2)}, "linears.0"),
        ({"linears.0.weight": torch.zeros(3, 4), "linears.0.bias": torch.zeros(3)}, "2 classes"),
        ({"linears.0.weight": torch.zeros(2, 4), "linears.0.bias": torch.zeros(1)}, "2 classes"),
    ],
)
def test_odd_classifiers_are_refused(tmp_path: Path, state: dict[str, Tensor], words: str) -> None:
    save_file(state, tmp_path / "heads.safetensors")
    with pytest.raises(LensError, match=words):
        load_h_classifier(tmp_path / "heads.safetensors", GENDER)


def test_more_heads_than_steps_are_refused(tmp_path: Path) -> None:
    state = {f"linears.{t}.{k}": torch.zeros(2, 4) if k == "weight" else torch.zeros(2) for t in range(9) for k in
             ("weight", "bias")}  # fmt: skip
    save_file(state, tmp_path / "heads.safetensors")
    with pytest.raises(LensError, match="too many"):
        load_h_classifier(tmp_path / "heads.safetensors", GENDER, n_steps=9)


# --- a whole lens


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded P2 weights with random artefacts of their bottleneck's size, imported; 6 steps, 5 heads."""
    folder = tmp_path_factory.mktemp("imported")
    shards = [safe_open(path, "pt") for path in sorted(DATA.glob("p2_b.*.safetensors"))]
    tensors = {key: shard.get_tensor(key) for shard in shards for key in shard.keys()}  # noqa: SIM118
    save_file(
        {k.removeprefix("weights/"): t for k, t in tensors.items() if k.startswith("weights/")},
        folder / "c.safetensors",
    )
    config = P2Config.parse(json.loads(shards[0].metadata()["settings"]))
    convert(folder / "c.safetensors", folder / "pipeline", config)
    g = torch.Generator().manual_seed(0)
    encoder = torch.randn(128, 64, 1, 1, generator=g) / 8
    weights = {
        "encoder.weight": encoder,
        "encoder.bias": torch.zeros(128),
        "decoder.weight": encoder.transpose(0, 1).contiguous(),
        "decoder.bias": torch.randn(64, generator=g) / 10,
    }
    write_sae(folder / "published", weights, k=16, expansion_factor=2)
    (folder / "features").mkdir()
    torch.save(torch.arange(0, 40), folder / "features" / "female.pt")
    torch.save(torch.arange(100, 60, -1), folder / "features" / "male.pt")
    heads = {}
    for t in range(5):
        heads |= {f"linears.{t}.weight": torch.randn(2, 64 * 64, generator=g) / 64, f"linears.{t}.bias": torch.zeros(2)}
    torch.save(heads, folder / "best_gender.pth")
    import_difflens(
        folder / "published",
        [PublishedAttribute(GENDER, folder / "features", folder / "best_gender.pth", temperature=8.0)],
        "p2-tiny",
        folder / "lens",
        source=str(folder / "pipeline"),
        n_steps=6,
    )
    return folder / "lens"


def test_imported_folder_is_sealed_and_complete(imported: Path) -> None:
    manifest = verify(imported)
    assert {"sae/cfg.json", "sae/sae_weights.safetensors", "probes.safetensors", "attribution.safetensors"} == set(
        manifest.files
    )
    sae = SparseAutoencoder.load(imported / "sae")
    assert sae.sae_id == manifest.sae_id and not sae.cfg.apply_b_dec_to_input
    assert load_probes(imported / "probes.safetensors")["gender"].temperature == 8.0


def test_imported_lens_ranks_generates_and_edits(imported: Path) -> None:
    lens = DiffusionLens.from_pretrained(imported, offline=True)
    male = lens.attributions["gender"].top_k(30, target="male")
    assert male.ids == tuple(range(100, 70, -1))
    base = lens.generate(None, seeds=[1, 2], capture=True)
    assert base.images.shape == (2, 16, 16, 3) and base.activations is not None
    published = lens.generate(base.request, PublishedEdit(lens.sae, ((male, 3.0),), "scale"))
    corrected = lens.generate(base.request, lens.intervention("gender", "male", 3.0))
    identity = lens.generate(base.request, lens.intervention("gender", "male", 1.0))
    assert np.array_equal(identity.images, base.images)
    assert not np.array_equal(published.images, base.images)
    assert not np.array_equal(corrected.images, base.images)
    assert not np.array_equal(published.images, corrected.images)
    assert published.edit is not None and "as published" in describe(published.edit)


def test_published_edit_refuses_a_foreign_sae(imported: Path, case: Case) -> None:
    lens = DiffusionLens.from_pretrained(imported, offline=True)
    male = lens.attributions["gender"].top_k(3, target="male")
    with pytest.raises(LensError, match="another SAE"):
        PublishedEdit(case.sae, ((male, 2.0),), "scale")


def test_import_refuses_a_folder_in_use_and_a_foreign_classifier(imported: Path, tmp_path: Path) -> None:
    source = imported.parent
    part = PublishedAttribute(GENDER, source / "features", source / "best_gender.pth")
    with pytest.raises(LensError, match="is not empty"):
        import_difflens(source / "published", [part], "p2-tiny", imported)
    heads = {"linears.0.weight": torch.zeros(2, 10), "linears.0.bias": torch.zeros(2)}
    save_file(heads, tmp_path / "other.safetensors")
    part = PublishedAttribute(GENDER, source / "features", tmp_path / "other.safetensors")
    with pytest.raises(LensError, match="reads 10 numbers"):
        import_difflens(source / "published", [part], "p2-tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
