"""Which features are worth dissecting: those that fire most, or that differ most between an attribute's classes."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_lens.base.types import Attribution, LensError, Predictions
from diffusion_lens.features.sae import SparseAutoencoder, image_chunks
from diffusion_lens.model.denoise import Capture
from diffusion_lens.model.generate import generate, request
from diffusion_lens.studies.bench.run import JudgedLens
from diffusion_lens.studies.dissect.config import DENSITY, DissectConfig

STEPS = 16
"""Most steps looked at, evenly spaced."""


def choose_features(lens: JudgedLens, config: DissectConfig) -> tuple[int, ...]:
    """The features to measure; raises ``LensError`` for ids outside the dictionary, or where none is left."""
    atlas = lens.atlas
    if config.features is not None:
        chosen = tuple(dict.fromkeys(config.features))
    else:
        live = np.flatnonzero(atlas.density >= max(config.min_density, 1e-12))
        chosen = tuple(int(i) for i in live)
        if config.top is not None:
            scores = candidates(lens, config).values()
            orders = [live[np.argsort(-score[live], kind="stable")] for score in scores]
            in_turn = dict.fromkeys(int(i) for row in zip(*orders, strict=True) for i in row)
            chosen = tuple(in_turn)[: config.top]
    if not chosen or min(chosen) < 0 or max(chosen) >= len(atlas.density):
        raise LensError(f"Name features from 0 to {len(atlas.density) - 1}, at least one that fires.")
    return chosen


def candidates(lens: JudgedLens, config: DissectConfig) -> dict[str, np.ndarray]:
    """How promising each feature is, ``[d_sae]``, for every name of ``config.by``: ``density`` or an attribute.

    A steered attribute: its largest attribution to any class, over the largest of that class. Another one that the
    classifier reads: its largest share in the difference between the images of a class and the others
    (``difference_shares``), on images drawn for the choice. Only for choosing; nothing is concluded from it.
    """
    read = {a.name for a in lens.classifier.attributes}
    for name in config.by:
        if name != DENSITY and name not in lens.attributions and name not in read:
            raise LensError(f"Choose features by {DENSITY} or by {', '.join(sorted(read))}; '{name}' is none of these.")
    drawn = [name for name in config.by if name != DENSITY and name not in lens.attributions]
    by_images = _by_images(lens, config, drawn) if drawn else {}
    found: dict[str, np.ndarray] = {}
    for name in config.by:
        if name == DENSITY:
            found[name] = np.asarray(lens.atlas.density, dtype=np.float64)
        elif name in by_images:
            found[name] = by_images[name]
        else:
            found[name] = _attributed(lens.attributions[name])
    return found


def difference_shares(sae: SparseAutoencoder, h: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """What part of a difference in h each feature carries, ``[contrast, d_sae]`` (our working form).

    ``h [n, step, c, y, x]``; ``contrast [contrast, n]`` weighs the images, as 1/n of a class's and -1/n of the
    others'. With Δ for the weighted sum, the difference at one step and position is ``Δh = Σ_i Δs_i W_dec[i] + Δ(SAE
    error)``; feature i carries ``Δs_i W_dec[i] · Δh``, summed over steps and positions, over the sum of ``|Δh|²``.
    The shares of a difference add up to 1 but for the SAE's error.
    """
    weights = torch.as_tensor(contrast, dtype=sae.W_dec.dtype, device=sae.W_dec.device)
    shares = weights.new_zeros(len(weights), sae.cfg.d_sae)
    total = weights.new_zeros(len(weights))
    with torch.no_grad():
        for step in range(h.shape[1]):
            acts, change = weights.new_zeros(1), weights.new_zeros(1)
            for rows in image_chunks(sae, len(h)):
                x = sae.to_samples(torch.as_tensor(h[rows, step]).to(sae.W_dec))
                own = weights[:, rows]
                acts = acts + own @ sae.encode(x).reshape(own.shape[1], -1)
                change = change + own @ x.reshape(own.shape[1], -1)
            change = change.view(len(weights), -1, sae.cfg.d_in)
            shares += (acts.view(len(weights), -1, sae.cfg.d_sae) * (change @ sae.W_dec.T)).sum(dim=1)
            total += change.square().sum(dim=(1, 2))
    return (shares / total[:, None].clamp(min=1e-12)).cpu().numpy().astype(np.float64)


def contrasts(read: Predictions) -> np.ndarray:
    """Every class against the others, ``[class, n]``, among images read for sure; a class that all or none has is 0."""
    one_hot = np.eye(len(read.attribute.classes))[read.labels].T * read.certain
    rest = (1 - one_hot) * read.certain
    counts, others = one_hot.sum(axis=1, keepdims=True), rest.sum(axis=1, keepdims=True)
    both = (counts > 0) & (others > 0)
    return np.asarray(np.where(both, one_hot / np.maximum(counts, 1) - rest / np.maximum(others, 1), 0.0))


def _by_images(lens: JudgedLens, config: DissectConfig, names: list[str]) -> dict[str, np.ndarray]:
    manifest = lens.manifest
    begin = config.first_seed + config.n
    seeds = range(begin, begin + config.choice_images)
    wanted = request(lens.model, config.prompt, seeds, manifest.n_steps, manifest.guidance_scale)
    steps = np.unique(np.linspace(0, manifest.n_steps - 1, min(STEPS, manifest.n_steps)).round().astype(int))
    capture = Capture(steps=tuple(int(step) for step in steps))
    run = generate(lens.model, wanted, capture=capture, batch_size=config.batch_size)
    assert run.activations is not None
    read = lens.classifier.predict(run.images)
    return {name: difference_shares(lens.sae, run.activations.h, contrasts(read[name])).max(axis=0) for name in names}


def _attributed(attribution: Attribution) -> np.ndarray:
    totals = np.stack([attribution.total(label) for label in attribution.attribute.classes])
    return np.asarray((totals / np.maximum(np.abs(totals).max(axis=1, keepdims=True), 1e-12)).max(axis=0))
