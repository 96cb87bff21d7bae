"""The Depth tab without a browser: what it answers, and what its controls change."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import pytest
from dissected import NURSE, depth_result, keep_depth

from diffusion_lens.base.types import LensError
from diffusion_lens.studio.depth import DepthQuestion, clear_move, depth_lines, first_question
from diffusion_lens.ui import depth
from diffusion_lens.ui.depth import DepthTab, DepthView
from diffusion_lens.ui.html import html


@pytest.fixture
def tab() -> DepthTab:
    """The tab's components on a stored result."""
    with gr.Blocks():
        return depth._components(depth_result())


def test_lines_tables_and_flips() -> None:
    asked = DepthQuestion("gender", NURSE, "female", bypass=True)
    view = depth.answer(depth_result(), asked)
    lines = {t["name"]: t["y"] for t in json.loads(view.plot["figure"])["data"]}
    assert list(lines) == ["guidance 1", "guidance 3", "guidance 1, bypassed", "guidance 3, bypassed"]
    assert lines["guidance 3"] == pytest.approx([0.6, 0.75, 0.9])
    assert lines["guidance 3, bypassed"] == pytest.approx([0.6, 0.675, 0.75])
    assert "guidance 3: at depth 2 levels 60 %" in view.sentence
    assert "<td>90%</td><td>60%</td><td>+30 (+24 to +36) *</td><td>100, 2</td>" in view.amplification
    assert view.amplification.count("<tr>") == 1 + 12
    assert "majority (female)" in view.flips and "<td>12</td><td>2</td>" in view.flips


def test_without_bypass_half_the_lines_are_drawn(tab: DepthTab) -> None:
    shown = tab.change_line({tab.attribute: "gender", tab.prompt: NURSE, tab.label: "female", tab.bypass: False})
    assert set(shown) == tab.parts(DepthView)
    assert len(json.loads(shown[tab.plot]["figure"])["data"]) == 2


def test_another_attribute_brings_its_classes(tab: DepthTab) -> None:
    shown = tab.change_subject({tab.attribute: "age", tab.prompt: NURSE, tab.label: "female", tab.bypass: False})
    assert shown[tab.label]["choices"] == ["young", "adult", "old"] and shown[tab.label]["value"] == "young"
    assert "Share young" in shown[tab.plot]["alt"]


def test_what_was_not_measured_is_refused() -> None:
    asked = first_question(depth_result())
    with pytest.raises(LensError, match="did not measure gender = robot"):
        depth_lines(depth_result(), DepthQuestion("gender", asked.prompt, "robot", bypass=False))


def test_caveat_and_sizes_are_said() -> None:
    said = html("depth.sizes", depth_result())
    assert "cannot show that depth as such" in said and "4 levels (4.0 M weights)" in said and "10 steps" in said


def test_without_a_result_the_tab_says_how_to_make_one(tmp_path: Path) -> None:
    def texts(path: Path) -> str:
        with gr.Blocks() as demo:
            depth.build(path)
        return " ".join(str(getattr(b, "value", "")) for b in demo.blocks.values())

    assert depth.COMMAND in texts(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    assert "not a stored depth experiment" in texts(tmp_path / "bad.json")
    keep_depth(tmp_path / "depth.json")
    shown = texts(tmp_path / "depth.json")
    assert depth.COMMAND not in shown and "cannot show that depth" in shown


def test_the_tab_opens_where_depth_shows() -> None:
    result = depth_result()
    asked = first_question(result)
    shown = clear_move(result, asked.attribute, asked.prompt, asked.label)
    assert shown == pytest.approx(clear_move(result, "gender", asked.prompt, "male"))
    # at guidance 3 the share moves by .15 a level: .30 between the ends, whose intervals reach .06 either way
    assert clear_move(result, "gender", asked.prompt, "female") == pytest.approx(0.30 - 0.12)
    assert clear_move(result, "age", asked.prompt, "adult") == 0
