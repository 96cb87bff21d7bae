"""How much a check draws, from which seeds, and how images become counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import GenerationRequest, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.observe import observe
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.studies.check.result import Row

FIRST_SEED = 60_000_000
PART_SEEDS = 2_000_000
PROMPT_SEEDS = 50_000
DRAWN_SEED = 950_000_000
"""Drawings from here on were seen neither in training nor in calibration."""

OnRows = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class Sizes:
    """How many images each group of rows gets.

    Attributes:
        shares: per prompt. again: per prompt in all, where a share lies beyond its bar and its interval reaches it.
        drawings: for the classifier. inside: whose bottleneck is read. attribution: of those, attributed.
        reference: of those, attributed by automatic differentiation too, at ``reference_steps`` steps.
        sweep: per strength and prompt, over ``strengths`` of the shipped grid; ``controls`` random feature sets, over
            ``control_strengths`` of it.
    """

    shares: int
    again: int
    drawings: int
    inside: int
    attribution: int
    reference: int
    reference_steps: int
    sweep: int
    strengths: int
    controls: int
    control_strengths: int = 5
    batch_size: int = 64


QUICK = Sizes(
    shares=64, again=64, drawings=2_000, inside=65, attribution=65, reference=2, reference_steps=3, sweep=48,
    strengths=5, controls=1,
)  # fmt: skip
FULL = Sizes(
    shares=1_000, again=4_000, drawings=12_000, inside=1_000, attribution=256, reference=4, reference_steps=20,
    sweep=500, strengths=100, controls=3,
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One check under way: the lens, how much to draw, its part of the bar, and whether every row must hold.

    ``on_rows`` is told what was measured as soon as it was; of part 5, every prompt's own rows.
    """

    lens: DiffusionLens
    sizes: Sizes
    progress: Progress = field(default_factory=Progress)
    first_seed: int = FIRST_SEED
    strict: bool = False
    on_rows: OnRows = lambda rows: None

    def seeds(self, part: int, place: int, n: int, skip: int = 0) -> range:
        """Seeds of prompt number ``place`` in a group of rows; no two share one."""
        if not 0 <= skip <= skip + n <= PROMPT_SEEDS:
            raise LensError(f"A check draws up to {PROMPT_SEEDS:,} images per prompt; this asks for {skip + n:,}.")
        start = self.first_seed + part * PART_SEEDS + place * PROMPT_SEEDS + skip
        return range(start, start + n)

    def request(self, prompt: str | None, seeds: range) -> GenerationRequest:
        """A request of the lens."""
        return self.lens.request(prompt, seeds)


def refuse_shared_seeds(lens: DiffusionLens, first_seed: int) -> None:
    """Raise ``LensError`` if the lens was fitted, or its settings chosen, on seeds that the check draws."""
    config = lens.fitted_from
    if not config:
        return
    used = {
        "fitted": (config["first_seed"], config["n_images"]),
        "chosen": (config["choose"]["first_seed"], config["choose"]["n_images"]),
    }
    for how, (start, n) in used.items():
        if start < first_seed + 7 * PART_SEEDS and first_seed < start + n:
            raise LensError(f"This lens was {how} on seeds from {start:,} on, which the check draws; choose others.")


def count(job: Job, request: GenerationRequest, progress: Progress) -> Measurement:
    """Draw a request unedited and read it; images are dropped batch by batch."""
    lens = job.lens
    return observe(
        lens.model, request, None, lens.classifier, batch_size=job.sizes.batch_size, n_examples=0,
        progress=progress,
    )  # fmt: skip
