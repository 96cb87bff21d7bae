"""``compare``: every method on the same seeds, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_lens.base.files import check_writable
from diffusion_lens.base.types import LensError
from diffusion_lens.base.words import duration
from diffusion_lens.cli.console import Bar, guarded, kept, progress, say, show_json, show_table, stored
from diffusion_lens.cli.options import (
    BatchOption,
    DeviceOption,
    JsonOption,
    LensOption,
    batch_of,
    checked_prompt,
    open_lens,
)
from diffusion_lens.results.as_json import row_json

if TYPE_CHECKING:
    from diffusion_lens.lens.lens import DiffusionLens
    from diffusion_lens.results.comparison import CompareConfig, Comparison, MethodRow

PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="What to draw; '' is the empty prompt.")]
WorkOption = Annotated[Path, typer.Option(help="Folder of finished pieces; a stopped run goes on there.")]


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("compare")(compare)


@guarded
def compare(
    attribute: Annotated[
        list[str] | None, typer.Option("--attribute", "-a", help="May be repeated; all of the lens's by default.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to draw; '' is the empty prompt. By default the stored prompt that "
            "is furthest from even shares.",
        ),
    ] = None,
    methods: Annotated[str, typer.Option("--methods", "-m", help="Keys with commas between them, or all.")] = "all",
    n: Annotated[int, typer.Option("--n", "-n", help="Images of every method at its best setting.")] = 500,
    curve: Annotated[
        int, typer.Option("--curve", "--tune", help="Images per strength of the curves, on other seeds.")
    ] = 48,
    fit: Annotated[int, typer.Option("--fit", help="Images that a method may be fitted on, on other seeds.")] = 128,
    approach: Annotated[str, typer.Option(help="auto, draw or shift; see docs.")] = "auto",
    work: WorkOption = Path("runs/compare"),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for JSON, CSV and the table.")] = None,
    store: Annotated[bool, typer.Option("--store", help="Keep the result in the lens, for the app.")] = False,
    batch_size: BatchOption = None,
    lens: LensOption = "",
    device: DeviceOption = "auto",  # no other run flag: some methods train in the model's format, through its blocks
    as_json: JsonOption = False,
) -> None:
    """Run every method on the same seeds, each at its best setting, and print the paper's table.

    python -m diffusion_lens compare --store

    python -m diffusion_lens compare --attribute gender --prompt 'a portrait of a firefighter' --methods all --n 1000

    python -m diffusion_lens compare -a age -p '' -m difflens,bypass --n 200 --out runs/age
    """
    from diffusion_lens.results.comparison import CompareConfig
    from diffusion_lens.studies.bench.run import run_tables

    opened = open_lens(lens, device)
    if store:
        check_writable(opened.folder)
    keys = tuple(k.strip() for k in methods.split(","))
    shape: dict[str, Any] = {
        "methods": keys, "n": n, "n_tune": curve, "n_fit": fit, "approach": approach,
        "batch_size": batch_of(opened, batch_size),
    }  # fmt: skip
    configs = [
        CompareConfig.parse(
            {**shape, "attribute": name, "prompt": _prompt(opened, name, prompt)}, where="the comparison"
        )
        for name in attribute or [a.name for a in opened.attributes]
    ]
    with progress("compare") as bar:
        found = run_tables(opened, configs, work, progress=bar.work, on_row=_teller(opened, configs, work, bar))
    for comparison in found.values():
        if out is not None:
            _write(comparison, out)
    plain = {name: [row_json(row) for row in comparison.rows] for name, comparison in found.items()}
    with stored(opened, found.values() if store else ()), kept("compare", lambda: plain):
        if as_json:
            show_json(plain)
            return
        for comparison in found.values():
            _print_table(comparison)


def _prompt(lens: DiffusionLens, attribute: str, given: str | None) -> str | None:
    from diffusion_lens.studies.bench.plan import telling_prompt

    if given is not None or lens.prompts == (None,):
        return checked_prompt(lens, given)
    return telling_prompt(attribute, lens.prompts, lens.sweeps, lens.settings)


def _teller(
    lens: DiffusionLens, configs: list[CompareConfig], work: Path, bar: Bar
) -> Callable[[str, MethodRow], None]:
    """Say what it will cost, and after every method what it found and what is left."""
    from diffusion_lens.methods.registry import find_methods
    from diffusion_lens.results.comparison import UNSTEERED
    from diffusion_lens.studies.bench.plan import plan, probe_speed

    plan(lens, configs, work, 1.0)  # mistakes are found before anything is drawn
    speed = probe_speed(lens, configs[0].prompt, configs[0].batch_size)
    ahead = plan(lens, configs, work, speed, _stored(lens))
    prompts = ", ".join(f"{c.attribute}: {'no prompt' if c.prompt is None else repr(c.prompt)}" for c in configs)
    say(
        f"{ahead.images:,} images to draw and {sum(p.method != UNSTEERED for p in ahead.pieces)} fits, about "
        f"{duration(ahead.seconds)} at {1 / speed:.1f} images a second; what is finished is kept in {work}. {prompts}."
    )
    begin, done = time.monotonic(), 0
    total = sum(len(find_methods(c.methods)) + 1 for c in configs)

    def tell(name: str, row: MethodRow) -> None:
        nonlocal done
        done += 1
        left, spent = ahead.after(name, row.method), time.monotonic() - begin
        pace = spent / (ahead.seconds - left) if ahead.seconds - left > 0 and spent > 60 else 1.0
        what = f"FD {row.fd.value:.3f}" if row.fd else row.note or "no FD"
        bar.close()
        say(f"{name}, {row.name}: {what} ({done} of {total}; about {duration(left * pace)} left)")

    return tell


def _stored(lens: DiffusionLens) -> Mapping[str, Comparison]:
    try:
        return lens.comparisons
    except LensError:  # of another SAE: this run is to replace them
        return {}


def _write(comparison: Comparison, out: Path) -> None:
    from diffusion_lens.results.comparison_store import save_comparison
    from diffusion_lens.results.comparison_tables import write_tables

    folder = out / comparison.attribute.name.replace(" ", "-")
    save_comparison(comparison, folder)
    write_tables(comparison, folder)
    say(f"Wrote {folder}")


def _print_table(comparison: Comparison) -> None:
    from diffusion_lens.results.comparison_tables import COLUMNS, PARTS, cells, verdict

    for part, fields in PARTS.items():
        rows = [tuple(cells(row, fields)) for row in comparison.rows]
        show_table(f"{comparison.attribute.name}: {part}", tuple(COLUMNS[field] for field in fields), rows)
    notes = [f"{COLUMNS[field]} {text}." for field, text in comparison.labels.items()]
    say("\n".join([verdict(comparison), comparison.rule, *notes]))
