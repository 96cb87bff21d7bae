"""``dissect`` and ``together`` on a lens, ``portraits depth`` on the bundled world: long measurements, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_lens.base.assets import assets_folder
from diffusion_lens.base.files import check_writable
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError
from diffusion_lens.cli import portraits
from diffusion_lens.cli.compare import PromptOption, WorkOption
from diffusion_lens.cli.console import guarded, kept, progress, say, show_json, show_table, stored
from diffusion_lens.cli.options import (
    BatchOption,
    DeviceOption,
    JsonOption,
    Opening,
    Series,
    batch_of,
    checked_prompt,
    with_flags,
)
from diffusion_lens.lens.bundled import FIRST

if TYPE_CHECKING:
    from diffusion_lens.lens.lens import DiffusionLens
    from diffusion_lens.results.depth import DepthPoint
    from diffusion_lens.results.dissection import Dissection
    from diffusion_lens.results.joint import JointResult

DEPTH_STORE = assets_folder() / "depth.json"
APART_STORE = assets_folder() / "depth-apart.json"


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("dissect")(dissect)
    app.command("together")(together)
    portraits.app.command("depth")(depth)
    portraits.app.command("depth-apart")(depth_apart)


@guarded
@with_flags
def dissect(
    prompt: PromptOption = None,
    n: Annotated[int, typer.Option("--images", "-n", help="Images per turn of a feature, on paired seeds.")] = 48,
    beta: Annotated[
        list[float] | None,
        typer.Option(help="How far every feature is turned; 1 changes nothing. May be repeated; 10 and -4 by default."),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="asymmetric (Asyrp), or symmetric: faster, and moves less.")
    ] = "asymmetric",
    feature: Annotated[
        list[int] | None, typer.Option(help="A feature; may be repeated. All that fire by default.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="With --top: choose by density, or for an attribute; may be repeated, then in turn."),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="How many features, the most promising first.")] = None,
    first_seed: Annotated[
        int, typer.Option(min=0, help="Seeds count up from here; take others to confirm what a first run found.")
    ] = 10_000_000,
    work: WorkOption = Path("runs/dissect"),
    store: Annotated[bool, typer.Option("--store", help="Keep effects and names in the lens, for the app.")] = False,
    batch_size: BatchOption = None,
    opening: Opening = Opening(),
    as_json: JsonOption = False,
) -> None:
    """Turn every SAE feature alone and group them by what that changes: hair, glasses, beard, smile, …

    A second run with other features or another β in the same --work adds them.

    python -m diffusion_lens dissect --store

    python -m diffusion_lens dissect --by glasses --by beard --by 'hair length' --top 300 --store

    python -m diffusion_lens dissect --feature 12 --feature 90 -n 400 --first-seed 11000000 --work runs/confirm
    """
    from diffusion_lens.results.dissection import groups
    from diffusion_lens.studies.dissect.config import DissectConfig
    from diffusion_lens.studies.dissect.run import dissect as run

    if by and not top:
        raise LensError("Say with --top how many features to choose.")
    opened = opening.open()
    values: dict[str, Any] = {
        "prompt": _prompt(opened, prompt), "n": n, "sampler": sampler, "top": top,
        **({"betas": tuple(beta)} if beta else {}),
        "features": tuple(feature) if feature else None, **({"by": tuple(by)} if by else {}),
        "first_seed": first_seed, "batch_size": batch_of(opened, batch_size),
    }  # fmt: skip
    config = DissectConfig.parse(values, where="the dissection")
    if store:
        check_writable(opened.folder)
    with progress("dissecting") as bar:
        found = run(opened, config, work, on_plan=lambda plan: say(plan.describe()), progress=bar.work)
    with stored(opened, (found,) if store else ()):
        if as_json:
            show_json(to_plain(groups(found)))
        else:
            _show_groups(found)


def _show_groups(found: Dissection) -> None:
    from diffusion_lens.results.dissection import evidence, groups

    grouped = groups(found)
    rows = [
        (
            name,
            str(e.feature),
            f"{e.beta:g}",
            e.label,
            _points(e.difference, e.interval),
            f"{e.q_value:.2g}",
            f"{e.specificity:.0%}",
        )
        for name, effects in grouped.items()
        for e in effects[:5]
    ]
    show_table("what single features control", ("attribute", "feature", "β", "class", "points", "q", "specific"), rows)
    sure = sum(len(effects) for effects in grouped.values())
    say(f"{sure} of {len(found.ids())} features have a sure effect, {found.source}.")
    for name, effects in grouped.items():
        if not effects:
            say(f"{name}: {evidence(found, name)}")


@guarded
@with_flags
def together(
    prompt: PromptOption = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(help="attribute=class:strength, or attribute=even:strength; two or more. All even by default."),
    ] = None,
    strength: Annotated[float, typer.Option(help="Strength of what --steer does not name; 0 changes nothing.")] = 1.0,
    series: Series = Series(200, 12_000_000),
    store: Annotated[bool, typer.Option("--store", help="Keep the result in the lens, for the app.")] = False,
    opening: Opening = Opening(),
    as_json: JsonOption = False,
) -> None:
    """Steer several attributes at once, each to its own target: every combination before and after, and the spillover.

    python -m diffusion_lens together --store

    python -m diffusion_lens together -p '' --steer gender=even:1 --steer age=old:0.5 -n 400
    """
    from diffusion_lens.studies.joint import parse_steer, steer_together

    opened = opening.open()
    if store:
        check_writable(opened.folder)
    steers = dict(parse_steer(opened, text) for text in steer or [f"{a}=even:{strength:g}" for a in opened.settings])
    alike = len({opened.settings[name].sampler for name in steers}) == 1
    with progress("steering") as bar:
        result = steer_together(
            opened, _prompt(opened, prompt), steers, series.seeds, sampler=None if alike else "symmetric",
            batch_size=batch_of(opened, series.batch_size), progress=bar.work,
        )  # fmt: skip
    with stored(opened, (result,) if store else ()), kept("together", lambda: to_plain(result)):
        if as_json:
            show_json(to_plain(result))
        else:
            _show_together(result)


def _show_together(result: JointResult) -> None:
    moves = list(result.spillover.values())
    rows = [
        (f"{c.attribute}: {c.label}", *(_points(own[i].difference, own[i].interval) for own in moves))
        for i, c in enumerate(moves[0])
    ]
    show_table("points moved (95 %), by what was steered", ("class", *result.spillover), rows)
    say(f"{result.order_matters:.0%} of images change any class when the order is reversed.")


def _prompt(lens: DiffusionLens, prompt: str | None) -> str | None:
    return checked_prompt(lens, prompt if prompt is not None or lens.prompts == (None,) else lens.prompts[0])


@guarded
def depth(
    work: WorkOption = Path("runs/depth"),
    parts: Annotated[Path, typer.Option(help="Folder with the trained autoencoder/ and classifier/.")] = Path(
        "runs/portraits"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of every training.")] = None,
    training_batch: Annotated[int | None, typer.Option(min=1, help="Pictures per optimiser step.")] = None,
    drawings: Annotated[int | None, typer.Option(min=1, help="Pictures they all learn from.")] = None,
    n: Annotated[int | None, typer.Option("--images", "-n", help="Images per prompt and setting.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="A guidance scale; may be repeated.")] = None,
    store: Annotated[bool, typer.Option("--store", help="Also write assets/depth.json, for the app.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train U-Nets of three depths on the same drawings, and measure how each amplifies what was planted.

    About half an hour on two cores as it stands; a stopped run goes on.

    python -m diffusion_lens portraits depth --store

    python -m diffusion_lens portraits depth --steps 20000 --training-batch 128 --images 500 --work runs/depth-long
    """
    import torch
    from diffusers import AutoencoderTiny

    from diffusion_lens.base.files import write_json
    from diffusion_lens.cli.options import hide_loading_bars, pick_device
    from diffusion_lens.judging.classify import HeadsClassifier
    from diffusion_lens.studies.depth import DepthConfig, planned_images, run_depth

    autoencoder, classifier = _parts(parts)
    place = torch.device(pick_device(device))
    train = DepthConfig().train.model_dump(mode="json")
    train |= {k: v for k, v in {"n_steps": steps, "batch_size": training_batch}.items() if v is not None}
    given: dict[str, Any] = {
        "n_drawings": drawings, "n": n, "prompts": tuple(prompt) if prompt else None,
        "guidance_scales": tuple(guidance) if guidance else None,
    }  # fmt: skip
    config = DepthConfig.parse(
        {"train": train, **{k: v for k, v in given.items() if v is not None}}, where="the depth experiment"
    )
    hide_loading_bars()
    vae = AutoencoderTiny.from_pretrained(autoencoder).to(place).eval()
    say(
        f"{len(config.shapes)} trainings of {config.train.n_steps:,} steps of {config.train.batch_size}, then "
        f"{planned_images(config):,} images; what is finished is kept in {work}."
    )
    with progress("depth") as bar:
        judge = HeadsClassifier.load(classifier)
        result = run_depth(config, vae, judge, work, device=place, progress=bar.work)
    if store:
        write_json(DEPTH_STORE, to_plain(result))
        say(f"Wrote {DEPTH_STORE}")
    if as_json:
        show_json(to_plain(result))
        return
    headings = ("depth", "bypass", "prompt", "guidance", "attribute", "majority", "share", "points")
    show_table("amplification", headings, [_depth_row(p) for p in result.points])
    say(result.caveat)
    say(f"Wrote {work / 'depth.json'}")


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where autoencoder and classifier lie: in a folder of training stages, or in the bundled lens."""
    first = assets_folder() / FIRST
    bundled = (first / "pipeline" / "vae", first / "classifier")
    for found in ((folder / "autoencoder", folder / "classifier"), bundled):
        if all((part / "config.json").is_file() for part in found):
            return found
    raise LensError(f"There is no trained autoencoder in {folder}; run: portraits train --stage autoencoder.")


def _depth_row(p: DepthPoint) -> tuple[str, ...]:
    column = [share.label for share in p.shares].index(p.majority)
    return (
        p.depth, "yes" if p.bypass else "no", f"'{p.prompt}'", f"{p.guidance_scale:g}", p.attribute, p.majority,
        f"{p.shares[column].corrected:.0%}", _points(p.amplification[column], p.intervals[column]),
    )  # fmt: skip


def _points(value: float, interval: tuple[float, float]) -> str:
    return f"{value * 100:+.0f} ({interval[0] * 100:+.0f} to {interval[1] * 100:+.0f})"


@guarded
def depth_apart(
    work: WorkOption = Path("runs/depth-apart"),
    parts: Annotated[Path, typer.Option(help="Folder with the trained autoencoder/ and classifier/.")] = Path(
        "runs/portraits"
    ),
    trainings: Annotated[int, typer.Option(min=1, help="Of every network.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of every training.")] = None,
    training_batch: Annotated[int | None, typer.Option(min=1, help="Pictures per optimiser step.")] = None,
    n: Annotated[
        int | None, typer.Option("--images", "-n", help="Images of every training, on the same noise.")
    ] = None,
    store: Annotated[bool, typer.Option("--store", help="Also write assets/depth-apart.json.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train networks of three depths and equal size, and of three sizes and equal depth, several times each.

    A minority of less than 1 % and one of 42 % are planted; intervals are over trainings. Fifteen trainings of a few
    minutes each on two free cores; a stopped run goes on.

    python -m diffusion_lens portraits depth-apart --store

    python -m diffusion_lens portraits depth-apart --trainings 8 --steps 5000 --work runs/depth-apart-long
    """
    import torch
    from diffusers import AutoencoderTiny

    from diffusion_lens.base.files import write_json
    from diffusion_lens.cli.options import hide_loading_bars, pick_device
    from diffusion_lens.judging.classify import HeadsClassifier
    from diffusion_lens.results.depth_apart import MINORITIES
    from diffusion_lens.studies.depth_apart import ApartConfig, run_apart

    autoencoder, classifier = _parts(parts)
    given: dict[str, Any] = {"n_steps": steps, "train_batch": training_batch, "n": n, "n_trainings": trainings}
    config = ApartConfig.parse(
        {k: v for k, v in given.items() if v is not None}, where="the experiment on depth at equal size"
    )
    hide_loading_bars()
    place = torch.device(pick_device(device))
    vae = AutoencoderTiny.from_pretrained(autoencoder).to(place).eval()
    with progress("depth at equal size") as bar:
        result = run_apart(config, vae, HeadsClassifier.load(classifier), work, device=place, progress=bar.work)
    if store:
        write_json(APART_STORE, to_plain(result))
        say(f"Wrote {APART_STORE}")
    if as_json:
        show_json(to_plain(result))
        return
    rows = [
        (
            t.network, str(t.layers), f"{t.parameters / 1e6:.2f} M", str(t.seed), f"{t.share('male'):.1%}",
            f"{t.share('blond male'):.2%}", f"{t.n}, {t.n_uncertain}",
        )
        for t in result.trainings
    ]  # fmt: skip
    show_table("trainings", ("network", "blocks", "weights", "seed", *MINORITIES, "n, undecided"), rows)
    for family in result.families:
        for minority in MINORITIES:
            say(f"{family}: {result.verdict(family, minority)}")
    say(result.caveat)
