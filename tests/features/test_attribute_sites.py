"""One attribution over several sites: complete, equal to autograd, and to that of one site where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.features.attribute_sites import AtSite, attribute_sites, feature_name, parse_feature, top_features
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SAEConfig, SparseAutoencoder

STEPS, N = 2, 5
SHAPES = {"early": (4, 2, 2), "late:update": (3, 1, 3)}


def at_site(name: str, attribute: Attribute, seed: int) -> AtSite:
    """A random dictionary, probe and activations."""
    c, y, x = SHAPES[name]
    g = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(
        SAEConfig(d_in=c, d_sae=7, k=3, layout="position", hook_name=name, model_id="m", spatial=(y, x))
    )
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=g)
    n_classes = len(attribute.classes)
    probe = Probe(
        attribute, torch.randn(STEPS, n_classes, c * y * x, generator=g), torch.randn(STEPS, n_classes, generator=g),
        torch.ones(STEPS), temperature=1.0 + seed,
    )  # fmt: skip
    return AtSite(sae.requires_grad_(False), probe, torch.randn(N, STEPS, c, y, x, generator=g).numpy())


def sites(attribute: Attribute) -> dict[str, AtSite]:
    """Two of different widths and grids."""
    return {name: at_site(name, attribute, seed) for seed, name in enumerate(SHAPES)}


def slow(parts: dict[str, AtSite], step: int, label: int, points: int = 2000) -> dict[str, torch.Tensor]:
    """Every feature's mean score by the midpoint rule and autograd on dense codes."""
    codes = {}
    for name, at in parts.items():
        h = torch.as_tensor(at.h[:, step]).double()
        codes[name] = at.sae.double().encode(at.sae.to_samples(h)).reshape(len(h), -1, at.sae.cfg.d_sae)
    totals = {name: torch.zeros(7, dtype=torch.float64) for name in parts}
    for alpha in (torch.arange(points, dtype=torch.float64) + 0.5) / points:
        moved = {name: (alpha * code).requires_grad_() for name, code in codes.items()}
        logits = 0.0
        for name, at in parts.items():
            maps = at.sae.from_samples(at.sae.decode(moved[name]).flatten(0, 1), SHAPES[name][1:])
            logits = logits + at.probe.logits(maps, step) / at.probe.temperature / len(parts)
        torch.softmax(logits, 1)[:, label].sum().backward()  # type: ignore[arg-type]
        for name, code in codes.items():
            totals[name] += (moved[name].grad * code).sum((0, 1)) / points / N  # type: ignore[operator]
    return totals


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c")])
def test_scores_equal_autograd_and_add_up(classes: tuple[str, ...]) -> None:
    attribute = Attribute("kind", classes)
    found = attribute_sites(sites(attribute))
    for step in range(STEPS):
        for name, total in slow(sites(attribute), step, 1, 400).items():
            np.testing.assert_allclose(found[name].scores[1, step], total, rtol=1e-3, atol=1e-4)
    gaps = {own.completeness_gap for own in found.values()}
    assert len(gaps) == 1 and gaps.pop() < 1e-5
    assert {own.sae_id for own in found.values()} == {at.sae.sae_id for at in sites(attribute).values()}


def test_one_site_alone_is_the_attribution_there_is() -> None:
    at = at_site("early", Attribute("kind", ("a", "b")), 0)
    joint, own = attribute_sites({"early": at})["early"], integrated_gradients(at.sae, at.probe, at.h)
    np.testing.assert_allclose(joint.scores, own.scores, rtol=1e-5, atol=1e-7)


def test_features_are_ranked_across_sites_and_named_by_them() -> None:
    found = attribute_sites(sites(Attribute("kind", ("a", "b"))))
    best = top_features(found, 5, "b")
    scores = [s for own in best.values() for s in own.scores]
    left = [
        s
        for name, own in found.items()
        for i, s in enumerate(own.total("b"))
        if i not in best.get(name, own_none()).ids
    ]
    assert len(scores) <= 5 and min(scores) > 0 and min(scores) >= max(left)
    assert parse_feature(feature_name("late:update", 3), list(found)) == ("late:update", 3)
    for wrong in ("late:3", "early:x", "3"):
        with pytest.raises(LensError, match="is no feature"):
            parse_feature(wrong, list(found))


def own_none() -> object:
    """Stands for a site without features."""
    return type("None_", (), {"ids": ()})()


def test_sites_that_do_not_belong_together_are_refused() -> None:
    parts = sites(Attribute("kind", ("a", "b")))
    other = at_site("early", Attribute("other", ("a", "b")), 3)
    with pytest.raises(LensError, match="one attribute"):
        attribute_sites({**parts, "early": other})
    with pytest.raises(LensError, match="at least one"):
        attribute_sites({})
