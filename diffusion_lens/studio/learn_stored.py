"""What a lens stores, as the class asks for it: shares, flips, side effects, ranked features, strengths for targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from diffusion_lens.base.types import LensError, Share
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results import stats
from diffusion_lens.results.dissection import Dissection, FeatureEffect, effects_of, is_sure
from diffusion_lens.results.sweeps import Balance, SweepPoint, SweepResult
from diffusion_lens.studio import about, state
from diffusion_lens.studio.learn import DATA, EVEN, TOP, Bar, drawn
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio


def main_sweep(studio: Studio, prompt: str | None, attribute: str) -> SweepResult:
    """The stored sweep of one prompt and attribute; raises ``LensError``."""
    for result in studio.sweeps(prompt, attribute):
        if not result.is_control:
            return result
    raise LensError(f"no sweep of {attribute} is stored of {drawn(prompt)}.")


def control_sweep(studio: Studio, prompt: str | None, attribute: str) -> SweepResult | None:
    """The same with random features in place of the attribute's own; ``None`` where none is stored."""
    found = studio.sweeps(prompt, attribute)
    return next((r for r in found if r.is_control and r.control == "random"), None)


def at(result: SweepResult, beta: float) -> SweepPoint:
    """The point at a strength; raises ``LensError``."""
    for point in result.points:
        if point.beta == beta:
            return point
    raise LensError(f"the stored sweep has no strength {beta:g}.")


def first_images(point: SweepPoint, n: int, confusion: np.ndarray, label: str) -> Share:
    """The share of a class in the first ``n`` images of a point, with its interval."""
    labels, certain = point.labels[:n], point.certain[:n]
    counts = np.bincount(labels[certain], minlength=len(point.attribute.classes))
    column = point.attribute.index(label)
    return stats.shares(counts, int((~certain).sum()), point.attribute, confusion)[column]


def flipped(before: SweepPoint, after: SweepPoint) -> tuple[int, int]:
    """Images that changed class between two points on the same seeds, and those decided both times."""
    both = before.certain & after.certain
    return int((before.labels[both] != after.labels[both]).sum()), int(both.sum())


def side_effects(point: SweepPoint) -> dict[str, Bar]:
    """The other attributes → the share of images whose class changed, undecided counted as a class of its own."""
    n = len(point.request.seeds)
    bars = {}
    for name, kept in point.agreement.items():
        k = round((1 - kept) * n)
        bars[name] = Bar(name, k / n, stats.share_interval(k, n), n)
    return bars


def telling_strength(result: SweepResult, identity: float) -> float:
    """The gentlest stored strength, towards the target, at which most images are read as it; else the furthest."""
    column = result.attribute.index(result.target)
    rising = [p for p in result.points if p.beta > identity] or [p for p in result.points if p.beta != identity]
    if not rising:
        raise LensError(f"the stored sweep of {result.attribute.name} has no turned strength.")
    most = [p.beta for p in rising if p.shares[column].raw >= 0.5]
    return min(most) if most else max(p.beta for p in rising)


def subject(studio: Studio) -> View:
    """What the class is about: the stored prompt furthest from balance, unedited; raises ``LensError``."""
    view = opening_view(studio)
    main_sweep(studio, view.prompt, view.attribute)
    return replace(view, beta=studio.lens.setting(view.attribute).identity)


def dissected(lens: DiffusionLens) -> Dissection:
    if lens.dissection is None or not lens.dissection.ids(tested=True):
        raise LensError("no feature was turned alone and measured on this lens.")
    return lens.dissection


@dataclass(frozen=True)
class Ranked:
    """A feature by its rank in an attribution, and the turns of it that moved the attribute for sure."""

    feature: int
    rank: int
    largest: FeatureEffect
    sure: bool


def ranked_pair(lens: DiffusionLens, attribute: str, target: str) -> tuple[Ranked, Ranked]:
    """Rank 1 (or the first one tested) by integrated gradients, and the one of the top that moves least when turned.

    Raises ``LensError`` where fewer than two of them were turned alone.
    """
    found = dissected(lens)
    order = np.argsort(-lens.attributions[attribute].total(target), kind="stable")[:TOP]
    tested = []
    for rank, feature in enumerate(order.tolist(), start=1):
        own = [e for e in effects_of(found, feature) if e.attribute == attribute and np.isfinite(e.q_value)]
        if own:
            sure = [e for e in own if is_sure(found, e)]
            # Of two classes both move alike: the one asked for is told.
            largest = max(sure or own, key=lambda e: (abs(e.difference), e.label == target))
            tested.append(Ranked(feature, rank, largest, bool(sure)))
    if len(tested) < 2:
        raise LensError(f"fewer than two of the first {TOP} features for {attribute} were turned alone.")
    return tested[0], min(tested[1:], key=lambda r: (r.sure, abs(r.largest.difference)))


@dataclass(frozen=True)
class Spill:
    """What else a stored sweep moved at its telling strength, and what random features moved there."""

    result: SweepResult
    beta: float
    own: dict[str, Bar]
    control: dict[str, Bar]

    @property
    def largest(self) -> str:
        """The other attribute that changed in most images."""
        return max(self.own, key=lambda name: self.own[name].value)


def spills(studio: Studio, prompt: str | None) -> tuple[Spill, ...]:
    """Every steered attribute with a stored sweep of a prompt that read other attributes too."""
    found = []
    for name in state.steerable(studio.lens):
        results = [r for r in studio.sweeps(prompt, name) if not r.is_control]
        if not results:
            continue
        beta = telling_strength(results[0], studio.lens.setting(name).identity)
        control, own = control_sweep(studio, prompt, name), side_effects(at(results[0], beta))
        if len(own) > 1:
            beside = side_effects(at(control, beta)) if control and beta in control.betas else {}
            found.append(Spill(results[0], beta, own, beside))
    return tuple(found)


def targets(studio: Studio) -> dict[str, Balance]:
    """``even`` and, where it is known, ``data`` → the strength that meets it on the stored sweep of the subject."""
    lens, view = studio.lens, subject(studio)
    result = main_sweep(studio, view.prompt, view.attribute)
    column = result.attribute.index(result.target)
    wanted = {EVEN: 1 / len(result.attribute.classes)}
    known = about.known_shares(lens, view.attribute).get(view.prompt or "")
    if known is not None and known.planted and 0 < known.planted[column] < 1:
        wanted[DATA] = known.planted[column]
    return {key: strength_for(studio, result, share) for key, share in wanted.items()}


def strength_for(studio: Studio, result: SweepResult, share: float) -> Balance:
    """The strength at which a stored sweep meets a share of its target class."""
    from diffusion_lens.measuring.balance import balance

    confusion = studio.lens.confusion.get(result.attribute.name)
    if confusion is None:
        raise LensError(f"the classifier's error on {result.attribute.name} is not known.")
    return balance(result, confusion, target_share=share)
