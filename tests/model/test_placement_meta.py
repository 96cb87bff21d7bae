"""A device that is not there: what is made elsewhere than on the model's device, or waits for it, fails on ``meta``.

Tensors on the meta device have a shape and no numbers. An operation that mixes them with others on the processor fails,
as on a GPU; and so does whatever would have to wait for a number: ``item``, ``bool``, ``nonzero``, a copy back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_pixel_pipeline, make_text_pipeline, make_xl_pipeline

from diffusion_lens.base.types import FeatureSet, Intervention
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.features.sae_config import SAEConfig
from diffusion_lens.model.denoise import BatchRun, Capture, Edit
from diffusion_lens.model.generate import request
from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline
from diffusion_lens.steering.intervene import make_edit

MAKERS: dict[str, Any] = {"text": make_text_pipeline, "pixel": make_pixel_pipeline, "xl": make_xl_pipeline}
STEPS = 3


def on_meta(kind: str) -> DiffusionModel:
    """A tiny model whose denoiser lies on the meta device; what its prompts mean was computed before it moved."""
    model = wrap_pipeline(MAKERS[kind](), f"tiny-{kind}")
    if model.is_text:
        encoded = model.encode("a doctor")
        model.prompts["a doctor"] = {name: value.to("meta") for name, value in encoded.items()}
    assert model.hook_shape  # measured while there are numbers
    model.denoiser.to("meta")
    object.__setattr__(model, "device", torch.device("meta"))
    return model


def walk(model: DiffusionModel, edit: Edit | None = None, capture: Capture | None = None) -> torch.Tensor:
    """The step loop, from noise to latents."""
    asked = request(model, "a doctor" if model.is_text else None, range(2), STEPS, 3.0)
    run = BatchRun(model, asked, edit, capture)
    latents, _ = run._walk(STEPS, lambda _: None, None)
    assert all(kept.is_meta for kept in run.kept) and len(run.kept) == (STEPS if capture else 0)
    return latents


def edit_of(model: DiffusionModel, mode: Any = "scale") -> Edit:
    """A symmetric edit of every image at every step, its SAE beside the model."""
    config = SAEConfig(
        d_in=model.d_in, d_sae=16, k=4, layout="position", hook_name="mid_block", model_id=model.model_id,
        spatial=model.spatial,
    )  # fmt: skip
    sae = SparseAutoencoder(config).requires_grad_(False)
    features = FeatureSet((1, 2), (1.0, 1.0), "gender", "male", sae.sae_id)
    edit = make_edit([Intervention.at_beta(features, mode, 3.0, sampler="symmetric")], sae)
    sae.to("meta")
    return edit


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_the_step_loop_stays_on_the_models_device_and_never_waits_for_it(kind: str) -> None:
    model = on_meta(kind)
    latents = walk(model, capture=Capture())
    assert latents.is_meta and tuple(latents.shape) == (2, *model.latent_shape)


@pytest.mark.parametrize("mode", ["scale", "add"])
@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_an_edit_of_features_does_neither(kind: str, mode: str) -> None:
    model = on_meta(kind)
    assert walk(model, edit_of(model, mode)).is_meta


class Elsewhere:
    """An edit that adds a tensor of the processor's, as a mistake would."""

    sampler, window, spec = "symmetric", None, None

    def apply(self, h: torch.Tensor, context: Any) -> torch.Tensor:
        """Not on h's device."""
        return h + torch.ones(h.shape)


class Waiting(Elsewhere):
    """An edit that asks for a number in the middle of a step."""

    def apply(self, h: torch.Tensor, context: Any) -> torch.Tensor:
        """Waits for the device."""
        return h * float(h.mean())


@pytest.mark.parametrize("edit", [Elsewhere(), Waiting()])
def test_the_check_sees_what_it_is_for(edit: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        walk(on_meta("pixel"), edit)
