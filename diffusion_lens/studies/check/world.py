"""Rows 1 and 2: generated against planted shares, and the classifier on drawings it never saw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.stats import norm

from diffusion_lens.base.types import Attribute, Share
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.portraits import world
from diffusion_lens.results import stats
from diffusion_lens.results.counted import CountedShares
from diffusion_lens.results.measurement import Measurement, join
from diffusion_lens.studies.check.result import (
    Row,
    at_least,
    at_most,
    distance,
    not_applicable,
    stretch,
    visible,
)
from diffusion_lens.studies.check.runs import DRAWN_SEED, Job, count

WITHIN = 0.04
ACCURACY = {"gender": 0.98, "age": 0.95, "tone": 0.95}
UNCERTAIN = 0.05
NO_TRUTH = "no distribution was planted in this model"


def has_truth(lens: DiffusionLens) -> bool:
    """Whether the lens opens a model of the planted world, read by a classifier of that world."""
    planted = (lens.folder / "pipeline" / "planted.json").is_file()
    return planted and all(a in world.ATTRIBUTES for a in lens.classifier.attributes)


Counted = dict[str | None, Measurement]
"""Prompt → its unedited images as read."""


def draw_shares(job: Job) -> Counted:
    """Draw every suggested prompt and count."""
    prompts = job.lens.prompts
    found: Counted = {}
    names = [f"1 shares: prompt {place + 1} of {len(prompts)}" for place in range(len(prompts))]
    for place, (prompt, bar) in enumerate(zip(prompts, job.progress.parts(len(prompts), names), strict=True)):
        found[prompt] = count(job, job.request(prompt, job.seeds(1, place, job.sizes.shares)), bar)
    return found


def counted_shares(counted: Counted) -> CountedShares:
    """Every prompt's reading, to be kept with the lens."""
    return CountedShares({prompt or "": replace(one, features=None) for prompt, one in counted.items()})


class Comparison:
    """One class under one prompt: the corrected share against the planted one."""

    def __init__(self, prompt: str | None, attribute: Attribute, share: Share, planted: float, m: int) -> None:
        self.prompt, self.attribute, self.share, self.planted = prompt, attribute, share, planted
        low, high = stretch(share.corrected, share.corrected_interval, m)
        self.gap = abs(share.corrected - planted)
        self.interval = distance((low - planted, high - planted))

    @property
    def is_beyond(self) -> bool:
        """Whether the measured share lies more than ``WITHIN`` away."""
        return self.gap > WITHIN

    @property
    def is_open(self) -> bool:
        """Whether it does, but its interval does not."""
        return self.is_beyond and self.interval[0] <= WITHIN

    @property
    def chance(self) -> float:
        """How probably a perfect model would land beyond ``WITHIN`` with this many images."""
        p = self.planted
        spread = np.sqrt(max(p * (1 - p), 1e-12) / max(self.share.n, 1))
        return float(2 * norm.sf(WITHIN / spread))


def n_compared(lens: DiffusionLens, n_prompts: int) -> int:
    """Shares whose intervals hold together: of every attribute all but one, which the others decide."""
    return n_prompts * sum(len(a.classes) - 1 for a in lens.classifier.attributes)


def sees(lens: DiffusionLens, n: int) -> str:
    """What ``n`` images a prompt can show of a share that is off; empty without a planted truth."""
    if not has_truth(lens):
        return ""
    off = visible(n, n_compared(lens, len(lens.prompts)), WITHIN)
    return (
        f"With {n:,} images a prompt a share has to be some {off * 100:.0f} points off to fail with a probability of "
        "80 %; what is less is called open, or holds."
    )


def compare(lens: DiffusionLens, counted: Counted) -> list[Comparison]:
    """Every class of every attribute under every prompt; intervals hold together."""
    attributes = lens.classifier.attributes
    m = n_compared(lens, len(counted))
    rows = []
    for prompt, measured in counted.items():
        planted = world.planted_shares(prompt or "")
        for a in attributes:
            found = measured[a.name].shares
            rows += [Comparison(prompt, a, s, float(p), m) for s, p in zip(found, planted[a.name], strict=True)]
    return rows


def share_rows(job: Job, counted: Counted) -> list[Row]:
    """Row 1, one per attribute: its worst class under its worst prompt.

    Prompts with a share that is beyond the bar, but not clearly so, get more images once (``Sizes.again``), unless
    another share has already failed the row of that attribute: more images would not change its verdict.
    """
    lens = job.lens
    if not has_truth(lens):
        return [not_applicable(1, "generated against planted shares", NO_TRUTH)]
    compared = compare(lens, counted)
    more = job.sizes.again - job.sizes.shares
    failed = {c.attribute.name for c in compared if c.is_beyond and not c.is_open}
    unclear = {c.prompt for c in compared if c.is_open and c.attribute.name not in failed} if more > 0 else set()
    bars = iter(job.progress.parts(len(unclear)))
    for place, prompt in enumerate(lens.prompts):
        if prompt in unclear:
            request = job.request(prompt, job.seeds(1, place, more, skip=job.sizes.shares))
            counted[prompt] = join(counted[prompt], count(job, request, next(bars)))
    compared = compare(lens, counted) if unclear else compared
    return [_attribute_row(a, [c for c in compared if c.attribute == a]) for a in lens.classifier.attributes]


def _attribute_row(attribute: Attribute, compared: list[Comparison]) -> Row:
    top = max(compared, key=lambda c: (c.interval[0] > WITHIN, c.gap))
    beyond, expected = sum(c.is_beyond for c in compared), sum(c.chance for c in compared)
    note = (
        f"{top.share.label} under '{top.prompt or ''}': {top.share.corrected:.1%}, planted {top.planted:.1%}; "
        f"{beyond} of {len(compared)} beyond, a perfect model {expected:.1f} by chance"
    )
    return at_most(1, f"{attribute.name}: worst share", top.gap, top.interval, WITHIN, "points", top.share.n, note)


def classifier_rows(job: Job, counted: Counted) -> list[Row]:
    """Row 2: accuracy on fresh balanced drawings, and how often generated images are left undecided."""
    lens = job.lens
    rows = _accuracy_rows(job) if has_truth(lens) else [not_applicable(2, "classifier on held-out drawings", NO_TRUTH)]
    n = sum(one.n for one in counted.values())
    for a in lens.attributes:
        k = sum(one[a.name].n_uncertain for one in counted.values())
        name = f"{a.name}: undecided on generated images"
        rows.append(at_most(2, name, k / n, stats.share_interval(k, n), UNCERTAIN, "share", n))
    return rows


def _accuracy_rows(job: Job) -> list[Row]:
    from diffusion_lens.portraits.data import draw_many

    n = job.sizes.drawings
    workers = 1 if n <= 4000 else None
    drawn = draw_many(n, first_seed=DRAWN_SEED, balanced=True, workers=workers, progress=job.progress)
    read = job.lens.classify(drawn.images)
    rows = []
    for name, bar in ACCURACY.items():
        column = next(i for i, a in enumerate(world.ATTRIBUTES) if a.name == name)
        if name not in read:
            continue
        right = int((read[name].labels == drawn.labels[:, column]).sum())
        undecided = read[name].n_uncertain / n
        note = f"most probable class of every drawing; {undecided:.1%} undecided"
        rows.append(
            at_least(
                2, f"{name}: right on new drawings", right / n, stats.share_interval(right, n), bar, "share", n, note
            )
        )
    return rows
