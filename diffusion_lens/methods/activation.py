"""Activation baseline (after Bills et al. 2023): raw bottleneck channels, ranked and scaled, without an SAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from diffusion_lens.base.types import Sampler
from diffusion_lens.methods.draws import check_examples, class_means, mean_differences
from diffusion_lens.methods.edits import ChannelEdit, ClassDraw
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Preset, Task
from diffusion_lens.model.denoise import Edit


class ActivationOptions(MethodOptions):
    """How many channels, and where the edit goes."""

    n_channels: int = Field(30, ge=1, title="Channels", description="Channels scaled per class, best first.")
    sampler: Sampler = Field("asymmetric", title="Sampler", description="Asymmetric moves the predicted image alone.")


class Activation(Method):
    """Ranked raw channels."""

    key = "activation"
    name = "Activation"
    kind = "neurons"
    source = "Bills et al. 2023, Language models can explain neurons in language models; as used by DiffLens"
    explanation = (
        "Does without a sparse autoencoder: ranks the bottleneck's raw channels by their mean activation on images of "
        "a class minus that on the others, over all steps and positions, and multiplies the top ones. Single neurons "
        "stand for several things at once, which is what the paper's features are to mend. Classes of the images are "
        "read by the lens's probe, never by the classifier that judges (after Bills et al. 2023; ranking by the "
        "difference is our working form)."
    )
    options = ActivationOptions
    presets: ClassVar[Mapping[str, Preset]] = {
        "as DiffLens compares it": Preset(
            {"n_channels": 30, "sampler": "asymmetric"},
            "Channels by mean activation less that of the others; how many, and the sampler, are DiffLens' own.",
        ),
    }
    strengths = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
    strength_name = "β − 1"

    def learn(self, task: Task) -> Learned:
        """Mean activation per class and channel."""
        means, counts = class_means(task.draws.batches(task.progress), task.probe, positions=False)
        check_examples(counts, task.attribute, task.wanted)
        scores = mean_differences(means, counts).mean(1)
        return Learned({"scores": scores}, {"examples": counts.tolist()})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """The gain is 1 + ``strength``."""
        scores, options = fitted.tensors["scores"], fitted.options
        top = scores.topk(min(options.n_channels, scores.shape[1]), dim=1)
        gains = torch.ones_like(scores)
        gains.scatter_(1, top.indices, torch.where(top.values > 0, 1 + strength, 1.0))
        draw = ClassDraw(fitted.attribute, fitted.record.target, options.draw_seed)
        return ChannelEdit(gains, draw, options.sampler, None, fitted.spec(strength))
