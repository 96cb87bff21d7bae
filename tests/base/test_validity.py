"""Pictures that show nobody: values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_lens.base.types import Attribute, Generation, GenerationRequest, LensError, Predictions
from diffusion_lens.base.validity import (
    count_faults,
    discard,
    faults_of,
    find_constant,
    is_constant,
    require_valid,
    say_faults,
)

GENDER = Attribute("gender", ("female", "male"))


def noise(spread: int, n: int = 1, side: int = 16) -> np.ndarray:
    values = np.random.default_rng(0).integers(-spread, spread + 1, (n, side, side, 3))
    return (values + 128).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.zeros((8, 8, 3), np.uint8), True),
        (np.full((8, 8, 3), 255, np.uint8), True),
        (np.broadcast_to(np.array([200, 10, 90], np.uint8), (8, 8, 3)), True),  # one colour, three values
        (noise(2)[0], True),
        (noise(10)[0], False),
        (np.zeros((0, 8, 3), np.uint8), True),
    ],
)
def test_flat_pictures_are_constant(image: np.ndarray, expected: bool) -> None:
    assert is_constant(image) is expected


def test_one_channel_that_varies_is_a_picture() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[::2, :, 1] = 20
    assert not is_constant(image)


def test_a_few_bright_pixels_do_not_make_a_flat_picture_one() -> None:
    image = np.zeros((512, 512, 3), np.uint8)
    image[0, :10] = 255
    assert is_constant(image)


def test_faults_take_certainty_and_nothing_else() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    read = {"gender": Predictions(probs, np.array([True, True, False]), GENDER, "x")}
    left = discard(read, (None, "not finite", None))["gender"]
    assert left.certain.tolist() == [True, False, False]
    assert left.counts.tolist() == [1, 0] and left.n_uncertain == 2
    assert np.array_equal(left.probs, probs)
    assert discard(read, ())["gender"] is read["gender"]


def test_faults_are_counted_and_said() -> None:
    faults = ("constant", None, "not finite", "not finite", None)
    assert count_faults(faults) == {"not finite": 2, "constant": 1}
    text = say_faults(count_faults(faults), 5)
    assert text.startswith("3 of 5 images") and "2 not finite" in text and "1 constant" in text
    assert say_faults({}, 5) == ""


def test_a_run_without_a_valid_image_is_an_error() -> None:
    require_valid(())
    require_valid(("censored", None))
    with pytest.raises(LensError, match=r"None of the 3 images.*1 overflowed.*2 was blacked out"):
        require_valid(("censored", "not finite", "censored"))


def test_a_generation_knows_its_valid_images() -> None:
    request = GenerationRequest(None, (0, 1), 2, 1.0, "x")
    images = np.concatenate([noise(60), np.zeros((1, 16, 16, 3), np.uint8)])
    assert Generation(images, request).valid.tolist() == [True, True]
    named = Generation(images, request, faults=(None, "censored"))
    assert named.valid.tolist() == [True, False] and faults_of(named) == (None, "censored")
    assert faults_of(Generation(images, request)) == (None, "constant") == find_constant(images)
    with pytest.raises(LensError, match="per image"):
        Generation(images, request, faults=(None,))
