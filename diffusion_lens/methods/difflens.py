"""DiffLens (Shi et al., CVPR 2025, arXiv 2503.20483): integrated gradients over SAE features, then scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from diffusion_lens.methods.protocol import Fitted, Learned, Method, Preset, Task
from diffusion_lens.methods.sae_features import (
    STRENGTHS,
    AttributedOptions,
    attribution_of,
    feature_edit,
    learn_attribution,
)
from diffusion_lens.model.denoise import Edit


class DiffLensOptions(AttributedOptions):
    """As of every method that steers the features of an attribution."""


class DiffLens(Method):
    """SAE features by integrated gradients."""

    key = "difflens"
    name = "DiffLens"
    kind = "SAE features"
    source = "Shi et al. 2025, Dissecting and Mitigating Diffusion Bias via Mechanistic Interpretability, CVPR"
    explanation = (
        "Ranks the features of a sparse autoencoder at the U-Net's bottleneck by integrated gradients of an attribute "
        "probe, takes the top ones, and multiplies their activations by β (or adds β to them) at every step. The edit "
        "is by difference, h' = h + (s' − s) W_dec, so that β = 1 changes nothing at all. Each image is steered to a "
        "class drawn for it from the target shares, by its own seed, which is our working form; the published code "
        "draws one class per batch (Shi et al., CVPR 2025, arXiv 2503.20483)."
    )
    options = DiffLensOptions
    strengths = STRENGTHS
    strength_name = "β − 1"
    presets: ClassVar[Mapping[str, Preset]] = {
        "as published": Preset(
            {"n_features": 30, "poles": "one", "mode": "scale", "sampler": "asymmetric"},
            "30 features of one pole, scaled, as its P2 settings do; their class is drawn per batch, ours per image.",
        ),
    }

    def learn(self, task: Task) -> Learned:
        """Nothing for the shipped attribution; else integrated gradients on the task's images."""
        return learn_attribution(task)

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each image steered by ``strength``: β − 1 for scaling, β for adding."""
        return feature_edit(fitted, attribution_of(fitted), strength)


class DiffLensHeld(DiffLens):
    """The same edits, with the lens's other attributes held still."""

    key = "difflens-hold"
    name = "DiffLens, others held"
    source = "Shi et al. 2025 for the features; after Ravfogel et al. 2020 for holding; our combination"
    explanation = (
        "DiffLens, less what the probes of the lens's other attributes read of its edit: at every step the change of h "
        "is projected onto what is orthogonal to their directions. Features of one attribute carry some of the others "
        "where these go together in what a model draws; this takes that part out and leaves the features as they are. "
        "Null-space projection is that of Ravfogel et al. (2020, arXiv 2004.07667); "
        "putting it on the edit is our working form."
    )

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each image steered by ``strength``: β − 1 for scaling, β for adding."""
        hold = tuple(name for name in fitted.lens.probes if name != fitted.record.attribute)
        return feature_edit(fitted, attribution_of(fitted), strength, hold=hold)
