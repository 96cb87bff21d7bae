"""Which book belongs to a view, what a page is told of it, and how a lens comes by its books."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffusion_lens.base.types import LensError
from diffusion_lens.cli.app import app
from diffusion_lens.fit.flip_books import flip_books, plan_of
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.flip_book import FlipBook
from diffusion_lens.results.kinds import kind_of
from diffusion_lens.results.manifest import Setting, verify
from diffusion_lens.steering.settings import scale, strengths
from diffusion_lens.studio.flip_books import book_for, sprites, stored_picture
from diffusion_lens.studio.state import View, default_view
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui.flip_books import page_values


@pytest.fixture(scope="module")
def studio(tiny_lens: DiffusionLens, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A lens with a book of one prompt for each attribute."""
    folder = tmp_path_factory.mktemp("books")
    tiny_lens.save_pretrained(folder / "lens")
    lens = DiffusionLens.from_pretrained(folder / "lens")
    for book in flip_books(lens, plan_of(lens, lens.prompts[:1], ()), work=folder / "work"):
        lens.store(book)
    verify(folder / "lens")
    return Studio(DiffusionLens.from_pretrained(folder / "lens"))


@pytest.fixture
def view(studio: Studio) -> View:
    return default_view(studio.lens, "gender")


def test_a_book_has_every_step_of_the_slider_and_shows_what_is_drawn(studio: Studio, view: View) -> None:
    book = book_for(studio, view)
    assert book is not None
    ends = scale(studio.lens.setting("gender"))
    assert len(book.betas) >= 33 and (book.betas[0], book.betas[-1]) == (ends.low, ends.high)
    steps = round((ends.high - ends.low) / ends.step)
    assert {round(ends.low + i * ends.step, 6) for i in range(steps + 1)} <= set(book.betas)
    for beta in (ends.low, 1.0, ends.high):
        shown, drawn = stored_picture(studio, replace(view, beta=beta)), studio.draw(replace(view, beta=beta))
        assert shown is not None and shown.beta == beta
        for mine, theirs in ((shown.before, drawn.before), (shown.after, drawn.after)):
            np.testing.assert_array_equal(mine.labels, theirs.labels)
            np.testing.assert_array_equal(mine.certain, theirs.certain)
            np.testing.assert_allclose(mine.confidence, theirs.confidence, rtol=1e-6)
            for name in mine.readings:
                np.testing.assert_array_equal(mine.readings[name].labels, theirs.readings[name].labels)
            assert np.abs(mine.images.astype(int) - theirs.images).mean() < 3 * book.stored.error + 1


def test_towards_the_other_class_the_same_frames_come_in_the_other_order(studio: Studio, view: View) -> None:
    other = replace(view, target="female")
    book, mirrored = book_for(studio, view), book_for(studio, other)
    assert book is not None and mirrored is not None and mirrored.target == "female"
    ends = scale(studio.lens.setting("gender"))
    assert (mirrored.betas[0], mirrored.betas[-1]) == (ends.low, ends.high)
    assert list(mirrored.betas) == sorted(mirrored.betas) and list(mirrored.rows) == sorted(mirrored.rows)[::-1]
    for beta in (ends.low, ends.high):
        shown, drawn = (replace(other, beta=beta) for _ in range(2))
        stored = stored_picture(studio, shown)
        assert stored is not None
        np.testing.assert_array_equal(stored.after.labels, studio.draw(drawn).after.labels)


@pytest.mark.parametrize(
    "change",
    [
        {"own": ((3, 2.0),)}, {"n_features": 2}, {"window": (1, 3)}, {"sampler": "symmetric"}, {"first_seed": 1},
        {"n_seeds": 16}, {"prompt": "a portrait of a nurse"}, {"hold": ("age",)},
    ],
)  # fmt: skip
def test_any_other_view_has_no_book(studio: Studio, view: View, change: dict[str, object]) -> None:
    assert book_for(studio, view) is not None
    assert book_for(studio, replace(view, **change)) is None  # type: ignore[arg-type]
    assert stored_picture(studio, replace(view, **change)) is None  # type: ignore[arg-type]


def test_with_three_classes_a_book_is_of_its_own_class_alone(studio: Studio) -> None:
    old = default_view(studio.lens, "age")
    assert book_for(studio, old) is not None and book_for(studio, replace(old, target="adult")) is None


def test_a_lens_whose_turn_is_another_one_now_shows_no_old_book(studio: Studio, view: View) -> None:
    changed = {"gender": studio.lens.setting("gender").model_copy(update={"n_features": 2})}
    manifest = studio.lens.manifest.model_copy(update={"settings": {**studio.lens.settings, **changed}})
    other = Studio(replace(studio.lens, manifest=manifest))
    assert book_for(other, default_view(other.lens, "gender")) is None
    assert book_for(other, default_view(other.lens, "age")) is not None


def test_a_page_gets_plain_values_and_an_address(studio: Studio, view: View) -> None:
    values = page_values(studio, view)
    assert values is not None and json.loads(json.dumps(values)) == values
    m, n = len(values["betas"]), values["columns"]
    assert (
        np.shape(values["labels"]["gender"]) == np.shape(values["labels"]["age"]) == np.shape(values["sure"]) == (m, n)
    )
    assert set(np.unique(values["labels"]["gender"])) <= {-1, 0, 1} and n == 8 and len(values["rows"]) == m
    book = book_for(studio, view)
    assert book is not None and values["src"].startswith("gradio_api/file=") and book.file in sprites(studio)
    assert book.file.read_bytes() == book.stored.sprite
    assert page_values(studio, replace(view, own=((0, 2.0),))) is None


def test_a_lens_of_too_many_books_is_refused(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(kind_of(FlipBook)), "most", 1)
    object.__setattr__(kind_of(FlipBook), "most", 1)
    try:
        with pytest.raises(LensError, match="holds 2 flip-books, and may hold 1"):
            DiffusionLens.from_pretrained(studio.lens.folder).stored(FlipBook)
    finally:
        object.__setattr__(kind_of(FlipBook), "most", 64)


def test_the_command_adds_books_and_changes_nothing_else(copied_lens: Callable[[], Path], tmp_path: Path) -> None:
    folder = copied_lens()
    before = DiffusionLens.from_pretrained(folder).manifest
    call = ["flip-books", "--lens", str(folder), "--work", str(tmp_path / "work"), "-a", "gender", "-p",
            "a portrait of a nurse", "--device", "cpu", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    lens = DiffusionLens.from_pretrained(folder)
    added = set(lens.manifest.files) - set(before.files)
    assert {name.rpartition(".")[2] for name in added} == {"json", "safetensors", "webp"} and len(added) == 3
    assert all(lens.manifest.files[name] == seal for name, seal in before.files.items())
    (book,) = lens.stored(FlipBook).values()
    assert (book.request.prompt, book.attribute.name, book.target) == ("a portrait of a nurse", "gender", "male")
    wrong = CliRunner().invoke(app, ["flip-books", "--lens", str(folder), "-a", "height"])
    assert wrong.exit_code == 2


def test_swept_prompts_come_first(tiny_lens: DiffusionLens) -> None:
    swept, other = "a portrait of a doctor", "a portrait of a nurse"
    plan = plan_of(tiny_lens, [other, swept], ["age"])
    assert plan == [(swept, "age"), (other, "age")]
    with pytest.raises(LensError, match="does not steer 'height'"):
        next(flip_books(tiny_lens, plan_of(tiny_lens, [swept], ["height"]), work="unused"))


@pytest.mark.parametrize(
    ("betas", "poles", "classes", "low", "high", "n"),
    [
        ((-1.0, 3.0), "both", 2, -1.0, 3.0, 41),
        ((-2.0, 3.0), "both", 2, -2.0, 4.0, 61),
        ((-2.0, 3.0), "both", 3, -2.0, 3.0, 51),
        ((-2.0, 3.0), "one", 2, -2.0, 3.0, 51),
    ],
)
def test_strengths_by_hand(betas: tuple[float, ...], poles: str, classes: int, low: float, high: float, n: int) -> None:
    setting = Setting(
        attribute="gender", target="male", n_features=2, poles=poles, mode="scale", sampler="symmetric",
        betas=(*betas, 1.0),
    )  # fmt: skip
    found = strengths(setting, classes, 33, [0.37, 99.0])
    assert (found[0], found[-1], len(found)) == (low, high, n + 1) and 1.0 in found and 0.37 in found
