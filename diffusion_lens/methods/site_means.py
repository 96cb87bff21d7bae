"""Class means at several sites at once: the mean-difference direction, wherever an attribute is decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import EditSpec, GenerationRequest, LensError
from diffusion_lens.methods.draws import Drawn, check_examples, examples, mean_differences
from diffusion_lens.methods.edits import ClassDraw, NoEdit, RequestEdit, WeightEdit
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Task
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.hooks import intercept
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.model.samplers import scaled_input
from diffusion_lens.model.sites import Port, Site

TIMES, PREFIX = "times", "site|"


class SiteMeansOptions(MethodOptions):
    """Where the means are taken and added."""

    sites: str = Field("", title="Sites", description="Names with commas between them; empty: the lens's own site.")


class SiteMeans(Method):
    """One direction per class, step and site."""

    key = "site-means"
    name = "Class means at sites"
    kind = "direction per step"
    source = "after Kwon et al. 2023 (mean differences of h), at several sites; our combination"
    explanation = (
        "The mean activation of a class's images minus that of the others, at every step, added on the way: Latent "
        "Editing's mean-difference form without its asymmetric process, at as many places of the model as are named. "
        "Where an attribute is decided at a layer that the lens does not read, this steers it there; the scan of sites "
        "says where that is. Classes are read with the lens's probe. Each image is given a class drawn from the target "
        "shares (our combination, after Kwon et al., ICLR 2023)."
    )
    options = SiteMeansOptions
    strengths = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)

    def learn(self, task: Task) -> Learned:
        """``site|name [class, step, c, y, x]`` for every site, and the timesteps."""
        model, ports = task.model, ports_of(task.model, task.options.sites)
        drawing, reading = task.parts(len(task.draws.plan()) * task.draws.n_steps)
        read = list(examples(task.draws.batches(drawing), task.probe))
        counts = torch.zeros(len(task.shares), dtype=torch.int64)
        total: dict[str, Tensor] = {}
        for (batch, labels), bar in zip(read, reading.parts(len(read)), strict=True):
            counts += torch.bincount(torch.from_numpy(labels), minlength=len(counts))
            for name, sums in class_sums(task, batch, torch.from_numpy(labels), ports, bar).items():
                total[name] = total.get(name, torch.zeros_like(sums)) + sums
        check_examples(counts.numpy(), task.attribute, task.wanted)
        tensors = {}
        for name, sums in total.items():
            means = sums / counts.clamp_min(1).reshape(-1, 1, 1, 1, 1)
            tensors[PREFIX + name] = mean_differences(means, counts.numpy())
        times = model.scheduler(task.draws.n_steps).timesteps.float()
        return Learned({**tensors, TIMES: times}, {"examples": counts.tolist(), "sites": list(total)})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """``h + strength · d`` at every site, ``d`` of the class drawn for the image."""
        spec = fitted.spec(strength)
        if strength == 0:
            return NoEdit(spec)
        draw = ClassDraw(fitted.attribute, fitted.record.target, fitted.options.draw_seed)
        return RequestEdit(partial(_for_batch, fitted, draw, strength, spec), spec)


def ports_of(model: DiffusionModel, names: str) -> dict[str, Port]:
    """Site name → the site found in the model, the lens's own where none is named; raises ``LensError`` for others."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or [model.site.name]
    modules = dict(model.denoiser.named_modules())
    for name in wanted:
        if Site.parse(name).module not in modules:
            known = ", ".join(site.name for site in model.family.sites(model.denoiser)[:6])
            raise LensError(f"The model has no site '{name}'; some that it has: {known}.")
    return {name: model.family.port(model, Site.parse(name)) for name in dict.fromkeys(wanted)}


@torch.no_grad()
def class_sums(
    task: Task, batch: Drawn, labels: Tensor, ports: Mapping[str, Port], progress: Progress
) -> dict[str, Tensor]:
    """Site → activations summed per class, ``[class, step, c, y, x]``, of one batch's recorded states, unguided."""
    model, n_steps = task.model, task.draws.n_steps
    conditioning = model.condition(batch.prompt, len(batch.seeds), 1.0)
    scheduler = model.scheduler(n_steps)
    of_class = torch.nn.functional.one_hot(labels, len(task.shares)).float()
    total: dict[str, Tensor] = {}
    for step in progress.each(range(n_steps)):
        seen: dict[str, Tensor] = {}
        with model.lock, ExitStack() as stack:
            for name, port in ports.items():
                stack.enter_context(intercept(port, partial(_keep, seen, name)))
            t = scheduler.timesteps[step]
            x = scaled_input(scheduler, batch.states[step].to(model.device), t)
            model.predict(x, t, conditioning)
        for name, h in seen.items():
            sums = torch.einsum("nk,n...->k...", of_class, h.float().cpu())
            table = total.setdefault(name, torch.zeros(sums.shape[0], n_steps, *sums.shape[1:]))
            table[:, step] = sums
    return total


def _keep(seen: dict[str, Tensor], name: str, h: Tensor, _: Tensor | None) -> None:
    seen[name] = h


def _for_batch(
    fitted: Fitted, draw: ClassDraw, strength: float, spec: EditSpec, request: GenerationRequest
) -> WeightEdit:
    model = fitted.lens.model
    if model.condition(request.prompt, 1, request.guidance_scale).apart is not None:
        raise LensError(f"{fitted.method.name} cannot steer a model that is called twice a step; draw unguided.")
    rows = draw.rows(request.seeds)
    names = [name for name in fitted.tensors if name.startswith(PREFIX)]
    tables = {name.removeprefix(PREFIX): strength * fitted.tensors[name][rows] for name in names}
    return WeightEdit(partial(moved, tables=tables, times=fitted.tensors[TIMES]), spec)


@contextmanager
def moved(model: DiffusionModel, *, tables: Mapping[str, Tensor], times: Tensor) -> Iterator[None]:
    """Add ``tables[site] [n, step, c, y, x]`` at every site, in the half of a batch that has the prompt.

    The step is the one whose timestep (``times [step]``) is nearest to the model's own.
    """
    now = [0]

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        now[0] = int((times - float(torch.as_tensor(t).flatten()[0])).abs().argmin())

    def add(table: Tensor, h: Tensor, _: Tensor | None) -> Tensor:
        n, delta = len(table), table[:, now[0]].to(h)
        if len(h) == n:
            return h + delta
        own = slice(0, n) if model.family.conditional_first else slice(len(h) - n, None)
        whole = h.clone()
        whole[own] = h[own] + delta
        return whole

    handle = model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with ExitStack() as stack:
            for name, table in tables.items():
                stack.enter_context(intercept(model.family.port(model, Site.parse(name)), partial(add, table)))
            yield
    finally:
        handle.remove()
