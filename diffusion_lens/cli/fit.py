"""``fit`` and ``calibrate``: a lens from a model, and a photo classifier's error from labelled images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_lens.base.types import LensError
from diffusion_lens.cli.console import guarded, percent, progress, say, show_json, show_table
from diffusion_lens.cli.options import DEFAULT_RUN, JsonOption, hide_loading_bars, with_flags
from diffusion_lens.model.run_options import RunOptions

if TYPE_CHECKING:
    from diffusion_lens.base.processes import Processes
    from diffusion_lens.fit.run import FitConfig, Models
    from diffusion_lens.judging.described import Detector
    from diffusion_lens.lens.lens import DiffusionLens

MODEL, READING, SIZE = "The model", "Who reads the images", "Size; the defaults depend on the kind of model"
ClassifierOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=READING,
        help="Judges the images: clip, clip:ID, fairface:FILE, hf:ID, a description (.json) or a classifier's folder.",
    ),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=READING,
        help="JSON: attribute, class, and for each class CLIP prompts or the network's own labels.",
    ),
]
DetectorOption = Annotated[
    bool,
    typer.Option("--find-faces", rich_help_panel=READING, help="Find and crop the face first (OpenCV's YuNet)."),
]


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("fit")(fit)
    app.command("calibrate")(calibrate)


@guarded
@with_flags
def fit(
    given: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG | PROMPTS]", help="A JSON file; or more prompts.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the finished lens.")] = Path("my-lens"),
    work: Annotated[Path, typer.Option(help="Folder of intermediate results; may be deleted afterwards.")] = Path(
        "runs/fit"
    ),
    model: Annotated[
        str | None, typer.Option("--model", "-m", rich_help_panel=MODEL, help="Hub id or folder of a diffusers model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(rich_help_panel=MODEL, help="Of the hub repository.")] = None,
    variant: Annotated[
        str | None,
        typer.Option(rich_help_panel=MODEL, help="Which weight files to read, e.g. fp16; the plain ones by default."),
    ] = None,
    hook_name: Annotated[
        str,
        typer.Option(
            "--site",
            "--hook-name",
            rich_help_panel=MODEL,
            help="Where the model is read and edited: module, module:update or module:output:text; by default a "
            "U-Net's bottleneck or a transformer's middle block.",
        ),
    ] = "",
    image_size: Annotated[
        str | None,
        typer.Option("--size", rich_help_panel=MODEL, help="HEIGHTxWIDTH in pixels; by default the model's own."),
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(rich_help_panel=MODEL, min=0, help="Tokens of a prompt (max_sequence_length of its own call)."),
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", rich_help_panel=MODEL, help="Copy the model into the lens.")
    ] = False,
    name: Annotated[str | None, typer.Option(rich_help_panel=MODEL, help="Of the lens.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", "-p", rich_help_panel=MODEL, help="To sample; may be repeated.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(rich_help_panel=MODEL, help="A text file with one prompt a line.")
    ] = None,
    attributes: Annotated[
        str, typer.Option("--attributes", "-a", rich_help_panel=READING, help="What to steer, e.g. gender,age,race.")
    ] = "",
    classifier: ClassifierOption = "clip",
    labels: LabelsOption = None,
    find_faces: DetectorOption = False,
    labelled: Annotated[
        Path | None,
        typer.Option(rich_help_panel=READING, help="Labelled images (CSV) that measure the classifier's error."),
    ] = None,
    assume_no_error: Annotated[
        bool,
        typer.Option(
            "--assume-no-error",
            rich_help_panel=READING,
            help="Take the classifier's word: its error stays unmeasured and corrected shares equal the raw ones.",
        ),
    ] = False,
    labeller: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=READING,
            help="Labels the images that are learned from: csv:FILE (people), or as --classifier.",
        ),
    ] = None,
    label_sheet: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=READING, help="Only sample, and write the images with a table for people to fill."
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Images sampled and labelled.")] = None,
    per_class: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Images learned from, a class.")] = None,
    steps: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(rich_help_panel=SIZE, help="Guidance scale; 1 is none.")] = None,
    batch_size: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Images drawn at once.")] = None,
    sae_features: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Features of the SAE.")] = None,
    sae_k: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Active ones at a time.")] = None,
    sae_steps: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Training steps of the SAE.")] = None,
    sae_layout: Annotated[
        str | None,
        typer.Option(rich_help_panel=SIZE, help="position: a code per position; map: one for the whole map."),
    ] = None,
    sweep_images: Annotated[int | None, typer.Option(rich_help_panel=SIZE, help="Images per strength swept.")] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=SIZE, help="Of every random choice.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", rich_help_panel=SIZE, help="A small lens, for a first look.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--dry-run", "--estimate", help="Only say what it will cost in time, disk and memory.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask a hub.")] = False,
    running: RunOptions = DEFAULT_RUN,
    as_json: JsonOption = False,
) -> None:
    """Fit a lens to a diffusion model: sample, train the SAE and probes, attribute, choose turns, sweep.

    Killed or stopped, the same command goes on where it was. What it was fitted with is written to WORK/fit.json,
    which may be given in place of the flags.

      python -m diffusion_lens fit --model stable-diffusion-v1-5/stable-diffusion-v1-5 --attributes gender,age,race \\
        --prompts 'a photo of a doctor' 'a photo of a nurse' --dtype fp16 --labelled faces/labels.csv --out my-lens

      python -m diffusion_lens fit --model google/ddpm-celebahq-256 --attributes gender \
        --classifier fairface:FILE --dry-run

      python -m diffusion_lens fit runs/fit/fit.json --out my-lens

      accelerate launch --num_processes 2 -m diffusion_lens fit …
    """
    from diffusion_lens.base.processes import launched
    from diffusion_lens.fit import run as fitting

    processes = launched()
    running = running.model_copy(update={"device": processes.device(running.device)})
    if model is None:
        if not given or len(given) != 1:
            raise LensError("Name a model with --model, or give one configuration file.")
        config = fitting.load_config(given[0])
        _announce(processes, "Loading the models…")
        models = fitting.load_models(config, device=running.device, offline=offline, options=running)
    else:
        texts = _prompts(prompts, given, prompts_file)
        reading = _Reading(classifier, labels, find_faces, labelled, assume_no_error, labeller, attributes)
        changes = {
            "n_images": images, "per_class": per_class, "n_steps": steps, "guidance_scale": guidance,
            "batch_size": batch_size, "sweep_images": sweep_images, "seed": seed, "name": name, "revision": revision,
            "variant": variant, "bundle_pipeline": bundle, "size": _size(image_size),
            "max_sequence_length": text_tokens,
        }  # fmt: skip
        sae = {"d_sae": sae_features, "k": sae_k, "n_steps": sae_steps, "layout": sae_layout, "seed": seed}
        _announce(processes, "Loading the models…")
        config, models = _from_flags(model, hook_name, texts, reading, changes, sae, work, quick, running, offline)
    if label_sheet is not None:
        _write_sheet(config, models, work, label_sheet, processes)
        return
    if processes.is_main and _tell_cost(config, models, work, out, estimate, as_json):
        return
    if estimate:
        return
    with progress("fitting") as bar:
        lens = fitting.fit(
            config, out, work=work, models=models, device=running.device, dtype=running.torch_dtype, offline=offline,
            progress=bar.work if processes.is_main else None, processes=processes,
        )  # fmt: skip
    if processes.is_main:
        _report(lens, out, as_json)


def _size(text: str | None) -> tuple[int, int] | None:
    """``HEIGHTxWIDTH`` as two numbers."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise LensError(f"--size is HEIGHTxWIDTH in pixels, e.g. 512x512; '{text}' is none.")
    return int(parts[0]), int(parts[1])


class _Reading:
    """The flags about who reads the images."""

    def __init__(
        self,
        classifier: str,
        labels: Path | None,
        find_faces: bool,
        labelled: Path | None,
        assume_no_error: bool,
        labeller: str | None,
        attributes: str,
    ) -> None:
        self.classifier, self.labelled, self.labeller = classifier, labelled, labeller
        if labelled and assume_no_error:
            raise LensError("Either measure the classifier's error with --labelled, or assume that it has none.")
        self.assume_no_error = assume_no_error
        self.labels = _labels(labels)
        self.detector: Detector | None = "yunet" if find_faces else None
        self.attributes = tuple(part.strip() for part in attributes.split(",") if part.strip())


def _from_flags(
    model: str,
    hook_name: str,
    prompts: tuple[str, ...],
    reading: _Reading,
    changes: dict[str, Any],
    sae: dict[str, Any],
    work: Path,
    quick: bool,
    running: RunOptions,
    offline: bool,
) -> tuple[FitConfig, Models]:
    """The models that the flags name and the configuration that they mean, kept in ``work``."""
    from diffusion_lens.fit.defaults import default_config
    from diffusion_lens.fit.run import Models, open_labeller
    from diffusion_lens.model.pipelines import load_model

    hide_loading_bars()
    where = str(Path(model).resolve()) if Path(model).is_dir() else model
    # The classifier first: a mistake in its name should not wait for a large download.
    judge, source = _judge(reading, work, running.device, offline)
    opened = load_model(
        where,
        hook_name=hook_name,
        revision=changes["revision"],
        variant=changes["variant"],
        offline=offline,
        options=running,
        size=changes["size"],
        max_sequence_length=changes["max_sequence_length"],
    )
    people = reading.labeller
    if people is not None and people.startswith("csv:"):
        people = f"csv:{Path(people.removeprefix('csv:')).resolve()}"
    config = default_config(
        opened, judge, source=where, classifier=source, attributes=reading.attributes, prompts=prompts, quick=quick,
        sae=sae, changes={**changes, "labeller": people},
    )  # fmt: skip
    config.save(work / "fit.json")
    return config, Models(opened, judge, open_labeller(people, judge, device=running.device, offline=offline))


def _judge(reading: _Reading, work: Path, device: str, offline: bool) -> tuple[Any, str]:
    """The classifier, and what names it in a configuration: a folder, or a description that is kept in ``work``."""
    from diffusion_lens.judging.described import assumed_right, build, describe, named_spec, open_classifier
    from diffusion_lens.judging.labelled import calibrate_from_folder

    place = Path(reading.classifier)
    if place.exists():
        if reading.labels or reading.detector:
            raise LensError(
                "--labels and --find-faces go with clip, fairface or hf:ID; a saved classifier has its own."
            )
        if reading.labelled or reading.assume_no_error:
            raise LensError(f"{place} carries its own error; measure it anew with the command calibrate.")
        return open_classifier(place, device=device, offline=offline), str(place.resolve())
    spec = named_spec(reading.classifier, labels=reading.labels, detector=reading.detector)
    model = Path(spec.model)
    if model.exists():
        spec = spec.model_copy(update={"model": str(model.resolve())})
    judge = build(spec, device=device, offline=offline)
    if reading.labelled is not None:
        judge = calibrate_from_folder(judge, reading.labelled)
    elif reading.assume_no_error:
        judge = assumed_right(judge)
    (describe(judge) or spec).save(work / "classifier.json")
    return judge, str((work / "classifier.json").resolve())


def open_judge(classifier: str, labels: Path | None, find_faces: bool, work: Path, device: str) -> Any:
    """The classifier that flags name, as ``fit`` opens it; its error is measured with ``calibrate``, not here."""
    return _judge(_Reading(classifier, labels, find_faces, None, False, None, ""), work, device, False)[0]


def _prompts(prompts: list[str] | None, more: list[str] | None, file: Path | None) -> tuple[str, ...]:
    from diffusion_lens.fit.defaults import read_prompts

    if more and not prompts:
        raise LensError(f"With --model, '{more[0]}' is a prompt too many; give prompts after --prompts.")
    return tuple(dict.fromkeys([*(prompts or ()), *(more or ()), *(read_prompts(file) if file else ())]))


def _labels(path: Path | None) -> dict[str, dict[str, tuple[str, ...]]] | None:
    from pydantic import TypeAdapter, ValidationError

    from diffusion_lens.base.files import read_json

    if path is None:
        return None
    try:
        return TypeAdapter(dict[str, dict[str, tuple[str, ...]]]).validate_python(read_json(path))
    except (LensError, ValidationError):
        raise LensError(
            f'{path} is no table of labels; write JSON like {{"gender": {{"female": ["woman"], "male": ["man"]}}}}.'
        ) from None


def _write_sheet(config: FitConfig, models: Models, work: Path, folder: Path, processes: Processes) -> None:
    import numpy as np

    from diffusion_lens.fit.run import prepare, run_stage
    from diffusion_lens.fit.stages import sampled
    from diffusion_lens.judging.labelled import write_label_sheet

    with progress("sample") as bar:
        ready = prepare(config, models, work, processes)
        run_stage(replace(ready, progress=bar.work) if processes.is_main else ready, "sample")
    if not processes.is_main:
        return
    attributes = [ready.attribute(name) for name in config.attributes]
    table = write_label_sheet(np.concatenate(list(sampled(ready))), folder, attributes)
    say(f"Wrote {table}; fill it in and fit with --labeller csv:{table}")


def _tell_cost(config: FitConfig, models: Models, work: Path, out: Path, only: bool, as_json: bool) -> bool:
    """Print the estimate and refuse a disk that is too small; whether that is all that was asked for."""
    from diffusion_lens.fit import run as fitting

    cost = fitting.estimate(config, models.model, models.classifier)
    if only and as_json:
        stages = {c.stage: {"seconds": c.seconds, "disk_bytes": c.disk_bytes} for c in cost.stages}
        told = ("seconds", "memory_bytes", "model_bytes", "lens_bytes")
        show_json({"stages": stages, **{name: getattr(cost, name) for name in told}})
        return True
    say(cost.text())
    fitting.check_space(cost, work, out)
    try:
        fitting.check_judge(config, models.classifier)
    except LensError as error:
        if not only:
            raise
        say(str(error))
    return only


def _announce(processes: Processes, text: str) -> None:
    hide_loading_bars()
    if processes.is_main:
        say(text)


def _report(lens: DiffusionLens, out: Path, as_json: bool) -> None:
    if as_json:
        show_json({"folder": str(out), "lens_id": lens.manifest.lens_id, "sae_id": lens.manifest.sae_id})
        return
    show_table(
        f"{lens.manifest.name}, lens {lens.manifest.lens_id}",
        ("attribute", "features", "note"),
        [(name, str(setting.n_features), setting.note) for name, setting in lens.settings.items()],
    )
    say(f"The lens is in {out}; look at it with: python -m diffusion_lens serve --lens {out}")


@guarded
@with_flags
def calibrate(
    labelled: Annotated[Path, typer.Option(help="A CSV with a column file and one per attribute.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the described classifier.")],
    classifier: ClassifierOption = "clip",
    labels: LabelsOption = None,
    find_faces: DetectorOption = False,
    fit_rules: Annotated[
        bool, typer.Option("--fit-rules", help="Half of the images set temperature and threshold, the others measure.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask a hub.")] = False,
    running: RunOptions = DEFAULT_RUN,
    as_json: JsonOption = False,
) -> None:
    """Measure how often a photo classifier errs, on images that people labelled, and keep it with its error.

    python -m diffusion_lens calibrate --classifier clip --labelled photos/labels.csv --out runs/clip
    """
    from diffusion_lens.judging.described import build, named_spec, open_classifier, save_classifier
    from diffusion_lens.judging.labelled import calibrate_from_folder, fit_from_folder
    from diffusion_lens.judging.photos import PhotoClassifier

    hide_loading_bars()
    if Path(classifier).exists():
        read = open_classifier(classifier, device=running.device, offline=offline)
    else:
        spec = named_spec(classifier, labels=_labels(labels), detector="yunet" if find_faces else None)
        read = build(spec, device=running.device, offline=offline)
    if not isinstance(read, PhotoClassifier):
        raise LensError(f"{classifier} is no photo classifier; it carries the error that it was made with.")
    measured = fit_from_folder(read, labelled) if fit_rules else calibrate_from_folder(read, labelled)
    save_classifier(measured, out)
    rows = []
    for attribute in measured.attributes:
        if attribute.name not in measured.confusion:
            continue
        table, undecided = measured.confusion[attribute.name], measured.uncertain[attribute.name]
        for number, label in enumerate(attribute.classes):
            n = int(table[number].sum())
            right = percent(table[number, number] / n) if n else "–"
            rows.append((attribute.name, label, str(n), right, str(int(undecided[number]))))
    if as_json:
        columns = ("attribute", "class", "decided", "right", "uncertain")
        show_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    show_table("", ("attribute", "class", "decided", "read as such", "uncertain"), rows)
    say(f"Wrote {out}; use it with: fit --classifier {out}")
