"""A tiny autoencoder shows images before the full decode: marked, never measured, and refused where it does not fit."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_latent_pipeline, make_pixel_pipeline, make_text_pipeline, make_xl_pipeline
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from edits import Turn, ask, bend
from torch import Tensor
from typer.testing import CliRunner

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import GenerationRequest, LensError
from diffusion_lens.cli.app import app
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.generate import generate, record_trajectory
from diffusion_lens.model.pipelines import load_model, wrap_pipeline
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.studio import jobs, state
from diffusion_lens.studio.previews import Preview
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Picture, Studio
from diffusion_lens.ui import explore_handlers


def tiny_autoencoder(**changes: Any) -> AutoencoderTiny:
    """Decodes 8² latents to 16² images, with other weights than the pipeline's own autoencoder."""
    torch.manual_seed(9)
    values: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1), "latent_channels": 4, **changes,
    }  # fmt: skip
    return AutoencoderTiny(**values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny autoencoder; its name is nothing that a page says anyway."""
    where = tmp_path_factory.mktemp("preview") / "little-one"
    tiny_autoencoder().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def lens(tiny_lens_folder: Path, folder: Path) -> DiffusionLens:
    """The tiny lens, opened with a preview."""
    return DiffusionLens.from_pretrained(tiny_lens_folder, options=RunOptions(device="cpu", preview=str(folder)))


@pytest.fixture
def studio(lens: DiffusionLens) -> Studio:
    """A fresh studio: nothing is cached."""
    _ = lens.model
    return Studio(lens)


@pytest.fixture
def view(lens: DiffusionLens) -> View:
    """The opening prompt and attribute, turned."""
    return replace(state.default_view(lens), beta=3.0)


def asks(view: View) -> dict[str, Any]:
    """What the page sends to have ``view`` drawn."""
    return {"view": state.to_values(view), "serial": 1}


# --- the decoder


@pytest.mark.parametrize("make", [make_text_pipeline, make_xl_pipeline])
def test_it_decodes_as_diffusers_does_when_it_takes_the_autoencoders_place(
    make: Callable[[], StableDiffusionPipeline], folder: Path
) -> None:
    pipe = make()
    pipe.vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = wrap_pipeline(pipe, "x", options=RunOptions(device="cpu", preview=str(folder)))
    seen: list[np.ndarray] = []
    full = generate(model, ask(model), on_latents=lambda request, x: seen.append(model.decode_preview(x, 2)))
    swapped = wrap_pipeline(make(), "x")
    swapped.pipeline.vae = tiny_autoencoder().eval()
    (shown,) = seen
    assert np.array_equal(shown, generate(swapped, ask(swapped)).images)
    assert shown.shape == full.images.shape and not np.array_equal(shown, full.images)
    plain = wrap_pipeline(pipe, "x")
    assert plain.preview is None and np.array_equal(generate(plain, ask(plain)).images, full.images)


def test_what_the_safety_checker_refuses_is_black_in_the_preview_too(folder: Path) -> None:
    pipe = make_text_pipeline()
    model = wrap_pipeline(pipe, "x", options=RunOptions(device="cpu", preview=str(folder)))
    latents = model.noise([1, 2, 3])
    open_ = model.decode_preview(latents)
    model.pipeline.safety_checker = object()
    model.pipeline.run_safety_checker = lambda image, *_: (image, [i == 1 for i in range(len(image))])
    closed = model.decode_preview(latents)
    assert not closed[1].any() and open_[1].any()
    assert np.array_equal(closed[[0, 2]], open_[[0, 2]])


def test_it_runs_where_and_as_the_model_does(folder: Path) -> None:
    options = RunOptions(device="cpu", slicing=True, preview=str(folder))
    model = wrap_pipeline(make_text_pipeline(), "x", options=options)
    assert model.preview is not None and model.preview.name == "little-one"
    rows: list[int] = []
    model.preview.network.decoder.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model.decode_preview(model.noise([1, 2, 3]))
    assert rows == [1, 1, 1] and not model.preview.network.training
    model = wrap_pipeline(make_latent_pipeline(), "x")
    with pytest.raises(LensError, match="No preview was loaded"):
        model.decode_preview(model.noise([1]))


def test_unconditional_latent_models_have_previews_too(tmp_path: Path) -> None:
    tiny_autoencoder(latent_channels=3).save_pretrained(tmp_path)
    model = wrap_pipeline(make_latent_pipeline(), "x", options=RunOptions(device="cpu", preview=str(tmp_path)))
    latents = model.noise([1, 2])
    assert model.decode_preview(latents).shape == model.decode(latents).shape


@pytest.mark.parametrize("edit", [None, Turn(bend, "asymmetric")])
def test_the_latents_are_seen_once_before_each_batch_is_decoded(edit: Turn | None) -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    order: list[Any] = []
    decode = model.pipeline.vae.decoder.register_forward_hook(lambda module, args, out: order.append(len(out)))
    made = generate(
        model,
        ask(model),
        edit=edit,
        batch_size=2,
        on_latents=lambda part, x: order.append((part.seeds, tuple(x.shape))),
    )
    decode.remove()
    assert order == [((3, 1), (2, 4, 8, 8)), 2, ((2,), (1, 4, 8, 8)), 1]
    assert np.array_equal(made.images, generate(model, ask(model), edit=edit, batch_size=2).images)


def test_a_run_can_be_ended_before_its_images_are_decoded() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    decoded: list[int] = []
    model.pipeline.vae.decoder.register_forward_hook(lambda module, args, out: decoded.append(len(out)))

    def end(request: GenerationRequest, latents: Tensor) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        record_trajectory(model, ask(model), on_latents=end)
    assert decoded == []


# --- refusals


def kl_folder(where: Path) -> Path:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4).save_pretrained(where)
    return where


def tiny_folder(where: Path, **changes: Any) -> Path:
    tiny_autoencoder(**changes).save_pretrained(where)
    return where


def pickled_folder(where: Path) -> Path:
    tiny_autoencoder().save_pretrained(where, safe_serialization=False)
    return where


def cut_folder(where: Path) -> Path:
    weights = tiny_folder(where) / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    return where


def headless_folder(where: Path) -> Path:
    from safetensors.torch import load_file, save_file

    weights = tiny_folder(where) / "diffusion_pytorch_model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if name != "decoder.layers.0.weight"}
    save_file(kept, weights, metadata={"format": "pt"})
    return where


def foreign_folder(where: Path) -> Path:
    where.mkdir()
    (where / "config.json").write_text(json.dumps({"hidden_size": 8}))
    return where


def empty_folder(where: Path) -> Path:
    where.mkdir()
    return where


REFUSED: dict[str, tuple[Callable[[Path], Path], Callable[[], Any], str]] = {
    "other channels": (lambda p: tiny_folder(p, latent_channels=16), make_text_pipeline, "16 channels .* have 4;"),
    "other size": (
        lambda p: tiny_folder(p, decoder_block_out_channels=(8,) * 3, num_decoder_blocks=(1,) * 3,
                              encoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3),
        make_text_pipeline, "4 pixels a side of each latent in 3 colours and this model 2 in 3;",
    ),
    "a pixel model": (tiny_folder, make_pixel_pipeline, "DDPMPipeline draws pixels; leave it out"),
    "no such folder": (lambda p: p / "nothing", make_text_pipeline, "no folder .*nothing for --preview"),
    "an empty folder": (empty_folder, make_text_pipeline, "it has no config.json"),
    "a full autoencoder": (kl_folder, make_text_pipeline, "of the kind AutoencoderKL"),
    "another model's folder": (foreign_folder, make_text_pipeline, "of the kind unknown"),
    "a pickle": (pickled_folder, make_text_pipeline, "could not be loaded. Reason: .*safetensors"),
    "a cut file": (cut_folder, make_text_pipeline, "could not be loaded. Reason: "),
    "a missing weight": (headless_folder, make_text_pipeline, "lacks 1 of its decoder's weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    make_folder, make_pipe, said = REFUSED[case]
    source = str(make_folder(tmp_path / "tiny"))
    with pytest.raises(LensError, match=said) as refused:
        wrap_pipeline(make_pipe(), "x", options=RunOptions(device="cpu", preview=source))
    assert "\n" not in str(refused.value)


def test_an_unknown_name_is_looked_up_on_this_machine_alone_where_offline(tmp_path: Path) -> None:
    make_text_pipeline().save_pretrained(tmp_path)
    with pytest.raises(LensError, match="nobody/nothing could not be loaded; check the name and the network"):
        load_model(tmp_path, offline=True, options=RunOptions(device="cpu", preview="nobody/nothing"))


# --- the app's flag


def test_serve_hands_the_preview_to_the_model(
    monkeypatch: pytest.MonkeyPatch, tiny_lens_folder: Path, folder: Path
) -> None:
    opened: list[DiffusionLens] = []
    monkeypatch.setattr("diffusion_lens.ui.launch", lambda lens, **options: opened.append(lens))
    words = ["serve", "--lens", str(tiny_lens_folder), "--device", "cpu"]
    assert CliRunner().invoke(app, [*words, "--preview", str(folder)]).exit_code == 0
    assert CliRunner().invoke(app, words).exit_code == 0
    assert Studio(opened[0]).previews and opened[0].model.preview is not None
    assert not Studio(opened[1]).previews and opened[1].options == RunOptions(device="cpu")
    refused = CliRunner().invoke(app, [*words, "--preview", str(folder / "nothing")])
    assert refused.exit_code == 2 and "There is no folder" in refused.stderr and len(opened) == 2


def test_the_environment_names_the_apps_preview(folder: Path) -> None:
    told = RunOptions.from_environment({"DIFFUSION_LENS_PREVIEW": str(folder)})
    assert told.preview == str(folder) and RunOptions.from_environment({}).preview == ""


# --- in Explore


def test_previews_come_first_and_the_full_images_are_those_without_the_flag(
    studio: Studio, view: View, tiny_lens: DiffusionLens
) -> None:
    first, second, last = jobs.drawings(studio, "me", view)
    assert isinstance(first, Preview) and isinstance(second, Preview) and isinstance(last, Picture)
    plain = Studio(tiny_lens).draw(view)
    (alone,) = jobs.drawings(Studio(tiny_lens), "me", view)
    assert isinstance(alone, Picture) and alone.preview_error is None
    for mine, theirs in ((last.before, plain.before), (last.after, plain.after)):
        assert np.array_equal(mine.images, theirs.images)
        for name, read in theirs.readings.items():
            assert np.array_equal(mine.readings[name].probs, read.probs)
    assert last.activation_ratio == plain.activation_ratio
    assert first.after is None and second.before == last.before
    assert isinstance(first.before, np.ndarray) and second.after is not None
    off = [np.abs(a.astype(float) - b).mean() for a, b in (
        (first.before, last.before.images), (second.after, last.after.images))]  # fmt: skip
    assert last.preview_error == pytest.approx(sum(off) / 2) and min(off) > 0


def test_only_what_is_not_known_yet_is_previewed(studio: Studio, view: View) -> None:
    same = replace(view, beta=1.0)
    first, whole = jobs.drawings(studio, "me", same)
    assert isinstance(first, Preview) and first.after is first.before
    second, turned = jobs.drawings(studio, "me", view)
    assert isinstance(second, Preview) and isinstance(whole, Picture) and isinstance(turned, Picture)
    assert not isinstance(second.before, np.ndarray) and second.before.images is whole.before.images
    (again,) = jobs.drawings(studio, "me", view)
    assert isinstance(again, Picture) and again.after.images is turned.after.images and again.preview_error is None


def test_the_page_marks_previews_and_shows_no_figures_of_them(studio: Studio, view: View) -> None:
    said, first, second, last = (scene for scene in explore_handlers.draw(studio, "me", asks(view)))
    assert "pictures" not in said and said["pending"]
    for shown in (first["pictures"], second["pictures"]):
        assert shown["draft"] == "preview by little-one" and shown["ratio"] is None
    assert first["pictures"]["after"] is None and len(first["pictures"]["before"]["images"]) == 8
    assert first["pictures"]["before"]["labels"] == {} and second["pictures"]["after"]["labels"] == {}
    assert second["pictures"]["before"]["labels"]["gender"] and second["pending"]
    whole = last["pictures"]
    assert whole["draft"] == "" and not last["pending"] and len(whole["after"]["labels"]["gender"]) == 8
    assert whole["after"]["images"] != second["pictures"]["after"]["images"]
    *_, again = explore_handlers.draw(studio, "me", asks(view))
    assert again["pictures"]["after"] == whole["after"]


def test_ended_between_preview_and_full_images(studio: Studio, view: View) -> None:
    stopped = threading.Event()
    vae = studio.lens.model.pipeline.vae
    hook = vae.decoder.register_forward_pre_hook(lambda module, args: stopped.wait(60) and None)
    events = explore_handlers.draw(studio, "me", asks(view))
    next(events)
    assert next(events)["pictures"]["draft"] == "preview by little-one"
    studio.stops.stop("me:draw")
    stopped.set()
    rest = list(events)
    hook.remove()
    assert all(scene["pictures"]["draft"] for scene in rest if "pictures" in scene)
