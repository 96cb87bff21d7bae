"""Diffusion Lens: open a diffusion model, steer the features that decide who appears, and measure what happens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffusion_lens.base.types import Attribute, FeatureSet, Generation, GenerationRequest, Intervention, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results import display
from diffusion_lens.results.comparison import Comparison
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.sweeps import SweepResult

if TYPE_CHECKING:
    from diffusion_lens import methods, plots
    from diffusion_lens.fit.config import FitConfig
    from diffusion_lens.fit.run import fit
    from diffusion_lens.measuring.observe import observe

__version__ = "0.6.0"

LATE = {
    "FitConfig": "diffusion_lens.fit.config",
    "fit": "diffusion_lens.fit.run",
    "methods": "diffusion_lens.methods",
    "observe": "diffusion_lens.measuring.observe",
    "plots": "diffusion_lens.plots",
}
"""Names that are imported when they are first asked for: a lens opens and shows what it keeps without torch."""

display.draw_with("diffusion_lens.plots.shown")


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(f"module 'diffusion_lens' has no attribute '{name}'")
    module = importlib.import_module(LATE[name])
    return module if LATE[name].rpartition(".")[2] == name and name not in ("fit",) else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *LATE])


__all__ = [
    "Attribute", "Comparison", "DiffusionLens", "FeatureSet", "FitConfig", "Generation", "GenerationRequest",
    "Intervention", "LensError", "Measurement", "SweepResult", "__version__", "fit", "methods", "observe", "plots",
]  # fmt: skip
