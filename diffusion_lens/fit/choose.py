"""How a lens should steer an attribute: chosen on seeds that no evaluation uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import numpy as np
from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import (
    Attribution,
    GenerationRequest,
    Intervention,
    LensError,
    Mode,
    Sampler,
    beta_of,
    strength_of,
)
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.measuring.observe import Baseline, observe_baseline
from diffusion_lens.measuring.sweep import sweep_points
from diffusion_lens.model.generate import Edit
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.manifest import Setting
from diffusion_lens.results.records import load_point, save_point
from diffusion_lens.results.sweeps import SweepPoint
from diffusion_lens.steering.intervene import make_edit
from diffusion_lens.steering.settings import describe_setting, make_intervention

REACH = 1.0


class ChooseConfig(StrictConfig):
    """The grid that a setting is chosen from.

    Attributes:
        holds: whether steering leaves the lens's other attributes alone (``Intervention.hold``).
        betas: strengths as for ``scale``, where 1 changes nothing; other modes use them less 1.
        n_images: images per strength, on seeds from ``first_seed`` on, which nothing else should use.
        prompts: the prompts chosen on; empty: the first that the lens samples.
    """

    n_features: tuple[int, ...] = (10, 30)
    poles: tuple[Literal["one", "both"], ...] = ("one", "both")
    modes: tuple[Mode, ...] = ("scale",)
    samplers: tuple[Sampler, ...] = ("asymmetric", "symmetric")
    windows: tuple[tuple[int, int] | None, ...] = (None,)
    holds: tuple[Literal["nothing", "others"], ...] = ("nothing",)
    betas: tuple[float, ...] = (-3.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0)
    n_images: int = Field(default=96, ge=8)
    first_seed: int = 3_000_000
    prompts: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Trial:
    """How one setting did, on one prompt or on several together.

    Attributes:
        effects: prompt by prompt, the log odds of the target's share at every β, with half an image added to both
            sides ``[prompt][β]``.
        reach: how far on both sides of 0 the effect goes, the smaller of the two (1 and more is enough), on the
            prompt where it goes least far.
        spillover: share of images whose other attributes changed, where the effect is -1 and +1, mean of both and of
            the prompts; NaN where it is not reached.
    """

    setting: Setting
    effects: tuple[tuple[float, ...], ...]
    reach: float
    spillover: float


def judge(setting: Setting, points: Sequence[SweepPoint], target_index: int) -> Trial:
    """Score one setting by its sweep (points in rising β); see ``Trial``.

    Only the stretch around the identity on which the effect is monotone counts: past it, steering destroys.
    """
    counts = [point.shares[target_index].count for point in points]
    totals = [sum(share.count for share in point.shares) for point in points]
    effect = np.array([np.log((k + 0.5) / (n - k + 0.5)) for k, n in zip(counts, totals, strict=True)])
    changed = np.array([1 - np.mean(list(p.agreement.values())) if p.agreement else 0.0 for p in points])
    first, last = _monotone_stretch(effect, [p.beta for p in points], setting.identity)
    inside, lost = effect[first : last + 1], changed[first : last + 1]
    reach = float(min(-inside.min(), inside.max()))
    spillover = float(np.mean(np.interp([-REACH, REACH], inside, lost))) if reach >= REACH else float("nan")
    return Trial(setting, (tuple(float(e) for e in effect),), reach, spillover)


def together(trials: Sequence[Trial]) -> Trial:
    """One setting's trials on several prompts as one: the least reach, the mean spillover."""
    effects = tuple(effect for trial in trials for effect in trial.effects)
    spillover = float(np.mean([trial.spillover for trial in trials]))
    return Trial(trials[0].setting, effects, min(trial.reach for trial in trials), spillover)


def _monotone_stretch(effect: np.ndarray, betas: Sequence[float], identity: float) -> tuple[int, int]:
    """The longest run of points around the identity along which ``effect`` never falls.

    Equal counts are no fall: of a few images of a rare class, as many at two strengths are often found.
    """
    start = int(np.abs(np.array(betas) - identity).argmin())
    first = last = start
    while last + 1 < len(effect) and effect[last + 1] >= effect[last]:
        last += 1
    while first > 0 and effect[first - 1] <= effect[first]:
        first -= 1
    return first, last


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the least spillover among those that reach ±1; where none does, the one that reaches furthest."""
    if not trials:
        raise LensError("There is no setting to choose from; give at least one of each kind.")
    enough = [trial for trial in trials if trial.reach >= REACH]
    return min(enough, key=lambda t: t.spillover) if enough else max(trials, key=lambda t: t.reach)


def candidates(attribute: str, target: str, grid: ChooseConfig, others: Sequence[str] = ()) -> Iterator[Setting]:
    """Every combination of the grid's choices, its strengths moved to each mode's zero.

    ``others``: the attributes that ``holds`` means.
    """
    axes = (grid.n_features, grid.poles, grid.modes, grid.samplers, grid.windows, grid.holds)
    for n, poles, mode, sampler, window, hold in product(*axes):
        strengths = sorted({0.0, *(strength_of("scale", beta) for beta in grid.betas)})
        yield Setting(
            attribute=attribute, target=target, n_features=n, poles=poles, mode=mode, sampler=sampler, window=window,
            hold=tuple(others) if hold == "others" else (), betas=tuple(beta_of(mode, s) for s in strengths),
        )  # fmt: skip


def choose_setting(
    model: DiffusionModel,
    sae: SparseAutoencoder,
    attribution: Attribution,
    classifier: Classifier,
    requests: Sequence[GenerationRequest],
    settings: Sequence[Setting],
    *,
    probes: Mapping[str, Probe],
    batch_size: int = 16,
    keep: Workspace | None = None,
) -> tuple[Setting, tuple[Trial, ...]]:
    """Sweep every candidate on the same seeds, prompt by prompt, and keep the best (see ``best``).

    ``requests``, one for each prompt, must use seeds that no evaluation uses. Returns the setting, with a note
    of how it was chosen, and every trial. Points already measured are read back from ``keep``.
    """
    bases: dict[int, Baseline] = {}
    trials = []
    for number, setting in enumerate(settings):
        own = []
        for place, asked in enumerate(requests):
            kept = None if keep is None else keep.part(trial_name(number, place))
            points = kept_points(kept, setting)
            if points is None:
                if place not in bases:
                    bases[place] = observe_baseline(model, asked, classifier, batch_size=batch_size, n_examples=0)
                points = measure_setting(
                    model, sae, attribution, classifier, bases[place], setting, probes=probes, batch_size=batch_size,
                    n_examples=0, keep=kept,
                )  # fmt: skip
            own.append(judge(setting, points, attribution.attribute.index(setting.target)))
        trials.append(together(own))
    chosen, n = best(trials), len(requests[0].seeds)
    reached = f"spillover {chosen.spillover:.0%}" if chosen.reach >= REACH else "no candidate reached ±1"
    note = (
        f"Least spillover at log odds ±1 among {len(trials)} settings on {n} images per strength of "
        f"{len(requests)} prompt(s) (reach {chosen.reach:.1f}, {reached})."
    )
    return chosen.setting.model_copy(update={"n_seeds_chosen_on": n, "note": note}), tuple(trials)


def trial_name(number: int, place: int) -> str:
    """The workspace of the points of one candidate on one prompt."""
    return f"{number:04d}-{place:02d}"


def kept_points(kept: Workspace | None, setting: Setting) -> list[SweepPoint] | None:
    """The points of ``setting``, in rising β; ``None`` where one of them is not measured yet."""
    names = [point_name(number) for number in range(len(setting.betas))]
    if kept is None or not kept.has(*names):
        return None
    return [load_point(kept.path(name)) for name in names]


def point_name(number: int) -> str:
    """The piece that holds the point of one strength."""
    return f"{number:03d}"


def measure_setting(
    model: DiffusionModel,
    sae: SparseAutoencoder,
    attribution: Attribution,
    classifier: Classifier,
    base: Baseline,
    setting: Setting,
    *,
    probes: Mapping[str, Probe],
    change: Callable[[Intervention], Intervention] = lambda intervention: intervention,
    batch_size: int = 16,
    n_examples: int = 8,
    keep: Workspace | None = None,
    progress: Progress | None = None,
) -> list[SweepPoint]:
    """Sweep a setting over its strengths on the seeds of ``base``; points kept in ``keep`` are not measured again.

    ``probes``: those of what the setting holds still. ``change`` makes a control of the intervention.
    """

    def edit_at(beta: float) -> Edit | None:
        strength = strength_of(setting.mode, beta)
        if strength == 0:
            return None
        return make_edit([change(make_intervention(attribution, setting, setting.target, strength))], sae, probes)

    def measure(beta: float, bar: Progress) -> SweepPoint:
        (point,) = sweep_points(
            model, base.request, edit_at, [beta], classifier, attribution.attribute, setting.target,
            baseline=base, batch_size=batch_size, n_examples=n_examples, progress=bar,
        )  # fmt: skip
        return point

    betas, points = sorted(setting.betas), []
    for number, (beta, bar) in enumerate(zip(betas, (progress or Progress()).parts(len(betas)), strict=True)):
        make = partial(measure, beta, bar)
        points.append(make() if keep is None else keep.piece(point_name(number), make, save_point, load_point, bar))
    return points


def describe(trial: Trial) -> str:
    """One line: the setting, its reach and spillover."""
    return f"{describe_setting(trial.setting)}: reach {trial.reach:.2f}, spillover {trial.spillover:.1%}"
