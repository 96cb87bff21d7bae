"""Measured figures as plain JSON values: what ``--json``, reports and downloads hold."""

from __future__ import annotations

from typing import Any

from diffusion_lens.base.edits import describe
from diffusion_lens.base.plain import to_plain
from diffusion_lens.results.comparison import MethodRow
from diffusion_lens.results.comparison_store import row_values
from diffusion_lens.results.measurement import Figures
from diffusion_lens.results.sweeps import SweepPoint, SweepResult

FIGURES = (
    "shares", "log_ratio", "log_ratio_corrected", "fd", "fd_floor", "n", "n_uncertain", "spillover", "agreement",
    "changes", "activation_ratio", "fid",
)  # fmt: skip
ROW_FIGURES = (
    "n", "n_uncertain", "shares", "log_ratio", "log_ratio_corrected", "fd", "fd_floor", "fid", "spd", "agreement",
    "kept", "kept_measured", "certain", "activation_ratio", "flagged",
)  # fmt: skip


def figures_json(figures: Figures) -> dict[str, Any]:
    """What a run says of one attribute, and which run it was."""
    run: dict[str, Any] = {
        "request": figures.request,
        "edit": None if figures.edit is None else describe(figures.edit),
        "classifier_id": figures.classifier_id,
    }
    numbers = {name: getattr(figures, name) for name in FIGURES}
    run |= {"n_invalid": figures.measurement.n_invalid, "invalid": figures.measurement.invalid_note}
    run |= {"changes": figures.measurement.changes, "agreement": figures.measurement.agreement}
    plain: dict[str, Any] = to_plain({"attribute": figures.attribute, **numbers, **run})
    return plain


def sweep_json(result: SweepResult) -> dict[str, Any]:
    """A sweep, point by point, with every image's class of the steered attribute."""
    plain: dict[str, Any] = to_plain({
        "points": [_point(point) for point in result.points],
        **{name: getattr(result, name) for name in (
            "attribute", "target", "request", "setting", "classifier_id", "is_control", "control",
            "control_seed", "provenance",
        )},
    })  # fmt: skip
    return plain


def _point(point: SweepPoint) -> dict[str, Any]:
    own = {name: getattr(point, name) for name in FIGURES}
    return {
        "beta": point.beta,
        **own,
        "n_invalid": point.measurement.n_invalid,
        "labels": point.labels,
        "certain": point.certain,
    }


def row_json(row: MethodRow) -> dict[str, Any]:
    """A row of a comparison with all its numbers."""
    plain: dict[str, Any] = to_plain({**row_values(row), **{name: getattr(row, name) for name in ROW_FIGURES}})
    return plain
