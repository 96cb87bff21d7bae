"""``portraits train``, ``portraits sheet`` and ``portraits table``: the bundled world."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from diffusion_lens.base.files import atomic_path, write_json
from diffusion_lens.base.types import LensError
from diffusion_lens.cli.console import guarded, progress, say, show_json, show_table
from diffusion_lens.cli.options import (
    DeviceOption,
    FirstSeedOption,
    ImagesOption,
    JsonOption,
    hide_loading_bars,
    pick_device,
    seeds_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusion_lens.portraits.recipe import RecipeConfig

DENOISERS = ("pipeline", "unconditional", "mmdit")
READERS = ("classifier", "labeller")
STAGES = ("autoencoder", *DENOISERS, *READERS)
MAX_TRIES = 200_000

app = typer.Typer(
    no_args_is_help=True, help="The bundled world: train its models, look at it, print its planted table."
)


@app.command("train")
@guarded
def train(
    stage: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(STAGES)}; may be repeated; all by default.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of stages and checkpoints.")] = Path("runs/portraits"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A finished pipeline whose denoiser is trained further, or whose autoencoder a reader sees through.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of the one stage named.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch size of the one stage named.")] = None,
    drawings: Annotated[int | None, typer.Option(min=1, help="Training pictures of the denoisers.")] = None,
    lr: Annotated[float | None, typer.Option(min=1e-7, max=1.0, help="Learning rate of the one stage named.")] = None,
    focus: Annotated[
        float | None,
        typer.Option(
            help="Denoisers: the place in the schedule that half of the steps dwell on, as a logit (0: its middle)."
        ),
    ] = None,
    match: Annotated[
        int,
        typer.Option(
            min=0,
            max=10_000,
            help="With --from: draw so many images of every prompt first, and dwell on what comes too seldom.",
        ),
    ] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Train the bundled models from nothing: autoencoder, U-Nets, transformer, the judge, and a second labeller.

    Hours on two cores, minutes on a graphics card; the same command on both. A stopped run goes on with --resume.

      python -m diffusion_lens portraits train

      python -m diffusion_lens portraits train --stage pipeline --steps 40000 --resume

      python -m diffusion_lens portraits train --stage pipeline --from assets/portraits/pipeline --steps 10000

      python -m diffusion_lens portraits train --stage pipeline --from runs/first/pipeline --match 1000 --steps 1500

      python -m diffusion_lens portraits train --stage mmdit --from assets/portraits/pipeline

      python -m diffusion_lens portraits train --stage labeller --from assets/portraits/pipeline
    """
    import torch

    from diffusion_lens.portraits import recipe

    chosen = tuple(stage or STAGES)
    strange = next((name for name in chosen if name not in STAGES), None)
    if strange is not None:
        raise LensError(f"There is no stage '{strange}'; choose among {', '.join(STAGES)}.")
    if start is not None and (len(chosen) != 1 or chosen[0] == "autoencoder"):
        raise LensError(f"With --from, name the one --stage that starts there: {', '.join((*DENOISERS, *READERS))}.")
    if match and (start is None or chosen[0] in READERS):
        raise LensError("--match measures the shares of a finished pipeline: name it with --from.")
    config, paths = recipe_config(chosen, steps, batch_size, drawings, lr, focus), recipe.Paths(work)
    place = torch.device(pick_device(device))
    hide_loading_bars()
    for name in STAGES:
        if name not in chosen:
            continue
        if stage is None and name in DENOISERS and _is_finished(paths.pipeline(name)):
            say(f"{name}: already in {paths.pipeline(name)}; name it with --stage to train it again.")
            continue
        with progress(name) as bar:
            if name == "autoencoder":
                recipe.autoencoder_stage(config, paths, place, bar.work)
            elif name in READERS:
                stage_of = recipe.classifier_stage if name == "classifier" else recipe.labeller_stage
                stage_of(config, paths, place, bar.work, start=start)
            elif name == "mmdit":
                recipe.transformer_stage(config, paths, place, bar.work, resume=resume, start=start, match=match)
            else:
                recipe.denoiser_stage(
                    config,
                    paths,
                    place,
                    bar.work,
                    unconditional=name == "unconditional",
                    resume=resume,
                    start=start,
                    match=match,
                )
        say(f"{name}: done, in {work}")


def _is_finished(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def recipe_config(
    stages: tuple[str, ...],
    steps: int | None,
    batch_size: int | None,
    drawings: int | None,
    lr: float | None = None,
    focus: float | None = None,
) -> RecipeConfig:
    """The recipe with a stage's own numbers replaced; raises ``LensError`` where it is unclear whose they are."""
    from diffusion_lens.portraits.recipe import RecipeConfig

    config = RecipeConfig()
    if drawings is not None:
        config = config.model_copy(update={"n_drawings": drawings})
    changes: dict[str, Any] = {"n_steps": steps, "batch_size": batch_size, "lr": lr, "focus": focus}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return config
    if len(stages) != 1:
        raise LensError("Name one --stage to set its steps, batch size, learning rate or focus.")
    name = {"pipeline": "denoiser"}.get(stages[0], stages[0])
    if focus is not None and stages[0] not in DENOISERS:
        raise LensError(f"Only the denoisers have a focus: --stage {', '.join(DENOISERS)}.")
    if name not in READERS:
        part = getattr(config, name)
        return config.model_copy(update={name: part.model_copy(update=changes)})
    if batch_size is not None or lr is not None:
        raise LensError(f"The {name}'s batch size and learning rate are fixed; set its steps alone.")
    return config.model_copy(update={f"{name}_steps": steps})


@app.command("export")
@guarded
def export(
    stage: Annotated[str, typer.Option(help=f"Whose: {', '.join(DENOISERS)}.")] = "pipeline",
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="The pipeline that takes no prompt: --stage unconditional.")
    ] = False,
    work: Annotated[Path, typer.Option(help="Folder of stages and checkpoints.")] = Path("runs/portraits"),
) -> None:
    """Write the moving averages of a training that still runs, or was stopped, as a stock pipeline.

    python -m diffusion_lens portraits export

    python -m diffusion_lens portraits export --stage mmdit
    """
    from diffusion_lens.portraits.recipe import Paths, RecipeConfig, export_stage

    name, paths = "unconditional" if unconditional else stage, Paths(work)
    if name not in DENOISERS:
        raise LensError(f"There is no stage '{name}' to export; choose among {', '.join(DENOISERS)}.")
    for needed in (paths.autoencoder, paths.checkpoint(name)):
        if not needed.is_dir():
            raise LensError(f"{needed} is missing; train first, with: python -m diffusion_lens portraits train.")
    hide_loading_bars()
    say(f"Wrote {export_stage(RecipeConfig(), paths, name)}")


@app.command("average")
@guarded
def average(
    pipelines: Annotated[list[Path], typer.Argument(help="Two or more pipeline folders, trained one from the other.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The pipeline folder to write.")],
) -> None:
    """Write the mean of the weights of several trained pipelines: what each is off by chance mostly cancels.

    python -m diffusion_lens portraits average runs/first/pipeline runs/second/pipeline --out runs/mean/pipeline
    """
    from diffusion_lens.portraits.recipe import average_stage

    if out.resolve() in {folder.resolve() for folder in pipelines}:
        raise LensError(f"{out} is one of those to average; write to another folder.")
    hide_loading_bars()
    say(f"Wrote {average_stage(pipelines, out)}")


@app.command("sheet")
@guarded
def sheet(
    out: Annotated[Path, typer.Argument(help="The picture to write.")],
    prompt: Annotated[str, typer.Option(help="A sentence of this world; '' for everyone.")] = "",
    pipeline: Annotated[
        Path | None, typer.Option(help="Draw samples of this trained pipeline instead of drawings.")
    ] = None,
    images: ImagesOption = 64,
    columns: Annotated[int, typer.Option(min=1, help="Pictures per row.")] = 8,
    first_seed: FirstSeedOption = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of samples.")] = 16,
) -> None:
    """Write a contact sheet of drawings, or of a trained pipeline's samples.

    python -m diffusion_lens portraits sheet drawings.png --prompt 'a portrait of a judge'

    python -m diffusion_lens portraits sheet samples.png --pipeline runs/portraits/pipeline -n 32
    """
    from diffusion_lens.portraits.draw import sheet as contact

    seeds = seeds_of(images, first_seed)
    pictures = _drawn(prompt, seeds) if pipeline is None else _sampled(pipeline, prompt, seeds, steps)
    with atomic_path(out) as partial:
        contact(pictures, min(columns, images)).save(partial)
    say(f"Wrote {out}")


def _drawn(prompt: str, seeds: range) -> np.ndarray:
    from diffusion_lens.portraits import world
    from diffusion_lens.portraits.draw import draw

    noun, said = world.parse_prompt(prompt)
    words = [word for word in said.values() if word]

    def fitting() -> Iterator[world.Record]:
        for seed in islice(count(seeds.start), MAX_TRIES):
            record = world.sample_record(seed, noun=noun)
            if set(words) <= {record.label(a) for a in (*world.STEERABLE, world.GLASSES)}:
                yield record

    records = list(islice(fitting(), len(seeds)))
    if len(records) < len(seeds):
        raise LensError(f"Only {len(records)} of {MAX_TRIES:,} people fit '{prompt}'; ask for fewer.")
    with progress("drawing") as bar:
        pictures = []
        for done, record in enumerate(records):
            pictures.append(draw(record))
            bar.work.step(done + 1, len(records))
    return np.stack(pictures)


def _sampled(pipeline: Path, prompt: str, seeds: range, steps: int) -> np.ndarray:
    from diffusion_lens.model.generate import generate, request
    from diffusion_lens.model.pipelines import load_model

    hide_loading_bars()
    model = load_model(pipeline, offline=True)
    wanted = request(model, prompt if model.is_text else None, seeds, steps)
    with progress("sampling") as bar:
        return generate(model, wanted, progress=bar.work).images


@app.command("table")
@guarded
def table(
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", "-a", help="Attributes to show; gender, age and tone by default.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Any sentence of this world; all short ones by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the whole table as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the planted distribution: who appears under which prompt, exactly.

    python -m diffusion_lens portraits table

    python -m diffusion_lens portraits table --prompt 'a portrait of an old female doctor' -a glasses -a 'hair length'
    """
    from diffusion_lens.portraits import world

    known = {a.name: a for a in world.ATTRIBUTES}
    names = attribute or [a.name for a in world.STEERABLE]
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        raise LensError(f"This world has no attribute '{strange}'; it has {', '.join(known)}.")
    if out is not None:
        write_json(out, world.table(), indent=1)
        say(f"Wrote {out}")
    shares = {text: world.planted_shares(text) for text in prompt or world.PROMPTS}
    if as_json:
        show_json({text: {name: found[name].tolist() for name in names} for text, found in shares.items()})
        return
    for name in names:
        rows = [(f"'{text}'", *(f"{s:.1%}" for s in found[name])) for text, found in shares.items()]
        show_table(name, ("prompt", *known[name].classes), rows)
    say("Planted by the project for drawn faces; describes no real population.")
