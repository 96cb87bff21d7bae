"""Result types → plotly figures, returned and never shown; every figure has a ``describe_…`` twin for its alt text.

Colours are Okabe–Ito and cividis, and nothing is told by colour alone: series differ in marker and dash too.
"""

from diffusion_lens.plots.compared import describe_strengths, describe_tradeoff, strength_figure, tradeoff_figure
from diffusion_lens.plots.inside import (
    atlas_figure,
    atlas_groups_figure,
    attribution_figure,
    describe_atlas,
    describe_attribution,
    describe_groups,
    describe_probe,
    describe_step_profile,
    probe_figure,
    step_profile_figure,
)
from diffusion_lens.plots.measured import describe_shares, describe_sweep, share_figure, sweep_figure
from diffusion_lens.plots.tables import (
    confusion_figure,
    depth_figure,
    describe_confusion,
    describe_depth,
    describe_spillover,
    spillover_figure,
)

__all__ = [
    "atlas_figure",
    "atlas_groups_figure",
    "attribution_figure",
    "confusion_figure",
    "depth_figure",
    "describe_atlas",
    "describe_attribution",
    "describe_confusion",
    "describe_depth",
    "describe_groups",
    "describe_probe",
    "describe_shares",
    "describe_spillover",
    "describe_step_profile",
    "describe_strengths",
    "describe_sweep",
    "describe_tradeoff",
    "probe_figure",
    "share_figure",
    "spillover_figure",
    "step_profile_figure",
    "strength_figure",
    "sweep_figure",
    "tradeoff_figure",
]
