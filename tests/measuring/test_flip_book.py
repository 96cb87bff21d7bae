"""A flip-book's frames are what the app draws, read as it reads them; a stopped drawing goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_lens.base.progress import Progress, Status
from diffusion_lens.base.types import LensError
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.flip_book import draw_flip_book
from diffusion_lens.model.generate import Edit
from diffusion_lens.results.flip_book import FlipBook, make_sprite

BETAS = (-4.0, 1.0, 2.0, 6.0)


def draw(lens: DiffusionLens, folder: Path, betas: tuple[float, ...] = BETAS, **changes: Any) -> FlipBook:
    window = changes.pop("window", None)

    def edit_at(beta: float) -> Edit | None:
        return None if beta == 1 else lens.edit(lens.intervention("gender", "male", beta, window=window))

    request = lens.request(lens.prompts[0], range(3))
    return draw_flip_book(
        lens.model, request, edit_at, betas, lens.classifier, lens.attribute_named("gender"), "male",
        setting="a turn", sae_id=lens.manifest.sae_id, max_bytes=100_000, keep=Workspace(folder), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, (2, 4)])
def test_every_frame_is_the_one_that_the_app_draws(
    tiny_lens: DiffusionLens, tmp_path: Path, window: tuple[int, int] | None
) -> None:
    made = draw(tiny_lens, tmp_path, window=window)
    assert made.betas == BETAS and made.identity == 1.0
    drawn = []
    for place, beta in enumerate(BETAS):
        turns = [] if beta == 1 else [tiny_lens.intervention("gender", "male", beta, window=window)]
        own = tiny_lens.generate(tiny_lens.prompts[0], *turns, seeds=range(3), batch_size=3)
        drawn.append(own.images)
        read = tiny_lens.classify(own.images)
        for name, predictions in read.items():
            np.testing.assert_array_equal(made.labels[name][place], predictions.labels)
            np.testing.assert_array_equal(made.certain[name][place], predictions.certain)
        np.testing.assert_allclose(made.confidence[place], read["gender"].probs.max(axis=1), rtol=1e-6)
        assert made.activation_ratio[place] == pytest.approx(own.activation_ratio or 1.0)
    assert make_sprite(np.stack(drawn), 100_000)[0] == made.sprite


def test_a_stopped_drawing_goes_on_and_gives_the_same_book(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    whole = draw(tiny_lens, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(status: Status) -> None:
        if status.share > 0.6:
            raise Killed

    with pytest.raises(Killed):
        draw(tiny_lens, tmp_path / "pieces", progress=Progress(kill))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "pieces").rglob("*.safetensors")}
    assert len(kept) == 2
    again = draw(tiny_lens, tmp_path / "pieces")
    assert again.sprite == whole.sprite and again.edit == whole.edit
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_more_strengths_draw_the_new_ones_alone(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    draw(tiny_lens, tmp_path)
    before = set(tmp_path.rglob("*.safetensors"))
    draw(tiny_lens, tmp_path, (*BETAS, 3.0))
    assert len(set(tmp_path.rglob("*.safetensors")) - before) == 1


@pytest.mark.parametrize(
    ("betas", "words"),
    [
        ((2.0, 3.0), "one strength that changes nothing"),
        ((1.0,), "2 to 201 different strengths"),
        ((1.0, 1.0, 2.0), "different strengths"),
        (tuple(float(i) / 4 for i in range(300)), "2 to 201"),
    ],
)
def test_what_is_no_flip_book_is_refused_before_anything_is_drawn(
    tiny_lens: DiffusionLens, tmp_path: Path, betas: tuple[float, ...], words: str
) -> None:
    with pytest.raises(LensError, match=words):
        draw(tiny_lens, tmp_path, betas)
    assert not list(tmp_path.iterdir())
