"""Where it lives: the tab on a stored scan, another attribute, its files, and a lens without a scan."""

from __future__ import annotations

import base64
import csv
import io
import json
import re

import gradio as gr
import pytest
from scanned import make

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import scan
from diffusion_lens.ui.html import html

FOUND = make({("gender", "a"): 0.5, ("gender", "b"): 0.1, ("age", "a"): 0.0, ("age", "b"): 0.4})


@pytest.fixture
def tab() -> scan.ScanTab:
    """The tab's components on two stored scans."""
    with gr.Blocks():
        return scan._components({"scan": FOUND, "scan-2": make({("tone", "c"): 0.3})})


def test_figure_sentence_and_table_are_of_one_attribute() -> None:
    view = scan.answer(FOUND, "age")
    moves = json.loads(view.plot["figure"])["data"][1]
    assert moves["y"] == ["a", "b"] and moves["text"] == [["0"], ["+40 *"]]
    assert "steered best at b" in view.sentence and view.sentence.count("+40 points") == 1
    assert view.table.count("<tr>") == 1 + 2 and "+40 (+35 to +45) *" in view.table and "<td>40, 2</td>" in view.table


def test_another_scan_brings_its_attributes(tab: scan.ScanTab) -> None:
    shown = tab.change({tab.prompt: "scan-2", tab.attribute: "gender"})
    assert shown[tab.attribute]["choices"] == ["tone"] and shown[tab.attribute]["value"] == "tone"
    assert "Put a lens at c." in shown[tab.advice]
    assert "steered best at c" in shown[tab.sentence]


def test_what_was_drawn_and_who_read_it_is_said() -> None:
    limits = scan.around(FOUND)["limits"]
    for said in ("“a face”", "64 images to learn from", "40 others", "errs in gender 2%", "among 4 some stand out"):
        assert said in limits


def test_files_hold_every_cell() -> None:
    links = re.findall(r"base64,([^\"]+)", scan.around(FOUND)["download"])
    table, whole = (base64.b64decode(link).decode() for link in links)
    assert [row["site"] for row in csv.DictReader(io.StringIO(table))] == ["a", "b", "a", "b"]
    assert len(json.loads(whole)["cells"]) == 4


def test_a_lens_without_a_scan_says_how_to_make_one(tiny_lens: DiffusionLens) -> None:
    with gr.Blocks() as demo:
        scan.build(Studio(tiny_lens))
    texts = [block.value for block in demo.blocks.values() if isinstance(block, gr.HTML)]
    assert html("scan.missing", scan.COMMAND) in texts
