"""The exit quiz: eight questions whose right answers are computed from what the lens at hand stores.

Every answer is a value of the measurement, and every wrong choice is made from it too, so that a lens fitted again
brings its own questions. What a lens does not store is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusion_lens.base.types import LensError
from diffusion_lens.results import stats
from diffusion_lens.results.dissection import groups
from diffusion_lens.studio import state
from diffusion_lens.studio.about import known_shares
from diffusion_lens.studio.learn import EVEN, SIZES, Choice, drawn, perceived
from diffusion_lens.studio.learn_stored import (
    at,
    first_images,
    flipped,
    main_sweep,
    ranked_pair,
    spills,
    subject,
    targets,
)
from diffusion_lens.studio.learn_stored import control_sweep as control_of
from diffusion_lens.studio.learn_stored import telling_strength as telling
from diffusion_lens.studio.studio import Studio


@dataclass(frozen=True)
class Item:
    """One question: ``right`` is the value of the right choice, ``why`` what was measured."""

    key: str
    question: str
    choices: tuple[Choice, ...]
    right: str
    why: str


def quiz(studio: Studio) -> tuple[Item, ...]:
    """The questions that a lens can answer, eight on one that stores everything."""
    makers: Sequence[Callable[[Studio], Item]] = (
        _share, _width, _halving, _probe_or_cause, _feature, _random, _side_effect, _even,
    )  # fmt: skip
    found = []
    for make in makers:
        try:
            found.append(make(studio))
        except LensError:
            continue
    return tuple(found)


def score(items: Sequence[Item], answers: Mapping[str, Any]) -> dict[str, bool]:
    """Key → whether it was answered right; raises ``LensError`` while one is open."""
    open_ones = [i for i, item in enumerate(items, start=1) if answers.get(item.key) not in _values(item)]
    if open_ones:
        raise LensError(f"Question {open_ones[0]} has no answer yet.")
    return {item.key: answers[item.key] == item.right for item in items}


def _values(item: Item) -> set[str]:
    return {choice.value for choice in item.choices}


def _numbers(right: int, others: Sequence[int], unit: str) -> tuple[Choice, ...]:
    """The right number among three others, rising; ``others`` are tried in turn, those too near are left out."""
    kept = [right]
    for other in others:
        if len(kept) < 4 and 0 <= other <= 100 and all(abs(other - k) >= 8 for k in kept):
            kept.append(other)
    return tuple(Choice(str(k), f"{k} {unit}") for k in sorted(kept))


def _share(studio: Studio) -> Item:
    view = subject(studio)
    known = known_shares(studio.lens, view.attribute).get(view.prompt or "")
    if known is None or known.counted is None:
        raise LensError("nothing was counted.")
    share = known.counted[studio.lens.attribute_named(view.attribute).index(view.target)]
    right, (low, high) = round(100 * share.corrected), share.corrected_interval
    others = (50, 100 - right, right + 20, right - 20, right + 35, right - 35)
    return Item(
        "share", f"Of 100 {drawn(view.prompt)}, about how many are read as {view.target}?",
        _numbers(right, others, "of 100"), str(right),
        f"{share.corrected:.0%} ({low:.0%} to {high:.0%}), n = {share.n}, {share.n_uncertain} undecided, corrected for "
        "the classifier's error.",
    )  # fmt: skip


def _width(studio: Studio) -> Item:
    view = subject(studio)
    confusion = studio.lens.confusion.get(view.attribute)
    if confusion is None:
        raise LensError("the classifier's error is not known.")
    point = at(main_sweep(studio, view.prompt, view.attribute), view.beta)
    share = first_images(point, SIZES[0], confusion, view.target)
    if share.n == 0:
        raise LensError("none of the first images was decided.")
    low, high = stats.share_interval(share.count, share.n)
    right = round(100 * (high - low))
    return Item(
        "width", f"{share.count} of the first {share.n} images are read as {view.target}. How wide is the 95 % "
        "interval of the share?", _numbers(right, (5, 20, 35, 70, 90), "points"), str(right),
        f"From {low:.0%} to {high:.0%}: {right} points (exact interval, as read).",
    )  # fmt: skip


def _halving(studio: Studio) -> Item:
    view = subject(studio)
    point = at(main_sweep(studio, view.prompt, view.attribute), view.beta)
    column, n = point.attribute.index(view.target), int(point.certain.sum())
    k = int((point.labels[point.certain] == column).sum())
    if not 0 < k < n:
        raise LensError("one class alone was read.")
    width = partial(_interval_width, k, n)
    times = min((2, 4, 8, 16), key=lambda t: abs(width(t) / width(1) - 0.5))
    return Item(
        "halving", f"{k} of {n} images were read as {view.target}. With the same share, how many times as many images "
        "make the interval about half as wide?", tuple(Choice(str(t), f"{t} times") for t in (2, 4, 8, 16)),
        str(times), f"{100 * width(1):.0f} points from {n} images, {100 * width(times):.0f} from {times * n}.",
    )  # fmt: skip


def _interval_width(k: int, n: int, times: int) -> float:
    low, high = stats.share_interval(k * times, n * times)
    return high - low


def _probe_or_cause(studio: Studio) -> Item:
    view = subject(studio)
    first, second = ranked_pair(studio.lens, view.attribute, view.target)
    yes, no = Choice("yes", "yes"), Choice("no", "no, nothing was sure")
    effect = second.largest
    return Item(
        "cause", f"Feature #{second.feature} stands at rank {second.rank} of the attribution to {view.target}. Turned "
        f"alone, did it move {perceived(view.attribute)} for sure?", (yes, no), "yes" if second.sure else "no",
        f"{effect.label} {100 * effect.difference:+.0f} points at β = {effect.beta:g}, q = {effect.q_value:.2g}; rank "
        f"{first.rank}: {100 * first.largest.difference:+.0f} points.",
    )  # fmt: skip


def _feature(studio: Studio) -> Item:
    found = studio.lens.dissection
    if found is None:
        raise LensError("no feature was turned alone.")
    own = sorted((some[0] for some in groups(found).values() if some), key=lambda e: -abs(e.difference))
    if len(own) < 3:
        raise LensError("too few features have an effect of their own.")
    asked = own[-1]
    choices = sorted({e.feature for e in (*own[:3], asked)})
    return Item(
        "feature", f"Which feature, turned alone to β = {asked.beta:g}, moved {asked.attribute} ({asked.label}) above "
        "all else? The examples in the Atlas help.", tuple(Choice(str(f), f"#{f}") for f in choices),
        str(asked.feature), f"#{asked.feature}: {asked.label} {100 * asked.difference:+.0f} points "
        f"({100 * asked.interval[0]:+.0f} to {100 * asked.interval[1]:+.0f}), n = {found.n}.",
    )  # fmt: skip


def _random(studio: Studio) -> Item:
    view = subject(studio)
    control = control_of(studio, view.prompt, view.attribute)
    result = main_sweep(studio, view.prompt, view.attribute)
    if control is None:
        raise LensError("no control is stored.")
    beta = telling(result, view.beta)
    (own, n), (other, m) = (flipped(at(r, view.beta), at(r, beta)) for r in (result, control))
    kinds = {"fewer": own > 2 * other, "similar": 2 * other >= own >= other / 2, "more": own < other / 2}
    right = next(name for name, holds in kinds.items() if holds)
    return Item(
        "random", f"At β = {beta:g} the features for {view.attribute} changed the class of {own} of {n} images. How "
        "many did as many random features change?",
        (Choice("fewer", "less than half as many"), Choice("similar", "about as many"),
         Choice("more", "more than twice as many")),
        right, f"{other} of {m}, on the same seeds.",
    )  # fmt: skip


def _side_effect(studio: Studio) -> Item:
    every = spills(studio, subject(studio).prompt)
    if not every:
        raise LensError("no side effects are stored.")
    spill = min(every, key=lambda s: max(b.value for b in s.own.values()))
    ordered = sorted(spill.own.values(), key=lambda b: -b.value)
    asked = sorted({b.name for b in (ordered[0], *ordered[-3:])})
    best = ordered[0]
    return Item(
        "side", f"{perceived(spill.result.attribute.name).capitalize()} was steered towards {spill.result.target} "
        f"(β = {spill.beta:g}, {drawn(spill.result.request.prompt)}). Which of these changed in most images?",
        tuple(Choice(name, name) for name in asked), best.name,
        f"{best.name} in {best.value:.0%} of {best.n} ({best.interval[0]:.0%} to {best.interval[1]:.0%}).",
    )  # fmt: skip


def _even(studio: Studio) -> Item:
    view = subject(studio)
    result = main_sweep(studio, view.prompt, view.attribute)
    found = targets(studio)[EVEN]
    nearest = min(result.betas, key=lambda b: abs(b - found.beta))
    others = sorted((b for b in result.betas if b != nearest), key=lambda b: -abs(b - nearest))[:3]
    identity = state.scale(studio.lens.setting(view.attribute)).identity
    shown = sorted({nearest, *others[:2], identity if identity != nearest else others[2]})
    return Item(
        "even", f"Which of these strengths for {view.attribute} brings {drawn(view.prompt)} nearest to even?",
        tuple(Choice(f"{b:g}", f"β = {b:g}") for b in shown), f"{nearest:g}", found.note,
    )  # fmt: skip
