"""Interventions at several sites of one model, as one edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from diffusion_lens.base.types import EditSpec, Intervention, LensError, Sampler
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.steering.intervene import FeatureEdit, make_edit

if TYPE_CHECKING:
    from diffusion_lens.model.generate import StepContext


@dataclass(frozen=True, eq=False)
class SitesEdit:
    """Feature edits at several sites, made in one pass: a later site is edited on top of what earlier ones changed.

    Attributes:
        parts: site → the edit there.
        sampler: one for all. window: the steps that any part touches; ``None`` is every step.
    """

    parts: Mapping[str, FeatureEdit]
    sampler: Sampler
    window: tuple[int, int] | None
    spec: EditSpec

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """Never called: each part is applied at its own site."""
        raise LensError("An edit of several sites is drawn by generate alone, which applies each part at its site.")


def make_sites_edit(
    interventions: Sequence[Intervention],
    saes: Mapping[str, SparseAutoencoder],
    probes: Mapping[str, Mapping[str, Probe]] = MappingProxyType({}),
) -> SitesEdit:
    """One edit from interventions on features of several sites; each is made where its SAE stands.

    ``saes``, ``probes``: of every site. Raises ``LensError`` for features of none of these SAEs, for two samplers, and
    as ``make_edit`` does.
    """
    site_of = {sae.sae_id: site for site, sae in saes.items()}
    own: dict[str, list[Intervention]] = {}
    for intervention in interventions:
        site = site_of.get(intervention.features.sae_id)
        if site is None:
            raise LensError(
                f"These features belong to none of the sites {', '.join(saes)}; attribute them again there."
            )
        own.setdefault(site, []).append(intervention)
    parts = {site: make_edit(given, saes[site], probes.get(site, {})) for site, given in own.items()}
    samplers = {part.sampler for part in parts.values()}
    if len(samplers) != 1:
        raise LensError("Interventions applied together need one sampler; choose asymmetric or symmetric for all.")
    windows = [part.window for part in parts.values()]
    known = [window for window in windows if window is not None]
    hull = None if len(known) < len(windows) else (min(w[0] for w in known), max(w[1] for w in known))
    spec = EditSpec(interventions=tuple(interventions))
    held = "".join(part.spec.hold_digest for part in parts.values())
    return SitesEdit(parts, samplers.pop(), hull, replace(spec, hold_digest=held))
