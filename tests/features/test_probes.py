"""The probe: values by hand, faults named, round trip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sae_helpers import AGE, GENDER, random_maps, random_probe

from diffusion_lens.base.types import LensError
from diffusion_lens.features.probes import Probe


def test_logits_by_hand() -> None:
    weight = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]])
    probe = Probe(GENDER, weight, torch.tensor([[0.5, 0.0]]), torch.tensor([1.0]), temperature=2.0)
    h = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    assert torch.equal(probe.logits(h, 0), torch.tensor([[11.5, -4.0]]))
    expected = torch.tensor([[15.5 / 2, 0.0]]).softmax(1)
    torch.testing.assert_close(probe.probs(h, 0), expected)


def test_each_step_has_its_head() -> None:
    probe, h = random_probe(AGE), random_maps(2)
    for step in range(3):
        slow = torch.stack([h.flatten(1) @ probe.weight[step, c] + probe.bias[step, c] for c in range(3)], dim=1)
        torch.testing.assert_close(probe.logits(h, step), slow)


def test_faults_are_named() -> None:
    probe = random_probe()
    with pytest.raises(LensError, match="steps 0 to 2"):
        probe.logits(random_maps(1), 3)
    with pytest.raises(LensError, match="30 numbers"):
        probe.logits(torch.zeros(1, 5, 2, 2), 0)
    with pytest.raises(LensError, match="does not fit"):
        replace(probe, attribute=AGE)
    with pytest.raises(LensError, match="does not fit"):
        replace(probe, accuracy=torch.ones(2))
    with pytest.raises(LensError, match="temperature"):
        replace(probe, temperature=0.0)


def test_round_trip() -> None:
    probe = random_probe(AGE, temperature=1.234567890123)
    back = Probe.from_tensors(AGE, probe.tensors())
    assert back.temperature == probe.temperature
    assert torch.equal(back.probs(random_maps(2), 1), probe.probs(random_maps(2), 1))
    assert torch.equal(back.accuracy, probe.accuracy)
    with pytest.raises(LensError, match="bias"):
        Probe.from_tensors(AGE, {k: v for k, v in probe.tensors().items() if k != "bias"})
