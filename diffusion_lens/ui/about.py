"""The About tab: what this is, how to read it, what was planted, what it cannot show."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import gradio as gr

from diffusion_lens.lens import DiffusionLens
from diffusion_lens.plots import confusion_figure, describe_confusion, describe_shares, share_figure
from diffusion_lens.settings import describe_setting, identity_beta
from diffusion_lens.types import Share
from diffusion_lens.ui.figure import figure, figure_value
from diffusion_lens.ui.studio import Studio, import_engine

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
  [arXiv 1703.01365](https://arxiv.org/abs/1703.01365) · DDIM: [arXiv 2010.02502](https://arxiv.org/abs/2010.02502)
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
    """(prompt, attribute) → shares of the unedited images that the stored sweeps counted."""
    found: dict[tuple[str, str], tuple[Share, ...]] = {}
    for result in lens.sweeps:
        setting = lens.settings.get(result.attribute.name)
        identity = identity_beta(setting.mode) if setting else None
        for point in result.points:
            if point.beta == identity and result.request.prompt is not None:
                found.setdefault((result.request.prompt, result.attribute.name), point.shares)
    return found


def comparison(lens: DiffusionLens, prompt: str, attribute: str) -> dict[str, str] | None:
    """Generated against planted shares of one prompt and attribute, as a figure."""
    shares = measured(lens).get((prompt, attribute))
    if shares is None:
        return None
    table = planted(lens).get(prompt, {}).get(attribute)
    truth = dict(zip((s.label for s in shares), table, strict=True)) if table and len(table) == len(shares) else None
    groups = {"generated": shares}
    return figure_value(share_figure(groups, planted=truth), describe_shares(groups, planted=truth))


def planted_html(lens: DiffusionLens, attribute: str) -> str:
    """The planted table of one attribute, with what was measured beside it."""
    table = planted(lens)
    found = measured(lens)
    classes = lens.attribute_named(attribute).classes
    rows = []
    for prompt, shares in table.items():
        if attribute not in shares:
            continue
        seen = found.get((prompt, attribute))
        cells = [f"<td>{share:.0%}{_seen(seen, i)}</td>" for i, share in enumerate(shares[attribute])]
        rows.append(f"<tr><th scope='row'>{escape(prompt) or 'no words'}</th>{''.join(cells)}</tr>")
    if not rows:
        return "<p>This model comes without a planted table: nobody knows its true shares.</p>"
    head = "".join(f"<th scope='col'>{escape(c)}</th>" for c in classes)
    return (
        "<div class='dl-scroll' tabindex='0'><table><caption>Planted share, and → what the stored sweep counted in the "
        f"unedited images (95 % interval)</caption><thead><tr><th scope='col'>prompt</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _seen(shares: tuple[Share, ...] | None, i: int) -> str:
    if shares is None:
        return ""
    low, high = shares[i].corrected_interval
    return f" → {shares[i].corrected:.0%} <small>({low:.0%} to {high:.0%})</small>"


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


def lens_html(lens: DiffusionLens) -> str:
    """What is open: enough to find the same lens again."""
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
    return f"<h2>This lens</h2><div class='dl-scroll' tabindex='0'><table><tbody>{body}</tbody></table></div>"


def layout(studio: Studio, tab: gr.Tab) -> None:
    """Build the tab inside an open ``gr.Blocks``."""
    lens = studio.lens
    names = [a.name for a in lens.attributes]
    found = list(dict.fromkeys(prompt for prompt, _ in measured(lens)))
    with gr.Column(elem_classes="dl-prose"):
        gr.Markdown(WHAT)
        gr.HTML("<h2>What was planted, and what the model draws</h2>")
        with gr.Row():
            attribute = gr.Radio(names, value=names[0], label="Attribute")
            prompt = gr.Dropdown(
                [(p or "(no words)", p) for p in found], value=found[0] if found else None, label="Prompt measured",
                visible=bool(found),
            )  # fmt: skip
        shares = figure(comparison(lens, found[0], names[0]) if found else None, elem_id="dl-shares", min_height=200)
        table = gr.HTML(planted_html(lens, names[0]))
        gr.HTML("<h2>How often the classifier errs</h2>")
        errors = figure(elem_id="dl-errors", min_height=220)
        says = gr.HTML("")
        gr.Markdown(LIMITS)
        gr.HTML(lens_html(lens))
    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "read",
                             "concurrency_limit": 8}  # fmt: skip

    def refresh(attribute: str, prompt: str | None) -> tuple[Any, ...]:
        compared = comparison(lens, prompt or "", attribute) if found else None
        return compared, planted_html(lens, attribute), *confusion(studio, attribute)

    outputs = [shares, table, errors, says]
    gr.on([attribute.input, prompt.input, tab.select], refresh, [attribute, prompt], outputs, **quick)
