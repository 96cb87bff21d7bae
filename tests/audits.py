"""Small audits that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.studies.audit.engine import Job
from diffusion_lens.studies.audit.freeze import freeze
from diffusion_lens.studies.audit.plan import AuditPlan

CPU = RunOptions(device="cpu")
PROMPTS = ["a portrait of a doctor", "a portrait of a nurse"]


def plan_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A plan of the tiny lens: two prompts, an edit with its control, 24 images in batches of 4."""
    return {
        "subjects": [{"lens": str(folder)}],
        "prompts": {"texts": PROMPTS},
        "edits": [{"kind": "steer", "turns": [{"attribute": "gender", "class": "male", "beta": 3.0}]}],
        "size": {"images": 24, "batch_size": 4},
        "readers": {"blind": 12},
        **changes,
    }


def job_of(lens: DiffusionLens, out: Path, **changes: Any) -> Job:
    """A job of the tiny lens, begun."""
    plan = AuditPlan.parse(plan_values(lens.folder, **changes))
    job = Job(freeze(plan, Path(), CPU), out)
    job.begin()
    return job


def save_images(folder: Path, images: np.ndarray, prompts: list[str]) -> Path:
    """Images as PNG beside an ``images.csv`` with prompts and seeds; returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,prompt,seed"]
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{prompts[i % len(prompts)]},{i // len(prompts)}")
    (folder / "images.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "images.csv"
