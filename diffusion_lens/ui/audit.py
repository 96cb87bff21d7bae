"""The Audit tab: six steps from a question to a report, which grows beside them while images are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusion_lens.base.types import LensError
from diffusion_lens.results.manifest import Setting
from diffusion_lens.studio import audit, state
from diffusion_lens.studio.audit import AGAINST, SIZES, Wish
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import texts
from diffusion_lens.ui.downloads import data_address
from diffusion_lens.ui.errors import explain
from diffusion_lens.ui.explore import Explore
from diffusion_lens.ui.figure import ASSETS
from diffusion_lens.ui.html import html
from diffusion_lens.ui.panel import AT_ONCE, KEEP, LONG, READ, Component, Panel, Updates, Values, visible
from diffusion_lens.ui.visitor import visitor_of

INTRO = (
    "An audit asks who appears under some prompts, compares that with a stated reference, and writes a report that "
    "others can check. It reads how pictures look, never who anybody is."
)
LENS, IMAGES = "this lens", "images of my own"
STEPS = ("What", "Against what", "Steering", "How many", "Who reads", "Sign")
UNSURE = "can't say"


@dataclass(frozen=True)
class AuditRequest:
    """What the steps hold, unchecked."""

    what: str
    question: str
    prompts: str
    files: Any
    attributes: list[str]
    against: str
    table: str
    steer: bool
    steer_attribute: str
    steer_target: str
    beta: float
    on_screen: bool
    rewrite: bool
    controls: bool
    precision: str
    until: bool
    blind: float
    intended_use: str
    people_affected: str
    harm_hypotheses: str
    would_change: str
    reviewer: str
    conflicts: str
    notes: str


@dataclass(frozen=True)
class OutlineView:
    """What the plan will draw, and the command that does it elsewhere."""

    outline: str
    command: str


@dataclass(frozen=True)
class RunView:
    """Where a run stands; ``name``: the audit's id, under which it lies on the disk."""

    status: str = KEEP
    said: str = KEEP
    page: str = KEEP
    start: Any = KEEP
    stop: Any = KEEP
    download: Any = KEEP
    name: str = KEEP
    again: str = KEEP


Run = Callable[[str, str], Iterator[RunView]]


def run(studio: Studio, visitor: str, name: str) -> Iterator[RunView]:
    """Go on with an audit, prompt by prompt; takes and gives plain values alone, which a lent GPU can be sent."""
    idle = RunView(start=visible(True), stop=visible(False))
    try:
        yield RunView(
            html("parts.status", "Opening …"), html("audit.began", name), start=visible(False), stop=visible(True),
            name=name, again=name, download=gr.update(visible=False),
        )  # fmt: skip
        for news in audit.run_events(studio, visitor, name):
            if news.done:
                yield RunView(
                    html("parts.status", "Done. Sign it, let people read the images set apart, or download it."),
                    page=html("audit.page", news.page), start=visible(True), stop=visible(False),
                    download=gr.update(value=news.files, visible=True),
                )  # fmt: skip
            elif news.page:
                yield RunView(page=html("audit.page", news.page))
            else:
                said = f"{news.share:.0%} drawn{texts.seconds(news.seconds_left)}."
                yield RunView(html("parts.status", said))
    except Exception as error:
        yield RunView(explain(error), start=idle.start, stop=idle.stop)


@dataclass(frozen=True, eq=False)
class AuditTab(Panel):
    """The tab's components."""

    studio: Studio
    go: Run
    explore: Explore
    steps: Component
    what: Component
    question: Component
    prompts: Component
    files: Component
    attributes: Component
    against: Component
    table: Component
    steer: Component
    steer_attribute: Component
    steer_target: Component
    beta: Component
    on_screen: Component
    rewrite: Component
    controls: Component
    precision: Component
    until: Component
    blind: Component
    intended_use: Component
    people_affected: Component
    harm_hypotheses: Component
    would_change: Component
    reviewer: Component
    conflicts: Component
    notes: Component
    outline: Component
    command: Component
    status: Component
    said: Component
    page: Component
    start: Component
    stop: Component
    download: Component
    again: Component
    take_up: Component
    name: Component
    rater: Component
    read_attribute: Component
    load: Component
    grid: Component
    agreement: Component
    sign: Component

    def wish(self, values: Values) -> Wish:
        """What was chosen; raises ``LensError`` where Explore's screen cannot be taken."""
        asked = self.read(values, AuditRequest)
        shown = None
        if asked.on_screen and asked.what == LENS:
            shown = self.explore.edit_spec(values)
            if shown is None:
                raise LensError("Nothing is steered on Explore's screen; move its slider, or untick it here.")
        files = [str(getattr(f, "name", f)) for f in asked.files or ()]
        context = {name: getattr(asked, name) or "" for name in (
            "intended_use", "people_affected", "harm_hypotheses", "would_change",
        )}  # fmt: skip
        return Wish(
            what="images" if asked.what == IMAGES else "lens", prompts=asked.prompts or "", files=tuple(files),
            attributes=tuple(asked.attributes or ()), against=AGAINST.get(asked.against, "equal"),
            table=asked.table or "", question=asked.question or "", steer=bool(asked.steer) and asked.what == LENS,
            attribute=asked.steer_attribute, target=asked.steer_target, beta=float(asked.beta), shown=shown,
            rewrite=bool(asked.rewrite) and asked.what == LENS, controls=bool(asked.controls),
            precision=SIZES.get(asked.precision, 10.0), until=bool(asked.until), blind=int(asked.blind or 0),
            context=context, sign=self._sign(asked),
        )  # fmt: skip

    def _sign(self, asked: AuditRequest) -> dict[str, str]:
        return {name: getattr(asked, name) or "" for name in ("reviewer", "conflicts", "notes")}

    @property
    def asked_parts(self) -> set[Component]:
        """Everything that a plan is read from."""
        return self.parts(AuditRequest) | self.explore.inputs

    def describe(self, values: Values) -> Updates:
        """What the plan would draw now."""
        return self.show(self._outline(values))

    def _outline(self, values: Values) -> OutlineView:
        try:
            found = audit.outline(self.studio, self.wish(values))
        except LensError as error:
            return OutlineView(html("parts.status", str(error), bad=True), "")
        plan = found.plan
        named = {"steer": "recommended steering", "spec": "the edit on screen", "rewrite": "rewritten prompts"}
        conditions = ["unedited", *(named.get(edit.kind, edit.kind) for edit in plan.edits)]
        if plan.controls and any(edit.kind in ("steer", "spec") for edit in plan.edits):
            conditions.append("random features as a control")
        text = json.dumps(plan.plain(), indent=2, ensure_ascii=False)
        return OutlineView(
            html(
                "audit.outline", plan, found.images, found.per_prompt, found.time, conditions, found.too_large
            ),
            html("audit.command", audit.command_for(plan), data_address(text, "application/json")),
        )  # fmt: skip

    def change_what(self, values: Values) -> Updates:
        """A lens, or uploaded images: the fields that belong to each."""
        lens = values[self.what] == LENS
        return {
            self.prompts: visible(lens and self.studio.lens.prompts != (None,)),
            self.files: visible(not lens),
            **self.describe(values),
        }

    def change_against(self, values: Values) -> Updates:
        """The reference table is shown where one is asked for."""
        return {self.table: visible(AGAINST.get(values[self.against]) == "table"), **self.describe(values)}

    def change_steered(self, values: Values) -> Updates:
        """Another attribute is steered: its classes and strengths."""
        return _steering(self.studio, values[self.steer_attribute], self.steer_target, self.beta)

    def begin(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        """Freeze the plan and run it."""
        said = html("parts.status", "Checking the plan and hashing it …")
        yield self.show(RunView(said, start=visible(False)))
        try:
            name = audit.begin(self.studio, self.wish(values))
        except Exception as error:
            yield self.show(RunView(explain(error), start=visible(True)))
            return
        yield from self._run(name, request)

    def resume(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        """Take up an audit by its id."""
        try:
            name = audit.folder_of(str(values[self.again] or "")).name
        except LensError as error:
            yield self.show(RunView(explain(error)))
            return
        yield from self._run(name, request)

    def _run(self, name: str, request: gr.Request) -> Iterator[Updates]:
        for view in self.go(visitor_of(request), name):
            yield self.show(view)

    def stop_run(self, request: gr.Request) -> None:
        """End the visitor's own audit at its next step; what is finished stays."""
        self.studio.stops.stop(f"{visitor_of(request)}:audit")

    def load_blind(self, values: Values) -> Updates:
        """The images set apart, for one attribute."""
        try:
            found = audit.blind_of(self.studio, str(values[self.name] or values[self.again] or ""))
            asked = next((a for a in found.attributes if a.name == values[self.read_attribute]), found.attributes[0])
            return {self.grid: html("audit.blind", found.images, asked, UNSURE), self.agreement: ""}
        except Exception as error:
            return {self.grid: "", self.agreement: explain(error)}

    def keep_answers(self, values: Values, event: gr.EventData) -> Updates:
        """Keep what a person read, correct by it, and show the report anew."""
        answers = getattr(event, "answers", None)
        name = str(values[self.name] or values[self.again] or "")
        try:
            if not isinstance(answers, dict) or not answers:
                raise LensError("No image is answered yet; choose what you see, then keep your answers.")
            given = {str(k): str(v) for k, v in answers.items()}
            n, told = audit.answer(
                self.studio, name, str(values[self.rater] or ""), str(values[self.read_attribute]), given
            )
            said = f"{n} answers kept. {told}"
            page, files = audit.finish_where_done(self.studio, name)
            shown: Updates = {self.agreement: html("parts.status", said)}
            if page:
                shown |= {self.page: html("audit.page", page), self.download: gr.update(value=files, visible=True)}
            return shown
        except Exception as error:
            return {self.agreement: explain(error)}

    def sign_report(self, values: Values) -> Updates:
        """Put name, conflicts and notes under the finished report."""
        try:
            name = str(values[self.name] or values[self.again] or "")
            page, files = audit.sign(self.studio, name, self._sign(self.read(values, AuditRequest)))
        except Exception as error:
            return {self.status: explain(error)}
        return {
            self.page: html("audit.page", page), self.download: gr.update(value=files, visible=True),
            self.status: html("parts.status", "Signed. The plan's hash is the same as before the first image."),
        }  # fmt: skip

    def connect(self) -> None:
        """Bind the events."""
        plan, shown = self.asked_parts, self.parts(OutlineView)
        told = [
            self.prompts.blur, self.files.change, self.attributes.input, self.table.blur, self.steer.input,
            self.steer_attribute.input, self.steer_target.input, self.beta.release, self.on_screen.input,
            self.rewrite.input, self.controls.input, self.precision.input, self.until.input, self.blind.change,
        ]  # fmt: skip
        gr.on(told, self.describe, plan, shown, trigger_mode="always_last", **READ)
        self.what.input(self.change_what, plan, {self.prompts, self.files} | shown, **READ)
        self.against.input(self.change_against, plan, {self.table} | shown, **READ)
        self.steer_attribute.input(
            self.change_steered, {self.steer_attribute}, {self.steer_target, self.beta}, **AT_ONCE
        )
        run_parts = self.parts(RunView)
        self.start.click(self.begin, plan, run_parts, **LONG)
        self.take_up.click(self.resume, {self.again}, run_parts, **LONG)
        self.stop.click(self.stop_run, None, None, **AT_ONCE)
        mine = {self.name, self.again, self.read_attribute, self.rater}
        self.load.click(self.load_blind, mine, {self.grid, self.agreement}, **READ)
        self.grid.answers(self.keep_answers, mine, {self.agreement, self.page, self.download}, **READ)
        self.sign.click(
            self.sign_report, self.parts(AuditRequest) | {self.name, self.again},
            {self.page, self.download, self.status}, **READ,
        )  # fmt: skip


def _steering(studio: Studio, attribute: str, target: Component, beta: Component) -> Updates:
    setting = studio.lens.setting(attribute)
    ends = state.scale(setting)
    classes = studio.lens.attribute_named(attribute).classes
    return {
        target: gr.update(choices=list(classes), value=setting.target),
        beta: gr.update(minimum=ends.low, maximum=ends.high, step=ends.step, value=_strength(setting)),
    }


def _strength(setting: Setting) -> float:
    """The gentlest of the shipped strengths that steers towards the class."""
    return min((beta for beta in setting.betas if beta > setting.identity), default=max(setting.betas))


def build(studio: Studio, go: Run, explore: Explore, values: Values) -> None:
    """Build the tab inside an open ``gr.Blocks``; ``values``: what Explore holds, whose prompt comes first."""
    gr.HTML(html("parts.intro", INTRO))
    with gr.Row(elem_id="dl-audit"):
        with gr.Column(elem_classes="dl-audit-steps"):
            steps, parts, forward = _steps(studio, explore, values)
        with gr.Column(elem_classes="dl-audit-result"):
            parts |= _result()
    tab = AuditTab(studio=studio, go=go, explore=explore, steps=steps, **parts)
    tab.connect()
    for number, button in enumerate(forward, start=1):
        button.click(lambda place=number: gr.Walkthrough(selected=place), None, steps, **AT_ONCE)
    first = tab.describe({**dict.fromkeys(tab.asked_parts), **_held(tab.asked_parts), **values})
    tab.outline.value, tab.command.value = first[tab.outline], first[tab.command]


def _held(parts: set[Component]) -> dict[Component, Any]:
    return {part: part.value for part in parts}


def _steps(studio: Studio, explore: Explore, values: Values) -> tuple[Any, dict[str, Any], list[Any]]:
    lens = studio.lens
    parts: dict[str, Any] = {}
    forward: list[Any] = []
    with gr.Walkthrough(selected=0, elem_id="dl-audit-walk") as steps:
        with gr.Step(STEPS[0], id=0):
            _what(studio, explore, values, parts)
            forward.append(gr.Button("Next: against what", size="sm"))
        with gr.Step(STEPS[1], id=1):
            _against(studio, parts)
            forward.append(gr.Button("Next: steering", size="sm"))
        with gr.Step(STEPS[2], id=2):
            _edits(studio, parts)
            forward.append(gr.Button("Next: how many", size="sm"))
        with gr.Step(STEPS[3], id=3):
            parts["precision"] = gr.Radio(
                list(SIZES), value="± 10 points", label="Know every share to", elem_id="dl-audit-size",
                info="The half width of its 95 % interval where a share is even.", interactive=True,
            )  # fmt: skip
            parts["until"] = gr.Checkbox(
                False, label="Stop each prompt as soon as it is known so well", interactive=True,
                info="By a confidence sequence: its intervals hold however often one looks, and are wider for it.",
            )  # fmt: skip
            forward.append(gr.Button("Next: who reads", size="sm"))
        with gr.Step(STEPS[4], id=4):
            _readers(lens.attributes, parts)
            forward.append(gr.Button("Next: sign", size="sm"))
        with gr.Step(STEPS[5], id=5):
            _signing(parts)
    return steps, parts, forward


def _what(studio: Studio, explore: Explore, values: Values, parts: dict[str, Any]) -> None:
    lens = studio.lens
    takes = lens.prompts != (None,)
    first = state.shown_prompt(state.read_prompt(lens, explore.subject(values)[0]) or "") if takes else ""
    parts["question"] = gr.Textbox(
        "", label="Your question", placeholder="Who does this model show as a nurse?", max_length=400, interactive=True
    )
    parts["what"] = gr.Radio([LENS, IMAGES], value=LENS, label="Audit", interactive=True, elem_id="dl-audit-what")
    parts["prompts"] = gr.Textbox(
        first, label="Prompts, one a line", lines=3, max_lines=10, visible=takes, interactive=True,
        elem_id="dl-audit-prompts",
    )  # fmt: skip
    parts["files"] = gr.File(
        label="Images, and perhaps a CSV (file, prompt, seed, model)", file_count="multiple",
        file_types=["image", ".csv"], visible=False, interactive=True, height=140, elem_id="dl-audit-files",
    )  # fmt: skip
    names = [a.name for a in lens.classifier.attributes] if lens.is_ready else [a.name for a in lens.attributes]
    steered = [a.name for a in lens.attributes]
    parts["attributes"] = gr.CheckboxGroup(
        names, value=[name for name in steered if name in names], label="Attributes in question (perceived)",
        info="The first stands on page one. All images are read by this lens's own classifier.", interactive=True,
    )  # fmt: skip


def _against(studio: Studio, parts: dict[str, Any]) -> None:
    planted = (studio.lens.folder / "pipeline" / "planted.json").is_file()
    choices = [name for name, kind in AGAINST.items() if kind != "planted" or planted]
    parts["against"] = gr.Radio(
        choices, value=choices[0], label="Compare shares with", interactive=True, elem_id="dl-audit-against",
        info="Distances, differences and words are against this, and every figure names it.",
    )  # fmt: skip
    attribute = studio.lens.attributes[0]
    even = 1 / len(attribute.classes)
    lines = [f"{attribute.name},{label},{even:.2f}," for label in attribute.classes]
    parts["table"] = gr.Textbox(
        "\n".join(["attribute,class,share,source", *lines]), label="Reference table (CSV)", lines=5, visible=False,
        info="A source for every row; a column 'prompt' where shares differ by prompt.", interactive=True,
        elem_id="dl-audit-table",
    )  # fmt: skip


def _edits(studio: Studio, parts: dict[str, Any]) -> None:
    lens = studio.lens
    steerable = list(state.steerable(lens))
    attribute = steerable[0]
    setting = lens.setting(attribute)
    ends = state.scale(setting)
    parts["steer"] = gr.Checkbox(False, label="Recommended steering", interactive=True, elem_id="dl-audit-steer")
    parts["steer_attribute"] = gr.Radio(steerable, value=attribute, label="Attribute (perceived)", interactive=True)
    parts["steer_target"] = gr.Dropdown(
        list(lens.attribute_named(attribute).classes), value=setting.target, label="Towards", interactive=True
    )
    parts["beta"] = gr.Slider(
        ends.low, ends.high, value=_strength(setting), step=ends.step, label="Steering strength (β)",
        info=f"{ends.identity:g} = unchanged", interactive=True,
    )  # fmt: skip
    parts["on_screen"] = gr.Checkbox(False, label="Exactly what is on screen in Explore", interactive=True)
    parts["rewrite"] = gr.Checkbox(
        False, label="Rewriting of prompts: a class is named in each, by chance", interactive=True,
        visible=lens.prompts != (None,),
    )  # fmt: skip
    parts["controls"] = gr.Checkbox(
        True, label="A control beside steering: as many features, drawn at random", interactive=True
    )


def _readers(attributes: Any, parts: dict[str, Any]) -> None:
    parts["blind"] = gr.Number(
        48, label="Images set apart for people", minimum=0, maximum=200, precision=0, interactive=True,
        info="Drawn by a seed over all conditions and shuffled; nobody sees which is which.",
    )  # fmt: skip
    with gr.Accordion("Read them here", open=False):
        parts["rater"] = gr.Textbox("", label="Your name or initials", max_length=60, interactive=True)
        names = [a.name for a in attributes]
        parts["read_attribute"] = gr.Radio(names, value=names[0], label="What you read", interactive=True)
        parts["load"] = gr.Button("Show the images", size="sm", elem_id="dl-audit-load")
        script = (ASSETS / "audit.js").read_text(encoding="utf-8")
        parts["grid"] = gr.HTML("", js_on_load=script, elem_id="dl-audit-grid")
        parts["agreement"] = gr.HTML("", elem_id="dl-audit-agreement")


def _signing(parts: dict[str, Any]) -> None:
    def field(name: str, label: str, **options: Any) -> None:
        parts[name] = gr.Textbox("", label=label, interactive=True, max_length=4000, **options)

    field("intended_use", "Intended use", lines=2)
    field("people_affected", "People affected", lines=2)
    field("harm_hypotheses", "Harm hypotheses", lines=2)
    field("would_change", "What would change the decision", lines=2)
    field("reviewer", "Reviewer")
    field("conflicts", "Conflicts of interest")
    field("notes", "Notes, written after looking", lines=3)
    parts["sign"] = gr.Button("Sign the finished report", elem_id="dl-audit-sign")


def _result() -> dict[str, Any]:
    parts: dict[str, Any] = {"outline": gr.HTML("", elem_id="dl-audit-outline")}
    with gr.Row(elem_classes="dl-go"):
        parts["start"] = gr.Button(
            "Start the audit", variant="primary", elem_id="dl-audit-start", scale=0, min_width=180
        )
        parts["stop"] = gr.Button(
            "Stop", variant="stop", visible=False, elem_id="dl-audit-stop", scale=0, min_width=180
        )
        parts["download"] = gr.DownloadButton(
            "Download (ZIP)", visible=False, elem_id="dl-audit-download", scale=0, min_width=160
        )
    parts["status"] = gr.HTML("", elem_id="dl-audit-status")
    parts["said"] = gr.HTML("", elem_id="dl-audit-said")
    parts["page"] = gr.HTML(html("audit.page", ""), elem_id="dl-audit-page")
    with gr.Accordion("Take up an audit by its id, or run it elsewhere", open=False):
        with gr.Row(elem_classes="dl-go"):
            parts["again"] = gr.Textbox(
                "", label="Id", max_length=40, scale=1, min_width=200, interactive=True, elem_id="dl-audit-id"
            )
            parts["take_up"] = gr.Button("Take it up", scale=0, min_width=120, elem_id="dl-audit-resume")
        parts["command"] = gr.HTML("", elem_id="dl-audit-command")
    parts["name"] = gr.State("")
    return parts
