"""Sizes of a check of seconds."""

from __future__ import annotations

from diffusion_lens.studies.check.runs import Sizes

TINY = Sizes(
    shares=16, again=16, drawings=40, inside=12, attribution=6, reference=2, reference_steps=2, sweep=16, strengths=2,
    controls=1, batch_size=16,
)  # fmt: skip
