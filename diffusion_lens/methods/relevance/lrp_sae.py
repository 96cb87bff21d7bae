"""Relevance from a difference of the probe's logits back to SAE features, and on to the bottleneck itself."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_lens.base.types import Attribution
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder, image_chunks
from diffusion_lens.methods.relevance.lrp import Rule, linear, through


def pole_weights(n_classes: int, target: int) -> Tensor:
    """``[class]``: +1 for ``target``, minus the mean over the others: the logit difference of two poles."""
    weights = torch.full((n_classes,), -1 / (n_classes - 1))
    weights[target] = 1.0
    return weights


def logit_relevance(probe: Probe, step: int, maps: Tensor, poles: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Through the probe: ``(relevance of maps [n, c, y, x], the logit differences [n])``; ``poles [class]``."""
    x = maps.flatten(1)
    weight = (poles.to(x) @ probe.weight[step].to(x))[None]
    start = x @ weight[0] + poles.to(x) @ probe.bias[step].to(x)
    return linear(x, weight, start[:, None], rule).reshape(maps.shape), start


def decoder_relevance(sae: SparseAutoencoder, acts: Tensor, relevance: Tensor, rule: Rule) -> Tensor:
    """Through the decoder: features ``[samples, d_sae]`` from ``acts`` and the relevance of ``[samples, d_in]``."""
    return through(torch.matmul, acts, sae.W_dec.detach(), relevance, rule)


def encoder_relevance(sae: SparseAutoencoder, samples: Tensor, relevance: Tensor, rule: Rule) -> Tensor:
    """Through the encoder: samples ``[samples, d_in]`` from the features' relevance; ReLU and TopK pass it on."""
    x = samples - sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else samples
    return through(torch.matmul, x, sae.W_enc.detach(), relevance, rule)


def feature_relevance(
    sae: SparseAutoencoder, probe: Probe, h: Tensor, step: int, poles: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Probe and decoder: ``(relevance [samples, d_sae], logit differences [n])`` of maps ``h [n, c, y, x]``."""
    samples = sae.to_samples(h)
    acts = sae.encode(samples)
    decoded = sae.from_samples(sae.decode(acts), (h.shape[2], h.shape[3]))
    at_output, start = logit_relevance(probe, step, decoded, poles, rule)
    return decoder_relevance(sae, acts, sae.to_samples(at_output), rule), start


@torch.no_grad()
def lrp_attribution(sae: SparseAutoencoder, probe: Probe, h: Tensor, rule: Rule) -> Attribution:
    """Relevance of every feature for every class in ``h [n, step, c, y, x]``, mean over images, summed over positions.

    The gap is the largest ``|Σ R − logit difference|``: 0 but for rounding, and for the ε-rule's own ε.
    """
    n, n_steps = h.shape[:2]
    n_classes = len(probe.attribute.classes)
    scores = torch.zeros(n_classes, n_steps, sae.cfg.d_sae, dtype=torch.float64)
    gap = 0.0
    for step in range(n_steps):
        for rows in image_chunks(sae, n):
            part = h[rows, step].to(sae.W_dec)
            for label in range(n_classes):
                found, start = feature_relevance(sae, probe, part, step, pole_weights(n_classes, label), rule)
                per_image = found.reshape(len(part), -1, sae.cfg.d_sae).double().sum(1)
                scores[label, step] += per_image.sum(0).cpu() / n
                gap = max(gap, float((per_image.sum(1) - start).abs().max()))
    name = "lrp_zplus" if rule == "zplus" else "lrp_epsilon"
    return Attribution(scores.float().numpy(), gap, probe.attribute, name, "zero", sae.sae_id, n)
