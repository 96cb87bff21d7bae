"""``scan``: where in a model an attribute can be read, and where it can be steered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_lens.base.files import check_writable
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.console import guarded, kept, percent, progress, save_html, say, show_json, show_table, stored
from diffusion_lens.cli.fit import DetectorOption, LabelsOption, open_judge
from diffusion_lens.cli.options import (
    DEFAULT_RUN,
    BatchOption,
    FirstSeedOption,
    HtmlOption,
    JsonOption,
    LensOption,
    batch_of,
    checked_prompt,
    hide_loading_bars,
    open_lens,
    with_flags,
)
from diffusion_lens.model.run_options import RunOptions

if TYPE_CHECKING:
    from diffusion_lens.judging.classify import Classifier
    from diffusion_lens.lens.lens import DiffusionLens
    from diffusion_lens.model.pipelines import DiffusionModel
    from diffusion_lens.results.scan import Cell, Scan

STEPS = 50
"""Denoising steps of a model without a lens, unless told otherwise."""


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("scan")(scan)


@guarded
@with_flags
def scan(
    prompt: Annotated[
        str | None, typer.Argument(help="Of all images; the first of the lens by default. None for models without.")
    ] = None,
    lens: LensOption = "",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Instead of a lens: hub id or folder of a diffusers model.")
    ] = None,
    classifier: Annotated[
        str, typer.Option(help="With --model: who reads the images: clip, fairface:FILE, hf:ID, a folder, …")
    ] = "clip",
    labels: LabelsOption = None,
    find_faces: DetectorOption = False,
    attributes: Annotated[
        str, typer.Option("--attributes", "-a", help="What to look for, e.g. gender,age; the lens's by default.")
    ] = "",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="attribute=class to steer towards; the rarest by default."),
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option("--sites", "-s", help="A site; may be repeated. All of its family by default.")
    ] = None,
    ranges: Annotated[int, typer.Option(min=1, max=32, help="Ranges that the steps are cut into.")] = 4,
    drawn: Annotated[int, typer.Option("--images", "-n", min=32, help="Images to learn from.")] = 256,
    steered: Annotated[int, typer.Option("--steered", min=8, help="Paired images per edit.")] = 48,
    strength: Annotated[float, typer.Option(min=0.01, help="Times the class-mean difference.")] = 2.0,
    steps: Annotated[int | None, typer.Option(min=1, help=f"Denoising steps; the lens's, or {STEPS}.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the lens's, or 1: none.")] = None,
    first_seed: FirstSeedOption = 20_000_000,
    batch_size: BatchOption = None,
    work: Annotated[Path, typer.Option(help="Folder of finished pieces: a stopped scan goes on.")] = Path("runs/scan"),
    store: Annotated[bool, typer.Option("--store", help="Keep the result in the lens, for the app.")] = False,
    html: HtmlOption = None,
    running: RunOptions = DEFAULT_RUN,
    as_json: JsonOption = False,
) -> None:
    """Find where an attribute lives: at every site and step, how well it is read and how far it can be steered.

    Reading is a linear probe's accuracy on held-out images, beside one taught shuffled labels. Steering adds the
    mean difference between a class and the others on new seeds, beside a random direction of the same length.

      python -m diffusion_lens scan 'a portrait of a person' --store

      python -m diffusion_lens scan 'a photo of a doctor' --model stabilityai/stable-diffusion-3.5-medium \\
        --attributes gender,age --classifier clip --dtype fp16
    """
    from diffusion_lens.studies.scan import ScanConfig
    from diffusion_lens.studies.scan import scan as run

    if store and model is not None:
        raise LensError("Only a lens can keep a scan; leave --store or --model out.")
    targets = _targets(target)
    opened, place, judge = _open(lens, model, classifier, labels, find_faces, work, running)
    if store and opened is not None:
        check_writable(opened.folder)
    values: dict[str, Any] = {
        "prompt": _prompt(opened, place, prompt), "attributes": _attributes(attributes, opened, judge),
        "targets": targets, "sites": tuple(sites or ()), "n_ranges": ranges, "n_drawn": drawn,
        "n_steered": steered, "strength": strength, "first_seed": first_seed,
        "n_steps": steps or (opened.manifest.n_steps if opened else STEPS),
        "guidance_scale": guidance if guidance is not None else (opened.manifest.guidance_scale if opened else 1.0),
        "batch_size": batch_of(opened, batch_size) if opened else batch_size or 16,
    }  # fmt: skip
    config = ScanConfig.parse(values, where="the scan")
    with progress("scanning") as bar:
        found = run(place, judge, config, work, progress=bar.work, on_plan=lambda plan: say(plan.describe()))
    if html is not None:
        _plot(found, html)
    if opened is None:
        with kept("scan", lambda: to_plain(found)):
            _show(found, as_json)
    else:
        with stored(opened, (found,) if store else ()):
            _show(found, as_json)


def _open(
    lens: str,
    model: str | None,
    classifier: str,
    labels: Path | None,
    find_faces: bool,
    work: Path,
    running: RunOptions,
) -> tuple[DiffusionLens | None, DiffusionModel, Classifier]:
    if model is None:
        opened = open_lens(lens, running)
        return opened, opened.model, opened.classifier
    from diffusion_lens.model.pipelines import load_model

    hide_loading_bars()
    judge = open_judge(classifier, labels, find_faces, work, running.device)
    return None, load_model(model, options=running), judge


def _prompt(opened: DiffusionLens | None, model: DiffusionModel, prompt: str | None) -> str | None:
    if opened is not None:
        wanted = prompt if prompt is not None else next((p for p in opened.prompts if p), opened.prompts[0])
        return checked_prompt(opened, wanted)
    if model.is_text and prompt is None:
        raise LensError("This model draws from a prompt; give one, like 'a photo of a doctor'.")
    return prompt


def _attributes(text: str, opened: DiffusionLens | None, judge: Classifier) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if names:
        return names
    return tuple(opened.attributions) if opened is not None else tuple(a.name for a in judge.attributes)


def _targets(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        name, equals, label = pair.partition("=")
        if not (name and equals and label):
            raise LensError(f"Write a target as attribute=class, like gender=male; got '{pair}'.")
        found[name.strip()] = label.strip()
    return found


def _show(found: Scan, as_json: bool) -> None:
    if as_json:
        show_json({**to_plain(found), "recommendation": to_plain(found.recommendation)})
        return
    for about in found.attributes:
        show_table(
            f"{about.name}: read, and steered towards {about.target} ({percent(about.share)} as drawn)",
            ("site", "steps", "read (shuffled)", "moved, points (95 %)", "control", "kept", "undecided"),
            [
                _row(found, found.cell(about.name, site.name, i))
                for site in found.sites
                for i in range(len(found.steps))
            ],
        )
    advice = found.recommendation
    say(f"Put the lens at {' and '.join(advice.sites)}. {advice.reason}" if advice.sites else advice.reason)
    say(
        f"Intervals are for one cell, n = {found.n_steered}; among {len(found.cells)} some stand out by chance. "
        "The classifier's error (classes alike): "
        + ", ".join(f"{name} {percent(error)}" for name, error in found.errors.items())
        + "."
    )


def _row(found: Scan, cell: Cell) -> tuple[str, ...]:
    own, control = cell.steering.direction, cell.steering.control
    read = "–" if cell.reading is None else f"{percent(cell.reading.accuracy)} ({percent(cell.reading.shuffled)})"
    low, high = own.interval
    sure = " *" if cell.steering.is_sure else ""
    return (
        cell.site,
        found.steps[cell.steps].label,
        read,
        f"{100 * own.change:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}){sure}",
        f"{100 * control.change:+.0f}",
        f"{own.kept:.0%}",
        str(own.n_uncertain),
    )


def _plot(found: Scan, path: Path) -> None:
    from diffusion_lens.plots.scanned import describe_scan, scan_figure

    figures = [(scan_figure(found, a.name), describe_scan(found, a.name)) for a in found.attributes]
    save_html(path, "Where it lives", figures)
