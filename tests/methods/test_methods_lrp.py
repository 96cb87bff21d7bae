"""Relevance: a two-layer case done by hand, conservation through probe, SAE and mid-block, slow twins of the rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sae_helpers import AGE, random_maps, random_probe, random_sae
from torch import Tensor

from diffusion_lens.base.types import LensError
from diffusion_lens.methods.relevance.lrp import Rule, linear, split, through
from diffusion_lens.methods.relevance.lrp_mid import check_mid_block, mid_block_relevance, record
from diffusion_lens.methods.relevance.lrp_sae import (
    encoder_relevance,
    feature_relevance,
    logit_relevance,
    lrp_attribution,
    pole_weights,
)
from diffusion_lens.model.hooks import capture
from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline


def test_two_layers_by_hand() -> None:
    # x = (1, 2); hidden = relu(x W1) = (1·1 + 2·1, 1·2 + 2·(-1)) = (3, 0); output = 2·3 + 1·0 = 6.
    x = torch.tensor([[1.0, 2.0]])
    first, second = torch.tensor([[1.0, 1.0], [2.0, -1.0]]), torch.tensor([[2.0, 1.0]])
    hidden = (x @ first.T).relu()
    at_hidden = linear(hidden, second, torch.tensor([[6.0]]), "zplus")
    torch.testing.assert_close(at_hidden, torch.tensor([[6.0, 0.0]]))
    # z⁺ of hidden 1: contributions 1 and 2 of 3.
    torch.testing.assert_close(linear(x, first, at_hidden, "zplus"), torch.tensor([[2.0, 4.0]]))
    # Another target: hidden (3, 1), output 7 = 6 + 1. Hidden 2 = 3·1 − 1·2: z⁺ gives all of it to x1, ε splits 3 : −2.
    x = torch.tensor([[3.0, 2.0]])
    first = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    relevance = torch.tensor([[6.0, 1.0]])
    torch.testing.assert_close(linear(x, first, relevance, "zplus"), torch.tensor([[7.0, 0.0]]))
    torch.testing.assert_close(linear(x, first, relevance, "epsilon"), torch.tensor([[6.0 + 3.0, -2.0]]))


def slow_zplus(x: np.ndarray, w: np.ndarray, r: np.ndarray) -> np.ndarray:
    """``R_j = Σ_k (x_j w_kj)⁺ / Σ_j' (x_j' w_kj')⁺ R_k``, term by term; without a positive term, by ``|x_j|``."""
    found = np.zeros_like(x)
    for k in range(len(w)):
        terms = [max(0.0, x[j] * w[k, j]) for j in range(len(x))]
        for j in range(len(x)):
            found[j] += (terms[j] / sum(terms) if sum(terms) > 0 else abs(x[j]) / np.abs(x).sum()) * r[k]
    return found


def test_rules_against_their_definitions() -> None:
    rng = np.random.default_rng(0)
    x, w, r = rng.standard_normal((4, 5)), rng.standard_normal((3, 5)), rng.standard_normal((4, 3))
    x[0], w[1] = np.abs(x[0]), -np.abs(w[1])  # an output without any positive contribution
    tensors = [torch.from_numpy(a) for a in (x, w, r)]
    slow = np.stack([slow_zplus(x[i], w, r[i]) for i in range(4)])
    np.testing.assert_allclose(linear(*tensors, "zplus").numpy(), slow, atol=1e-12)
    z = x @ w.T
    slow = np.einsum("nk,nkj->nj", r, x[:, None] * w[None] / z[..., None])
    np.testing.assert_allclose(linear(*tensors, "epsilon").numpy(), slow, rtol=1e-3, atol=1e-6)


def test_a_convolution_is_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(5, 3, 3, 3, generator=generator)
    r = torch.randn(2, 5, 4, 4, generator=generator)
    fast = through(lambda a, b: F.conv2d(a, b, None, 1, 1), x, w, r, "zplus")
    columns = F.unfold(x, 3, padding=1)  # [n, 27, 16]
    flat = [
        slow_zplus(columns[n, :, p].double().numpy(), w.reshape(5, 27).double().numpy(), r[n, :, p // 4, p % 4].numpy())
        for n in range(2) for p in range(16)
    ]  # fmt: skip
    spread = torch.from_numpy(np.stack(flat)).reshape(2, 16, 27).transpose(1, 2).float()
    torch.testing.assert_close(fast, F.fold(spread, 4, 3, padding=1), rtol=1e-4, atol=1e-4)


def test_split_conserves() -> None:
    a, b, r = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([4.0, 2.0, 6.0])
    first, second = split(a, b, r)
    assert first.tolist() == [3.0, 1.0, 3.0] and second.tolist() == [1.0, 1.0, 3.0]


@pytest.mark.parametrize("layout", ["position", "map"])
@pytest.mark.parametrize("rule", ["zplus", "epsilon"])
def test_relevance_is_conserved_through_probe_and_sae(layout: str, rule: Rule) -> None:
    sae, probe = random_sae(layout), random_probe(AGE)
    with torch.no_grad():
        sae.b_dec.zero_()  # a bias takes no relevance; under the ε-rule the logit would count it
    h = random_maps(6)
    at_features, start = feature_relevance(sae, probe, h, 1, pole_weights(3, 2), rule)
    per_image = at_features.reshape(6, -1, sae.cfg.d_sae).sum((1, 2))
    tolerance = 1e-4 if rule == "zplus" else 1e-2
    torch.testing.assert_close(per_image, start, rtol=tolerance, atol=tolerance)
    samples = sae.to_samples(h)
    silent = sae.encode(samples) == 0
    assert float(at_features[silent].abs().max()) < 1e-8  # what did not fire has no relevance
    at_samples = encoder_relevance(sae, samples, at_features, rule)
    torch.testing.assert_close(at_samples.reshape(6, -1).sum(1), start, rtol=tolerance, atol=tolerance)


def test_relevance_through_the_probe_alone() -> None:
    probe, h = random_probe(AGE), random_maps(4)
    poles = pole_weights(3, 0)
    found, start = logit_relevance(probe, 2, h, poles, "zplus")
    logits = probe.logits(h, 2)
    torch.testing.assert_close(start, logits[:, 0] - (logits[:, 1] + logits[:, 2]) / 2)
    torch.testing.assert_close(found.flatten(1).sum(1), start, rtol=1e-4, atol=1e-4)


def test_epsilon_relevance_of_a_linear_chain_is_gradient_times_activation() -> None:
    sae, probe = random_sae(), random_probe(AGE)
    with torch.no_grad():
        sae.b_dec.zero_()
        probe.bias.zero_()
    h = random_maps(3, 3)
    found = lrp_attribution(sae, probe, h, "epsilon")
    for step in range(3):
        acts = sae.encode(sae.to_samples(h[:, step])).requires_grad_()
        logits = probe.logits(sae.from_samples(sae.decode(acts)), step)
        (gradient,) = torch.autograd.grad((logits @ pole_weights(3, 1)).sum(), acts)
        slow = (acts * gradient).detach().reshape(3, -1, sae.cfg.d_sae).sum(1).mean(0)
        np.testing.assert_allclose(found.scores[1, step], slow.numpy(), rtol=2e-2, atol=2e-3)


def relevance_of(model: DiffusionModel, rule: Rule) -> tuple[Tensor, Any, Any]:
    """Random relevance at the mid-block's output, what comes out below, and the tape."""
    torch.manual_seed(0)
    conditioning = model.condition("a woman" if model.is_text else None, 3, 1.0)
    with torch.no_grad(), record(model.hook_module) as tape:
        model.predict(torch.randn(3, *model.latent_shape), model.scheduler(4).timesteps[1], conditioning)
    at_output = torch.randn_like(tape.outputs[model.hook_module])
    with torch.no_grad():
        return at_output, mid_block_relevance(model.hook_module, tape, at_output, rule), tape


@pytest.mark.parametrize("kind", ["text", "pixel", "latent", "xl"])
def test_relevance_is_conserved_through_the_mid_block(kind: str, tiny_models: dict[str, DiffusionModel]) -> None:
    model = tiny_models[kind]
    at_output, found, tape = relevance_of(model, "zplus")
    end = found.at_input.flatten(1).sum(1) + found.at_prompt
    torch.testing.assert_close(end, at_output.flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    assert found.at_input.shape == at_output.shape
    assert bool((found.at_prompt != 0).all()) == model.is_text
    for name, relevance in found.neurons.items():
        assert relevance.shape == tape.inputs[model.hook_module.get_submodule(name)].shape
    assert {"resnets.0.conv2", "resnets.1.conv2"} <= set(found.neurons)
    assert model.is_text == any(name.endswith("ff.net.2") for name in found.neurons)


def test_linear_projections_conserve_too() -> None:
    from conftest import make_text_pipeline

    model = wrap_pipeline(make_text_pipeline(use_linear_projection=True), "tiny-linear")
    at_output, found, _ = relevance_of(model, "zplus")
    end = found.at_input.flatten(1).sum(1) + found.at_prompt
    torch.testing.assert_close(end, at_output.flatten(1).sum(1), rtol=1e-4, atol=1e-4)


def test_recording_changes_nothing_and_leaves_nothing(text_model: DiffusionModel) -> None:
    conditioning = text_model.condition("a man", 2, 1.0)
    x, t = torch.randn(2, *text_model.latent_shape), text_model.scheduler(4).timesteps[0]
    with torch.no_grad():
        plain = text_model.predict(x, t, conditioning)
        with record(text_model.hook_module) as tape:
            assert torch.equal(text_model.predict(x, t, conditioning), plain)
        with capture(text_model.hook_module) as tap:
            text_model.predict(x, t, conditioning)
    assert torch.equal(tape.outputs[text_model.hook_module], tap.output())
    assert not any(module._forward_hooks for module in text_model.denoiser.modules())


def test_other_blocks_are_refused(text_model: DiffusionModel) -> None:
    with pytest.raises(LensError, match="Relevance cannot pass"):
        check_mid_block(text_model.denoiser.up_blocks[0])
