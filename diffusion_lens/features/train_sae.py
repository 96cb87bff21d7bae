"""Training of the sparse autoencoder and of the per-step probe: plain functions that return what they made."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.resume import CHECKPOINT_SECONDS, Checkpoint
from diffusion_lens.base.types import LensError
from diffusion_lens.features.sae import SAEConfig, SparseAutoencoder

HOLD_EVERY = 20  # every 20th sample of a chunk is never trained on
HELD_OUT = 2**15  # samples the SAE is judged on, at most
LIVENESS = 2**17  # samples looked at for features that never fire
EVALUATION_BATCH = 4096
AUX_WEIGHT = 1 / 32  # Gao et al. 2024
LIFT_WEIGHT = 0.1  # of the mean pre-activation of dead features, within the auxiliary loss
DEAD_CHECK = 10  # optimiser steps between looks at who is dead, each a wait for the device
SPARSE = 16  # features for every active one from which training decodes without a dense code


class SAETrainConfig(StrictConfig):
    """How an SAE is trained.

    Attributes:
        d_sae, k, layout: as in ``SAEConfig``.
        n_steps: optimiser steps of ``batch_size`` samples each.
        lr: Adam's first learning rate; it falls linearly to 0 (DiffLens, published code: 1e-3).
        aux_k: dead features that explain the residual in the auxiliary loss; 0 turns that loss off.
        dead_after: optimiser steps without firing after which a feature counts as dead in training.
        seed: of the dictionary's first directions and the order of samples.
    """

    d_sae: int = Field(gt=0)
    k: int = Field(gt=0)
    n_steps: int = Field(gt=0)
    batch_size: int = Field(default=2048, gt=0)
    lr: float = Field(default=2e-3, gt=0)
    aux_k: int = Field(default=64, ge=0)
    dead_after: int = Field(default=50, gt=0)
    seed: int = 0
    layout: Literal["position", "map"] = "position"


@dataclass(frozen=True)
class SAELog:
    """How training went.

    Attributes:
        fvu: fraction of variance unexplained on held-out samples. l0: mean active features there.
        dead_share: features that fired on none of up to 131,072 samples.
        steps, train_fvu, train_dead: the curves: at optimiser step, FVU of that batch, share counted as dead.
    """

    fvu: float
    l0: float
    dead_share: float
    steps: tuple[int, ...]
    train_fvu: tuple[float, ...]
    train_dead: tuple[float, ...]


def train_sae(
    samples: Tensor | Iterable[Tensor],
    config: SAETrainConfig,
    *,
    model_id: str,
    hook_name: str,
    spatial: tuple[int, int],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> tuple[SparseAutoencoder, SAELog]:
    """Train a TopK SAE on ``samples [N, d_in]``, or on chunks of them from an iterable.

    Samples are scaled so that mean ``‖x‖² = d_in``, and the scale is folded into the weights when training is done.
    Loss: fraction of variance unexplained plus AuxK on dead features (Gao et al. 2024), with a scale of its own
    and a slight lift (our working form, see ``_auxiliary``). The decoder's rows keep unit norm while it trains
    (gradient projected, rows renormalised), ``b_dec`` starts at the mean, ``W_enc`` at ``W_decᵀ``; Adam, linear decay,
    gradient clipped at norm 1. The same seed gives the same SAE on the same hardware. Chunks are shuffled within
    themselves and read again when they run out, where the iterable can be. ``progress`` counts optimiser steps.
    Raises ``LensError`` for samples that cannot be learned from.
    """
    generator = torch.Generator().manual_seed(config.seed)
    stream = _chunks(samples, torch.device(device))
    first = next(stream)
    scale = _scale(first)
    sae = _initial_sae(first, scale, config, _Place(model_id, hook_name, spatial), generator)
    held_out = first[HOLD_EVERY - 1 :: HOLD_EVERY]
    held_out = held_out[torch.randperm(len(held_out), generator=generator)[:HELD_OUT].to(first.device)]
    batches = (x * scale for x in _batches(chain([first], stream), config.batch_size, generator))
    curves = _fit_sae(sae, batches, config, scale, progress, checkpoint)
    sae.requires_grad_(False).fold_scale(scale)
    fvu, l0 = evaluate_sae(sae, held_out)
    return sae, SAELog(fvu, l0, _dead_share(sae, first), *curves)


@dataclass(frozen=True)
class _Place:
    """Where an SAE's activations come from: model, module and the map's ``(y, x)``."""

    model_id: str
    hook_name: str
    spatial: tuple[int, int]


@torch.no_grad()
def evaluate_sae(sae: SparseAutoencoder, samples: Tensor) -> tuple[float, float]:
    """``(fvu, l0)`` on ``samples [N, d_in]``: ``Σ‖x − x̂‖² / Σ‖x − mean‖²``, and mean number of active features."""
    mean = samples.to(sae.W_enc).mean(0)
    error = spread = active = 0.0
    for part in samples.split(EVALUATION_BATCH):
        x = part.to(sae.W_enc)
        values, indices = sae.encode_sparse(x)
        error += float((x - sae.decode_sparse(values, indices)).square().sum())
        spread += float((x - mean).square().sum())
        active += float((values > 0).sum())
    return error / spread, active / len(samples)


@torch.no_grad()
def _dead_share(sae: SparseAutoencoder, samples: Tensor) -> float:
    """Share of features that fire on none of up to ``LIVENESS`` samples, spread evenly over ``samples``."""
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=samples.device)
    for part in _some(samples).split(EVALUATION_BATCH):
        values, indices = sae.encode_sparse(part)
        fired[indices[values > 0]] = True
    return 1 - float(fired.float().mean())


def _chunks(samples: Tensor | Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Chunks ``[m, d_in]`` on the device, over and over as far as the source can be read again."""
    source = [samples.to(device)] if isinstance(samples, Tensor) else samples
    while True:
        chunk = None
        for chunk in source:
            if chunk.ndim != 2 or len(chunk) < HOLD_EVERY:
                raise LensError(
                    f"An SAE trains on at least {HOLD_EVERY} activations [N, d_in]; it was given {list(chunk.shape)}."
                )
            yield chunk.to(device)
        if chunk is None:
            raise LensError("The activations ran out before training was done; give more of them, or fewer steps.")


def _batches(chunks: Iterator[Tensor], batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled float32 batches of at least ``batch_size`` where the chunk has as many, without held-out samples."""
    for chunk in chunks:
        rows = torch.arange(len(chunk))
        rows = rows[rows % HOLD_EVERY != HOLD_EVERY - 1]
        rows = rows[torch.randperm(len(rows), generator=generator)].to(chunk.device)
        for part in rows.tensor_split(max(1, len(rows) // batch_size)):
            yield chunk[part].float()


def _some(samples: Tensor) -> Tensor:
    """Up to ``LIVENESS`` samples in float32, spread evenly."""
    return samples[:: max(1, len(samples) // LIVENESS)][:LIVENESS].float()


def _scale(samples: Tensor) -> float:
    """The factor that makes the mean ``‖x‖²`` of ``samples [N, d_in]`` ``d_in``; raises ``LensError`` for no spread."""
    x = _some(samples)
    power = float(x.square().sum(1).mean())
    if not np.isfinite(power) or not bool((x != x[0]).any()):
        raise LensError("These activations are not finite, or all the same; collect them again.")
    return float((x.shape[1] / power) ** 0.5)


def _initial_sae(
    samples: Tensor, scale: float, config: SAETrainConfig, place: _Place, generator: torch.Generator
) -> SparseAutoencoder:
    """Random unit decoder rows, ``W_enc = W_decᵀ``, ``b_dec`` at the mean of the scaled samples."""
    cfg = SAEConfig(
        d_in=samples.shape[1],
        d_sae=config.d_sae,
        k=config.k,
        layout=config.layout,
        hook_name=place.hook_name,
        model_id=place.model_id,
        spatial=place.spatial,
    )
    sae = SparseAutoencoder(cfg).to(samples.device)
    rows = F.normalize(torch.randn(config.d_sae, cfg.d_in, generator=generator), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_dec.copy_(_some(samples).mean(0) * scale)
    return sae


def _fit_sae(
    sae: SparseAutoencoder,
    batches: Iterator[Tensor],
    config: SAETrainConfig,
    scale: float,
    progress: Progress | None,
    checkpoint: Path | None = None,
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Train in place on samples already scaled; returns the curves ``(steps, train_fvu, train_dead)``."""
    optimiser = torch.optim.Adam(sae.parameters(), lr=config.lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=config.n_steps)
    last_fired = torch.zeros(config.d_sae, dtype=torch.long, device=sae.W_dec.device)
    dead = last_fired[:0]
    curves: list[tuple[int, float, float]] = []
    # Another number of threads moves the last bits of the scale; what was trained so far is as good.
    identity = f"{config.model_dump_json()} {sae.cfg.model_dump_json()} {scale:.4g}"
    saver = Checkpoint(checkpoint, identity, {"sae": sae, "optimiser": optimiser, "decay": decay}, CHECKPOINT_SECONDS)
    first_step = 0
    if (saved := saver.load(sae.W_dec.device)) is not None:
        first_step, curves = saved["step"], saved["curves"]
        last_fired, dead = saved["last_fired"].to(last_fired), saved["dead"].to(last_fired)
        # Drawn and dropped, so that the order of samples goes on as it was.
        deque(islice(batches, first_step), maxlen=0)
    for step, x in zip(range(first_step, config.n_steps), batches, strict=False):
        fvu, aux, (values, indices) = _losses(sae, x, dead, config.aux_k)
        optimiser.zero_grad(set_to_none=True)
        (fvu + AUX_WEIGHT * aux).backward()
        _project_decoder_gradient(sae)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        decay.step()
        with torch.no_grad():
            sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
            last_fired.scatter_reduce_(0, indices.flatten(), ((values > 0).long() * (step + 1)).flatten(), "amax")
        if step % DEAD_CHECK == 0 or step == config.n_steps - 1:
            dead = (step - last_fired > config.dead_after).nonzero().flatten()
            curves.append((step, float(fvu.detach()), len(dead) / config.d_sae))
        saver.save({"step": step + 1, "curves": curves, "last_fired": last_fired, "dead": dead})
        if progress is not None:
            progress.step(step + 1, config.n_steps)
    steps, fvus, deads = zip(*curves, strict=True)
    return steps, fvus, deads


def _losses(
    sae: SparseAutoencoder, x: Tensor, dead: Tensor, aux_k: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """``(fvu, auxiliary, (values, indices))`` of scaled samples ``x [n, d_in]``; ``dead [m]`` are feature ids."""
    pre = sae.hidden_pre(x)
    values, indices = pre.topk(sae.cfg.k, dim=1, sorted=False)
    values = values.relu()
    residual = x - (_summed(sae, values, indices) + sae.b_dec)
    fvu = residual.square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-12)
    use_aux = aux_k > 0 and len(dead) > 0
    aux = _auxiliary(sae, pre[:, dead], dead, residual.detach(), aux_k) if use_aux else fvu.new_zeros(())
    return fvu, aux, (values.detach(), indices)


def _summed(sae: SparseAutoencoder, values: Tensor, indices: Tensor) -> Tensor:
    """``s W_dec [n, d_in]`` of a sparse code ``[n, k]``; without a dense one where few of many features are active.

    E1: a training step on a processor took 0.6 of the time so, at 40 of 2,048.
    """
    if SPARSE * sae.cfg.k <= sae.cfg.d_sae:
        return F.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum")
    return values.new_zeros(len(values), sae.cfg.d_sae).scatter(1, indices, values) @ sae.W_dec


def _auxiliary(sae: SparseAutoencoder, pre: Tensor, dead: Tensor, residual: Tensor, aux_k: int) -> Tensor:
    """Share of the residual that the ``aux_k`` strongest dead features leave unexplained, less a lift of all dead ones.

    AuxK (Gao et al. 2024) asks dead features for the residual at its own, small scale, which shrinks their
    encoder until they can never win the TopK: measured, it kept more of them dead than no loss at all. Here one
    best-fitting factor, without gradient, takes the scale out, so that only directions are learned; the lift
    raises dead pre-activations (as in Fel et al.'s overcomplete).
    """
    strongest, chosen = pre.topk(min(aux_k, len(dead)), dim=1, sorted=False)
    acts = torch.zeros_like(pre).scatter(1, chosen, strongest.relu())
    guess = acts @ sae.W_dec[dead]
    with torch.no_grad():
        factor = ((guess * residual).sum() / guess.square().sum().clamp_min(1e-12)).clamp_min(0)
    unexplained = (residual - factor * guess).square().sum() / residual.square().sum().clamp_min(1e-12)
    return unexplained - LIFT_WEIGHT * pre.mean()


@torch.no_grad()
def _project_decoder_gradient(sae: SparseAutoencoder) -> None:
    """Drop the part of the gradient that would only change the rows' norm."""
    gradient = sae.W_dec.grad
    if gradient is not None:
        gradient -= (gradient * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
