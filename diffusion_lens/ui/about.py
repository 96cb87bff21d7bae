"""The About tab: what this is, how to read it, what was planted, what it cannot show."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from diffusion_lens.base.types import Share
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.plots import confusion_figure, describe_confusion, describe_shares, share_figure
from diffusion_lens.steering.settings import describe_setting
from diffusion_lens.studio import state
from diffusion_lens.studio.studio import Studio, foreign_lines, import_engine
from diffusion_lens.ui.explore_handlers import opening
from diffusion_lens.ui.figure import figure, figure_value

WHAT = """
## What this is

A diffusion model draws images step by step. Half way through each step everything passes a narrow place, the
*bottleneck* of its U-Net. A *sparse autoencoder* (SAE) takes the activity there apart into thousands of **features**.
*Attribution* tells how much each feature adds to what a linear probe reads there: perceived gender, age, skin tone.
This app turns those features up or down by **β** while the model draws, on the same seeds, and measures what happens.

The method is that of *DiffLens*: Shi, Li, Wang, Zhao, Pang, Yang, Yu, Ren,
[Dissecting and Mitigating Diffusion Bias via Mechanistic Interpretability](https://arxiv.org/abs/2503.20483),
CVPR 2025.

## How to read it

- **Before / after**: the same seeds, so every difference comes from the turn. ↻ marks an image that changed class.
- **Share and log ratio** always come with n, a 95 % interval and the number of images the classifier would not decide.
  ln(male / female) is 0 at balance, about +0.7 at two to one.
- **Eight images show what a turn does, never how often.** The Sweep tab counts more.
- **Controls** turn features that should not matter. What moves there is noise, or damage.
- **Hold still**: features of one attribute carry some of the others. Held attributes are left alone: what their
  probes would read of the turn is taken out of it. That is our addition to the paper's method, and no guarantee: what
  moves all the same is measured.
- **Attribution is not causation.** A feature may speak for a class and still change nothing when it is turned.
"""

LIMITS = """
## Limits, and the words used

- **Perceived**: a classifier reads *perceived gender presentation*, age and skin tone in an image. It reads nobody's
  identity, and two classes of gender are a limit of the classifier, not a statement about people.
- **Drawn faces have skin tones, not races.** The bundled model draws made-up portraits; its shares were planted on
  purpose and describe no real population.
- Turning features **mitigates** a skew in these images. It makes no model fair, and it may move other things with it:
  look at the changes beside the share.
- The classifier that counts is not the probe that chose the features. It errs; its errors are shown above, and
  corrected for where it says *corrected*.
- A strong turn leaves the range the model was trained in; odd images follow.

## Sources

- DiffLens: [arXiv 2503.20483](https://arxiv.org/abs/2503.20483) · asymmetric sampler (Asyrp):
  [arXiv 2210.10960](https://arxiv.org/abs/2210.10960) · TopK sparse autoencoders:
  [arXiv 2406.04093](https://arxiv.org/abs/2406.04093) · integrated gradients:
  [arXiv 1703.01365](https://arxiv.org/abs/1703.01365) · DDIM: [arXiv 2010.02502](https://arxiv.org/abs/2010.02502) ·
  null-space projection: [arXiv 2004.07667](https://arxiv.org/abs/2004.07667)
- Correction for the classifier's error: Rogan and Gladen (1978); Lang and Reiczigel (2014)
"""


def planted(lens: DiffusionLens) -> dict[str, dict[str, list[float]]]:
    """Prompt → attribute → planted shares, where the model comes with such a table; otherwise empty."""
    path = lens.folder / "pipeline" / "planted.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["prompts"])
    except (ValueError, KeyError, TypeError):
        return {}


def measured(lens: DiffusionLens) -> dict[tuple[str, str], tuple[Share, ...]]:
    """(prompt, attribute) → shares of unedited images, from whatever counted most; no prompt counts as ""."""
    found: dict[tuple[str, str], tuple[Share, ...]] = {}
    for result in lens.sweeps:
        setting = lens.settings.get(result.attribute.name)
        identity = setting.identity if setting else None
        for point in result.points:
            if point.beta == identity:
                found.setdefault((result.request.prompt or "", result.attribute.name), point.shares)
    for prompt, own in lens.counted.shares.items() if lens.counted else ():
        for name, shares in own.items():
            before = found.get((prompt, name))
            if before is None or before[0].n < shares[0].n:
                found[prompt, name] = shares
    return found


def attributes_known(lens: DiffusionLens) -> dict[str, tuple[str, ...]]:
    """Attribute → classes: those that the lens steers, then the others that were counted (sweeps count none)."""
    counted = {name for own in lens.counted.shares.values() for name in own} if lens.counted else set()
    others = [a for a in lens.manifest.nuisances if a.name in counted]
    return {a.name: a.classes for a in (*lens.manifest.attributes, *others)}


def prompts_known(lens: DiffusionLens) -> list[str]:
    """Every prompt that is suggested or planted, in order; a model without prompts has "" alone."""
    return list(dict.fromkeys([*(p or "" for p in lens.prompts), *planted(lens)]))


def comparison(lens: DiffusionLens, prompt: str, attribute: str) -> tuple[dict[str, str] | None, str]:
    """Generated against planted shares of one prompt and attribute: a figure, and a sentence on what it rests on."""
    shares = measured(lens).get((prompt, attribute))
    table = planted(lens).get(prompt, {}).get(attribute)
    if shares is None:
        known = "the planted share alone is known" if table else "nothing is known of it"
        return None, (
            f'<p class="dl-says">No images {_of(lens, prompt)} were counted by {escape(attribute)}: {known}. '
            "Measure a sweep in the Sweep tab.</p>"
        )
    truth = dict(zip((s.label for s in shares), table, strict=True)) if table and len(table) == len(shares) else None
    groups = {"generated": shares}
    alt = describe_shares(groups, planted=truth)
    widest = max(high - low for low, high in (s.corrected_interval for s in shares))
    limits = (
        f"{shares[0].n:,} images were counted, so a difference below about {100 * widest / 2:.0f} points cannot be "
        "told from chance. The shares are corrected for the classifier's error; they say nothing of other prompts."
    )
    return figure_value(share_figure(groups, planted=truth), alt), f'<p class="dl-says">{escape(alt)} {limits}</p>'


def _of(lens: DiffusionLens, prompt: str) -> str:
    if lens.prompts == (None,):
        return "of this model"
    return f"of “{escape(prompt)}”" if prompt else "of the empty prompt"


def planted_html(lens: DiffusionLens, attribute: str) -> str:
    """One attribute: what was planted, and what was counted, prompt by prompt."""
    table, found = planted(lens), measured(lens)
    classes = attributes_known(lens)[attribute]
    rows = []
    for prompt in prompts_known(lens):
        truth, seen = table.get(prompt, {}).get(attribute), found.get((prompt, attribute))
        if not truth and not seen:
            continue
        cells = "".join(f"<td>{_cell(truth, seen, i)}</td>" for i in range(len(classes)))
        counted = f"{seen[0].n:,}" if seen else "–"
        name = escape(prompt) or ("every image" if lens.prompts == (None,) else "no words")
        rows.append(f"<tr><th scope='row'>{name}</th>{cells}<td>{counted}</td></tr>")
    if not rows:
        return (
            "<p>This model comes without a planted table, and none of its images were counted: nobody knows its "
            "true shares.</p>"
        )
    head = "".join(f"<th scope='col'>{escape(c)}</th>" for c in classes)
    caption = "Planted share → what was counted in unedited images (95 % interval)"
    if not table:
        caption = "What was counted in unedited images (95 % interval); no true share is known"
    return (
        f"<div class='dl-scroll dl-planted' tabindex='0'><table><caption>{caption}</caption><thead><tr>"
        f"<th scope='col'>prompt</th>{head}<th scope='col'>images</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(truth: list[float] | None, shares: tuple[Share, ...] | None, i: int) -> str:
    known = f"{truth[i]:.0%}" if truth else "–"
    if shares is None:
        return known
    low, high = shares[i].corrected_interval
    return f"{known} → {shares[i].corrected:.0%} <small>{low:.0%} to {high:.0%}</small>"


def confusion(studio: Studio, attribute: str) -> tuple[Any, str]:
    """How often the classifier errs, as a figure and a sentence (waits for the model on first use)."""
    import_engine()
    classifier = studio.lens.classifier
    read = {a.name: a for a in classifier.attributes}
    if attribute not in read or attribute not in classifier.confusion:
        return None, "<p>The classifier's error is not known for this attribute.</p>"
    counts, said = classifier.confusion[attribute], ""
    said = describe_confusion(counts, read[attribute])
    return figure_value(confusion_figure(counts, read[attribute]), said), f'<p class="dl-says">{escape(said)}</p>'


def lens_html(studio: Studio) -> str:
    """What is open: enough to find the same lens again, and what in it does not belong together."""
    lens = studio.lens
    m = lens.manifest
    rows = [
        ("lens", f"{m.name}, {m.lens_id}"), ("model", m.base_model.id),
        ("sampler", f"{m.scheduler}, {m.n_steps} steps"),
        ("guidance", f"{m.guidance_scale:g}"), ("bottleneck", m.hook_name),
        ("SAE", f"{m.sae_id}, {lens.atlas.density.size} features"), ("judged by", m.classifier_id),
    ]  # fmt: skip
    for name, setting in lens.settings.items():
        rows.append((f"turn for {name}", describe_setting(setting) + (f"; {setting.note}" if setting.note else "")))
    body = "".join(f"<tr><th scope='row'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    wrong = "".join(f"<li>{escape(line)}</li>" for line in foreign_lines(studio))
    warning = f'<p class="dl-bad">Not all stored sweeps are of the turns above:</p><ul>{wrong}</ul>' if wrong else ""
    return f"<h2>This lens</h2><div class='dl-scroll' tabindex='0'><table><tbody>{body}</tbody></table></div>{warning}"


def first_steps_html(studio: Studio) -> str:
    """Three views to begin with: guess, open, compare."""
    view = opening(studio)
    ends = state.scale(studio.lens.setting(view.attribute))
    far = max((ends.low, ends.high), key=lambda beta: abs(beta - ends.identity))
    steps = [
        (ends.identity, "The model as it is", f"How many of the eight will be read as {view.target}?",
         "Nothing is turned, so both rows are the same. Eight images have a wide interval: that is the first lesson."),
        (view.beta, "Turned towards balance", "Which of the eight will change, and what else will change with them?",
         "The same seeds keep most of their picture. Read “What else changed” beside the share: a turn is never free."),
        (far, "Turned too far", "Will the images only change class, or also look odd?",
         "A strong turn leaves the range the model was trained in; the share alone would not have told you."),
    ]  # fmt: skip
    items = "".join(
        f'<li><a href="{escape(studio.path + state.to_query(replace(view, beta=beta)))}">{title}, β = {beta:g}</a>. '
        f"Guess first: {escape(ask)} <details><summary>What to look for</summary>{escape(answer)}</details></li>"
        for beta, title, ask, answer in steps
    )
    return f'<h2>Three steps to begin</h2><ol class="dl-learn">{items}</ol>'


def layout(studio: Studio, tab: gr.Tab) -> None:
    """Build the tab inside an open ``gr.Blocks``; what is measured is filled in when it is looked at."""
    lens = studio.lens
    names = list(attributes_known(lens))
    prompts = prompts_known(lens)
    with gr.Column(elem_classes="dl-prose"):
        gr.Markdown(WHAT)
        gr.HTML(first_steps_html(studio))
        gr.HTML("<h2>What was planted, and what the model draws</h2>")
        with gr.Row():
            attribute = gr.Radio(names, value=names[0], label="Attribute")
            prompt = gr.Dropdown(
                [(p or "(no words)", p) for p in prompts], value=prompts[0], label="Prompt",
                visible=lens.prompts != (None,), elem_id="dl-about-prompt",
            )  # fmt: skip
        shares = figure(elem_id="dl-shares", min_height=200)
        rests = gr.HTML("")
        table = gr.HTML("")
        gr.HTML("<h2>How often the classifier errs</h2>")
        errors = figure(elem_id="dl-errors", min_height=220)
        says = gr.HTML("")
        gr.Markdown(LIMITS)
        about_lens = gr.HTML("")
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read",
                             "concurrency_limit": 8}  # fmt: skip

    def refresh(attribute: str, prompt: str | None) -> tuple[Any, ...]:
        return *comparison(lens, prompt or "", attribute), planted_html(lens, attribute), lens_html(studio)

    # The classifier's errors wait for the model, the rest is there at once.
    gr.on([attribute.input, prompt.input, tab.select], refresh, [attribute, prompt],
          [shares, rests, table, about_lens], **quick)  # fmt: skip
    gr.on([attribute.input, tab.select], lambda name: confusion(studio, name), attribute, [errors, says], **quick)
