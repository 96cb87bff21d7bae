"""Integrated gradients by automatic differentiation: slow and obvious, to check and to time the closed form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder


def autograd_scores(
    sae: SparseAutoencoder,
    probe: Probe,
    h: np.ndarray | Tensor,
    *,
    steps: Sequence[int],
    nodes: int = 64,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    """Integrated gradients from the zero code, mean over images, summed over positions: ``[class, step, d_sae]``.

    One backward pass through probe and decoder per class, step and Gauss–Legendre node; dense codes.

    Args:
        h: activations ``[n, step, c, y, x]`` of every step.
        steps: the step indices to attribute. dtype: of codes, decoder and probe along the path.
    """
    wide = SparseAutoencoder(sae.cfg).to(sae.W_dec.device)
    wide.load_state_dict(sae.state_dict())
    wide.to(dtype).requires_grad_(False)
    spots, weights = np.polynomial.legendre.leggauss(nodes)
    scores = torch.zeros(len(probe.attribute.classes), len(steps), sae.cfg.d_sae, dtype=torch.float64)
    for row, step in enumerate(steps):
        # The code is found in the SAE's own precision: rounding may not change which features fire.
        maps = torch.as_tensor(h[:, step]).to(sae.W_enc)
        code = sae.encode(sae.to_samples(maps)).to(dtype)
        for place in range(len(probe.attribute.classes)):
            total = torch.zeros_like(code)
            for spot, weight in zip((spots + 1) / 2, weights / 2, strict=True):
                point = (float(spot) * code).requires_grad_()
                logits = probe.logits(wide.from_samples(wide.decode(point)), step)
                chance = (logits / probe.temperature).softmax(1)[:, place].sum()
                total += torch.autograd.grad(chance, point)[0] * float(weight)
            scores[place, row] = (code * total).double().sum(0).cpu() / len(h)
    return scores.numpy()
