"""Loading, wrapping and asking a pipeline: the same as the stock one, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_latent_pipeline, make_pixel_pipeline, make_text_pipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.generate import Capture, generate, request
from diffusion_lens.model.pipelines import PROMPTS_KEPT, DiffusionModel, load_model, wrap_pipeline


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Stable Diffusion on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    make_text_pipeline().save_pretrained(folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A folder's copy that a test may break."""
    for file in folder.rglob("*"):
        if file.is_file():
            (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(folder)).write_bytes(file.read_bytes())
    return target


def test_every_part_ends_in_the_dtype_asked_for(text_folder: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(str(text_folder), dtype=dtype)
        parts = [p for p in model.pipeline.components.values() if isinstance(p, nn.Module)]
        assert {p.dtype for part in parts for p in part.parameters()} == {dtype}
        assert model.condition("a nurse", 1, 1.0).kwargs["encoder_hidden_states"].dtype == dtype
    assert model.model_id == "tiny-sd"


def test_half_precision_checkpoints_become_what_was_asked(tmp_path: Path) -> None:
    pipe = make_text_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half").pipeline.text_encoder.dtype == torch.float32


def test_missing_partial_and_foreign_folders_are_refused(text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LensError, match="no folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LensError, match=r"model_index\.json"):
        load_model(tmp_path / "empty")
    gone = copy_of(text_folder, tmp_path / "gone")
    next(gone.glob("unet/*.safetensors")).unlink()
    with pytest.raises(LensError, match="could not be loaded"):
        load_model(gone)
    cut = copy_of(text_folder, tmp_path / "cut")
    weights = next(cut.glob("unet/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LensError, match="could not be loaded"):
        load_model(cut)
    foreign = copy_of(text_folder, tmp_path / "foreign")
    index = json.loads((foreign / "model_index.json").read_text())
    (foreign / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(LensError, match="NoSuchPipeline is not supported"):
        load_model(foreign)
    (foreign / "model_index.json").write_text("{ broken")
    with pytest.raises(LensError, match="could not be loaded"):
        load_model(foreign)


def test_pickled_weights_are_never_read(text_folder: Path, tmp_path: Path) -> None:
    pickled = copy_of(text_folder, tmp_path / "pickled")
    weights = next(pickled.glob("unet/*.safetensors"))
    torch.save(make_text_pipeline().unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(LensError, match="could not be loaded"):
        load_model(pickled)


def test_modules_that_run_more_than_once_are_refused() -> None:
    pipe = make_text_pipeline()
    resnets = pipe.unet.mid_block.resnets
    resnets[1].dropout = resnets[0].dropout
    model = wrap_pipeline(pipe, "x", hook_name="mid_block.resnets.0.dropout")
    with pytest.raises(LensError, match="runs 2 times"):
        _ = model.d_in
    with pytest.raises(LensError, match="runs 2 times"):
        generate(model, request(model, "a man", [1], 2), capture=Capture())


def test_hook_shape_is_measured(text_model: DiffusionModel, tiny_text_pipeline: Any) -> None:
    assert (text_model.d_in, text_model.spatial) == (8, (4, 4))
    tokens = wrap_pipeline(tiny_text_pipeline, "x", hook_name="mid_block.attentions.0.transformer_blocks.0.attn1")
    assert (tokens.d_in, tokens.spatial) == (8, (4, 4))


def test_impossible_numbers_of_steps_are_refused(tiny_models: dict[str, DiffusionModel]) -> None:
    with pytest.raises(LensError, match="cannot take 60 steps"):
        tiny_models["lcm"].scheduler(60)
    assert len(tiny_models["text"].scheduler(7).timesteps) == 7


def test_noise_is_the_stock_pipelines_and_each_images_own(text_model: DiffusionModel) -> None:
    seeds = (5, 0, 2**63 - 1)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    noise = text_model.noise(seeds)
    assert torch.equal(noise, randn_tensor((3, 4, 8, 8), generator=generators))
    assert torch.equal(text_model.noise((2**63 - 1,))[0], noise[2])


def test_conditioning_puts_the_unconditional_half_first(text_model: DiffusionModel) -> None:
    prompt, empty = text_model.pipeline.encode_prompt("a woman", torch.device("cpu"), 1, True)
    guided = text_model.condition("a woman", 2, 3.0)
    assert guided.guided
    assert torch.equal(guided.kwargs["encoder_hidden_states"], torch.cat([empty, empty, prompt, prompt]))
    assert torch.equal(guided.conditional(torch.tensor([1]))["encoder_hidden_states"], prompt)
    plain = text_model.condition("a woman", 2, 1.0)
    assert not plain.guided
    assert torch.equal(plain.kwargs["encoder_hidden_states"], torch.cat([prompt, prompt]))
    assert torch.equal(plain.conditional(slice(0, 1))["encoder_hidden_states"], prompt)


def test_prompts_are_encoded_once_and_forgotten_on_request() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    calls: list[int] = []
    model.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    model.condition("a man", 1, 1.0)
    per_prompt = len(calls)
    model.condition("a man", 4, 5.0)
    assert len(calls) == per_prompt
    model.forget_prompts()
    model.condition("a man", 1, 1.0)
    assert len(calls) == 2 * per_prompt
    for i in range(PROMPTS_KEPT + 3):
        model.condition("a " * (i % 4) + chr(97 + i % 26) + chr(97 + i // 26), 1, 1.0)
    assert len(model.prompts) == PROMPTS_KEPT
    assert "a man" not in model.prompts


def test_cached_embeddings_can_be_trained_against() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    with torch.inference_mode():
        model.condition("a man", 1, 1.0)
    embeds = model.condition("a man", 1, 1.0).kwargs["encoder_hidden_states"]
    scale = torch.ones(1, requires_grad=True)
    (embeds * scale).sum().backward()
    assert scale.grad is not None


def test_prompts_where_none_are_taken_are_refused(text_model: DiffusionModel, pixel_model: DiffusionModel) -> None:
    with pytest.raises(LensError, match="needs a prompt"):
        text_model.condition(None, 1, 1.0)
    with pytest.raises(LensError, match="takes no prompt"):
        pixel_model.condition("a man", 1, 1.0)


def test_a_learned_variance_is_dropped() -> None:
    model = wrap_pipeline(make_pixel_pipeline(out_channels=6), "learned sigma")
    x, t = model.noise((1, 2)), torch.tensor(10)
    with torch.no_grad():
        both = model.denoiser(x, t).sample
        assert both.shape[1] == 6
        assert torch.equal(model.predict(x, t, model.condition(None, 2, 1.0)), both[:, :3])
    assert generate(model, request(model, None, [1, 2], 2)).images.shape == (2, 8, 8, 3)


def test_decoding_in_parts_changes_nothing_but_last_bits() -> None:
    model = wrap_pipeline(make_latent_pipeline(), "x")
    latents = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    whole, parts = model.decode(latents), model.decode(latents, batch_size=2)
    assert whole.dtype == np.uint8 and whole.shape == (5, 16, 16, 3)
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_grey_images_become_rgb() -> None:
    model = wrap_pipeline(make_pixel_pipeline(in_channels=1, out_channels=1), "digits")
    images = model.decode(torch.linspace(-1, 1, 64).view(1, 1, 8, 8))
    assert images.shape == (1, 8, 8, 3)
    assert (images[..., 0] == images[..., 2]).all()
    assert images[0, 0, 0, 0] == 0 and images[0, -1, -1, 0] == 255


def test_the_models_own_safety_checker_blackens_as_in_the_stock_pipeline() -> None:
    class Checker(nn.Module):
        """Refuses every first image."""

        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images: Any, clip_input: Tensor) -> tuple[Any, list[bool]]:
            flags = [i == 0 for i in range(len(images))]
            images[0] = 0
            return images, flags

    class Extractor:
        """Stands in for CLIP's preprocessing."""

        def __call__(self, images: Any, return_tensors: str) -> Any:
            batch = SimpleNamespace(pixel_values=torch.zeros(len(images), 1))
            return SimpleNamespace(to=lambda device: batch)

    model = wrap_pipeline(make_text_pipeline(), "x")
    model.pipeline.safety_checker, model.pipeline.feature_extractor = Checker(), Extractor()
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    stock = model.pipeline(
        ["a man"] * 2, num_inference_steps=2, guidance_scale=1.0, generator=generators, output_type="pil"
    )
    drawn = generate(model, request(model, "a man", [1, 2], 2))
    assert np.array_equal(drawn.images, np.stack([np.array(image) for image in stock.images]))
    assert not drawn.images[0].any() and drawn.images[1].any()
    assert drawn.faults == ("censored", None)
