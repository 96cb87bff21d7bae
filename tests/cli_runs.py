"""Commands run in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion_lens.cli.console import MISTAKE

Run = Callable[..., Any]


def mistake(result: Any) -> str:
    """The one sentence of a failed command."""
    assert result.exit_code == MISTAKE, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return str(lines[0])
