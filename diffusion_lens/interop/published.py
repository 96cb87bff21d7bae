"""DiffLens' edit and attribution exactly as their code computes them, to reproduce its numbers.

The lens's own forms differ on purpose, and are the default everywhere else:

- *Edit.* Published: ``h + decoder(s' - s)`` with the decoder's bias in it, so that even β = 1 moves h by that bias.
  Ours (``SparseAutoencoder.edit_delta``): without the bias, so that the identity is bit-identical to no edit.
- *Attribution.* Published: integrated gradients by a left Riemann sum over 10 points, α = 0, .1, …, .9, which leaves
  a completeness gap. Ours (``attribute.integrated_gradients``): enough Gauss–Legendre nodes for a gap below 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffusion_lens.base.types import EditSpec, FeatureSet, LensError, Sampler
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder

if TYPE_CHECKING:
    from diffusion_lens.model.denoise import StepContext

RIEMANN_NODES = 10
Turn = tuple[Sequence[int], float]


def edit_published(sae: SparseAutoencoder, h: Tensor, turns: Sequence[Turn], mode: Literal["scale", "add"]) -> Tensor:
    """``h + decoder(s' - s)``, the decoder's bias included; maps ``h [n, c, y, x]`` → the same shape.

    Args:
        turns: ``(feature ids, β)`` one after the other; a feature that stands in several is turned by each.
        mode: ``scale`` (their ``multiply_all``): ``s_i <- β s_i``; ``add`` (their ``add_all``): ``s_i <- s_i + β``,
            at every position.
    """
    ids = sorted({i for group, _ in turns for i in group})
    column = {feature: place for place, feature in enumerate(ids)}
    scale, shift = torch.ones(1, len(ids)), torch.zeros(1, len(ids))
    for group, beta in turns:
        places = [column[i] for i in group]
        if mode == "scale":
            scale[:, places] *= beta
        else:
            shift[:, places] += beta
    bias = sae.b_dec.detach()
    moved_by_bias = sae.from_samples(bias[None]) if sae.cfg.layout == "map" else bias[None, :, None, None]
    return h + sae.edit_delta(h, ids, scale.to(h.device), shift.to(h.device)) + moved_by_bias.to(h)


@dataclass(frozen=True, eq=False)
class PublishedEdit:
    """DiffLens' edit as published, for ``generate``: several feature sets, each with its own β, at every step.

    Raises ``LensError`` for features of another SAE.
    """

    sae: SparseAutoencoder
    turns: tuple[tuple[FeatureSet, float], ...]
    mode: Literal["scale", "add"]
    sampler: Sampler = "asymmetric"
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("scale", "add"):
            raise LensError(f"The published edit knows the modes scale and add; this one asks for '{self.mode}'.")
        for features, _ in self.turns:
            if features.sae_id != self.sae.sae_id:
                raise LensError(f"The features of {features.target} belong to another SAE ({features.sae_id}).")

    @property
    def spec(self) -> EditSpec:
        """Names the edit; what makes it again is this class."""
        decisive = [self.mode, self.sampler, self.window, self.sae.sae_id, [(f.ids, beta) for f, beta in self.turns]]
        goals = ", ".join(f"{f.attribute}={f.target} by beta {beta:g}" for f, beta in self.turns)
        return EditSpec.of_custom(f"DiffLens as published: {self.mode} {goals}", *decisive)

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited bottleneck, ``[n, c, y, x]``."""
        return edit_published(self.sae, h, [(features.ids, beta) for features, beta in self.turns], self.mode)


@torch.no_grad()
def attribution_published(
    sae: SparseAutoencoder, probe: Probe, h: Tensor, step: int, *, targets: Tensor | None = None
) -> Tensor:
    """Integrated gradients over the codes by a left Riemann sum of 10 points from zero.

    ``S_i = s_i / 10 · Σ_{j=0}^{9} ∂F_t/∂s_i (j/10 · s)``, F = softmax(probe(decoder(s)) / temperature). Along the
    path the logits are linear in j, so one forward pass gives them all, and the gradient is in closed form; the sum
    is the published one to rounding.

    Args:
        h: maps ``[n, c, y, x]`` at denoising step ``step``.
        targets: class index per image ``[n]``; the default is the probe's own argmax on h, as published.

    Returns:
        Scores per image, feature and code position, ``[n, d_sae, y, x]`` (y = x = 1 in the map layout).
    """
    chosen = probe.logits(h, step).argmax(dim=1) if targets is None else targets
    samples = sae.encode(sae.to_samples(h))
    spatial = (h.shape[2], h.shape[3])
    start = sae.from_samples(sae.decode(torch.zeros_like(samples)), spatial)
    at_start, at_end = probe.logits(start, step), probe.logits(sae.from_samples(sae.decode(samples), spatial), step)
    alpha = torch.arange(RIEMANN_NODES).to(at_end)[:, None, None] / RIEMANN_NODES
    probs = ((at_start + alpha * (at_end - at_start)) / probe.temperature).softmax(dim=-1)
    rows = torch.arange(len(h), device=h.device)
    of_target = probs[:, rows, chosen].unsqueeze(-1)
    is_target = torch.nn.functional.one_hot(chosen, probs.shape[-1])
    slope = (of_target * (is_target - probs)).mean(dim=0) / probe.temperature
    to_h = (slope @ probe.weight[step].to(h)).reshape(h.shape)
    scores = samples * (sae.to_samples(to_h) @ sae.W_dec.T)
    grid = spatial if sae.cfg.layout == "position" else (1, 1)
    return scores.reshape(len(h), *grid, -1).permute(0, 3, 1, 2)
