"""Which SAE features carry an attribute: integrated gradients of the probe over the codes, and simpler scores.

The probe is linear on the decoder's affine output, so along the straight path from one code to another its
logits are linear in the path's position. The gradient's path integral is then one-dimensional in the logits,
and no backward pass is needed. Codes stay k-sparse throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.types import Attribute, Attribution, LensError
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder, image_chunks

Array = np.ndarray | Tensor
GAP_TOLERANCE = 1e-7
MAX_PANELS = 4096
PATH_NUMBERS = 2**22
GUARD = 1e-4


def integrated_gradients(
    sae: SparseAutoencoder,
    probe: Probe,
    h: Array,
    *,
    baseline: Array | None = None,
) -> Attribution:
    """Integrated gradients of every class probability over the codes of ``h [n, step, c, y, x]`` (paper eq).

    ``S_i = (s_i − s'_i) ∫₀¹ ∂F(s' + α(s − s'))/∂s_i dα`` with F the probe's class probability given the decoded
    code; mean over images, summed over positions. Two classes: closed form; more: Gauss–Legendre panels,
    refined until complete.

    Args:
        baseline: activations, as ``h``, whose codes start the path; ``None`` starts from the zero code.

    Raises:
        LensError: activations and probe, or activations and baseline, do not match.
    """
    return _attribute(sae, probe, h, baseline, path_gradient, "integrated_gradients")


def gradient_x_activation(
    sae: SparseAutoencoder, probe: Probe, h: Array, *, baseline: Array | None = None
) -> Attribution:
    """``S_i = (s_i − s'_i) ∂F/∂s_i`` at the code itself: the path's last point alone. Arguments as above."""
    return _attribute(sae, probe, h, baseline, _endpoint_gradient, "gradient_x_activation")


def activation_difference(
    sae: SparseAutoencoder, h: Array, labels: np.ndarray | Tensor, attribute: Attribute
) -> Attribution:
    """Mean activation in a class minus the mean over other labelled images, summed over positions (our working form).

    ``labels [n]`` are class indices; negative ones ("uncertain") are left out. Completeness has no meaning here: NaN.
    """
    y = torch.as_tensor(labels).long().to(sae.W_dec.device)
    n_classes = len(attribute.classes)
    counts = torch.bincount(y[y >= 0], minlength=n_classes).double()
    if len(y) != len(h) or len(counts) > n_classes or int((counts > 0).sum()) < 2:
        raise LensError(f"Give one label per image, from at least two classes of {attribute.name}.")
    sums = torch.zeros(n_classes, h.shape[1], sae.cfg.d_sae, dtype=torch.float64, device=y.device)
    with torch.no_grad():
        for step in range(h.shape[1]):
            for rows in image_chunks(sae, len(h)):
                values, indices = codes_of(sae, h, rows, step)
                for cls in range(n_classes):
                    mine = y[rows] == cls
                    sums[cls, step].index_add_(0, indices[mine].flatten(), values[mine].double().flatten())
    counts = counts[:, None, None]
    inside = sums / counts.clamp_min(1)
    outside = (sums.sum(0) - sums) / (counts.sum() - counts).clamp_min(1)
    scores = (inside - outside).masked_fill(counts == 0, 0.0)
    name = "activation_difference"
    n_images = int(counts.sum())
    return Attribution(
        scores.float().cpu().numpy(), float("nan"), attribute, name, "other classes", sae.sae_id, n_images
    )


PathGradient = Callable[[Tensor, Tensor], Tensor]
"""``(logits at the path's start, their change) [n, class]`` → mean gradient ``∂F_c/∂z_k [n, c, k]`` on the path."""


def path_gradient(start: Tensor, change: Tensor) -> Tensor:
    """``∫₀¹ ∂softmax_c/∂z_k (start + α change) dα``, ``[n, c, k]`` for logits ``[n, class]`` in float64."""
    if start.shape[1] == 2:
        return _two_class_gradient(start, change)
    gradient = _panel_gradient(start, change, 1)
    todo = torch.arange(len(start))
    panels = 2
    while len(todo) and panels <= MAX_PANELS:
        finer = _panel_gradient(start[todo], change[todo], panels)
        moved = ((finer - gradient[todo]) * change[todo, None]).abs().amax((1, 2))
        gap = (finer @ change[todo, :, None])[..., 0] - _difference(start[todo], change[todo])
        gradient[todo] = finer
        todo = todo[(moved > GAP_TOLERANCE) | (gap.abs().amax(1) > GAP_TOLERANCE)]
        panels *= 2
    return gradient


def _two_class_gradient(start: Tensor, change: Tensor) -> Tensor:
    """Closed form: ``∫ p₀ p₁ dα = (p₁(1) − p₁(0)) / Δ``, Δ the change of the logit difference; at Δ → 0 its limit."""
    first = start[:, 1] - start[:, 0]
    delta = change[:, 1] - change[:, 0]
    small = delta.abs() < GUARD
    middle = (first + delta / 2).sigmoid()
    ratio = ((first + delta).sigmoid() - first.sigmoid()) / torch.where(small, 1.0, delta)
    slope = torch.where(small, middle * (1 - middle), ratio)
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=start.dtype)
    return slope[:, None, None] * sign


def _panel_gradient(start: Tensor, change: Tensor, panels: int) -> Tensor:
    """The integral by Gauss–Legendre with 8 nodes in each of ``panels`` equal panels: ``∫ p_c δ_ck − p_c p_k dα``."""
    node, weight = np.polynomial.legendre.leggauss(8)
    alpha = torch.from_numpy(((np.arange(panels)[:, None] + (node + 1) / 2) / panels).ravel())[:, None]
    w = torch.from_numpy(np.tile(weight / (2 * panels), panels))
    parts = []
    for rows in torch.arange(len(start)).split(max(1, PATH_NUMBERS // (len(alpha) * start.shape[1]))):
        p = (start[rows, None] + alpha * change[rows, None]).softmax(2)
        weighted = p * w[:, None]
        parts.append(torch.diag_embed(weighted.sum(1)) - weighted.mT @ p)
    return torch.cat(parts)


def _softmax_jacobian(logits: Tensor) -> Tensor:
    """``∂p_c/∂z_k = p_c (δ_ck − p_k)``, ``[n, c, k]``."""
    p = logits.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def _difference(start: Tensor, change: Tensor) -> Tensor:
    return (start + change).softmax(1) - start.softmax(1)


def _endpoint_gradient(start: Tensor, change: Tensor) -> Tensor:
    return _softmax_jacobian(start + change)


@dataclass(frozen=True)
class _Part:
    """One chunk of images at one step.

    ``indices [n, position, entry]`` of the sparse entries of s − s', ``scores [n, position, entry, class]``,
    ``gap``: worst ``|Σ S − (F(s) − F(s'))|``.
    """

    step: int
    indices: Tensor
    scores: Tensor
    gap: float


def _attribute(
    sae: SparseAutoencoder, probe: Probe, h: Array, baseline: Array | None, path: PathGradient, method: str
) -> Attribution:
    n_classes, n_steps = len(probe.attribute.classes), h.shape[1]
    total = torch.zeros(n_classes, n_steps, sae.cfg.d_sae, dtype=torch.float64, device=sae.W_dec.device)
    gap = 0.0
    for part in _parts(sae, probe, h, baseline, path):
        for cls in range(n_classes):
            total[cls, part.step].index_add_(0, part.indices.flatten(), part.scores[..., cls].flatten())
        gap = max(gap, part.gap)
    scores = (total / len(h)).float().cpu().numpy()
    start = "zero" if baseline is None else "activations"
    return Attribution(scores, gap, probe.attribute, method, start, sae.sae_id, len(h))


@torch.no_grad()
def _parts(
    sae: SparseAutoencoder, probe: Probe, h: Array, baseline: Array | None, path: PathGradient
) -> Iterator[_Part]:
    """Every image at every step, step by step, in chunks that fit in memory."""
    if h.ndim != 5 or len(h) == 0 or h.shape[1] != probe.n_steps:
        raise LensError(
            f"Attribution reads [n, step, c, y, x] at the probe's {probe.n_steps} steps, not {list(h.shape)}."
        )
    if baseline is not None and baseline.shape != h.shape:
        raise LensError(
            f"The baseline has shape {list(baseline.shape)}, the activations {list(h.shape)}; make them equal."
        )
    probe = probe.to(sae.W_dec.device)
    for step in range(h.shape[1]):
        reach = logit_reach(sae, probe, step, (h.shape[3], h.shape[4]))
        for rows in image_chunks(sae, len(h)):
            values, indices = codes_of(sae, h, rows, step)
            start_codes = None if baseline is None else codes_of(sae, baseline, rows, step)
            yield _part(sae, probe, reach, step, (values, indices), start_codes, path)


def _part(
    sae: SparseAutoencoder,
    probe: Probe,
    reach: Tensor,
    step: int,
    codes: tuple[Tensor, Tensor],
    start_codes: tuple[Tensor, Tensor] | None,
    path: PathGradient,
) -> _Part:
    values, indices = codes
    end = decoded_logits(sae, probe, step, reach, values, indices)
    if start_codes is None:
        start = decoded_logits(sae, probe, step, reach, torch.zeros_like(values[:1]), indices[:1]).expand_as(end)
        amounts = values
    else:
        start = decoded_logits(sae, probe, step, reach, *start_codes)
        # Scores are linear in s − s', so a feature active in both codes may stand twice.
        amounts = torch.cat([values, -start_codes[0]], dim=2)
        indices = torch.cat([indices, start_codes[1]], dim=2)
    temperature = probe.temperature
    gradient = path(start.cpu() / temperature, (end - start).cpu() / temperature).to(end) / temperature
    per_feature = (reach if sae.cfg.layout == "position" else reach.sum(1, keepdim=True)).permute(1, 2, 0)
    position = torch.arange(indices.shape[1], device=indices.device)[:, None]
    through = per_feature[position, indices].double()
    scores = amounts.double()[..., None] * torch.einsum("npek,nck->npec", through, gradient)
    change = (end / temperature).softmax(1) - (start / temperature).softmax(1)
    gap = float((scores.sum((1, 2)) - change).abs().max())
    return _Part(step, indices, scores, gap)


def codes_of(sae: SparseAutoencoder, h: Array, rows: slice, step: int) -> tuple[Tensor, Tensor]:
    """``values, indices [n, position (1 in the map layout), k]`` of some images at one step."""
    part = torch.as_tensor(h[rows, step]).to(sae.W_enc)
    values, indices = sae.encode_sparse(sae.to_samples(part))
    return values.reshape(len(part), -1, sae.cfg.k), indices.reshape(len(part), -1, sae.cfg.k)


def logit_reach(sae: SparseAutoencoder, probe: Probe, step: int, spatial: tuple[int, int]) -> Tensor:
    """Change of every logit per unit of a feature, through each position: ``[class, y·x, d_sae]`` float32."""
    n_classes, places = probe.weight.shape[1], spatial[0] * spatial[1]
    weight = probe.weight[step].to(sae.W_dec).reshape(n_classes, sae.cfg.channels, places)
    if sae.cfg.layout == "position":
        reach = weight.transpose(1, 2) @ sae.W_dec.T
    else:
        columns = sae.W_dec.reshape(sae.cfg.d_sae, sae.cfg.channels, places)
        reach = torch.einsum("kcp,fcp->kpf", weight, columns)
    return reach


def decoded_logits(
    sae: SparseAutoencoder, probe: Probe, step: int, reach: Tensor, values: Tensor, indices: Tensor
) -> Tensor:
    """The probe's logits ``[n, class]`` (float64) on the decoded code, by decoding it: a check on ``reach``."""
    out = sae.decode_sparse(values.flatten(0, 1), indices.flatten(0, 1))
    y_x = reach.shape[1]
    maps = sae.from_samples(out, None if sae.cfg.layout == "map" else (1, y_x))
    return probe.logits(maps.double(), step)
