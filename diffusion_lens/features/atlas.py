"""The atlas: what each SAE feature responds to, and where its direction lies among the others.

Cards are read without torch: a lens shows its first view before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import Atlas, Attribute, Attribution, Examples, FeatureCard, LensError, Predictions

if TYPE_CHECKING:
    from diffusion_lens.features.sae import SparseAutoencoder

Batches = Callable[[], Iterator[np.ndarray]]
"""Called once per pass: yields ``h [n, step, c, y, x]`` of the pool's images in order."""

MIN_PER_CLASS = 10
LABEL_AUC = 0.75


class AtlasConfig(StrictConfig):
    """How an atlas is built: examples per feature, the map's layout and seed."""

    n_top: int = 8
    n_random: int = 4
    layout: Literal["umap", "pca"] = "umap"
    seed: int = 0


def place(directions: np.ndarray, *, layout: Literal["umap", "pca"], seed: int) -> np.ndarray:
    """Places of decoder directions ``[d_sae, d_in]`` on a plane, float32 ``[d_sae, 2]``, each axis within [-1, 1].

    ``umap``: cosine distance, 15 neighbours, one thread and fixed seed, so equal on equal hardware.
    ``pca``: the first two principal components of the unit directions; for small dictionaries.
    """
    unit = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    centred = unit - unit.mean(axis=0)
    if layout == "umap":
        from umap import UMAP

        neighbours = min(15, len(unit) - 1)
        mapper = UMAP(n_neighbors=neighbours, min_dist=0.1, metric="cosine", init="pca", random_state=seed, n_jobs=1)
        xy = mapper.fit_transform(unit)
    else:
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        axes = axes[:2] * np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])[:, None]
        xy = centred @ axes.T
    xy = xy - (xy.max(axis=0) + xy.min(axis=0)) / 2
    return (xy / np.maximum(np.abs(xy).max(), 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Responses:
    """One pass over the pool: ``score, near [image, d_sae]``, ``density [d_sae]``, ``step_profile [d_sae, step]``.

    ``score`` is the highest mean-over-steps activation at any position; ``near`` the highest pre-activation of
    images on which the feature never fires (``-inf`` where it does).
    """

    score: np.ndarray
    near: np.ndarray
    density: np.ndarray
    step_profile: np.ndarray


def respond(sae: SparseAutoencoder, batches: Batches) -> Responses:
    """Encode the pool once and keep what ranking needs (memory: two floats per image and feature)."""
    scores, nears = [], []
    fired = total = n_images = 0
    profile: np.ndarray | float = 0.0
    for h in batches():
        for image in h:
            acts, pre = _encode(sae, image)
            active = acts > 0
            fired = fired + active.sum(axis=(0, 1))
            total += active.shape[0] * active.shape[1]
            profile = profile + acts.mean(axis=1)
            scores.append(acts.mean(axis=0).max(axis=0))
            nears.append(np.where(active.any(axis=(0, 1)), -np.inf, pre.max(axis=(0, 1))))
            n_images += 1
    if not n_images:
        raise LensError("The atlas needs at least one image in its pool.")
    density = np.asarray(fired / total, np.float32)
    step_profile = np.ascontiguousarray(np.asarray(profile, np.float32).T / n_images)
    return Responses(np.stack(scores), np.stack(nears), density, step_profile)


def _encode(sae: SparseAutoencoder, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Feature activations and pre-activations ``[step, position, d_sae]`` of one image ``[step, c, y, x]``."""
    import torch

    with torch.no_grad():
        samples = sae.to_samples(torch.as_tensor(image).to(sae.W_enc))
        shape = (len(image), -1, sae.cfg.d_sae)
        return sae.encode(samples).view(shape).cpu().numpy(), sae.hidden_pre(samples).view(shape).cpu().numpy()


def choose_images(responses: Responses, config: AtlasConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Top, random and near-miss images per feature, int32 ``[d_sae, m]``; -1 where there are too few."""
    d_sae = responses.score.shape[1]
    rng = np.random.default_rng(config.seed)
    top = _best(responses.score, config.n_top)
    near = _best(np.where(np.isfinite(responses.near), responses.near, -np.inf), config.n_random, floor=-np.inf)
    drawn = np.full((d_sae, config.n_random), -1, np.int32)
    for feature in range(d_sae):
        rows = np.flatnonzero(responses.score[:, feature] > 0)
        chosen = rng.permutation(rows)[: config.n_random]
        drawn[feature, : len(chosen)] = chosen
    return top, drawn, near


def _best(score: np.ndarray, m: int, floor: float = 0.0) -> np.ndarray:
    """Rows of the ``m`` highest values above ``floor`` in each column, ``[column, m]``, padded with -1."""
    order = np.argsort(-score, axis=0, kind="stable")[:m].T
    values = np.take_along_axis(score.T, order, axis=1)
    found = np.full((score.shape[1], m), -1, np.int32)
    found[:, : order.shape[1]] = np.where(values > floor, order, -1)
    return found


def heatmaps(sae: SparseAutoencoder, batches: Batches, images: np.ndarray) -> np.ndarray:
    """Mean activation over steps by position of chosen images ``[d_sae, m]`` → float16 ``[d_sae, m, y, x]``."""
    maps: np.ndarray | None = None
    row = 0
    for h in batches():
        for image in h:
            y, x = image.shape[-2:] if sae.cfg.layout == "position" else (1, 1)
            if maps is None:
                maps = np.zeros((*images.shape, y, x), np.float16)
            features, places = np.nonzero(images == row)
            if len(features):
                mean = _encode(sae, image)[0].mean(axis=0)
                maps[features, places] = mean.T[features].reshape(-1, y, x)
            row += 1
    assert maps is not None
    return maps


def name_features(score: np.ndarray, readings: Mapping[str, Predictions]) -> tuple[tuple[str, ...], str]:
    """Label features by the class they tell apart best: ``("gender: male", …)`` and how it was done.

    ``score [image, d_sae]``; ``readings`` are of the same images. A feature is labelled if its area under the
    ROC curve for some class against the rest reaches 0.75, among certain images, ten of each at least.
    """
    from scipy.stats import rankdata

    best = np.full(score.shape[1], LABEL_AUC)
    labels = np.full(score.shape[1], "", dtype=object)
    for predictions in readings.values():
        sure = predictions.certain
        ranks = rankdata(score[sure], axis=0) if sure.any() else score[sure]
        for number, name in enumerate(predictions.attribute.classes):
            inside = predictions.labels[sure] == number
            n_in, n_out = int(inside.sum()), int((~inside).sum())
            if min(n_in, n_out) < MIN_PER_CLASS:
                continue
            auc = (ranks[inside].sum(axis=0) - n_in * (n_in + 1) / 2) / (n_in * n_out)
            labels[auc > best] = f"{predictions.attribute.name}: {name}"
            best = np.maximum(best, auc)
    source = f"class with the highest AUC (at least {LABEL_AUC}) by the image classifier on {len(score)} images"
    return tuple(str(label) for label in labels), source


def build_atlas(
    sae: SparseAutoencoder,
    batches: Batches,
    steps: Sequence[int],
    readings: Mapping[str, Predictions],
    config: AtlasConfig,
) -> Atlas:
    """Read every feature on one pool of images (two passes) and place its decoder direction on a map."""
    responses = respond(sae, batches)
    top, drawn, near = choose_images(responses, config)
    maps = heatmaps(sae, batches, np.concatenate([top, drawn], axis=1))
    labels, source = name_features(responses.score, readings)
    return Atlas(
        xy=place(sae.W_dec.detach().float().cpu().numpy(), layout=config.layout, seed=config.seed),
        density=responses.density,
        step_profile=responses.step_profile,
        steps=tuple(int(step) for step in steps),
        top_images=top,
        heatmaps=maps[:, : config.n_top],
        random_images=drawn,
        random_heatmaps=maps[:, config.n_top :],
        near_images=near,
        labels=labels,
        label_source=source,
        layout=config.layout,
        sae_id=sae.sae_id,
    )


def feature_card(
    atlas: Atlas,
    attributions: Mapping[str, Attribution],
    pool: np.ndarray,
    feature_id: int,
    *,
    nuisances: Sequence[Attribute] = (),
) -> FeatureCard:
    """Everything known of one feature; ``pool uint8 [n, H, W, 3]`` are the images of the atlas.

    ``nuisances``: what the classifier reads besides the steered attributes, for the effects measured on it.

    Raises ``LensError`` for an id outside the dictionary.
    """
    if not 0 <= feature_id < len(atlas.density):
        raise LensError(f"Features are numbered 0 to {len(atlas.density) - 1}; there is no feature {feature_id}.")
    scores: dict[str, dict[str, float]] = {}
    rank: dict[str, dict[str, int]] = {}
    for name, attribution in attributions.items():
        totals = {label: attribution.total(label) for label in attribution.attribute.classes}
        scores[name] = {label: float(total[feature_id]) for label, total in totals.items()}
        rank[name] = {label: int((total > total[feature_id]).sum()) + 1 for label, total in totals.items()}
    near = atlas.near_images[feature_id]
    blank = np.zeros((len(near), *atlas.heatmaps.shape[2:]), np.float16)
    return FeatureCard(
        id=feature_id,
        density=float(atlas.density[feature_id]),
        dead=bool(atlas.dead[feature_id]),
        step_profile=atlas.step_profile[feature_id],
        steps=atlas.steps,
        attribution=scores,
        rank=rank,
        effects=_effects(atlas, [*(a.attribute for a in attributions.values()), *nuisances], feature_id),
        top=_examples(pool, atlas.top_images[feature_id], atlas.heatmaps[feature_id]),
        random=_examples(pool, atlas.random_images[feature_id], atlas.random_heatmaps[feature_id]),
        near=_examples(pool, near, blank),
        label=atlas.labels[feature_id],
        label_source=atlas.label_source,
        effect_source=atlas.effect_source,
        sae_id=atlas.sae_id,
    )


def _effects(atlas: Atlas, attributes: Sequence[Attribute], feature_id: int) -> dict[str, dict[str, float]]:
    measured = {a.name: (a.classes, atlas.effects[a.name][feature_id]) for a in attributes if a.name in atlas.effects}
    return {
        name: dict(zip(classes, map(float, effect), strict=True))
        for name, (classes, effect) in measured.items()
        if np.isfinite(effect).all()
    }


def _examples(pool: np.ndarray, rows: np.ndarray, maps: np.ndarray) -> Examples:
    found = rows >= 0
    return Examples(pool[rows[found]], maps[found].astype(np.float32), tuple(int(row) for row in rows[found]))
