"""Fit a lens: sample, label, collect, train, attribute, map, choose, sweep, and write the folder.

Each stage has a folder named after a hash of everything that decides its content, and a marker when it is
done: a fit that is killed goes on where it was, and a changed configuration repeats only what it touches.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_lens.artifacts import (
    MANIFEST,
    AttributeConfig,
    BaseModelRef,
    Manifest,
    load_tensors,
    read_json,
    write_json,
    write_manifest,
)
from diffusion_lens.classify import Classifier, HeadsClassifier
from diffusion_lens.fit_config import STAGES, FitConfig, stage_hashes
from diffusion_lens.fit_estimate import Estimate, estimate
from diffusion_lens.fit_measure import fit_effects, fit_settings, fit_sweeps, read_atlas, read_settings
from diffusion_lens.fit_stages import (
    OnStage,
    Work,
    collect_activations,
    fit_atlas,
    fit_attributions,
    fit_probes,
    fit_sae,
    label,
    read_attributions,
    read_probes,
    read_sae,
    sample,
)
from diffusion_lens.lens import DiffusionLens
from diffusion_lens.pipelines import DiffusionModel, load_model
from diffusion_lens.records import load_sweeps, save_atlas, save_attributions, save_probes, save_sweep
from diffusion_lens.sheets import save_sheets
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
OWN_FOLDERS = ("sae", "classifier", "examples", "sweeps", "fit")
PIPELINE_FILES = (".json", ".txt", ".safetensors", ".model")


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
    identities = {
        "unet": weights_digest(model.unet, type(model.pipeline.scheduler).__name__, str(model.dtype)),
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
    ready = prepare(
        config, models or load_models(config, device=device, dtype=dtype, offline=offline), Path(work), on_stage
    )
    for stage in STAGES:
        run_stage(ready, stage)
    return write_lens(ready, Path(out), device=device, dtype=dtype, offline=offline)


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


def write_lens(
    work: Work, out: Path, *, device: str = "cpu", dtype: Any = None, offline: bool = False
) -> DiffusionLens:
    """Put the finished parts into the lens folder ``out``, replacing a lens that is there, and open it."""
    config, sae, classifier = work.config, read_sae(work), work.classifier
    _clear(out)
    sae.save(out / "sae")
    _save_classifier(classifier, out / "classifier")
    save_probes(out / "probes.safetensors", read_probes(work))
    save_attributions(out / "attribution.safetensors", read_attributions(work))
    save_atlas(out / "atlas.safetensors", read_atlas(work))
    _write_examples(work, out / "examples")
    for number, sweep in enumerate(load_sweeps(work.folders["sweeps"])):
        suffix = "-control" if sweep.is_control else ""
        save_sweep(sweep, out / "sweeps", f"{number:03d}-{sweep.attribute.name}{suffix}")
    if config.bundle_pipeline:
        _bundle(config, work.model, out / "pipeline")
    _write_log(work, out / "fit")
    steered = [work.attribute(name) for name in config.attributes]
    others = [a for a in classifier.attributes if a not in steered]
    manifest = Manifest(
        name=config.name,
        base_model=BaseModelRef(
            id=config.model_id,
            source="pipeline" if config.bundle_pipeline else config.model,
            revision=config.revision,
            bundled=config.bundle_pipeline,
        ),
        hook_name=config.hook_name,
        scheduler=type(work.model.pipeline.scheduler).__name__,
        n_steps=config.n_steps,
        guidance_scale=config.guidance_scale,
        attributes=tuple(AttributeConfig(name=a.name, classes=a.classes) for a in steered),
        nuisances=tuple(AttributeConfig(name=a.name, classes=a.classes) for a in others),
        prompts=config.prompts,
        vocabulary=config.vocabulary,
        settings=read_settings(work),
        sae_id=sae.sae_id,
        classifier_id=classifier.classifier_id,
        labeller_id=work.labeller.classifier_id,
    )
    write_manifest(out, manifest)
    return DiffusionLens.from_pretrained(out, device=device, dtype=dtype, offline=offline)


def _clear(out: Path) -> None:
    """Remove a former lens's own parts; a folder with anything else in it is refused."""
    if not out.exists():
        out.mkdir(parents=True)
        return
    known = {*OWN_FOLDERS, "pipeline", MANIFEST, "README.md"}
    strangers = [
        p.name for p in out.iterdir() if p.name not in known and p.suffix != ".safetensors" and p.name[0] != "."
    ]
    if strangers:
        raise LensError(f"{out} holds '{strangers[0]}', which is no part of a lens; choose another folder.")
    (out / MANIFEST).unlink(missing_ok=True)
    for name in OWN_FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)


def _save_classifier(classifier: Classifier, folder: Path) -> None:
    """Store the classifier with the lens; one that cannot be stored is given to ``from_pretrained`` instead."""
    save = getattr(classifier, "save", None)
    if save is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save(folder)


def _write_examples(work: Work, folder: Path) -> None:
    stored = load_tensors(work.folders["atlas"] / "pool.safetensors")
    save_sheets(stored["images"], folder, "pool")
    rows = work.rows()
    write_json(folder / "origin.json", [list(rows[row]) for row in stored["rows"]])


def _bundle(config: FitConfig, model: DiffusionModel, target: Path) -> None:
    """Copy a local pipeline as it is; write one from the hub or from memory in shards under 10 MB."""
    source = Path(config.model)
    if source.is_dir() and target.is_dir() and source.resolve() == target.resolve():
        return
    shutil.rmtree(target, ignore_errors=True)
    if not source.is_dir():
        model.pipeline.save_pretrained(target, safe_serialization=True, max_shard_size="9MB")
        return
    for path in source.rglob("*"):
        if path.is_file() and path.suffix in PIPELINE_FILES:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))


def _write_log(work: Work, folder: Path) -> None:
    """The configuration without this machine's paths, and how training went."""
    values = work.config.model_dump(mode="json")
    values.update(
        model=work.config.model_id,
        classifier=work.classifier.classifier_id,
        labeller=work.labeller.classifier_id,
    )
    write_json(folder / "config.json", values)
    accuracy = {name: [round(float(a), 4) for a in p.accuracy] for name, p in read_probes(work).items()}
    gaps = {name: a.completeness_gap for name, a in read_attributions(work).items()}
    trials = {
        name: read_json(path)
        for name in work.config.attributes
        if (path := work.folders["settings"] / f"{name}-trials.json").is_file()
    }
    log = read_json(work.folders["sae"] / "log.json")
    write_json(
        folder / "log.json", {"sae": log, "probe_accuracy": accuracy, "completeness_gap": gaps, "trials": trials}
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
