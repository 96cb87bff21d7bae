"""All methods by key, in the order of the bench's table."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_lens.base.types import LensError
from diffusion_lens.methods.activation import Activation
from diffusion_lens.methods.bypass import Bypass
from diffusion_lens.methods.controls import MatchedNoise, PromptRewriting, RandomFeatures, SignFlip
from diffusion_lens.methods.ddm import DDM
from diffusion_lens.methods.difflens import DiffLens, DiffLensHeld
from diffusion_lens.methods.fine_tuning import FineTuning
from diffusion_lens.methods.h_distribution import HDistribution
from diffusion_lens.methods.latent_direction import LatentDirection
from diffusion_lens.methods.latent_editing import LatentEditing
from diffusion_lens.methods.protocol import Method
from diffusion_lens.methods.sae_alternatives import SaeGradient, SaeLrp
from diffusion_lens.methods.stereoclinic import StereoClinic

METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        DiffLens(), DiffLensHeld(), SaeLrp(), SaeGradient(), Activation(), LatentDirection(), LatentEditing(),
        HDistribution(), FineTuning(), Bypass(), DDM(), StereoClinic(), RandomFeatures(), SignFlip(), MatchedNoise(),
        PromptRewriting(),
    )
}  # fmt: skip


def find_method(key: str) -> Method:
    """The method of that key; raises ``LensError`` that lists them."""
    if key not in METHODS:
        raise LensError(f"'{key}' is no method; choose from {', '.join(METHODS)}.")
    return METHODS[key]


def find_methods(keys: str | Sequence[str]) -> tuple[Method, ...]:
    """Methods by key; ``all`` is every one, ``a,b`` or a sequence some of them, each once."""
    names = [k.strip() for k in keys.split(",")] if isinstance(keys, str) else list(keys)
    if names == ["all"]:
        return tuple(METHODS.values())
    return tuple(find_method(name) for name in dict.fromkeys(names))
