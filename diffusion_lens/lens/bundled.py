"""Which lenses the app opens: those asked for, otherwise every one that ships with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

FIRST = "portraits"
"""The lens whose page opens first."""


def bundled(assets: Path) -> tuple[str, ...]:
    """The lens folders (those with a ``lens.json``) inside ``assets``, the first page's in front, then by name."""
    found = sorted(path.parent for path in assets.glob("*/lens.json"))
    return tuple(map(str, sorted(found, key=lambda folder: folder.name != FIRST)))


def lenses_to_open(asked: Sequence[str], environment: str, assets: Path) -> tuple[str, ...]:
    """Folders or hub ids: ``asked``, else those of ``environment`` (several with ``os.pathsep`` between), else bundled.

    Where nothing is bundled, the folder that should be: opening it says what is missing.
    """
    given = tuple(asked) or tuple(part for part in environment.split(os.pathsep) if part)
    return tuple(dict.fromkeys(given)) or bundled(assets) or (str(assets / FIRST),)
