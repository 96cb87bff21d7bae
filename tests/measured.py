"""Measurements made by hand, for tests of what is derived from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import make_dataclass
from typing import Any

import numpy as np

from diffusion_lens.base.types import Attribute, GenerationRequest, Predictions
from diffusion_lens.results.comparison import CSV_FIELDS, MethodRow
from diffusion_lens.results.measurement import Measurement


def measured(
    labels: Mapping[Attribute, np.ndarray],
    certain: np.ndarray | None = None,
    *,
    prompt: str | None = "a portrait",
    confusion: Mapping[str, np.ndarray] | None = None,
    **changes: object,
) -> Measurement:
    """Labels ``[n]`` per attribute, read by a classifier that hardly ever errs, on seeds 0 to n − 1."""
    n = len(next(iter(labels.values())))
    sure = np.ones(n, bool) if certain is None else certain
    tables = {a.name: 500 * np.eye(len(a.classes), dtype=int) for a in labels}
    return Measurement(
        request=GenerationRequest(prompt, tuple(range(n)), 3, 1.0, "fake"),
        edit=None,
        readings={a.name: Predictions.from_labels(own, sure, a, "hand") for a, own in labels.items()},
        confusion={**tables, **(confusion or {})},
        classifier_id="hand",
        **changes,  # type: ignore[arg-type]
    )


def counted(attribute: Attribute, *counts: int, undecided: int = 0) -> np.ndarray:
    """Labels with as many images per class as ``counts``, in class order; ``undecided`` ones last."""
    assert len(counts) == len(attribute.classes)
    return np.concatenate([np.repeat(np.arange(len(counts)), counts), np.zeros(undecided, int)])


def row_with(row: MethodRow, **values: Any) -> Any:
    """A row of a comparison that shows numbers of a test's choosing; ``dataclasses.replace`` works on it."""
    names = (*CSV_FIELDS, *values)
    shown = {name: getattr(row, name) for name in names if name not in values} | values
    return make_dataclass("Row", list(shown), frozen=True)(**shown)
