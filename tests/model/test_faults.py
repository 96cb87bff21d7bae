"""Which drawn images show nobody: known from the latents and pixels up to the finished ``Generation``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAKERS, make_text_pipeline
from torch import Tensor

from diffusion_lens.model.generate import generate, record_trajectory, request
from diffusion_lens.model.pipelines import wrap_pipeline


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_named_and_black(make: Callable[[], Any], value: float) -> None:
    model = wrap_pipeline(make(), "x")
    latents = model.noise([1, 2, 3])
    clean = model.decode_checked(latents)
    latents[1, 0, 0, 0] = value
    broken = model.decode_checked(latents, batch_size=2)
    assert broken.faults[1] == "not finite" and not broken.images[1].any()
    assert "not finite" not in clean.faults + broken.faults[::2]
    assert np.abs(clean.images[[0, 2]].astype(int) - broken.images[[0, 2]]).max() <= 1


def test_an_overflow_on_the_way_is_found_at_the_end() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    with torch.no_grad():
        model.denoiser.conv_out.bias.fill_(float("nan"))
    drawn = generate(model, request(model, "a man", range(5), 2), batch_size=2)
    assert drawn.faults == ("not finite",) * 5 and not drawn.valid.any() and not drawn.images.any()


def test_faults_follow_their_seeds_through_batches_and_trajectories() -> None:
    model = wrap_pipeline(make_text_pipeline(), "x")
    whole = request(model, "a man", range(5), 2)

    def spoil(part: Any, latents: Tensor) -> None:
        with torch.inference_mode():
            latents[[i for i, seed in enumerate(part.seeds) if seed in (1, 4)]] = float("nan")

    drawn = record_trajectory(model, whole, batch_size=2, on_latents=spoil)
    assert [fault == "not finite" for fault in drawn.generation.faults] == [False, True, False, False, True]
    some = generate(model, request(model, "a man", [4, 0], 2), start=drawn)
    assert some.faults == (drawn.generation.faults[4], drawn.generation.faults[0])
