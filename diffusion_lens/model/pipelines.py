"""Stock diffusers pipelines, text-guided or unconditional, behind one small interface.

Four kinds: ``text`` (Stable Diffusion 1/2, LCM), ``text-xl`` (SDXL), ``pixel`` (DDPM, DDIM) and ``latent``
(unconditional LDM). Whatever is computed here equals what the stock pipeline's own call computes.
"""

from __future__ import annotations

import copy
import difflib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.base.weights import reason
from diffusion_lens.model.codec import Decoded, decode_pixels, decode_preview, encode_text, encode_xl
from diffusion_lens.model.hooks import Rows, capture, select_rows
from diffusion_lens.model.kinds import Kind, kind_of
from diffusion_lens.model.memory import Room, is_out_of_memory
from diffusion_lens.model.opening import open_pipeline
from diffusion_lens.model.placement import place
from diffusion_lens.model.preview import PreviewDecoder, load_preview
from diffusion_lens.model.prompts import check_prompt
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.model.samplers import choose_sampler
from diffusion_lens.model.stored import StoredPipeline

log = logging.getLogger(__name__)

PROMPTS_KEPT = 64


@dataclass(frozen=True)
class Conditioning:
    """Keyword arguments of ``unet.forward`` for ``n`` images.

    ``guided`` means classifier-free guidance: every tensor holds ``2n`` rows, the unconditional half first.
    """

    kwargs: dict[str, Any]
    guided: bool
    n: int

    def conditional(self, rows: Rows) -> dict[str, Any]:
        """The same arguments for ``rows`` of the conditional half alone."""
        if not self.guided:
            return select_rows(self.kwargs, rows, self.n)
        half = select_rows(self.kwargs, slice(self.n, None), 2 * self.n)
        return select_rows(half, rows, self.n)


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A diffusion model opened at one module of its U-Net.

    Attributes:
        pipeline: the stock pipeline; its scheduler is the one used here.
        unet: the denoiser; ``hook_name`` names the module inside it that is read and edited.
        offloaded: the pipeline's parts move between devices, so one run at a time holds the lock throughout.
        lock: held while hooks are in place, so that two threads cannot read each other's activations.
        room: how many images fit into memory at once, learned when more did not.
        preview: a tiny autoencoder that shows images before ``decode``; ``None`` for none.
        notes: sentences that a person should read: what was replaced or chosen when the model was opened.
        vocabulary: the only words that prompts may have; ``None`` for an open vocabulary.
        stored: the files that the pipeline was loaded from; ``None`` for one that was in memory.
    """

    model_id: str
    pipeline: Any
    unet: Any
    kind: Kind
    hook_name: str
    device: torch.device
    dtype: torch.dtype
    offloaded: bool = False
    lock: Any = field(default_factory=threading.RLock, repr=False)
    prompts: OrderedDict[str, dict[str, Tensor]] = field(default_factory=OrderedDict, repr=False)
    room: Room = field(default_factory=Room, repr=False)
    preview: PreviewDecoder | None = None
    notes: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    stored: StoredPipeline | None = None

    @property
    def is_text(self) -> bool:
        """Whether the model takes a prompt."""
        return self.kind in ("text", "text-xl")

    @property
    def hook_module(self) -> nn.Module:
        """The module that is read and edited."""
        return self.unet.get_submodule(self.hook_name)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(c, y, x)`` of what the U-Net denoises."""
        size = self.unet.config.sample_size
        y, x = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, y, x

    @cached_property
    def hook_shape(self) -> tuple[int, int, int]:
        """``(c, y, x)`` of the hooked module's output, measured by one dry forward."""
        with torch.no_grad(), self.lock, capture(self.hook_module) as tap:
            conditioning = self.condition("" if self.is_text else None, 1, 1.0)
            t = self.scheduler(1).timesteps[0]
            blank = torch.zeros(1, *self.latent_shape, device=self.device, dtype=self.dtype)
            try:
                self.predict(blank, t, conditioning)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise LensError(f"This U-Net cannot run on images of its own size: {reason(error)}") from error
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
        """Whether the sampler is DDIM, which the asymmetric edit needs."""
        return isinstance(self.pipeline.scheduler, DDIMScheduler)

    def scheduler(self, n_steps: int) -> Any:
        """A fresh scheduler whose ``timesteps`` are set (kept on the CPU: indexing its tables then never waits for
        the device). Raises ``LensError`` where it cannot take ``n_steps``.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        try:
            scheduler.set_timesteps(n_steps)
        except ValueError as error:
            raise LensError(f"This model's {type(scheduler).__name__} cannot take {n_steps} steps: {error}") from None
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
        generators = generators or seed_generators(seeds)
        # LDMPipeline draws in float32 whatever the U-Net's dtype; the others draw in the U-Net's.
        dtype = torch.float32 if self.kind == "latent" else self.dtype
        with torch.inference_mode(False):
            noise = randn_tensor(
                (len(seeds), *self.latent_shape), generator=generators, device=self.device, dtype=dtype
            )
            return noise.to(self.dtype)

    def condition(self, prompt: str | None, n: int, guidance_scale: float) -> Conditioning:
        """The U-Net's conditioning for ``n`` images of one prompt (``None`` for unconditional models).

        Guidance as in diffusers: on where ``guidance_scale > 1``, with the empty prompt as the unconditional side;
        models distilled with a guidance embedding take it as a number instead.
        """
        if not self.is_text:
            if prompt is not None:
                raise LensError("This model takes no prompt; leave the prompt out.")
            return Conditioning({}, guided=False, n=n)
        if prompt is None:
            raise LensError("This model needs a prompt; give '' for the empty one.")
        self.check_prompt(prompt)
        embedding_dim = self.unet.config.time_cond_proj_dim
        guided = guidance_scale > 1 and embedding_dim is None
        encoded = self._encode(prompt)

        def rows(name: str) -> Tensor:
            one = encoded[name].expand(n, *encoded[name].shape[1:])
            return torch.cat([encoded[f"negative_{name}"].expand_as(one), one]) if guided else one.contiguous()

        kwargs: dict[str, Any] = {"encoder_hidden_states": rows("embeds")}
        if embedding_dim is not None:
            w = torch.tensor(guidance_scale - 1).repeat(n)
            cond = self.pipeline.get_guidance_scale_embedding(w, embedding_dim=embedding_dim)
            kwargs["timestep_cond"] = cond.to(self.device, self.dtype)
        if self.kind == "text-xl":
            ids = encoded["time_ids"].repeat(2 * n if guided else n, 1)
            kwargs["added_cond_kwargs"] = {"text_embeds": rows("pooled"), "time_ids": ids}
        return Conditioning(kwargs, guided=guided, n=n)

    def check_prompt(self, prompt: str) -> None:
        """Raise ``LensError`` for words this model never saw or cannot read, and for those it would cut off."""
        check_prompt(prompt, self.vocabulary, self.pipeline)

    def forget_prompts(self) -> None:
        """Drop cached prompt embeddings; needed when the text encoder's weights change."""
        with self.lock:
            self.prompts.clear()

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings of one prompt and of the empty one, from a small cache."""
        with self.lock:
            if prompt in self.prompts:
                self.prompts.move_to_end(prompt)
                return self.prompts[prompt]
            # Outside inference mode, so that training code may use the cached tensors too.
            with torch.inference_mode(False), torch.no_grad():
                encode = encode_xl if self.kind == "text-xl" else encode_text
                encoded = encode(self.pipeline, prompt)
                encoded = {name: value.to(self.device, self.dtype) for name, value in encoded.items()}
            self.prompts[prompt] = encoded
            if len(self.prompts) > PROMPTS_KEPT:
                self.prompts.popitem(last=False)
            return encoded

    def predict(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction for scaled latents ``[n, c, y, x]``: ``[n or 2n, c, y, x]``, unconditional first."""
        sample = torch.cat([latents] * 2) if conditioning.guided else latents
        return self.prediction_channels(self.unet(sample, t, return_dict=False, **conditioning.kwargs)[0])

    def prediction_channels(self, output: Tensor) -> Tensor:
        """The channels that predict noise, x0 or v; a learned variance beside them is dropped."""
        channels = self.unet.config.in_channels
        return output[:, :channels] if output.shape[1] == 2 * channels else output

    def decode(self, latents: Tensor, batch_size: int = 16) -> np.ndarray:
        """Images ``uint8 [n, H, W, 3]`` of final latents, as the stock pipeline's ``output_type="pil"``."""
        return self.decode_checked(latents, batch_size).images

    def decode_checked(self, latents: Tensor, batch_size: int = 16) -> Decoded:
        """The same, and which of them show nobody: not finite, censored, or one flat colour."""
        with torch.inference_mode():
            parts = [decode_pixels(self.pipeline, part) for part in latents.split(batch_size)]
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
    hook_name: str = "mid_block",
    keep_scheduler: bool = False,
    offline: bool = False,
    options: RunOptions | None = None,
    vocabulary: tuple[str, ...] | None = None,
) -> DiffusionModel:
    """Open a diffusers pipeline that is already in memory; it is moved to ``device`` and ``dtype``.

    ``options`` take the place of both and say what else changes how it runs; a preview that they name is loaded, from
    this machine alone where ``offline``. The sampler becomes DDIM on the same noise levels, and ``notes`` say so.
    Samplers of few-step models (LCM, TCD, Euler with trailing steps) stay, and so does any supported one where
    ``keep_scheduler``; ``vocabulary``: see ``DiffusionModel``.
    Raises ``LensError`` for pipelines of another kind or whose parts do not fit each other, samplers that DDIM cannot
    stand in for, unknown hook names, naming some that exist, and for a preview that cannot be loaded or does not
    decode this pipeline's latents.
    """
    kind = kind_of(pipe)
    if options is not None:
        options = options.resolved()
        device, dtype = options.device, options.torch_dtype
    pipe = copy.copy(pipe)
    scheduler, notes = choose_sampler(pipe.scheduler, latents=kind != "pixel", keep=keep_scheduler)
    pipe.register_modules(scheduler=scheduler)
    if options is not None and not options.safety_checker and getattr(pipe, "safety_checker", None) is not None:
        pipe.register_modules(safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    _check_hook(pipe.unet, hook_name)
    where = torch.device(device)
    place(pipe, hook_name, where, dtype, options)
    offloaded = options is not None and options.offload
    preview = None if options is None else load_preview(options, pipe, where, dtype, offline=offline)
    return DiffusionModel(
        model_id, pipe, pipe.unet, kind, hook_name, where, dtype, offloaded, preview=preview, notes=notes,
        vocabulary=vocabulary,
    )  # fmt: skip


def load_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    hook_name: str = "mid_block",
    revision: str | None = None,
    offline: bool = False,
    keep_scheduler: bool = False,
    safety_checker: bool = True,
    model_id: str | None = None,
    options: RunOptions | None = None,
    variant: str | None = None,
    vocabulary: tuple[str, ...] | None = None,
) -> DiffusionModel:
    """Load a diffusers folder or a hub repository; safetensors only, no code from the repository is run.

    Args:
        model_id: the hub name by default, or the folder's.
        safety_checker: ``False`` leaves the model's own checker out (it paints refused images black, which changes
            what is counted).
        options: in place of ``device`` and ``dtype``.
        variant: of the weights, e.g. ``fp16``; the plain ones by default, or the only ones there are.
        vocabulary: see ``DiffusionModel``.

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
    )  # fmt: skip
    model = replace(model, notes=(*opened.notes, *model.notes), stored=opened.stored)
    for note in model.notes:
        log.warning("%s: %s", name, note)
    return model


def _check_hook(unet: nn.Module, hook_name: str) -> None:
    names = [name for name, _ in unet.named_modules() if name]
    if hook_name in names:
        return
    blocks = [
        name
        for name in names
        if name.count(".") <= 1 and name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")
    ]
    known = difflib.get_close_matches(hook_name, names, n=5) or [name for name in blocks if not name.endswith("blocks")]
    raise LensError(f"The U-Net has no module '{hook_name}'; try one of: {', '.join(known)}.")
