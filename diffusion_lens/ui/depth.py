"""The Depth tab: do deeper networks overstate what they were shown? A stored experiment on the bundled world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_lens.base.types import LensError
from diffusion_lens.plots import depth_figure, describe_depth
from diffusion_lens.results.depth import DepthResult, flips_of, load_depth
from diffusion_lens.studio import depth, state
from diffusion_lens.studio.depth import DepthQuestion
from diffusion_lens.ui.figure import ASSETS, figure, figure_value
from diffusion_lens.ui.html import html
from diffusion_lens.ui.panel import READ, Component, Panel, Updates, Values

STORED = ASSETS / "depth.json"
COMMAND = "python -m diffusion_lens portraits depth --store"


@dataclass(frozen=True)
class DepthView:
    """A question's answer: figure, the sentence that stands for it, and both tables."""

    plot: dict[str, str]
    sentence: str
    amplification: str
    flips: str


def answer(result: DepthResult, question: DepthQuestion) -> DepthView:
    """What the experiment says to a question."""
    found = depth.depth_lines(result, question)
    name, *rest = found.lines
    options: dict[str, Any] = {
        "training_share": found.planted, "name": name, "others": {key: found.lines[key] for key in rest},
    }  # fmt: skip
    said = describe_depth(found.depths, found.lines[name], **options)
    classes = depth.classes(result, question.attribute)
    return DepthView(
        figure_value(depth_figure(found.depths, found.lines[name], **options), said),
        html("parts.sentence", said),
        html("depth.amplification", depth.points_of(result, question), classes.index(question.label), question.label),
        html(
            "depth.flips",
            flips_of(result, question.attribute, prompt=question.prompt),
            depth.majority(result, question.attribute, question.prompt),
        ),
    )


@dataclass(frozen=True, eq=False)
class DepthTab(Panel):
    """The tab's components; the first four are read as a ``DepthQuestion``, the others show a ``DepthView``."""

    result: DepthResult
    attribute: Component
    prompt: Component
    label: Component
    bypass: Component
    plot: Component
    sentence: Component
    amplification: Component
    flips: Component

    def change_subject(self, values: Values) -> Updates:
        """Another attribute or prompt: its classes, at the class planted most often."""
        question = depth.with_majority(self.result, self.read(values, DepthQuestion))
        classes = list(depth.classes(self.result, question.attribute))
        return {
            self.label: gr.update(choices=classes, value=question.label),
            **self.show(answer(self.result, question)),
        }

    def change_line(self, values: Values) -> Updates:
        """Another class, with or without bypass."""
        return self.show(answer(self.result, self.read(values, DepthQuestion)))

    def connect(self) -> None:
        """Bind the events."""
        asked, shown = self.parts(DepthQuestion), self.parts(DepthView)
        gr.on([self.attribute.input, self.prompt.input], self.change_subject, asked, shown | {self.label}, **READ)
        gr.on([self.label.input, self.bypass.input], self.change_line, asked, shown, **READ)


def build(path: Path | None = None) -> None:
    """Build the tab inside an open ``gr.Blocks``, filled with the first question's answer."""
    gr.HTML(html("depth.intro"))
    try:
        result = load_depth(path or STORED) if (path or STORED).is_file() else None
    except LensError as error:
        gr.HTML(html("parts.status", str(error), bad=True))
        return
    if result is None:
        gr.HTML(html("depth.missing", COMMAND))
    else:
        _components(result).connect()


def _components(result: DepthResult) -> DepthTab:
    first = depth.first_question(result)
    shown = answer(result, first)
    with gr.Row(elem_classes="dl-choose"):
        attribute = gr.Radio(
            depth.attributes(result),
            value=first.attribute,
            label="Attribute (perceived)",
            scale=3,
            min_width=200,
            interactive=True,
        )
        prompt = gr.Dropdown(
            [(state.shown_prompt(p), p) for p in depth.prompts(result)], value=first.prompt, label="Prompt measured",
            scale=4, min_width=240, elem_id="dl-depth-prompt", interactive=True,
        )  # fmt: skip
        label = gr.Radio(
            list(depth.classes(result, first.attribute)), value=first.label, label="Class", scale=3, min_width=200,
            elem_id="dl-depth-class", interactive=True,
        )  # fmt: skip
    bypass = gr.Checkbox(first.bypass, label="Show mid-block bypass", container=False, interactive=True)
    plot = figure(shown.plot, elem_id="dl-depth-plot")
    sentence = gr.HTML(shown.sentence)
    amplification = gr.HTML(shown.amplification, elem_id="dl-depth-table")
    flips = gr.HTML(shown.flips)
    gr.HTML(html("depth.sizes", result))
    return DepthTab(result, attribute, prompt, label, bypass, plot, sentence, amplification, flips)
