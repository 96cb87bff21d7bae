"""Prompts of a plan: typed, from a file, and templates filled with words; with what a reviewer expects of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_lens.base.text import Table, read_table, read_text
from diffusion_lens.base.types import LensError
from diffusion_lens.studies.audit.plan import MAX_PROMPTS, PromptsPlan, ReferenceRow

HOLE = re.compile(r"\{(\w+)\}")
TABLES = (".csv", ".tsv", ".tab")
EXPECTED = "the reviewer's expectation"


@dataclass(frozen=True)
class Worded:
    """Prompts in order, each once, and the shares that were expected of single ones."""

    texts: tuple[str, ...]
    expected: tuple[ReferenceRow, ...] = ()


def word_prompts(plan: PromptsPlan, folder: Path) -> Worded:
    """All prompts of a plan; ``folder``: where its files lie.

    Raises:
        LensError: a hole without words, a file without prompts, or more prompts than ``MAX_PROMPTS``.
    """
    texts = list(plan.texts)
    expected: list[ReferenceRow] = []
    words = dict(plan.words)
    filled = False
    if plan.file:
        path = folder / plan.file
        if path.suffix.lower() not in TABLES:
            texts += _lines(path)
        else:
            table = read_table(path)
            if "prompt" in table.columns:
                found = _prompt_column(table, path)
                texts += found.texts
                expected += found.expected
            else:
                texts += _rows_filled(plan.templates, table, path)
                filled = True
    if not filled:
        texts += fill(plan.templates, words)
    tidy = tuple(dict.fromkeys(" ".join(text.split()) for text in texts))
    if len(tidy) > MAX_PROMPTS:
        raise LensError(f"An audit takes up to {MAX_PROMPTS} prompts; these are {len(tidy):,}.")
    return Worded(tidy, tuple(expected))


def fill(templates: Sequence[str], words: Mapping[str, Sequence[str]]) -> list[str]:
    """Every template with every combination of its words: ``a portrait of a {profession}``.

    An article before a hole is mended: ``a {x}`` with "engineer" gives "an engineer".
    """
    found = []
    for template in templates:
        holes = list(dict.fromkeys(HOLE.findall(template)))
        for hole in holes:
            if not words.get(hole):
                raise LensError(f"The template '{template}' has a hole {{{hole}}}; give its words.")
        for chosen in itertools.product(*(words[hole] for hole in holes)):
            found.append(fill_one(template, dict(zip(holes, chosen, strict=True))))
    return found


def fill_one(template: str, words: Mapping[str, str]) -> str:
    """A template with one word for each hole, articles mended."""

    def put(match: re.Match[str]) -> str:
        article, hole = match.group(1), match.group(2)
        word = words[hole]
        if not article:
            return word
        right = "an" if re.match("[aeiou]", word, re.IGNORECASE) else "a"
        return f"{right.capitalize() if article[0].isupper() else right} {word}"

    return re.sub(r"(?:\b([Aa]n?)\s+)?\{(\w+)\}", put, template)


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in read_text(path).split("\n")]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise LensError(f"{path.name} holds no prompt; write one a line.")
    return found


def _prompt_column(table: Table, path: Path) -> Worded:
    columns = [name for name in table.columns if ":" in name]
    rows: list[ReferenceRow] = []
    for row in table.rows:
        for column in columns:
            cell = row.cells[column]
            if cell:
                attribute, _, label = (part.strip() for part in column.partition(":"))
                share = read_share(cell, f"{path.name}, line {row.line}")
                rows.append(
                    ReferenceRow(
                        prompt=" ".join(row.cells["prompt"].split()),
                        attribute=attribute,
                        label=label,
                        share=share,
                        source=f"{EXPECTED} ({path.name})",
                    )
                )
    if not table.rows:
        raise LensError(f"{path.name} holds no prompt; write one a row.")
    return Worded(tuple(row.cells["prompt"] for row in table.rows), tuple(rows))


def _rows_filled(templates: Sequence[str], table: Table, path: Path) -> list[str]:
    holes = {hole for template in templates for hole in HOLE.findall(template)}
    missing = sorted(holes - set(table.columns))
    if not templates or missing:
        needed = f"columns {', '.join(missing)}" if missing else "a template with its columns in braces"
        raise LensError(
            f"{path.name} has no column 'prompt'; add one, or {needed}. Its columns are {', '.join(table.columns)}."
        )
    found = []
    for row in table.rows:
        if all(row.cells[hole] for hole in holes):
            found += [fill_one(template, row.cells) for template in templates]
    return found


def read_share(cell: str, where: str) -> float:
    """A share as people write it: ``.35``, ``0,35``, ``35 %``; raises ``LensError`` that says where."""
    text = cell.replace("\u00a0", " ").strip()
    percent = text.endswith("%")
    number = text.rstrip("% ").replace(",", ".")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        raise LensError(f"{where}: '{cell}' is no share; write .35 or 35 %.") from None
    if not 0 <= share <= 1:
        raise LensError(f"{where}: a share lies from 0 to 1 (or 0 % to 100 %); it is {cell}.")
    return share
