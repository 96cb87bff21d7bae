"""What an edit should leave alone: the part of an edit that the probes of other attributes read, taken out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from diffusion_lens.base.types import LensError
from diffusion_lens.base.where import Where, positions
from diffusion_lens.features.probes import Probe

RANK_TOLERANCE = 1e-4
"""Directions weaker than this, beside the strongest at their step, are rounding."""


@dataclass(frozen=True, eq=False)
class Hold:
    """Attributes held still: an edit of h moves in no direction that their probes read (our working form).

    A probe's class probabilities depend on ``(W_c − mean W) · h`` alone. At every step these rows, of all attributes
    held, span a few directions out of ``c·y·x``; an edit is projected onto what is orthogonal to them (as null-space
    projection does: Ravfogel et al. 2020, 2004.07667, there on representations, here on changes of them). What their
    probes read is then as it was; what the rest of the model reads may still move, so it is measured.
    """

    probes: tuple[Probe, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes held, in order."""
        return tuple(probe.attribute.name for probe in self.probes)

    @cached_property
    def basis(self) -> tuple[Tensor, ...]:
        """One orthonormal ``[c·y·x, direction]`` per step of the probes."""
        return tuple(_directions([p.weight[step] for p in self.probes]) for step in range(self.probes[0].n_steps))

    @cached_property
    def digest(self) -> str:
        """12 hex digits over the attributes and every weight of their probes."""
        digest = hashlib.sha256(" ".join(self.names).encode())
        for probe in self.probes:
            digest.update(probe.weight.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def free(self, change: Tensor, step: int, n_steps: int, where: Where | None = None) -> Tensor:
        """``change [n, c, y, x]`` of h at step ``step`` of ``n_steps``, less what the probes would read of it.

        A run of another length than the probes' takes the head at the same part of the way. ``where``: the only
        positions at which ``change`` is not zero, and may become other than zero.
        """
        own = step * len(self.basis) // n_steps
        basis = (self.basis[own] if where is None else self._inside(own, where, change.shape[1])).to(change)
        flat = change.flatten(1)
        if flat.shape[1] != len(basis):
            raise LensError(
                f"The probes held still read {len(basis)} numbers per image; this bottleneck has {flat.shape[1]}."
            )
        return (flat - (flat @ basis) @ basis.T).view_as(change)

    def _inside(self, step: int, where: Where, channels: int) -> Tensor:
        """The basis of one step as seen at some positions alone: what a change there must be orthogonal to."""
        return _inside(self.basis[step], where, channels)


@lru_cache(maxsize=256)
def _inside(basis: Tensor, where: Where, channels: int) -> Tensor:
    mask = torch.from_numpy(positions(where)).flatten().repeat(channels).to(basis.device)
    if len(mask) != len(basis):
        return basis  # of another map; ``free`` says so
    directions, sizes, _ = torch.linalg.svd((basis * mask[:, None]).double(), full_matrices=False)
    return directions[:, sizes > RANK_TOLERANCE * sizes[0].clamp_min(1e-12)].float() * mask[:, None]


def _directions(weights: Sequence[Tensor]) -> Tensor:
    """Orthonormal ``[c·y·x, direction]`` that span what probes of weights ``[class, c·y·x]`` read at one step."""
    rows = [weight - weight.mean(0, keepdim=True) for weight in weights]
    # Attributes count alike, whatever the size of their probes' weights.
    rows = [part / part.norm().clamp_min(1e-12) for part in rows]
    directions, sizes, _ = torch.linalg.svd(torch.cat(rows).double().T, full_matrices=False)
    return directions[:, sizes > RANK_TOLERANCE * sizes[0].clamp_min(1e-12)].float()


def make_hold(probes: Mapping[str, Probe], names: Sequence[str]) -> Hold | None:
    """The attributes ``names`` held still; ``None`` for no name.

    Raises ``LensError`` for an attribute without a probe, naming those that have one.
    """
    for name in names:
        if name not in probes:
            raise LensError(f"'{name}' cannot be held still: the lens has probes of {', '.join(probes) or 'nothing'}.")
    return _kept(tuple(probes[name] for name in sorted(set(names)))) if names else None


@lru_cache(maxsize=8)
def _kept(probes: tuple[Probe, ...]) -> Hold:
    """The same for the same probes: every move of a slider asks, and the directions take longer than the edit."""
    return Hold(probes)
