"""Digests say what a pipeline's files hold, however they are split; which files count, and damaged ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_text_pipeline, make_xl_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_lens.base.types import LensError
from diffusion_lens.model.stored import open_stored, weight_files


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Stable Diffusion on disk."""
    folder = tmp_path_factory.mktemp("models") / "m"
    make_text_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(plain, tmp_path / "m"))


def slow_digest(part: Path) -> str:
    """A network's digest by the library's own reader."""
    settings = json.loads((part / "config.json").read_text())
    kept = {k: v for k, v in settings.items() if k[0] != "_"}
    for key in ("transformers_version", "dtype", "architectures"):
        kept.pop(key, None)
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    tensors: dict[str, torch.Tensor] = {}
    for file in part.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} F32 {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def test_digests_of_networks_equal_the_slow_ones(plain: Path) -> None:
    found = open_stored(plain).digests()
    assert set(found) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    for part in ("unet", "vae", "text_encoder"):
        assert found[part] == slow_digest(plain / part)


def test_parts_that_draw_nothing_are_not_counted(tmp_path: Path) -> None:
    make_xl_pipeline().save_pretrained(tmp_path)
    encoders = {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert set(open_stored(tmp_path).digests()) == {"unet", "vae", "scheduler"} | encoders


def test_how_files_are_split_and_named_changes_nothing(plain: Path, tmp_path: Path) -> None:
    for name, options in {"split": {"max_shard_size": "4KB"}, "half": {"variant": "fp16"}}.items():
        make_text_pipeline().save_pretrained(tmp_path / name, **options)
        assert open_stored(tmp_path / name).digests() == open_stored(plain).digests()


def perturb(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    state = load_file(file)
    state[max(state)].view(-1)[0] += 1e-6
    save_file(state, file)


def rename(folder: Path) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    state = load_file(file)
    state["other"] = state.pop(max(state))
    save_file(state, file)


def write(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


CHANGES: dict[str, tuple[str | None, Callable[[Path], object]]] = {
    "one number of the U-Net": ("unet", perturb),
    "a tensor's name": ("vae", rename),
    "a setting of the U-Net": (
        "unet", lambda f: write(f / "unet/config.json", lambda v: v.update(norm_eps=1e-3)),
    ),
    "the noise schedule": (
        "scheduler", lambda f: write(f / "scheduler/scheduler_config.json", lambda v: v.update(beta_end=0.02)),
    ),
    "two words' numbers": (
        "tokenizer",
        lambda f: write(f / "tokenizer/tokenizer.json", lambda v: v["model"]["vocab"].update({"a": 3, "b": 2})),
    ),
    "where prompts are cut": (
        "tokenizer", lambda f: write(f / "tokenizer/tokenizer_config.json", lambda v: v.update(model_max_length=9)),
    ),
    "the library's notes": (
        None,
        lambda f: write(
            f / "text_encoder/config.json", lambda v: v.update(transformers_version="9", dtype="x", _name="y")
        ),
    ),
    "a readme": (None, lambda f: (f / "README.md").write_text("hello")),
    "how a tokenizer is named": (
        None, lambda f: write(f / "tokenizer/tokenizer_config.json", lambda v: v.update(tokenizer_class="Other")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_change_of_content_changes_its_parts_digest_alone(name: str, folder: Path) -> None:
    part, change = CHANGES[name]
    before = open_stored(folder).digests()
    change(folder)
    after = open_stored(folder).digests()
    assert [key for key in before if before[key] != after[key]] == ([part] if part else [])


def test_line_ends_of_merges_do_not_count(folder: Path) -> None:
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_bytes(b"#version\na b\nc d\n")
    before = open_stored(folder).digests()
    merges.write_bytes(b"#version\r\na b\r\nc d\r\n")
    assert open_stored(folder).digests() == before
    merges.write_bytes(b"#version\na b\nc e\n")
    assert open_stored(folder).digests() != before


def test_weight_files_go_by_variant(tmp_path: Path) -> None:
    names = (
        "model.safetensors", "model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors",
        "model.bf16-00002-of-00002.safetensors", "model.bf16-00001-of-00002.safetensors",
        "model-00001-of-00001.old.safetensors", "other.safetensors", "model.bin", "pytorch_lora_weights.safetensors",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    found = {variant: [path.name for path in files] for variant, files in weight_files(tmp_path).items()}
    assert found == {
        None: ["model.safetensors"],
        "fp16": ["model.fp16.safetensors"],
        "non_ema": ["diffusion_pytorch_model.non_ema.safetensors"],
        "bf16": ["model.bf16-00001-of-00002.safetensors", "model.bf16-00002-of-00002.safetensors"],
        "old": ["model-00001-of-00001.old.safetensors"],
    }


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 4, b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b"{}"],
)
def test_damaged_files_are_named(data: bytes, folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(data)
    with pytest.raises(LensError, match="not a readable safetensors file"):
        open_stored(folder).digests()


def test_a_file_cut_short_is_named(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(LensError, match="cut short"):
        open_stored(folder).digests()
