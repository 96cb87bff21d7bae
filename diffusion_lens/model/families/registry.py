"""Every family of pipelines, by diffusers' class and by kind."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.families.base import Family
from diffusion_lens.model.families.dit import DiT
from diffusion_lens.model.families.flux import Flux
from diffusion_lens.model.families.flux2 import Flux2Klein
from diffusion_lens.model.families.lumina2 import Lumina2
from diffusion_lens.model.families.pixart import PixArt
from diffusion_lens.model.families.qwen import QwenImage
from diffusion_lens.model.families.sana import Sana
from diffusion_lens.model.families.sd3 import StableDiffusion3
from diffusion_lens.model.families.unet import LatentUNet, PixelUNet, TextUNet, XLUNet
from diffusion_lens.model.families.z_image import ZImage
from diffusion_lens.model.kinds import check_filled

FAMILIES: tuple[Family, ...] = (
    TextUNet(), XLUNet(), PixelUNet(), LatentUNet(),
    PixArt(), Sana(), DiT(),
    StableDiffusion3(), Flux(), Flux2Klein(), QwenImage(),
    ZImage(), Lumina2(),
)  # fmt: skip
KINDS: dict[str, Family] = {family.kind: family for family in FAMILIES}
_CLASSES: dict[str, Family] = {name: family for family in FAMILIES for name in family.pipelines}


def supported(class_name: object) -> Family:
    """The family of a pipeline by its class's name; raises ``LensError`` that names what can be opened."""
    if isinstance(class_name, str) and class_name in _CLASSES:
        return _CLASSES[class_name]
    known = ", ".join(name.removesuffix("Pipeline") for name in _CLASSES)
    raise LensError(f"{class_name} is not supported: choose a diffusers pipeline of one of these kinds: {known}.")


def family_of(pipe: Any) -> Family:
    """The family of a pipeline in memory, after checking that its parts are there, whole, and fit each other.

    Raises ``LensError`` that names the part.
    """
    name = type(pipe).__name__
    family = supported(name if type(pipe).__module__.startswith("diffusers.") else f"{name} (not of diffusers)")
    for part in (family.part, "scheduler", *family.encoders, *([family.decoder] if family.decoder else [])):
        if getattr(pipe, part, None) is None:
            raise LensError(f"This {name} has no {part} and cannot draw; fetch it again, whole.")
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            check_filled(part, module)
    family.check(pipe)
    return family
