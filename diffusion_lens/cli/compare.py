"""``compare``: every method on the same seeds, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_lens.base.assets import assets_folder
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
    from diffusion_lens.results.comparison import CompareConfig, Comparison, Measured, MethodRow

BYPASS_STORE = assets_folder() / "bypass.json"
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="What to draw; '' is the empty prompt.")]
WorkOption = Annotated[Path, typer.Option(help="Folder of finished pieces; a stopped run goes on there.")]


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("compare")(compare)
    app.command("bypass")(bypass)
    app.command("claims")(claims)


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
    fit_on: Annotated[
        str,
        typer.Option(help="What every method may see while fitting: prompt (the one compared) or lens (all of its)."),
    ] = "prompt",
    group: Annotated[
        list[str] | None, typer.Option(help="A prompt of the group that methods are fitted on, in place of --fit-on.")
    ] = None,
    explicit: Annotated[int, typer.Option(min=0, help="Images of prompts that name a class, of every method.")] = 48,
    protocol: Annotated[
        str, typer.Option(help="balance: every method where it meets the target; points: at its best strength.")
    ] = "balance",
    approach: Annotated[str, typer.Option(help="auto, draw or shift; see docs.")] = "auto",
    work: WorkOption = Path("runs/compare"),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for JSON, CSV and the table.")] = None,
    store: Annotated[bool, typer.Option("--store", help="Keep the result in the lens, for the app.")] = False,
    batch_size: BatchOption = None,
    lens: LensOption = "",
    device: DeviceOption = "auto",  # no other run flag: some methods train in the model's format, through its blocks
    as_json: JsonOption = False,
) -> None:
    """Run every method on the same seeds, each at balance, and print what it keeps there beside random features.

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
        "batch_size": batch_of(opened, batch_size), "fit_on": fit_on, "protocol": protocol, "n_explicit": explicit,
        "fit_prompts": None if not group else tuple(checked_prompt(opened, one) for one in group),
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
    from diffusion_lens.results.comparison_tables import COLUMNS, PARTS, cells, columns_of, verdict

    for part in PARTS:
        fields = columns_of(comparison, part)
        rows = [tuple(cells(row, fields)) for row in comparison.rows]
        show_table(f"{comparison.attribute.name}: {part}", tuple(COLUMNS[field] for field in fields), rows)
    seen = f"While fitting, every method saw {comparison.config.n_fit} images of {comparison.config.seen}."
    notes = [seen, *(f"{COLUMNS[field]} {text}." for field, text in comparison.labels.items())]
    say("\n".join([verdict(comparison), comparison.rule, *notes]))


@guarded
def bypass(
    prompt: PromptOption = None,
    strengths: Annotated[list[float] | None, typer.Option("--strength", help="A λ; may be repeated.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="A guidance scale; may be repeated.")] = None,
    n: Annotated[int, typer.Option("--images", "-n", help="Images of every setting, on the same seeds.")] = 400,
    work: WorkOption = Path("runs/bypass"),
    store: Annotated[bool, typer.Option("--store", help="Keep the result in assets/bypass.json.")] = False,
    lens: LensOption = "",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure whether mid-block bypass brings images nearer to drawings: every λ and window, unguided and guided.

    python -m diffusion_lens bypass --store

    python -m diffusion_lens bypass --lens assets/portraits-unconditional -n 1000 --store
    """
    from diffusion_lens.base.files import write_json
    from diffusion_lens.base.plain import to_plain
    from diffusion_lens.results.bypass import joined, load_bypass
    from diffusion_lens.studies.bypass import BypassConfig, run_bypass

    opened = open_lens(lens, device)
    told = checked_prompt(opened, prompt if prompt is not None or opened.prompts == (None,) else opened.prompts[0])
    given = {"strengths": strengths, "guidance_scales": guidance}
    config = BypassConfig.parse(
        {"prompt": told, "n": n, **{k: tuple(v) for k, v in given.items() if v}}, where="the study of bypass"
    )
    with progress("bypass") as bar:
        result = run_bypass(opened, config, work, progress=bar.work)
    if store:
        before = load_bypass(BYPASS_STORE) if BYPASS_STORE.is_file() else ()
        write_json(BYPASS_STORE, to_plain(joined(before, result)))
        say(f"Wrote {BYPASS_STORE}")
    if as_json:
        show_json(to_plain(result))
        return
    rows = [
        (
            p.setting, f"{p.frechet:.2f}", _interval(p.gain), f"{p.precision:.2f}", f"{p.recall:.2f}",
            f"{p.diversity:.2f}", _interval(p.wider), f"{p.entropy:.2f}", f"{p.n}, {p.n_uncertain}",
        )
        for p in result.points
    ]  # fmt: skip
    headings = (
        "setting", "to drawings*", "nearer than unedited", "precision*", "recall*", "diversity*", "wider than unedited",
        "entropy", "n, undecided",
    )  # fmt: skip
    show_table(f"mid-block bypass, {result.prompt!r}", headings, rows)
    say(f"* {result.features}, against {result.n_drawings:,} drawings; intervals of all settings hold together.")
    say(result.verdict)


@guarded
def claims(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the page there.")] = None,
    card: Annotated[
        Path | None, typer.Option(help="A model card whose tables of the comparison are made anew.")
    ] = None,
    lens: LensOption = "",
) -> None:
    """Print each claim of the sources beside our experiment and its verdict, from stored results alone.

    python -m diffusion_lens claims --out docs/CLAIMS.md --card docs/MODEL_CARD.md
    """
    from diffusion_lens.base.files import write_text
    from diffusion_lens.studies.claims import card_with, claims_markdown, stored_comparisons
    from diffusion_lens.studies.claims import claims as read_claims

    opened = open_lens(lens, "cpu")
    comparisons = stored_comparisons(opened, assets_folder())
    page = claims_markdown(read_claims(opened, assets_folder()), comparisons)
    if card is not None:
        write_text(card, card_with(card.read_text(encoding="utf-8"), comparisons))
        say(f"Wrote {card}")
    if out is not None:
        write_text(out, page)
        say(f"Wrote {out}")
    if card is None and out is None:
        say(page)


def _interval(value: Measured | None) -> str:
    return "" if value is None else f"{value.value:+.2f} ({value.interval[0]:+.2f} to {value.interval[1]:+.2f})"
