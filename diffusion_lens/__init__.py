"""Diffusion Lens: open a diffusion model, turn its features, and measure what happens."""

from diffusion_lens.base.types import Attribute, FeatureSet, GenerationRequest, Intervention, LensError
from diffusion_lens.lens.lens import DiffusionLens

__all__ = ["Attribute", "DiffusionLens", "FeatureSet", "GenerationRequest", "Intervention", "LensError"]
