"""A dissection of known numbers for the tiny lens, and a depth experiment of known shares, for tests of the app."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.files import write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import Share
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.depth import DepthPoint, DepthResult, Flips
from diffusion_lens.results.dissection import Dissection

NURSE = "a portrait of a nurse"


def dissection(sae_id: str, **changes: Any) -> Dissection:
    """Features 1 and 2 move glasses, 3 moves gender, 4 nothing for sure, 5 never fires; nothing moves age."""
    classes = {"gender": ("female", "male"), "age": ("young", "adult", "old"), "glasses": ("none", "glasses")}
    effects = {name: np.zeros((5, len(own))) for name, own in classes.items()}
    effects["glasses"][:2] = [[-0.5, 0.5], [0.25, -0.25]]
    effects["gender"][2] = [-0.75, 0.75]
    effects["age"][3] = [0.1, 0.0, -0.1]
    p_values = {name: np.where(np.abs(effect) > 0.2, 1e-6, 0.8) for name, effect in effects.items()}
    for p in p_values.values():
        p[4] = np.nan
    values: dict[str, Any] = {
        "features": (1, 2, 3, 4, 5), "betas": (5.0,) * 5, "classes": classes, "effects": effects,
        "low": {k: v - 0.1 for k, v in effects.items()}, "high": {k: v + 0.1 for k, v in effects.items()},
        "p_values": p_values, "q_values": {k: 10 * v for k, v in p_values.items()},
        "flips": {k: np.abs(v[:, 0]) for k, v in effects.items()}, "sae_id": sae_id,
        "source": "turned alone (scale, β = 5) on 32 images", "alpha": 0.05, "n": 32, **changes,
    }  # fmt: skip
    return Dissection(**values)


def keep_in(folder: Path) -> None:
    """Store ``dissection`` in a lens folder."""
    lens = DiffusionLens.from_pretrained(folder)
    lens.store(dissection(lens.manifest.sae_id))


def depth_result() -> DepthResult:
    """Three depths, two guidance scales, with and without bypass; deeper means further from the planted 40 % male."""
    points, planted = [], {"gender": (0.6, 0.4), "age": (0.5, 0.3, 0.2)}
    classes = {"gender": ("female", "male"), "age": ("young", "adult", "old")}
    for level, depth in enumerate(("2 levels", "3 levels", "4 levels")):
        for bypass in (False, True):
            for scale in (1.0, 3.0):
                for name, truth in planted.items():
                    shift = 0.05 * level * scale * (0.5 if bypass else 1)
                    told = (truth[0] + shift, *truth[1:-1], truth[-1] - shift)
                    shares = tuple(
                        Share(label, round(100 * s), 100, 2, s, (s - 0.06, s + 0.06), s, (s - 0.06, s + 0.06))
                        for label, s in zip(classes[name], told, strict=True)
                    )
                    over = tuple(s - t for s, t in zip(told, truth, strict=True))
                    points.append(
                        DepthPoint(
                            depth, bypass, NURSE, scale, name, shares, truth, over,
                            tuple((o - 0.06, o + 0.06) for o in over), classes[name][0],
                        )
                    )  # fmt: skip
    flips = tuple(
        Flips("2 levels", "4 levels", NURSE, scale, name, classes[name][0], 12, 2, 0.0129, 96)
        for scale in (1.0, 3.0) for name in planted
    )  # fmt: skip
    config = {"train": {"n_steps": 10, "batch_size": 4}, "n": 100}
    return DepthResult(tuple(points), flips, {"2 levels": 10**6, "3 levels": 2 * 10**6, "4 levels": 4 * 10**6}, config,
                       "c")  # fmt: skip


def keep_depth(path: Path) -> None:
    """Write ``depth_result`` as the app reads it."""
    write_json(path, to_plain(depth_result()))
