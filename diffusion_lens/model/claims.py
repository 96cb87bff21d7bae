"""What a pipeline's configurations claim, held against what its files hold before anything is made of them.

A number in a JSON file costs nothing to write: a million layers or a picture of 65,536 pixels a side would only be
noticed when the machine stands still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import LensError

SMALL = 2**16
"""Numbers up to here are let through for small networks too: sides of images, lengths of texts, groups."""
MAX_SIDE = 4096
"""Of the images or latents that a network is made for."""
MAX_TRAIN_STEPS = 100_000
"""Of a sampler; each costs a few numbers in several tables."""
REPEATED = ("layer", "block", "depth")
"""Parts of the names of settings that say how often something is repeated."""


def check_claims(part: str, folder: Path, files: Sequence[Path]) -> None:
    """Raise ``LensError`` where a part's configuration speaks of far more than its weight files hold.

    ``files``: the safetensors files of its weights; without any, only a sampler's steps are looked at.
    """
    for name in ("config.json", "scheduler_config.json"):
        if not (folder / name).is_file():
            continue
        values = read_json(folder / name, infinite=True)
        if not isinstance(values, dict):
            raise LensError(f"The {part} has a {name} that lists no settings; fetch it again.")
        shapes = _shapes(files)
        n_numbers = sum(map(prod, shapes))
        for key, number in _numbers(values):
            limit = _limit(key, len(shapes), n_numbers)
            if limit is not None and not abs(number) <= limit:
                raise LensError(
                    f"The {part} has a {name} that speaks of {number:.6g} under '{key}', which nothing in its files "
                    "bears out; fetch it again."
                )


def _limit(key: str, n_tensors: int, n_numbers: int) -> int | None:
    if key == "num_train_timesteps":
        return MAX_TRAIN_STEPS
    if not n_tensors:
        return None
    if "size" in key and ("sample" in key or "image" in key):
        return MAX_SIDE
    if any(word in key for word in REPEATED):
        return max(n_tensors, n_numbers if "channels" in key or "dim" in key else 0)
    return max(SMALL, n_numbers)


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration with the name that it stands under."""
    if isinstance(values, bool):
        return
    if isinstance(values, int):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)


def _shapes(files: Sequence[Path]) -> list[list[int]]:
    """The shape of every tensor of some safetensors files, read off their headers."""
    found = []
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no dict
        except (SafetensorError, OSError):
            raise LensError(f"{path} is not a readable safetensors file; fetch it again.") from None
    return found
