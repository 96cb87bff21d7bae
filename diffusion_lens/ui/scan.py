"""Where it lives: the stored scans of a lens's model, a map of sites by steps for each attribute."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.text import as_csv
from diffusion_lens.base.types import LensError
from diffusion_lens.plots.scanned import describe_scan, scan_figure
from diffusion_lens.results.scan import Scan, table
from diffusion_lens.studio import state
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui.figure import figure, figure_value
from diffusion_lens.ui.html import html
from diffusion_lens.ui.panel import READ, Component, Panel, Updates, Values

COMMAND = "python -m diffusion_lens scan --store"


@dataclass(frozen=True)
class ScanQuestion:
    """Which stored scan, by its stem, and which attribute."""

    prompt: str
    attribute: str


@dataclass(frozen=True)
class ScanView:
    """A scan's map of one attribute, the sentence that stands for it, and the table."""

    plot: dict[str, str]
    sentence: str
    table: str


def answer(scan: Scan, attribute: str) -> ScanView:
    """What a scan says of an attribute."""
    about = next((a for a in scan.attributes if a.name == attribute), scan.attributes[0])
    said = describe_scan(scan, about.name)
    return ScanView(
        figure_value(scan_figure(scan, about.name), said),
        html("parts.sentence", said),
        html("scan.table", scan, about),
    )


@dataclass(frozen=True, eq=False)
class ScanTab(Panel):
    """The tab's components; the first two are read as a ``ScanQuestion``, the next three show a ``ScanView``."""

    scans: Mapping[str, Scan]
    prompt: Component
    attribute: Component
    plot: Component
    sentence: Component
    table: Component
    advice: Component
    limits: Component
    download: Component

    def change(self, values: Values) -> Updates:
        """Another scan or attribute."""
        asked = self.read(values, ScanQuestion)
        scan = self.scans.get(asked.prompt, next(iter(self.scans.values())))
        names = [a.name for a in scan.attributes]
        chosen = asked.attribute if asked.attribute in names else names[0]
        return {
            self.attribute: gr.update(choices=names, value=chosen),
            **self.show(answer(scan, chosen)),
            **{getattr(self, key): text for key, text in around(scan).items()},
        }

    def connect(self) -> None:
        """Bind the events."""
        shown = self.parts(ScanView) | {self.attribute, self.advice, self.limits, self.download}
        gr.on([self.prompt.input, self.attribute.input], self.change, self.parts(ScanQuestion), shown, **READ)


def around(scan: Scan) -> dict[str, str]:
    """What is said of a whole scan: advice, limits, files."""
    rows = table(scan)
    files = [_base64(as_csv(list(rows[0]), [list(row.values()) for row in rows])), _base64(json.dumps(to_plain(scan)))]
    return {
        "advice": html("scan.advice", scan),
        "limits": html("scan.limits", scan),
        "download": html("scan.download", *files, "scan"),
    }


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def build(studio: Studio) -> None:
    """Build the tab inside an open ``gr.Blocks``, filled with the first scan and attribute."""
    gr.HTML(html("scan.intro"))
    try:
        scans = studio.lens.stored(Scan)
    except LensError as error:
        gr.HTML(html("parts.status", str(error), bad=True))
        return
    if not scans:
        gr.HTML(html("scan.missing", COMMAND))
        return
    _components(scans).connect()


def _components(scans: Mapping[str, Scan]) -> ScanTab:
    stem, scan = next(iter(scans.items()))
    names = [a.name for a in scan.attributes]
    shown, said = answer(scan, names[0]), around(scan)
    with gr.Row(elem_classes="dl-choose"):
        attribute = gr.Radio(
            names, value=names[0], label="Attribute (perceived)", scale=3, min_width=200, interactive=True,
            elem_id="dl-scan-attribute",
        )  # fmt: skip
        prompt = gr.Dropdown(
            [(_shown(s), key) for key, s in scans.items()], value=stem, label="Prompt measured", scale=4,
            min_width=240, interactive=True, visible=len(scans) > 1,
        )  # fmt: skip
    advice = gr.HTML(said["advice"], elem_id="dl-scan-advice")
    plot = figure(shown.plot, elem_id="dl-scan-plot")
    sentence = gr.HTML(shown.sentence)
    limits = gr.HTML(said["limits"])
    with gr.Accordion("Every cell as a table", open=False):
        rows = gr.HTML(shown.table, elem_id="dl-scan-table")
        download = gr.HTML(said["download"])
    values: dict[str, Any] = {"advice": advice, "limits": limits, "download": download}
    return ScanTab(scans, prompt, attribute, plot, sentence, rows, **values)


def _shown(scan: Scan) -> str:
    return "no prompt" if scan.prompt is None else state.shown_prompt(scan.prompt)
