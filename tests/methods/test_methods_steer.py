"""Formulas of the methods that edit the bottleneck, each against a slow, obvious form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS
from sae_helpers import AGE, random_maps, random_probe

from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.activation import Activation
from diffusion_lens.methods.bypass import Bypass, BypassEdit, BypassOptions, schedule
from diffusion_lens.methods.controls import MatchedNoise, NoiseEdit, RandomFeatures, SignFlip
from diffusion_lens.methods.difflens import DiffLens, DiffLensOptions
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.edits import ChannelEdit, ClassDraw, DirectionEdit
from diffusion_lens.methods.h_distribution import HDistribution, HDistributionEdit, HDistributionOptions, batch_gradient
from diffusion_lens.methods.latent_direction import LatentDirection, LatentDirectionOptions
from diffusion_lens.methods.latent_editing import LatentEditing, LatentEditingOptions, edit_window
from diffusion_lens.methods.noise import add_noise, clean_latents, denoised, prediction_loss, read_bottleneck
from diffusion_lens.methods.protocol import Fitted
from diffusion_lens.methods.sae_alternatives import SaeLrp
from diffusion_lens.methods.stereoclinic import StereoClinic, StereoClinicOptions, damping, stereotype_poles
from diffusion_lens.model.denoise import StepContext
from diffusion_lens.model.generate import Capture, generate, request
from diffusion_lens.model.hooks import edit_output
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.steering.intervene import FeatureEdit, draw_classes

SEEDS = tuple(range(500, 524))
HALF = {"female": 0.5, "male": 0.5}


@pytest.fixture(scope="module")
def draws(tiny_lens: DiffusionLens) -> Draws:
    """Images that all methods here are fitted on."""
    return Draws(tiny_lens.model, PROMPTS, SEEDS, 4, 2.0)


def fit(method: Any, lens: DiffusionLens, draws: Draws, target: Any = "male", **options: Any) -> Fitted:
    """Fit to the shared draws."""
    told = method.options(**options)
    return method.fit(lens, "gender", target, told, prompts=PROMPTS, seeds=SEEDS, draws=draws)


def context(seeds: Sequence[int], index: int = 1, n_steps: int = 4, h_in: torch.Tensor | None = None) -> StepContext:
    """Where an edit stands in a run."""
    return StepContext(index, n_steps, 500, tuple(seeds), h_in, 0.5, torch.zeros(len(seeds), 1, 1, 1))


def maps(n: int, shape: tuple[int, ...] = (8, 4, 4)) -> torch.Tensor:
    """Random bottlenecks of the tiny model."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def test_difflens_is_the_lenss_own_turn(tiny_lens: DiffusionLens, draws: Draws) -> None:
    edit = fit(DiffLens(), tiny_lens, draws).edit(2.0)
    own = tiny_lens.edit(tiny_lens.intervention("gender", "male", 3.0))
    h = maps(5)
    assert torch.equal(edit.apply(h, context(range(5))), own.apply(h, context(range(5))))
    more = fit(DiffLens(), tiny_lens, draws, n_features=1, poles="one", mode="add", sampler="symmetric").edit(2.0)
    assert isinstance(more, FeatureEdit) and more.sampler == "symmetric"
    (turn,) = more.interventions
    assert (turn.mode, turn.beta, len(turn.features.ids), turn.opposite) == ("add", 2.0, 1, None)


def test_each_image_is_turned_to_the_class_drawn_for_it(tiny_lens: DiffusionLens, draws: Draws) -> None:
    seeds = tuple(range(12))
    edit = fit(DiffLens(), tiny_lens, draws, HALF, draw_seed=3).edit(2.0)
    h = maps(12)
    moved = edit.apply(h, context(seeds))
    drawn = draw_classes(tiny_lens.probes["gender"].attribute, HALF, seeds, 3)
    for label, group in drawn.items():
        own = tiny_lens.edit(tiny_lens.intervention("gender", label, 3.0)).apply(h, context(seeds))
        for i, seed in enumerate(seeds):
            if seed in group:
                torch.testing.assert_close(moved[i], own[i])
    groups = [tiny_lens.intervention("gender", c, 3.0, only_seeds=drawn[c]) for c in ("female", "male")]
    assert torch.equal(moved, tiny_lens.edit(*groups).apply(h, context(seeds)))


def test_fitted_attributions_average_over_all_images(tiny_lens: DiffusionLens, draws: Draws) -> None:
    from diffusion_lens.features.attribute import integrated_gradients

    fitted = fit(DiffLens(), tiny_lens, draws, attribution="fitted")
    h = torch.cat([batch.h for batch in draws.batches()])
    whole = integrated_gradients(tiny_lens.sae, tiny_lens.probes["gender"], h)
    np.testing.assert_allclose(fitted.tensors["scores"].numpy(), whole.scores, rtol=1e-3, atol=1e-6)
    relevance = fit(SaeLrp(), tiny_lens, draws)
    assert relevance.tensors["scores"].shape == whole.scores.shape
    assert not np.allclose(relevance.tensors["scores"].numpy(), whole.scores)


def test_activation_scales_the_channels_of_largest_difference(tiny_lens: DiffusionLens, draws: Draws) -> None:
    fitted = fit(Activation(), tiny_lens, draws, n_channels=3)
    scores = fitted.tensors["scores"]
    edit = fitted.edit(1.5)
    assert isinstance(edit, ChannelEdit)
    h = maps(2)
    chosen = [int(c) for c in np.argsort(-scores[1].numpy())[:3] if scores[1, c] > 0]
    slow = h.clone()
    for channel in chosen:
        slow[:, channel] = 2.5 * h[:, channel]
    assert chosen and torch.equal(edit.apply(h, context([1, 2])), slow)


def test_directions_add_the_images_own_class(tiny_lens: DiffusionLens) -> None:
    table = torch.randn(3, 4, 8, 4, 4)
    draw = ClassDraw(AGE, (0.2, 0.3, 0.5), 0)
    seeds = tuple(range(9))
    edit = DirectionEdit(table, 0.5, draw, "symmetric", None, "test")
    h, rows = maps(9), draw.rows(seeds)
    moved = edit.apply(h, context(seeds, index=2))
    for i in range(9):
        torch.testing.assert_close(moved[i], h[i] + 0.5 * table[rows[i], 2])
    with pytest.raises(LensError, match="fitted on 4 steps"):
        edit.apply(h, context(seeds, n_steps=7))


def test_mean_difference_directions(tiny_lens: DiffusionLens, draws: Draws) -> None:
    per_step = fit(LatentEditing(), tiny_lens, draws).tensors["directions"]
    constant = fit(LatentDirection(), tiny_lens, draws, form="mean difference").tensors["directions"]
    torch.testing.assert_close(constant, per_step.mean(1, keepdim=True))
    torch.testing.assert_close(per_step[0], -per_step[1], rtol=1e-4, atol=1e-5)


def test_asyrp_acts_down_to_t_edit_and_moves_the_image_alone(tiny_lens: DiffusionLens, draws: Draws) -> None:
    model = tiny_lens.model
    times = [int(t) for t in model.scheduler(4).timesteps]
    edit = fit(LatentEditing(), tiny_lens, draws, t_edit=times[1]).edit(1.0)
    assert edit.sampler == "asymmetric" and edit.window == (0, 2)
    assert edit_window(model, 4, 10_000) == (0, 1) and edit_window(model, 4, 0) == (0, 4)


def test_learned_directions_lower_their_loss(tiny_lens: DiffusionLens, draws: Draws) -> None:
    fitted = fit(LatentDirection(), tiny_lens, draws, iterations=60, lr=0.3, batch_size=12)
    model = tiny_lens.model
    clean = torch.cat([clean_latents(model, batch, 2.0) for batch in draws.batches()][:1])

    def loss(direction: torch.Tensor) -> float:
        values = []
        for seed in range(12):
            noised = add_noise(model.scheduler(4), clean, torch.Generator().manual_seed(100 + seed))
            with torch.no_grad(), edit_output(model.port, lambda h: h + direction):
                values.append(float(prediction_loss(model, noised, model.condition(PROMPTS[0], len(clean), 1.0))))
        return float(np.mean(values))

    direction = fitted.tensors["directions"][1, 0]
    assert loss(direction) < loss(torch.zeros_like(direction))
    assert float(fitted.tensors["directions"][0].abs().max()) == 0  # nobody asked for the other class
    assert all(not p.grad_fn and p.grad is None for p in model.denoiser.parameters())


def test_learned_deltas_move_the_probes_reading(tiny_lens: DiffusionLens, draws: Draws) -> None:
    options = {"form": "learned", "iterations": 12, "lr": 0.2, "keep": 0.0, "t_edit": 0}
    table = fit(LatentEditing(), tiny_lens, draws, **options).tensors["directions"]
    probe = tiny_lens.probes["gender"]
    h = torch.cat([batch.h for batch in draws.batches()]).float()
    for step in range(4):
        before, after = (probe.probs(x, step)[:, 1].mean() for x in (h[:, step], h[:, step] + table[1, step]))
        assert after > before
    kept = fit(LatentEditing(), tiny_lens, draws, **{**options, "keep": 1000.0}).tensors["directions"]
    assert float(kept.norm()) < float(table.norm())


def test_named_prompts_give_examples_too(tiny_lens: DiffusionLens, draws: Draws) -> None:
    fitted = fit(LatentDirection(), tiny_lens, draws, examples="prompt", template="{prompt} {label}", iterations=1)
    assert float(fitted.tensors["directions"][1].abs().max()) > 0


def test_clean_latents_decode_to_the_images(tiny_lens: DiffusionLens) -> None:
    draws = Draws(tiny_lens.model, PROMPTS, range(6), 4, 2.0)
    for batch in draws.batches():
        images = tiny_lens.generate(batch.prompt, seeds=batch.seeds).images
        np.testing.assert_array_equal(tiny_lens.model.decode(clean_latents(tiny_lens.model, batch, 2.0)), images)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noising_and_back(kind: str, text_model: DiffusionModel) -> None:
    scheduler = text_model.scheduler(5)
    scheduler.register_to_config(prediction_type=kind)
    clean = torch.randn(6, 4, 8, 8)
    noised = add_noise(scheduler, clean, torch.Generator().manual_seed(0))
    x0, noise = denoised(scheduler, noised.target, noised.x, noised.t)
    torch.testing.assert_close(x0, clean, rtol=1e-3, atol=1e-3)
    alpha = scheduler.alphas_cumprod[noised.t].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, noised.x, rtol=1e-3, atol=1e-3)
    step = scheduler.step(noised.target[:1], scheduler.timesteps[2], noised.x[:1]).pred_original_sample
    one, _ = denoised(scheduler, noised.target[:1], noised.x[:1], scheduler.timesteps[2])
    torch.testing.assert_close(one, step)


def test_the_bottleneck_can_be_read_alone_with_gradients(text_model: DiffusionModel) -> None:
    run = generate(text_model, request(text_model, PROMPTS[0], [3], 4, 1.0), capture=Capture((0,), np.float32))
    x = text_model.noise([3]).requires_grad_()
    h = read_bottleneck(text_model, x, text_model.scheduler(4).timesteps[0], text_model.condition(PROMPTS[0], 1, 1.0))
    assert run.activations is not None
    np.testing.assert_allclose(h.detach().numpy()[0], run.activations.h[0, 0], rtol=1e-5, atol=1e-6)
    h.sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    text_model.denoiser.zero_grad()


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_h_distribution_gradient_is_autograds(divergence: Any) -> None:
    probe, h = random_probe(AGE), random_maps(7).requires_grad_()
    target = torch.tensor([0.2, 0.3, 0.5])
    mean = probe.probs(h, 1).mean(0)
    loss = ((mean - target) ** 2 / target).sum() if divergence == "chi2" else (mean * (mean / target).log()).sum()
    loss.backward()
    assert h.grad is not None
    torch.testing.assert_close(batch_gradient(probe, h.detach(), 1, target, divergence), 7 * h.grad)


def test_h_distribution_brings_the_batch_to_its_target() -> None:
    probe, h, target = random_probe(AGE, size=0.2), random_maps(40), torch.tensor([0.2, 0.3, 0.5])
    options = HDistributionOptions(n_inner=20)
    edit = HDistributionEdit(probe, target, 40.0, options, "test", "symmetric")
    moved = edit.apply(h, context(range(40), index=2, n_steps=3))
    before, after = (float((probe.probs(x, 2).mean(0) - target).norm()) for x in (h, moved))
    assert after < 0.2 * before
    with pytest.raises(LensError, match="3 steps"):
        edit.apply(h, context(range(40)))


def test_h_distribution_at_balance_does_nothing() -> None:
    probe, h = random_probe(AGE), random_maps(5)
    target = probe.probs(h, 0).mean(0)
    assert float(batch_gradient(probe, h, 0, target, "chi2").abs().max()) < 1e-5


def test_bypass_schedule() -> None:
    options = BypassOptions(first=0.25, last=0.75, ramp="linear")
    np.testing.assert_allclose(schedule(8, options), [0, 0, 0.25, 0.5, 0.75, 1, 0, 0])
    assert schedule(8, BypassOptions(first=0, last=0.5, ramp="constant")).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    cosine = schedule(8, BypassOptions(first=0, last=1, ramp="cosine"))
    assert cosine[-1] == pytest.approx(1) and cosine[3] == pytest.approx(0.5) and (np.diff(cosine) > 0).all()
    assert schedule(1, BypassOptions()).tolist() == [1.0]
    with pytest.raises(LensError, match="first must lie before last"):
        BypassOptions.parse({"first": 0.5, "last": 0.2})


def test_bypass_mixes_input_and_output(tiny_lens: DiffusionLens) -> None:
    h, h_in = maps(2), maps(2) + 1
    edit = BypassEdit(0.5, BypassOptions(first=0, last=1, ramp="linear"), "test")
    moved = edit.apply(h, context([0, 1], index=1, h_in=h_in))
    torch.testing.assert_close(moved, 0.75 * h + 0.25 * h_in)  # λ = ½ · ½
    with pytest.raises(LensError, match="one shape"):
        edit.apply(h, context([0, 1], index=1, h_in=h_in[:, :2]))
    fitted = Bypass().fit(tiny_lens, "gender", "male", prompts=PROMPTS, seeds=[0])
    with pytest.raises(LensError, match="between 0 and 1"):
        fitted.edit(1.5)


def test_a_full_bypass_skips_the_block(text_model: DiffusionModel) -> None:
    from contextlib import nullcontext

    from diffusion_lens.model.hooks import intercept

    whole = BypassEdit(1.0, BypassOptions(first=0, last=1, ramp="constant"), "test")
    wanted = request(text_model, PROMPTS[0], [4, 5], 3, 1.0)
    edited = generate(text_model, wanted, edit=whole).images
    with intercept(text_model.hook_module, lambda h, h_in: h_in), nullcontext():
        slow = generate(text_model, wanted).images
    assert int(np.abs(edited.astype(int) - slow.astype(int)).max()) <= 1


def test_stereotype_poles_and_damping() -> None:
    poles = stereotype_poles(np.array([10, 60, 30]), np.array([1 / 3, 1 / 3, 1 / 3]))
    np.testing.assert_allclose(poles, [-0.875, 1.0, -0.125])
    with pytest.raises(LensError, match="no stereotype"):
        stereotype_poles(np.array([10, 10]), np.array([0.5, 0.5]))
    relevance = {"a": torch.tensor([5.0, 1.0, -9.0]), "b": torch.tensor([3.0])}
    gains = damping(relevance, 50.0, 0.2)
    assert gains["a"].tolist() == pytest.approx([0.2, 1.0, 1.0]) and gains["b"].tolist() == pytest.approx([0.2])
    assert damping({"a": torch.tensor([-1.0, -2.0])}, 50.0, 0.2)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("neurons", ["mid-block", "bottleneck"])
@pytest.mark.parametrize("through_sae", [True, False])
def test_stereoclinic_loses_no_relevance(
    neurons: str, through_sae: bool, tiny_lens: DiffusionLens, draws: Draws
) -> None:
    options = StereoClinicOptions(neurons=neurons, through_sae=through_sae, n_steps=2)  # type: ignore[arg-type]
    uneven = {"female": 0.9, "male": 0.1}
    fitted = StereoClinic().fit(tiny_lens, "gender", uneven, options, prompts=PROMPTS, seeds=SEEDS, draws=draws)
    assert fitted.record.notes["relevance lost"] < 1e-2
    with pytest.raises(LensError, match="from 0 to 4"):
        fitted.edit(4.5)


def test_full_damping_silences_the_chosen_neurons(tiny_lens: DiffusionLens, draws: Draws) -> None:
    from diffusion_lens.methods.relevance.lrp_mid import record
    from diffusion_lens.methods.stereoclinic import damped

    model = tiny_lens.model
    gains = {"resnets.1.conv2": torch.tensor([[0.0, 1, 1, 1, 1, 1, 1, 1]])}
    x, t, told = model.noise([1]), model.scheduler(4).timesteps[0], model.condition(PROMPTS[0], 1, 1.0)
    layer = model.hook_module.get_submodule("resnets.1.conv2")
    with torch.no_grad(), damped(model, gains, torch.zeros(1)), record(model.hook_module) as tape:
        model.predict(x, t, told)
    assert float(tape.inputs[layer][:, 0].abs().max()) == 0 and float(tape.inputs[layer][:, 1].abs().max()) > 0


def test_damping_changes_with_the_step(tiny_lens: DiffusionLens) -> None:
    from diffusion_lens.methods.relevance.lrp_mid import record
    from diffusion_lens.methods.stereoclinic import damped

    model, layer_name = tiny_lens.model, "resnets.1.conv2"
    table = torch.ones(2, 8)
    table[0, 0], table[1, 1] = -1.0, 0.0
    times = model.scheduler(4).timesteps[[0, 3]].float()
    x, told = model.noise([1]), model.condition(PROMPTS[0], 1, 1.0)
    layer = model.hook_module.get_submodule(layer_name)
    for step, row in ((0, 0), (1, 0), (2, 1), (3, 1)):
        t = model.scheduler(4).timesteps[step]
        with torch.no_grad(), record(model.hook_module) as plain:
            model.predict(x, t, told)
        with torch.no_grad(), damped(model, {layer_name: table}, times), record(model.hook_module) as tape:
            model.predict(x, t, told)
        wanted = plain.inputs[layer] * table[row][:, None, None]
        torch.testing.assert_close(tape.inputs[layer], wanted)


def test_a_stereotype_is_of_a_prompt(tiny_lens: DiffusionLens) -> None:
    """Two prompts with opposite majorities: pooled poles (the fault of 0.4) damp one class under both."""
    from diffusion_lens.methods.stereoclinic import group_poles, prompt_groups

    nurse, firefighter, judge = np.array([58, 6]), np.array([5, 59]), np.array([10, 54])
    even = np.array([0.5, 0.5])
    counts = [nurse, firefighter, judge]
    by_prompt = group_poles(counts, prompt_groups(counts, "prompt"), even)
    np.testing.assert_allclose([by_prompt[0], by_prompt[1], by_prompt[2]], [[1, -1], [-1, 1], [-1, 1]])
    by_majority = group_poles(counts, prompt_groups(counts, "majority"), even)
    np.testing.assert_allclose([by_majority[0], by_majority[1]], [[1, -1], [-1, 1]])
    assert prompt_groups(counts, "majority") == [0, 1, 1] and prompt_groups(counts, "pooled") == [0, 0, 0]
    pooled = group_poles(counts, [0, 0, 0], even)
    np.testing.assert_allclose(pooled[0], [-1, 1])  # men are the majority of all, and would be damped for nurses, too
    level = group_poles([np.array([5, 5]), firefighter], [0, 1], even)
    assert set(level) == {1}
    assert StereoClinicOptions().poles == "prompt"


def test_stereoclinic_damps_each_prompt_by_its_own_neurons(tiny_lens: DiffusionLens, draws: Draws) -> None:
    from diffusion_lens.methods.stereoclinic import by_group

    def made(**options: Any) -> Fitted:
        told = StereoClinicOptions(**{"n_steps": 2, "top": 30.0, **options})
        return StereoClinic().fit(
            tiny_lens, "gender", {"female": 0.95, "male": 0.05}, told, prompts=PROMPTS, seeds=SEEDS, draws=draws
        )

    both = made()
    for place, prompt in enumerate(PROMPTS):
        own = Draws(tiny_lens.model, (prompt,), SEEDS[place :: len(PROMPTS)], 4, 2.0)
        alone = StereoClinic().fit(
            tiny_lens, "gender", {"female": 0.95, "male": 0.05}, StereoClinicOptions(n_steps=2, top=30.0),
            prompts=own.prompts, seeds=own.seeds, draws=own,
        )  # fmt: skip
        for layer, relevance in by_group(alone)[0].items():
            torch.testing.assert_close(by_group(both)[place][layer], relevance, rtol=1e-3, atol=1e-5)
        pictures = [tiny_lens.generate(prompt, f.edit(1.5), seeds=range(4)).images for f in (both, alone)]
        assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 1
    with pytest.raises(LensError, match="A stereotype is of a prompt"):
        tiny_lens.generate("a portrait of a person", both.edit(1.0), seeds=range(2))
    steps = made(per_step=True)
    assert not np.array_equal(
        *(tiny_lens.generate(PROMPTS[0], f.edit(2.0), seeds=range(4)).images for f in (both, steps))
    )
    assert "poles" not in both.record.options and "per_step" in steps.record.options


def test_controls_imitate_difflens_with_the_same_attribution(tiny_lens: DiffusionLens, draws: Draws) -> None:
    own = fit(DiffLens(), tiny_lens, draws, attribution="fitted")
    control = fit(SignFlip(), tiny_lens, draws, attribution="fitted")
    assert torch.equal(own.tensors["scores"], control.tensors["scores"])
    edit, flipped = own.edit(2.0), control.edit(2.0)
    assert isinstance(edit, FeatureEdit) and isinstance(flipped, FeatureEdit)
    assert flipped.interventions[0].features == edit.interventions[0].opposite


def test_random_features_are_others_and_as_many(tiny_lens: DiffusionLens, draws: Draws) -> None:
    own = fit(DiffLens(), tiny_lens, draws).edit(2.0)
    edit = fit(RandomFeatures(), tiny_lens, draws).edit(2.0)
    assert isinstance(own, FeatureEdit) and isinstance(edit, FeatureEdit)
    (mine,), (drawn,) = own.interventions, edit.interventions
    assert len(drawn.features.ids) == len(mine.features.ids) and not set(drawn.features.ids) & set(mine.features.ids)
    assert all(tiny_lens.atlas.density[i] > 0 for i in drawn.features.ids)


def test_the_flip_exchanges_the_poles(tiny_lens: DiffusionLens, draws: Draws) -> None:
    own = fit(DiffLens(), tiny_lens, draws).edit(2.0)
    flipped = fit(SignFlip(), tiny_lens, draws).edit(2.0)
    single = fit(SignFlip(), tiny_lens, draws, poles="one").edit(2.0)
    assert isinstance(own, FeatureEdit) and isinstance(flipped, FeatureEdit) and isinstance(single, FeatureEdit)
    assert flipped.interventions[0].features == own.interventions[0].opposite
    assert flipped.interventions[0].opposite == own.interventions[0].features
    assert single.interventions[0].features == own.interventions[0].opposite and not single.interventions[0].opposite


def test_matched_noise_is_as_large_as_the_edit_in_every_image(tiny_lens: DiffusionLens, draws: Draws) -> None:
    seeds = (3, 4, 5)
    own = fit(DiffLens(), tiny_lens, draws).edit(2.0)
    noise = fit(MatchedNoise(), tiny_lens, draws).edit(2.0)
    h = maps(3)
    real, fake = own.apply(h, context(seeds)) - h, noise.apply(h, context(seeds)) - h
    torch.testing.assert_close(fake.flatten(1).norm(dim=1), real.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-4)
    assert float(torch.cosine_similarity(real.flatten(1), fake.flatten(1)).abs().max()) < 0.5
    alone = noise.apply(h[1:2], context(seeds[1:2])) - h[1:2]
    torch.testing.assert_close(alone[0], fake[1])
    assert not torch.equal(noise.apply(h, context(seeds, index=2)) - h, fake)
    assert isinstance(noise, NoiseEdit)


def test_options_are_checked_by_name() -> None:
    with pytest.raises(LensError, match="iterations"):
        LatentDirectionOptions.parse({"iterations": 0})
    with pytest.raises(LensError, match="colour"):
        LatentEditingOptions.parse({"colour": 1})
    assert DiffLensOptions().attribution == "shipped"
    assert HDistribution().aim == "distribution"
