"""Fit a lens: sample, label, collect, train, attribute, map, choose, sweep, and write the folder.

Each stage has a folder named after a hash of everything that decides its content, and a marker when it is
done: a fit that is killed goes on where it was, and a changed configuration repeats only what it touches.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_lens.artifacts import write_json
from diffusion_lens.classify import Classifier, HeadsClassifier
from diffusion_lens.fit_config import STAGES, FitConfig, stage_hashes
from diffusion_lens.fit_estimate import Estimate, estimate
from diffusion_lens.fit_measure import fit_effects, fit_settings, fit_sweeps
from diffusion_lens.fit_stages import (
    OnStage,
    Work,
    collect_activations,
    fit_atlas,
    fit_attributions,
    fit_probes,
    fit_sae,
    label,
    sample,
)
from diffusion_lens.fit_write import check_target, write_lens
from diffusion_lens.lens import DiffusionLens
from diffusion_lens.pipelines import DiffusionModel, load_model
from diffusion_lens.types import LensError
from diffusion_lens.weights import weights_digest

DONE = "done.json"
STAGE_FUNCTIONS: Mapping[str, Callable[[Work], None]] = {
    "sample": sample,
    "label": label,
    "collect": collect_activations,
    "sae": fit_sae,
    "probes": fit_probes,
    "attribution": fit_attributions,
    "atlas": fit_atlas,
    "settings": fit_settings,
    "effects": fit_effects,
    "sweeps": fit_sweeps,
}


@dataclass(frozen=True, eq=False)
class Models:
    """The models that a fit runs: the diffusion model, the classifier that judges, and the one that labels."""

    model: DiffusionModel
    classifier: Classifier
    labeller: Classifier


def load_models(config: FitConfig, *, device: str = "cpu", dtype: Any = None, offline: bool = False) -> Models:
    """Load what ``config`` names."""
    import torch

    model = load_model(
        config.model, device=device, dtype=dtype or torch.float32, hook_name=config.hook_name,
        revision=config.revision, offline=offline, model_id=config.model_id,
    )  # fmt: skip
    classifier = HeadsClassifier.load(config.classifier, device=device)
    labeller = HeadsClassifier.load(config.labeller, device=device) if config.labeller else classifier
    return Models(model, classifier, labeller)


def prepare(config: FitConfig, models: Models, work: Path, on_stage: OnStage | None = None) -> Work:
    """The stages' folders under ``work``; raises ``LensError`` where models and configuration do not fit."""
    model = models.model
    if model.model_id != config.model_id or model.hook_name != config.hook_name:
        raise LensError(f"The model is '{model.model_id}' at {model.hook_name}; the configuration names others.")
    if model.is_text != bool(config.sampling_prompts):
        raise LensError("A text model needs sampling_prompts, an unconditional one takes none.")
    scheduler = model.pipeline.scheduler
    # Keys with an underscore are diffusers' own notes: versions and file names.
    sampler = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    identities = {
        "scheduler": f"{type(scheduler).__name__} {json.dumps(sampler, sort_keys=True, default=str)}",
        "dtype": str(model.dtype),
        **{n: weights_digest(part) for n, part in model.pipeline.components.items() if isinstance(part, nn.Module)},
        "classifier": models.classifier.classifier_id,
        "labeller": models.labeller.classifier_id,
    }
    folders = {stage: work / f"{stage}-{digest}" for stage, digest in stage_hashes(config, identities).items()}
    ready = Work(config, model, models.classifier, models.labeller, folders, on_stage or (lambda *_: None))
    for name in config.attributes:
        ready.attribute(name)
    return ready


def fit(
    config: FitConfig,
    out: str | Path,
    *,
    work: str | Path,
    models: Models | None = None,
    device: str = "cpu",
    dtype: Any = None,
    offline: bool = False,
    on_stage: OnStage | None = None,
) -> DiffusionLens:
    """Fit a lens and write it to ``out``; ``work`` keeps intermediate results and may be deleted afterwards.

    Killed at any point, the same call goes on and gives the same lens. ``on_stage(stage, done, total)`` may
    raise to stop. See ``fit_estimate.estimate`` for the cost beforehand.

    Raises:
        LensError: what does not fit together, or a class that too few images show.
    """
    check_target(Path(out))
    ready = prepare(
        config, models or load_models(config, device=device, dtype=dtype, offline=offline), Path(work), on_stage
    )
    for stage in STAGES:
        run_stage(ready, stage)
    write_lens(ready, Path(out))
    return DiffusionLens.from_pretrained(out, device=device, dtype=dtype, offline=offline)


def run_stage(work: Work, stage: str) -> None:
    """Run one stage unless its marker says it is done."""
    folder = work.folders[stage]
    if (folder / DONE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    STAGE_FUNCTIONS[stage](work)
    write_json(folder / DONE, {"stage": stage})


def check_space(cost: Estimate, work: Path) -> None:
    """Raise ``LensError`` if the disk under ``work`` is too small for the estimate."""
    place = next(p for p in (work, *work.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if cost.disk_bytes > free:
        raise LensError(
            f"The fit needs about {cost.disk_bytes / 1e9:.1f} GB on disk and {place} has {free / 1e9:.1f} GB; "
            "choose another work folder, fewer images or fewer steps."
        )


def load_config(path: str | Path) -> FitConfig:
    """Read a fit's configuration; relative paths in it count from its own folder. Errors name the wrong key."""
    path = Path(path)
    config = FitConfig.load(path)

    def found(source: str | None) -> str | None:
        beside = path.parent / source if source else None
        return str(beside) if beside is not None and beside.is_dir() else source

    return config.model_copy(update={key: found(getattr(config, key)) for key in ("model", "classifier", "labeller")})


__all__ = ["FitConfig", "Models", "estimate", "fit", "load_config", "load_models", "prepare", "write_lens"]
