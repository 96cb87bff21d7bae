"""What single features control, as measured: effects with intervals, groups, and what the evidence amounts to.

Reads and writes without torch, so that the app's first page can show it; ``dissect`` measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_lens.base.files import load_header, load_tensors, save_tensors
from diffusion_lens.base.foreign import check_array, reading
from diffusion_lens.base.plain import from_plain
from diffusion_lens.base.types import Atlas, LensError
from diffusion_lens.results import display

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("effects", "low", "high", "p_values", "q_values", "flips")
TEXTS = ("features", "betas", "classes", "sae_id", "source", "alpha", "n")


@dataclass(frozen=True)
class FeatureEffect:
    """What one feature, turned alone, does to one class.

    Attributes:
        beta: how far it was turned.
        difference: change of the class's share among images decided both times; ``interval`` paired, 95 %.
        q_value: McNemar's p after Benjamini–Hochberg over every feature and class; NaN where nothing was tested,
            because the feature never fires on these images.
        specificity: this attribute's part of all that the feature moved (1: nothing else moved).
        flips: share of images whose class of this attribute changed.
    """

    feature: int
    beta: float
    attribute: str
    label: str
    difference: float
    interval: tuple[float, float]
    q_value: float
    specificity: float
    flips: float


@dataclass(frozen=True, eq=False, repr=False)
class Dissection:
    """Causal effects of single features.

    Attributes:
        features, betas: the turns measured, one feature to one β each; a feature may be there with several.
        classes: attribute → its classes.
        effects, low, high, p_values, q_values: attribute → ``[turn, class]`` in the order of ``features``;
            p and q are NaN for features that never fire on these images, which so cannot change.
        flips: attribute → ``[turn]``.
        n: paired images per turn. source: what was done, in one line. alpha: false discovery rate.
    """

    features: tuple[int, ...]
    betas: tuple[float, ...]
    classes: dict[str, tuple[str, ...]]
    effects: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    p_values: dict[str, np.ndarray]
    q_values: dict[str, np.ndarray]
    flips: dict[str, np.ndarray]
    sae_id: str
    source: str
    alpha: float
    n: int

    @property
    def tested(self) -> np.ndarray:
        """Turns of features that fire on these images and were so put to the test, bool ``[turn]``."""
        return np.isfinite(next(iter(self.p_values.values()))).any(axis=1)

    def __repr__(self) -> str:
        return f"Dissection({len(self.ids())} features in {len(self.features)} turns, {self.source}; {self.sae_id})"

    def to_frame(self) -> pd.DataFrame:
        """A row per feature, strength, attribute and class, with its interval, q and whether it counts."""
        return display.frame([_row(self, e) for feature in self.ids() for e in effects_of(self, feature)])

    def _repr_html_(self) -> str:
        sure = [own[0] for own in groups(self).values() if own]
        rows = [_row(self, e) for e in sorted(sure, key=lambda e: -abs(e.difference))]
        return display.page(repr(self), rows, note=f"The strongest feature of each attribute. {summary(self)}")

    def ids(self, *, tested: bool = False) -> tuple[int, ...]:
        """The features, each once; ``tested``: only those put to the test."""
        return tuple(dict.fromkeys(f for f, sure in zip(self.features, self.tested, strict=True) if sure or not tested))


def save_dissection(path: Path, found: Dissection) -> None:
    """Write one safetensors file, texts in its header."""
    arrays = {f"{part}.{name}": array for part in PARTS for name, array in getattr(found, part).items()}
    save_tensors(path, arrays, {"dissection": json.dumps({text: getattr(found, text) for text in TEXTS})})


def load_dissection(path: Path) -> Dissection:
    """Read what ``save_dissection`` wrote; raises ``LensError`` that names a file of another kind."""
    arrays = load_tensors(path)
    with reading(path, "a stored dissection", "run dissect --store again"):
        told = from_plain(_Texts, load_header(path, "dissection"))
        parts: dict[str, Any] = {part: {name: arrays[f"{part}.{name}"] for name in told.classes} for part in PARTS}
        _check(told, parts)
        return Dissection(**{text: getattr(told, text) for text in TEXTS}, **parts)


@dataclass(frozen=True)
class _Texts:
    """What the header says of a ``Dissection``."""

    features: tuple[int, ...]
    betas: tuple[float, ...]
    classes: dict[str, tuple[str, ...]]
    sae_id: str
    source: str
    alpha: float
    n: int


def _check(told: _Texts, parts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Raise ``ValueError`` for arrays of other turns or classes, and for numbers that cannot be."""
    turns = len(told.features)
    if not (told.classes and turns and turns == len(told.betas) and min(told.features) >= 0):
        raise ValueError("its features, strengths and classes do not fit together")
    if not (np.isfinite(told.betas).all() and 0 < told.alpha < 1 and told.n >= 1):
        raise ValueError("its strengths, its rate of false discoveries or its number of images cannot be")
    for part, arrays in parts.items():
        for name, array in arrays.items():
            own = (turns,) if part == "flips" else (turns, len(told.classes[name]))
            check_array(f"{part}.{name}", array, own, finite=part in ("effects", "low", "high", "flips"))


@lru_cache(maxsize=4)
def groups(found: Dissection) -> dict[str, tuple[FeatureEffect, ...]]:
    """Attribute → the features that control it above all else, largest effect first; empty for those without any.

    A feature belongs where its largest sure effect lies, over all its turns; one without a sure effect belongs nowhere.
    """
    largest: dict[int, FeatureEffect] = {}
    for row, feature in enumerate(found.features):
        best = _best(found, row)
        if best and (feature not in largest or abs(best.difference) > abs(largest[feature].difference)):
            largest[feature] = best
    grouped: dict[str, list[FeatureEffect]] = {name: [] for name in found.classes}
    for best in largest.values():
        grouped[best.attribute].append(best)
    return {name: tuple(sorted(own, key=lambda e: -abs(e.difference))) for name, own in grouped.items()}


def effects_of(found: Dissection, feature: int) -> tuple[FeatureEffect, ...]:
    """Every class of every attribute for every turn of one feature; empty where it was not measured."""
    rows = [row for row, own in enumerate(found.features) if own == feature]
    cells = [(name, column) for name, own in found.classes.items() for column in range(len(own))]
    return tuple(_effect(found, row, *cell) for row in rows for cell in cells)


def is_sure(found: Dissection, effect: FeatureEffect) -> bool:
    """Whether an effect counts at the dissection's false discovery rate."""
    return bool(effect.q_value <= found.alpha)


def _row(found: Dissection, effect: FeatureEffect) -> dict[str, Any]:
    low, high = effect.interval
    return {
        "feature": effect.feature, "beta": effect.beta, "attribute": effect.attribute, "class": effect.label,
        "difference": effect.difference, "low": low, "high": high, "q": effect.q_value, "n": found.n,
        "sure": is_sure(found, effect),
    }  # fmt: skip


def name_of(effect: FeatureEffect) -> str:
    """Short text for a card: ``glasses: glasses +12 points at β = 10``.

    A negative β takes away what the feature stands for, and a card may cut the end of the text: it says so in front.
    """
    down = " turned down" if effect.beta < 0 else ""
    return f"{effect.attribute}{down}: {_moved(effect)}"


def _moved(effect: FeatureEffect) -> str:
    return f"{effect.label} {effect.difference * 100:+.0f} points at β = {effect.beta:g}"


def least_images(found: Dissection) -> int:
    """How many images, all moved one way, make an effect count here: what smaller effects fall below.

    McNemar's exact p of k images that all moved one way is ``2^(1 − k)``; it counts up to ``alpha R / M`` where R of
    M tests count (Benjamini–Hochberg), or ``alpha / M`` where none does.
    """
    q = np.concatenate([values[np.isfinite(values)] for values in found.q_values.values()])
    limit = found.alpha * max(1, int((q <= found.alpha).sum())) / max(1, len(q))
    return int(np.ceil(1 - np.log2(limit)))


def evidence(found: Dissection, attribute: str) -> str:
    """What the dissection says of one attribute: its features, or that none is sure and what could have been seen."""
    tested = len(found.ids(tested=True))
    own = groups(found)[attribute]
    test = (
        f"{tested} features tested on {found.n} paired images a turn, false discovery rate {found.alpha:.0%}; an "
        f"effect counts from about {least_images(found)} images that all move one way."
    )
    if own:
        many = f"{len(own)} features move" if len(own) > 1 else "One feature moves"
        return f"{many} {attribute} above all else; the strongest is feature {_told(own[0])}. {test}"
    beside = moved_beside(found, attribute)
    if beside:
        many = f"{len(beside)} features move" if len(beside) > 1 else "one feature moves"
        return (
            f"No feature moves {attribute} above all else; {many} it for sure beside something that moves further, the "
            f"furthest {_told(beside[0])}. {test}"
        )
    return f"No feature tested moves {attribute} for sure{_largest(found, attribute)}. {test}"


def to_atlas(found: Dissection, atlas: Atlas) -> Atlas:
    """The atlas with these effects, and with features named by what they control where that is sure.

    Raises ``LensError`` for an atlas of another SAE.
    """
    if found.sae_id != atlas.sae_id or max(found.features) >= len(atlas.density):
        raise LensError("This dissection belongs to another SAE; dissect this lens.")
    effects: dict[str, np.ndarray] = {}
    for name, measured in found.effects.items():
        effects[name] = np.full((len(atlas.density), measured.shape[1]), np.nan, np.float32)
        order = np.argsort(
            np.abs(np.nan_to_num(measured)).max(axis=1), kind="stable"
        )  # the turn that moved most is told
        effects[name][np.array(found.features)[order]] = measured[order]
    labels = list(atlas.labels)
    for own in groups(found).values():
        for effect in own:
            labels[effect.feature] = name_of(effect)
    first = atlas.label_source.removesuffix(_names_source(atlas.effect_source))  # of a dissection before this one
    source = first + _names_source(found.source)
    return replace(atlas, effects=effects, effect_source=found.source, labels=tuple(labels), label_source=source)


def _names_source(effects: str) -> str:
    return f"; with points: by the effect of turning it alone, {effects}"


def _told(effect: FeatureEffect) -> str:
    low, high = effect.interval
    points = f"{100 * effect.difference:+.0f} points (95 % {100 * low:+.0f} to {100 * high:+.0f})"
    return f"#{effect.feature}: {effect.label} {points} at β = {effect.beta:g}"


def summary(found: Dissection) -> str:
    """Every attribute with the number of features that control it, and those that none does."""
    counts = {name: len(own) for name, own in groups(found).items()}
    some = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
    none = ", ".join(name for name, n in counts.items() if not n)
    told = f"{len(found.ids(tested=True))} features tested, each alone on {found.n} paired images a turn. "
    told += f"Features by what each moves above all else: {some}. " if some else "No feature moves anything for sure. "
    return told + (f"None for {none}." if none and some else "")


@lru_cache(maxsize=64)
def moved_beside(found: Dissection, attribute: str) -> tuple[FeatureEffect, ...]:
    """Features that move an attribute for sure and something else further, largest effect on the attribute first."""
    above = {effect.feature for effect in groups(found)[attribute]}
    largest: dict[int, FeatureEffect] = {}
    for row, feature in enumerate(found.features):
        own = None if feature in above else _most(found, row, attribute)
        if own and (feature not in largest or abs(own.difference) > abs(largest[feature].difference)):
            largest[feature] = own
    return tuple(sorted(largest.values(), key=lambda e: -abs(e.difference)))


def _largest(found: Dissection, attribute: str) -> str:
    sizes = np.abs(np.nan_to_num(found.effects[attribute]))
    if not sizes.size or not sizes.max():
        return "; its share never moved"
    row, column = np.unravel_index(int(sizes.argmax()), sizes.shape)
    best = _effect(found, int(row), attribute, int(column))
    return f" (the largest: #{best.feature}, {_moved(best)}, q = {best.q_value:.2g})"


def _best(found: Dissection, row: int) -> FeatureEffect | None:
    sure = [own for own in (_most(found, row, name) for name in found.effects) if own is not None]
    return max(sure, key=lambda own: abs(own.difference), default=None)


def _most(found: Dissection, row: int, name: str) -> FeatureEffect | None:
    """A turn's largest sure effect on one attribute."""
    effect = found.effects[name][row]
    known = np.nan_to_num(found.q_values[name][row], nan=1.0) <= found.alpha
    sure = np.where(known, np.abs(np.nan_to_num(effect)), 0.0)
    return _effect(found, row, name, _told_class(sure, effect)) if sure.max() > 0 else None


def _effect(found: Dissection, row: int, name: str, column: int) -> FeatureEffect:
    sizes = {n: float(np.abs(np.nan_to_num(effect[row])).max()) for n, effect in found.effects.items()}
    everything = sum(sizes.values())
    return FeatureEffect(
        found.features[row], found.betas[row], name, found.classes[name][column],
        float(found.effects[name][row, column]),
        (float(found.low[name][row, column]), float(found.high[name][row, column])),
        float(found.q_values[name][row, column]), sizes[name] / everything if everything else 0.0,
        float(found.flips[name][row]),
    )  # fmt: skip


def _told_class(sure: np.ndarray, effect: np.ndarray) -> int:
    """The class told: the one that grew, where it moved as far as any other."""
    grown = np.where((effect > 0) & np.isclose(sure, sure.max()), sure, 0.0)
    return int(grown.argmax()) if grown.max() > 0 else int(sure.argmax())
