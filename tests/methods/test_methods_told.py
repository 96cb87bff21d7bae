"""Methods that act where a model is told something: cross-attention, and the text embedding itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS

from diffusion_lens.base.types import EditSpec, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.edits import ClassDraw, DirectionEdit, WeightEdit, chosen
from diffusion_lens.methods.equisteer import EquiSteer, EquiSteerOptions, directions, orthogonal, reinject, touched
from diffusion_lens.methods.latent_editing import LatentEditing
from diffusion_lens.methods.prompts import name_class
from diffusion_lens.methods.protocol import Fitted
from diffusion_lens.methods.site_means import SiteMeans, SiteMeansOptions
from diffusion_lens.methods.text_features import (
    TextFeatures,
    TextFeaturesOptions,
    steered_directions,
    told_more,
)
from diffusion_lens.model.generate import generate, request

SEEDS = tuple(range(500, 508))
EVEN = {"female": 0.5, "male": 0.5}


def fit(method: Any, lens: DiffusionLens, **options: Any) -> Fitted:
    """Fit to one prompt."""
    draws = Draws(lens.model, PROMPTS[:1], SEEDS, 4, 2.0)
    told = method.options(**options)
    return method.fit(lens, "gender", EVEN, told, prompts=PROMPTS[:1], seeds=SEEDS, draws=draws)


def test_directions_are_without_what_other_attributes_share() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, others = torch.randn(2, 3, 16, generator=generator), torch.randn(3, 3, 16, generator=generator)
    others[2] = others[0] - 2 * others[1]  # of three differences two are independent
    found = orthogonal(wanted, list(others))
    for label in range(2):
        for step in range(3):
            slow, basis = wanted[label, step].clone(), []
            for other in others[:2, step]:
                pure = other.clone()
                for known in basis:
                    pure = pure - (pure @ known) * known
                basis.append(pure / pure.norm())
            for known in basis:
                slow = slow - (slow @ known) * known
            torch.testing.assert_close(found[label, step], slow / slow.norm(), rtol=1e-4, atol=1e-5)
            assert all(abs(float(found[label, step] @ other)) < 1e-4 for other in others[:, step])
    torch.testing.assert_close(orthogonal(wanted, []).norm(dim=-1), torch.ones(2, 3))
    means = torch.randn(3, 2, 4, generator=generator)
    torch.testing.assert_close(directions(means)[1], means[1] - (means[0] + means[2]) / 2)


def test_a_level_is_taken_out_and_put_back() -> None:
    output, u = torch.randn(2, 5, 4), torch.nn.functional.normalize(torch.randn(2, 4), dim=1)
    level = torch.tensor([1.5, -2.0])
    moved = reinject(output, u, level, 1.0)
    for i in range(2):
        for token in range(5):
            before, after = output[i, token], moved[i, token]
            assert float(after @ u[i]) == pytest.approx(float(level[i]), abs=1e-5)
            torch.testing.assert_close(after - (after @ u[i]) * u[i], before - (before @ u[i]) * u[i])
    torch.testing.assert_close(reinject(output, u, level, 0.5), (output + moved) / 2)


def test_equisteer_reads_each_class_under_its_own_prompt(tiny_lens: DiffusionLens) -> None:
    model = tiny_lens.model
    fitted = fit(EquiSteer(), tiny_lens, n_named=4, orthogonal=False)
    layer = next(name.partition("|")[2] for name in fitted.tensors if name.startswith("direction|"))
    times = model.scheduler(4).timesteps.float()
    means = []
    for label in ("female", "male"):
        seen: dict[int, list[torch.Tensor]] = {}

        def look(name: str, step: int, output: torch.Tensor, seen: Any = seen) -> None:
            if name == layer:
                seen.setdefault(step, []).append(output[-1].mean(0))  # one image at a time, its conditional half

        edit = WeightEdit(lambda m, look=look: touched(m, times=times, touch=look), EditSpec.of_custom("look", 0.0, {}))
        prompt = name_class(PROMPTS[0], fitted.attribute, label)
        for seed in SEEDS[:4]:
            generate(model, request(model, prompt, [seed], 4, 2.0), edit=edit)
        means.append(torch.stack([torch.stack(seen[step]).mean(0) for step in range(4)]))
    slow = means[1] - means[0]
    slow = slow / slow.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(fitted.tensors[f"direction|{layer}"][1], slow, rtol=1e-2, atol=1e-3)
    level = (means[1] * slow).sum(-1)
    torch.testing.assert_close(fitted.tensors[f"level|{layer}"][1], level, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", [EquiSteer(), TextFeatures()])
def test_each_image_follows_its_own_class_and_explicit_prompts_its_words(method: Any, tiny_lens: DiffusionLens) -> None:
    options = {"n_named": 4} if method.key == "equisteer" else {"d_sae": 32, "k": 4, "iterations": 10, "gate": True}
    fitted = fit(method, tiny_lens, **options)
    edit = fitted.edit(1.0)
    together = tiny_lens.generate(PROMPTS[0], edit, seeds=range(6)).images.astype(int)
    alone = np.concatenate([tiny_lens.generate(PROMPTS[0], edit, seeds=[s]).images for s in range(6)]).astype(int)
    assert np.abs(together - alone).max() <= 1
    assert not np.array_equal(together, tiny_lens.generate(PROMPTS[0], seeds=range(6)).images)
    told = name_class(PROMPTS[0], fitted.attribute, "male")
    plain = tiny_lens.generate(told, seeds=range(3)).images
    assert np.array_equal(tiny_lens.generate(told, edit, seeds=range(3)).images, plain)
    assert not any(layer._forward_hooks for layer in tiny_lens.model.denoiser.modules())


def test_text_features_move_the_conditional_half_alone(tiny_lens: DiffusionLens) -> None:
    model = tiny_lens.model
    shift = torch.stack(
        [torch.zeros(model.condition(PROMPTS[0], 1, 1.0).kwargs["encoder_hidden_states"].shape[-1])] * 2
    )
    shift[1] += 1.0
    seen: list[torch.Tensor] = []
    conditioning = model.condition(PROMPTS[0], 2, 2.0)
    told = conditioning.kwargs["encoder_hidden_states"]
    x, t = model.noise([1, 2]).repeat(2, 1, 1, 1), model.scheduler(4).timesteps[0]
    with torch.no_grad(), told_more(model, shift=shift):
        handle = model.denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        model.predict(x[:2], t, conditioning)
        handle.remove()
    torch.testing.assert_close(seen[0][:3], told[:3])
    torch.testing.assert_close(seen[0][3], told[3] + 1.0)


def test_text_directions_decode_the_features_of_largest_difference(tiny_lens: DiffusionLens) -> None:
    scores = torch.tensor([[0.5, -3.0, 2.0, 0.1], [-1.0, 4.0, -2.0, 0.0]])
    decoder = torch.randn(4, 6)
    found = steered_directions(scores, decoder, 2)
    torch.testing.assert_close(found[0], 2.0 * decoder[2] + 0.5 * decoder[0])
    torch.testing.assert_close(found[1], 4.0 * decoder[1])
    fitted = fit(TextFeatures(), tiny_lens, d_sae=32, k=4, iterations=10)
    edit = chosen(fitted.edit(0.5), tiny_lens.request(PROMPTS[0], range(3)))
    assert isinstance(edit, WeightEdit)
    rows = ClassDraw(fitted.attribute, (0.5, 0.5), 0).rows((0, 1, 2))
    shift = edit.model_context.keywords["shift"]  # type: ignore[attr-defined]
    torch.testing.assert_close(shift, 0.5 * fitted.tensors["directions"][rows])


def test_class_means_at_the_lenss_own_site_are_latent_editings(tiny_lens: DiffusionLens) -> None:
    draws = Draws(tiny_lens.model, PROMPTS, tuple(range(500, 524)), 4, 1.0)
    told = {"prompts": draws.prompts, "seeds": draws.seeds, "draws": draws}
    own = SiteMeans().fit(tiny_lens, "gender", "male", SiteMeansOptions(), **told)  # type: ignore[arg-type]
    slow = LatentEditing().fit(tiny_lens, "gender", "male", LatentEditing.options(), **told)  # type: ignore[arg-type]
    (name,) = [name for name in own.tensors if name.startswith("site|")]
    torch.testing.assert_close(own.tensors[name], slow.tensors["directions"], rtol=1e-2, atol=2e-3)
    directions = own.tensors[name]
    edit = DirectionEdit(directions, 1.5, ClassDraw(own.attribute, (0.0, 1.0), 0), "symmetric", None, own.spec(1.5))
    plain = tiny_lens.generate(PROMPTS[0], edit, seeds=range(4)).images.astype(int)
    at_site = tiny_lens.generate(PROMPTS[0], own.edit(1.5), seeds=range(4)).images.astype(int)
    assert np.abs(plain - at_site).max() <= 1


def test_several_sites_are_steered_at_once(tiny_lens: DiffusionLens) -> None:
    draws = Draws(tiny_lens.model, PROMPTS, tuple(range(500, 524)), 4, 2.0)
    told = {"prompts": draws.prompts, "seeds": draws.seeds, "draws": draws}
    options = SiteMeansOptions(sites="mid_block, up_blocks.0")
    both = SiteMeans().fit(tiny_lens, "gender", "male", options, **told)  # type: ignore[arg-type]
    assert {name for name in both.tensors if name.startswith("site|")} == {"site|mid_block", "site|up_blocks.0"}
    one = SiteMeans().fit(tiny_lens, "gender", "male", SiteMeansOptions(), **told)  # type: ignore[arg-type]
    images = [tiny_lens.generate(PROMPTS[0], f.edit(2.0), seeds=range(3)).images for f in (both, one)]
    assert not np.array_equal(*images)
    with pytest.raises(LensError):
        SiteMeans().fit(tiny_lens, "gender", "male", SiteMeansOptions(sites="nowhere.9"), **told)  # type: ignore[arg-type]


def test_models_without_prompts_are_refused(prompt_free_lens: DiffusionLens) -> None:
    for method, options in ((EquiSteer(), EquiSteerOptions()), (TextFeatures(), TextFeaturesOptions())):
        with pytest.raises(LensError, match="takes no prompt"):
            method.fit(prompt_free_lens, "gender", "male", options, prompts=(None,), seeds=[0, 1])
