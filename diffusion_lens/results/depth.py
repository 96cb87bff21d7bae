"""The depth experiment's result: read without torch, so that the app can show it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import LensError, Share

CAVEAT = (
    "A small experiment on drawn faces: a few small networks, one training run each, so that depth, size and the luck "
    "of one training cannot be told apart; the intervals count images alone, not trainings. It can show that these "
    "networks over- or under-state their training shares, and by how much; it cannot show that depth as such does so, "
    "nor anything about photographs or about large models. Deeper networks here have more parameters, too."
)


@dataclass(frozen=True)
class DepthPoint:
    """One depth, prompt, guidance scale, with or without bypass: one attribute's shares against the planted ones.

    Attributes:
        shares: corrected and raw, with intervals. planted: ``[class]``.
        amplification: corrected minus planted share, ``[class]``; ``intervals`` theirs, ``[class]`` pairs.
        majority: the class planted most often.
    """

    depth: str
    bypass: bool
    prompt: str
    guidance_scale: float
    attribute: str
    shares: tuple[Share, ...]
    planted: tuple[float, ...]
    amplification: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    majority: str


@dataclass(frozen=True)
class Flips:
    """The same seeds in two settings: images that left the minority for the majority class, and the other way.

    ``p_value`` is McNemar's, exact, for "both ways alike"; ``n`` images decided both times.
    """

    first: str
    second: str
    prompt: str
    guidance_scale: float
    attribute: str
    majority: str
    to_majority: int
    to_minority: int
    p_value: float
    n: int


@dataclass(frozen=True)
class DepthResult:
    """All points and flips. ``parameters``: depth → weights of its U-Net. ``caveat``: what this can and can't show."""

    points: tuple[DepthPoint, ...]
    flips: tuple[Flips, ...]
    parameters: dict[str, int]
    config: dict[str, Any]
    classifier_id: str
    caveat: str = CAVEAT


def load_depth(path: Path) -> DepthResult:
    """Read ``depth.json``; raises ``LensError`` that names a bad file."""
    try:
        return TypeAdapter(DepthResult).validate_python(read_json(path))
    except ValueError as error:
        if isinstance(error, LensError):
            raise
        raise LensError(f"{path} is not a stored depth experiment; run it again.") from None


def depth_series(
    result: DepthResult, attribute: str, label: str, *, prompt: str, guidance_scale: float, bypass: bool = False
) -> tuple[list[str], list[Share], float]:
    """Depths, the shares of one class and its planted share, as ``plots.depth_figure`` takes them."""
    chosen = [
        p for p in result.points
        if (p.attribute, p.prompt, p.guidance_scale, p.bypass) == (attribute, prompt, guidance_scale, bypass)
    ]  # fmt: skip
    if not chosen or label not in {s.label for s in chosen[0].shares}:
        raise LensError(f"This experiment did not measure {attribute} = {label} there.")
    column = [s.label for s in chosen[0].shares].index(label)
    return [p.depth for p in chosen], [p.shares[column] for p in chosen], chosen[0].planted[column]


def flips_of(result: DepthResult, attribute: str, *, prompt: str) -> tuple[Flips, ...]:
    """All pairs of settings of one attribute and prompt."""
    return tuple(f for f in result.flips if (f.attribute, f.prompt) == (attribute, prompt))
