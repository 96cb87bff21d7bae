"""Rows 3 and 4: the SAE on fresh activations, and the attribution against its own slow reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.types import Attribute, EditSpec, Generation, Predictions, Sampler
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.features.reference import autograd_scores
from diffusion_lens.features.sae import SparseAutoencoder, image_chunks
from diffusion_lens.model.generate import Capture, StepContext, generate
from diffusion_lens.results import metrics, stats
from diffusion_lens.studies.check.result import Row, at_least, at_most, not_applicable
from diffusion_lens.studies.check.runs import Job

FVU = 0.10
DEAD = 0.10
AGREEMENT = 0.95
GAP = 1e-5


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """An edit that puts the SAE's reconstruction in place of h, at every step and in every term of the sampler."""

    sae: SparseAutoencoder
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None

    @property
    def spec(self) -> EditSpec:
        """Names the edit by its SAE."""
        return EditSpec.of_custom("h replaced by the SAE's reconstruction", self.sae.sae_id)

    @torch.no_grad()
    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """``h [n, c, y, x]`` → the SAE's output in the same shape."""
        out = self.sae(self.sae.to_samples(h.to(self.sae.W_enc)))
        return self.sae.from_samples(out, (h.shape[2], h.shape[3])).to(h)


@dataclass(frozen=True)
class Fidelity:
    """Squared error and spread per image ``[n]``, features that fired ``bool [d_sae]``."""

    error: np.ndarray
    spread: np.ndarray
    fired: np.ndarray

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, over all images."""
        return float(self.error.sum() / self.spread.sum())


@torch.no_grad()
def fidelity(sae: SparseAutoencoder, h: np.ndarray) -> Fidelity:
    """How well ``h [n, step, c, y, x]`` is reconstructed; spread is around the mean over all samples."""
    n = len(h)
    total, count = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=sae.W_enc.device), 0
    for _, samples in _samples(sae, h):
        total += samples.double().sum(0)
        count += len(samples)
    mean = (total / count).to(sae.W_enc)
    error, spread = np.zeros(n), np.zeros(n)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    for rows, samples in _samples(sae, h):
        values, indices = sae.encode_sparse(samples)
        fired[indices[values > 0]] = True
        size = rows.stop - rows.start
        missed = (samples - sae.decode_sparse(values, indices)).square().reshape(size, -1).sum(1)
        error[rows] += missed.cpu().numpy()
        spread[rows] += (samples - mean).square().reshape(size, -1).sum(1).cpu().numpy()
    return Fidelity(error, spread, fired.cpu().numpy())


def _samples(sae: SparseAutoencoder, h: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
    for step in range(h.shape[1]):
        for rows in image_chunks(sae, len(h)):
            rows = slice(rows.start, min(rows.stop, len(h)))
            yield rows, sae.to_samples(torch.as_tensor(h[rows, step]).to(sae.W_enc))


def draw_inside(job: Job) -> tuple[list[Generation], list[Generation]]:
    """Images of every suggested prompt with their activations, and again through the SAE's reconstruction."""
    lens, prompts = job.lens, job.lens.prompts
    each = -(-job.sizes.inside // len(prompts))
    plain, rebuilt = [], []
    names = [f"3 SAE: prompt {place + 1} of {len(prompts)}" for place in range(len(prompts))]
    size = job.sizes.batch_size
    for place, (prompt, bar) in enumerate(zip(prompts, job.progress.parts(len(prompts), names), strict=True)):
        request, (first, second) = job.request(prompt, job.seeds(3, place, each)), bar.parts(2)
        plain.append(generate(lens.model, request, capture=Capture(), batch_size=size, progress=first))
        rebuilt.append(generate(lens.model, request, edit=Reconstruction(lens.sae), batch_size=size, progress=second))
    return plain, rebuilt


def sae_rows(job: Job, plain: list[Generation], rebuilt: list[Generation]) -> list[Row]:
    """Row 3: unexplained variance, dead features, and classes kept when h is replaced by its reconstruction."""
    lens = job.lens
    h = activations(plain)
    found, n = fidelity(lens.sae, h), len(h)
    spread = stats.paired_bootstrap(_ratio, found.error, found.spread, n_boot=1000)
    # A rare feature may miss a small sample; one that fires on the atlas's own images is alive.
    dead = int((~found.fired & lens.atlas.dead).sum())
    d_sae = lens.sae.cfg.d_sae
    rows = [
        at_most(3, "SAE: variance unexplained", found.fvu, spread.interval, FVU, "share", n),
        at_most(
            3, "SAE: dead features", dead / d_sae, None, DEAD, "share", n, f"{dead} of {d_sae} never fire on these "
            "images or the atlas's",
        ),
    ]  # fmt: skip
    before = lens.classify(np.concatenate([g.images for g in plain]))
    after = lens.classify(np.concatenate([g.images for g in rebuilt]))
    return rows + _kept_rows(lens.attributes, before, after)


def _kept_rows(
    attributes: tuple[Attribute, ...], before: dict[str, Predictions], after: dict[str, Predictions]
) -> list[Row]:
    steered = [a.name for a in attributes]
    rows = []
    for name in steered:
        same = metrics.decided_labels(before[name]) == metrics.decided_labels(after[name])
        k, n = int(same.sum()), len(same)
        rows.append(
            at_least(
                3, f"{name}: class kept by the reconstruction", k / n, stats.share_interval(k, n), AGREEMENT, "share", n
            )
        )
    kept = {name: metrics.agreement(before[name], after[name]) for name in before if name not in steered}
    if kept:
        low = min(kept, key=lambda name: kept[name])
        note = f"least: {low} {kept[low]:.1%}"
        mean, n = float(np.mean(list(kept.values()))), len(next(iter(before.values())).certain)
        rows.append(Row(3, "nuisances: class kept, mean", "–", "information", mean, None, "share", n, note=note))
    return rows


def _ratio(error: np.ndarray, spread: np.ndarray, axis: int = 0) -> np.ndarray:
    return error.sum(axis=axis) / spread.sum(axis=axis)


def activations(plain: list[Generation]) -> np.ndarray:
    """All captured activations ``[n, step, c, y, x]``."""
    return np.concatenate([g.activations.h for g in plain if g.activations is not None])


def attribution_rows(job: Job, plain: list[Generation]) -> list[Row]:
    """Row 4: the completeness gap, and the closed form against automatic differentiation."""
    lens, sizes = job.lens, job.sizes
    if not lens.probes:
        return [not_applicable(4, "attribution", "this lens has no probes")]
    everything = activations(plain)
    h = everything[:: max(1, len(everything) // sizes.attribution)][: sizes.attribution]
    few = h[: sizes.reference]
    n_steps = h.shape[1]
    steps = np.unique(np.linspace(0, n_steps - 1, min(n_steps, sizes.reference_steps)).round().astype(int)).tolist()
    rows = []
    for name, probe in job.progress.each(list(lens.probes.items())):
        found = integrated_gradients(lens.sae, probe, h)
        rows.append(at_most(4, f"{name}: completeness gap", found.completeness_gap, None, GAP, "gap", len(h)))
        fast = integrated_gradients(lens.sae, probe, few).scores[:, steps]
        slow = autograd_scores(lens.sae, probe, few, steps=steps)
        gap = float(np.abs(fast - slow).max())
        note = f"largest difference over {slow.size:,} scores at {len(steps)} steps"
        rows.append(at_most(4, f"{name}: closed form against autograd", gap, None, GAP, "gap", len(few), note))
    return rows
