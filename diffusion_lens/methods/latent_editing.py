"""Latent Editing: Asyrp's Δh_t (Kwon et al., Diffusion Models Already Have a Semantic Latent Space, ICLR 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.methods.draws import Drawn, check_examples, class_means, mean_differences
from diffusion_lens.methods.edits import ClassDraw, DirectionEdit
from diffusion_lens.methods.noise import denoised, frozen, need_ddim
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Preset, Task
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.hooks import edit_output
from diffusion_lens.model.pipelines import DiffusionModel


class LatentEditingOptions(MethodOptions):
    """How Δh_t is found, and how long it acts."""

    form: Literal["mean difference", "learned"] = Field("mean difference", title="Form")
    t_edit: int = Field(500, ge=0, title="t_edit", description="Timesteps from the start down to this one are edited.")
    keep: float = Field(3.0, ge=0, title="L1 weight", description="Of the predicted image's change (learned form).")
    iterations: int = Field(20, ge=1, le=5_000, title="Iterations", description="Per step (learned form).")
    batch_size: int = Field(8, ge=1, le=256, title="Batch size", description="Learned form.")
    lr: float = Field(0.05, gt=0, title="Learning rate", description="Of Adam (learned form).")
    seed: int = Field(0, ge=0, title="Seed of the training", description="Learned form.")


def edit_window(model: DiffusionModel, n_steps: int, t_edit: int) -> tuple[int, int]:
    """Half-open range of the steps whose timestep is ``t_edit`` or above; at least the first one."""
    times = [int(t) for t in model.scheduler(n_steps).timesteps]
    return 0, max(1, sum(t >= t_edit for t in times))


class LatentEditing(Method):
    """Δh per step, asymmetric."""

    key = "latent-editing"
    name = "Latent Editing (Asyrp)"
    kind = "direction per step"
    source = "Kwon et al. 2023, Diffusion Models Already Have a Semantic Latent Space, ICLR"
    explanation = (
        "Adds Δh_t to the bottleneck, a vector for every step, and lets it move the predicted image alone while the "
        "direction to the next latent stays unedited: the asymmetric reverse process. Acts from pure noise down to "
        "t_edit. Δh_t is the mean bottleneck of a class minus that of the others, or is learned; there the lens's "
        "probe takes the place of the paper's CLIP loss, beside the same L1 on the predicted image, which is our "
        "working form. The paper's noise boost near the end is left out, so that every method here shares one sampler "
        "(Kwon et al., ICLR 2023)."
    )
    options = LatentEditingOptions
    presets: ClassVar[Mapping[str, Preset]] = {
        "as published": Preset(
            {"form": "learned", "t_edit": 500, "keep": 3.0},
            "Δh learned per step beside 3 · L1; the lens's probe stands for CLIP, and the noise boost is left out.",
        ),
    }
    strengths = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)

    def learn(self, task: Task) -> Learned:
        """``directions [class, step, c, y, x]``."""
        need_ddim(task.model, self.name)
        if task.options.form == "mean difference":
            means, counts = class_means(task.draws.batches(task.progress), task.probe)
            check_examples(counts, task.attribute, task.wanted)
            return Learned({"directions": mean_differences(means, counts)}, {"examples": counts.tolist()})
        first, stop = edit_window(task.model, task.draws.n_steps, task.options.t_edit)
        wanted = [(label, step) for label in task.wanted for step in range(first, stop)]
        drawing, training = task.parts(task.options.iterations * len(wanted))
        batches = task.draws.batches(drawing)
        directions = torch.zeros(len(task.shares), task.draws.n_steps, *task.model.hook_shape)
        for (label, step), part in zip(wanted, training.parts(len(wanted)), strict=True):
            directions[label, step] = train_delta(task, batches, label, step, part).cpu()
        return Learned({"directions": directions})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """``h + strength · Δh_t`` down to t_edit; refuses models that do not sample with DDIM."""
        model = fitted.lens.model
        need_ddim(model, self.name)
        directions = fitted.tensors["directions"]
        if directions.ndim != 5:
            raise LensError(f"The directions of {self.name} are damaged; fit it again.")
        draw = ClassDraw(fitted.attribute, fitted.record.target, fitted.options.draw_seed)
        window = edit_window(model, directions.shape[1], fitted.options.t_edit)
        return DirectionEdit(directions, strength, draw, "asymmetric", window, fitted.spec(strength))


def train_delta(task: Task, batches: tuple[Drawn, ...], label: int, step: int, progress: Progress) -> Tensor:
    """``argmin_Δ −log p(label | h + Δ) + keep · |x0(h + Δ) − x0(h)|₁`` at one step of recorded runs → ``[c, y, x]``."""
    model, options = task.model, task.options
    scheduler = model.scheduler(task.draws.n_steps)
    t = scheduler.timesteps[step]
    generator = torch.Generator().manual_seed(options.seed + step)
    with model.lock, frozen(model.denoiser), torch.enable_grad():
        delta = torch.zeros(model.hook_shape, device=model.device, dtype=model.dtype, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=options.lr)
        for _ in progress.each(range(options.iterations)):
            batch = batches[int(torch.randint(len(batches), (1,), generator=generator))]
            rows = torch.randint(len(batch.seeds), (min(options.batch_size, len(batch.seeds)),), generator=generator)
            x, h = batch.states[step][rows].to(model.device), batch.h[rows, step].to(model.device, model.dtype)
            conditioning = model.condition(batch.prompt, len(rows), 1.0)
            with torch.no_grad():
                source = denoised(scheduler, model.predict(x, t, conditioning), x, t)[0]
            with edit_output(model.port, lambda own: own + delta):
                moved = denoised(scheduler, model.predict(x, t, conditioning), x, t)[0]
            wanted = torch.full((len(rows),), label, device=model.device)
            read = F.cross_entropy(task.probe.logits(h + delta, step) / task.probe.temperature, wanted)
            loss = read + options.keep * (moved - source).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return delta.detach()
