"""Diffusion Lens: open a diffusion model, turn its features, and measure what happens."""

from diffusion_lens.lens import DiffusionLens
from diffusion_lens.types import Attribute, FeatureSet, GenerationRequest, Intervention, LensError

__all__ = ["Attribute", "DiffusionLens", "FeatureSet", "GenerationRequest", "Intervention", "LensError"]
