"""Mid-block bypass and image quality: what was measured at every strength, window and guidance. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import LensError
from diffusion_lens.results.comparison import Measured


@dataclass(frozen=True)
class BypassPoint:
    """The images of one setting, against drawings and against the unedited images of the same seeds.

    Attributes:
        first, last, ramp: the window, as shares of the steps, and how λ grows there. strength: λ at most; 0: unedited.
        frechet: Fréchet distance to the drawings. gain: the unedited images' distance minus this one, paired over
            seeds: above 0 the images are nearer to drawings than without bypass.
        precision, recall: share of images within the drawings' manifold, and of drawings within the images'.
        diversity: mean distance between two images' features; wider: minus that of the unedited, paired.
        entropy: mean over attributes of the entropy of the shares of decided images, in nats.
        n, n_uncertain: images; images with an undecided attribute.
    """

    guidance_scale: float
    first: float
    last: float
    ramp: str
    strength: float
    frechet: float
    gain: Measured | None
    precision: float
    recall: float
    diversity: float
    wider: Measured | None
    entropy: float
    n: int
    n_uncertain: int

    @property
    def setting(self) -> str:
        """The setting in a few words."""
        if not self.strength:
            return f"guidance {self.guidance_scale:g}, no bypass"
        window = f"steps {self.first:.0%} to {self.last:.0%}, {self.ramp}"
        return f"guidance {self.guidance_scale:g}, λ {self.strength:g}, {window}"


@dataclass(frozen=True)
class BypassResult:
    """All points of one prompt. ``features``: whose space distances are in; ``n_drawings`` stand for the truth."""

    points: tuple[BypassPoint, ...]
    prompt: str | None
    features: str
    n_drawings: int
    first_seed: int
    model_id: str
    classifier_id: str
    config: dict[str, Any]

    @property
    def bypassed(self) -> tuple[BypassPoint, ...]:
        """The points with bypass."""
        return tuple(p for p in self.points if p.strength)

    @property
    def better(self) -> tuple[BypassPoint, ...]:
        """Where bypass surely brings images nearer to drawings, all settings together (Bonferroni by their number)."""
        return tuple(p for p in self.bypassed if p.gain is not None and p.gain.interval[0] > 0)

    @property
    def worse(self) -> tuple[BypassPoint, ...]:
        """Where it surely takes them away."""
        return tuple(p for p in self.bypassed if p.gain is not None and p.gain.interval[1] < 0)

    @property
    def verdict(self) -> str:
        """What the study says of "bypass improves image quality", in a sentence."""
        total = len(self.bypassed)
        if not self.better:
            said = f"In none of {total} settings are images surely nearer to drawings with bypass than without"
        else:
            said = f"In {len(self.better)} of {total} settings images are surely nearer to drawings with bypass: " + (
                "; ".join(f"{p.setting} ({_told(p.gain)})" for p in self.better)
            )
        return f"{said}; in {len(self.worse)} they are surely further away."


def _told(gain: Measured | None) -> str:
    return "" if gain is None else f"{gain.value:.2f} nearer, {gain.interval[0]:.2f} to {gain.interval[1]:.2f}"


def load_bypass(path: Path) -> tuple[BypassResult, ...]:
    """Read ``bypass.json``: a result per model and prompt; raises ``LensError`` that names a bad file."""
    try:
        return TypeAdapter(tuple[BypassResult, ...]).validate_python(read_json(path))
    except ValueError as error:
        if isinstance(error, LensError):
            raise
        raise LensError(f"{path} is no stored study of bypass and quality; run it again.") from None


def joined(stored: Sequence[BypassResult], new: BypassResult) -> tuple[BypassResult, ...]:
    """``stored`` with ``new`` in the place of one of the same model and prompt."""
    same = [one for one in stored if (one.model_id, one.prompt) != (new.model_id, new.prompt)]
    return (*same, new)
