"""The Sweep tab: stored sweeps at once, new ones point by point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from diffusion_lens.base.text import as_csv
from diffusion_lens.base.types import Control
from diffusion_lens.plots import describe_spillover, describe_sweep, sweep_figure
from diffusion_lens.results.sweeps import Balance, SweepResult
from diffusion_lens.studio import jobs, state
from diffusion_lens.studio.jobs import SweepJob
from diffusion_lens.studio.studio import Studio, as_json
from diffusion_lens.ui import texts, together
from diffusion_lens.ui.downloads import data_address
from diffusion_lens.ui.errors import explain
from diffusion_lens.ui.explore import Explore
from diffusion_lens.ui.figure import figure, figure_value
from diffusion_lens.ui.html import html
from diffusion_lens.ui.panel import AT_ONCE, KEEP, LONG, READ, Component, Panel, Updates, Values, visible
from diffusion_lens.ui.visitor import visitor_of

CONTROLS: dict[str, Control] = {"random features": "random", "swapped directions": "flip"}
MEASURES = {"log ratio": "log_ratio", "share": "share"}
GRIDS = {"recommended strengths": jobs.SHIPPED, "5 strengths": 5, "9 strengths": 9}


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    prompt: str | None
    attribute: str


@dataclass(frozen=True)
class SweepRequest(Subject):
    """A sweep as a visitor asks for it, unchecked."""

    grid: str
    n: Any
    controls: Sequence[str]
    measure: str


@dataclass(frozen=True)
class SweepView:
    """The sweeps of one attribute as figure, sentences, images along β, table and file."""

    plot: dict[str, str] | None = None
    says: str = ""
    strip: str = ""
    table: str = ""
    download: str = ""


@dataclass(frozen=True)
class RunView:
    """Where a run stands. ``results``: the visitor's own sweeps, none while stored ones are shown."""

    status: str = KEEP
    results: tuple[SweepResult, ...] = KEEP
    start: dict[str, Any] = KEEP
    stop: dict[str, Any] = KEEP
    busy: bool = KEEP


def sweep_view(results: Sequence[SweepResult], measure: str, balance: Balance | None = None) -> SweepView:
    """What the tab shows of some sweeps of one attribute."""
    if not results:
        return SweepView()
    named = [replace(result, setting=_short_name(result)) for result in results]
    two = len(results[0].attribute.classes) == 2
    kind: Any = MEASURES.get(measure, "log_ratio") if two else "share"
    said = describe_sweep(named, measure=kind, balance=balance)
    main = next((r for r in results if not r.is_control), None)
    return SweepView(
        plot=figure_value(sweep_figure(named, measure=kind, balance=balance), said),
        says=html("sweep.says", said, _side_effects(main)),
        strip=html("sweep.strips", main) if main and any(len(p.examples) for p in main.points) else "",
        table=html("sweep.table", results),
        download=html(
            "sweep.download",
            f"sweep-{results[0].attribute.name}",
            _csv_address(results),
            data_address(as_json(tuple(results)), "application/json"),
        ),
    )


def _short_name(result: SweepResult) -> str:
    """A name that fits a legend on a phone; the whole setting stands in the table."""
    if not result.is_control:
        return f"features for {result.target}"
    return next((name for name, control in CONTROLS.items() if control == result.control), "another turn")


def _side_effects(main: SweepResult | None) -> str:
    """What else moved at the ends of the sweep, beyond its interval; empty where nothing is known of it."""
    if main is None:
        return ""
    ends = {f"to β = {p.beta:g}": p.changes for p in (main.points[0], main.points[-1]) if p.changes}
    return describe_spillover(ends) if ends else ""


def _csv_address(results: Sequence[SweepResult]) -> str:
    """Every class's share at every strength as CSV, in an address."""
    columns = ("sweep", "beta", "class", "n", "uncertain", "share", "corrected", "low", "high", "log ratio", "FD")
    rows = [
        (
            result.setting, point.beta, share.label, share.n, share.n_uncertain, share.raw, share.corrected,
            *share.corrected_interval, None if point.log_ratio is None else point.log_ratio.value, point.fd,
        )
        for result in results for point in result.points for share in point.shares
    ]  # fmt: skip
    return data_address(as_csv(columns, rows), "text/csv")


def stored_status(studio: Studio, results: Sequence[SweepResult]) -> str:
    """Where stored sweeps come from, and whether they are of today's setting."""
    if not results:
        return html("parts.status", texts.NO_STORED)
    foreign = [result for result in results if any(result is other for other in studio.foreign)]
    if not foreign:
        return html("parts.status", texts.LOAD_FIRST.format(setting=results[0].setting))
    only_controls = all(result.is_control for result in foreign)
    return html("parts.status", texts.OTHER_CONTROL if only_controls else texts.OTHER_SETTING, bad=not only_controls)


def read_job(studio: Studio, request: SweepRequest) -> SweepJob:
    """The sweep that a visitor asks for; raises ``LensError`` for what cannot be measured."""
    return jobs.sweep_job(
        studio,
        state.read_prompt(studio.lens, request.prompt),
        str(request.attribute),
        n_strengths=GRIDS.get(request.grid, jobs.SHIPPED),
        n=int(request.n),
        controls=tuple(CONTROLS[name] for name in request.controls if name in CONTROLS),
    )


Run = Callable[[str, SweepRequest], Iterator[tuple[SweepView | None, RunView]]]
"""``run`` of one studio: (visitor, request) → what to show, point by point."""


def run(studio: Studio, visitor: str, request: SweepRequest) -> Iterator[tuple[SweepView | None, RunView]]:
    """Measure point by point: the sweeps where there is a new point, and where the run stands.

    Takes and gives plain values alone, which a lent GPU's process can be sent.
    """
    idle = RunView(start=visible(True), stop=visible(False), busy=False)
    try:
        job = read_job(studio, request)
        events = jobs.sweep_events(studio, visitor, job)
        said = html("sweep.running", 0.0, "Drawing the unedited images …")
        yield (
            SweepView(strip=html("sweep.waiting", job.betas)),
            RunView(said, start=visible(False), stop=visible(True), busy=True),
        )
        results: tuple[SweepResult, ...] = ()
        for event in events:
            said = html("sweep.running", event.done, f"{event.done:.0%} done{texts.seconds(event.seconds_left)}.")
            if jobs.n_points(event.results) == jobs.n_points(results):
                yield None, RunView(said)
            else:
                results = event.results
                yield sweep_view(results, request.measure), RunView(said, results)
        final = sweep_view(results, request.measure, jobs.balance_where_known(studio, results))
        said = html("parts.status", f"Done: {job.n} images at each of {len(job.betas)} strengths.")
        yield final, replace(idle, status=said)
    except Exception as error:
        yield None, replace(idle, status=explain(error))


@dataclass(frozen=True, eq=False)
class SweepTab(Panel):
    """The tab's components: a ``SweepRequest``, and what its views show."""

    studio: Studio
    measure_points: Run
    explore: Explore
    prompt: Component
    attribute: Component
    grid: Component
    n: Component
    controls: Component
    measure: Component
    start: Component
    stop: Component
    status: Component
    plot: Component
    says: Component
    strip: Component
    table: Component
    download: Component
    results: Component
    busy: Component

    def follow_explore(self, values: Values) -> Updates:
        """The tab is looked at: take over Explore's subject, unless it stands here already or a sweep is running."""
        here, there = self.read(values, Subject), Subject(*self.explore.subject(values))
        same = there.attribute == here.attribute and self._prompt(there) == self._prompt(here)
        if values[self.busy] or same:
            return {self.status: gr.skip()}
        return {
            self.prompt: gr.update(value=there.prompt),
            self.attribute: gr.update(value=there.attribute),
            **self._stored(there, values[self.measure]),
        }

    def change_subject(self, values: Values) -> Updates:
        """Another prompt or attribute: its stored sweeps."""
        return self._stored(self.read(values, Subject), values[self.measure])

    def tell_explore(self, values: Values) -> Updates:
        """Explore takes over this tab's subject, and draws it when it is looked at again."""
        here = self.read(values, Subject)
        return self.explore.take_subject(values, here.prompt, here.attribute)

    def change_measure(self, values: Values) -> Updates:
        """The same sweeps on the other axis: the visitor's own where there are some, else the stored ones."""
        here = self.read(values, Subject)
        results = values[self.results] or self._sweeps(here)
        view = sweep_view(results, values[self.measure], jobs.balance_where_known(self.studio, results))
        return {self.plot: view.plot}

    def run_sweep(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        """Measure what the controls ask for."""
        for sweeps, state_of_run in self.measure_points(visitor_of(request), self.read(values, SweepRequest)):
            yield {**({} if sweeps is None else self.show(sweeps)), **self.show(state_of_run)}

    def stop_run(self, request: gr.Request) -> None:
        """End the visitor's own sweep at its next step."""
        self.studio.stops.stop(f"{visitor_of(request)}:sweep")

    def _prompt(self, subject: Subject) -> str | None:
        return state.read_prompt(self.studio.lens, subject.prompt)

    def _sweeps(self, subject: Subject) -> tuple[SweepResult, ...]:
        return self.studio.sweeps(self._prompt(subject), subject.attribute)

    def _stored(self, subject: Subject, measure: str) -> Updates:
        results = self._sweeps(subject)
        view = sweep_view(results, measure, jobs.balance_where_known(self.studio, results))
        return {**self.show(view), self.status: stored_status(self.studio, results), self.results: ()}

    def connect(self, tab: gr.Tab) -> None:
        """Bind the events; ``tab`` tells when it is looked at again."""
        subject, shown = self.parts(Subject), self.parts(SweepView) | {self.status, self.results}
        explore = self.explore
        tab.select(
            self.follow_explore,
            subject | explore.subject_parts | {self.measure, self.busy},
            list(shown | subject),
            **READ,
        )
        gr.on(
            [self.prompt.input, self.attribute.input], self.change_subject, subject | {self.measure}, shown,
            trigger_mode="always_last", **READ,
        ).then(self.tell_explore, subject | explore.inputs, explore.changed_parts, **READ)  # fmt: skip
        self.measure.input(self.change_measure, subject | {self.measure, self.results}, self.plot, **READ)
        self.start.click(self.run_sweep, self.parts(SweepRequest), shown | self.parts(RunView), **LONG)
        self.stop.click(self.stop_run, None, None, **AT_ONCE)


def build(studio: Studio, measure_points: Run, tab: gr.Tab, explore: Explore, values: Values) -> None:
    """Build the tab inside an open ``gr.Blocks``, on the subject that Explore has in ``values``."""
    gr.HTML(html("parts.intro", texts.SWEEP_INTRO))
    _components(studio, measure_points, explore, Subject(*explore.subject(values))).connect(tab)
    together.build(studio)


def _components(studio: Studio, measure_points: Run, explore: Explore, subject: Subject) -> SweepTab:
    lens = studio.lens
    measure_now = "log ratio"
    results = studio.sweeps(state.read_prompt(lens, subject.prompt), subject.attribute)
    shown = sweep_view(results, measure_now, jobs.balance_where_known(studio, results))
    suggested = [state.shown_prompt(p) for p in lens.prompts if p is not None]
    with gr.Row(elem_classes="dl-choose"):
        prompt = gr.Dropdown(
            suggested, value=subject.prompt or state.EMPTY_PROMPT, label="Prompt", allow_custom_value=True, scale=4,
            min_width=260, visible=bool(suggested), elem_id="dl-sweep-prompt", interactive=True,
        )  # fmt: skip
        if not suggested:
            with gr.Column(scale=4, min_width=260):
                gr.HTML(html("parts.no_prompt", texts.NO_PROMPT))
        attribute = gr.Radio(
            list(state.steerable(lens)), value=subject.attribute, label="Attribute (perceived)", scale=3, min_width=200,
            interactive=True,
        )  # fmt: skip
        measure = gr.Radio(
            list(MEASURES), value=measure_now, label="Axis", scale=3, min_width=200, interactive=True
        )  # fmt: skip
    with gr.Row(elem_classes="dl-choose"):
        grid = gr.Radio(
            list(GRIDS), value="recommended strengths", label="Strengths", scale=4, min_width=260, interactive=True
        )
        n = gr.Radio(
            [16, 32, 64, 128, 256], value=32, label="Images per strength", scale=3, min_width=240, interactive=True
        )
        controls = gr.CheckboxGroup(
            list(CONTROLS), value=["random features"], label="Controls", scale=3, min_width=200, interactive=True
        )
    with gr.Row(elem_classes="dl-go"):
        start = gr.Button("Run sweep", variant="primary", elem_id="dl-run", scale=0, min_width=180)
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="dl-stop-sweep", scale=0, min_width=180)
        status = gr.HTML(stored_status(studio, results), elem_id="dl-sweep-status")
    plot = figure(shown.plot, elem_id="dl-sweep-plot")
    says, strip, table, download = (gr.HTML(text) for text in (shown.says, shown.strip, shown.table, shown.download))
    return SweepTab(
        studio=studio, measure_points=measure_points, explore=explore, prompt=prompt, attribute=attribute, grid=grid,
        n=n, controls=controls,
        measure=measure, start=start, stop=stop, status=status, plot=plot, says=says, strip=strip, table=table,
        download=download, results=gr.State(()), busy=gr.State(False),
    )  # fmt: skip
