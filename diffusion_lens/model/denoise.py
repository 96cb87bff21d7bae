"""One batch, from noise (or from a recorded step) to images, with one module read and edited on the way.

This is the inside of ``generate``; its types (``Edit``, ``StepContext``, ``Capture``, ``Trajectory``) are what the
other modules speak. Under classifier-free guidance only the conditional half is read and edited.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.types import Activations, EditSpec, Generation, GenerationRequest, LensError, Sampler
from diffusion_lens.model.families.base import Conditioning
from diffusion_lens.model.hooks import PerImage, UpPath, intercept
from diffusion_lens.model.pipelines import DiffusionModel, at_site, seed_generators
from diffusion_lens.model.samplers import flow_shift, is_flow, scaled_input, signal_share
from diffusion_lens.model.sites import Port


@dataclass(frozen=True)
class StepContext:
    """Where an edit stands: step ``index`` of ``n_steps`` and everything known there.

    Attributes:
        timestep: the scheduler's timestep; ``alpha_bar`` its cumulative signal share.
        seeds: one per row of ``h``.
        h_in: the hooked module's input ``[n, c, y, x]``, ``None`` where that is no map.
        latents: the noisy latents ``[n, c, y, x]`` at this step.
    """

    index: int
    n_steps: int
    timestep: int
    seeds: tuple[int, ...]
    h_in: Tensor | None
    alpha_bar: float
    latents: Tensor


class Edit(Protocol):
    """A change of the bottleneck. ``spec`` is the same as data: provenance and cache key.

    An edit may also have ``model_context``, a callable ``DiffusionModel -> context manager`` for edits of weights;
    it is entered once per batch; ``prompts``, a callable ``GenerationRequest -> one prompt per image``, for edits of
    what each image is told; ``for_request``, a callable ``GenerationRequest -> Edit``, for edits that depend on the
    prompt or the seeds of a batch; and ``parts``, site → edit, for edits of several sites in one pass. Runs happen in
    inference mode: an edit that needs gradients opens ``torch.inference_mode(False)`` and ``torch.enable_grad()`` and
    clones ``h`` there.
    """

    @property
    def sampler(self) -> Sampler:
        """``symmetric`` edits the whole prediction, ``asymmetric`` the predicted x0 alone."""
        ...

    @property
    def window(self) -> tuple[int, int] | None:
        """Half-open range of edited step indices; ``None`` is every step."""
        ...

    @property
    def spec(self) -> EditSpec:
        """Everything that decides what the edit does."""
        ...

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``; pure, and row ``i`` depends on row ``i`` alone."""
        ...


@dataclass(frozen=True)
class Capture:
    """Which steps' activations to keep (``None``: all), as ``float16`` or ``float32``. Read before any edit."""

    steps: tuple[int, ...] | None = None
    dtype: Any = np.float16

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it; raises ``LensError`` for any but float16 and float32."""
        known = {"float16": torch.float16, "float32": torch.float32}
        name = np.dtype(self.dtype).name
        if name not in known:
            raise LensError(f"Activations are kept as float16 or float32, not {name}.")
        return known[name]

    def indices(self, n_steps: int) -> tuple[int, ...]:
        """The steps kept, rising; raises ``LensError`` for one outside the run."""
        steps = tuple(range(n_steps)) if self.steps is None else tuple(sorted(set(self.steps)))
        if not steps or steps[0] < 0 or steps[-1] >= n_steps:
            raise LensError(f"Captured steps must lie between 0 and {n_steps - 1}; got {list(steps)}.")
        return steps


Keep = Callable[[int, Tensor, list[torch.Generator]], None]
"""Called before every step with its index, the latents and the noise generators."""

OnLatents = Callable[[GenerationRequest, Tensor], None]
"""Called once per batch with its request and final latents ``[n, c, y, x]``, before they are decoded; may raise."""


@dataclass(frozen=True)
class Trajectory:
    """An unedited run that edited ones restart from.

    Attributes:
        generation: the unedited images, and activations where they were captured.
        latents: step index → latents ``[n, c, y, x]`` before that step, on the CPU.
        generator_states: step index → the noise generators' states, for samplers that draw noise at every step.
    """

    generation: Generation
    latents: dict[int, Tensor]
    generator_states: dict[int, tuple[Tensor, ...]]

    def before(self, step: int) -> int | None:
        """The latest recorded step that is not after ``step``; ``None`` where there is none."""
        return max((s for s in self.latents if s <= step), default=None)

    def rows(self, request: GenerationRequest) -> list[int]:
        """This trajectory's rows for the request's seeds; raises ``LensError`` where it is another run's."""
        mine = self.generation.request
        row = {seed: i for i, seed in enumerate(mine.seeds)}
        if replace(mine, seeds=request.seeds) != request or not set(request.seeds) <= row.keys():
            raise LensError("This trajectory belongs to another request; record one for this prompt, model and seeds.")
        return [row[seed] for seed in request.seeds]


@dataclass
class _Stats:
    """Sums over edited rows of ``|h'| / |h|``, kept on the device so that no step waits for it."""

    total: Tensor | float = 0.0
    count: Tensor | float = 0.0

    def add(self, h: Tensor, edited: Tensor, changed: Tensor) -> None:
        ratio = edited.flatten(1).float().norm(dim=1) / h.flatten(1).float().norm(dim=1).clamp_min(1e-12)
        self.total = self.total + (ratio * changed).sum()
        self.count = self.count + changed.sum()

    @property
    def mean(self) -> float | None:
        return float(self.total) / float(self.count) if float(self.count) else None


@dataclass
class BatchRun:
    """One batch, from noise or from the recorded step ``first`` of ``start``."""

    model: DiffusionModel
    request: GenerationRequest
    edit: Edit | None = None
    capture: Capture | None = None
    start: Trajectory | None = None
    first: int = 0
    stats: _Stats = field(default_factory=_Stats)
    kept: list[Tensor] = field(default_factory=list)

    def draw(
        self, on_step: Callable[[int], None], keep: Keep | None = None, on_latents: OnLatents | None = None
    ) -> Generation:
        """Run all steps and decode. ``on_step(done)`` may raise; ``keep`` sees the latents before every step."""
        model, edit = self.model, self.edit
        context = getattr(edit, "model_context", None)
        with ExitStack() as stack:
            self._hold(stack)
            if context is not None:
                # Nobody else may use these weights meanwhile, nor the prompts they encode.
                stack.enter_context(model.lock)
                model.forget_prompts()
                stack.callback(model.forget_prompts)
                stack.enter_context(context(model))
            latents, scheduler = self._walk(self.request.n_steps, on_step, keep)
            if on_latents is not None:
                on_latents(self.request, latents)
            decoded = model.decode_checked(latents, len(self.request.seeds))
        activations = None if self.capture is None else self._activations(scheduler, self.capture)
        spec = None if edit is None else edit.spec
        return Generation(decoded.images, self.request, spec, activations, self.stats.mean, decoded.faults)

    def read(self, on_step: Callable[[int], None]) -> Activations:
        """Run to the last captured step and no further; nothing is decoded. Needs a ``capture``."""
        capture = self.capture or Capture()
        self.capture = capture
        with ExitStack() as stack:
            self._hold(stack)
            _, scheduler = self._walk(capture.indices(self.request.n_steps)[-1] + 1, on_step, None)
        return self._activations(scheduler, capture)

    def _hold(self, stack: ExitStack) -> None:
        """Keep other threads from moving an offloaded model's parts away during this run."""
        if self.model.offloaded:
            stack.enter_context(self.model.lock)
            stack.callback(self.model.pipeline.maybe_free_model_hooks)

    def _walk(self, stop: int, on_step: Callable[[int], None], keep: Keep | None) -> tuple[Tensor, Any]:
        model, request = self.model, self.request
        scheduler = model.scheduler(request.n_steps)
        conditioning = self._conditioning()
        latents, generators = self._begin(scheduler)
        with torch.inference_mode():
            for index in range(self.first, stop):
                if keep is not None:
                    keep(index, latents, generators)
                latents = self._step(index, latents, scheduler, conditioning, generators)
                on_step(index - self.first + 1)
        return latents, scheduler

    def _conditioning(self) -> Conditioning:
        request = self.request
        prompts = getattr(self.edit, "prompts", None)
        if prompts is None:
            return self.model.condition(request.prompt, len(request.seeds), request.guidance_scale)
        return condition_each(self.model, prompts(request), request.guidance_scale)

    def _begin(self, scheduler: Any) -> tuple[Tensor, list[torch.Generator]]:
        generators = seed_generators(self.request.seeds)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.first)
        if self.start is None:
            noise = self.model.noise(self.request.seeds, generators)
            return noise * getattr(scheduler, "init_noise_sigma", 1.0), generators
        rows = self.start.rows(self.request)
        states = self.start.generator_states.get(self.first)
        if states is not None:
            for generator, row in zip(generators, rows, strict=True):
                generator.set_state(states[row])
        return self.start.latents[self.first][rows].to(self.model.device), generators

    def _step(
        self, index: int, latents: Tensor, scheduler: Any, conditioning: Conditioning, generators: list[torch.Generator]
    ) -> Tensor:
        t = scheduler.timesteps[index]
        scaled = scaled_input(scheduler, latents, t)
        keeping = self.capture is not None and index in self.capture.indices(self.request.n_steps)
        editing = [(port, edit) for port, edit in self.places if _acts(edit, index)]
        edited: tuple[Tensor, Tensor] | None = None
        with self.model.lock:  # other threads' hooks must not see this forward, nor these hooks theirs
            if editing or keeping:
                share = signal_share(scheduler, index)
                at = _At(self, index, share, latents, round(float(t)), conditioning.own)
                prediction, edited = _hooked_predict(at, editing, keeping, scaled, t, conditioning)
            else:
                prediction = self.model.predict(scaled, t, conditioning)
        guided = self.model.guide(prediction, conditioning, self.request.guidance_scale)
        previous = scheduler.step(guided, t, latents, **_step_kwargs(scheduler, generators))
        if edited is None:
            return previous.prev_sample
        rows, output = edited
        if conditioning.guided:
            both = torch.cat([prediction[: conditioning.n][rows], output])
            output = self.model.guide(both, replace(conditioning, n=len(rows)), self.request.guidance_scale)
        if is_flow(scheduler):
            shift = flow_shift(scheduler, index, guided[rows], output)
        else:
            shift = _ddim_shift(scheduler, t, latents[rows], previous.pred_original_sample[rows], output)
        return previous.prev_sample.index_add(0, rows, shift.to(previous.prev_sample.dtype))

    @cached_property
    def places(self) -> list[tuple[Port, Edit]]:
        """Where the edit acts, and what it does there: at the model's own site, or at each of several."""
        if self.edit is None:
            return []
        model = self.model
        return [
            (model.port if site == model.hook_name else at_site(model, site).port, edit)
            for site, edit in parts_of(self.edit, model).items()
        ]

    def _activations(self, scheduler: Any, capture: Capture) -> Activations:
        h = torch.stack(self.kept, dim=1).cpu().numpy()
        times = tuple(round(float(scheduler.timesteps[i])) for i in capture.indices(self.request.n_steps))
        return Activations(h, times, self.request.seeds, self.model.hook_name)


def parts_of(edit: Edit, model: DiffusionModel) -> dict[str, Edit]:
    """Site → edit, of an edit of several sites (``parts``) or of one of the model's own."""
    return dict(getattr(edit, "parts", None) or {model.hook_name: edit})


def _acts(edit: Edit, index: int) -> bool:
    return edit.window is None or edit.window[0] <= index < edit.window[1]


@dataclass(frozen=True)
class _At:
    """One step of a run: what an edit is told there. ``own``: the rows of the half with the prompt."""

    run: BatchRun
    index: int
    alpha_bar: float
    latents: Tensor
    timestep: int
    own: slice

    def edited(self, edit: Edit, h: Tensor, h_in: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """What ``edit`` makes of ``h`` of all images, or of some ``rows``."""
        request, seeds, latents = self.run.request, self.run.request.seeds, self.latents
        if rows is not None:
            seeds, latents = tuple(seeds[int(i)] for i in rows), latents[rows]
        context = StepContext(self.index, request.n_steps, self.timestep, seeds, h_in, self.alpha_bar, latents)
        made = edit.apply(h, context).to(h.dtype)
        if made.shape != h.shape:
            raise LensError(f"An edit must keep the shape {tuple(h.shape)}; it returned {tuple(made.shape)}.")
        return made


@dataclass
class _Reader:
    """Sees one site once in a step: keeps ``h``, edits it now (symmetric) or for later (asymmetric)."""

    at: _At
    edit: Edit | None
    keeping: bool
    made: Tensor | None = None
    changed: Tensor | None = None

    def __call__(self, h: Tensor, h_in: Tensor | None) -> Tensor | None:
        run, own = self.at.run, self.at.own
        half, half_in = h[own], None if h_in is None else h_in[own]
        if self.keeping and run.capture is not None:
            run.kept.append(half.to(run.capture.torch_dtype, copy=True))
        if self.edit is None:
            return None
        edited = self.at.edited(self.edit, half, half_in)
        changed = (edited != half).flatten(1).any(1)
        run.stats.add(half, edited, changed)
        if self.edit.sampler == "asymmetric":
            self.made, self.changed = edited, changed
            return None
        if len(h) == len(edited):
            return edited
        return torch.cat([edited, h[len(edited) :]] if own.start == 0 else [h[: -len(edited)], edited])


def _hooked_predict(
    at: _At,
    editing: Sequence[tuple[Port, Edit]],
    keeping: bool,
    scaled: Tensor,
    t: Tensor,
    conditioning: Conditioning,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The model's prediction with the hooks in place and, for an asymmetric edit that changed something, the edited
    conditional prediction as (row numbers, rows).

    Rows that the edit left as they were are not run again: they stay bit-identical and cost nothing.
    """
    model, n = at.run.model, conditioning.n
    readers = [(port, _Reader(at, edit, keeping and port.site == model.site)) for port, edit in editing]
    if keeping and not any(reader.keeping for _, reader in readers):
        readers.append((model.port, _Reader(at, None, True)))
    later = [(port, edit) for port, edit in editing if edit.sampler == "asymmetric"]
    # One edit of the bottleneck needs the part above it alone.
    alone = len(later) == 1 and later[0][0].site == model.site and UpPath.supports(model.denoiser, model.hook_name)
    path = UpPath(model.denoiser) if alone else None

    @contextmanager
    def watch() -> Iterator[None]:
        with ExitStack() as stack:
            if path is not None:
                stack.enter_context(path.record())
            for port, reader in readers:
                stack.enter_context(intercept(port, reader))
            yield

    prediction = model.predict(scaled, t, conditioning, watch())
    changed = [reader.changed for _, reader in readers if reader.changed is not None]
    if not changed:
        return prediction, None
    rows = torch.stack(changed).any(0).nonzero().squeeze(1)
    if not len(rows):
        return prediction, None
    if path is not None:
        made = next(reader.made for _, reader in readers if reader.made is not None)
        offset = conditioning.own.start or 0
        output = path.replay(made[rows], slice(offset, None) if len(rows) == n else rows + offset)
        return prediction, (rows, model.family.prediction_channels(model, output))
    with ExitStack() as stack:
        for port, reader in readers:
            if reader.made is not None:
                stack.enter_context(intercept(port, _again(reader, rows, first=len(changed) == 1)))
        return prediction, (rows, model.family.forward(model, scaled[rows], t, conditioning.conditional(rows)))


def _again(reader: _Reader, rows: Tensor, *, first: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What a site gets in the second pass: what was made of it in the first, or, where other sites changed what comes
    to it, the edit of that."""
    edit, made = reader.edit, reader.made
    assert edit is not None and made is not None
    if first:
        return lambda h, h_in: made[rows]
    return lambda h, h_in: reader.at.edited(edit, h, h_in, rows)


def _ddim_shift(scheduler: Any, t: Tensor, latents: Tensor, x0: Tensor, output: Tensor) -> Tensor:
    """Asyrp's reverse step (Kwon et al., eq. 5), by difference: the edit moves the predicted x0 alone,

    ``x_prev = step(eps) + sqrt(alpha_bar_prev) * (x0(eps_edited) - x0(eps))``,

    which holds for every prediction type and leaves unedited rows bit-identical. What is added to the step.
    """
    edited = scheduler.step(output, t, latents, eta=0.0).pred_original_sample
    before = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bar = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    return alpha_bar**0.5 * (edited - x0)


def condition_each(model: DiffusionModel, prompts: Sequence[str | None], guidance_scale: float) -> Conditioning:
    """The denoiser's conditioning for one image per prompt; row ``i`` equals that of ``prompts[i]`` alone."""
    n = len(prompts)
    parts = {prompt: model.condition(prompt, n, guidance_scale) for prompt in dict.fromkeys(prompts)}
    whole, *others = parts.items()
    kwargs = dict(whole[1].kwargs)
    for prompt, part in others:
        own = [i for i, told in enumerate(prompts) if told == prompt]
        rows = own + [n + i for i in own] * part.doubled
        for name in kwargs.keys() - part.shared:
            kwargs[name] = _put_rows(kwargs[name], part.kwargs[name], rows)
    return replace(whole[1], kwargs=kwargs)


def _put_rows(into: Any, value: Any, rows: list[int]) -> Any:
    if isinstance(value, dict):
        return {name: _put_rows(into[name], item, rows) for name, item in value.items()}
    if isinstance(into, PerImage):
        return PerImage(value[i] if i in rows else own for i, own in enumerate(into))
    if into is None:
        return None
    if into.shape != value.shape:
        raise LensError("This model reads prompts of different lengths one after the other; draw them one by one.")
    index = torch.tensor(rows, device=value.device)
    return into.index_copy(0, index, value[index])


def _step_kwargs(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    accepted = inspect.signature(scheduler.step).parameters
    given: dict[str, Any] = {"eta": 0.0, "generator": generators}
    return {name: value for name, value in given.items() if name in accepted}
