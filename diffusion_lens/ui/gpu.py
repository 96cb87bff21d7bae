"""A GPU lent for the time of one call, on Spaces that lend them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.run_options import gpu_is_lent

F = TypeVar("F", bound=Callable[..., Any])


def lent(duration: int) -> Callable[[F], F]:
    """``spaces.GPU(duration=…)``, in seconds, where the ``spaces`` package is installed; otherwise nothing.

    What is lent runs in a process of its own: it must take and give plain values, no components.
    """
    if not gpu_is_lent():
        return lambda handler: handler
    import spaces

    return spaces.GPU(duration=duration)


def load_before_lending(lens: DiffusionLens) -> None:
    """Where GPUs are lent, load the models now: a lent GPU gets what was placed on ``cuda`` before the launch."""
    if gpu_is_lent():
        _ = (lens.model, lens.sae, lens.classifier)
