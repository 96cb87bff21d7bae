"""Stored scans made by hand."""

from __future__ import annotations

from diffusion_lens.results.scan import Cell, Moved, Reading, Scan, ScanAttribute, ScanSite, Steering, Steps

READ = Reading(0.9, (0.8, 0.95), 0.5, (0.4, 0.6), 5, 128)


def moved(change: float, kept: float = 1.0, half: float = 0.05) -> Moved:
    return Moved(change, (change - half, change + half), kept, 40, 2, 1.1)


def make(changes: dict[tuple[str, str], float], kept: float = 1.0) -> Scan:
    """One range of steps; ``changes``: (attribute, site) → points moved."""
    attributes = list(dict.fromkeys(a for a, _ in changes))
    sites = list(dict.fromkeys(s for _, s in changes))
    return Scan(
        model_id="m", classifier_id="c", prompt="a face", n_steps=4, guidance_scale=1.0, strength=2.0, n_drawn=64,
        n_steered=40, first_seed=0, steps=(Steps(0, 4),), sites=tuple(ScanSite(s, 8, (4, 4)) for s in sites),
        attributes=tuple(ScanAttribute(a, ("no", "yes"), "yes", 0.3, 60) for a in attributes),
        errors=dict.fromkeys(attributes, 0.02),
        cells=tuple(Cell(a, s, 0, READ, Steering(moved(x, kept), moved(0.0))) for (a, s), x in changes.items()),
    )  # fmt: skip
