"""What each SAE feature controls, found without labels given by hand: turn it alone, on paired seeds, and read
everything that the image classifier reads (DiffLens' last finding: single features of hair, glasses, skin).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field
from statsmodels.stats.multitest import multipletests

from diffusion_lens import stats
from diffusion_lens.artifacts import (
    load_tensors,
    read_json,
    read_manifest,
    save_tensors,
    write_json,
    write_manifest,
)
from diffusion_lens.compare import JudgedLens
from diffusion_lens.config import StrictConfig
from diffusion_lens.generate import OnStep, generate_batches, request
from diffusion_lens.intervene import compile
from diffusion_lens.methods.protocol import lens_key
from diffusion_lens.records import load_atlas, save_atlas
from diffusion_lens.sweep import Baseline, measure_baseline, read_images
from diffusion_lens.types import Atlas, FeatureSet, Intervention, LensError, Mode, Predictions, Sampler


class DissectConfig(StrictConfig):
    """How far each feature is turned, and on what.

    Attributes:
        prompt: the prompt drawn (``None``: unconditional). n, first_seed: paired seeds, the same for every feature.
        mode, beta, sampler: the turn, as in ``Intervention``.
        features: ids; ``None`` takes all that fire on at least ``min_density`` of the atlas's samples.
        alpha: false discovery rate at which an effect counts (Benjamini–Hochberg over all features and classes).
    """

    prompt: str | None
    n: int = Field(default=64, ge=stats.MIN_PAIRS)
    first_seed: int = 10_000_000
    mode: Mode = "scale"
    beta: float = 5.0
    sampler: Sampler = "asymmetric"
    features: tuple[int, ...] | None = None
    min_density: float = Field(default=1e-3, ge=0, le=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    batch_size: int = Field(default=16, ge=1)


@dataclass(frozen=True)
class FeatureEffect:
    """What one feature controls most: the class whose share moved furthest, and how sure that is.

    Attributes:
        difference: change of the class's share among images decided both times; ``interval`` paired, 95 %.
        q_value: McNemar's p after Benjamini–Hochberg over every feature and class.
        specificity: this attribute's part of all that the feature moved (1: nothing else moved).
        flips: share of images whose class of this attribute changed.
    """

    feature: int
    attribute: str
    label: str
    difference: float
    interval: tuple[float, float]
    q_value: float
    specificity: float
    flips: float


@dataclass(frozen=True)
class Dissection:
    """Causal effects of single features.

    Attributes:
        features: ids measured. classes: attribute → its classes.
        effects, low, high, p_values: attribute → ``[feature, class]`` in the order of ``features``.
        flips: attribute → ``[feature]``.
        source: what was done, in one line.
    """

    features: tuple[int, ...]
    classes: dict[str, tuple[str, ...]]
    effects: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    p_values: dict[str, np.ndarray]
    flips: dict[str, np.ndarray]
    sae_id: str
    source: str
    alpha: float


PARTS = ("effects", "low", "high", "p_values")


def dissect(lens: JudgedLens, config: DissectConfig, folder: Path, *, on_step: OnStep | None = None) -> Dissection:
    """Measure every chosen feature; a file per feature in ``folder``, so that a stopped run goes on.

    ``on_step(features done, features in total)`` may raise. Raises ``LensError`` where nothing can be measured.
    """
    chosen = _chosen(config, lens.atlas)
    told = config.model_dump(mode="json", exclude={"features", "alpha", "min_density", "batch_size"})
    identity: list[object] = [told, lens_key(lens), lens.classifier.classifier_id]
    _claim(folder, identity)
    base: Baseline | None = None
    for number, feature in enumerate(chosen):
        path = _file(folder, feature)
        if not path.is_file():
            base = base or _baseline(lens, config)
            save_tensors(path, measure_feature(lens, config, base, feature))
        if on_step is not None:
            on_step(number + 1, len(chosen))
    return read_dissection(lens, config, folder, chosen)


def _baseline(lens: JudgedLens, config: DissectConfig) -> Baseline:
    manifest, seeds = lens.manifest, range(config.first_seed, config.first_seed + config.n)
    wanted = request(lens.model, config.prompt, seeds, manifest.n_steps, manifest.guidance_scale)
    return measure_baseline(lens.model, wanted, lens.classifier, batch_size=config.batch_size, n_examples=0)


def measure_feature(lens: JudgedLens, config: DissectConfig, base: Baseline, feature: int) -> dict[str, np.ndarray]:
    """Turn one feature alone → ``<part>.<attribute>`` arrays ``[class]`` and ``flips.<attribute>`` ``[1]``."""
    alone = FeatureSet((feature,), (0.0,), "", "", lens.sae.sae_id)
    edit = compile([Intervention(alone, config.mode, config.beta, sampler=config.sampler)], lens.sae)
    parts = generate_batches(lens.model, base.request, edit=edit, batch_size=config.batch_size)
    after = read_images(parts, lens.classifier, 0).predictions
    found: dict[str, np.ndarray] = {}
    for name, before in base.reading.predictions.items():
        moved = paired_effects(before, after[name])
        found |= {f"{part}.{name}": moved[i] for i, part in enumerate(PARTS)}
        both = before.certain & after[name].certain
        turned = (before.labels != after[name].labels)[both]
        found[f"flips.{name}"] = np.array([turned.mean() if len(turned) else np.nan])
    return found


def paired_effects(before: Predictions, after: Predictions) -> np.ndarray:
    """``[4, class]``: difference of shares, its interval's ends, and McNemar's p, among images decided both times.

    NaN, and p = 1, where no image is.
    """
    both = before.certain & after.certain
    n_classes = len(before.attribute.classes)
    if not both.any():
        return np.stack([np.full(n_classes, v) for v in (np.nan, np.nan, np.nan, 1.0)])
    columns = []
    for label in range(n_classes):
        old, new = before.labels[both] == label, after.labels[both] == label
        moved = stats.paired_difference(old, new)
        columns.append([moved.value, *moved.interval, stats.mcnemar(old, new).p_value])
    return np.array(columns).T


def read_dissection(lens: JudgedLens, config: DissectConfig, folder: Path, features: Sequence[int]) -> Dissection:
    """Collect what ``dissect`` measured, those of ``features`` that are there."""
    classes = {a.name: a.classes for a in lens.classifier.attributes}
    done = tuple(feature for feature in features if _file(folder, feature).is_file())
    if not done:
        raise LensError(f"No feature has been dissected in {folder} yet.")
    rows = [load_tensors(_file(folder, feature)) for feature in done]

    def table(part: str) -> dict[str, np.ndarray]:
        return {name: np.stack([row[f"{part}.{name}"] for row in rows]) for name in classes}

    prompt = "" if config.prompt is None else f' of "{config.prompt}"'
    return Dissection(
        features=done,
        classes=classes,
        effects=table("effects"),
        low=table("low"),
        high=table("high"),
        p_values=table("p_values"),
        flips={name: column[:, 0] for name, column in table("flips").items()},
        sae_id=lens.sae.sae_id,
        source=f"turned alone ({config.mode}, β = {config.beta:g}) on {config.n} images{prompt}",
        alpha=config.alpha,
    )


def groups(found: Dissection) -> dict[str, tuple[FeatureEffect, ...]]:
    """Attribute → the features that control it above all else, largest effect first; empty for those without any.

    A feature belongs where its largest sure effect lies; one without a sure effect belongs nowhere.
    """
    adjusted = q_values(found)
    grouped: dict[str, list[FeatureEffect]] = {name: [] for name in found.classes}
    for row, feature in enumerate(found.features):
        best = _best(found, adjusted, row, feature)
        if best is not None:
            grouped[best.attribute].append(best)
    return {name: tuple(sorted(own, key=lambda e: -abs(e.difference))) for name, own in grouped.items()}


def q_values(found: Dissection) -> dict[str, np.ndarray]:
    """``p_values`` after Benjamini–Hochberg over every feature, attribute and class together."""
    names = list(found.classes)
    flat = np.concatenate([found.p_values[name].ravel() for name in names])
    adjusted = multipletests(flat, method="fdr_bh")[1]
    ends = np.cumsum([found.p_values[name].size for name in names])[:-1]
    parts = np.split(adjusted, ends)
    return {name: part.reshape(found.p_values[name].shape) for name, part in zip(names, parts, strict=True)}


def _best(found: Dissection, adjusted: dict[str, np.ndarray], row: int, feature: int) -> FeatureEffect | None:
    sizes = {name: np.abs(np.nan_to_num(effect[row])) for name, effect in found.effects.items()}
    sure = {name: np.where(adjusted[name][row] <= found.alpha, size, 0.0) for name, size in sizes.items()}
    name = max(sure, key=lambda n: float(sure[n].max()))
    if sure[name].max() == 0:
        return None
    column = _told_class(sure[name], found.effects[name][row])
    everything = sum(float(size.max()) for size in sizes.values())
    return FeatureEffect(
        feature, name, found.classes[name][column], float(found.effects[name][row, column]),
        (float(found.low[name][row, column]), float(found.high[name][row, column])),
        float(adjusted[name][row, column]), float(sizes[name].max() / everything), float(found.flips[name][row]),
    )  # fmt: skip


def _told_class(sure: np.ndarray, effect: np.ndarray) -> int:
    """The class told: the one that grew, where it moved as far as any other."""
    grown = np.where((effect > 0) & np.isclose(sure, sure.max()), sure, 0.0)
    return int(grown.argmax()) if grown.max() > 0 else int(sure.argmax())


def name_of(effect: FeatureEffect) -> str:
    """Short text for a card: ``glasses: glasses +12 points``."""
    return f"{effect.attribute}: {effect.label} {effect.difference * 100:+.0f} points"


def to_atlas(found: Dissection, atlas: Atlas) -> Atlas:
    """The atlas with these effects, and with features named by what they control where that is sure.

    Raises ``LensError`` for an atlas of another SAE.
    """
    if found.sae_id != atlas.sae_id:
        raise LensError("This dissection belongs to another SAE; dissect this lens.")
    effects: dict[str, np.ndarray] = {}
    for name, measured in found.effects.items():
        effects[name] = np.full((len(atlas.density), measured.shape[1]), np.nan, np.float32)
        effects[name][list(found.features)] = measured
    labels = list(atlas.labels)
    for own in groups(found).values():
        for effect in own:
            labels[effect.feature] = name_of(effect)
    source = f"{atlas.label_source}; with points: by the effect of turning it alone, {found.source}"
    return replace(atlas, effects=effects, effect_source=found.source, labels=tuple(labels), label_source=source)


def store_in_lens(found: Dissection, lens_folder: Path) -> Path:
    """Write effects and names into a lens folder's atlas, and seal the lens anew; returns the atlas's path."""
    path, manifest = lens_folder / "atlas.safetensors", read_manifest(lens_folder)
    save_atlas(path, to_atlas(found, load_atlas(path)))
    write_manifest(lens_folder, manifest)
    return path


def _chosen(config: DissectConfig, atlas: Atlas) -> tuple[int, ...]:
    if config.features is None:
        chosen = tuple(int(i) for i in np.flatnonzero(atlas.density >= max(config.min_density, 1e-12)))
    else:
        chosen = tuple(dict.fromkeys(config.features))
    if not chosen or min(chosen) < 0 or max(chosen) >= len(atlas.density):
        raise LensError(f"Name features from 0 to {len(atlas.density) - 1}, at least one that fires.")
    return chosen


def _claim(folder: Path, identity: list[object]) -> None:
    path = folder / "dissection.json"
    if path.is_file() and read_json(path) != identity:
        raise LensError(f"{folder} holds another dissection; choose a new folder, or the same settings.")
    write_json(path, identity)


def _file(folder: Path, feature: int) -> Path:
    return folder / f"{feature:06d}.safetensors"
