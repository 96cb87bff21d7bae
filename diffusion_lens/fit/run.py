"""Fit a lens: sample, label, collect, train, attribute, map, choose, sweep, and write the folder.

Each stage has a folder named after a hash of everything that decides its content, and a marker when it is
done: a fit that is killed goes on where it was, and a changed configuration repeats only what it touches.
Under ``accelerate launch`` the processes share the stages that draw and read images; the main one does the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_lens.base.files import disk_errors, write_json
from diffusion_lens.base.processes import ALONE, Processes
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.base.weights import weights_digest
from diffusion_lens.fit.config import STAGES, FitConfig, stage_hashes
from diffusion_lens.fit.estimate import Estimate, estimate
from diffusion_lens.fit.flip_books import fit_flip_books
from diffusion_lens.fit.measure import fit_effects, fit_settings, fit_sweeps
from diffusion_lens.fit.stages import (
    SHARED_STAGES,
    Work,
    collect_activations,
    fit_atlas,
    fit_attributions,
    fit_probes,
    fit_sae,
    label,
    sample,
)
from diffusion_lens.fit.write import check_target, write_lens
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.judging.described import open_classifier
from diffusion_lens.judging.labelled import HumanLabels
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.pipelines import DiffusionModel, load_model
from diffusion_lens.model.run_options import RunOptions

DONE = "done.json"
PEOPLE = "csv:"
"""Begins a labeller that is a table of people's labels."""
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
    "flip-books": fit_flip_books,
}
WEIGHTS: Mapping[str, float] = {
    "sample": 30, "label": 2, "collect": 15, "sae": 15, "probes": 5, "attribution": 5, "atlas": 5, "settings": 15,
    "effects": 4, "sweeps": 20, "flip-books": 20,
}  # fmt: skip
"""About how long the stages take beside each other, for the bar alone."""


@dataclass(frozen=True, eq=False)
class Models:
    """The models that a fit runs: the diffusion model, the classifier that judges, and the one that labels."""

    model: DiffusionModel
    classifier: Classifier
    labeller: Classifier


def load_models(
    config: FitConfig,
    *,
    device: str = "cpu",
    dtype: Any = None,
    offline: bool = False,
    options: RunOptions | None = None,
) -> Models:
    """Load what ``config`` names; ``options`` take the place of ``device`` and ``dtype`` for the diffusion model."""
    import torch

    model = load_model(
        config.model, device=device, dtype=dtype or torch.float32, hook_name=config.hook_name,
        revision=config.revision, offline=offline, model_id=config.model_id, options=options, variant=config.variant,
        size=config.size, max_sequence_length=config.max_sequence_length,
    )  # fmt: skip
    classifier = open_classifier(config.classifier, device=device, offline=offline)
    return Models(model, classifier, open_labeller(config.labeller, classifier, device=device, offline=offline))


def open_labeller(source: str | None, judge: Classifier, *, device: str = "cpu", offline: bool = False) -> Classifier:
    """The classifier that labels: ``judge`` itself (``None``), people (``csv:FILE``), or as ``open_classifier``."""
    if source is None:
        return judge
    if source.startswith(PEOPLE):
        return HumanLabels.from_csv(source.removeprefix(PEOPLE), judge.attributes)
    return open_classifier(source, device=device, offline=offline)


def prepare(
    config: FitConfig,
    models: Models,
    work: Path,
    processes: Processes = ALONE,
) -> Work:
    """The stages' folders under ``work``; raises ``LensError`` where models and configuration do not fit."""
    model = models.model
    if model.model_id != config.model_id or model.hook_name != config.hook_name:
        raise LensError(f"The model is '{model.model_id}' at {model.hook_name}; the configuration names others.")
    for name in ("size", "max_sequence_length"):
        asked, own = getattr(config, name), getattr(model.settings, name)
        if asked is not None and asked != own:
            raise LensError(f"The configuration says {name} {asked} and the model was opened with {own}.")
    if model.is_text != bool(config.sampling_prompts):
        raise LensError("A text model needs sampling_prompts, an unconditional one takes none.")
    model = replace(model, vocabulary=config.vocabulary)
    for prompt in dict.fromkeys((*config.sampling_prompts, *config.prompts, *config.sweep_prompts)):
        model.check_prompt(prompt)
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
    ready = Work(config, model, models.classifier, models.labeller, folders, processes=processes)
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
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> DiffusionLens:
    """Fit a lens and write it to ``out``; ``work`` keeps intermediate results and may be deleted afterwards.

    Killed at any point, the same call goes on and gives the same lens; ``progress`` tells the stages by name. See
    ``fit.estimate`` for the cost beforehand. Several ``processes`` (see ``processes.launched``) make the same lens as
    one, on one folder that all of them reach.

    Raises:
        LensError: what does not fit together, a class that too few images show, or a full disk.
    """
    check_target(Path(out))
    models = models or load_models(config, device=device, dtype=dtype, offline=offline)
    ready = prepare(config, models, Path(work), processes)
    check_judge(config, models.classifier)
    parts = (progress or Progress()).parts([WEIGHTS[stage] for stage in STAGES], STAGES)
    with disk_errors(Path(work)):
        for stage, part in zip(STAGES, parts, strict=True):
            run_stage(replace(ready, progress=part), stage)
    if processes.is_main:
        write_lens(ready, Path(out))
    processes.wait()
    return DiffusionLens.from_pretrained(out, device=device, dtype=dtype, offline=offline)


def check_judge(config: FitConfig, judge: Classifier) -> None:
    """Raise ``LensError`` where the judge's error on a steered attribute is unknown: no share could be corrected."""
    unknown = [name for name in config.attributes if name not in judge.confusion]
    if unknown:
        raise LensError(
            f"How often the classifier errs on {unknown[0]} is not known: give images that people labelled, with "
            "--labelled FILE.csv (--label-sheet FOLDER writes some to fill in), or say --assume-no-error."
        )


def run_stage(work: Work, stage: str) -> None:
    """Run one stage unless its marker says it is done; returns when every process may go on."""
    pieces, processes = work.pieces(stage), work.processes
    if pieces.has(DONE):
        work.progress.found()
    elif processes.is_main or stage in SHARED_STAGES:
        with disk_errors(pieces.folder):
            pieces.folder.mkdir(parents=True, exist_ok=True)
        STAGE_FUNCTIONS[stage](work)
    # Nobody may write the marker while another still looks for it.
    processes.wait()
    if processes.is_main:
        pieces.keep(DONE, lambda: {"stage": stage}, write_json)
    processes.wait()


def check_space(cost: Estimate, work: Path, out: Path) -> None:
    """Raise ``LensError`` if the disk under ``work``, or that of the finished lens ``out``, is too small."""
    places = [next(p for p in (path, *path.resolve().parents) if p.is_dir()) for path in (work, out)]
    needs: dict[int, tuple[Path, int]] = {}
    for place, needed in zip(places, (cost.disk_bytes, cost.lens_bytes), strict=True):
        disk = place.stat().st_dev
        needs[disk] = (needs.get(disk, (place, 0))[0], needs.get(disk, (place, 0))[1] + needed)
    for place, needed in needs.values():
        free = shutil.disk_usage(place).free
        if needed > free:
            raise LensError(
                f"The fit needs about {needed / 1e9:.1f} GB on the disk under {place}, which has {free / 1e9:.1f} GB; "
                "choose another folder, fewer images or fewer steps."
            )


def load_config(path: str | Path) -> FitConfig:
    """Read a fit's configuration; relative paths in it count from its own folder. Errors name the wrong key."""
    path = Path(path)
    config = FitConfig.load(path)

    def found(source: str | None) -> str | None:
        people = source is not None and source.startswith(PEOPLE)
        beside = path.parent / source.removeprefix(PEOPLE) if source else None
        if beside is None or not beside.exists():
            return source
        return f"{PEOPLE if people else ''}{beside}"

    return config.model_copy(update={key: found(getattr(config, key)) for key in ("model", "classifier", "labeller")})


__all__ = [
    "FitConfig", "Models", "estimate", "fit", "load_config", "load_models", "open_labeller", "prepare", "write_lens",
]  # fmt: skip
