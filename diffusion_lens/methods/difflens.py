"""DiffLens (Shi et al., CVPR 2025, arXiv 2503.20483): integrated gradients over SAE features, then scaling."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field

from diffusion_lens.base.types import Attribution
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.methods.protocol import Fitted, Learned, Method, Task
from diffusion_lens.methods.sae_features import STRENGTHS, SaeOptions, attribute_draws, feature_edit, rebuild
from diffusion_lens.model.denoise import Edit


class DiffLensOptions(SaeOptions):
    """Which attribution ranks the features, and how they are steered."""

    attribution: Literal["shipped", "fitted"] = Field(
        "shipped", title="Attribution", description="The lens's own, or one on the images drawn for this fit."
    )


def difflens_attribution(fitted: Fitted) -> Attribution:
    """The attribution that a fitted DiffLens ranks features by."""
    if fitted.options.attribution == "shipped":
        return fitted.lens.attributions[fitted.record.attribute]
    return rebuild(fitted, "integrated_gradients")


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

    def learn(self, task: Task) -> Learned:
        """Nothing for the shipped attribution; else integrated gradients on the task's images."""
        if task.options.attribution == "shipped":
            return Learned(notes={"attribution": "shipped with the lens; its fitting time is not counted"})
        found = attribute_draws(task, partial(integrated_gradients, task.lens.sae, task.probe))
        return Learned({"scores": torch.from_numpy(found.scores)}, {"completeness_gap": found.completeness_gap})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each image steered by ``strength``: β − 1 for scaling, β for adding."""
        return feature_edit(fitted, difflens_attribution(fitted), strength)


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
        return feature_edit(fitted, difflens_attribution(fitted), strength, hold=hold)
