"""What the methods that steer by SAE features share: options, and the edit from an attribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribution, EditSpec, Intervention, LensError, Mode, Sampler
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.methods.draws import Drawn
from diffusion_lens.methods.edits import ClassDraw
from diffusion_lens.methods.protocol import Fitted, Learned, MethodOptions, OpenLens, Task
from diffusion_lens.model.denoise import Edit, StepContext
from diffusion_lens.results.manifest import Setting
from diffusion_lens.steering.intervene import FeatureEdit, make_edit
from diffusion_lens.steering.settings import make_intervention

Change = Callable[[Intervention], Intervention]

STRENGTHS = (0.5, 0.75, 1.0, 2.0, 4.0, 8.0)
"""Of every method and control that steers by SAE features: close where few features cross even shares."""


class SaeOptions(MethodOptions):
    """How features are edited; ``None`` takes the lens's shipped setting."""

    n_features: int | None = Field(None, ge=1, title="Features", description="Features per pole, best first.")
    poles: Literal["one", "both"] | None = Field(None, title="Poles", description="Steer the other pole back, too.")
    mode: Mode | None = Field(None, title="Mode", description="Multiply activations, or add to them.")
    sampler: Sampler | None = Field(None, title="Sampler", description="Asymmetric moves the predicted image alone.")


class AttributedOptions(SaeOptions):
    """Which attribution ranks the features, and how they are steered."""

    attribution: Literal["shipped", "fitted"] = Field(
        "shipped", title="Attribution", description="The lens's own, or one on the images drawn for this fit."
    )


def setting_with(lens: OpenLens, attribute: str, options: SaeOptions) -> Setting:
    """The shipped setting with what the options replace; where the lens ships none, 30 features scaled."""
    shipped = lens.settings.get(attribute)
    setting = shipped or Setting(
        attribute=attribute, target=lens.probes[attribute].attribute.classes[-1], n_features=30, poles="one",
        mode="scale", sampler="asymmetric", betas=(1.0,),
    )  # fmt: skip
    told = options.model_dump(exclude={"draw_seed", "gate"}, exclude_none=True)
    known = {name: value for name, value in told.items() if name in Setting.model_fields}
    return setting.model_copy(update=known)


@dataclass(frozen=True, eq=False)
class ClassFeatureEdit:
    """Each image steered by one of the interventions of ``edit``: that of the class drawn for it.

    ``classes``: the interventions' class indices, in their order.
    """

    edit: FeatureEdit
    classes: tuple[int, ...]
    draw: ClassDraw
    spec: EditSpec
    sampler: Sampler
    window: tuple[int, int] | None

    def apply(self, h: torch.Tensor, context: StepContext) -> torch.Tensor:
        """The edited ``h [n, c, y, x]``."""
        return self.on(context.seeds).apply(h, context)

    def on(self, seeds: tuple[int, ...]) -> FeatureEdit:
        """The same for images of these seeds, every intervention with its own of them."""
        drawn = tuple(zip(seeds, self.draw.rows(seeds).tolist(), strict=True))
        own = tuple(
            replace(steer, only_seeds=frozenset(seed for seed, label in drawn if label == wanted))
            for steer, wanted in zip(self.edit.interventions, self.classes, strict=True)
        )
        return replace(self.edit, interventions=own)


def feature_edit(
    fitted: Fitted,
    attribution: Attribution,
    strength: float,
    change: Change | None = None,
    hold: tuple[str, ...] = (),
) -> Edit:
    """Steer each image by the features of the class drawn for it.

    ``change`` makes another intervention of every one (controls do). ``hold``: attributes left alone, in place of
    those that the shipped setting holds.
    """
    setting = setting_with(fitted.lens, fitted.record.attribute, fitted.options).model_copy(update={"hold": hold})
    wanted = [i for i, share in enumerate(fitted.record.target) if share > 0]
    steers = [make_intervention(attribution, setting, fitted.record.classes[i], strength) for i in wanted]
    steers = steers if change is None else [change(steer) for steer in steers]
    edit = replace(make_edit(steers, fitted.lens.sae, fitted.lens.probes), spec=fitted.spec(strength))
    if len(wanted) == 1:
        return edit
    draw = ClassDraw(fitted.attribute, fitted.record.target, fitted.options.draw_seed)
    return ClassFeatureEdit(edit, tuple(wanted), draw, edit.spec, edit.sampler, edit.window)


def attribute_draws(task: Task, score: Callable[[torch.Tensor], Attribution]) -> Attribution:
    """``score(h)`` of every batch of the task's draws, averaged over images; the worst completeness gap."""
    drawing, reading = task.parts(len(task.draws.plan()))
    return average_attributions(task.draws.batches(drawing), score, reading)


def average_attributions(
    batches: tuple[Drawn, ...], score: Callable[[torch.Tensor], Attribution], progress: Progress
) -> Attribution:
    """The same for batches at hand."""
    total: np.ndarray | None = None
    parts: list[Attribution] = []
    for batch in progress.each(batches):
        parts.append(score(batch.h))
        scaled = parts[-1].scores.astype(np.float64) * len(batch.seeds)
        total = scaled if total is None else total + scaled
    n = sum(len(batch.seeds) for batch in batches)
    assert total is not None
    gap = max(part.completeness_gap for part in parts)
    return replace(parts[0], scores=(total / n).astype(np.float32), completeness_gap=gap, n_images=n)


def learn_attribution(task: Task) -> Learned:
    """Nothing for the shipped attribution; else integrated gradients on the task's images, once for all who ask."""
    name = task.attribute.name
    if task.options.attribution == "shipped":
        if name not in task.lens.attributions:
            raise LensError(f"This lens ships no attribution for {name}; fit it with one.")
        return Learned(notes={"attribution": "shipped with the lens; its fitting time is not counted"})
    score = partial(integrated_gradients, task.lens.sae, task.probe)
    found = task.draws.once(("integrated gradients", name), partial(attribute_draws, task, score))
    return Learned({"scores": torch.from_numpy(found.scores)}, {"completeness_gap": found.completeness_gap})


def attribution_of(fitted: Fitted) -> Attribution:
    """The attribution that a method with ``AttributedOptions`` ranks features by."""
    if fitted.options.attribution == "shipped":
        return fitted.lens.attributions[fitted.record.attribute]
    return rebuild(fitted, "integrated_gradients")


def rebuild(fitted: Fitted, method: str) -> Attribution:
    """The attribution that a fit stored as the tensor ``scores``."""
    if "scores" not in fitted.tensors:
        raise LensError(f"{fitted.method.name} has no stored scores; fit it again.")
    return Attribution(
        scores=fitted.tensors["scores"].numpy(),
        completeness_gap=float(fitted.record.notes["completeness_gap"]),
        attribute=fitted.attribute,
        method=method,
        baseline="zero",
        sae_id=fitted.lens.sae.sae_id,
        n_images=len(fitted.record.seeds),
    )
