"""The strip of one image as it comes out of the noise."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio import steps
from diffusion_lens.studio.state import default_view, to_values
from diffusion_lens.studio.steps import step_strip
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import explore_handlers as handlers


@pytest.fixture(params=["text", "pixels"])
def lens(request: pytest.FixtureRequest) -> DiffusionLens:
    return request.getfixturevalue({"text": "tiny_lens", "pixels": "prompt_free_lens"}[request.param])  # type: ignore[no-any-return]


def test_it_begins_with_noise_and_ends_with_the_image(lens: DiffusionLens) -> None:
    studio, view = Studio(lens), default_view(lens)
    strip = step_strip(studio, view, 2, "somebody")
    n = lens.manifest.n_steps
    assert (strip.seed, strip.n_steps, strip.steps) == (2, n, tuple(range(n)))
    drawn = lens.generate(view.prompt, seeds=[2], batch_size=1)
    np.testing.assert_array_equal(strip.final, drawn.images[0])
    noise = lens.model.noise([2]) * lens.model.scheduler(n).init_noise_sigma
    np.testing.assert_array_equal(strip.images[0], lens.model.decode(noise)[0])
    assert strip.images.shape == (n, *strip.final.shape)
    away = np.abs(strip.images.astype(int) - strip.final).mean(axis=(1, 2, 3))
    assert away[-1] < away[0], "it comes nearer"


def test_of_many_steps_some_are_shown_first_and_last_among_them(
    tiny_lens: DiffusionLens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "MAX_SHOWN", 3)
    strip = step_strip(Studio(tiny_lens), default_view(tiny_lens), 0)
    assert strip.steps == (0, 2, 3) and len(strip.images) == 3


def test_what_is_on_screen_already_is_not_drawn_again(
    tiny_lens: DiffusionLens, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, view = Studio(tiny_lens), default_view(tiny_lens)
    drawn, alone = studio.draw(view), step_strip(Studio(tiny_lens), view, 5)
    monkeypatch.setattr(tiny_lens.model.denoiser, "forward", None)  # nothing may call it
    strip = step_strip(studio, view, 5)
    np.testing.assert_array_equal(strip.final, drawn.before.images[5])
    assert strip.steps == alone.steps and np.abs(strip.images.astype(int) - alone.images).max() <= 1


def test_the_page_gets_pictures_or_one_sentence(tiny_lens: DiffusionLens) -> None:
    _ = tiny_lens.model
    studio = Studio(tiny_lens)
    found = handlers.strip(studio, {"view": to_values(replace(default_view(tiny_lens), first_seed=4))})
    assert found["steps"] == [0, 1, 2, 3] and all(src.startswith("data:image/") for src in found["images"])
    assert "never saw" in handlers.strip(studio, {"view": {"prompt": "a zebra"}})["alert"]
    assert "cannot be read" in handlers.strip(studio, {"view": 3})["alert"]


def test_a_seed_that_is_not_on_screen_is_refused(tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match="Seed 9 is not one of those on screen"):
        step_strip(Studio(tiny_lens), default_view(tiny_lens), 9)
    with pytest.raises(LensError, match="never saw"):
        step_strip(Studio(tiny_lens), replace(default_view(tiny_lens), prompt="a zebra"), 0)


def test_the_visitors_next_strip_ends_the_one_before(tiny_lens: DiffusionLens) -> None:
    studio = Studio(tiny_lens)
    view = default_view(tiny_lens)
    ended: list[BaseException] = []
    begun = threading.Event()
    predict = tiny_lens.model.denoiser.forward

    def slow(*args: object, **kwargs: object) -> object:
        begun.set()
        studio.stops.stop("somebody:steps")
        return predict(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_lens.model.denoiser, "forward", slow)
        try:
            step_strip(studio, view, 0, "somebody")
        except Cancelled as error:
            ended.append(error)
    assert ended and begun.is_set() and torch.is_grad_enabled()
