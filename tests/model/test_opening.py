"""What is opened is proved: every tensor was in the files, tokenizers fit, pipelines are what they are taken for."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    make_latent_pipeline,
    make_pixel_pipeline,
    make_text_pipeline,
    make_xl_pipeline,
    pixel_unet,
    text_config,
    text_unet,
    tiny_tokenizer,
)
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from diffusion_lens.base.types import LensError
from diffusion_lens.model.claims import check_claims
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import load_model, wrap_pipeline
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.model.stored import open_stored

NURSE = "a portrait of a nurse"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Stable Diffusion on disk, one file a part."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    make_text_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


def rewrite(part: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a part's one file."""
    file = next(part.glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path, **options: Any) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(LensError) as caught:
        load_model(folder, offline=True, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- tensors


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_foreign_or_misshapen_tensor_is_named_with_its_part(part: str, folder: Path) -> None:
    state = load_file(next((folder / part).glob("*.safetensors")))
    name = max(state)
    rewrite(folder / part, lambda state: state.pop(name))
    assert f"The {part} of {folder} lacks the tensor '{name}' (1 in all)" in refusal(folder)
    rewrite(folder / part, lambda state: state.update({name: torch.zeros(3, 1, 2)}))
    assert f"tensor '{name}' of the shape (3, 1, 2)" in refusal(folder) and f"The {part} of" in refusal(folder)
    original = {name: load_file(next((folder / part).glob("*.safetensors")))[name]}
    original[name] = dict(wrap_state(part))[name]
    rewrite(folder / part, lambda state: state.update({**original, "strange.weight": torch.zeros(2)}))
    assert f"The {part} of {folder} has a tensor 'strange.weight'" in refusal(folder)


def wrap_state(part: str) -> State:
    """The tensors of a part as they were."""
    return {k: v.contiguous() for k, v in getattr(make_text_pipeline(), part).state_dict().items()}


def test_a_network_of_more_layers_than_its_files_is_refused(folder: Path) -> None:
    edit_json(folder / "text_encoder" / "config.json", num_hidden_layers=3)
    assert "text_encoder" in refusal(folder) and "lacks the tensor" in refusal(folder)
    edit_json(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    assert "knows nothing of" in refusal(folder)


def test_old_files_may_store_what_is_computed(folder: Path, plain: Path) -> None:
    places = {"embeddings.position_ids": torch.arange(12)[None]}
    rewrite(folder / "text_encoder", lambda state: state.update(places))
    got, want = (load_model(where, offline=True).condition(NURSE, 1, 1.0) for where in (folder, plain))
    assert torch.equal(got.kwargs["encoder_hidden_states"], want.kwargs["encoder_hidden_states"])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in many files a part, with an index."""
    make_text_pipeline().save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model/unet").glob("*.safetensors"))) > 2
    return tmp_path / "model"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_split_weights_hold_what_their_index_lists(part: str, sharded: Path) -> None:
    load_model(sharded, offline=True)
    shards = sorted((sharded / part).glob("*.safetensors"))
    state, spare = load_file(shards[0]), shards[0].read_bytes()
    name = min(state)
    save_file({k: v for k, v in state.items() if k != name} or {"x": torch.zeros(1)}, shards[0])
    assert f"lacks the tensor '{name}'" in refusal(sharded)
    save_file({**state, "strange.weight": torch.zeros(2)}, shards[0], metadata={"format": "pt"})
    assert "'strange.weight'" in refusal(sharded)
    shards[0].write_bytes(spare)
    shards[-1].unlink()
    assert "could not be loaded" in refusal(sharded) or "lacks the tensor" in refusal(sharded)


def test_tensors_without_numbers_are_named() -> None:
    pipe = make_pixel_pipeline()
    with torch.device("meta"):
        pipe.unet.conv_out = torch.nn.Conv2d(4, 3, 3, padding=1)
    with pytest.raises(LensError, match=r"unet lacks the numbers of its tensor 'conv_out\.weight'"):
        wrap_pipeline(pipe, "x")


def test_the_libraries_own_report_is_heard_where_other_remarks_are_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    root = logging.getLogger("diffusers")
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    missing = sorted(wrap_state("vae"))[:2]
    rewrite(folder / "vae", lambda state: [state.pop(name) for name in missing])
    root.addHandler(handler)
    monkeypatch.setattr(root, "level", logging.ERROR)
    child = logging.getLogger("diffusers.models.modeling_utils")
    before = child.level
    try:
        refusal(folder)
    finally:
        root.removeHandler(handler)
    assert all(name in "".join(heard) for name in missing) and child.level == before


# --- tokenizers


def test_a_missing_part_or_vocabulary_is_named(folder: Path) -> None:
    shutil.move(folder / "tokenizer", folder.parent / "kept")
    assert "tokenizer/ is missing" in refusal(folder)
    (folder / "tokenizer").mkdir()
    assert "tokenizer/ is missing" in refusal(folder)
    shutil.copy(folder.parent / "kept" / "tokenizer_config.json", folder / "tokenizer")
    assert "tokenizer is not whole" in refusal(folder)
    shutil.rmtree(folder / "scheduler")
    shutil.copytree(folder.parent / "kept", folder / "tokenizer", dirs_exist_ok=True)
    assert "scheduler/ is missing" in refusal(folder)


def test_a_vocabulary_without_its_merges_is_not_whole() -> None:
    pipe = make_text_pipeline()
    whole = tiny_tokenizer()
    pipe.tokenizer = CLIPTokenizer(vocab=whole.get_vocab(), merges=[], model_max_length=12)
    with pytest.raises(LensError, match="tokenizer is not whole"):
        wrap_pipeline(pipe, "x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 20}, "tokens up to .* the text_encoder knows 20"),
        ({"max_position_embeddings": 8}, "up to 12 tokens and the text_encoder reads 8"),
        ({"eos_token_id": 49407}, "waits for 49407"),
        ({"hidden_size": 16}, "give embeddings of 16 and this U-Net reads 8"),
    ],
)
def test_a_tokenizer_and_an_encoder_of_different_models_are_refused(changes: dict[str, Any], words: str) -> None:
    pipe = make_text_pipeline()
    pipe.text_encoder = CLIPTextModel(text_config(**changes)).eval()
    with pytest.raises(LensError, match=words):
        wrap_pipeline(pipe, "x")


def test_a_tokenizer_that_does_not_say_its_length_is_refused(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "max_length" not in k}))
    assert "any number of tokens and the text_encoder reads 12" in refusal(folder)


def test_both_encoders_of_a_large_model_are_checked() -> None:
    pipe = make_xl_pipeline()
    pipe.tokenizer_2 = CLIPTokenizer(vocab=tiny_tokenizer().get_vocab(), merges=[], model_max_length=12)
    with pytest.raises(LensError, match="tokenizer_2 is not whole"):
        wrap_pipeline(pipe, "x")


# --- kinds of pipeline


def refiner() -> Any:
    base = make_xl_pipeline()
    return StableDiffusionXLImg2ImgPipeline(
        vae=base.vae, text_encoder=None, text_encoder_2=base.text_encoder_2, tokenizer=None,
        tokenizer_2=base.tokenizer_2, unet=base.unet, scheduler=base.scheduler, requires_aesthetics_score=True,
        add_watermarker=False,
    )  # fmt: skip


def without(make: Callable[[], Any], part: str) -> Any:
    pipe = make()
    setattr(pipe, part, None)
    return pipe


class Derived(StableDiffusionPipeline):
    """Somebody's pipeline, whose call may do anything."""


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "refiner": (refiner, "StableDiffusionXLImg2ImgPipeline is not supported"),
    "image to image": (
        lambda: StableDiffusionImg2ImgPipeline(**make_text_pipeline().components, requires_safety_checker=False),
        "StableDiffusionImg2ImgPipeline is not supported",
    ),
    "own class": (
        lambda: Derived(**make_text_pipeline().components, requires_safety_checker=False),
        "Derived .* is not supported",
    ),
    "no text encoder": (lambda: without(make_xl_pipeline, "text_encoder"), "has no text_encoder"),
    "no tokenizer": (lambda: without(make_text_pipeline, "tokenizer"), "has no tokenizer"),
    "no decoder": (lambda: without(make_text_pipeline, "vae"), "has no vae"),
    "no codebook": (lambda: without(make_latent_pipeline, "vqvae"), "has no vqvae"),
    "no sample_size": (lambda: make_text_pipeline(sample_size=None), "sample_size"),
    "no sample_size, pixels": (lambda: make_pixel_pipeline(sample_size=None), "sample_size"),
    "a size that cannot be halved": (lambda: make_pixel_pipeline(sample_size=(8, 9)), "must be a multiple of 2"),
    "classes by timestep": (lambda: make_text_pipeline(class_embed_type="timestep"), "class-conditional"),
    "classes by number": (lambda: make_text_pipeline(num_class_embeds=3), "class-conditional"),
    "classes, pixels": (lambda: make_pixel_pipeline(num_class_embeds=3), "class-conditional.*not supported"),
    "extra channels": (lambda: make_text_pipeline(in_channels=9), "extra input channels"),
    "other channels out": (lambda: make_text_pipeline(out_channels=7), "4 channels into 7"),
    "sizes as text": (
        lambda: make_text_pipeline(
            addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=20
        ),
        "conditioned in a way",
    ),
    "other latents": (lambda: swapped(make_latent_pipeline(), unet=pixel_unet(in_channels=4)), "extra input channels"),
    "a U-Net of another kind": (lambda: swapped(make_pixel_pipeline(), unet=text_unet()), "not supported"),
}


def swapped(pipe: Any, **parts: Any) -> Any:
    for name, part in parts.items():
        setattr(pipe, name, part)
    return pipe


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_kinds_are_refused_when_opened(name: str) -> None:
    make, words = OTHERS[name]
    with pytest.raises(LensError, match=words) as caught:
        wrap_pipeline(make(), "x")
    assert "\n" not in str(caught.value)


def test_a_network_that_fails_on_its_own_images_says_so_in_a_sentence() -> None:
    pipe = make_text_pipeline()
    pipe.unet.conv_in = torch.nn.Conv2d(5, 4, 3, padding=1)
    with pytest.raises(LensError, match=r"cannot run on images of its own size: .*channels") as caught:
        _ = wrap_pipeline(pipe, "x").d_in
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["IFPipeline", "StableDiffusionXLImg2ImgPipeline", "FluxImg2ImgPipeline", "NoSuch", None, ["a", "b"]]
)
def test_other_kinds_on_disk_are_refused_before_their_weights_are_read(kind: Any, folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name=kind)
    shutil.rmtree(folder / "unet")
    assert "is not supported" in refusal(folder)


# --- variants


def to_variant(folder: Path, variant: str, parts: tuple[str, ...] = ("unet", "vae", "text_encoder")) -> None:
    """Rename weights as a half-precision upload has them."""
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            state = {name: tensor.half() for name, tensor in load_file(file).items()}
            save_file(state, file.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
            file.unlink()


def test_half_precision_weights_alone_open_and_it_is_said(folder: Path, plain: Path) -> None:
    to_variant(folder, "fp16")
    model, whole = load_model(folder, offline=True), load_model(plain, offline=True)
    assert "unet, vae are those of the variant fp16" in model.notes[0]
    weight = model.denoiser.conv_in.weight
    assert torch.equal(weight, whole.denoiser.conv_in.weight.half().float())
    assert load_model(folder, offline=True, variant="fp16").notes == ()


def test_plain_weights_are_preferred_and_a_variant_may_be_asked_for(folder: Path, plain: Path) -> None:
    to_variant(folder, "fp16", ("unet",))
    shutil.copytree(plain / "unet", folder / "unet", dirs_exist_ok=True)
    by_default, asked = load_model(folder, offline=True), load_model(folder, offline=True, variant="fp16")
    assert by_default.notes == asked.notes == ()
    assert not torch.equal(by_default.denoiser.conv_in.weight, asked.denoiser.conv_in.weight)
    assert torch.equal(by_default.pipeline.vae.decoder.layers[0].weight, asked.pipeline.vae.decoder.layers[0].weight)
    assert "no weights of the variant 'bf16'; it has fp16" in refusal(folder, variant="bf16")
    assert "it has none but the plain ones" in refusal(plain, variant="bf16")


def test_several_variants_and_no_plain_weights_ask_which(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    for variant in ("fp16", "ema"):
        shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
    file.unlink()
    assert "in the variants ema, fp16; choose one" in refusal(folder)
    assert load_model(folder, offline=True, variant="ema").notes == ()


def test_split_variants_are_checked_too(tmp_path: Path) -> None:
    make_text_pipeline().save_pretrained(tmp_path / "m", max_shard_size="4KB", variant="fp16")
    assert "variant fp16" in load_model(tmp_path / "m", offline=True).notes[0]
    shard = sorted((tmp_path / "m/unet").glob("*.safetensors"))[0]
    state = load_file(shard)
    save_file({**state, "strange.weight": torch.zeros(1)}, shard, metadata={"format": "pt"})
    assert "'strange.weight'" in refusal(tmp_path / "m")


# --- from a hub


def cached(folder: Path, home: Path, name: str) -> None:
    """Lay a folder down as the hub's cache does."""
    place = home / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("half", [False, True])
def test_a_hub_model_is_opened_from_the_cache(
    half: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if half:
        to_variant(folder, "fp16")
    cached(folder, tmp_path / "hub", "someone/tiny")
    for module in ("huggingface_hub.constants", "diffusers.utils.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    model = load_model("someone/tiny", offline=True)
    assert model.model_id == "someone/tiny" and bool(model.notes) == half
    assert model.stored is not None and "unet" in model.stored.digests()
    assert "check the name and the network" in refusal(Path("someone/other"))


# --- the safety checker


def make_checked() -> StableDiffusionPipeline:
    """Stable Diffusion with a tiny checker."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tiny, "image_size": 16, "patch_size": 8}
    torch.manual_seed(5)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config={**tiny, "vocab_size": 9}, vision_config=vision, projection_dim=8)
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return StableDiffusionPipeline(
        **{**make_text_pipeline().components, "safety_checker": checker, "feature_extractor": processor}
    )


def test_a_deleted_checker_is_said_and_may_be_left_out(tmp_path: Path) -> None:
    make_checked().save_pretrained(tmp_path / "m")
    assert load_model(tmp_path / "m", offline=True).pipeline.safety_checker is not None
    assert load_model(tmp_path / "m", offline=True, safety_checker=False).pipeline.safety_checker is None
    for gone in ("safety_checker", "feature_extractor"):
        shutil.rmtree(tmp_path / "m" / gone)
        assert "--no-safety-checker" in refusal(tmp_path / "m")
        for options in ({"safety_checker": False}, {"options": RunOptions(device="cpu", safety_checker=False)}):
            model = load_model(tmp_path / "m", offline=True, **options)
            assert generate(model, request(model, NURSE, [0], 2)).images.shape == (1, 16, 16, 3)


def test_the_checkers_own_tensors_are_proved_and_it_can_be_left_out_in_memory(tmp_path: Path) -> None:
    pipe = make_checked()
    assert wrap_pipeline(pipe, "x").pipeline.safety_checker is not None
    model = wrap_pipeline(pipe, "x", options=RunOptions(device="cpu", safety_checker=False))
    assert model.pipeline.safety_checker is None and pipe.safety_checker is not None
    pipe.save_pretrained(tmp_path / "m")
    rewrite(tmp_path / "m" / "safety_checker", lambda state: state.pop("concept_embeds"))
    assert "safety_checker" in refusal(tmp_path / "m") and "'concept_embeds'" in refusal(tmp_path / "m")


# --- nothing else changes


def test_parts_loaded_one_by_one_draw_what_the_stock_pipeline_draws(folder: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    model = load_model(folder, offline=True)
    drawn = generate(model, request(model, NURSE, [3], 4, 5.0)).images
    theirs = stock(
        NURSE, num_inference_steps=4, guidance_scale=5.0, generator=[torch.Generator().manual_seed(3)]
    ).images
    np.testing.assert_array_equal(drawn[0], np.asarray(theirs[0]))
    assert type(make_pixel_pipeline().scheduler) is DDPMScheduler


def test_a_sampler_whose_configuration_holds_infinity_is_read(tmp_path: Path) -> None:
    make_text_pipeline().save_pretrained(tmp_path)
    DPMSolverMultistepScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "scheduler")
    assert "Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    stored = open_stored(tmp_path)
    check_claims("scheduler", tmp_path / "scheduler", ())
    assert stored.digests()["scheduler"]
