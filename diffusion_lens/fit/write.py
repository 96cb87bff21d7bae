"""The finished parts of a fit → a lens folder."""

from __future__ import annotations

from pathlib import Path

from diffusion_lens.base.files import copy_file, disk_errors, load_tensors, read_json, write_json
from diffusion_lens.base.sheets import save_sheets
from diffusion_lens.base.transaction import Change, changing
from diffusion_lens.base.types import LensError
from diffusion_lens.features.probes import save_probes
from diffusion_lens.fit.config import FitConfig
from diffusion_lens.fit.flip_books import read_flip_books
from diffusion_lens.fit.measure import read_atlas, read_settings, read_sweeps
from diffusion_lens.fit.stages import Work, read_attributions, read_probes, read_sae
from diffusion_lens.judging.described import save_classifier
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.model.stored import open_stored
from diffusion_lens.results.flip_book import FlipBook
from diffusion_lens.results.kinds import kind_of
from diffusion_lens.results.manifest import MANIFEST, AttributeConfig, BaseModelRef, Manifest, commit_whole, content
from diffusion_lens.results.records import save_atlas, save_attributions, save_sweep

OWN_FOLDERS = ("sae", "classifier", "examples", "sweeps", "fit", "comparisons", "together", "counted", "flip-books")
PIPELINE_FILES = (".json", ".txt", ".safetensors", ".model", ".jinja")


def write_lens(work: Work, out: Path) -> Manifest:
    """Put the finished parts into the lens folder ``out``; a lens that is there is replaced as a whole at the end."""
    with changing(out) as change:
        check_target(out)
        with disk_errors(out):
            adopted = _write_parts(work, change)
        place = change.folder if adopted else change.staged
        manifest = _manifest(work, place / "pipeline" if work.config.bundle_pipeline else None)
        return commit_whole(change, manifest, adopted=adopted)


def _write_parts(work: Work, change: Change) -> list[str]:
    """Stage every file of the lens; returns those of a pipeline that lies in the lens folder already."""
    config, sae, classifier, out = work.config, read_sae(work), work.classifier, change.staged
    sae.save(out / "sae")
    # One that cannot be stored is given to from_pretrained instead.
    save_classifier(classifier, out / "classifier")
    save_probes(out / "probes.safetensors", read_probes(work))
    save_attributions(out / "attribution.safetensors", read_attributions(work))
    save_atlas(out / "atlas.safetensors", read_atlas(work))
    _write_examples(work, out / "examples")
    for number, sweep in enumerate(read_sweeps(work)):
        suffix = "-control" if sweep.is_control else ""
        save_sweep(sweep, out / "sweeps", f"{number:03d}-{sweep.attribute.name}{suffix}")
    books = kind_of(FlipBook)
    for book in read_flip_books(work):
        books.save(book, out / books.folder, books.stem(book))
    _write_log(work, out / "fit")
    return _bundle(config, work.model, change)


def _manifest(work: Work, bundled: Path | None) -> Manifest:
    """``bundled``: where the lens's own pipeline lies now; ``None`` for a lens that has none."""
    config, classifier = work.config, work.classifier
    steered = [work.attribute(name) for name in config.attributes]
    others = [a for a in classifier.attributes if a not in steered]
    # What the model is: the copy in the lens, else the files it was loaded from, if from any.
    stored = open_stored(bundled, config.variant) if bundled is not None else work.model.stored
    return Manifest(
        name=config.name,
        base_model=BaseModelRef(
            id=config.model_id,
            source="pipeline" if config.bundle_pipeline else config.model,
            revision=config.revision,
            bundled=config.bundle_pipeline,
            variant=None if stored is None else next(filter(None, stored.variants.values()), None),
            digests={} if stored is None else stored.digests(),
            size=work.model.settings.size,
            max_sequence_length=work.model.settings.max_sequence_length,
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
        sae_id=read_sae(work).sae_id,
        classifier_id=classifier.classifier_id,
        labeller_id=work.labeller.classifier_id,
    )


def check_target(out: Path) -> None:
    """Raise ``LensError`` if ``out`` holds anything that is no part of a lens."""
    known = {*OWN_FOLDERS, "pipeline", MANIFEST, "README.md"}
    found = [path for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
    strangers = sorted(path.name for path in found if path.name not in known and path.suffix != ".safetensors")
    if strangers:
        raise LensError(f"{out} holds '{strangers[0]}', which is no part of a lens; choose another folder.")


def _write_examples(work: Work, folder: Path) -> None:
    stored = load_tensors(work.folders["atlas"] / "pool.safetensors")
    save_sheets(stored["images"], folder, "pool")
    rows = work.rows()
    write_json(folder / "origin.json", [list(rows[row]) for row in stored["rows"]])


def _bundle(config: FitConfig, model: DiffusionModel, change: Change) -> list[str]:
    """Copy a local pipeline as it is; write one from the hub or from memory in shards under 10 MB.

    Returns the names of the pipeline's files where the model that was fitted is the lens's own: they stay.
    """
    source, target = Path(config.model), change.staged / "pipeline"
    if source.is_dir() and source.resolve() == (change.folder / "pipeline").resolve():
        return [name for name in content(change.folder) if name.startswith("pipeline/")]
    if config.bundle_pipeline and not source.is_dir():
        model.pipeline.save_pretrained(target, safe_serialization=True, max_shard_size="9MB")
    elif config.bundle_pipeline:
        for path in source.rglob("*"):
            if path.is_file() and path.suffix in PIPELINE_FILES:
                copy_file(path, target / path.relative_to(source))
    return []


def _write_log(work: Work, folder: Path) -> None:
    """The configuration without this machine's paths, and how training went."""
    values = work.config.model_dump(mode="json")
    values.update(
        model=work.config.model_id,
        classifier=work.classifier.classifier_id,
        labeller=work.labeller.classifier_id,
    )
    write_json(folder / "config.json", values, indent=1)
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
