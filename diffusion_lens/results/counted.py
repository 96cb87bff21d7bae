"""What a model draws unedited, prompt by prompt, as counted once and kept in its lens; reads without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from diffusion_lens.base.files import read_json
from diffusion_lens.base.foreign import reading
from diffusion_lens.base.types import Attribute, GenerationRequest, Predictions, Share
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.measurement_files import FORMAT_VERSION, Missing, measured_beside, save_measured


@dataclass(frozen=True, eq=False)
class CountedShares:
    """Unedited images of several prompts (``""`` stands for none), as read by one classifier."""

    measurements: Mapping[str, Measurement]

    @property
    def classifier_id(self) -> str:
        """Who read them."""
        return next(iter(self.measurements.values())).classifier_id

    @cached_property
    def shares(self) -> Mapping[str, Mapping[str, tuple[Share, ...]]]:
        """Prompt → attribute → every class's share, corrected for the classifier's error."""
        return {prompt: {name: one[name].shares for name in one.readings} for prompt, one in self.measurements.items()}


def save_shares(counted: CountedShares, folder: Path, stem: str) -> Path:
    """Write them; returns the path of the JSON."""
    return save_measured(folder, stem, {"prompts": list(counted.measurements)}, list(counted.measurements.values()))


def load_shares(folder: Path, stem: str, missing: Missing) -> CountedShares:
    """Read counted shares; raises ``LensError`` that names a file of another kind.

    ``missing``: what files of version 0.4 do not hold themselves.
    """
    path = folder / f"{stem}.json"
    values = read_json(path)
    with reading(path, "a file of counted shares", "run check --full --part 1 --store again"):
        if values.get("format_version") == FORMAT_VERSION:
            measured = measured_beside(values, folder, stem)
            return _some(dict(zip(map(str, values["prompts"]), measured, strict=True)))
        return _of_0_4(values, missing)


def _some(measurements: Mapping[str, Measurement]) -> CountedShares:
    if not measurements:
        raise ValueError("it counts nothing")
    return CountedShares(measurements)


_SHARES = TypeAdapter(tuple[Share, ...])


def _of_0_4(values: Mapping[str, Any], missing: Missing) -> CountedShares:
    """Version 0.4 kept counts alone, so that these images have no order and cannot be paired."""
    found = {}
    for prompt, own in values["shares"].items():
        readings: dict[str, Predictions] = {}
        for name, stored in own.items():
            shares = _SHARES.validate_python(stored)
            attribute = Attribute(name, tuple(share.label for share in shares))
            counts = [share.count for share in shares]
            labels = np.repeat(np.arange(len(counts) + 1), [*counts, shares[0].n_uncertain])
            decided = labels < len(counts)
            readings[name] = Predictions.from_labels(labels * decided, decided, attribute, values["classifier_id"])
        n, first = len(next(iter(readings.values())).certain), int(values["first_seed"])
        request = GenerationRequest(
            prompt,
            tuple(range(first, first + n)),
            int(values["n_steps"]),
            float(values["guidance_scale"]),
            missing.model_id,
        )
        found[prompt] = Measurement(request, None, readings, missing.confusion, str(values["classifier_id"]))
    return _some(found)
