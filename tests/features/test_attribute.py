"""Attribution: the closed form against slow automatic differentiation, completeness, linear cases, maps, intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_helpers import AGE, CHANNELS, GENDER, SPATIAL, random_maps, random_probe, random_sae
from torch import Tensor

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.features import attribute as attribute_module
from diffusion_lens.features.attribute import (
    activation_difference,
    gradient_x_activation,
    integrated_gradients,
    path_gradient,
)
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder

LAYOUTS = ("position", "map")
ATTRIBUTES = (GENDER, AGE)


def slow_scores(
    sae: SparseAutoencoder, probe: Probe, h: Tensor, baseline: Tensor | None, nodes: int = 64
) -> tuple[Tensor, Tensor]:
    """Integrated gradients by autograd through decoder and probe at 64 nodes: dense codes, float64, one at a time.

    Returns scores ``[n, class, step, place, d_sae]`` and ``F(s) - F(s')``, ``[n, class, step]``.
    """
    sae = sae.double()
    scores, change = [], []
    for image in range(len(h)):
        for step in range(h.shape[1]):
            code = sae.encode(sae.to_samples(h[image, step][None].double()))
            start = torch.zeros_like(code)
            if baseline is not None:
                start = sae.encode(sae.to_samples(baseline[image, step][None].double()))

            def prob(code: Tensor, cls: int, step: int = step) -> Tensor:
                maps = sae.from_samples(sae.decode(code))
                return (probe.logits(maps, step) / probe.temperature).softmax(1)[0, cls]

            for cls in range(len(probe.attribute.classes)):
                total = torch.zeros_like(code)
                for node, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
                    point = (start + (node + 1) / 2 * (code - start)).requires_grad_()
                    total += torch.autograd.grad(prob(point, cls), point)[0] * (weight / 2)
                scores.append((code - start) * total)
                change.append(prob(code, cls) - prob(start, cls))
    shape = (len(h), h.shape[1], len(probe.attribute.classes))
    sae.float()
    return (
        torch.stack(scores).reshape(*shape, -1, sae.cfg.d_sae).transpose(1, 2),
        torch.stack(change).reshape(shape).transpose(1, 2),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("from_activations", [False, True])
def test_closed_form_equals_autograd(layout: str, attribute: Attribute, from_activations: bool) -> None:
    sae, probe, h = random_sae(layout), random_probe(attribute), random_maps(2, 3)
    baseline = random_maps(2, 3, seed=9) if from_activations else None
    slow, change = slow_scores(sae, probe, h, baseline)
    fast = integrated_gradients(sae, probe, h.numpy(), baseline=None if baseline is None else baseline.numpy())
    assert fast.scores.shape == (len(attribute.classes), 3, 12)
    np.testing.assert_allclose(fast.scores, slow.sum(3).mean(0).numpy(), atol=1e-5)
    # The scores of each class at each step add up to the mean change of its probability.
    np.testing.assert_allclose(fast.scores.sum(2), change.mean(0).numpy(), atol=1e-5)
    assert fast.completeness_gap < 1e-5
    assert (fast.method, fast.n_images, fast.sae_id) == ("integrated_gradients", 2, sae.sae_id)
    assert fast.baseline == ("activations" if from_activations else "zero")


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("size", [1e-5, 1.0, 30.0, 300.0])
def test_complete_for_flat_and_for_saturated_probes(attribute: Attribute, size: float) -> None:
    attribution = integrated_gradients(random_sae(), random_probe(attribute, size=size), random_maps(4, 3))
    assert np.isfinite(attribution.scores).all()
    assert attribution.completeness_gap < 1e-5


def test_zero_path_has_the_gradient_itself() -> None:
    start = torch.tensor([[0.3, -0.2], [40.0, -40.0]], dtype=torch.float64)
    got = path_gradient(start, torch.zeros_like(start))
    p = start.softmax(1)
    assert torch.allclose(got, torch.diag_embed(p) - p[:, :, None] * p[:, None], atol=1e-12)


def test_three_classes_of_which_one_never_moves_equal_two() -> None:
    start, change = torch.tensor([[0.3, -0.5]]).double(), torch.tensor([[2.0, -7.0]]).double()
    third = torch.tensor([[-80.0]]).double()
    wide = path_gradient(torch.cat([start, third], 1), torch.cat([change, torch.zeros(1, 1)], 1))
    torch.testing.assert_close(wide[:, :2, :2], path_gradient(start, change), atol=1e-7, rtol=0)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_where_the_probability_is_linear_both_gradients_agree(attribute: Attribute) -> None:
    """A probe so weak that its softmax is linear over the path: integrated gradients are gradient × activation."""
    sae, probe, h = random_sae(), random_probe(attribute, size=1e-4), random_maps(3, 3)
    whole, point = integrated_gradients(sae, probe, h), gradient_x_activation(sae, probe, h)
    assert np.abs(whole.scores).max() > 1e-5
    np.testing.assert_allclose(point.scores, whole.scores, atol=1e-3 * np.abs(whole.scores).max())
    assert point.method == "gradient_x_activation"


def test_gradient_x_activation_equals_autograd_at_the_code() -> None:
    sae, probe, h = random_sae(), random_probe(AGE), random_maps(1, 3)
    code = sae.encode(sae.to_samples(h[0, 1][None])).requires_grad_()
    prob = probe.probs(sae.from_samples(sae.decode(code)), 1)[0, 2]
    slow = (code * torch.autograd.grad(prob, code)[0]).sum(0)
    np.testing.assert_allclose(gradient_x_activation(sae, probe, h).scores[2, 1], slow.detach(), atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, probe, h = random_sae(), random_probe(AGE), random_maps(7, 3)
    whole = integrated_gradients(sae, probe, h).scores
    monkeypatch.setattr("diffusion_lens.features.sae.CHUNK_NUMBERS", 2 * 6 * 12)
    np.testing.assert_allclose(integrated_gradients(sae, probe, h).scores, whole, atol=1e-6)


def test_activation_difference_by_hand() -> None:
    sae, h = random_sae(), random_maps(5, 2)
    labels = np.array([0, 1, -1, 1, 2])
    acts = sae.encode(sae.to_samples(h.flatten(0, 1))).reshape(5, 2, 6, 12).sum(2)
    got = activation_difference(sae, h, labels, AGE)
    slow = (acts[1] + acts[3]) / 2 - (acts[0] + acts[4]) / 2
    np.testing.assert_allclose(got.scores[1], slow.numpy(), atol=1e-5)
    assert got.n_images == 4 and np.isnan(got.completeness_gap) and got.method == "activation_difference"


def test_planted_feature_is_found() -> None:
    """Only feature 3 reaches the probe: it alone is attributed, with the right sign for either class."""
    sae, h = random_sae(d_sae=5, k=5), random_maps(6, 1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(5))
        sae.W_enc.copy_(torch.eye(5))
    weight = torch.zeros(1, 2, CHANNELS, *SPATIAL)
    weight[0, 1, 3] = 1.0
    probe = Probe(GENDER, weight.flatten(2), torch.zeros(1, 2), torch.ones(1))
    features = integrated_gradients(sae, probe, h).top_k(3, target="male")
    assert features.ids == (3,)
    assert integrated_gradients(sae, probe, h).total("female")[3] < 0


def test_faults_are_named() -> None:
    sae, probe, h = random_sae(), random_probe(), random_maps(2, 3)
    with pytest.raises(LensError, match="3 steps"):
        integrated_gradients(sae, probe, h[:, :2])
    with pytest.raises(LensError, match="baseline"):
        integrated_gradients(sae, probe, h, baseline=h[:1])
    with pytest.raises(LensError, match="label"):
        activation_difference(sae, h, np.array([0, 0]), GENDER)


def test_the_module_never_makes_dense_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a dense code was made")

    monkeypatch.setattr(SparseAutoencoder, "encode", refuse)
    attribute_module.integrated_gradients(random_sae(), random_probe(), random_maps(2, 3))
