"""What shares are compared with: equal shares, planted ones, a table of the reviewer's own, or another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_lens.base.text import read_table
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.portraits import world
from diffusion_lens.results.stats import Interval
from diffusion_lens.studies.audit.plan import AgainstPlan, ReferenceRow, check_sums
from diffusion_lens.studies.audit.wording import read_share

NEEDED = ("attribute", "class", "share", "source")
NAMES = {"equal": "equal shares", "planted": "the shares planted in the training data", "table": "the reference table"}
PLANTED = "planted in the training data by the project"


@dataclass(frozen=True)
class Reference:
    """The shares ``[class]`` that one attribute is compared with under one prompt.

    ``name`` is said in every figure, ``source`` where they come from; ``intervals``: their own, where they were
    measured.
    """

    name: str
    source: str
    shares: tuple[float, ...]
    intervals: tuple[Interval, ...] | None = None


def name_of(against: AgainstPlan) -> str:
    """What the reference is called."""
    return against.name or NAMES.get(against.kind, "another run")


def reference_for(against: AgainstPlan, prompt: str | None, attribute: Attribute) -> Reference | None:
    """What an attribute is compared with under a prompt; ``None`` where the reviewer gave nothing for it.

    Rows of this prompt go before rows of every prompt; what was expected of the prompt goes before the reference.
    """
    mine = [row for row in against.rows if row.attribute == attribute.name]
    chosen = [row for row in mine if row.prompt is not None and row.prompt == (prompt or "")]
    chosen = chosen or [row for row in mine if row.prompt is None]
    name = name_of(against)
    if not chosen:
        k = len(attribute.classes)
        return Reference(name, "", (1 / k,) * k) if against.kind == "equal" else None
    by_label = {row.label: row for row in chosen}
    shares = tuple(by_label[label].share if label in by_label else 0.0 for label in attribute.classes)
    sources = dict.fromkeys(row.source for row in chosen)
    expected = all(row.source.startswith("the reviewer's expectation") for row in chosen)
    spans = [(by_label[c].low, by_label[c].high) if c in by_label else (None, None) for c in attribute.classes]
    known = [(float(low), float(high)) for low, high in spans if low is not None and high is not None]
    return Reference(
        "the reviewer's expectation" if expected else name,
        "; ".join(sources),
        shares,
        tuple(known) if len(known) == len(spans) else None,
    )


def read_reference(path: Path) -> tuple[ReferenceRow, ...]:
    """A reviewer's table ``attribute, class, share, source`` and perhaps ``prompt``.

    Raises:
        LensError: names the missing column, or the line of a row that is incomplete, repeated or no share.
    """
    table = read_table(path)
    missing = [name for name in NEEDED if name not in table.columns]
    if missing:
        raise LensError(
            f"{path.name} needs the columns {', '.join(NEEDED)} (prompt where it differs); '{missing[0]}' is missing."
        )
    rows: list[ReferenceRow] = []
    seen: dict[tuple[str, str, str], int] = {}
    for row in table.rows:
        where = f"{path.name}, line {row.line}"
        cells = row.cells
        for name in NEEDED:
            if not cells[name]:
                hint = " Say where the number comes from." if name == "source" else ""
                raise LensError(f"{where}: the cell '{name}' is empty; fill it or delete the row.{hint}")
        prompt = " ".join(cells.get("prompt", "").split())
        key = (prompt, cells["attribute"], cells["class"])
        if key in seen:
            raise LensError(f"{where}: {cells['attribute']} {cells['class']} stands in line {seen[key]} too; keep one.")
        seen[key] = row.line
        rows.append(
            ReferenceRow(
                prompt=prompt or None,
                attribute=cells["attribute"],
                label=cells["class"],
                share=_percentless(cells["share"], where),
                source=cells["source"],
            )
        )
    if not rows:
        raise LensError(f"{path.name} holds no row; write one a class.")
    return tuple(rows)


def _percentless(cell: str, where: str) -> float:
    text = cell.strip().replace(",", ".")
    try:
        # A column of bare percentages, as spreadsheets give them.
        number = float(text)
    except ValueError:
        return read_share(cell, where)
    return read_share(f"{cell}%" if number > 1 else cell, where)


def planted_rows(prompts: Sequence[str | None], attributes: Sequence[Attribute]) -> tuple[ReferenceRow, ...]:
    """The shares planted in the drawn world under each prompt; ``LensError`` for prompts that it has none for."""
    rows = []
    for prompt in prompts:
        try:
            shares = world.planted_shares(prompt or "")
        except LensError as error:
            raise LensError(f"No shares are planted for '{prompt}': {error}") from None
        for attribute in attributes:
            for label, share in zip(attribute.classes, shares.get(attribute.name, ()), strict=False):
                rows.append(
                    ReferenceRow(
                        prompt=prompt or "", attribute=attribute.name, label=label, share=float(share), source=PLANTED
                    )
                )
    return tuple(rows)


def check_rows(rows: Sequence[ReferenceRow], attributes: Sequence[Attribute], prompts: Sequence[str | None]) -> None:
    """Raise ``LensError`` for rows of unknown attributes, classes or prompts, and for shares that do not add up."""
    known: Mapping[str, Attribute] = {a.name: a for a in attributes}
    asked = {prompt or "" for prompt in prompts}
    groups: dict[tuple[str | None, str], dict[str, float]] = {}
    for row in rows:
        if row.attribute not in known:
            raise LensError(f"The reference speaks of '{row.attribute}'; what is read here is {', '.join(known)}.")
        if row.label not in known[row.attribute].classes:
            choices = ", ".join(known[row.attribute].classes)
            raise LensError(f"The reference speaks of {row.attribute} '{row.label}'; the classes are {choices}.")
        if row.prompt is not None and row.prompt not in asked:
            raise LensError(f"The reference speaks of the prompt '{row.prompt}', which is not audited; add or mend it.")
        group = groups.setdefault((row.prompt, row.attribute), {})
        if row.label in group:
            raise LensError(f"The reference gives {row.attribute} {row.label} twice; keep one.")
        group[row.label] = row.share
    for (prompt, attribute), shares in groups.items():
        check_sums(shares, attribute if prompt is None else f"{attribute} under '{prompt}'")
