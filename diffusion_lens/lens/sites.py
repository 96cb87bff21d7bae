"""Several lenses of one model, each at a site of its own, used as one: one attribution, one edit.

both = SitesLens.join(DiffusionLens.from_pretrained("at-2"), DiffusionLens.from_pretrained("at-4"))
found = both.attribute("gender", "a portrait of a nurse", seeds=range(64))
both.generate("a portrait of a nurse", *both.interventions(found, "male", beta=3), seeds=range(8))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffusion_lens.base.types import (
    Attribution,
    FeatureSet,
    Generation,
    GenerationRequest,
    Intervention,
    LensError,
    Mode,
    Sampler,
    Seeds,
    beta_of,
    strength_of,
)
from diffusion_lens.features.attribute_sites import AtSite, attribute_sites, feature_name, top_features
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.generate import Capture, generate
from diffusion_lens.model.pipelines import DiffusionModel, at_site
from diffusion_lens.steering.sites import SitesEdit, make_sites_edit


@dataclass(frozen=True, eq=False)
class SitesLens:
    """Lenses by site; the first one's model draws. Build it with ``join``."""

    lenses: Mapping[str, DiffusionLens]

    @classmethod
    def join(cls, *lenses: DiffusionLens) -> SitesLens:
        """Use lenses of one model at different sites as one; raises ``LensError`` where they do not belong together."""
        if len(lenses) < 2:
            raise LensError("Give two lenses or more, each at another site.")
        first = lenses[0].manifest
        for other in (lens.manifest for lens in lenses[1:]):
            for what in ("base_model", "n_steps", "guidance_scale", "scheduler"):
                mine, theirs = getattr(first, what), getattr(other, what)
                if what == "base_model":
                    mine, theirs = ((b.id, b.digests, b.size, b.max_sequence_length) for b in (mine, theirs))
                if mine != theirs:
                    raise LensError(f"'{first.name}' and '{other.name}' differ in {what}; fit both to one model alike.")
        by_site = {lens.manifest.hook_name: lens for lens in lenses}
        if len(by_site) < len(lenses):
            raise LensError("Two of these lenses stand at the same site; give one of each.")
        return cls(by_site)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order given."""
        return tuple(self.lenses)

    @property
    def model(self) -> DiffusionModel:
        """The model that draws, opened at the first site."""
        return next(iter(self.lenses.values())).model

    @property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """Site → dictionary."""
        return {site: lens.sae for site, lens in self.lenses.items()}

    @property
    def probes(self) -> dict[str, Mapping[str, Probe]]:
        """Site → attribute → probe."""
        return {site: lens.probes for site, lens in self.lenses.items()}

    def request(self, prompt: str | None, seeds: Seeds) -> GenerationRequest:
        """What to draw, with the lenses' own steps and guidance."""
        return next(iter(self.lenses.values())).request(prompt, seeds)

    def attribute(
        self, attribute: str, prompt: str | None, seeds: Seeds, batch_size: int = 16
    ) -> dict[str, Attribution]:
        """Integrated gradients of an attribute over the features of all sites together (``features.attribute_sites``),
        on unedited images of these seeds, drawn once per site."""
        asked = self.request(prompt, seeds)
        return attribute_sites({
            site: AtSite(lens.sae, lens.probes[attribute], self._read(site, asked, batch_size))
            for site, lens in self.lenses.items()
        })  # fmt: skip

    def _read(self, site: str, asked: GenerationRequest, batch_size: int) -> np.ndarray:
        model = at_site(self.model, site)
        found = generate(model, asked, capture=Capture(dtype=np.float32), batch_size=batch_size).activations
        assert found is not None
        return found.h

    def top(self, attributions: Mapping[str, Attribution], target: str, n: int) -> list[tuple[str, float]]:
        """The ``n`` features of all sites with the largest scores for ``target``: names ``site:id``, and scores."""
        found = top_features(attributions, n, target)
        named = [
            (feature_name(site, i), score)
            for site, own in found.items()
            for i, score in zip(own.ids, own.scores, strict=True)
        ]
        return sorted(named, key=lambda entry: -entry[1])

    def interventions(
        self,
        attributions: Mapping[str, Attribution],
        target: str,
        beta: float,
        *,
        n_features: int = 30,
        mode: Mode = "scale",
        sampler: Sampler = "asymmetric",
        window: tuple[int, int] | None = None,
    ) -> tuple[Intervention, ...]:
        """One intervention per site that has any of the ``n_features`` best for ``target``; where the attribute has two
        classes, the other class's features are turned the other way."""
        attribute = next(iter(attributions.values())).attribute
        other = attribute.opposite(target)
        own = top_features(attributions, n_features, target, window)
        against: dict[str, FeatureSet] = {} if other is None else top_features(attributions, n_features, other, window)
        made = [
            Intervention.at_beta(
                features, mode, beta, opposite=against.pop(site, None), sampler=sampler, window=window
            )
            for site, features in own.items()
        ]  # fmt: skip
        away = beta_of(mode, -strength_of(mode, beta))  # what is left of the other class stands alone at its site
        made += [Intervention.at_beta(f, mode, away, sampler=sampler, window=window) for f in against.values()]
        return tuple(made)

    def edit(self, *interventions: Intervention) -> SitesEdit:
        """One edit from interventions on features of several sites."""
        return make_sites_edit(interventions, self.saes, self.probes)

    def generate(
        self,
        prompt: str | GenerationRequest | None,
        *interventions: Intervention,
        seeds: Seeds | None = None,
        batch_size: int = 16,
    ) -> Generation:
        """Draw one image per seed, edited at all sites in one pass."""
        if not isinstance(prompt, GenerationRequest):
            if seeds is None:
                raise LensError("Say which seeds to draw, e.g. seeds=range(16).")
            prompt = self.request(prompt, seeds)
        edit = self.edit(*interventions) if interventions else None
        return generate(self.model, prompt, edit=edit, batch_size=batch_size)
