"""The About tab without a browser: what was planted, what was counted, and three views to begin with."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import parse_qsl

import gradio as gr
import numpy as np
import pytest
from lens_fixtures import PROMPTS
from measured import measured

from diffusion_lens.base.types import LensError
from diffusion_lens.fit.write import check_target
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.counted import CountedShares
from diffusion_lens.studio import state
from diffusion_lens.studio.about import attributes_known, lens_facts
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import about
from diffusion_lens.ui.about import AboutQuestion, ErrorsView, SharesView


def shown(lens: DiffusionLens, prompt: str, attribute: str) -> SharesView:
    """What the tab shows of one prompt and attribute."""
    return about.shares_view(Studio(lens), AboutQuestion(attribute, prompt))


def test_the_first_steps_open_views_of_this_lens(prompt_free_lens: DiffusionLens) -> None:
    html = about.first_steps_html(Studio(prompt_free_lens, path="second"))
    links = [unescape(link) for link in re.findall(r'href="second\?([^"]+)"', html)]
    views = [state.from_query(prompt_free_lens, dict(parse_qsl(link))) for link in links]
    assert len(views) == 3 and views[0] is not None and views[0].beta == 1.0


def test_what_was_noted_when_the_model_was_opened_is_shown(tiny_lens: DiffusionLens) -> None:
    lens = DiffusionLens(tiny_lens.folder, tiny_lens.manifest)
    assert "noted when opened" not in dict(lens_facts(lens)), "nobody waits for the model here"
    lens._parts.put("model", replace(tiny_lens.model, notes=("Its own sampler was replaced.",)))
    assert dict(lens_facts(lens))["noted when opened"] == "Its own sampler was replaced."


def test_every_prompt_says_what_is_stored(tiny_lens: DiffusionLens) -> None:
    view = shown(tiny_lens, PROMPTS[0], "gender")
    assert view.planted.count("<small>") == 2 and "no true share is known" in view.planted
    assert view.shares is not None and "decided images" in view.rests
    view = shown(tiny_lens, PROMPTS[1], "gender")
    assert view.shares is None and "No images" in view.rests and "Sweep tab" in view.rests


def test_what_was_counted_most_is_shown(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    lens_copy = tmp_path / "lens"
    tiny_lens.save_pretrained(lens_copy)
    lens = DiffusionLens.from_pretrained(lens_copy)
    names = list(attributes_known(lens))
    assert names == [a.name for a in lens.attributes]
    gender, nuisance = lens.attribute_named("gender"), lens.manifest.nuisances[0].attribute()
    other, judge = nuisance.name, lens.manifest.classifier_id
    images = measured({gender: np.arange(5_000) % 2, nuisance: np.arange(5_000) % 2}, prompt=PROMPTS[0])
    few = replace(images.readings[other], certain=np.arange(5_000) < 900)
    images = replace(images, readings={**images.readings, other: few})
    both = {
        prompt: replace(images, request=replace(images.request, prompt=prompt), classifier_id=judge)
        for prompt in PROMPTS[:2]
    }
    counted = CountedShares(both)
    path = lens.store(counted)
    again = DiffusionLens.from_pretrained(lens_copy)
    assert again.counted is not None and again.counted.shares == counted.shares
    check_target(lens_copy)  # a new fit may replace it
    assert shown(again, PROMPTS[0], "gender").planted.count("<td>5,000</td>") == 2
    assert list(attributes_known(again)) == [*names, other]
    assert "<td>900</td>" in shown(again, PROMPTS[0], other).planted
    assert "5,000 images were counted" in shown(again, PROMPTS[1], "gender").rests
    with pytest.raises(LensError, match="measured on another classifier"):
        lens.store(CountedShares({"": replace(images, classifier_id="another")}))
    path.write_text('{"shares": {}}')
    with pytest.raises(LensError, match=r"shares\.json"):
        DiffusionLens.from_pretrained(lens_copy)
    lens = DiffusionLens(lens_copy, again.manifest)
    with pytest.raises(LensError, match="check --full --part 1 --store"):
        _ = lens.counted


def test_a_model_without_prompts_is_counted_as_every_image(prompt_free_lens: DiffusionLens) -> None:
    assert "every image" in shown(prompt_free_lens, "", "gender").planted


def test_the_classifiers_errors_are_shown_where_they_are_known(tiny_lens: DiffusionLens) -> None:
    known = about.errors_view(Studio(tiny_lens), "gender")
    assert known.errors is not None and known.errors["alt"] in unescape(known.errors_sentence)
    assert about.errors_view(Studio(tiny_lens), "wealth") == ErrorsView(None, about.html("about.errors_unknown"))


def test_the_tab_is_filled_when_it_is_built(tiny_lens: DiffusionLens) -> None:
    with gr.Blocks() as demo:
        about.build(Studio(tiny_lens))
    values = " ".join(str(getattr(block, "value", "")) for block in demo.blocks.values())
    assert "no true share is known" in values and tiny_lens.manifest.lens_id in values
    assert len([fn for fn in demo.fns.values() if fn.inputs_as_dict]) == len(demo.fns) == 3
