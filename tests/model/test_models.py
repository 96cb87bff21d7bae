"""Every family of model that a lens opens, tiny and random, saved and loaded: the same promises for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    latent_scheduler,
    make_ddim_pipeline,
    make_latent_pipeline,
    make_lcm_pipeline,
    make_pixel_pipeline,
    make_text_pipeline,
    make_xl_pipeline,
)
from diffusers import DDIMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from edits import Turn, bend, nothing, stock
from p2_states import SMALL, build_state
from safetensors.torch import save_file

from diffusion_lens.base.types import LensError, Sampler
from diffusion_lens.interop.convert_p2 import convert
from diffusion_lens.model.generate import Capture, generate, request
from diffusion_lens.model.pipelines import DiffusionModel, load_model, wrap_pipeline

SEEDS = (3, 1, 2)


def make_v_pipeline() -> Any:
    """Stable Diffusion 2: v-prediction, linear projections, another number of heads per level."""
    pipe = make_text_pipeline(use_linear_projection=True, attention_head_dim=(1, 2))
    pipe.scheduler = latent_scheduler(prediction_type="v_prediction")
    return pipe


def make_turbo_pipeline(scheduler: Any = EulerDiscreteScheduler) -> Any:
    """SD-Turbo: Stable Diffusion 2 sampled by Euler from the last timestep, without guidance."""
    pipe = make_text_pipeline(use_linear_projection=True, attention_head_dim=(1, 2))
    pipe.scheduler = scheduler(timestep_spacing="trailing", beta_schedule="scaled_linear")
    return pipe


def make_p2_pipeline(folder: Path) -> None:
    """A guided-diffusion checkpoint with a learned variance, converted."""
    save_file(build_state(SMALL), folder.parent / "p2.safetensors")
    convert(folder.parent / "p2.safetensors", folder, SMALL)


@dataclass(frozen=True)
class Family:
    """A row of the table: how its pipeline is made, how it is drawn, and the shape at the hook."""

    make: Callable[[], Any] | None
    kind: str
    prompt: str | None = None
    scale: float = 1.0
    steps: int = 4
    hook_name: str = "mid_block"
    shape: tuple[int, int, int] = (8, 4, 4)


NURSE = "a portrait of a nurse"
TOKENS = "mid_block.attentions.0.transformer_blocks.0.attn2"
FAMILIES = {
    "Stable Diffusion 1, guided": Family(make_text_pipeline, "text", NURSE, 7.5),
    "Stable Diffusion 1, unguided": Family(make_text_pipeline, "text", NURSE),
    "Stable Diffusion 2, v-prediction": Family(make_v_pipeline, "text", NURSE, 5.0),
    "LCM, 1 step": Family(make_lcm_pipeline, "text", NURSE, 1.0, 1),
    "LCM, 4 steps": Family(make_lcm_pipeline, "text", NURSE, 8.5),
    "SD-Turbo, 1 step": Family(make_turbo_pipeline, "text", NURSE, 0.0, 1),
    "SD-Turbo, 4 steps": Family(make_turbo_pipeline, "text", NURSE, 0.0),
    "SD-Turbo, ancestral": Family(
        lambda: make_turbo_pipeline(EulerAncestralDiscreteScheduler), "text", NURSE, 0.0, 2
    ),
    "SDXL, guided": Family(make_xl_pipeline, "text-xl", NURSE, 6.5),
    "SDXL, unguided": Family(make_xl_pipeline, "text-xl", NURSE),
    "DDPM in pixels": Family(make_pixel_pipeline, "pixel"),
    "DDIM in pixels": Family(make_ddim_pipeline, "pixel"),
    "unconditional latent": Family(make_latent_pipeline, "latent"),
    "P2, converted": Family(None, "pixel", shape=(64, 8, 8)),
    "another module: tokens": Family(make_text_pipeline, "text", NURSE, 7.5, hook_name=TOKENS, shape=(8, 4, 4)),
    "another module: a down-block's layer": Family(
        make_text_pipeline, "text", NURSE, 7.5, hook_name="down_blocks.1.resnets.0"
    ),
    "another module: an up-block": Family(make_pixel_pipeline, "pixel", hook_name="up_blocks.0", shape=(8, 8, 8)),
}  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A family's model as this project loads it, the stock pipeline beside it, and what to ask of both."""

    family: Family
    model: DiffusionModel
    stock: Any

    @property
    def request(self) -> Any:
        """Three images."""
        return request(self.model, self.family.prompt, SEEDS, self.family.steps, self.family.scale)

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """What its scheduler allows."""
        return ("symmetric", "asymmetric") if self.model.is_ddim else ("symmetric",)


@pytest.fixture(scope="module", params=list(FAMILIES))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Each family, saved and loaded through ``from_pretrained`` without a network."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("models") / "model"
    if family.make is None:
        make_p2_pipeline(folder)
    else:
        family.make().save_pretrained(folder)
    plain = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    if type(plain.scheduler).__name__ == "DDPMScheduler":
        plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    return Opened(family, load_model(folder, hook_name=family.hook_name, offline=True), plain)


def test_generate_is_the_stock_call(opened: Opened) -> None:
    drawn = generate(opened.model, opened.request)
    assert opened.model.kind == opened.family.kind
    assert np.array_equal(drawn.images, stock(opened.stock, opened.request))
    assert drawn.images.std() > 5, "flat images would prove nothing"
    assert len(np.unique(drawn.images.reshape(3, -1), axis=0)) == 3
    assert drawn.edit is None and drawn.activation_ratio is None


def test_an_identity_edit_is_bit_identical(opened: Opened) -> None:
    keep = Capture(dtype=np.float32)
    plain = generate(opened.model, opened.request, capture=keep)
    assert np.array_equal(plain.images, generate(opened.model, opened.request).images)
    for sampler in opened.samplers:
        same = generate(opened.model, opened.request, edit=Turn(nothing, sampler), capture=keep)
        assert np.array_equal(same.images, plain.images)
        assert same.activations is not None and plain.activations is not None
        assert np.array_equal(same.activations.h, plain.activations.h)
        assert same.activation_ratio is None


def test_an_edit_changes_every_image(opened: Opened) -> None:
    plain = generate(opened.model, opened.request).images
    for sampler in opened.samplers:
        edited = generate(opened.model, opened.request, edit=Turn(bend, sampler)).images
        assert all((a != b).any() for a, b in zip(plain, edited, strict=True))


def test_activations_have_the_shape_of_the_hook(opened: Opened) -> None:
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        main = output[0] if isinstance(output, tuple) else output
        seen.append(main if main.ndim == 4 else main.transpose(1, 2).unflatten(2, opened.family.shape[1:]))

    hook = opened.model.hook_module.register_forward_hook(note)
    found = generate(opened.model, opened.request, capture=Capture(dtype=np.float32)).activations
    hook.remove()
    steps = opened.family.steps
    assert opened.model.hook_shape == opened.family.shape
    assert found is not None and found.h.shape == (3, steps, *opened.family.shape)
    assert np.array_equal(found.h, torch.stack([h[-3:] for h in seen[:steps]], 1).numpy())
    assert len(found.timesteps) == steps and found.hook_name == opened.family.hook_name


def test_a_module_that_is_not_there_is_refused_with_those_that_are(opened: Opened) -> None:
    names = {name for name, _ in opened.model.denoiser.named_modules()}
    for asked in ("midblock", "transformer.h.3"):
        with pytest.raises(LensError, match=f"no module '{asked}'") as refused:
            wrap_pipeline(opened.stock, "x", hook_name=asked)
        listed = str(refused.value).split("try one of: ")[1].rstrip(".").split(", ")
        assert "mid_block" in listed and set(listed) <= names
