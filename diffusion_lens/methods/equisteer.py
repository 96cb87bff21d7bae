"""EquiSteer-style: directions in the output of cross-attention, orthogonalised, taken out and put back evenly.

From the published facts alone (EquiSteer, ECCV 2026; its code has no licence and was not used): our working form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, EditSpec, GenerationRequest, LensError
from diffusion_lens.methods.edits import ClassDraw, NoEdit, RequestEdit, WeightEdit
from diffusion_lens.methods.prompts import name_class
from diffusion_lens.methods.protocol import SINCE_0_5, Fitted, Learned, Method, MethodOptions, Task
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import DiffusionModel

CROSS = "attn2"
TIMES, SEPARATOR = "times", "|"
Touch = Callable[[str, int, Tensor], Tensor | None]
"""Sees (layer, step row, its output ``[m, tokens, c]``); what it returns takes the output's place."""


class EquiSteerOptions(MethodOptions):
    """How many images a direction is found on, and whether explicit prompts are left alone."""

    gate: bool = Field(
        True,
        title="Leave explicit prompts alone",
        description="Prompts that name a class themselves are not edited; part of the method.",
        json_schema_extra=SINCE_0_5,
    )
    n_named: int = Field(24, ge=2, le=1_000, title="Images per class", description="Of the prompt with the class said.")
    orthogonal: bool = Field(
        True, title="Orthogonalised", description="Without what the directions of the lens's other attributes share."
    )


class EquiSteer(Method):
    """Cross-attention directions, orthogonalised and re-injected."""

    key = "equisteer"
    name = "EquiSteer-style"
    kind = "direction per step"
    source = "EquiSteer, ECCV 2026 (its published facts alone)"
    explanation = (
        "In every cross-attention layer and at every step, a class's direction is the mean output of the prompt with "
        "the class said, minus that of the other classes, made orthogonal to the directions of the lens's other "
        "attributes. While an image is drawn, what its outputs hold along the direction is taken out and the level of "
        "the class drawn for it is put back; a gate leaves prompts that name a class alone. Strength 1 exchanges the "
        "level, more goes beyond it. Means over tokens, Gram–Schmidt over all other classes and one level per step are "
        "our working form; the source was read as a description, not as code (EquiSteer, ECCV 2026)."
    )
    options = EquiSteerOptions
    strengths = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)

    def learn(self, task: Task) -> Learned:
        """``direction|layer [class, step, c]`` of unit length, ``level|layer [class, step]`` along it, timesteps."""
        model = task.model
        need_text_unet(model, self.name)
        others = [
            p.attribute
            for name, p in task.lens.probes.items()
            if name != task.attribute.name and sayable(task, p.attribute)
        ]
        wanted = [task.attribute, *(others if task.options.orthogonal else ())]
        n_classes = sum(len(a.classes) for a in wanted)
        found: dict[str, dict[str, Tensor]] = {}
        bars = iter(task.progress.parts(n_classes))
        for attribute in wanted:
            found[attribute.name] = class_outputs(task, attribute, bars)
        tensors: dict[str, Tensor] = {}
        for layer, means in found[task.attribute.name].items():
            rest = [d for a in others if a.name in found for d in directions(found[a.name][layer])]
            pure = orthogonal(directions(means), rest)
            tensors[f"direction{SEPARATOR}{layer}"] = pure
            tensors[f"level{SEPARATOR}{layer}"] = (means * pure).sum(-1)
        times = model.scheduler(task.draws.n_steps).timesteps.float()
        held = [a.name for a in others if a.name in found]
        return Learned({**tensors, TIMES: times}, {"layers": len(found[task.attribute.name]), "orthogonal to": held})

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Each image's outputs moved to the level of the class drawn for it, ``strength`` of the way."""
        spec = fitted.spec(strength)
        if strength == 0:
            return NoEdit(spec)
        draw = ClassDraw(fitted.attribute, fitted.record.target, fitted.options.draw_seed)
        return RequestEdit(partial(_for_batch, fitted, draw, strength, spec), spec)


def need_text_unet(model: DiffusionModel, name: str) -> None:
    """Raise ``LensError`` for models that are told nothing, or through other layers than a U-Net's cross-attention."""
    if not isinstance(model.denoiser, UNet2DConditionModel):
        raise LensError(f"{name} acts on what a U-Net is told of a prompt; this model takes no prompt, or is no U-Net.")


def sayable(task: Task, attribute: Attribute) -> bool:
    """Whether the model can be told every class of an attribute under every prompt of the fit."""
    try:
        for prompt in task.draws.prompts:
            for label in attribute.classes:
                task.model.check_prompt(name_class(prompt, attribute, label))
    except LensError:
        return False
    return True


def directions(means: Tensor) -> Tensor:
    """``mean of a class − mean of the others`` for ``means [class, …]``, the same shape."""
    n = len(means)
    return (means - means.mean(0)) * n / (n - 1)


def orthogonal(wanted: Tensor, others: Sequence[Tensor]) -> Tensor:
    """``wanted [class, step, c]`` without what lies in the span of ``others`` (each ``[step, c]``), of unit length."""
    kept = wanted.double()
    if others:
        basis = torch.stack(list(others), dim=1).double()  # [step, m, c]
        # A basis of the span by SVD: of C class means C − 1 differences are independent.
        _, size, rows = torch.linalg.svd(basis, full_matrices=False)
        rows = rows * (size > 1e-6 * size.max(dim=1, keepdim=True).values)[..., None]
        kept = kept - torch.einsum("nsc,smc,smd->nsd", kept, rows, rows)
    return (kept / kept.norm(dim=-1, keepdim=True).clamp_min(1e-12)).to(wanted.dtype)


def class_outputs(task: Task, attribute: Attribute, bars: Iterator[Progress]) -> dict[str, Tensor]:
    """Layer → mean cross-attention output ``[class, step, c]`` under the fit's prompts with each class said."""
    found: dict[str, list[Tensor]] = {}
    for label in attribute.classes:
        for layer, mean in named_outputs(task, attribute, label, next(bars)).items():
            found.setdefault(layer, []).append(mean)
    return {layer: torch.stack(means) for layer, means in found.items()}


def named_outputs(task: Task, attribute: Attribute, label: str, progress: Progress) -> dict[str, Tensor]:
    """Layer → mean output over images and tokens, ``[step, c]``, of the prompts with one class said."""
    draws, model = task.draws, task.model
    total: dict[str, Tensor] = {}
    count = 0
    seeds = draws.seeds[: task.options.n_named]
    for place, bar in enumerate(progress.parts(len(draws.prompts))):
        own = seeds[place :: len(draws.prompts)]
        if not own:
            continue
        prompt = name_class(draws.prompts[place], attribute, label)
        wanted = request(model, prompt, own, draws.n_steps, draws.guidance_scale)

        def add(layer: str, step: int, output: Tensor, n: int = len(own)) -> None:
            table = total.setdefault(layer, torch.zeros(draws.n_steps, output.shape[-1]))
            table[step] += output[-n:].mean(1).sum(0).cpu()

        times = model.scheduler(draws.n_steps).timesteps.float()
        edit = WeightEdit(partial(touched, times=times, touch=add), EditSpec.of_custom("read cross-attention", 0.0, {}))
        generate(model, wanted, edit=edit, batch_size=len(own), progress=bar)
        count += len(own)
    return {layer: table / count for layer, table in total.items()}


def cross_layers(model: DiffusionModel) -> dict[str, nn.Module]:
    """Name → cross-attention layer of the U-Net."""
    return {
        name: module for name, module in model.denoiser.named_modules() if name.endswith(CROSS) and module is not None
    }


@contextmanager
def touched(
    model: DiffusionModel, *, times: Tensor, touch: Touch | Callable[[str, int, Tensor], None]
) -> Iterator[None]:
    """Show every cross-attention layer's output to ``touch`` while the U-Net runs; see ``Touch``.

    The step is the one whose timestep (``times [step]``) is nearest to the U-Net's own.
    """
    now = [0]

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        now[0] = int((times - float(torch.as_tensor(t).flatten()[0])).abs().argmin())

    def hook(name: str, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return touch(name, now[0], output)

    handles = [model.denoiser.register_forward_pre_hook(look, with_kwargs=True)]
    try:
        for name, layer in cross_layers(model).items():
            handles.append(layer.register_forward_hook(partial(hook, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def reinject(output: Tensor, direction: Tensor, level: Tensor, strength: float) -> Tensor:
    """``o + strength · (level − o·u) u`` for ``output [n, tokens, c]``, unit ``direction [n, c]``, ``level [n]``."""
    u = direction[:, None]
    along = (output * u).sum(-1, keepdim=True)
    return output + strength * (level[:, None, None] - along) * u


def _for_batch(
    fitted: Fitted, draw: ClassDraw, strength: float, spec: EditSpec, request: GenerationRequest
) -> WeightEdit:
    rows = draw.rows(request.seeds)
    tables = _tables(fitted.tensors)

    def move(layer: str, step: int, output: Tensor) -> Tensor | None:
        if layer not in tables:
            return None
        direction, level = (table[rows, step].to(output) for table in tables[layer])
        n = len(rows)
        moved = reinject(output[-n:], direction, level, strength)
        return torch.cat([output[:-n], moved]) if len(output) > n else moved

    return WeightEdit(partial(touched, times=fitted.tensors[TIMES], touch=move), spec)


def _tables(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    layers = [name.partition(SEPARATOR)[2] for name in tensors if name.startswith(f"direction{SEPARATOR}")]
    return {n: (tensors[f"direction{SEPARATOR}{n}"], tensors[f"level{SEPARATOR}{n}"]) for n in layers}
