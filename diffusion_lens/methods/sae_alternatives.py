"""DiffLens with its attribution exchanged: relevance propagation, or gradient × activation; the same edits."""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from diffusion_lens.features.attribute import gradient_x_activation
from diffusion_lens.methods.protocol import Fitted, Learned, Method, Task
from diffusion_lens.methods.relevance.lrp import Rule
from diffusion_lens.methods.relevance.lrp_sae import lrp_attribution
from diffusion_lens.methods.sae_features import STRENGTHS, SaeOptions, attribute_draws, feature_edit, rebuild
from diffusion_lens.model.denoise import Edit


class SaeLrpOptions(SaeOptions):
    """Which rule carries relevance back, and how features are steered."""

    rule: Rule = Field("zplus", title="Rule", description="z⁺ of deep Taylor decomposition, or the ε-rule.")


class SaeLrp(Method):
    """SAE features by relevance."""

    key = "sae-lrp"
    name = "SAE + LRP"
    kind = "SAE features"
    source = "Bach et al. 2015 and Montavon et al. 2017 (the rules); our combination"
    explanation = (
        "Ranks SAE features by layer-wise relevance propagation in place of integrated gradients: relevance starts as "
        "the difference between a class's logit and the mean of the others, and is passed back through the probe and "
        "the decoder so that none is lost. The edit is DiffLens' own. The rules are those of Bach et al. 2015 and "
        "Montavon et al. 2017; putting them in this place is our working form."
    )
    options = SaeLrpOptions
    strengths = STRENGTHS
    strength_name = "β − 1"

    def learn(self, task: Task) -> Learned:
        """Relevance on the task's images."""
        found = attribute_draws(task, partial(lrp_attribution, task.lens.sae, task.probe, rule=task.options.rule))
        return Learned({"scores": torch.from_numpy(found.scores)}, {"completeness_gap": found.completeness_gap})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each image steered by ``strength``: β − 1 for scaling, β for adding."""
        return feature_edit(fitted, rebuild(fitted, f"lrp_{fitted.options.rule}"), strength)


class SaeGradient(Method):
    """SAE features by gradient × activation."""

    key = "sae-gradient"
    name = "SAE + gradient × activation"
    kind = "SAE features"
    source = "Shrikumar et al. 2016 (the score); our combination"
    explanation = (
        "Ranks SAE features by gradient × activation at the code itself: the last point of the path that integrated "
        "gradients follows, and so blind where the probe is already certain. The edit is DiffLens' own. The score is "
        "that of Shrikumar et al. 2016; putting it in this place is our working form."
    )
    options = SaeOptions
    strengths = STRENGTHS
    strength_name = "β − 1"

    def learn(self, task: Task) -> Learned:
        """Scores on the task's images."""
        found = attribute_draws(task, partial(gradient_x_activation, task.lens.sae, task.probe))
        return Learned({"scores": torch.from_numpy(found.scores)}, {"completeness_gap": found.completeness_gap})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each image steered by ``strength``: β − 1 for scaling, β for adding."""
        return feature_edit(fitted, rebuild(fitted, "gradient_x_activation"), strength)
