"""What is built into the wheel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads TOML with the standard library of 3.11")
def test_the_wheel_carries_every_asset_but_the_second_labeller() -> None:
    import tomllib

    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    carried = built["targets"]["wheel"]["force-include"]
    there = {f"assets/{path.name}" for path in (ROOT / "assets").iterdir() if not path.name.startswith(".")}
    assert set(carried) == there - {"assets/portraits-labeller"}
    assert all(inside == f"diffusion_lens/{outside}" for outside, inside in carried.items())
