"""One attribution over the features of several sites, each with a dictionary and probes of its own (our working form).

The sites read an attribute together by the mean of their probes' calibrated logits, ``z = (1/K) Σ_k z_k / T_k``. Each
``z_k`` is affine in its site's code, so along the straight path on which all codes grow at once z is linear in the
path's position, and the integral is the one-dimensional one of ``attribute``. **Exact**: the scores of all features of
all sites add up to the change of that joint reading (the completeness gap says how nearly). **Not exact**: codes are
taken as independent of each other. In the model a block's output is made of the one before, so a feature that is turned
at an early site also moves later ones; what it does to images is measured by steering alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lens.base.types import Attribution, FeatureSet, LensError
from diffusion_lens.features.attribute import Array, codes_of, decoded_logits, logit_reach, path_gradient
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder, image_chunks

METHOD = "integrated_gradients over sites"


@dataclass(frozen=True, eq=False)
class AtSite:
    """What an attribute is read with at one site: its dictionary and probe, and activations ``h [n, step, c, y, x]``
    of the same images at the same steps as at the other sites."""

    sae: SparseAutoencoder
    probe: Probe
    h: Array


def attribute_sites(sites: Mapping[str, AtSite]) -> dict[str, Attribution]:
    """Integrated gradients of every class probability of the joint reading over the codes of all sites, from zero.

    Returns each site's share, in the same units, so that features may be ranked across sites. Raises ``LensError``
    where sites read other attributes, images or steps.
    """
    _check(sites)
    first = next(iter(sites.values()))
    n, n_steps, n_classes = len(first.h), first.h.shape[1], len(first.probe.attribute.classes)
    totals = {
        name: torch.zeros(n_classes, n_steps, at.sae.cfg.d_sae, dtype=torch.float64) for name, at in sites.items()
    }
    gap = 0.0
    with torch.no_grad():
        for step in range(n_steps):
            reach = {
                name: logit_reach(at.sae, at.probe, step, (at.h.shape[3], at.h.shape[4])) for name, at in sites.items()
            }
            for rows in min(
                (list(image_chunks(at.sae, n)) for at in sites.values()), key=lambda chunks: chunks[0].stop
            ):
                gap = max(gap, _add(sites, reach, rows, step, totals))
    return {
        name: Attribution((totals[name] / n).float().numpy(), gap, at.probe.attribute, METHOD, "zero", at.sae.sae_id, n)
        for name, at in sites.items()
    }


def _check(sites: Mapping[str, AtSite]) -> None:
    if not sites:
        raise LensError("Give at least one site.")
    for name, at in sites.items():
        if at.h.ndim != 5 or at.h.shape[1] != at.probe.n_steps:
            raise LensError(f"'{name}' reads [n, step, c, y, x] at {at.probe.n_steps} steps, not {list(at.h.shape)}.")
    if len({(at.probe.attribute, tuple(at.h.shape[:2])) for at in sites.values()}) > 1:
        raise LensError("Sites that are attributed together need one attribute, and the same images and steps.")


def _add(
    sites: Mapping[str, AtSite], reach: Mapping[str, Tensor], rows: slice, step: int, totals: Mapping[str, Tensor]
) -> float:
    """One chunk's scores into ``totals``; returns its worst gap."""
    codes = {name: codes_of(at.sae, at.h, rows, step) for name, at in sites.items()}
    start, end = torch.zeros(()), torch.zeros(())
    for name, at in sites.items():
        (values, indices), share = codes[name], at.probe.temperature * len(sites)
        there = decoded_logits(at.sae, at.probe, step, reach[name], values, indices)
        empty = decoded_logits(at.sae, at.probe, step, reach[name], torch.zeros_like(values[:1]), indices[:1])
        start, end = start + empty.expand_as(there).cpu() / share, end + there.cpu() / share
    gradient, total = path_gradient(start, end - start), torch.zeros_like(end)
    for name, at in sites.items():
        values, indices = codes[name]
        through = reach[name] if at.sae.cfg.layout == "position" else reach[name].sum(1, keepdim=True)
        place = torch.arange(indices.shape[1], device=indices.device)[:, None]
        through = through.permute(1, 2, 0)[place, indices].double()
        share = at.probe.temperature * len(sites)
        scores = values.double()[..., None] * torch.einsum("npek,nck->npec", through, gradient.to(through) / share)
        for cls in range(scores.shape[-1]):
            totals[name][cls, step].index_add_(0, indices.flatten().cpu(), scores[..., cls].flatten().cpu())
        total = total + scores.sum((1, 2)).cpu()
    return float((total - (end.softmax(1) - start.softmax(1))).abs().max())


def top_features(
    attributions: Mapping[str, Attribution], k: int, target: str, window: tuple[int, int] | None = None
) -> dict[str, FeatureSet]:
    """The ``k`` features of all sites together whose summed score for ``target`` is largest, by site (positive scores
    only); sites without any are left out. Raises ``LensError`` unless 1 ≤ k ≤ features there are."""
    totals = {name: own.total(target, window=window) for name, own in attributions.items()}
    ranked = sorted(((float(s), name, i) for name, own in totals.items() for i, s in enumerate(own)), key=_descending)
    if not 1 <= k <= len(ranked):
        raise LensError(f"Choose between 1 and {len(ranked)} features; you asked for {k}.")
    chosen = [entry for entry in ranked[:k] if entry[0] > 0]
    found: dict[str, FeatureSet] = {}
    for name in dict.fromkeys(site for _, site, _ in chosen):
        own = [(i, score) for score, site, i in chosen if site == name]
        of = attributions[name]
        found[name] = FeatureSet(
            tuple(i for i, _ in own), tuple(s for _, s in own), of.attribute.name, target, of.sae_id
        )
    return found


def _descending(entry: tuple[float, str, int]) -> float:
    return -entry[0]


def feature_name(site: str, feature: int) -> str:
    """``site:id``, e.g. ``transformer_blocks.2:update:17``."""
    return f"{site}:{feature}"


def parse_feature(name: str, sites: Sequence[str]) -> tuple[str, int]:
    """The site and number of a feature's name; raises ``LensError`` for a site that there is not."""
    site, _, number = name.rpartition(":")
    if site not in sites or not number.isdecimal():
        raise LensError(f"'{name}' is no feature: write SITE:NUMBER with one of the sites {', '.join(sites)}.")
    return site, int(number)
