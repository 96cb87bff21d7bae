"""``sweep`` and ``balance``."""

from __future__ import annotations

from typing import Annotated, Any, cast

import numpy as np
import typer

from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import Control, LensError
from diffusion_lens.cli.console import (
    guarded,
    kept,
    percent,
    progress,
    ratio_text,
    save_html,
    say,
    show_json,
    show_table,
    span,
)
from diffusion_lens.cli.options import (
    AttributeOption,
    HtmlOption,
    JsonOption,
    Opening,
    PromptArgument,
    Series,
    TargetOption,
    batch_of,
    parse_betas,
    with_flags,
)
from diffusion_lens.results.as_json import sweep_json
from diffusion_lens.results.sweeps import SweepPoint, SweepResult

BetasOption = Annotated[str | None, typer.Option("--betas", help="Strengths, like '-1,0,1,2'; the lens's own grid.")]
ControlOption = Annotated[
    str | None, typer.Option("--control", help="Also sweep a control: random features, or flip (poles exchanged).")
]


def register(app: typer.Typer) -> None:
    """Add this family's commands."""
    app.command("sweep")(sweep)
    app.command("balance")(balance)


@guarded
@with_flags
def sweep(
    prompt: PromptArgument = None,
    attribute: AttributeOption = "gender",
    target: TargetOption = None,
    betas: BetasOption = None,
    series: Series = Series(100),
    control: ControlOption = None,
    opening: Opening = Opening(),
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Measure shares and the log ratio at every strength β, on the same seeds.

    python -m diffusion_lens sweep 'a portrait of a firefighter' -n 200 --html sweep.html

    python -m diffusion_lens sweep '' --attribute age --target old --betas=-1,1,3 --control random --json
    """
    if control not in (None, "random", "flip"):
        raise LensError(f"A control is random or flip; '{control}' is neither.")
    opened = opening.open()
    request, size = series.request(opened, prompt), batch_of(opened, series.batch_size)
    strengths = parse_betas(betas)
    results = []
    for kind in (None, control) if control else (None,):
        with progress("sweeping" if kind is None else f"sweeping the control ({kind})") as bar:
            results.append(
                opened.sweep(
                    request,
                    attribute,
                    target,
                    strengths,
                    control=cast(Control | None, kind),
                    batch_size=size,
                    progress=bar.work,
                )
            )
    if html is not None:
        _plot(results, html)
    with kept("sweep", lambda: [sweep_json(result) for result in results]):
        if as_json:
            show_json([sweep_json(result) for result in results])
            return
        for result in results:
            show_sweep(result)


@guarded
@with_flags
def balance(
    prompt: PromptArgument = None,
    attribute: AttributeOption = "gender",
    target: TargetOption = None,
    share: Annotated[float, typer.Option(help="The share of the target class to reach.")] = 0.5,
    betas: BetasOption = None,
    series: Series = Series(100),
    opening: Opening = Opening(),
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Find the strength β, with its interval, at which a class has a given share.

    python -m diffusion_lens balance 'a portrait of a firefighter' -n 200

    python -m diffusion_lens balance '' --attribute gender --target female --share 0.4
    """
    from diffusion_lens.measuring.balance import balance as find

    opened = opening.open()
    request, size = series.request(opened, prompt), batch_of(opened, series.batch_size)
    if not 0 < share < 1:
        raise LensError(f"A target share lies between 0 and 1, both excluded; it is {share}.")
    with progress("sweeping") as bar:
        result = opened.sweep(request, attribute, target, parse_betas(betas), batch_size=size, progress=bar.work)
    found = find(result, opened.classifier.confusion[attribute], target_share=share)
    if html is not None:
        _plot([result], html, found)
    with kept("balance", lambda: {"balance": to_plain(found), "sweep": sweep_json(result)}):
        if as_json:
            show_json({"balance": to_plain(found), "sweep": sweep_json(result)})
            return
        show_sweep(result)
    say(found.note)
    say(f"Share of {found.label} there: {percent(found.share)} ({span(found.share_interval)}).")


def show_sweep(result: SweepResult) -> None:
    """Print one line per strength."""
    prompt = "no prompt" if result.request.prompt is None else f"'{result.request.prompt}'"
    control = ", a control" if result.is_control else ""
    show_table(
        f"{result.attribute.name} towards {result.target}, {prompt}{control}: {result.setting}",
        (
            "β",
            f"share {result.target}, corrected (95 %)",
            "log ratio, corrected (95 %)",
            "FD (floor)",
            "undecided",
            "kept other attributes",
        ),
        [_sweep_row(point, result.attribute.index(result.target)) for point in result.points],
    )
    for point in result.points:
        if point.measurement.invalid_note:
            say(f"β = {point.beta:g}: {point.measurement.invalid_note}")
    for note in {p.log_ratio_corrected.note for p in result.points if p.log_ratio_corrected} - {""}:
        say(note)


def _sweep_row(point: SweepPoint, column: int) -> tuple[str, ...]:
    share = point.shares[column]
    kept = float(np.mean(list(point.agreement.values()))) if point.agreement else float("nan")
    return (
        f"{point.beta:g}",
        f"{percent(share.corrected)} ({span(share.corrected_interval)})",
        ratio_text(point.log_ratio_corrected),
        f"{point.fd:.3f} ({point.fd_floor:.3f})",
        str(share.n_uncertain),
        f"{kept:.0%}",
    )


def _plot(results: list[SweepResult], path: Any, found: Any = None) -> None:
    from diffusion_lens.plots import describe_sweep, sweep_figure

    measure: Any = "log_ratio" if len(results[0].attribute.classes) == 2 else "share"
    figure = sweep_figure(results, measure=measure, balance=found)
    save_html(path, "Sweep over β", [(figure, describe_sweep(results, measure=measure, balance=found))])
