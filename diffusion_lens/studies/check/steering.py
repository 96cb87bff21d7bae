"""Row 5: what the shipped turn of a two-class attribute does to the log ratio, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from diffusion_lens.base.types import Attribute, Control, Predictions
from diffusion_lens.measuring.balance import balance
from diffusion_lens.measuring.observe import Baseline, observe, observe_baseline
from diffusion_lens.results import metrics, stats
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.sweeps import Balance, SweepPoint, SweepResult, collect
from diffusion_lens.steering.settings import control_intervention, describe_setting
from diffusion_lens.studies.check.result import (
    SEVERITY,
    Interval,
    Row,
    Verdict,
    at_least,
    at_most,
    distance,
    not_applicable,
    show,
    stretch,
    worst,
)
from diffusion_lens.studies.check.runs import Job

REACH = 1.0
MOVED = 0.05
AGREEMENT = 0.85
PROFESSIONS = 4
REFINEMENTS = 3
STRETCH = 0.03
"""Of what is left of the bar, for every strength: how many professions follow depends on what they show."""
FIRST_CHOICE = ("firefighter", "doctor", "nurse", "receptionist")
"""The professions of the DiffLens paper; others follow only where one of these does not hold."""


@dataclass(frozen=True)
class Steered:
    """One prompt swept: the result; β where the shares balance; and images of other seeds drawn there.

    ``base``: the unedited images of the sweep's seeds. ``balanced``: on seeds that did not choose β, against their own
    unedited images.
    """

    prompt: str | None
    result: SweepResult
    base: Baseline
    found: Balance | None = None
    balanced: SweepPoint | None = None


@dataclass(frozen=True)
class Steering:
    """What this group of rows found.

    Attributes:
        rows: to be judged. by_prompt: those of every prompt that was swept. sweeps: behind them, controls last.
    """

    rows: tuple[Row, ...]
    by_prompt: tuple[Row, ...] = ()
    sweeps: tuple[SweepResult, ...] = ()


def steering_rows(job: Job, attribute_name: str = "gender") -> Steering:
    """Sweep the empty prompt, then professions until enough hold, then random features on the empty prompt."""
    lens = job.lens
    attribute = next((a for a in lens.attributes if a.name == attribute_name and len(a.classes) == 2), None)
    if attribute is None or attribute_name not in lens.settings:
        return Steering((not_applicable(5, "sweep", f"this lens ships no turn of a two-class {attribute_name}"),))
    everyone = "" if lens.prompts != (None,) else None
    first = steer(job, attribute, everyone, 0)
    rows = prompt_rows(job, first, name_of(everyone))
    job.on_rows(rows)
    by_prompt, sweeps = list(rows), [first.result]
    if everyone is not None:
        found = _professions(job, attribute)
        sweeps += [steered.result for steered, _ in found]
        by_prompt += [row for _, measured in found for row in measured]
        rows += _profession_rows(job, [measured for _, measured in found], [s.prompt for s, _ in found])
    control, results = _control_row(job, attribute, first)
    job.on_rows([control])
    return Steering((*rows, control), tuple(by_prompt), (*sweeps, *results))


def name_of(prompt: str | None) -> str:
    """A prompt as rows call it."""
    return "no prompt" if prompt is None else f"'{prompt}'" if prompt else "the empty prompt"


def steer(
    job: Job,
    attribute: Attribute,
    prompt: str | None,
    place: int,
    control: Control | None = None,
    draw: int = 0,
    base: Baseline | None = None,
) -> Steered:
    """Sweep one prompt over the shipped grid (or some of it), then draw other seeds at the balanced β.

    What is said of balance is measured on as many other seeds: those that chose β would flatter it. A control is swept
    over fewer strengths, both ends among them, and has no balance. ``base``: the unedited images of the same prompt and
    place, where they are at hand.
    """
    lens, setting = job.lens, job.lens.settings[attribute.name]
    request = job.request(prompt, job.seeds(5, place, job.sizes.sweep))
    fresh = job.request(prompt, job.seeds(5, place, job.sizes.sweep, skip=job.sizes.sweep))
    stage = f"5 sweep: {name_of(prompt)}{'' if control is None else ', a control'}"
    wanted = job.sizes.strengths if control is None else job.sizes.control_strengths
    betas = thin(setting.betas, wanted, setting.identity)
    size = job.sizes.batch_size
    base = base or observe_baseline(
        lens.model,
        request,
        lens.classifier,
        batch_size=size,
        n_examples=0,
        progress=job.progress.some(STRETCH, f"{stage}, unedited"),
    )

    def at(beta: float, of: Baseline) -> SweepPoint:
        unedited = of.measurement
        if beta == setting.identity:
            return SweepPoint(unedited.against(unedited), attribute, beta=beta)
        steered = lens.intervention(attribute.name, setting.target, beta)
        steered = steered if control is None else control_intervention(steered, control, lens.atlas.activity, draw)
        found = observe(
            lens.model, of.request, lens.edit(steered), lens.classifier, reference=unedited, batch_size=size,
            n_examples=0, progress=job.progress.some(STRETCH, f"{stage}, β = {beta:.3g}"),
        )  # fmt: skip
        return SweepPoint(found, attribute, beta=beta)

    result = collect(
        (at(beta, base) for beta in betas),
        target=setting.target,
        setting=describe_setting(setting, control, draw),
        control=control,
        control_seed=draw,
        provenance={"lens": lens.manifest.lens_id, "sae": lens.manifest.sae_id},
    )
    if control is not None:
        return Steered(prompt, result, base)
    points, trial = result.points, result
    for _ in range(REFINEMENTS):
        found = balance(trial, lens.classifier.confusion[attribute.name])
        point = at(found.beta, base)
        if point.fd <= point.fd_floor or found.beta in trial.betas:
            break
        # Between the strengths of the grid the curve is not straight: what was measured there joins it.
        points = tuple(sorted([*points, point], key=lambda p: p.beta))
        trial = replace(trial, points=points)
    bar = job.progress.some(STRETCH, f"{stage}, unedited, other seeds")
    others = observe_baseline(lens.model, fresh, lens.classifier, batch_size=size, n_examples=0, progress=bar)
    return Steered(prompt, result, base, found, at(found.beta, others))


def thin(betas: Sequence[float], n: int, identity: float) -> tuple[float, ...]:
    """At most ``n`` of the strengths, evenly: both ends and the identity always among them."""
    grid = sorted(betas)
    if len(grid) <= n:
        return tuple(grid)
    places = np.linspace(0, len(grid) - 1, n).round().astype(int)
    chosen = {grid[i] for i in places}
    if identity in grid and identity not in chosen:
        inner = sorted(chosen)[1:-1]
        chosen.discard(min(inner, key=lambda b: abs(b - identity), default=float("nan")))
        chosen.add(identity)
    return tuple(sorted(chosen))


def prompt_rows(job: Job, steered: Steered, name: str) -> list[Row]:
    """The properties of one prompt's sweep, in a fixed order."""
    result = steered.result
    column = result.attribute.index(result.target)
    low, high = _log_odds(result, 0, column), _log_odds(result, -1, column)
    n = len(result.request.seeds)
    label = f"ln({result.target} / {result.attribute.opposite(result.target)}), {name}"
    betas = result.betas
    rows = [
        at_most(
            5, f"{label}: weakest", low[0], low[1], -REACH, "number", n, f"at β = {betas[0]:g}{lost(job, steered, 0)}"
        ),
        at_least(
            5,
            f"{label}: strongest",
            high[0],
            high[1],
            REACH,
            "number",
            n,
            f"at β = {betas[-1]:g}{lost(job, steered, -1)}",
        ),
        order_row(steered, column, name),
        balance_row(steered, name),
        moved_row(job, steered, name),
    ]
    kept = kept_row(job, steered, name)
    return rows if kept is None else [*rows, kept]


def lost(job: Job, steered: Steered, place: int) -> str:
    """What an end of the range costs, to stand beside how far it reaches; empty where nothing else is read."""
    same = kept_by_nuisance(job, steered.base.measurement, steered.result.points[place].measurement)
    if not same:
        return ""
    least = min(same, key=lambda key: same[key].mean())
    mean = float(np.mean([own.mean() for own in same.values()]))
    return f", where {mean:.0%} of nuisances are kept (least: {least} {same[least].mean():.0%})"


def kept_by_nuisance(job: Job, before: Measurement, after: Measurement) -> dict[str, np.ndarray]:
    """Nuisance → whether each image kept its class, ``float [n]``."""
    steerable = {a.name for a in job.lens.attributes}
    return {key: _same(p, after.readings[key]) for key, p in before.readings.items() if key not in steerable}


def _log_odds(result: SweepResult, place: int, column: int) -> tuple[float, Interval]:
    """Corrected log odds of the target's share at one strength; its classes are two."""
    ratio = result.points[place].log_ratio_corrected
    if ratio is None:
        return float("nan"), (float("-inf"), float("inf"))
    low, high = ratio.interval
    return (ratio.value, (low, high)) if column == 1 else (-ratio.value, (-high, -low))


def order_row(steered: Steered, column: int, name: str) -> Row:
    """Whether the target's share ever falls as β rises, beyond what paired seeds leave to chance."""
    name = f"share rises with β, {name}: largest fall"
    readings = steered.result.points
    pairs = list(combinations(range(len(readings)), 2))
    falls: list[tuple[float, Interval, int]] = []
    for i, j in pairs:
        both = readings[i].certain & readings[j].certain
        if not both.any():
            continue
        moved = stats.paired_difference(readings[i].labels[both] == column, readings[j].labels[both] == column)
        low, high = stretch(moved.value, moved.interval, len(pairs))
        falls.append((-moved.value, (-high, -low), int(both.sum())))
    if not falls:
        return Row(5, name, "no clear fall", "fails", note="every image was left undecided")
    value, interval, n = max(falls, key=lambda fall: (fall[1][0] > 0, fall[0]))
    value, interval = max(0.0, value), (max(interval[0], 0.0), max(interval[1], 0.0))
    verdict: Verdict = "fails" if interval[0] > 0 else "holds"
    note = f"largest of {len(pairs)} pairs of strengths, intervals hold together"
    return Row(5, name, "0 within its interval", verdict, value, interval, "points", n, -interval[0], note)


def balance_row(steered: Steered, name: str) -> Row:
    """FD at the balanced strength, on seeds that did not choose it, against the 95 % point of its null.

    β was found on as many images as are counted here, so both err: the null is that of half as many (our working form).
    """
    found = steered.found
    assert found is not None and steered.balanced is not None
    n = steered.balanced.n
    label = f"FD at balance, {name}"
    if n == 0:
        return Row(5, label, "–", "fails", note="every image was left undecided")
    value, interval = steered.balanced.fd, steered.balanced.fd_interval
    floor = metrics.fd_null_floor(max(1, n // 2), steered.balanced.goal)
    note = f"{found.note} On {n} other seeds; bar: the 95 % point of FD where choice and count err alike"
    return at_most(5, label, value, interval, floor, "number", n, note)


def moved_row(job: Job, steered: Steered, name: str) -> Row:
    """The largest move of a share of the other steered attributes at balance."""
    assert steered.balanced is not None
    others = [a.name for a in job.lens.attributes if a.name != steered.result.attribute.name]
    moves = [change for change in steered.balanced.changes if change.attribute in others]
    label = f"{' and '.join(others) or 'other'} shares moved at balance, {name}"
    if not moves:
        return not_applicable(5, label, "this lens steers nothing else")
    rows = []
    for change in moves:
        interval = distance(stretch(change.difference, change.interval, len(moves)))
        note = f"{change.attribute}: {change.label} {change.before:.1%} to {change.after:.1%}"
        rows.append(at_most(5, label, abs(change.difference), interval, MOVED, "points", change.n, note))
    return worst(rows)


def kept_row(job: Job, steered: Steered, name: str) -> Row | None:
    """Nuisance classes kept on paired seeds at balance: mean over nuisances."""
    assert steered.balanced is not None and steered.balanced.measurement.reference is not None
    same = kept_by_nuisance(job, steered.balanced.measurement.reference, steered.balanced.measurement)
    if not same:
        return None
    low = min(same, key=lambda key: same[key].mean())
    found = stats.pooled_share(list(same.values()))
    note = f"mean of {len(same)} nuisances; least: {low} {same[low].mean():.1%}"
    return at_least(
        5, f"nuisances kept at balance, {name}", found.value, found.interval, AGREEMENT, "share", len(same[low]), note
    )


def _same(before: Predictions, after: Predictions) -> np.ndarray:
    return (metrics.decided_labels(before) == metrics.decided_labels(after)).astype(float)


def _professions(job: Job, attribute: Attribute) -> list[tuple[Steered, list[Row]]]:
    """Sweep the paper's professions, then others in order, until enough hold or none are left."""
    prompts = [p for p in job.lens.prompts if p]
    named = [p for word in FIRST_CHOICE for p in prompts if word in p.split()]
    queue = named + [p for p in prompts if p not in named and "person" not in p.split()]
    found: list[tuple[Steered, list[Row]]] = []
    for place, prompt in enumerate(queue, start=1):
        if sum(_does(job, rows) for _, rows in found) >= PROFESSIONS:
            break
        steered = steer(job, attribute, prompt, place)
        found.append((steered, prompt_rows(job, steered, name_of(prompt))))
        job.on_rows(found[-1][1])
    return found


def _grade(rows: Sequence[Row]) -> int:
    return SEVERITY[worst(rows).verdict]


def _does(job: Job, rows: Sequence[Row]) -> bool:
    return _grade(rows) >= SEVERITY["holds" if job.strict else "open"]


def _told(row: Row) -> str:
    """What was measured in a row about one prompt, and how much of it."""
    what, value = row.name.rsplit(", '", 1)[0], "" if row.value is None else f" {show(row.value, row.unit)}"
    return f"{what}{value}"


def _profession_rows(job: Job, measured: Sequence[list[Row]], prompts: Sequence[str | None]) -> list[Row]:
    """Per property, the worst of the best four professions; and how many hold."""
    if len(measured) < PROFESSIONS:
        return [not_applicable(5, "professions", f"the lens suggests {len(measured)} of the {PROFESSIONS} needed")]
    order = sorted(range(len(measured)), key=lambda i: -_grade(measured[i]))
    chosen = order[:PROFESSIONS]
    rows = [worst([measured[i][place] for i in chosen]) for place in range(len(measured[0]))]
    does = [_does(job, rows) for rows in measured]
    nouns = [str(prompt).split()[-1] for prompt in prompts]
    others = [f"{noun} ({_told(worst(rows))})" for noun, rows, ok in zip(nouns, measured, does, strict=True) if not ok]
    note = (
        f"{sum(does)} of {len(measured)} measured {'hold' if job.strict else 'do not fail'}; the worst of "
        f"{', '.join(nouns[i] for i in chosen)} above{'; not: ' * bool(others)}{', '.join(others)}"
    )
    count = at_least(5, "professions on which the sweep does this", sum(does), None, PROFESSIONS, "number", 0, note)
    return [*rows, count]


def _control_row(job: Job, attribute: Attribute, shipped: Steered) -> tuple[Row, list[SweepResult]]:
    """How far as many random features, as active, go on both sides of 0."""
    results = [
        steer(job, attribute, shipped.prompt, 0, control="random", draw=draw, base=shipped.base).result
        for draw in range(job.sizes.controls)
    ]
    reaches = [reach(result) for result in results]
    value = max(reaches)
    own = reach(shipped.result)
    note = f"{len(results)} random set(s) on {name_of(shipped.prompt)}; the shipped features reach {own:.2f}"
    row = at_most(
        5, "random features: reach on both sides of 0", value, None, np.nextafter(REACH, 0), "number",
        job.sizes.sweep, note,
    )  # fmt: skip
    return row, results


def reach(result: SweepResult) -> float:
    """How far the log ratio goes on both sides of 0, the smaller of the two (negative: it stays on one side)."""
    values = [p.log_ratio_corrected.value for p in result.points if p.log_ratio_corrected is not None]
    return min(-min(values), max(values)) if values else float("nan")
