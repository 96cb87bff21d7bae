"""Drafts of a dragged slider: few steps, the newest value alone; what is superseded stops at its next step."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio import studio as studios
from diffusion_lens.studio.state import View, default_view
from diffusion_lens.studio.studio import Studio


@pytest.fixture
def view(tiny_lens: DiffusionLens) -> View:
    return replace(default_view(tiny_lens), beta=3.0)


@pytest.mark.parametrize("superseded", ["draft", "draw"])
def test_a_superseded_drawing_stops_at_its_next_step(
    tiny_lens: DiffusionLens, view: View, superseded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, calls, ended = Studio(tiny_lens), [], []
    begun, told = threading.Event(), threading.Event()
    forward, start = tiny_lens.model.denoiser.forward, studio.stops.start

    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append(threading.current_thread().name)
        if not begun.is_set():
            begun.set()
            assert told.wait(30)  # until the next drawing has been asked for
        return forward(*args, **kwargs)

    def starts(owner: str) -> threading.Event:
        flag = start(owner)
        if begun.is_set():
            told.set()
        return flag

    def first() -> None:
        try:
            getattr(studio, superseded)(view, "somebody")
        except Cancelled as error:
            ended.append(error)

    monkeypatch.setattr(tiny_lens.model.denoiser, "forward", step)
    monkeypatch.setattr(studio.stops, "start", starts)
    old = threading.Thread(target=first, name="old")
    old.start()
    assert begun.wait(30)
    newest = studio.draft(replace(view, beta=4.0), "somebody")
    old.join(30)
    assert ended and calls.count("old") == 1, "it made the step that it was in, and no other"
    monkeypatch.undo()
    np.testing.assert_array_equal(newest, Studio(tiny_lens).draft(replace(view, beta=4.0)))


def test_somebody_elses_drag_stops_nobody(tiny_lens: DiffusionLens, view: View) -> None:
    studio = Studio(tiny_lens)
    flag = studio.stops.start("somebody:draw")
    studio.draft(view, "another")
    assert not flag.is_set()
    studio.draft(view, "somebody")
    assert flag.is_set()


def test_a_draft_is_the_same_edit_in_few_steps(
    tiny_lens: DiffusionLens, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studios, "DRAFT_STEPS", 2)
    turn = tiny_lens.intervention("gender", "male", 3.0)
    expected = tiny_lens.generate(tiny_lens.request(view.prompt, range(8), n_steps=2), turn, batch_size=8).images
    np.testing.assert_array_equal(Studio(tiny_lens).draft(view), expected)
