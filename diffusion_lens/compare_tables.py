"""A comparison on disk and as text: JSON with everything, CSV of the rows, a table for the terminal or a page."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from diffusion_lens.artifacts import read_json, read_manifest, write_json, write_manifest
from diffusion_lens.compare import CompareConfig, Comparison
from diffusion_lens.compare_rows import Measured, MethodRow
from diffusion_lens.records import load_sweep, save_sweep, to_plain
from diffusion_lens.types import Attribute, LensError, LogRatio

STORED = "comparisons"
COLUMNS: dict[str, str] = {
    "name": "method", "strength": "strength", "shares": "shares (corrected)", "fd": "FD", "fd_floor": "noise floor",
    "log_ratio_corrected": "log ratio", "spd": "SPD", "fid": "FID*", "inception": "IS*", "image_likeness": "CLIP-I*",
    "prompt_likeness": "CLIP-T*", "subgroup_entropy": "entropy", "kept": "others kept", "certain": "certain",
    "activation_ratio": "|h'|/|h|", "seconds_to_fit": "fit, s", "seconds_per_image": "s/image",
}  # fmt: skip
"""Fields of a row that a table shows, and their headings; * are named in the comparison's ``labels``."""


PARTS: dict[str, tuple[str, ...]] = {
    "balance": ("name", "strength", "shares", "fd", "fd_floor", "log_ratio_corrected", "spd"),
    "likeness": ("name", "fid", "inception", "image_likeness", "prompt_likeness", "kept"),
    "soundness and cost": (
        "name", "certain", "subgroup_entropy", "activation_ratio", "seconds_to_fit", "seconds_per_image",
    ),
}  # fmt: skip
"""The same columns in parts that fit a terminal."""


def save_comparison(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.json``, ``comparison.csv``, ``comparison.md`` and one sweep per method."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, curve in comparison.curves.items():
        save_sweep(curve, folder, key)
    plain = to_plain({
        "config": comparison.config.model_dump(mode="json"),
        "attribute": comparison.attribute,
        "target": comparison.target,
        "rows": comparison.rows,
        "curves": list(comparison.curves),
        "labels": comparison.labels,
        "rule": comparison.rule,
        "lens_key": comparison.lens_key,
        "classifier_id": comparison.classifier_id,
    })  # fmt: skip
    (folder / "comparison.csv").write_text(csv_text(comparison), encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(comparison), encoding="utf-8")
    write_json(folder / "comparison.json", plain)


def load_comparison(folder: Path) -> Comparison:
    """Read what ``save_comparison`` wrote; raises ``LensError`` that names a bad file."""
    values = read_json(folder / "comparison.json")
    try:
        return Comparison(
            config=CompareConfig.parse(values["config"], where="comparison.json"),
            attribute=TypeAdapter(Attribute).validate_python(values["attribute"]),
            target=tuple(float(share) for share in values["target"]),
            rows=TypeAdapter(tuple[MethodRow, ...]).validate_python(values["rows"]),
            curves={key: load_sweep(folder, key) for key in values["curves"]},
            labels=dict(values["labels"]),
            rule=values["rule"],
            lens_key=values["lens_key"],
            classifier_id=values["classifier_id"],
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LensError):
            raise
        raise LensError(f"{folder / 'comparison.json'} is not a stored comparison; run it again.") from None


def add_to_lens(comparison: Comparison, lens_folder: Path) -> Path:
    """Store a comparison inside a lens folder, in ``comparisons/<attribute>``, and seal the lens anew."""
    manifest = read_manifest(lens_folder)
    target = lens_folder / STORED / comparison.attribute.name.replace(" ", "-")
    shutil.rmtree(target, ignore_errors=True)
    save_comparison(comparison, target)
    write_manifest(lens_folder, manifest)
    return target


def stored_comparisons(lens_folder: Path) -> dict[str, Comparison]:
    """Attribute name → the comparison stored in a lens folder."""
    folders = sorted(path.parent for path in (lens_folder / STORED).glob("*/comparison.json"))
    found = [load_comparison(folder) for folder in folders]
    return {comparison.attribute.name: comparison for comparison in found}


def cells(row: MethodRow, fields: tuple[str, ...] = tuple(COLUMNS)) -> list[str]:
    """One row of the table as text, ``fields`` of ``COLUMNS``; a method without numbers shows its note."""
    if row.note:
        return [row.name, f"not run: {row.note}", *[""] * (len(fields) - 2)]
    return [_cell(row, field) for field in fields]


def _cell(row: MethodRow, field: str) -> str:
    value: Any = getattr(row, field)
    if field == "strength":
        return f"{value:g} ({row.strength_name})" if row.strength_name else "–"
    if field == "shares":
        return ", ".join(f"{s.label} {s.corrected:.0%}" for s in value)
    if field == "subgroup_entropy":
        return ", ".join(f"{label} {e:.2f}" for label, e in (value or {}).items())
    if field == "activation_ratio":
        return "–" if value is None else f"{value:.2f}{' !' if row.flagged else ''}"
    if value is None:
        return "–"
    if isinstance(value, Measured):
        return f"{value.value:.3f} ({value.interval[0]:.3f} to {value.interval[1]:.3f})"
    if isinstance(value, LogRatio):
        return f"{value.value:+.2f} ({value.interval[0]:+.2f} to {value.interval[1]:+.2f})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(comparison: Comparison) -> str:
    """The table with its headings, and below it what was done and what the starred columns are."""
    config = comparison.config
    told_rows = [list(COLUMNS.values()), *(cells(row) for row in comparison.rows)]
    lines = [" | ".join(text.replace("|", "\\|") for text in row) for row in told_rows]
    lines.insert(1, " | ".join(["---"] * len(COLUMNS)))
    prompt = "no prompt" if config.prompt is None else f'"{config.prompt}"'
    goal = ", ".join(f"{c} {s:.0%}" for c, s in zip(comparison.attribute.classes, comparison.target, strict=True))
    told = [
        f"{comparison.attribute.name}, {prompt}, target {goal}; n = {config.n} per row, on seeds not used for tuning.",
        f"Setting of each method: {comparison.rule} ({config.n_tune} images per strength.)",
        "FD and SPD from decided images, bootstrap intervals; log ratio corrected for the classifier's error. "
        "! marks activations that leave the data's range.",
        *(f"{COLUMNS[field]} {text}." for field, text in comparison.labels.items()),
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "\n".join(f"- {line}" for line in told) + "\n"


def csv_text(comparison: Comparison) -> str:
    """One line per method; intervals, shares and entropies in columns of their own."""
    rows = [_flat(row) for row in comparison.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(row: MethodRow) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in vars(row).items():
        if name == "shares":
            for share in value:
                flat[f"share {share.label}"], flat[f"share {share.label} corrected"] = share.raw, share.corrected
                flat[f"share {share.label} low"], flat[f"share {share.label} high"] = share.corrected_interval
        elif isinstance(value, Measured | LogRatio):
            flat[name], (flat[f"{name} low"], flat[f"{name} high"]) = value.value, value.interval
        elif isinstance(value, dict):
            flat.update({f"{name} {key}": number for key, number in value.items()})
        else:
            flat[name] = value
    return flat
