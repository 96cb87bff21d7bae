"""Stock diffusers pipelines, text-guided or unconditional, behind one small interface.

What differs between kinds of pipelines is said by their family (``families/``). Whatever is computed here equals what
the stock pipeline's own call computes.
"""

from __future__ import annotations

import copy
import difflib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.codec import Decoded, decode_pixels, decode_preview
from diffusion_lens.model.failures import failing
from diffusion_lens.model.families.base import USUAL, Conditioning, Encoded, Family, Settings
from diffusion_lens.model.families.registry import KINDS, family_of
from diffusion_lens.model.hooks import capture
from diffusion_lens.model.memory import Room
from diffusion_lens.model.opening import open_pipeline
from diffusion_lens.model.placement import place
from diffusion_lens.model.preview import PreviewDecoder, load_preview
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.model.samplers import choose_sampler, is_flow, splits_step
from diffusion_lens.model.sites import Port, Site
from diffusion_lens.model.stored import StoredPipeline

log = logging.getLogger(__name__)

PROMPTS_KEPT = 64


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A diffusion model opened at one site of its denoiser.

    Attributes:
        pipeline: the stock pipeline; its scheduler is the one used here.
        denoiser: its U-Net or transformer; ``hook_name`` names the site in it that is read and edited (``sites.Site``).
        kind: of its family.
        offloaded: the pipeline's parts move between devices, so one run at a time holds the lock throughout.
        lock: held while hooks are in place, so that two threads cannot read each other's activations.
        room: how many images fit into memory at once, learned when more did not.
        preview: a tiny autoencoder that shows images before ``decode``; ``None`` for none.
        notes: sentences that a person should read: what was replaced or chosen when the model was opened.
        vocabulary: the only words that prompts may have; ``None`` for an open vocabulary.
        stored: the files that the pipeline was loaded from; ``None`` for one that was in memory.
        settings: what of its stock call is no part of a request.
    """

    model_id: str
    pipeline: Any
    denoiser: Any
    kind: str
    hook_name: str
    device: torch.device
    dtype: torch.dtype
    offloaded: bool = False
    lock: Any = field(default_factory=threading.RLock, repr=False)
    prompts: OrderedDict[str, Encoded] = field(default_factory=OrderedDict, repr=False)
    room: Room = field(default_factory=Room, repr=False)
    preview: PreviewDecoder | None = None
    notes: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    stored: StoredPipeline | None = None
    settings: Settings = USUAL

    @property
    def family(self) -> Family:
        """What is said of this kind of pipeline."""
        return KINDS[self.kind]

    @property
    def site(self) -> Site:
        """Where the model is read and edited."""
        return Site.parse(self.hook_name)

    @cached_property
    def port(self) -> Port:
        """The same in this model; raises ``LensError`` that lists the sites there are."""
        return self.family.port(self, self.site)

    @property
    def unet(self) -> Any:
        """The denoiser, under the name that it had when all of them were U-Nets."""
        return self.denoiser

    @property
    def is_text(self) -> bool:
        """Whether the model takes a prompt."""
        return self.family.takes_prompt

    @property
    def hook_module(self) -> nn.Module:
        """The module that is read and edited."""
        return self.denoiser.get_submodule(self.site.module)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(c, y, x)`` of what is denoised."""
        return self.family.latent_shape(self.pipeline, self.settings)

    @cached_property
    def hook_shape(self) -> tuple[int, int, int]:
        """``(c, y, x)`` of what is read, measured by one dry forward."""
        with torch.no_grad(), self.lock, capture(self.port) as tap:
            conditioning = self.condition("" if self.is_text else None, 1, 1.0)
            t = self.scheduler(2 if self.is_flow else 1).timesteps[0]  # one step of some flows is none
            blank = torch.zeros(1, *self.latent_shape, device=self.device, dtype=self.dtype)
            with failing("This model cannot run on images of its own size"):
                self.predict(blank, t, conditioning)
        if tap.calls > 1:
            raise LensError(
                f"'{self.hook_name}' runs {tap.calls} times in a forward pass; choose a module that runs once."
            )
        _, c, y, x = tap.output().shape
        return c, y, x

    @property
    def d_in(self) -> int:
        """Channels at the hook."""
        return self.hook_shape[0]

    @property
    def spatial(self) -> tuple[int, int]:
        """``(y, x)`` at the hook; ``(tokens, 1)`` for a module that works on tokens."""
        return self.hook_shape[1:]

    @property
    def is_ddim(self) -> bool:
        """Whether the sampler is DDIM."""
        return isinstance(self.pipeline.scheduler, DDIMScheduler)

    @property
    def is_flow(self) -> bool:
        """Whether the model follows the straight path of flow matching."""
        return is_flow(self.pipeline.scheduler)

    @property
    def splits_step(self) -> bool:
        """Whether an edit may move the predicted clean image alone (the asymmetric edit): DDIM, or flow Euler."""
        return splits_step(self.pipeline.scheduler)

    def scheduler(self, n_steps: int) -> Any:
        """A fresh scheduler whose ``timesteps`` are set (kept on the CPU: indexing its tables then never waits for
        the device). Raises ``LensError`` where it cannot take ``n_steps``.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        with failing(f"This model's {type(scheduler).__name__} cannot take {n_steps} steps"):
            scheduler.set_timesteps(n_steps, **self.family.schedule(self, n_steps))
        if len(scheduler.timesteps) != n_steps:
            raise LensError(
                f"This model's {type(scheduler).__name__} makes {len(scheduler.timesteps)} steps of {n_steps}; "
                "choose another number of steps."
            )
        return scheduler

    def noise(self, seeds: Sequence[int], generators: list[torch.Generator] | None = None) -> Tensor:
        """Starting noise ``[n, c, y, x]``, unit variance, image ``i`` from ``seeds[i]`` alone.

        One CPU generator per seed, as the stock pipeline with ``generator=[...]``. ``generators`` (fresh, one per
        seed) are advanced when given, for samplers that draw more noise later.
        """
        with torch.inference_mode(False):
            return self.family.noise(self, generators or seed_generators(seeds))

    def condition(self, prompt: str | None, n: int, guidance_scale: float) -> Conditioning:
        """The denoiser's conditioning for ``n`` images of one prompt (``None`` for unconditional models).

        Guidance as in diffusers: on where ``guidance_scale > 1``, with the empty prompt as the unconditional side;
        models distilled with a guidance embedding take it as a number instead.
        """
        return self.family.condition(self, prompt, n, guidance_scale)

    def check_prompt(self, prompt: str) -> None:
        """Raise ``LensError`` for words this model never saw or cannot read, and for those it would cut off."""
        with failing("This model's tokenizer cannot read the prompt"):
            self.family.check_prompt(self, prompt)

    def forget_prompts(self) -> None:
        """Drop cached prompt embeddings; needed when the text encoder's weights change."""
        with self.lock:
            self.prompts.clear()

    def encode(self, prompt: str) -> Encoded:
        """Embeddings of one prompt and of the empty one, from a small cache."""
        with self.lock:
            if prompt in self.prompts:
                self.prompts.move_to_end(prompt)
                return self.prompts[prompt]
            # Outside inference mode, so that training code may use the cached tensors too.
            told = failing("This model's text encoder cannot read a prompt")
            with told, torch.inference_mode(False), torch.no_grad():
                encoded = self.family.encode(self, prompt)
                encoded = {name: self._placed(value) for name, value in encoded.items()}
            self.prompts[prompt] = encoded
            if len(self.prompts) > PROMPTS_KEPT:
                self.prompts.popitem(last=False)
            return encoded

    def _placed(self, value: Tensor) -> Tensor:
        """On the model's device; numbers with a point in its dtype."""
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def predict(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        watch: AbstractContextManager[object] | None = None,
    ) -> Tensor:
        """The prediction for scaled latents ``[n, c, y, x]``: ``[n or 2n, c, y, x]``, that without a prompt first.

        ``watch`` is entered around the call that has the prompt, where each side has a call of its own.
        """
        family, n = self.family, conditioning.n
        sample = torch.cat([latents] * 2) if conditioning.doubled else latents
        with watch or nullcontext():
            output = family.forward(self, sample, t, conditioning.kwargs)
        if conditioning.apart is not None:
            return torch.cat([family.forward(self, latents, t, conditioning.apart), output])
        if conditioning.doubled and conditioning.conditional_first:
            return torch.cat([output[n:], output[:n]])
        return output

    def guide(self, prediction: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
        """Classifier-free guidance of what ``predict`` gave, ``[n, c, y, x]``, as the stock call does it."""
        if not conditioning.guided:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return self.family.guide(unconditional, conditional, scale)

    def decode(self, latents: Tensor, batch_size: int = 16) -> np.ndarray:
        """Images ``uint8 [n, H, W, 3]`` of final latents, as the stock pipeline's ``output_type="pil"``."""
        return self.decode_checked(latents, batch_size).images

    def decode_checked(self, latents: Tensor, batch_size: int = 16) -> Decoded:
        """The same, and which of them show nobody: not finite, censored, or one flat colour."""
        with torch.inference_mode(), failing("This model's autoencoder cannot decode"):
            parts = [decode_pixels(self.family, self.pipeline, part) for part in latents.split(batch_size)]
        return Decoded(np.concatenate([p.images for p in parts]), tuple(f for p in parts for f in p.faults))

    def decode_preview(self, latents: Tensor, batch_size: int = 4) -> np.ndarray:
        """The same by the tiny autoencoder: near the images of ``decode`` and to be looked at alone (E3).

        Raises ``LensError`` where none was loaded.
        """
        if self.preview is None:
            raise LensError("No preview was loaded with this model; name one with --preview.")
        network = self.preview.network
        with torch.inference_mode():
            parts = [decode_preview(self.pipeline, network, part) for part in latents.split(batch_size)]
        return np.concatenate([part.images for part in parts])


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def wrap_pipeline(
    pipe: Any,
    model_id: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    hook_name: str = "",
    keep_scheduler: bool = False,
    offline: bool = False,
    options: RunOptions | None = None,
    vocabulary: tuple[str, ...] | None = None,
    settings: Settings = USUAL,
) -> DiffusionModel:
    """Open a diffusers pipeline that is already in memory; it is moved to ``device`` and ``dtype``.

    ``hook_name`` names the site that is read and edited: a U-Net's bottleneck by default, the middle block of others.

    ``options`` take the place of both and say what else changes how it runs; a preview that they name is loaded, from
    this machine alone where ``offline``. The sampler becomes DDIM on the same noise levels, and ``notes`` say so.
    Samplers of few-step models (LCM, TCD, Euler with trailing steps) stay, and so does any supported one where
    ``keep_scheduler``; ``vocabulary``: see ``DiffusionModel``.
    Raises ``LensError`` for pipelines of another kind or whose parts do not fit each other, samplers that DDIM cannot
    stand in for, unknown hook names, naming some that exist, and for a preview that cannot be loaded or does not
    decode this pipeline's latents.
    """
    with failing("This model cannot be opened"):
        family = family_of(pipe)
    if options is not None:
        options = options.resolved()
        device, dtype = options.device, options.torch_dtype
    pipe = copy.copy(pipe)
    scheduler, notes = choose_sampler(
        pipe.scheduler, latents=bool(family.decoder), keep=keep_scheduler, flow=family.flow
    )
    pipe.register_modules(scheduler=scheduler)
    if options is not None and not options.safety_checker and getattr(pipe, "safety_checker", None) is not None:
        pipe.register_modules(safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    denoiser = family.denoiser(pipe)
    hook_name = Site.parse(hook_name).name if hook_name else family.default_site(denoiser)
    _check_module(denoiser, Site.parse(hook_name).module, family)
    where = torch.device(device)
    place(pipe, denoiser, Site.parse(hook_name).module, where, dtype, options)
    offloaded = options is not None and options.offload
    preview = None if options is None else load_preview(options, pipe, where, dtype, offline=offline)
    model = DiffusionModel(
        model_id, pipe, denoiser, family.kind, hook_name, where, dtype, offloaded, preview=preview, notes=notes,
        vocabulary=vocabulary, settings=settings,
    )  # fmt: skip
    _ = model.latent_shape, model.port  # refuses sizes and sites that there are not
    return model


def load_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    hook_name: str = "",
    revision: str | None = None,
    offline: bool = False,
    keep_scheduler: bool = False,
    safety_checker: bool = True,
    model_id: str | None = None,
    options: RunOptions | None = None,
    variant: str | None = None,
    vocabulary: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    max_sequence_length: int | None = None,
) -> DiffusionModel:
    """Load a diffusers folder or a hub repository; safetensors only, no code from the repository is run.

    Args:
        model_id: the hub name by default, or the folder's.
        safety_checker: ``False`` leaves the model's own checker out (it paints refused images black, which changes
            what is counted).
        options: in place of ``device`` and ``dtype``.
        variant: of the weights, e.g. ``fp16``; the plain ones by default, or the only ones there are.
        vocabulary: see ``DiffusionModel``.
        size: ``(height, width)`` in pixels; the pipeline's own by default.
        max_sequence_length: as in the stock call; by default what the pipeline's index notes, or the stock call's own.

    Raises:
        LensError: files are missing, broken or of another kind of model; names the part, and the tensor that is
            missing, foreign or of another shape. See also ``wrap_pipeline``.

    The model's ``notes`` are logged as warnings, which the command line shows.
    """
    if options is not None:
        options = options.resolved()  # before minutes of loading
        dtype = options.torch_dtype
        safety_checker = safety_checker and options.safety_checker
    opened = open_pipeline(
        source, dtype=dtype, revision=revision, offline=offline, variant=variant, safety_checker=safety_checker
    )
    folder = Path(source)
    name = model_id or (folder.resolve().name if folder.exists() else str(source))
    model = wrap_pipeline(
        opened.pipeline, name, device=device, dtype=dtype, hook_name=hook_name, keep_scheduler=keep_scheduler,
        offline=offline, options=options, vocabulary=vocabulary,
        settings=Settings(size, opened.max_sequence_length if max_sequence_length is None else max_sequence_length),
    )  # fmt: skip
    model = replace(model, notes=(*opened.notes, *model.notes), stored=opened.stored)
    for note in model.notes:
        log.warning("%s: %s", name, note)
    return model


def _check_module(denoiser: nn.Module, module: str, family: Family) -> None:
    """Raise ``LensError`` that names some modules like this one, where there is none of its name."""
    names = [name for name, _ in denoiser.named_modules() if name]
    if module in names:
        return
    known = difflib.get_close_matches(module, names, n=5) or [
        *dict.fromkeys(site.module for site in family.candidates(denoiser))
    ]
    what = "U-Net" if family.part == "unet" else "transformer"
    raise LensError(f"The {what} has no module '{module}'; try one of: {', '.join(known)}.")


def candidate_sites(model: DiffusionModel) -> tuple[Site, ...]:
    """Sites of this model to look for an attribute first, from its input to its output."""
    return model.family.candidates(model.denoiser)


def at_site(model: DiffusionModel, site: Site | str) -> DiffusionModel:
    """The same pipeline, opened at another site; raises ``LensError`` that lists the sites there are."""
    wanted = Site.parse(site) if isinstance(site, str) else site
    _check_module(model.denoiser, wanted.module, model.family)
    moved = replace(model, hook_name=wanted.name)
    _ = moved.port
    return moved
