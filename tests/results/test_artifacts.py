"""A lens folder names what is wrong with it; everything that is written reads back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measured import measured

from diffusion_lens.base.files import (
    atomic_path,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
    sha256_of,
    write_json,
)
from diffusion_lens.base.sheets import load_sheets, save_sheets
from diffusion_lens.base.types import Attribute, Attribution, GenerationRequest, LensError
from diffusion_lens.features.probes import Probe, load_probes, save_probes
from diffusion_lens.results.as_json import FIGURES
from diffusion_lens.results.manifest import (
    MANIFEST,
    AttributeConfig,
    BaseModelRef,
    Manifest,
    read_manifest,
    required,
    verify,
    write_manifest,
)
from diffusion_lens.results.measurement_files import Missing
from diffusion_lens.results.records import (
    load_attributions,
    load_point,
    load_sweep,
    save_attributions,
    save_point,
    save_sweep,
    to_plain,
)
from diffusion_lens.results.sweeps import SweepPoint, SweepResult

GENDER = Attribute("gender", ("female", "male"))


def manifest() -> Manifest:
    return Manifest(
        name="tiny",
        base_model=BaseModelRef(id="tiny", source="pipeline", bundled=True),
        hook_name="mid_block",
        scheduler="DDIMScheduler",
        n_steps=4,
        guidance_scale=2.0,
        attributes=(AttributeConfig(name="gender", classes=("female", "male")),),
        sae_id="0" * 16,
        classifier_id="1" * 16,
    )


def tiny_folder(path: Path) -> Path:
    """A sealed folder of what every lens has, an atlas, and a pipeline of one file."""
    save_tensors(path / "atlas.safetensors", {"a": np.arange(1000.0)})
    for name in required(manifest()):
        if name.endswith(".json"):
            write_json(path / name, {"k": 1})
        else:
            save_tensors(path / name, {"b": np.ones(3)})
    write_manifest(path, manifest())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed folder of what every lens has, an atlas, and a pipeline of one file."""
    return tiny_folder(tmp_path)


def test_a_sealed_folder_verifies_and_its_manifest_reads_back(folder: Path) -> None:
    found = verify(folder)
    assert set(found.files) == {*required(manifest()), "atlas.safetensors"}
    assert found.model_copy(update={"files": {}}) == manifest()
    assert found.files["sae/cfg.json"].sha256 == sha256_of(folder / "sae" / "cfg.json")


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def leave_out(folder: Path, name: str) -> None:
    """Take a file out of the manifest's list."""
    edit_manifest(folder, lambda values: values["files"].pop(name))


def negate(folder: Path, name: str) -> None:
    """Turn a file's numbers round."""
    save_tensors(folder / name, {key: -value for key, value in load_tensors(folder / name).items()})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / "atlas.safetensors").unlink(), "atlas.safetensors is missing"),
    "truncated": (lambda f: (f / "atlas.safetensors").write_bytes(b"short"), "atlas.safetensors is truncated: 5 of"),
    "altered": (lambda f: flip_last_byte(f / "sae/sae_weights.safetensors"), "sae_weights.safetensors is not the file"),
    "longer": (lambda f: (f / "sae/cfg.json").open("a").write(" "), "sae/cfg.json is not the file"),
    "not listed": (lambda f: (leave_out(f, "atlas.safetensors"), negate(f, "atlas.safetensors")), "does not belong"),
    "not demanded": (lambda f: (leave_out(f, n := "probes.safetensors"), (f / n).unlink()), "does not list probes"),
    "foreign": (lambda f: (f / "sae" / "extra.bin").write_bytes(b"x"), "sae/extra.bin does not belong"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "is not a lens: lens.json is missing"),
    "broken manifest": (lambda f: (f / MANIFEST).write_text("{"), "not readable JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(LensError, match=message):
        verify(folder)


def test_an_altered_file_is_reported_with_both_digests(folder: Path) -> None:
    before = sha256_of(folder / "atlas.safetensors")
    flip_last_byte(folder / "atlas.safetensors")
    with pytest.raises(LensError) as error:
        verify(folder)
    assert before in str(error.value) and sha256_of(folder / "atlas.safetensors") in str(error.value)


def test_files_that_other_tools_keep_beside_a_lens_are_let_be(folder: Path) -> None:
    (folder / "README.md").write_text("a card")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("hub")
    verify(folder)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=99), "format 99; this program reads format 1. Update"),
        (lambda v: v.update(format_version=0), "Fit the lens again"),
        (lambda v: v.pop("format_version"), "no format_version"),
        (lambda v: v.update(colour="red"), "'colour' is wrong"),
        (lambda v: v.pop("hook_name"), "'hook_name' is wrong"),
    ],
)
def test_a_wrong_manifest_is_refused_by_key(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_manifest(folder, change)
    with pytest.raises(LensError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sae/../../outside"])
def test_a_manifest_cannot_reach_outside_its_folder(folder: Path, name: str) -> None:
    seal = {"bytes": 0, "sha256": "0" * 64}
    edit_manifest(folder, lambda v: v["files"].update({name: seal}))
    with pytest.raises(LensError, match="outside the lens folder"):
        verify(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(LensError, match=r"There is no folder .*nowhere"):
        verify(tmp_path / "nowhere")


def test_tensors_of_both_kinds_read_back_with_their_header(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    transposed = np.arange(6, dtype=np.int32).reshape(2, 3).T
    save_tensors(path, {"n": transposed, "t": torch.full((2,), 0.5, dtype=torch.float16)}, {"who": "me"})
    found = load_tensors(path)
    np.testing.assert_array_equal(found["n"], transposed)
    assert found["n"].dtype == np.int32 and found["t"].dtype == np.float16 and found["t"].tolist() == [0.5, 0.5]
    assert load_metadata(path) == {"who": "me"}


@pytest.mark.parametrize("content", [b"", b"not tensors at all, only text"])
def test_damaged_tensors_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(LensError, match=r"t\.safetensors is damaged"):
        load_tensors(tmp_path / "t.safetensors")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_never_holds_what_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert to_plain({"x": np.float32("nan"), 3: (float("-inf"),)}) == {"x": "nan", "3": ["-inf"]}
    told = Attribute("tone", ("light", "dark"))
    assert to_plain({"of": [told]}, without="classes") == {"of": [{"name": "tone"}]}
    assert to_plain({"name": told}, without="name") == {"name": {"classes": ["light", "dark"]}}, "fields alone"


@pytest.mark.parametrize("n", [1, 5, 33])
def test_lossless_sheets_read_back_in_order(tmp_path: Path, n: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 12, 3), dtype=np.uint8)
    index = save_sheets(images, tmp_path, "pool", columns=4, lossless=True)
    assert index.n == n
    np.testing.assert_array_equal(load_sheets(tmp_path, "pool"), images)


def test_lossy_sheets_are_close_and_tiles_do_not_mix(tmp_path: Path) -> None:
    images = np.zeros((9, 16, 16, 3), np.uint8)
    images[4] = 255
    save_sheets(images, tmp_path, "pool", columns=3)
    found = load_sheets(tmp_path, "pool").astype(int)
    assert np.abs(found - images).max() < 40
    assert found[4].mean() > 250 and np.delete(found, 4, axis=0).mean() < 5


def test_many_images_go_to_several_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_lens.base.sheets.SHEET_SIDE", 32)
    images = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    index = save_sheets(images, tmp_path, "pool", lossless=True)
    assert [sheet.n for sheet in index.sheets] == [16, 16, 5]
    np.testing.assert_array_equal(load_sheets(tmp_path, "pool"), images)


def test_a_bad_sheet_is_named(tmp_path: Path) -> None:
    save_sheets(np.zeros((4, 8, 8, 3), np.uint8), tmp_path, "pool")
    (tmp_path / "pool-00.webp").write_bytes(b"no image")
    with pytest.raises(LensError, match=r"pool-00\.webp is no image of a known kind; restore it"):
        load_sheets(tmp_path, "pool")
    (tmp_path / "pool-00.webp").unlink()
    with pytest.raises(LensError, match=r"pool-00\.webp is missing"):
        load_sheets(tmp_path, "pool")
    with pytest.raises(LensError, match="uint8"):
        save_sheets(np.zeros((4, 8, 8, 3)), tmp_path, "pool")


YOUTH = Attribute("age", ("young", "adult", "old"))


def point(beta: float, *, two_classes: bool = True) -> SweepPoint:
    """Four images, one undecided, measured against the unedited ones."""
    rng = np.random.default_rng(int(beta))
    certain = np.array([True, True, False, True])
    seeds = GenerationRequest("a portrait", (0, 1, 2, 2**63 - 1), 4, 2.0, "tiny")
    labels = {GENDER: np.array([0, 1, 1, 0]), YOUTH: np.array([2, 1, 0, 0])}
    before = replace(measured({a: own[::-1] for a, own in labels.items()}, certain), request=seeds)
    found = replace(
        measured(labels, certain), request=seeds, activation_ratio=1.25, frechet=2.5,
        examples=rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8), reference=before,
    )  # fmt: skip
    return SweepPoint(found, GENDER if two_classes else YOUTH, None if two_classes else (0.5, 0.25, 0.25), beta=beta)


def assert_same(a: SweepPoint, b: SweepPoint, *, examples: bool = True) -> None:
    for name in ("beta", "labels", "certain", *FIGURES):
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        else:
            assert repr(left) == repr(right), name
    assert a.request == b.request and a.examples.shape == b.examples.shape
    if examples:
        np.testing.assert_array_equal(a.examples, b.examples)


@pytest.mark.parametrize("two_classes", [True, False])
def test_a_point_reads_back_in_every_bit(tmp_path: Path, two_classes: bool) -> None:
    save_point(tmp_path, point(1.0, two_classes=two_classes))
    assert_same(load_point(tmp_path), point(1.0, two_classes=two_classes))


def test_a_sweep_reads_back(tmp_path: Path) -> None:
    points = (point(0.0), point(2.0))
    result = SweepResult(points, GENDER, "male", points[0].request, "3 features", "hand", True, {"sae": "x"})
    save_sweep(result, tmp_path, "000-gender")
    found = load_sweep(tmp_path, "000-gender", Missing({}))
    assert (found.request, found.attribute, found.provenance) == (result.request, GENDER, {"sae": "x"})
    assert found.is_control and found.betas == (0.0, 2.0)
    for mine, theirs in zip(result.points, found.points, strict=True):
        assert_same(mine, theirs, examples=False)
    assert found.points[0].measurement.reference is found.points[1].measurement.reference  # kept once


def test_an_unedited_point_is_measured_against_itself_after_it_was_read_back(tmp_path: Path) -> None:
    unedited = measured({GENDER: np.array([0, 1, 1, 0]), YOUTH: np.array([2, 1, 0, 0])})
    itself = SweepPoint(unedited.against(unedited), GENDER, beta=1.0)
    save_point(tmp_path, itself)
    found = load_point(tmp_path)
    assert found.agreement == itself.agreement == {"age": 1.0}
    assert found.measurement.reference is not None


def test_a_file_that_is_no_sweep_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "000.json", {"points": [{"beta": 1}]})
    with pytest.raises(LensError, match=r"000\.json is not a stored sweep"):
        load_sweep(tmp_path, "000", Missing({}))


def test_attributions_and_probes_read_back(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    attribution = Attribution(scores, 1e-9, GENDER, "integrated_gradients", "zero", "abc", 7)
    unknown = Attribution(scores, float("nan"), GENDER, "activation_difference", "other classes", "abc", 7)
    save_attributions(tmp_path / "a.safetensors", {"gender": attribution, "other": unknown})
    found = load_attributions(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found["gender"].scores, scores)
    assert (found["gender"].attribute, found["gender"].completeness_gap) == (GENDER, 1e-9)
    assert np.isnan(found["other"].completeness_gap)

    probe = Probe(GENDER, torch.randn(3, 2, 4), torch.randn(3, 2), torch.rand(3), 0.5)
    save_probes(tmp_path / "p.safetensors", {"gender": probe})
    read = load_probes(tmp_path / "p.safetensors")["gender"]
    assert torch.equal(read.weight, probe.weight) and torch.equal(read.bias, probe.bias)
    assert (read.temperature, read.attribute) == (0.5, GENDER)


def test_equal_content_makes_equal_files(tmp_path: Path) -> None:
    """Lenses are named by their files' digests; the library alone writes metadata in another order each time."""
    told = {name: f"of {name} – ü" for name in ("tone", "age", "gender", "race", "smile", "beard")}
    arrays = {"b": np.arange(5.0), "a": np.ones((2, 3), np.int64)}
    for number in range(12):
        save_tensors(tmp_path / f"{number}.safetensors", arrays, told)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert load_metadata(tmp_path / "0.safetensors") == told
    for name, values in load_tensors(tmp_path / "0.safetensors").items():
        assert np.array_equal(values, arrays[name]) and values.dtype == arrays[name].dtype
