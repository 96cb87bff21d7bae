"""Every family of transformer pipelines: plain is the stock call, the site is the one named, the edit is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from edits import STEPS, Turn, bend, nothing
from tiny_transformers import (
    make_dit,
    make_flux,
    make_flux2,
    make_lumina2,
    make_pixart,
    make_qwen_image,
    make_sana,
    make_sd3,
    make_z_image,
)
from torch import Tensor

from diffusion_lens.base.types import GenerationRequest, LensError
from diffusion_lens.model.generate import Capture, StepContext, generate, record_trajectory, request
from diffusion_lens.model.hooks import capture, edit_output
from diffusion_lens.model.pipelines import DiffusionModel, at_site, candidate_sites, load_model, seed_generators
from diffusion_lens.model.sites import Site

SEEDS = (3, 1, 2)
KEEP = Capture(dtype=np.float32)


@dataclass(frozen=True)
class Case:
    """One tiny pipeline, what its own call is given, and what is known of its sites.

    Attributes:
        sites: site → its ``(c, y, x)``. scale: guidance. call: further arguments of the stock call.
        size: another ``(height, width)``, and the grid of its image tokens; none for models of one size.
        text: a site of the text stream. unguided: a scale that guides nowhere. scale_name: in the stock call.
        load: further arguments of ``load_model``.
    """

    make: Callable[[], Any]
    sites: dict[str, tuple[int, int, int]]
    scale: float
    size: tuple[tuple[int, int], tuple[int, int]] | None
    text: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ("a portrait of a nurse", "", "a man")
    scale_name: str = "guidance_scale"
    unguided: float = 1.0


CASES: dict[str, Case] = {
    "Stable Diffusion 3, two encoders": Case(
        make_sd3,
        {
            "transformer_blocks.1": (8, 4, 4), "transformer_blocks.0:update": (8, 4, 4),
            "transformer_blocks.1.attn": (8, 4, 4), "transformer_blocks.0.ff": (8, 4, 4),
            "transformer_blocks.0:output:text": (8, 12, 1), "transformer_blocks.1:update:text": (8, 12, 1),
        },
        4.0,
        ((8, 16), (2, 4)),
        text="transformer_blocks.1:output:text",
        call={"max_sequence_length": 0},
        load={"max_sequence_length": 0},
    ),
    "Stable Diffusion 3, three encoders": Case(
        lambda: make_sd3(third=True),
        {"transformer_blocks.1": (8, 4, 4), "transformer_blocks.0:output:text": (8, 12 + 256, 1)},
        4.0,
        ((16, 8), (4, 2)),
        text="transformer_blocks.1:output:text",
    ),
    "FLUX.1-dev": Case(
        make_flux,
        {
            "transformer_blocks.1": (16, 4, 4), "single_transformer_blocks.0": (16, 4, 4),
            "transformer_blocks.0:update": (16, 4, 4), "single_transformer_blocks.1:update": (16, 4, 4),
            "transformer_blocks.0:output:text": (16, 48, 1), "single_transformer_blocks.0:update:text": (16, 48, 1),
            "transformer_blocks.0.attn": (16, 4, 4), "transformer_blocks.0.ff": (16, 4, 4),
        },
        3.5,
        ((8, 16), (2, 4)),
        text="single_transformer_blocks.0:output:text",
        call={"max_sequence_length": 48, "height": 16, "width": 16},
        load={"max_sequence_length": 48, "size": (16, 16)},
    ),
    "FLUX.1-schnell": Case(
        lambda: make_flux(embeds=False),
        {"transformer_blocks.1": (16, 4, 4)},
        1.5,
        ((16, 8), (4, 2)),
        text="transformer_blocks.0:output:text",
        call={"max_sequence_length": 48, "height": 16, "width": 16},
        load={"max_sequence_length": 48, "size": (16, 16)},
    ),
    "PixArt-Σ": Case(
        make_pixart,
        {"transformer_blocks.1": (8, 4, 4), "transformer_blocks.0:update": (8, 4, 4),
         "transformer_blocks.2.attn2": (8, 4, 4), "transformer_blocks.2.ff": (8, 4, 4)},
        4.5,
        ((8, 16), (2, 4)),
        call={"use_resolution_binning": False},
    ),
    "PixArt-α": Case(
        lambda: make_pixart("alpha"),
        {"transformer_blocks.1": (8, 4, 4)},
        4.5,
        ((16, 8), (4, 2)),
        call={"use_resolution_binning": False},
    ),
    "Sana": Case(
        make_sana,
        {"transformer_blocks.1": (8, 4, 4), "transformer_blocks.0:update": (8, 4, 4),
         "transformer_blocks.2.attn1": (8, 4, 4), "transformer_blocks.2.ff": (8, 4, 4)},
        4.5,
        ((64, 128), (2, 4)),
        call={"use_resolution_binning": False, "height": 128, "width": 128},
        load={"size": (128, 128)},
    ),
    "Qwen-Image": Case(
        make_qwen_image,
        {"transformer_blocks.1": (16, 4, 4), "transformer_blocks.0:update": (16, 4, 4),
         "transformer_blocks.0.attn": (16, 4, 4), "transformer_blocks.0.img_mlp": (16, 4, 4)},
        4.0,
        ((8, 16), (2, 4)),
        call={"height": 16, "width": 16, "negative_prompt": ""},
        load={"size": (16, 16)},
        scale_name="true_cfg_scale",
    ),
    "Z-Image": Case(
        make_z_image,
        {"layers.1": (16, 4, 4), "layers.0:update": (16, 4, 4), "noise_refiner.0": (16, 4, 4)},
        5.0,
        ((8, 16), (2, 4)),
        call={"height": 16, "width": 16},
        load={"size": (16, 16)},
        unguided=0.0,
    ),
    "DiT": Case(
        make_dit,
        {
            "transformer_blocks.1": (8, 4, 4), "transformer_blocks.0:update": (8, 4, 4),
            "transformer_blocks.1.attn1": (8, 4, 4),
        },
        4.0,
        None,
        prompts=("3", "7", ""),
    ),
    "Lumina 2": Case(
        make_lumina2,
        {"layers.1": (16, 4, 4), "layers.0:update": (16, 4, 4), "noise_refiner.0": (16, 4, 4)},
        4.0,
        ((32, 64), (2, 4)),
    ),
    "FLUX.2-klein": Case(
        make_flux2,
        {
            "transformer_blocks.1": (16, 4, 4), "transformer_blocks.0:update": (16, 4, 4),
            "single_transformer_blocks.0": (16, 4, 4), "single_transformer_blocks.1:update": (16, 4, 4),
            "transformer_blocks.0:output:text": (16, 96, 1), "single_transformer_blocks.0:output:text": (16, 96, 1),
        },
        4.0,
        ((8, 16), (2, 4)),
        text="single_transformer_blocks.0:output:text",
        call={"height": 16, "width": 16, "max_sequence_length": 96},
        load={"size": (16, 16), "max_sequence_length": 96},
    ),
    "FLUX.2-klein, distilled": Case(
        lambda: make_flux2(distilled=True),
        {"single_transformer_blocks.0": (16, 4, 4)},
        1.5,
        ((16, 8), (4, 2)),
        text="transformer_blocks.0:output:text",
        call={"height": 16, "width": 16, "max_sequence_length": 96},
        load={"size": (16, 16), "max_sequence_length": 96},
    ),
}  # fmt: skip


def turn(h: Tensor, context: StepContext) -> Tensor:
    """An edit that no normalisation after the last block takes back."""
    return 1.3 * h.flip(1) + 0.4 * (context.index + 1)


@dataclass(frozen=True)
class Opened:
    """A case saved, opened as this project opens it, and the stock pipeline."""

    case: Case
    folder: Path
    model: DiffusionModel
    pipe: Any

    def ask(self, scale: float, prompt: str | None = None) -> GenerationRequest:
        """A request of three images."""
        return request(self.model, self.case.prompts[0] if prompt is None else prompt, SEEDS, STEPS, scale)

    def stock(self, asked: GenerationRequest, **more: Any) -> np.ndarray:
        """The images of the stock pipeline's own call."""
        n, labels = len(asked.seeds), isinstance(self.pipe, DiTPipeline)
        told = {"class_labels": [int(asked.prompt or 1000)] * n} if labels else {"prompt": asked.prompt}
        images = self.pipe(
            **told, **({} if labels else {"num_images_per_prompt": n}), num_inference_steps=asked.n_steps,
            generator=seed_generators(asked.seeds), output_type="pil",
            **{self.case.scale_name: asked.guidance_scale, **self.case.call, **more},
        ).images  # fmt: skip
        return np.stack([np.array(image) for image in images])


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Every case, saved to disk and opened from there."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    made = case.make()
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return Opened(case, folder, load_model(folder, offline=True, **case.load), made)


def test_plain_images_are_those_of_the_stock_call(opened: Opened) -> None:
    for scale in (opened.case.unguided, opened.case.scale):
        for prompt in opened.case.prompts:
            asked = opened.ask(scale, prompt)
            assert np.array_equal(generate(opened.model, asked).images, opened.stock(asked))


def test_an_image_depends_on_its_own_seed(opened: Opened) -> None:
    drawn = generate(opened.model, opened.ask(opened.case.scale)).images
    assert len(np.unique(drawn.reshape(3, -1), axis=0)) == 3


def test_other_heights_and_widths_are_the_stock_calls_too(opened: Opened) -> None:
    if opened.case.size is None:
        with pytest.raises(LensError, match="leave the size out"):
            load_model(opened.folder, offline=True, size=(8, 8))
        return
    size, grid = opened.case.size
    model = load_model(opened.folder, offline=True, **{**opened.case.load, "size": size})
    asked = opened.ask(opened.case.scale)
    drawn = generate(model, asked, capture=KEEP)
    assert drawn.images.shape[1:3] == size and model.spatial == grid
    assert np.array_equal(drawn.images, opened.stock(asked, height=size[0], width=size[1]))
    with pytest.raises(LensError, match="multiples of"):
        load_model(opened.folder, offline=True, **{**opened.case.load, "size": (size[0] + 1, size[1])})


def test_sites_have_their_shape_and_identity_edits_are_bit_identical(opened: Opened) -> None:
    asked = replace(opened.ask(opened.case.scale), n_steps=2)
    plain = generate(opened.model, asked).images
    for name, shape in opened.case.sites.items():
        model = at_site(opened.model, name)
        assert model.hook_shape == shape and model.hook_name == name
        for sampler in ("symmetric", "asymmetric") if model.splits_step else ("symmetric",):
            same = generate(model, asked, edit=Turn(nothing, sampler), capture=KEEP)
            assert np.array_equal(same.images, plain)
            assert same.activations is not None and same.activations.h.shape == (3, 2, *shape)
            changed = generate(model, asked, edit=Turn(turn, sampler)).images
            assert all((a != b).any() for a, b in zip(plain, changed, strict=True))


def test_the_half_with_the_prompt_is_read(opened: Opened) -> None:
    """What is read under guidance at the first step is what is read without it: the same noise, the same prompt."""
    if not opened.model.condition(opened.case.prompts[0], 1, opened.case.scale).guided:
        pytest.skip("guidance is embedded")
    for name in opened.case.sites:
        model = at_site(opened.model, name)
        first, scales = Capture(steps=(0,), dtype=np.float32), (opened.case.scale, opened.case.unguided)
        guided, alone = (generate(model, opened.ask(s), capture=first).activations for s in scales)
        assert guided is not None and alone is not None
        np.testing.assert_allclose(guided.h, alone.h, rtol=1e-3, atol=1e-4)


def test_the_unconditional_half_is_never_edited(opened: Opened) -> None:
    """An edit that blots out the half with the prompt leaves the other half's prediction as it was."""
    model, n = opened.model, len(SEEDS)
    conditioning = model.condition(opened.case.prompts[0], n, opened.case.scale)
    if not conditioning.guided:
        pytest.skip("guidance is embedded")
    x, t = model.noise(SEEDS), model.scheduler(STEPS).timesteps[0]
    edit = Turn(lambda h, _: h * 0 + 7.0)
    seen: list[np.ndarray] = []
    with torch.no_grad():
        plain = model.predict(x, t, conditioning)
    kept = model.guide
    object.__setattr__(model, "guide", lambda p, *a: (seen.append(p.numpy()), kept(p, *a))[1])
    try:
        generate(model, opened.ask(opened.case.scale), edit=edit)
    finally:
        object.__delattr__(model, "guide")
    assert np.array_equal(seen[0][:n], plain[:n].numpy())
    assert not np.allclose(seen[0][n:], plain[n:].numpy())


def test_an_edit_of_the_image_leaves_the_text_of_its_block_alone(opened: Opened) -> None:
    if not opened.case.text:
        pytest.skip("one stream of tokens, or text of any length")
    text = at_site(opened.model, opened.case.text)
    image = at_site(opened.model, replace(text.site, stream="image"))
    conditioning = text.condition(opened.case.prompts[0], len(SEEDS), opened.case.scale)
    x, t = text.noise(SEEDS), text.scheduler(STEPS).timesteps[0]
    with torch.no_grad():
        with capture(text.port) as told, capture(image.port) as shown:
            text.predict(x, t, conditioning)
        with edit_output(image.port, lambda h: h * 2 + 1), capture(text.port) as after, capture(image.port) as turned:
            text.predict(x, t, conditioning)
    assert torch.equal(after.output(), told.output())
    assert torch.equal(turned.output(), shown.output() * 2 + 1)


def test_a_run_restarts_from_a_recorded_step(opened: Opened) -> None:
    asked, model = opened.ask(opened.case.scale), opened.model
    whole = record_trajectory(model, asked)
    assert np.array_equal(whole.generation.images, generate(model, asked).images)
    for sampler in ("symmetric", "asymmetric") if model.splits_step else ("symmetric",):
        edit = Turn(bend, sampler, window=(2, 4))
        restarted = generate(model, asked, edit=edit, start=whole).images
        assert np.array_equal(restarted, generate(model, asked, edit=edit).images)


def test_only_edited_images_change(opened: Opened) -> None:
    asked, model = opened.ask(opened.case.scale), opened.model
    plain = generate(model, asked).images

    def second(h: Tensor, context: StepContext) -> Tensor:
        return torch.where(torch.tensor([False, True, False]).reshape(-1, 1, 1, 1), h.flip(1), h)

    for sampler in ("symmetric", "asymmetric") if model.splits_step else ("symmetric",):
        edited = generate(model, asked, edit=Turn(second, sampler)).images
        assert [(a != b).any() for a, b in zip(plain, edited, strict=True)] == [False, True, False]


def test_candidates_can_be_read_and_the_middle_is_the_default(opened: Opened) -> None:
    found = candidate_sites(opened.model)
    assert opened.model.site in found and len(found) == len(set(found)) > 1
    for site in found:
        assert at_site(opened.model, site).spatial == opened.model.spatial
        assert Site.parse(site.name) == Site(**json.loads(json.dumps(site.as_json()))) == site


def test_a_site_that_is_not_there_is_refused_with_those_that_are(opened: Opened) -> None:
    block = opened.model.site.module
    for name in (f"{block}:output:across", f"{block}.norm1:update"):
        with pytest.raises(LensError, match=r"no site|no module") as refused:
            at_site(opened.model, name)
        assert "\n" not in str(refused.value)
    with pytest.raises(LensError, match="no site"):
        at_site(opened.model, f"{block}:outputs")


def test_classes_take_the_place_of_prompts(tmp_path: Path) -> None:
    pipe = make_dit()
    pipe.save_pretrained(tmp_path / "dit")
    index = tmp_path / "dit" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"3": "golden retriever", "4": "tench"}}))
    model = load_model(tmp_path / "dit", offline=True)
    by_name, by_number = (generate(model, request(model, p, SEEDS, 2, 4.0)).images for p in ("golden retriever", "3"))
    assert np.array_equal(by_name, by_number)
    for word in ("golden retriver", "1000"):
        with pytest.raises(LensError, match="is no class") as refused:
            model.check_prompt(word)
        assert "golden retriever" in str(refused.value)
