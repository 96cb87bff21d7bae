"""Interventions on SAE features, made into an edit that ``generate`` applies at the bottleneck."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.types import Attribute, EditSpec, Intervention, LensError, Sampler
from diffusion_lens.base.where import Where, check_grid, positions, where_of
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.steering.hold import Hold, make_hold

if TYPE_CHECKING:
    from diffusion_lens.model.generate import StepContext


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """One or several interventions, applied by difference: ``h' = h + (s' − s) W_dec`` (DiffLens, corrected form).

    Several interventions on one feature act one after the other, in the order given. Build it with ``make_edit``.

    Attributes:
        hold: what the whole edit leaves alone; ``None`` for nothing.
        spec: the interventions, or the fitted method that made them.
        sampler: one for all. window: the steps that any intervention touches; ``None`` is every step.
    """

    sae: SparseAutoencoder
    interventions: tuple[Intervention, ...]
    sampler: Sampler
    window: tuple[int, int] | None
    spec: EditSpec
    hold: Hold | None = None

    @torch.no_grad()
    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """``h [n, c, y, x]`` of the images ``context.seeds`` at step ``context.index`` → the edited h.

        Images and steps that nothing touches, and strengths that change nothing, return bit for bit as they came.
        """
        if len(context.seeds) != len(h):
            raise LensError(f"An edit needs one seed per image; {len(h)} maps came with {len(context.seeds)} seeds.")
        active = [i for i in self.interventions if i.window is None or i.window[0] <= context.index < i.window[1]]
        if all(i.everywhere for i in active):
            return self._turned(h, h, active, context)
        edited = h
        for where, own in _regions(active, (h.shape[2], h.shape[3])):
            edited = self._turned(h, edited, own, context, where)
        return edited

    def _turned(
        self,
        h: Tensor,
        edited: Tensor,
        active: Sequence[Intervention],
        context: StepContext,
        where: Where | None = None,
    ) -> Tensor:
        """``edited`` with the change that ``active`` make to ``h``, at the positions ``where`` alone."""
        ids, scale, shift = _coefficients(active, context.seeds)
        moving = (scale != 1) | (shift != 0)
        rows, columns = moving.any(1), moving.any(0)
        if not rows.any():
            return edited
        gain = torch.from_numpy(scale[np.ix_(rows, columns)])
        add = torch.from_numpy(shift[np.ix_(rows, columns)])
        features = ids[columns].tolist()
        if rows.all() and where is None:
            return h + self._change(h, features, gain, add, context)
        chosen = torch.from_numpy(np.flatnonzero(rows)).to(h.device)
        some = h[chosen]
        made = some + self._change(some, features, gain, add, context, where)
        if where is not None:
            made = torch.where(_mask(where, h.device), made, edited[chosen])
        return edited.index_copy(0, chosen, made)

    def _change(
        self,
        h: Tensor,
        features: list[int],
        gain: Tensor,
        add: Tensor,
        context: StepContext,
        where: Where | None = None,
    ) -> Tensor:
        change = self.sae.edit_delta(h, features, gain, add)
        if where is not None:
            change = torch.where(_mask(where, h.device), change, torch.zeros_like(change))
        return change if self.hold is None else self.hold.free(change, context.index, context.n_steps, where)


def _coefficients(active: Sequence[Intervention], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``ids [m]``, ``scale, shift [n, m]`` (float64): in image i, feature ``ids[j]`` becomes scale·s + shift."""
    ids = sorted({feature for i in active for feature, _, _ in i.coefficients()})
    column = {feature: j for j, feature in enumerate(ids)}
    scale, shift = np.ones((len(seeds), len(ids))), np.zeros((len(seeds), len(ids)))
    for intervention in active:
        chosen = intervention.only_seeds
        rows = np.array([chosen is None or seed in chosen for seed in seeds])
        for feature, gain, add in intervention.coefficients():
            j = column[feature]
            scale[rows, j] *= gain
            shift[rows, j] = shift[rows, j] * gain + add
    return np.array(ids, dtype=np.int64), scale, shift


def _regions(active: Sequence[Intervention], grid: tuple[int, int]) -> Iterator[tuple[Where, list[Intervention]]]:
    """The parts of a map in which the same interventions act, and those, in order; parts without any are left out."""
    inside = np.ones((len(active), *grid), dtype=bool)
    for number, intervention in enumerate(active):
        if intervention.where is not None:
            check_grid(intervention.where, grid)
            inside[number] = positions(intervention.where)
    flat = inside.reshape(len(active), -1)
    for together in np.unique(flat, axis=1).T:
        if together.any():
            part = (flat == together[:, None]).all(axis=0).reshape(grid)
            yield where_of(part), [i for i, acts in zip(active, together, strict=True) if acts]


@lru_cache(maxsize=64)
def _mask(where: Where, device: torch.device) -> Tensor:
    return torch.from_numpy(positions(where)).to(device)


def make_edit(
    interventions: Sequence[Intervention], sae: SparseAutoencoder, probes: Mapping[str, Probe] = MappingProxyType({})
) -> FeatureEdit:
    """An edit from interventions, checked against the SAE and each other.

    ``probes`` by attribute, for interventions that hold some still. What any of them holds the whole edit holds, but
    for the attributes that it steers.

    Raises:
        LensError: features of another SAE or outside its dictionary, overrides of features that are not
            steered, two samplers, an attribute held that has no probe, or no intervention at all.
    """
    if not interventions:
        raise LensError("Give at least one intervention.")
    for intervention in interventions:
        _check(intervention, sae)
    samplers = {i.sampler for i in interventions}
    if len(samplers) > 1:
        raise LensError("Interventions applied together need one sampler; choose asymmetric or symmetric for all.")
    spec = EditSpec(interventions=tuple(interventions))
    hold = make_hold(probes, spec.holds)
    spec = spec if hold is None else replace(spec, hold_digest=hold.digest)
    return FeatureEdit(sae, tuple(interventions), samplers.pop(), _hull(interventions), spec, hold)


def draw_classes(
    attribute: Attribute, target: Mapping[str, float], seeds: Sequence[int], seed: int
) -> dict[str, frozenset[int]]:
    """Draw a class for every image from a stated target distribution (ours; the published code draws per batch).

    Image i's class depends on ``seed`` and its own seed alone, never on the images drawn with it, so shares
    meet the target up to chance. Every class is in the result, some perhaps with no image.

    Raises:
        LensError: an unknown class, a negative share, or shares that do not add up to 1.
    """
    for label in target:
        attribute.index(label)
    shares = np.array([target.get(label, 0.0) for label in attribute.classes], dtype=float)
    if not np.isfinite(shares).all() or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise LensError(f"The target shares of {attribute.name} must be 0 or more and add up to 1.")
    # The last class that is wanted ends at exactly 1, whatever the rounding.
    edges = np.cumsum(shares)
    edges[np.flatnonzero(shares)[-1] :] = 1.0
    drawn: dict[str, set[int]] = {label: set() for label in attribute.classes}
    for image in seeds:
        place = int(np.searchsorted(edges, np.random.default_rng([seed, image]).random(), side="right"))
        drawn[attribute.classes[place]].add(image)
    return {label: frozenset(images) for label, images in drawn.items()}


def _check(intervention: Intervention, sae: SparseAutoencoder) -> None:
    poles = [p for p in (intervention.features, intervention.opposite) if p is not None]
    for pole in poles:
        if pole.sae_id != sae.sae_id:
            raise LensError(
                f"These features belong to SAE {pole.sae_id}, this lens has {sae.sae_id}; attribute them again with it."
            )
    ids = {feature for pole in poles for feature in pole.ids}
    outside = [feature for feature in ids if not 0 <= feature < sae.cfg.d_sae]
    if outside:
        raise LensError(f"Feature {outside[0]} does not exist; this SAE has features 0 to {sae.cfg.d_sae - 1}.")
    if intervention.where is not None and sae.cfg.spatial != (1, 1):  # which stands for "not told"
        check_grid(intervention.where, sae.cfg.spatial)
    named = [feature for feature, _ in intervention.overrides]
    if len(set(named)) != len(named) or not set(named) <= ids:
        raise LensError("An override must name a feature that is steered, and name it once.")


def _hull(interventions: Sequence[Intervention]) -> tuple[int, int] | None:
    windows = [i.window for i in interventions]
    known = [w for w in windows if w is not None]
    if len(known) < len(windows):
        return None
    return min(w[0] for w in known), max(w[1] for w in known)
