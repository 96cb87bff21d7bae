"""From attributions to a turn: the feature sets of a ``Setting``, and the interventions that they make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from diffusion_lens.base.types import Attribution, FeatureSet, Intervention, LensError, Mode
from diffusion_lens.results.manifest import Setting

Control = Literal["random", "flip"]
LIKE = 8
"""A random control draws among this many features of nearest activity."""


def identity_beta(mode: Mode) -> float:
    """The β that changes nothing: 1 for ``scale``, 0 for ``add`` and ``suppress``."""
    return 1.0 if mode == "scale" else 0.0


def feature_sets(
    attribution: Attribution, setting: Setting, target: str, n_features: int | None = None
) -> tuple[FeatureSet, FeatureSet | None]:
    """The features that ``setting`` turns for class ``target``, and those of the opposite pole (``None``: one pole).

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
    beta: float,
    *,
    n_features: int | None = None,
    **changes: Any,
) -> Intervention:
    """The intervention of ``setting`` towards ``target`` at strength ``beta``.

    ``changes`` replace any other field of ``Intervention`` (``overrides``, ``only_seeds``, ``window``, …).
    """
    features, opposite = feature_sets(attribution, setting, target, n_features)
    values: dict[str, Any] = {
        "opposite": opposite,
        "mode": setting.mode,
        "window": setting.window,
        "sampler": setting.sampler,
        "hold": setting.hold,
    }
    unknown = set(changes) - {*values, "overrides", "only_seeds"}
    if unknown:
        raise LensError(f"An intervention has no field '{min(unknown)}'.")
    return Intervention(features=features, beta=beta, **{**values, **changes})


def random_set(features: FeatureSet, activity: np.ndarray, *, seed: int, avoid: tuple[int, ...] = ()) -> FeatureSet:
    """A control: as many live features drawn at random, as active as those they stand for.

    For each of ``features``, one of the ``LIKE`` free features whose mean activation is nearest to its own (in
    ratio); none of ``features`` or ``avoid`` is drawn. Decoder columns have unit norm, so a set as active pushes
    the bottleneck about as far. ``activity [d_sae]``: mean activation (``Atlas.activity``); 0 is a dead feature.
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


def control_turn(turn: Intervention, control: Control, activity: np.ndarray, seed: int) -> Intervention:
    """The same turn of features that should not carry the attribute (``random``), or of exchanged poles (``flip``).

    ``flip`` needs a turn of both poles; ``activity [d_sae]``: mean activations, see ``random_set``.
    """
    if control == "flip":
        if turn.opposite is None:
            raise LensError("This turn has one pole only; exchange of poles is no control for it.")
        return replace(turn, features=turn.opposite, opposite=turn.features)
    avoid = turn.opposite.ids if turn.opposite else ()
    features = random_set(turn.features, activity, seed=seed, avoid=avoid)
    if turn.opposite is None:
        return replace(turn, features=features)
    opposite = random_set(turn.opposite, activity, seed=seed + 1, avoid=(*features.ids, *turn.features.ids))
    return replace(turn, features=features, opposite=opposite)


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
