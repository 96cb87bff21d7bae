"""The five stations: what each asks, and what a lens measured about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from diffusion_lens.base.types import LensError, Share
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results import stats
from diffusion_lens.results.dissection import Dissection, FeatureEffect, effects_of, groups, is_sure
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studio import about, state
from diffusion_lens.studio.learn import (
    DATA,
    EVEN,
    MATCHED,
    OWN,
    RANDOM,
    SET,
    SIZES,
    STOPS,
    Bar,
    Choice,
    Course,
    Lesson,
    Matrix,
    Missing,
    Pane,
    Reveal,
    Stop,
    Turn,
    drawn,
    perceived,
)
from diffusion_lens.studio.learn_stored import (
    Ranked,
    at,
    control_sweep,
    dissected,
    first_images,
    flipped,
    main_sweep,
    ranked_pair,
    spills,
    subject,
    targets,
    telling_strength,
)
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio

WIDEST = 6
"""Attributes that are shown of a feature that moves several."""


def course(studio: Studio) -> Course:
    """The class on a lens: every station that it can serve, and what it lacks for the others."""
    makers: Sequence[Callable[[Studio, Stop], Lesson]] = (_who, _inside, _cause, _free, _target)
    found: list[Lesson | Missing] = []
    for stop, make in zip(STOPS, makers, strict=True):
        try:
            found.append(make(studio, stop))
        except LensError as error:
            found.append(Missing(stop, str(error)))
    return Course(tuple(found))


# The stations.


def _who(studio: Studio, stop: Stop) -> Lesson:
    lens, view = studio.lens, subject(studio)
    result = main_sweep(studio, view.prompt, view.attribute)
    confusion = lens.confusion.get(view.attribute)
    if confusion is None:
        raise LensError(f"the classifier's error on {view.attribute} is not known.")
    point = at(result, view.beta)
    total = len(point.labels)
    sizes = [n for n in SIZES if n < total] + [total]
    bars = [_bar(f"{n} images", first_images(point, n, confusion, view.target)) for n in sizes]
    known = about.known_shares(lens, view.attribute).get(view.prompt or "")
    column = point.attribute.index(view.target)
    if known is not None and known.counted is not None and known.counted[column].n > bars[-1].n:
        bars.append(
            _bar(f"{known.counted[column].n + known.counted[column].n_uncertain} images", known.counted[column])
        )
    planted = known.planted[column] if known is not None and known.planted else None
    low, high = bars[0].interval
    note = f"From the first {sizes[0]} images alone, every share from {low:.0%} to {high:.0%} is possible. "
    if planted is not None:
        note += f"In the drawings that this model was trained on, {planted:.0%} were {view.target}."
    images = drawn(view.prompt)
    return Lesson(
        stop,
        f"A model draws {images}. Nobody told it who that should be: it repeats what it saw in training. A "
        f"classifier reads {perceived(view.attribute)} in each image, and it errs at a known rate.",
        f"Of 100 {images}, how many will be read as {view.target}?",
        "share",
        f"Draw 8 images, then {SIZES[-1]}. Does your guess still stand?",
        "A share without its number of images says little: look at the interval first.",
        Pane(view.prompt, view.attribute, view.target, (), counts=SIZES),
        Reveal(
            f"Counted in {bars[-1].n + bars[-1].undecided} images: {bars[-1].value:.0%} {view.target}.",
            ((f"Read as {view.target}, corrected for the classifier's error", tuple(bars)),), note=note,
            source="The first images of the stored sweep, in the order of their seeds; the last line is the largest "
            "count that this lens keeps.",
        ),
        round(100 * bars[-1].value),
    )  # fmt: skip


def _inside(studio: Studio, stop: Stop) -> Lesson:
    lens, view = studio.lens, state.default_view(studio.lens)
    found = dissected(lens)
    strongest = [own[0] for own in groups(found).values() if own]
    strongest = sorted(strongest, key=lambda e: (e.beta < 1, -abs(e.difference)))[:MATCHED]
    if len(strongest) < 2:
        raise LensError("fewer than two features have a sure effect of their own.")
    order = np.random.default_rng(len(strongest)).permutation(len(strongest))
    shown = [strongest[i] for i in order]
    choices = tuple(Choice(f"{e.attribute}: {e.label}", f"{e.attribute}: {e.label}") for e in strongest)
    many = max(found.ids(), key=partial(_breadth, found))
    moved = _widest(found, many)
    names = ", ".join(e.attribute for e in moved[:3])
    turns = [_alone(found, e.feature, f"#{e.feature}") for e in shown]
    if many not in [e.feature for e in shown]:
        turns.append(_alone(found, many, f"#{many}, for the second question"))
    return Lesson(
        stop,
        "The bottleneck's activity was taken apart into features. Each row below shows the images that excite one "
        "feature most, lit where it fires.",
        "Which word goes with which feature?",
        "match",
        "Turn each feature alone in the live pane: what changes in every image is what it does. Then turn the one "
        "that moves several things.",
        "A label is a guess until the feature was turned, and one feature may carry several things at once.",
        Pane(_dissected_prompt(lens, view), view.attribute, view.target, tuple(turns)),
        Reveal(
            "Turned alone, these features moved:",
            (
                ("Largest change of each feature", tuple(_effect_bar(e, found.n, f"#{e.feature} · {e.label}")
                                                          for e in shown)),
                (f"Superposition: feature #{many} alone moves {len(moved)} attributes for sure, {names} first",
                 tuple(_effect_bar(e, found.n) for e in moved)),
            ),
            note=f"Tested on {found.n} paired images a turn, at a false discovery rate of {found.alpha:.0%}.",
            source=f"Stored measurement: {found.source}.",
        ),
        tuple(f"{e.attribute}: {e.label}" for e in shown),
        choices,
        tuple((e.feature, lens.card(e.feature).top) for e in shown),
    )  # fmt: skip


def _dissected_prompt(lens: DiffusionLens, view: View) -> str | None:
    """The empty prompt where the lens suggests it: single features were measured there."""
    return "" if "" in lens.prompts else view.prompt


def _breadth(found: Dissection, feature: int) -> tuple[int, float]:
    sure = [e for e in effects_of(found, feature) if is_sure(found, e)]
    return len({e.attribute for e in sure}), sum(abs(e.difference) for e in sure)


def _widest(found: Dissection, feature: int) -> tuple[FeatureEffect, ...]:
    """A feature's largest sure effect on each attribute, largest first."""
    best: dict[str, FeatureEffect] = {}
    for effect in effects_of(found, feature):
        if is_sure(found, effect):
            known = best.get(effect.attribute)
            size = (abs(effect.difference), effect.difference)
            if known is None or size > (abs(known.difference), known.difference):
                best[effect.attribute] = effect
    return tuple(sorted(best.values(), key=lambda e: -abs(e.difference)))


def _cause(studio: Studio, stop: Stop) -> Lesson:
    lens, view = studio.lens, _where_features_were_turned(studio)
    found = dissected(lens)
    first, second = ranked_pair(lens, view.attribute, view.target)
    both = {(True, True): "both", (True, False): "first", (False, True): "second", (False, False): "neither"}
    word = perceived(view.attribute)
    names = f"rank {first.rank} (#{first.feature})", f"rank {second.rank} (#{second.feature})"
    result = main_sweep(studio, view.prompt, view.attribute)
    control = control_sweep(studio, view.prompt, view.attribute)
    beta = telling_strength(result, view.beta)
    groups_shown = [(
        f"Turned alone: change of {word}",
        tuple(_effect_bar(r.largest, found.n, f"{name} → {r.largest.label}")
              for r, name in zip((first, second), names, strict=True)),
    )]  # fmt: skip
    note = (
        f"“For sure” is judged over every feature and class that was tested (false discovery rate {found.alpha:.0%}): "
        "one interval may leave out 0 and still not count. And nothing found is not the same as nothing there."
    )
    if control is not None:
        flips = []
        for name, sweep in (("the attribute's own features", result), ("as many random features", control)):
            k, n = flipped(at(sweep, view.beta), at(sweep, beta))
            flips.append(Bar(name, k / max(n, 1), stats.share_interval(k, n), n, len(result.request.seeds) - n))
        groups_shown.append((f"The whole set at β = {beta:g}: images that changed class", tuple(flips)))
    turns = (
        _alone(found, first.feature, names[0]), _alone(found, second.feature, names[1]),
        replace(_whole_set(lens, view, beta), text="all of the attribute's features"),
        replace(_whole_set(lens, view, beta), key=RANDOM, text="as many random features"),
    )  # fmt: skip
    return Lesson(
        stop,
        f"Integrated gradients rank features by how much of the probe's answer “{view.target}” each accounts for. "
        f"Feature #{first.feature} stands at rank {first.rank}, feature #{second.feature} at rank {second.rank}.",
        f"Turned alone, which of them changes {word} in the images?",
        "choice",
        "Turn each of the two alone, then all of them, then as many features drawn at random.",
        "Attribution tells what the probe listens to; only turning, beside a control, tells what changes an image.",
        Pane(view.prompt, view.attribute, view.target, turns),
        Reveal(
            f"{_sure_words(first, names[0])}; {_sure_words(second, names[1])}.", tuple(groups_shown), note=note,
            source=f"Single features: {found.source}, n = {found.n}. Sets: the stored sweep of "
            f"{drawn(view.prompt)} and its control, on the same seeds.",
        ),
        both[first.sure, second.sure],
        (Choice("first", f"only {names[0]}"), Choice("second", f"only {names[1]}"), Choice("both", "both"),
         Choice("neither", "neither")),
    )  # fmt: skip


def _where_features_were_turned(studio: Studio) -> View:
    """The subject's attribute under the empty prompt, where a sweep of it is stored; else the subject."""
    view = subject(studio)
    if "" in studio.lens.prompts and any(not r.is_control for r in studio.sweeps("", view.attribute)):
        return replace(view, prompt="")
    return view


def _sure_words(ranked: Ranked, name: str) -> str:
    if not ranked.sure:
        return f"{name} moved nothing for sure"
    return f"{name} moved {ranked.largest.label} by {100 * ranked.largest.difference:+.0f} points"


def _free(studio: Studio, stop: Stop) -> Lesson:
    lens, about_whom = studio.lens, subject(studio)
    every = spills(studio, about_whom.prompt)
    if not every:
        raise LensError(f"no stored sweep of {drawn(about_whom.prompt)} read other attributes beside the steered one.")
    spill = max(every, key=lambda s: sum(b.value for b in s.own.values()))
    name, target = spill.result.attribute.name, spill.result.target
    view = replace(state.default_view(lens, name), prompt=about_whom.prompt)
    ordered = sorted(spill.own.values(), key=lambda b: -b.value)
    rows = tuple(dict.fromkeys(n for s in every for n in s.own))
    matrix = Matrix(
        "Images that changed class, by what was steered", tuple(f"{s.result.attribute.name} → {s.result.target}, "
                                                                f"β = {s.beta:g}" for s in every),
        tuple((row, tuple(s.own[row].value if row in s.own else None for s in every)) for row in rows),
    )  # fmt: skip
    held = [n for n in lens.setting(name).hold if n in spill.own]
    ordered = [_beside(bar, spill.control.get(bar.name)) for bar in ordered]
    beside = ", beside as many random features at the same strength" if spill.control else ""
    bars = [(f"{name} → {target} at β = {spill.beta:g}: images that changed class{beside}", tuple(ordered))]
    note = (
        f"{' and '.join(held)} {'was' if len(held) == 1 else 'were'} held still in this turn, and changed in "
        f"{' and '.join(f'{spill.own[n].value:.0%}' for n in held)} of the images all the same. " if held else ""
    )  # fmt: skip
    grown = [c for c in at(spill.result, spill.beta).changes if c.interval[0] > 0]
    for c in sorted(grown, key=lambda c: -c.difference)[:2]:
        note += f"{c.attribute}: {c.label} moved {100 * c.difference:+.0f} points ({100 * c.interval[0]:+.0f} to "
        note += f"{100 * c.interval[1]:+.0f}, n = {c.n}). "
    asked = sorted([b.name for b in ordered[:5]])
    return Lesson(
        stop,
        f"The features of {perceived(name)} are turned until most images are read as {target}: β = {spill.beta:g}, on "
        f"the same seeds, in {drawn(about_whom.prompt)}.",
        "Which other attribute changes in most images?",
        "choice",
        f"Turn {name} towards {target} in the live pane, with and without trying to keep the rest. What else changed?",
        "Ask of every turn what else moved, and how much of that a random turn moves too.",
        Pane(
            about_whom.prompt, name, target, (_whole_set(lens, view, spill.beta),), counts=SIZES,
            hold=state.holdable(lens, name),
        ),
        Reveal(
            f"{spill.largest.capitalize()} changed in most images: {spill.own[spill.largest].value:.0%} of "
            f"{spill.own[spill.largest].n}.",
            tuple(bars), matrix, note.strip(),
            "Stored sweeps on the same seeds; an image that the classifier no longer decides counts as changed.",
        ),
        spill.largest,
        tuple(Choice(n, n) for n in asked),
    )  # fmt: skip


def _target(studio: Studio, stop: Stop) -> Lesson:
    lens, view = studio.lens, subject(studio)
    result = main_sweep(studio, view.prompt, view.attribute)
    found = targets(studio)
    texts = {EVEN: f"even: {found[EVEN].target_share:.0%} {view.target}"}
    if DATA in found:
        texts[DATA] = f"as in the training data: {found[DATA].target_share:.0%} {view.target}"
    bars = tuple(
        Bar(texts[key], b.share, b.share_interval, len(result.request.seeds), note=f"β = {b.beta:.2f}")
        for key, b in found.items()
    )  # fmt: skip
    cost = "; ".join(f"{texts[key]}: {_cost(result, b.beta)}" for key, b in found.items())
    return Lesson(
        stop,
        f"You can now move the share of {view.target} in {drawn(view.prompt)}. Where to? Even shares, the "
        "shares of the training data, those of a real profession, or others: no measurement decides that.",
        "Choose a target and write two sentences: why this one, and who might want another?",
        "words",
        "Turn the strength until the images look like your target. What did it cost?",
        "A target is a choice of people, and has to be written down with its reason.",
        Pane(view.prompt, view.attribute, view.target, (_whole_set(lens, view, found[EVEN].beta),), counts=SIZES),
        Reveal(
            " ".join(b.note for b in found.values()), (("Share that the stored sweep meets there", bars),),
            note=f"What it costs on the same seeds, the other attributes taken together – {cost}.",
            source=f"Stored sweep of {drawn(view.prompt)}, {len(result.request.seeds)} images a strength.",
        ),
        None,
        (*(Choice(key, text) for key, text in texts.items()), Choice(OWN, "my own")),
    )  # fmt: skip


def _cost(result: SweepResult, beta: float) -> str:
    nearest = min(result.points, key=lambda p: abs(p.beta - beta))
    return f"{1 - nearest.kept:.0%} of readings changed (at the stored β = {nearest.beta:g})"


def _bar(name: str, share: Share) -> Bar:
    return Bar(name, share.corrected, share.corrected_interval, share.n, share.n_uncertain)


def _beside(bar: Bar, control: Bar | None) -> Bar:
    return bar if control is None else replace(bar, control=(control.value, control.interval))


def _effect_bar(effect: FeatureEffect, n: int, name: str = "") -> Bar:
    return Bar(
        name or f"{effect.attribute}: {effect.label}", effect.difference, effect.interval, n, signed=True,
        note=f"β = {effect.beta:g}",
    )  # fmt: skip


def _whole_set(lens: DiffusionLens, view: View, start: float | None = None) -> Turn:
    ends = state.scale(lens.setting(view.attribute))
    steps = 0.0 if start is None else (start - ends.identity) / ends.step
    begin = round(ends.identity + ends.step * round(steps), 6)
    return Turn(SET, f"all features for {view.attribute}", ends.low, ends.high, ends.step, begin, ends.identity)


def _alone(found: Dissection, feature: int, text: str) -> Turn:
    betas = [b for f, b in zip(found.features, found.betas, strict=True) if f == feature] or list(found.betas)
    low, high = min(*betas, 1.0), max(*betas, 1.0)
    return Turn(str(feature), text, low, high, 1.0, max(betas, key=abs))
