"""Depth at equal size, and size at equal depth: what several trainings of each network drew. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import LensError
from diffusion_lens.results.comparison import Measured

Family = Literal["depth", "size"]
MINORITIES = ("male", "blond male")
"""What is rare in the drawings: the source's 42 % and its less than 1 %."""

CAVEAT = (
    "Small networks that learned for a minute each from drawn faces without a prompt. Intervals are over trainings "
    "(Student's t), so that the luck of a training counts; three trainings a network leave them wide. It can show what "
    "depth does to these networks at equal size; it shows nothing about photographs or large models."
)


@dataclass(frozen=True)
class Training:
    """One training of one network, and what its images were read as.

    Attributes:
        layers: ResNet blocks per level, on the way down. parameters: weights.
        counts: minority → (images of it, images decided). n: images drawn; n_uncertain: gender or hair undecided.
        loss: mean of the last tenth of the training.
    """

    network: str
    layers: int
    channels: tuple[int, ...]
    parameters: int
    seed: int
    counts: dict[str, tuple[int, int]]
    n: int
    n_uncertain: int
    loss: float

    def share(self, minority: str) -> float:
        """Share of the decided images; NaN without any."""
        k, n = self.counts[minority]
        return k / n if n else float("nan")


@dataclass(frozen=True)
class SeedFlips:
    """The same noise in two networks of one training seed: images that left a minority, and that joined it."""

    first: str
    second: str
    minority: str
    seed: int
    left: int
    joined: int
    n: int


@dataclass(frozen=True)
class ApartResult:
    """All trainings. ``planted``: minority → share of the drawings; ``families`` name their networks in order."""

    trainings: tuple[Training, ...]
    flips: tuple[SeedFlips, ...]
    families: dict[str, tuple[str, ...]]
    planted: dict[str, float]
    config: dict[str, Any]
    classifier_id: str
    caveat: str = CAVEAT

    def of(self, network: str) -> tuple[Training, ...]:
        """The trainings of one network."""
        return tuple(t for t in self.trainings if t.network == network)

    def amplification(self, network: str, minority: str) -> Measured | None:
        """Generated minus planted share of a minority, mean and interval over trainings; below 0 is amplified bias."""
        return over_trainings([t.share(minority) - self.planted[minority] for t in self.of(network)])

    def difference(self, family: str, minority: str) -> Measured | None:
        """The last network's share minus the first's, paired over training seeds."""
        first, last = (self.of(name) for name in (self.families[family][0], self.families[family][-1]))
        seeds = {t.seed: t for t in first}
        pairs = [t.share(minority) - seeds[t.seed].share(minority) for t in last if t.seed in seeds]
        return over_trainings(pairs)

    def net_flips(self, family: str, minority: str) -> Measured | None:
        """Images that left the minority less those that joined it, per image, from the first network to the last."""
        first, last = self.families[family][0], self.families[family][-1]
        own = [f for f in self.flips if (f.first, f.second, f.minority) == (first, last, minority) and f.n]
        return over_trainings([(f.left - f.joined) / f.n for f in own])

    def verdict(self, family: str, minority: str) -> str:
        """What this says of "deeper (larger) amplifies bias", in a sentence."""
        found = self.difference(family, minority)
        names = self.families[family]
        if found is None:
            return f"{family}, {minority}: fewer than two trainings; nothing can be said."
        low, high = found.interval
        sure = "fewer" if high < 0 else "more" if low > 0 else ""
        what = f"{names[-1]} draws {'surely ' + sure if sure else 'neither surely fewer nor more'} {minority} faces"
        return (
            f"{what} than {names[0]}: {found.value * 100:+.1f} points ({low * 100:+.1f} to {high * 100:+.1f}) "
            f"over {len(self.of(names[-1]))} trainings each."
        )


def over_trainings(values: Sequence[float], level: float = 0.95) -> Measured | None:
    """Mean with Student's t interval; ``None`` for fewer than two finite values."""
    from scipy.stats import t  # late: scipy.stats is slow to load

    known = np.array([v for v in values if np.isfinite(v)])
    if len(known) < 2:
        return None
    half = float(t.ppf((1 + level) / 2, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
    mean = float(known.mean())
    return Measured(mean, (mean - half, mean + half))


def load_apart(path: Path) -> ApartResult:
    """Read ``depth-apart.json``; raises ``LensError`` that names a bad file."""
    try:
        return TypeAdapter(ApartResult).validate_python(read_json(path))
    except ValueError as error:
        if isinstance(error, LensError):
            raise
        raise LensError(f"{path} is no stored experiment on depth at equal size; run it again.") from None
