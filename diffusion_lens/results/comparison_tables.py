"""A comparison as text: which value is best in a column, a table for the terminal or a page, CSV of the rows."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, log
from pathlib import Path
from typing import Any

from diffusion_lens.base.files import write_text
from diffusion_lens.base.text import as_csv
from diffusion_lens.base.types import LogRatio
from diffusion_lens.results.comparison import UNSTEERED, Comparison, Measured, MethodRow, flat_row

COLUMNS: dict[str, str] = {
    "name": "method", "rank": "rank", "kept": "others kept", "margin": "above random features",
    "strength": "strength", "shares": "shares (corrected)", "n": "n", "n_uncertain": "uncertain",
    "fd": "FD", "fd_floor": "noise floor",
    "log_ratio_corrected": "log ratio", "spd": "SPD", "fid": "FID*", "inception": "IS*", "image_likeness": "CLIP-I*",
    "prompt_likeness": "CLIP-T*", "subgroup_entropy": "entropy", "explicit": "explicit prompts kept*",
    "quality": "to drawings*", "certain": "certain",
    "activation_ratio": "|h'|/|h|", "seconds_to_fit": "fit, s", "seconds_per_image": "s/image",
}  # fmt: skip
"""Fields of a row that a table shows, and their headings; * are named in the comparison's ``labels``."""


PARTS: dict[str, tuple[str, ...]] = {
    "balance": (
        "name", "rank", "kept", "margin", "strength", "shares", "n", "n_uncertain", "fd", "fd_floor",
        "log_ratio_corrected", "spd",
    ),
    "likeness": ("name", "explicit", "quality", "fid", "inception", "image_likeness", "prompt_likeness"),
    "soundness and cost": (
        "name", "certain", "subgroup_entropy", "activation_ratio", "seconds_to_fit", "seconds_per_image",
    ),
}  # fmt: skip
"""The same columns in parts that fit a terminal."""
NEWER = ("rank", "margin", "explicit", "quality")
"""Columns that comparisons of version 0.4 do not have."""

NOT_MEASURED, NOT_RANKED = "not measured", "–"
BEST: dict[str, Callable[[float], float]] = {
    "fd": lambda v: v, "log_ratio_corrected": abs, "spd": lambda v: v, "fid": lambda v: v, "inception": lambda v: -v,
    "image_likeness": lambda v: -v, "prompt_likeness": lambda v: -v, "kept": lambda v: -v, "certain": lambda v: -v,
    "explicit": lambda v: -v, "quality": lambda v: v,
    "activation_ratio": lambda v: abs(log(max(v, 1e-9))), "seconds_to_fit": lambda v: v,
    "seconds_per_image": lambda v: v,
}  # fmt: skip
"""Field → a number of which the least is best; the other columns have no better and worse."""


def columns_of(comparison: Comparison, part: str | None = None) -> tuple[str, ...]:
    """The columns of a comparison's table, or of one of its ``PARTS``: without those that no row has a number for."""
    wanted = tuple(COLUMNS) if part is None else PARTS[part]
    empty = {name for name in NEWER if all(getattr(row, name) is None for row in comparison.rows)}
    return tuple(name for name in wanted if name not in empty)


def number(row: MethodRow, field: str) -> float | None:
    """The value of a column without its interval; ``None`` where it was not measured."""
    value: Any = None if row.note else getattr(row, field)
    value = value.value if isinstance(value, Measured | LogRatio) else value
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def movers(comparison: Comparison) -> list[MethodRow]:
    """The methods that surely came nearer to the target than no steering: their interval of FD lies below its own."""
    base = next((row.fd for row in comparison.rows if row.method == UNSTEERED), None)
    tried = [row for row in comparison.rows if row.method != UNSTEERED and row.strength and not row.note]
    return [row for row in tried if base is None or row.fd is None or row.fd.interval[1] < base.interval[0]]


def best(comparison: Comparison) -> dict[str, frozenset[str]]:
    """Column → the methods with its best value, ties within the interval among them; none where all are alike.

    Controls take part, so that one that does as well as a method is seen to; the unsteered model and methods that did
    not surely move anything do not: whoever changes nothing keeps everything.
    """
    playing = movers(comparison)
    found = {}
    for field, cost in BEST.items():
        values = {row.method: cost(v) for row in playing if (v := number(row, field)) is not None}
        least = min(values.values(), default=0.0)
        leaders = [row for row in playing if values.get(row.method) == least]
        winners = frozenset(row.method for row in playing if row.method in values and _ties(row, leaders, field))
        found[field] = winners if len(winners) < len(playing) or len(playing) == 1 else frozenset()
    return found


def _ties(row: MethodRow, leaders: list[MethodRow], field: str) -> bool:
    """Whether a row's value cannot be told from the best one's: paired where both are of the same images."""
    if any(row is leader for leader in leaders):
        return True
    if field == "kept" and row.rank is not None and any(leader.rank is not None for leader in leaders):
        return row.rank == 1
    own, best_one = getattr(row, field), getattr(leaders[0], field)
    if not isinstance(own, Measured) or not isinstance(best_one, Measured):
        return False
    return own.interval[0] <= best_one.value <= own.interval[1] or (
        best_one.interval[0] <= own.value <= best_one.interval[1]
    )


def standing(comparison: Comparison) -> str:
    """Who keeps most at balance, how far above random features, and who never gets there; empty for older rules."""
    if comparison.config.protocol != "balance":
        return ""
    placed = sorted(
        (row for row in comparison.rows if row.rank is not None), key=lambda row: (row.rank, -(row.kept or 0))
    )
    told = []
    for row in placed:
        margin = row.margin
        above = "" if margin is None else f", {margin.value:+.0%} over random features" + (
            "" if margin.interval[0] > 0 or margin.interval[1] < 0 else " (not sure)"
        )  # fmt: skip
        undecided = f", {row.n_uncertain} of {row.n} undecided" if row.n_uncertain else ""
        told.append(f"{row.rank}. {row.name} {row.kept or 0:.0%}{above}{undecided}")
    short = [row for row in comparison.rows if row.reached is False and not row.note]
    said = [f"Others kept at balance (equal ranks cannot be told apart): {'; '.join(told)}." if told else ""]
    if short:
        named = ", ".join(f"{row.name} (FD {row.fd.value:.2f} at best)" if row.fd else row.name for row in short)
        said.append(f"Never at balance: {named}.")
    return " ".join(part for part in said if part)


def verdict(comparison: Comparison) -> str:
    """Who is best where, and which methods moved nothing for sure or could not run, in plain sentences."""
    named = {row.method: row.name for row in comparison.rows}
    leaders: dict[str, list[str]] = {}
    for field, methods in best(comparison).items():
        for method in methods:
            leaders.setdefault(method, []).append(COLUMNS[field])
    parts = [
        f"{named[method]} in {len(fields)} ({', '.join(fields)})"
        for method, fields in sorted(leaders.items(), key=lambda pair: -len(pair[1]))
    ]
    said = [standing(comparison)] if standing(comparison) else []
    said.append(f"Best value, by column: {'; '.join(parts)}." if parts else "No method surely moved anything.")
    if leaders and "difflens" in named and "difflens" not in leaders:
        said.append("DiffLens has the best value in none.")
    steered = [row for row in comparison.rows if row.method != UNSTEERED]
    still = [row.name for row in steered if not row.strength and not row.note]
    surely = {row.method for row in movers(comparison)}
    unsure = [row.name for row in steered if row.strength and not row.note and row.method not in surely]
    noise = [row.name for row in steered if row.strength and row.fd and row.fd.value <= (row.fd_floor or 0)]
    if noise:
        said.append(f"At balance within noise: {', '.join(noise)}.")
    if unsure:
        said.append(f"Not surely nearer than no steering, and so best in nothing: {', '.join(unsure)}.")
    if still:
        said.append(f"No strength was better than none for {', '.join(still)}.")
    said += [f"{row.name} was not run: {row.note}" for row in steered if row.note]
    return " ".join(said)


def short_table(comparison: Comparison) -> str:
    """What a card shows of a comparison, as Markdown: rank, what is kept at balance, margin, FD, undecided."""
    head = (
        "| method | rank | others kept | above random features | FD | undecided | explicit prompts kept | to drawings |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in comparison.rows:
        fields = ("name", "rank", "kept", "margin", "fd", "n_uncertain", "explicit", "quality")
        told = cells(row, fields)
        lines.append("| " + " | ".join("" if text == NOT_MEASURED else text for text in told) + " |")
    return "\n".join(lines) + "\n"


def write_tables(comparison: Comparison, folder: Path, stem: str = "comparison") -> None:
    """Write ``<stem>.csv`` and ``<stem>.md``."""
    write_text(folder / f"{stem}.csv", csv_text(comparison))
    write_text(folder / f"{stem}.md", markdown(comparison))


def cells(row: MethodRow, fields: tuple[str, ...] = tuple(COLUMNS)) -> list[str]:
    """One row of the table as text, ``fields`` of ``COLUMNS``; a method without numbers shows its note."""
    if row.note:
        return [row.name, f"not run: {row.note}", *[""] * (len(fields) - 2)]
    return [_cell(row, field) for field in fields]


def _cell(row: MethodRow, field: str) -> str:
    value: Any = getattr(row, field)
    if field == "rank":
        return NOT_RANKED if value is None else str(value)
    if field == "kept" and row.kept_measured is not None:
        value = row.kept_measured
    if field in ("margin", "explicit") and isinstance(value, Measured):
        sign = "+" if field == "margin" else ""
        return f"{value.value:{sign}.0%} ({value.interval[0]:{sign}.0%} to {value.interval[1]:{sign}.0%})"
    if field == "strength":
        return f"{value:g} ({row.strength_name})" if row.strength_name else "–"
    if field == "shares":
        return ", ".join(
            f"{s.label} {s.corrected:.0%} ({s.corrected_interval[0]:.0%} to {s.corrected_interval[1]:.0%})"
            for s in value
        )
    if field == "subgroup_entropy":
        return ", ".join(f"{label} {e:.2f}" for label, e in (value or {}).items())
    if field == "activation_ratio":
        return NOT_MEASURED if value is None else f"{value:.2f}{' !' if row.flagged else ''}"
    if value is None:
        return "two classes only" if field == "log_ratio_corrected" and len(row.shares) > 2 else NOT_MEASURED
    if isinstance(value, Measured):
        return f"{value.value:.3f} ({value.interval[0]:.3f} to {value.interval[1]:.3f})"
    if isinstance(value, LogRatio):
        return value.text
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(comparison: Comparison) -> str:
    """The table with its headings, and below it what was done and what the starred columns are."""
    config = comparison.config
    fields = columns_of(comparison)
    told_rows = [[COLUMNS[field] for field in fields], *(cells(row, fields) for row in comparison.rows)]
    lines = [" | ".join(text.replace("|", "\\|") for text in row) for row in told_rows]
    lines.insert(1, " | ".join(["---"] * len(fields)))
    prompt = "no prompt" if config.prompt is None else f'"{config.prompt}"'
    goal = ", ".join(f"{c} {s:.0%}" for c, s in zip(comparison.attribute.classes, comparison.target, strict=True))
    told = [
        f"{comparison.attribute.name}, {prompt}, target {goal}; n = {config.n} per row, on seeds not used for tuning.",
        f"Setting of each method: {comparison.rule} Every point of a curve has {config.n_tune} images.",
        f"While fitting, every method saw {config.n_fit} images of {config.seen}.",
        "FD and SPD from decided images; log ratio corrected for the classifier's error. "
        "! marks activations that leave the data's range.",
        *(f"{COLUMNS[field]} {text}." for field, text in comparison.labels.items() if field in fields),
        *(
            f"\\{note}."
            for note in {r.log_ratio_corrected.note for r in comparison.rows if r.log_ratio_corrected} - {""}
        ),
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "\n".join(f"- {line}" for line in told) + "\n"


def csv_text(comparison: Comparison) -> str:
    """One line per method; intervals, shares and entropies in columns of their own."""
    rows = [flat_row(row) for row in comparison.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return as_csv(names, ([row.get(name) for name in names] for row in rows))
