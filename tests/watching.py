"""Progress that a test listens to."""

from __future__ import annotations

from collections.abc import Callable

from diffusion_lens.base.progress import Progress


def steps(hear: Callable[[int, int], object]) -> Progress:
    """One that calls ``hear(done, total)`` of the innermost loop at every step."""
    return Progress(lambda status: hear(status.done, status.total))
