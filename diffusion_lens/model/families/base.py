"""What is said of one kind of pipeline: how its own call tells, calls, guides and decodes its model.

A family is one small class in a file of its own. Its model's latents are maps ``[n, c, y, x]`` here, also where the
pipeline packs them into tokens; whatever is computed equals what the stock pipeline's own call computes, bit for bit.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.hooks import Rows, select_rows
from diffusion_lens.model.prompts import check_prompt, token_ids, tokenizers_of
from diffusion_lens.model.sites import Layout, Port, Site

Guidance = Literal["doubled", "apart", "none"]
"""How the unconditional prediction is made: in the other half of one batch, in a call of its own, or not at all."""
Encoded = dict[str, Any]
"""Embeddings of one prompt, ``[1, …]`` each, and of the empty one under ``negative_…``."""


@dataclass(frozen=True)
class Conditioning:
    """Keyword arguments of the denoiser's ``forward`` for ``n`` images.

    Attributes:
        guided: classifier-free guidance: a prediction is made with the prompt and one without.
        apart: arguments of the call without the prompt, where it is a call of its own; else every tensor of
            ``kwargs`` holds ``2n`` rows, those without the prompt first.
        conditional_first: those with the prompt first.
        shared: names of arguments that are not one row per image.
    """

    kwargs: dict[str, Any]
    guided: bool
    n: int
    apart: dict[str, Any] | None = None
    conditional_first: bool = False
    shared: frozenset[str] = frozenset()

    @property
    def doubled(self) -> bool:
        """Whether one call makes both predictions."""
        return self.guided and self.apart is None

    @property
    def own(self) -> slice:
        """The rows with the prompt, of the call that has them."""
        if not self.doubled:
            return slice(None)
        return slice(0, self.n) if self.conditional_first else slice(self.n, None)

    def conditional(self, rows: Rows) -> dict[str, Any]:
        """The same arguments for ``rows`` of the half with the prompt alone."""
        kwargs = self._rows(self.kwargs, self.own, 2 * self.n) if self.doubled else self.kwargs
        return self._rows(kwargs, rows, self.n)

    def _rows(self, kwargs: dict[str, Any], rows: Rows, n: int) -> dict[str, Any]:
        return {k: v if k in self.shared else select_rows(v, rows, n) for k, v in kwargs.items()}


@dataclass(frozen=True)
class Settings:
    """What of a stock call is no part of a request, and decides its images.

    Attributes:
        size: ``(height, width)`` in pixels; ``None`` for the pipeline's own.
        max_sequence_length: tokens of the prompt's longest reading; ``None`` for the pipeline's own.
    """

    size: tuple[int, int] | None = None
    max_sequence_length: int | None = None


USUAL = Settings()


def call_default(pipe: Any, name: str) -> Any:
    """What a pipeline's own call takes for an argument that it is not given."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def chat_length(tokenizer: Any, **settings: Any) -> int:
    """Tokens that a chat template puts around a prompt; raises ``LensError`` where the tokenizer has none."""
    if not tokenizer.chat_template:
        raise LensError(
            "The tokenizer has no chat template, which its pipeline needs; fetch chat_template.jinja again."
        )
    told = [{"role": "user", "content": ""}]
    empty = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True, **settings)
    return len(token_ids(empty, tokenizer))


class Told(Protocol):
    """What a family is told of the model that it speaks for (``DiffusionModel``)."""

    @property
    def pipeline(self) -> Any:
        """The stock pipeline."""
        ...

    @property
    def denoiser(self) -> Any:
        """Its U-Net or transformer."""
        ...

    @property
    def settings(self) -> Settings:
        """What of the stock call is no part of a request."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(c, y, x)`` of what is denoised."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """The only words that prompts may have; ``None`` for any."""
        ...

    def encode(self, prompt: str) -> Encoded:
        """What ``Family.encode`` gave for a prompt, from a small cache."""
        ...


class Family(ABC):
    """One kind of pipeline. Subclasses say what differs; the defaults are those of most."""

    kind: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    """Names of diffusers' classes."""
    part: ClassVar[str] = "transformer"
    """The part of the pipeline that denoises."""
    encoders: ClassVar[tuple[str, ...]] = ()
    """Text encoders that must be there."""
    decoder: ClassVar[str] = "vae"
    """The part that turns latents into pixels; empty where there is none."""
    takes_prompt: ClassVar[bool] = True
    flow: ClassVar[bool] = True
    """Whether the model was trained on the straight path of flow matching."""
    guidance: ClassVar[Guidance] = "doubled"
    conditional_first: ClassVar[bool] = False
    text_varies: ClassVar[bool] = False
    """Whether prompts have as many tokens as they have, so that the text cannot be read as a map of one size."""
    arguments: ClassVar[Mapping[str, str]] = {}
    """Encoded → keyword of the denoiser's forward."""
    layouts: ClassVar[Mapping[str, Layout]] = {}
    """Pattern of modules' names → what they return."""
    defaults: ClassVar[tuple[int, float]] = (28, 1.0)
    """Steps and guidance scale of the pipeline's own call, where a fit is told none."""
    fit_batch: ClassVar[int] = 4
    """Images drawn at once by a fit that is told nothing else."""

    def denoiser(self, pipe: Any) -> Any:
        """The network that is hooked."""
        return getattr(pipe, self.part)

    def check(self, pipe: Any) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ``LensError`` that names the part, where the pipeline's parts do not fit each other."""

    def latent_shape(self, pipe: Any, settings: Settings) -> tuple[int, int, int]:
        """``(c, y, x)`` of what is denoised."""
        y, x = self.latent_size(pipe, settings)
        return self.denoiser(pipe).config.in_channels, y, x

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """``(y, x)`` of it; raises ``LensError`` for a size that the pipeline would round."""
        if settings.size is None:
            size = self.denoiser(pipe).config.sample_size
            return (size, size) if isinstance(size, int) else tuple(size)
        step = pipe.vae_scale_factor * self.patch(pipe)
        if any(side % step or side < step for side in settings.size):
            raise LensError(f"Heights and widths of this model are multiples of {step} pixels; choose others.")
        height, width = settings.size
        return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor

    def patch(self, pipe: Any) -> int:
        """Latents a side that one image token stands for."""
        return int(self.denoiser(pipe).config.patch_size)

    def noise(self, model: Told, generators: list[torch.Generator]) -> Tensor:
        """Starting noise ``[n, c, y, x]``, unit variance, image ``i`` from ``generators[i]`` alone."""
        shape = (len(generators), *model.latent_shape)
        return randn_tensor(shape, generator=generators, device=model.device, dtype=model.dtype)

    def schedule(self, model: Told, n_steps: int) -> dict[str, Any]:
        """What the stock call gives its scheduler besides the number of steps."""
        return {}

    def read_lengths(self, pipe: Any, settings: Settings) -> dict[str, int]:
        """Tokenizer → most tokens of a prompt that are read; a prompt must fit one of the longest."""
        return {name: tokenizer.model_max_length for name, tokenizer in tokenizers_of(pipe).items()}

    def length(self, pipe: Any, settings: Settings) -> int:
        """Tokens of the longest reading of a prompt, as in the stock call."""
        asked = settings.max_sequence_length
        return int(call_default(pipe, "max_sequence_length")) if asked is None else asked

    def check_prompt(self, model: Told, prompt: str) -> None:
        """Raise ``LensError`` for words this model cannot read, and for those it would cut off."""
        check_prompt(prompt, model.vocabulary, model.pipeline, self.read_lengths(model.pipeline, model.settings))

    @abstractmethod
    def encode(self, model: Told, prompt: str) -> Encoded:
        """Embeddings of one prompt, and of the empty one, as the stock call makes them."""

    def guided(self, model: Told, scale: float) -> bool:
        """Whether the stock call makes a prediction without the prompt, too."""
        return scale > 1 and self.guidance != "none"

    def condition(self, model: Told, prompt: str | None, n: int, scale: float) -> Conditioning:
        """The denoiser's conditioning for ``n`` images of one prompt."""
        if prompt is None:
            raise LensError("This model needs a prompt; give '' for the empty one.")
        self.check_prompt(model, prompt)
        encoded, guided = model.encode(prompt), self.guided(model, scale)
        own, empty = self.rows(encoded, "", n), self.rows(encoded, "negative_", n) if guided else None
        first, shared = self.conditional_first, self.shared(model, scale)
        apart = None
        if empty is not None and self.guidance == "apart":
            apart = {**empty, **self.each(model, n, scale), **shared}
        elif empty is not None:
            own = self.both(own, empty) if first else self.both(empty, own)
        rows = 2 * n if empty is not None and apart is None else n
        kwargs = {**own, **self.each(model, rows, scale), **shared}
        return Conditioning(kwargs, guided, n, apart, first, frozenset(shared))

    def rows(self, encoded: Encoded, prefix: str, n: int) -> dict[str, Any]:
        """The arguments of ``n`` images of one prompt."""
        named = {keyword: encoded[prefix + name] for name, keyword in self.arguments.items()}
        return {k: v.expand(n, *v.shape[1:]).contiguous() for k, v in named.items()}

    def both(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        """Arguments of one half of a doubled batch after those of the other."""
        return {name: torch.cat([first[name], second[name]]) for name in first}

    def each(self, model: Told, rows: int, scale: float) -> dict[str, Any]:
        """Further arguments with one row per image."""
        return {}

    def shared(self, model: Told, scale: float) -> dict[str, Any]:
        """Further arguments that are the same for every image."""
        return {}

    def forward(self, model: Told, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The denoiser's prediction ``[n, c, y, x]`` for ``sample [n, c, y, x]``."""
        t = t.to(sample.device).expand(len(sample))
        return model.denoiser(hidden_states=sample, timestep=t, return_dict=False, **kwargs)[0]

    def prediction_channels(self, model: Told, output: Tensor) -> Tensor:
        """The channels that predict noise, x0 or v; a learned variance beside them is dropped."""
        channels = model.latent_shape[0]
        return output[:, :channels] if output.shape[1] == 2 * channels else output

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, in the stock pipeline's own order of operations."""
        return unconditional + scale * (conditional - unconditional)

    @abstractmethod
    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Images ``[n, 3, H, W]`` in -1..1 of final latents ``[n, c, y, x]``."""

    # Sites

    def grid(self, model: Told) -> tuple[int, int]:
        """``(y, x)`` of the image tokens."""
        side = self.patch(model.pipeline)
        return model.latent_shape[1] // side, model.latent_shape[2] // side

    def layout(self, module: str) -> Layout | None:
        """What a module returns, by its name; ``None`` where that is not known."""
        return next((own for pattern, own in self.layouts.items() if re.fullmatch(pattern, module)), None)

    def port(self, model: Told, site: Site) -> Port:
        """The site in this model; raises ``LensError`` that lists those there are."""
        layout = self.layout(site.module)
        modules = dict(model.denoiser.named_modules())
        if site.module not in modules or layout is None or not self._offers(modules[site.module], layout, site):
            raise LensError(f"This model has no site '{site.name}'; it has {', '.join(self._shown(model.denoiser))}.")
        return Port(modules[site.module], site, layout, lambda _: self.grid(model))

    def _offers(self, module: nn.Module, layout: Layout, site: Site) -> bool:
        # The last block of some models reads the text and hands none on.
        lost = site.stream == "text" and (self.text_varies or getattr(module, "context_pre_only", False))
        return layout.offers(site) and not lost

    def sites(self, denoiser: nn.Module) -> tuple[Site, ...]:
        """Every site of this model."""
        found = []
        for name, module in denoiser.named_modules():
            layout = self.layout(name)
            if layout is not None:
                found += [site for site in layout.sites(name) if self._offers(module, layout, site)]
        return tuple(found)

    def candidates(self, denoiser: nn.Module) -> tuple[Site, ...]:
        """Sites to look for an attribute first: what every block hands on to the next, in image tokens."""
        return tuple(
            site
            for site in self.sites(denoiser)
            if site.reading == "output" and site.stream == "image" and BLOCK.fullmatch(site.module)
        )

    def default_site(self, denoiser: nn.Module) -> str:
        """The site in the middle of the candidates, where nothing is known yet."""
        found = self.candidates(denoiser)
        return found[(len(found) - 1) // 2].name

    def _shown(self, denoiser: nn.Module) -> Sequence[str]:
        """The sites in few words: numbers in a row as one."""
        groups: dict[str, list[int]] = {}
        for site in self.sites(denoiser):
            number = re.search(r"\d+", site.name)
            key = re.sub(r"\d+", "{}", site.name, count=1)
            groups.setdefault(key, []).append(int(number.group()) if number else 0)
        return [key.replace("{}", str(n[0]) if len(n) == 1 else f"{{{n[0]}…{n[-1]}}}", 1) for key, n in groups.items()]


BLOCK = re.compile(r"(\w*blocks|layers|noise_refiner)\.\d+")
"""Names of whole blocks of a transformer."""
