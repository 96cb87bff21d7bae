"""Training of the per-step linear probe."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.features.probes import Probe

PROBE_CHUNK_NUMBERS = 2**27  # numbers of one flattened chunk of steps: 512 MiB


def train_probe(
    h: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    attribute: Attribute,
    *,
    weights: np.ndarray | None = None,
    weight_decay: float = 0.1,
    temperature: float | None = 1.0,
    seed: int,
    holdout: float = 0.2,
    device: torch.device | str = "cpu",
) -> Probe:
    """One multinomial logistic regression per step on ``h [n, step, c, y, x]``, all steps in one batched fit.

    Minimises, per step, the class-balanced cross entropy plus ``weight_decay / 2 · ‖W‖²`` on inputs centred
    and scaled to mean ‖x‖² = 1 (folded back into the weights afterwards), by full-batch L-BFGS (our working form;
    the published probe trains 3 epochs of Adam). Accuracy is that on the held-out share of the images.

    Args:
        labels: class index per image ``[n]``; images with a negative label ("uncertain") are left out.
        weights: how much each image counts within its class ``[n]``; evenly by default. Accuracy counts them evenly.
        temperature: divides the logits; soft probabilities (strong decay, 1 or more) let every image speak in an
            attribution. ``None`` fits one on the held-out images, so that probabilities are calibrated.

    Raises:
        LensError: a class has fewer than four images, or labels, weights and activations do not match.
    """
    y = torch.as_tensor(labels).long().cpu()
    counts = torch.ones(len(y)) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
    if h.ndim != 5 or len(y) != len(h):
        raise LensError(f"The probe needs activations [n, step, c, y, x] and n labels; got {h.shape} and {len(y)}.")
    if len(counts) != len(y) or not bool((counts > 0).all()):
        raise LensError(f"The probe needs a weight above 0 for each of {len(y)} images; got {len(counts)}.")
    train, held = _stratified(y, attribute, holdout, seed)
    n_steps, width = h.shape[1], int(np.prod(h.shape[2:]))
    per_chunk = max(1, PROBE_CHUNK_NUMBERS // (len(y) * width))
    rows, biases, held_logits = [], [], []
    for first in range(0, n_steps, per_chunk):
        part = torch.as_tensor(h[:, first : first + per_chunk]).flatten(2).transpose(0, 1)
        x = part[:, train].to(device).float()
        weight, bias = _fit_logistic(x, y[train].to(device), counts[train].to(device), attribute, weight_decay)
        held_part = part[:, held].to(device).float()
        held_logits.append(torch.baddbmm(bias[:, None], held_part, weight.mT).double().cpu())
        rows.append(weight.cpu())
        biases.append(bias.cpu())
    logits = torch.cat(held_logits)
    if temperature is None:
        temperature = _calibrated_temperature(logits, y[held], len(attribute.classes))
    return Probe(
        attribute,
        torch.cat(rows),
        torch.cat(biases),
        _balanced_accuracy(logits, y[held], len(attribute.classes)),
        temperature,
    )


def _stratified(labels: Tensor, attribute: Attribute, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Image rows to train on and to hold out, each class split alike."""
    if not 0 < holdout < 1 or int(labels.max()) >= len(attribute.classes):
        raise LensError(f"holdout must lie between 0 and 1, labels between 0 and {len(attribute.classes) - 1}.")
    generator = torch.Generator().manual_seed(seed)
    train, held = [], []
    for index, name in enumerate(attribute.classes):
        rows = (labels == index).nonzero().flatten()
        if len(rows) < 4:
            raise LensError(f"Only {len(rows)} images are labelled '{name}'; the probe needs at least 4 of each class.")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n_held = min(max(1, round(holdout * len(rows))), len(rows) - 2)
        held.append(rows[:n_held])
        train.append(rows[n_held:])
    return torch.cat(train), torch.cat(held)


def _fit_logistic(
    x: Tensor, labels: Tensor, counts: Tensor, attribute: Attribute, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """``x [step, n, d]`` → ``weight [step, class, d], bias [step, class]`` for raw inputs; ``x`` is used up.

    ``counts [n]``: how much each image counts within its class; the classes count alike.
    """
    n_steps, n, width = x.shape
    n_classes = len(attribute.classes)
    mean = x.mean(1, keepdim=True)
    x -= mean
    scale = (x.square().sum(2).mean(1)).sqrt().clamp_min(1e-12)[:, None, None]
    x /= scale
    balance = counts * (n / (n_classes * torch.bincount(labels, counts, minlength=n_classes)))[labels]
    weight = torch.zeros(n_steps, n_classes, width, device=x.device, requires_grad=True)
    bias = torch.zeros(n_steps, n_classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=60,
        history_size=8,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )
    target = labels.expand(n_steps, n)

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = torch.baddbmm(bias[:, None], x, weight.mT)
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        entropy = (each.view(n_steps, n) * balance).sum() / n
        value = entropy + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    raw = (weight / scale).detach()
    return raw, (bias - (raw @ mean.mT)[..., 0]).detach()


def _balanced_accuracy(logits: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """``logits [step, n, class]`` → mean over classes of the share recognised, ``[step]``."""
    right = (logits.argmax(2) == labels).float()
    return torch.stack([right[:, labels == c].mean(1) for c in range(n_classes)]).mean(0)


def _calibrated_temperature(logits: Tensor, labels: Tensor, n_classes: int) -> float:
    """The temperature in [0.001, 100] with the least class-balanced cross entropy (Guo et al. 2017)."""
    target = labels.expand(logits.shape[:2]).flatten()
    balance = 1 / torch.bincount(labels, minlength=n_classes).to(logits)

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits.flatten(0, 1) / np.exp(log_temperature), target, weight=balance))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.001), np.log(100)), method="bounded").x))
