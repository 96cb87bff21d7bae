"""What people hand to a request: seeds in every usual form, one prompt, plain numbers, or one sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_lens.base.types import (
    MAX_IMAGES,
    MAX_SEED,
    FeatureSet,
    GenerationRequest,
    Intervention,
    LensError,
    as_seeds,
    as_whole,
    same_request_but_edit,
)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (range(2, 5), (2, 3, 4)),
        ([7, 7], (7, 7)),
        (5, (5,)),
        (np.arange(3), (0, 1, 2)),
        (np.array([1, 2], dtype=np.uint8), (1, 2)),
        (np.array(4), (4,)),
        (np.int32(6), (6,)),
        (torch.tensor([8, 9]), (8, 9)),
        ([torch.tensor(3), np.int64(1)], (3, 1)),
        ([2.0, 3.0], (2, 3)),
        (np.array([1.0]), (1,)),
        ((seed for seed in (4, 5)), (4, 5)),
        ([MAX_SEED], (MAX_SEED,)),
    ],
)
def test_seeds_in_every_usual_form_become_plain_numbers(given: Any, wanted: tuple[int, ...]) -> None:
    seeds = as_seeds(given)
    assert seeds == wanted
    assert {type(seed) for seed in seeds} == {int}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "1 to 20,000 images"),
        (np.array([]), "1 to 20,000 images"),
        (range(0), "1 to 20,000 images"),
        (range(10**12), "has 1,000,000,000,000"),
        (list(range(MAX_IMAGES + 1)), "has 20,001"),
        (None, "range"),
        ("12", "'12'"),
        ({"a": 1}, "whole numbers"),
        ([1.5], "whole number; it is 1.5"),
        ([float("nan")], "finite"),
        ([True], "must be a number; it is True"),
        (["1"], "must be a number; it is '1'"),
        ([[1, 2]], "must be a number"),
        (np.zeros((2, 2)), "must be a number"),
        ([-1], "0 to"),
        ([MAX_SEED + 1], "0 to"),
        (1j, "must be a number"),
    ],
)
def test_anything_else_is_one_sentence(given: Any, words: str) -> None:
    with pytest.raises(LensError, match=words) as caught:
        as_seeds(given)
    assert "\n" not in str(caught.value)


def test_a_request_keeps_plain_numbers() -> None:
    request = GenerationRequest("a nurse", np.arange(2), np.int64(4), np.float32(1.5), "m")
    assert request == GenerationRequest("a nurse", (0, 1), 4, 1.5, "m")
    assert hash(request) == hash(GenerationRequest("a nurse", (0, 1), 4, 1.5, "m"))
    assert (type(request.n_steps), type(request.guidance_scale)) == (int, float)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ["a nurse", "a judge"]}, "one prompt"),
        ({"prompt": b"a nurse"}, "one prompt"),
        ({"n_steps": 2.5}, "n_steps must be a whole number"),
        ({"n_steps": "4"}, "n_steps must be a number"),
        ({"n_steps": 0}, "between 1 and"),
        ({"guidance_scale": None}, "guidance_scale must be a number"),
        ({"guidance_scale": float("nan")}, "between 0 and 50"),
        ({"guidance_scale": 51}, "between 0 and 50"),
        ({"model_id": 3}, "names its model"),
    ],
)
def test_wrong_types_in_a_request_are_one_sentence(changes: dict[str, Any], words: str) -> None:
    values: dict[str, Any] = {"prompt": "a nurse", "seeds": (0,), "n_steps": 4, "guidance_scale": 1.0, "model_id": "m"}
    with pytest.raises(LensError, match=words):
        GenerationRequest(**{**values, **changes})


def test_strengths_are_numbers() -> None:
    features = FeatureSet((1,), (0.5,), "gender", "male", "sae")
    assert Intervention.at_beta(features, "scale", np.float64(2.0)).beta == 2
    for beta in ("2", None, float("nan"), 101):
        with pytest.raises(LensError, match="beta must be"):
            Intervention.at_beta(features, "scale", beta)
    assert as_whole(3.0, "k") == 3


@dataclass(frozen=True)
class Drawn:
    """Stands for a generation or a measurement."""

    request: GenerationRequest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "a judge"}, r"another prompt \('a judge' and not 'a nurse'\)"),
        ({"n_steps": 5}, r"another number of steps \(5 and not 4\)"),
        ({"guidance_scale": 2.0}, "another guidance scale"),
        ({"model_id": "other"}, "another model"),
        ({"seeds": (1, 0)}, "other seeds;"),
    ],
)
def test_a_reference_is_of_the_same_request(changes: dict[str, Any], words: str) -> None:
    request = GenerationRequest("a nurse", (0, 1), 4, 1.0, "m")
    same_request_but_edit(Drawn(request), Drawn(replace(request)))
    with pytest.raises(LensError, match=words):
        same_request_but_edit(Drawn(request), Drawn(replace(request, **changes)))
