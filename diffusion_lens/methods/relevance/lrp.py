"""Layer-wise relevance propagation: the z⁺ and ε rules for linear maps, and how relevance splits at a sum.

Sources: Bach et al. 2015 (ε-rule), Montavon et al. 2017 (deep Taylor decomposition, z⁺-rule). Both leave biases out
of the denominator, so that relevance in equals relevance out (ε takes its small part of the second).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["zplus", "epsilon"]
Bilinear = Callable[[Tensor, Tensor], Tensor]
EPSILON = 1e-6
TINY = 1e-12


def through(op: Bilinear, x: Tensor, weight: Tensor, relevance: Tensor, rule: Rule) -> Tensor:
    """Relevance of the inputs ``x`` of ``z = op(x, weight)`` from that of its outputs; shaped like ``x``.

    z⁺: ``R_j = Σ_k (x_j w_jk)⁺ / Σ_j' (x_j' w_j'k)⁺ R_k``; negative inputs count with negative weights. Outputs with
    no positive contribution share theirs by the inputs' sizes (our working form), so that none is lost and silent
    inputs get none.
    ε: ``R_j = Σ_k x_j w_jk / (z_k + ε sign z_k) R_k``.
    """
    if rule == "epsilon":
        z = op(x, weight)
        return x * _back(op, x, weight, relevance / (z + EPSILON * torch.where(z >= 0, 1.0, -1.0)))
    signs = ((x.clamp_min(0), weight.clamp_min(0)), (x.clamp_max(0), weight.clamp_max(0)))
    z = sum((op(part, w) for part, w in signs), start=torch.zeros_like(relevance))
    counted = z > TINY
    share = torch.where(counted, relevance / torch.where(counted, z, 1.0), 0.0)
    found = sum((part * _back(op, part, w, share) for part, w in signs), start=torch.zeros_like(x))
    lost = torch.where(counted, 0.0, relevance)
    if bool(lost.any()):
        size, even = x.abs() + TINY, torch.ones_like(weight)
        found = found + size * _back(op, size, even, lost / op(size, even))
    return found


def _back(op: Bilinear, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """The transpose of ``op(·, weight)`` applied to ``relevance``."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        (back,) = torch.autograd.grad(op(at, weight.detach().clone()), at, relevance.detach().clone())
    return back


def linear(x: Tensor, weight: Tensor, relevance: Tensor, rule: Rule) -> Tensor:
    """Through ``x [..., i] @ weight [o, i]ᵀ``."""
    return through(lambda a, w: a @ w.T, x, weight, relevance, rule)


def split(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the two terms of ``a + b``: in proportion to their sizes, evenly where both are 0 (our working form).

    Sizes rather than values: ``a / (a + b)`` explodes where the terms cancel.
    """
    size = a.abs() + b.abs()
    share = torch.where(size > TINY, a.abs() / size.clamp_min(TINY), 0.5)
    return share * relevance, (1 - share) * relevance
