"""U-Nets: Stable Diffusion 1/2 and LCM, SDXL, and the unconditional DDPM, DDIM and LDM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.families.base import Conditioning, Encoded, Family, Settings
from diffusion_lens.model.kinds import check_latents, check_plain_unet, check_text, check_text_unet
from diffusion_lens.model.sites import Layout, Port, Site

MAIN = Layout(("image",), updates=True, arguments=(("image", (0, "hidden_states")),))
DOWN = Layout(("image",), updates=True, arguments=(("image", (0, "hidden_states")),), across=True)
NO_PROMPT = "This model takes no prompt; leave the prompt out."


class UNet(Family):
    """What all U-Nets share. Every module is a site, as its first output; a down-block's also with its skip copy."""

    part = "unet"
    flow = False

    def latent_size(self, pipe: Any, settings: Settings) -> tuple[int, int]:
        """``(y, x)`` of the latents."""
        if settings.size is not None and not self.takes_prompt:
            raise LensError("This model draws images of one size; leave the size out.")
        return super().latent_size(pipe, settings)

    def patch(self, pipe: Any) -> int:
        """The pipelines ask for multiples of 8 pixels, one latent."""
        return 1

    def forward(self, model: Any, sample: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The prediction for scaled latents."""
        return self.prediction_channels(model, model.denoiser(sample, t, return_dict=False, **kwargs)[0])

    def layout(self, module: str) -> Layout:
        """Down-blocks return a list for the skip connections, too."""
        name, _, number = module.rpartition(".")
        return DOWN if name == "down_blocks" and number.isdigit() else MAIN

    def port(self, model: Any, site: Site) -> Port:
        """Any module; tokens are laid out on the grid of the level that they belong to."""
        modules, layout = dict(model.denoiser.named_modules()), self.layout(site.module)
        if not layout.offers(site) and site.module in modules:
            names = ", ".join(own.name for own in layout.sites(site.module))
            raise LensError(f"'{site.module}' of a U-Net can be read as {names}, not as {site.name}.")
        return Port(modules[site.module], site, layout, lambda tokens: level_grid(model.latent_shape, tokens))

    def sites(self, denoiser: nn.Module) -> tuple[Site, ...]:
        """Blocks, and the attention layers and residual networks inside them."""
        found = []
        for name, module in denoiser.named_modules():
            kind = name.split(".")
            whole = kind[0] in ("down_blocks", "mid_block", "up_blocks") and (len(kind) == 2 or name == "mid_block")
            inner = len(kind) > 1 and kind[-2] in ("attentions", "resnets") and kind[-1].isdigit()
            if (whole and not isinstance(module, nn.ModuleList)) or inner:
                found += [Site(name), *([Site(name, "output", "across")] if self.layout(name).across else [])]
        return tuple(found)

    def candidates(self, denoiser: nn.Module) -> tuple[Site, ...]:
        """Every block once, down-blocks with what they send across; and the attention layers, in which bias was found
        to sit (ICM, 2604.06052)."""
        return tuple(
            site
            for site in self.sites(denoiser)
            if site.stream == ("across" if self.layout(site.module).across else "image")
            and ".resnets." not in site.module
        )

    def default_site(self, denoiser: nn.Module) -> str:
        """The bottleneck."""
        return "mid_block"


class TextUNet(UNet):
    """Stable Diffusion 1/2 and LCM: one text encoder; models distilled with guidance take the scale as a number."""

    kind = "text"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    arguments: ClassVar[Mapping[str, str]] = {"embeds": "encoder_hidden_states"}
    defaults = (50, 7.5)
    fit_batch = 16

    def check(self, pipe: Any) -> None:
        """The parts' widths, channels and vocabularies."""
        check_text_unet(pipe, self.encoders, added=None)
        check_text(pipe, self.encoders)
        check_latents(pipe, self.decoder, conditional=True)

    def guided(self, model: Any, scale: float) -> bool:
        """On where the scale is above 1, unless it is embedded."""
        return scale > 1 and model.denoiser.config.time_cond_proj_dim is None

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Embeddings ``[1, tokens, c]`` of a prompt and of the empty one."""
        return encode_text(model.pipeline, prompt)

    def each(self, model: Any, rows: int, scale: float) -> dict[str, Any]:
        """The guidance scale as an embedding, where the model takes one."""
        width = model.denoiser.config.time_cond_proj_dim
        if width is None:
            return {}
        w = torch.tensor(scale - 1).repeat(rows)
        cond = model.pipeline.get_guidance_scale_embedding(w, embedding_dim=width)
        return {"timestep_cond": cond.to(model.device, model.dtype)}

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """Float16 autoencoders that overflow are run in float32, as in the stock pipelines."""
        return decode_vae(pipe, latents)


class XLUNet(TextUNet):
    """SDXL: two text encoders, and the image's size as a condition."""

    kind = "text-xl"
    pipelines = ("StableDiffusionXLPipeline",)
    encoders = ("text_encoder", "text_encoder_2")
    defaults = (50, 5.0)
    fit_batch = 4

    def check(self, pipe: Any) -> None:
        """The parts' widths, channels and vocabularies."""
        check_text_unet(pipe, self.encoders, added="text_time")
        check_text(pipe, self.encoders)
        check_latents(pipe, self.decoder, conditional=True)

    def encode(self, model: Any, prompt: str) -> Encoded:
        """The same with pooled embeddings ``[1, c]`` and size conditioning ``time_ids [1, 6]``."""
        return encode_xl(model.pipeline, prompt, model.latent_shape[1:])

    def condition(self, model: Any, prompt: str | None, n: int, scale: float) -> Conditioning:
        """Text as above; pooled text and sizes besides."""
        told = super().condition(model, prompt, n, scale)
        encoded = model.encode(prompt)
        pooled = encoded["pooled"].expand(n, -1)
        if told.guided:
            pooled = torch.cat([encoded["negative_pooled"].expand(n, -1), pooled])
        added = {"text_embeds": pooled.contiguous(), "time_ids": encoded["time_ids"].repeat(len(pooled), 1)}
        return Conditioning({**told.kwargs, "added_cond_kwargs": added}, told.guided, n)


class PlainUNet(UNet):
    """Unconditional models."""

    takes_prompt = False
    guidance = "none"
    defaults = (50, 1.0)
    fit_batch = 16

    def check(self, pipe: Any) -> None:
        """The U-Net's kind and channels."""
        check_plain_unet(pipe.unet)
        check_latents(pipe, self.decoder, conditional=False)

    def encode(self, model: Any, prompt: str) -> Encoded:
        """Refuses: these models read no words."""
        raise LensError(NO_PROMPT)

    def condition(self, model: Any, prompt: str | None, n: int, scale: float) -> Conditioning:
        """Nothing is told."""
        if prompt is not None:
            raise LensError(NO_PROMPT)
        return Conditioning({}, guided=False, n=n)


class PixelUNet(PlainUNet):
    """DDPM and DDIM on pixels."""

    kind = "pixel"
    pipelines = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
    decoder = ""

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """They are the image."""
        return latents


class LatentUNet(PlainUNet):
    """Unconditional latent diffusion."""

    kind = "latent"
    pipelines = ("LDMPipeline",)
    decoder = "vqvae"

    def noise(self, model: Any, generators: list[torch.Generator]) -> Tensor:
        """LDMPipeline draws in float32 whatever the U-Net's dtype; the others draw in the U-Net's."""
        shape = (len(generators), *model.latent_shape)
        return randn_tensor(shape, generator=generators, device=model.device, dtype=torch.float32).to(model.dtype)

    def to_image(self, pipe: Any, latents: Tensor) -> Tensor:
        """By the codebook."""
        return pipe.vqvae.decode(latents / pipe.vqvae.config.scaling_factor).sample


def level_grid(latent_shape: tuple[int, int, int], tokens: int) -> tuple[int, int]:
    """``(y, x)`` of as many tokens, by halving the latents' sides; ``(tokens, 1)`` where no level has so many."""
    _, y, x = latent_shape
    while y * x > tokens:
        y, x = -(-y // 2), -(-x // 2)
    return (y, x) if y * x == tokens else (tokens, 1)


def encode_text(pipe: Any, prompt: str) -> dict[str, Tensor]:
    """Embeddings ``[1, tokens, c]`` of a prompt and of the empty one (``negative_embeds``), Stable Diffusion."""
    embeds, negative = pipe.encode_prompt(prompt, pipe._execution_device, 1, True)
    return {"embeds": embeds, "negative_embeds": negative}


def encode_xl(pipe: Any, prompt: str, latent_size: tuple[int, int]) -> dict[str, Tensor]:
    """The same for SDXL, with pooled embeddings ``[1, c]`` and size conditioning ``time_ids [1, 6]``."""
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    y, x = latent_size
    size = (y * pipe.vae_scale_factor, x * pipe.vae_scale_factor)
    encoder = pipe.text_encoder_2
    width = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=embeds.dtype, text_encoder_projection_dim=width)
    return {
        "embeds": embeds, "negative_embeds": negative, "pooled": pooled, "negative_pooled": negative_pooled,
        "time_ids": ids,
    }  # fmt: skip


def decode_vae(pipe: Any, latents: Tensor) -> Tensor:
    """``[n, 3, H, W]`` in -1..1; float16 VAEs that overflow are run in float32, as in the stock pipelines."""
    vae = pipe.vae
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False) and hasattr(pipe, "upcast_vae")
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        centre, spread = (
            torch.tensor(v, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1) for v in (mean, std)
        )
        latents = latents * spread / vae.config.scaling_factor + centre
    else:
        latents = latents / vae.config.scaling_factor
    if not upcast:
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    vae.to(torch.float32)
    try:
        return vae.decode(latents.float(), return_dict=False)[0]
    finally:
        vae.to(torch.float16)
