"""From attributions to interventions: the feature sets of a ``Setting``, how far they go, and their controls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from diffusion_lens.base.types import Attribution, Control, FeatureSet, Intervention, LensError
from diffusion_lens.results.manifest import Setting

LIKE = 8
"""A random control draws among this many features of nearest activity."""


MOVES = 40
"""A slider takes about this many moves of an arrow key from end to end."""


@dataclass(frozen=True)
class Scale:
    """A strength slider: its ends, its step, and the strength that changes nothing."""

    low: float
    high: float
    step: float
    identity: float


def scale(setting: Setting) -> Scale:
    """The slider of a setting: its measured range, on steps of which the identity is one."""
    identity = setting.identity
    low, high = min(*setting.betas, identity), max(*setting.betas, identity)
    if low == high:
        low, high = identity - 1, identity + 1
    rough = (high - low) / MOVES
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0) if s >= rough * 0.999)
    return Scale(
        round(identity - step * math.ceil((identity - low) / step - 1e-9), 6),
        round(identity + step * math.ceil((high - identity) / step - 1e-9), 6),
        step,
        identity,
    )


def strengths(setting: Setting, n_classes: int, least: int, more: Iterable[float] = ()) -> tuple[float, ...]:
    """At least ``least`` strengths from end to end of a setting's slider, its own steps among them, and ``more``.

    Where two poles of two classes are turned against each other, a turn towards the other class is one towards this
    class on the other side of the identity: the range then reaches as far on both sides. Rising; the identity is one
    of them. What of ``more`` lies beyond the ends is left out.
    """
    ends = scale(setting)
    finer = max(1, math.ceil((least - 1) / round((ends.high - ends.low) / ends.step)))
    below, above = (round(abs(end - ends.identity) / ends.step) * finer for end in (ends.low, ends.high))
    if setting.poles == "both" and n_classes == 2:
        below = above = max(below, above)
    grid = {round(ends.identity + i * ends.step / finer, 6) + 0.0 for i in range(-below, above + 1)}
    return tuple(sorted({*grid, *(beta for beta in more if min(grid) <= beta <= max(grid))}))


def feature_sets(
    attribution: Attribution, setting: Setting, target: str, n_features: int | None = None
) -> tuple[FeatureSet, FeatureSet | None]:
    """The features that ``setting`` steers for class ``target``, and those of the opposite pole (``None``: one pole).

    Features are ranked by attribution summed over the setting's step window. The opposite pole of a two-class
    attribute holds the other class's features; with more classes, those that speak most against ``target``
    (our working form: for two classes both are the same).
    """
    n = setting.n_features if n_features is None else n_features
    features = attribution.top_k(n, target=target, window=setting.window)
    if not features.ids:
        raise LensError(f"No feature speaks for {attribution.attribute.name} = {target}; fit with more images.")
    return features, opposite_set(attribution, features, n, setting.window) if setting.poles == "both" else None


def opposite_set(
    attribution: Attribution, features: FeatureSet, n: int, window: tuple[int, int] | None = None
) -> FeatureSet | None:
    """Up to ``n`` features of the pole opposite to ``features`` (scores above 0); ``None`` where there are none."""
    other = attribution.attribute.opposite(features.target)
    scores = -attribution.total(features.target, window=window) if other is None else attribution.total(
        other, window=window
    )  # fmt: skip
    scores = scores.copy()
    scores[list(features.ids)] = 0
    order = np.argsort(-scores, kind="stable")[:n]
    ids = tuple(int(i) for i in order if scores[i] > 0)
    if not ids:
        return None
    name = other or f"other than {features.target}"
    return FeatureSet(ids, tuple(float(scores[i]) for i in ids), features.attribute, name, features.sae_id)


def make_intervention(
    attribution: Attribution,
    setting: Setting,
    target: str,
    strength: float,
    *,
    n_features: int | None = None,
    only_seeds: frozenset[int] | None = None,
) -> Intervention:
    """The intervention of ``setting`` towards ``target`` at ``strength`` (0 changes nothing).

    ``n_features`` replaces the setting's own number. For other changes use ``setting.model_copy`` or ``replace``.
    """
    features, opposite = feature_sets(attribution, setting, target, n_features)
    return Intervention(
        features, setting.mode, strength=strength, opposite=opposite, window=setting.window, sampler=setting.sampler,
        only_seeds=only_seeds, hold=setting.hold,
    )  # fmt: skip


def random_set(features: FeatureSet, activity: np.ndarray, *, seed: int, avoid: tuple[int, ...] = ()) -> FeatureSet:
    """A control: as many live features drawn at random, as active as those they stand for.

    For each of ``features``, one of the ``LIKE`` free features whose mean activation is nearest to its own (in
    ratio); none of ``features`` or ``avoid`` is drawn. The decoder rows of an SAE trained here are of one length, so
    a set as active pushes the bottleneck about as far. ``activity [d_sae]``: mean activation (``Atlas.activity``); 0
    is a dead feature.
    """
    taken = {*features.ids, *avoid}
    free = [i for i in np.flatnonzero(activity > 0).tolist() if i not in taken]
    if len(free) < len(features.ids):
        raise LensError(
            f"Only {len(free)} other live features exist; a random control of {len(features.ids)} needs more."
        )
    rng, size, ids = np.random.default_rng(seed), np.log(np.maximum(activity, 1e-12)), []
    for own in sorted(features.ids, key=lambda i: -activity[i]):
        like = sorted(free, key=lambda i: abs(size[i] - size[own]))[:LIKE]
        ids.append(int(rng.choice(like)))
        free.remove(ids[-1])
    return FeatureSet(tuple(ids), (0.0,) * len(ids), features.attribute, f"random ({seed})", features.sae_id)


def control_intervention(intervention: Intervention, control: Control, activity: np.ndarray, seed: int) -> Intervention:
    """The same, of features that should not carry the attribute (``random``), or with poles exchanged (``flip``).

    ``flip`` needs an intervention on both poles; ``activity [d_sae]``: mean activations, see ``random_set``.
    """
    features, opposite = intervention.features, intervention.opposite
    if control == "flip":
        if opposite is None:
            raise LensError("This intervention has one pole only; exchange of poles is no control for it.")
        return replace(intervention, features=opposite, opposite=features)
    drawn = random_set(features, activity, seed=seed, avoid=opposite.ids if opposite else ())
    if opposite is None:
        return replace(intervention, features=drawn)
    mirrored = random_set(opposite, activity, seed=seed + 1, avoid=(*drawn.ids, *features.ids))
    return replace(intervention, features=drawn, opposite=mirrored)


def describe_setting(setting: Setting, control: Control | None = None, seed: int = 0) -> str:
    """A setting in one line of stable text; a control says so."""
    steps = "all steps" if setting.window is None else f"steps {setting.window[0]} to {setting.window[1] - 1}"
    poles = "both poles" if setting.poles == "both" else "one pole"
    held = f", holding {' and '.join(setting.hold)}" if setting.hold else ""
    text = f"{setting.n_features} features, {poles}, {setting.mode}, {setting.sampler}, {steps}{held}"
    if control is None:
        return text
    told = f"random features as active (seed {seed})" if control == "random" else "poles exchanged"
    return f"{text}; control: {told}"
