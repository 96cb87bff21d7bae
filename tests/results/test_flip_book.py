"""Flip-books on disk: what comes back is what was kept, and what does not fit together is refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_lens.base.files import load_tensors, read_json, save_tensors, write_json
from diffusion_lens.base.types import Attribute, GenerationRequest, LensError
from diffusion_lens.results.flip_book import (
    MAX_CELL,
    FlipBook,
    load_flip_book,
    make_sprite,
    save_flip_book,
)

GENDER = Attribute("gender", ("female", "male"))
AGE = Attribute("age", ("young", "adult", "old"))
BETAS = (-1.0, 0.0, 1.0, 3.0)


def frames(m: int = 4, n: int = 3, side: int = 16) -> np.ndarray:
    """Smooth images, all different, that a lossy format keeps well."""
    y, x = np.mgrid[:side, :side] / side
    base = np.stack([y, x, 1 - y], axis=-1) * 200
    shift = np.arange(m * n).reshape(m, n, 1, 1, 1) * 3
    return np.clip(base + shift, 0, 255).astype(np.uint8)


def book(images: np.ndarray | None = None, **changes: Any) -> FlipBook:
    drawn = frames() if images is None else images
    m, n = drawn.shape[:2]
    sprite, cell, error = make_sprite(drawn, 100_000)
    rng = np.random.default_rng(0)
    made = FlipBook(
        GenerationRequest("a nurse", tuple(range(n)), 4, 2.0, "small"), GENDER, "male", BETAS[:m], 1.0, "0123456789ab",
        "a turn", "s", "c", (GENDER, AGE),
        {a.name: rng.integers(0, len(a.classes), (m, n)) for a in (GENDER, AGE)},
        {a.name: rng.random((m, n)) > 0.3 for a in (GENDER, AGE)},
        rng.random((m, n), dtype=np.float32), np.linspace(1, 2, m, dtype=np.float32), cell, sprite, error,
    )  # fmt: skip
    return replace(made, **changes)


def test_a_book_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = book()
    save_flip_book(kept, tmp_path, "gender-1")
    found = load_flip_book(tmp_path, "gender-1")
    for name in ("request", "attribute", "target", "betas", "identity", "edit", "setting", "attributes", "cell"):
        assert getattr(found, name) == getattr(kept, name), name
    assert found.sprite == kept.sprite and found.error == kept.error and found.digest == kept.digest
    for name in ("gender", "age"):
        np.testing.assert_array_equal(found.labels[name], kept.labels[name])
        np.testing.assert_array_equal(found.certain[name], kept.certain[name])
    np.testing.assert_array_equal(found.confidence, kept.confidence)
    np.testing.assert_array_equal(found.activation_ratio, kept.activation_ratio)


def test_a_frame_stands_where_its_strength_and_seed_are() -> None:
    drawn = frames(4, 3)
    kept = book(drawn)
    seen = kept.frames()
    assert seen.shape == drawn.shape
    assert np.abs(seen.astype(int) - drawn).mean() == pytest.approx(kept.error, abs=1e-9) and kept.error < 12
    with Image.open(io.BytesIO(kept.sprite)) as sheet:
        assert sheet.size == (3 * 16, 4 * 16)
        one = np.asarray(sheet.convert("RGB"))[2 * 16 : 3 * 16, 16:32]
    np.testing.assert_array_equal(one, seen[2, 1])


def test_large_images_are_kept_small_and_a_sprite_keeps_to_its_room() -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 255, (2, 2, 300, 300, 3), np.uint8)
    sprite, cell, _ = make_sprite(noise, 500_000)
    assert cell == (100, 100) and max(cell) <= MAX_CELL
    smaller, _, error = make_sprite(noise, len(sprite) - 1)
    assert len(smaller) < len(sprite) and error > 0
    with pytest.raises(LensError, match=r"takes [\d,]+ bytes and may take 100"):
        make_sprite(noise, 100)
    with pytest.raises(LensError, match="higher than a WebP may be"):
        make_sprite(np.zeros((200, 1, 128, 8, 3), np.uint8), 500_000)


def test_the_furthest_strength_is_never_the_one_that_changes_nothing() -> None:
    assert book().furthest == 3.0
    assert book(betas=(-3.0, -1.0, 0.0, 1.0)).furthest == -3.0


def head(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = read_json(folder / "b.json")
        change(values)
        write_json(folder / "b.json", values)

    return damage


def arrays(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = load_tensors(folder / "b.safetensors")
        save_tensors(folder / "b.safetensors", found | {name: make(found[name]) for name, make in changes.items()})

    return damage


def picture(width: int, height: int, **options: Any) -> Callable[[Path], None]:
    return lambda folder: Image.new("RGB", (width, height)).save(folder / "b.webp", options.pop("format", "WEBP"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (head(lambda v: v.update(betas=[0.0, -1.0, 1.0, 3.0])), "do not rise"),
        (head(lambda v: v.update(betas=[0.0, 0.5, 1.0, 3000.0])), "do not rise"),
        (head(lambda v: v.update(betas=[float(i) for i in range(202)])), "'betas' is wrong"),
        (head(lambda v: v.update(identity=0.5)), "the model as it is"),
        (head(lambda v: v.update(target="neither")), "no class of gender"),
        (head(lambda v: v.update(cell=[512, 512])), "may have 128 a side"),
        (head(lambda v: v.update(cell=[16, 8])), r"48 × 64 pixels and should be 24 × 64"),
        (head(lambda v: v["request"].update(seeds=list(range(17)))), "may have 16"),
        (head(lambda v: v["request"].update(seeds=[0])), "not 4 × 1"),
        (head(lambda v: v.update(attribute={"name": "tone", "classes": ["a", "b"]})), "does not read tone"),
        (head(lambda v: v.update(extra=1)), "'extra' is wrong"),
        (head(lambda v: v.update(request={})), "not a whole flip-book"),
        (arrays(labels=lambda a: a + 7), "a class that it has not"),
        (arrays(labels=lambda a: a[:1]), "not a whole flip-book"),
        (arrays(certain=lambda a: a[:, :1]), "readings of gender are not 4 × 3"),
        (arrays(confidence=lambda a: a * np.nan), "between 0 and 1"),
        (arrays(activation_ratio=lambda a: a + np.inf), "no numbers"),
        (picture(48, 80), "48 × 80 pixels"),
        (picture(48, 64, format="PNG"), "no WebP"),
        (lambda folder: (folder / "b.webp").write_bytes(b"x" * 2_000_001), "more than 2,000,000 bytes"),
        (lambda folder: (folder / "b.webp").unlink(), r"b\.webp is missing"),
    ],
)
def test_a_strangers_book_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    save_flip_book(book(), tmp_path, "b")
    damage(tmp_path)
    with pytest.raises(LensError, match=words) as caught:
        load_flip_book(tmp_path, "b")
    assert "b." in str(caught.value)
