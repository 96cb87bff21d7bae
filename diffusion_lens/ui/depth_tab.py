"""The Depth tab: do deeper networks overstate what they were shown? A stored experiment on the bundled world."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_lens.base.types import LensError, Share
from diffusion_lens.plots import depth_figure, describe_depth
from diffusion_lens.results.depth import DepthPoint, DepthResult, depth_series, flips_of, load_depth
from diffusion_lens.ui import texts
from diffusion_lens.ui.figure import ASSETS, figure, figure_value

STORED = ASSETS / "depth.json"
COMMAND = "python -m diffusion_lens portraits depth --store"
INTRO = (
    "U-Nets of several depths learned from the same drawings, whose shares are known exactly. "
    "<b>Amplification</b> is the share that a network draws minus the share that was planted. "
    "<b>Mid-block bypass</b> lets the image pass by the deepest block in part (Mian et al., "
    '<a href="https://arxiv.org/abs/2505.17560">Deeper Diffusion Models Amplify Bias</a>).'
)
BYPASSED = ", bypassed"


def stored(path: Path = STORED) -> DepthResult | None:
    """The stored experiment; ``None`` where there is none."""
    return load_depth(path) if path.is_file() else None


def attributes(result: DepthResult) -> list[str]:
    """What was measured, in the order of the experiment."""
    return list(dict.fromkeys(p.attribute for p in result.points))


def labels(result: DepthResult, attribute: str) -> tuple[str, ...]:
    """The classes of one attribute."""
    return tuple(s.label for s in next(p.shares for p in result.points if p.attribute == attribute))


def majority(result: DepthResult, attribute: str, prompt: str) -> str:
    """The class planted most often there."""
    return next(p.majority for p in result.points if (p.attribute, p.prompt) == (attribute, prompt))


def drawn(result: DepthResult, attribute: str, label: str, prompt: str, bypass: bool) -> dict[str, str]:
    """Share of one class by depth: a line per guidance scale, and the same with bypass."""
    scales = sorted({p.guidance_scale for p in result.points})
    lines: dict[str, list[Share]] = {}
    depths: list[str] = []
    planted = 0.0
    for bypassed in (False, True) if bypass else (False,):
        for scale in scales:
            depths, shares, planted = depth_series(
                result, attribute, label, prompt=prompt, guidance_scale=scale, bypass=bypassed
            )
            lines[f"guidance {scale:g}{BYPASSED if bypassed else ''}"] = shares
    name, *rest = lines
    made: dict[str, Any] = {"training_share": planted, "name": name, "others": {key: lines[key] for key in rest}}
    return figure_value(depth_figure(depths, lines[name], **made), describe_depth(depths, lines[name], **made))


def amplification_html(result: DepthResult, attribute: str, label: str, prompt: str) -> str:
    """Every depth and setting: share, planted share, and their difference with its interval."""
    rows = [
        _row(p, label) for p in result.points if (p.attribute, p.prompt) == (attribute, prompt)
    ]  # fmt: skip
    names = ("depth", "guidance", "bypass", f"share {escape(label)}", "planted", "amplification", "n, undecided")
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    return (
        "<div class='dl-scroll' tabindex='0'><table><caption>Amplification: generated minus planted share, in points, "
        "with its 95 % interval over images (not over trainings)</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(p: DepthPoint, label: str) -> str:
    column = [s.label for s in p.shares].index(label)
    share, (low, high) = p.shares[column], p.intervals[column]
    clear = "" if low <= 0 <= high else " *"
    cells = (
        f"{p.guidance_scale:g}", "yes" if p.bypass else "no", f"{share.corrected:.0%}", f"{p.planted[column]:.0%}",
        f"{_points(p.amplification[column])} ({_points(low)} to {_points(high)}){clear}",
        f"{share.n}, {share.n_uncertain}",
    )  # fmt: skip
    return f"<tr><th scope='row'>{escape(p.depth)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def flips_html(result: DepthResult, attribute: str, prompt: str) -> str:
    """Images that changed sides between two settings on the same seeds, with McNemar's test."""
    rows = [
        f"<tr><th scope='row'>{escape(f.first)} → {escape(f.second)}</th><td>{f.guidance_scale:g}</td>"
        f"<td>{f.to_majority}</td><td>{f.to_minority}</td><td>{f.n}</td><td>{_p(f.p_value)}</td></tr>"
        for f in flips_of(result, attribute, prompt=prompt)
    ]
    known = majority(result, attribute, prompt)
    return (
        f"<div class='dl-scroll' tabindex='0'><table><caption>The same seeds in two settings: images that turned to "
        f"the planted majority ({escape(known)}) and away from it; McNemar's exact test, not adjusted for the number "
        "of pairs</caption><thead><tr><th scope='col'>from → to</th><th scope='col'>guidance</th>"
        "<th scope='col'>to the majority</th><th scope='col'>away from it</th><th scope='col'>decided twice</th>"
        f"<th scope='col'>p</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _points(value: float) -> str:
    return "unknown" if value != value else f"{100 * value:+.0f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def sizes_html(result: DepthResult) -> str:
    """What was trained, in one line, and what such a small experiment can show."""
    nets = ", ".join(f"{escape(name)} ({count / 1e6:.1f} M weights)" for name, count in result.parameters.items())
    train = result.config.get("train", {})
    n = result.config.get("n")
    return (
        f"<p class='dl-says'>Trained: {nets}; each {train.get('n_steps', '?')} steps of {train.get('batch_size', '?')} "
        f"from the same seed; {n} images per setting on the same seeds.</p>"
        f"<p class='dl-caveat'><b>What this can and cannot show.</b> {escape(result.caveat)}</p>"
    )


def shown(result: DepthResult, attribute: str, label: str, prompt: str, bypass: bool) -> tuple[Any, ...]:
    """Figure, sentence, both tables."""
    made = drawn(result, attribute, label, prompt, bypass)
    return (
        made, f"<p class='dl-says'>{escape(made['alt'])}</p>", amplification_html(result, attribute, label, prompt),
        flips_html(result, attribute, prompt),
    )  # fmt: skip


def change_subject(result: DepthResult, attribute: str, prompt: str, bypass: bool) -> tuple[Any, ...]:
    """Another attribute or prompt: its classes, at the class planted most often."""
    label = majority(result, attribute, prompt)
    return gr.update(choices=list(labels(result, attribute)), value=label), *shown(
        result, attribute, label, prompt, bypass
    )


def layout(tab: gr.Tab, path: Path | None = None) -> None:
    """Build the tab inside an open ``gr.Blocks``; figure and tables come when it is looked at."""
    gr.HTML(f'<p class="dl-intro">{INTRO}</p>')
    try:
        result = stored(path or STORED)
    except LensError as error:
        gr.HTML(texts.status(str(error), bad=True))
        return
    if result is None:
        gr.HTML(
            "<p class='dl-status'>No such experiment is stored here. This makes one, in about half an hour on "
            f"two cores, and it shows when the app starts again:</p><pre><code>{COMMAND}</code></pre>"
        )
        return
    prompts = list(dict.fromkeys(p.prompt for p in result.points))
    opening = (attributes(result)[0], prompts[1] if len(prompts) > 1 else prompts[0])
    label_now = majority(result, *opening)
    with gr.Row(elem_classes="dl-choose"):
        attribute = gr.Radio(
            attributes(result), value=opening[0], label="Attribute (perceived)", scale=3, min_width=200
        )
        prompt = gr.Dropdown(
            [(p or texts.EMPTY_PROMPT, p) for p in prompts], value=opening[1], label="Prompt measured", scale=4,
            min_width=240, elem_id="dl-depth-prompt",
        )  # fmt: skip
        label = gr.Radio(list(labels(result, opening[0])), value=label_now, label="Class", scale=3, min_width=200,
                         elem_id="dl-depth-class")  # fmt: skip
        bypass = gr.Checkbox(True, label="Show mid-block bypass", scale=2, min_width=160)
    plot = figure(elem_id="dl-depth-plot")
    says, table, flips = gr.HTML(""), gr.HTML("", elem_id="dl-depth-table"), gr.HTML("")
    gr.HTML(sizes_html(result))
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read",
                             "concurrency_limit": 8}  # fmt: skip
    outputs = [plot, says, table, flips]
    gr.on(
        [attribute.input, prompt.input], partial(change_subject, result), [attribute, prompt, bypass],
        [label, *outputs], **quick,
    )  # fmt: skip
    gr.on(
        [label.input, bypass.input, tab.select],
        partial(shown, result),
        [attribute, label, prompt, bypass],
        outputs,
        **quick,
    )
