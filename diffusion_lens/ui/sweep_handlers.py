"""What happens in the Sweep tab: stored sweeps at once, new ones point by point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from diffusion_lens.base.types import Control, LensError
from diffusion_lens.plots import describe_sweep, sweep_figure
from diffusion_lens.results.sweeps import Balance, SweepResult
from diffusion_lens.studio import jobs
from diffusion_lens.studio.jobs import SweepJob
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import strips, texts
from diffusion_lens.ui.explore_handlers import Page, explain, read_prompt
from diffusion_lens.ui.figure import figure_value

CONTROLS: dict[str, Control] = {"random features": "random", "poles exchanged": "flip"}
MEASURES = {"log ratio": "log_ratio", "share": "share"}
GRIDS = {"shipped strengths": 0, "5 strengths": 5, "9 strengths": 9}


def shown(results: Sequence[SweepResult], measure: str, balance: Balance | None = None) -> tuple[Any, ...]:
    """figure, sentence, strips, table, download: for the sweeps of one attribute."""
    if not results:
        return None, "", "", "", ""
    full, results = results, [replace(r, setting=_short(r)) for r in results]
    two = len(results[0].attribute.classes) == 2
    kind: Any = MEASURES.get(measure, "log_ratio") if two else "share"
    alt = describe_sweep(results, measure=kind, balance=balance)
    return (
        figure_value(sweep_figure(results, measure=kind, balance=balance), alt),
        f'<p class="dl-says">{escape(alt)}</p>{strips.spillover_html(full)}<p class="dl-says">{texts.SWEEP_LIMITS}</p>',
        strips.strips_html(next((r for r in results if not r.is_control), None)),
        strips.table_html(full),
        strips.download_html(full),
    )


def _short(result: SweepResult) -> str:
    """A name that fits a legend on a phone; the whole setting stands in the table."""
    names = {code: name for name, code in CONTROLS.items()}
    if result.is_control:
        return next((n for code, n in names.items() if code == result.control), "another turn")
    return f"features for {result.target}"


def balance_of(studio: Studio, results: Sequence[SweepResult]) -> Balance | None:
    """Where the features' own sweep is balanced; ``None`` before the model is there, or for too few images."""
    main = next((r for r in results if not r.is_control), None)
    if main is None or not studio.lens.is_ready:
        return None
    try:
        return jobs.find_balance(studio, main)
    except LensError:
        return None


def open_stored(studio: Studio, prompt: Any, attribute: str, measure: str) -> tuple[Any, ...]:
    """The stored sweeps of a prompt and attribute: outputs of ``shown``, status, no sweeps of one's own."""
    text = read_prompt(studio, prompt)
    results = studio.sweeps(text, attribute)
    said = texts.status(texts.LOAD_FIRST.format(setting=results[0].setting) if results else texts.NO_STORED)
    foreign = [result for result in results if any(result is other for other in studio.foreign)]
    if foreign:
        only_controls = all(result.is_control for result in foreign)
        said = texts.status(texts.OTHER_CONTROL if only_controls else texts.OTHER_SETTING, bad=not only_controls)
    return (*shown(results, measure, balance_of(studio, results)), said, ())


def look(
    studio: Studio, prompt: Any, attribute: str, here: Any, read: str, measure: str, opened: bool, busy: bool
) -> tuple[Any, ...]:
    """The tab is looked at: take over Explore's ``prompt`` and ``attribute`` from ``here`` and ``read``.

    Returns prompt, attribute, the outputs of ``open_stored``, and that it was opened. Nothing is touched where the
    same stands here already or a sweep is running.
    """
    same = attribute == read and read_prompt(studio, prompt) == read_prompt(studio, here)
    if busy or (opened and same):
        return (gr.skip(),) * 10
    return gr.update(value=prompt), gr.update(value=attribute), *open_stored(studio, prompt, attribute, measure), True


def run(
    studio: Studio, page: Page, prompt: Any, attribute: str, grid: str, n: Any, controls: Sequence[str], measure: str
) -> Iterator[tuple[Any, ...]]:
    """Measure point by point. Yields the outputs of ``shown``, status, the sweeps, run and stop button, and
    whether it goes on."""
    on, off = gr.update(visible=True), gr.update(visible=False)
    busy, idle = (off, on, True), (on, off, False)
    same = tuple(gr.skip() for _ in range(5))
    results: tuple[SweepResult, ...] = ()
    try:
        job = read_job(studio, prompt, attribute, grid, n, controls)
        events = jobs.sweep_events(studio, page.visitor, job)
        yield (*same, texts.status("Drawing the unedited images …"), gr.skip(), *busy)
        for event in events:
            said = texts.status(f"{event.done:.0%} done{texts.seconds(event.seconds_left)}.")
            fresh = event.results != () and _n_points(event.results) != _n_points(results)
            results = event.results
            yield (*(shown(results, measure) if fresh else same), said, results if fresh else gr.skip(), *busy)
        final = shown(results, measure, balance_of(studio, results))
        yield (*final, texts.status(f"Done: {job.n} images at each of {len(job.betas)} strengths."), gr.skip(), *idle)
    except Exception as error:
        yield (*same, explain(error), gr.skip(), *idle)


def _n_points(results: Sequence[SweepResult]) -> int:
    return sum(len(r.points) for r in results)


def read_job(studio: Studio, prompt: Any, attribute: str, grid: str, n: Any, controls: Sequence[str]) -> SweepJob:
    """The sweep that the controls ask for; raises ``LensError`` for what cannot be measured."""
    setting = studio.lens.setting(str(attribute))
    identity = setting.identity
    count = GRIDS.get(grid, 0)
    betas = tuple(sorted({*setting.betas, identity}))
    if count:
        low, high = betas[0], betas[-1]
        betas = tuple(sorted({identity, *(round(low + (high - low) * i / (count - 1), 4) for i in range(count))}))
    wanted = tuple(CONTROLS[c] for c in controls if c in CONTROLS)
    if "flip" in wanted and setting.poles == "one":
        raise LensError("This setting turns one pole only, so its poles cannot be exchanged; untick that control.")
    return SweepJob(read_prompt(studio, prompt), str(attribute), setting.target, betas, int(n), wanted)


def change_measure(studio: Studio, prompt: Any, attribute: str, results: Any, measure: str) -> Any:
    """The same sweeps on the other axis: one's own where there are some, else the stored ones."""
    sweeps = results or studio.sweeps(read_prompt(studio, prompt), attribute)
    return shown(sweeps, measure, balance_of(studio, sweeps))[0]
