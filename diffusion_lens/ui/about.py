"""The About tab: what this is, how to read it, what was planted, what it cannot show."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from diffusion_lens.plots import confusion_figure, describe_confusion, describe_shares, share_figure
from diffusion_lens.studio import about, state
from diffusion_lens.studio.about import KnownShares
from diffusion_lens.studio.opening import first_steps
from diffusion_lens.studio.studio import Studio, foreign_lines, import_engine
from diffusion_lens.ui.figure import figure, figure_value
from diffusion_lens.ui.html import html
from diffusion_lens.ui.lazy import once_built
from diffusion_lens.ui.panel import READ, Component, Panel, Updates, Values

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

- **Before / after**: the same seeds, so every difference comes from the turn. A border and “now …” mark an image
  that changed class.
- **Share and log ratio** always come with n, a 95 % interval and the number of images the classifier would not decide.
  ln(male / female) is 0 at balance, about +0.7 at two to one.
- **Eight images show what a turn does, never how often.** The Sweep tab counts more.
- **Controls** turn features that should not matter. What moves there is noise, or damage.
- **Try to keep**: features of one attribute carry some of the others. Held attributes are left alone: what their
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
- Another work of this name: Toker et al. (2024), [Diffusion Lens](https://arxiv.org/abs/2403.05846), reads text
  encoders layer by layer.
"""


@dataclass(frozen=True)
class AboutQuestion:
    """Which shares are asked for."""

    attribute: str
    prompt: str | None


@dataclass(frozen=True)
class SharesView:
    """Generated against planted shares of one prompt and attribute, what that rests on, and all prompts as a table."""

    shares: dict[str, str] | None
    rests: str
    planted: str


@dataclass(frozen=True)
class ErrorsView:
    """How often the classifier errs."""

    errors: dict[str, str] | None
    errors_sentence: str


def shares_view(studio: Studio, question: AboutQuestion) -> SharesView:
    """What is known of one prompt and attribute."""
    lens = studio.lens
    by_prompt = about.known_shares(lens, question.attribute)
    known = by_prompt.get(question.prompt or "", KnownShares(question.prompt or "", None, None))
    prompt_free = lens.prompts == (None,)
    classes = about.attributes_known(lens)[question.attribute]
    has_table = bool(about.planted_shares(lens))
    planted = html("about.planted", list(by_prompt.values()), classes, has_table, prompt_free)
    if known.counted is None:
        return SharesView(None, html("about.not_counted", known, question.attribute, prompt_free), planted)
    groups = {"generated": known.counted}
    said = describe_shares(groups, planted=known.truth)
    made = figure_value(share_figure(groups, planted=known.truth), said)
    return SharesView(made, html("about.rests", said, known.counted[0].n, known.least_difference), planted)


def errors_view(studio: Studio, attribute: str) -> ErrorsView:
    """The classifier's error on one attribute (waits for the model on first use)."""
    import_engine()
    classifier = studio.lens.classifier
    read = {a.name: a for a in classifier.attributes}
    if attribute not in read or attribute not in classifier.confusion:
        return ErrorsView(None, html("about.errors_unknown"))
    counts = classifier.confusion[attribute]
    said = describe_confusion(counts, read[attribute])
    return ErrorsView(figure_value(confusion_figure(counts, read[attribute]), said), html("parts.sentence", said))


def first_steps_html(studio: Studio) -> str:
    """Three views to begin with: guess, open, compare."""
    steps = [(studio.path + state.to_query(step.view), step) for step in first_steps(studio)]
    return html("about.first_steps", steps)


@dataclass(frozen=True, eq=False)
class AboutTab(Panel):
    """The tab's components: an ``AboutQuestion``, and both views."""

    studio: Studio
    attribute: Component
    prompt: Component
    shares: Component
    rests: Component
    planted: Component
    errors: Component
    errors_sentence: Component

    def show_shares(self, values: Values) -> Updates:
        """Another prompt or attribute."""
        return self.show(shares_view(self.studio, self.read(values, AboutQuestion)))

    def show_errors(self, values: Values) -> Updates:
        """The errors on the attribute chosen."""
        return self.show(errors_view(self.studio, values[self.attribute]))

    def connect(self) -> None:
        """Bind the events. The classifier's errors wait for the model, the rest is there at once."""
        errors = self.parts(ErrorsView)
        gr.on(
            [self.attribute.input, self.prompt.input], self.show_shares, self.parts(AboutQuestion),
            self.parts(SharesView), **READ,
        )  # fmt: skip
        self.attribute.input(self.show_errors, {self.attribute}, errors, **READ)
        once_built(self.show_errors, {self.attribute}, errors)


def build(studio: Studio) -> None:
    """Build the tab inside an open ``gr.Blocks``, filled with what needs no model."""
    lens = studio.lens
    names, prompts = list(about.attributes_known(lens)), about.prompts_known(lens)
    shown = shares_view(studio, AboutQuestion(names[0], prompts[0]))
    with gr.Column(elem_classes="dl-prose"):
        gr.Markdown(WHAT)
        gr.HTML(first_steps_html(studio))
        gr.HTML(html("about.heading", "What was planted, and what the model draws"))
        with gr.Row():
            attribute = gr.Radio(names, value=names[0], label="Attribute", interactive=True)
            prompt = gr.Dropdown(
                [(p or "(no words)", p) for p in prompts], value=prompts[0], label="Prompt",
                visible=lens.prompts != (None,), elem_id="dl-about-prompt", interactive=True,
            )  # fmt: skip
        shares = figure(shown.shares, elem_id="dl-shares", min_height=200)
        rests = gr.HTML(shown.rests)
        planted = gr.HTML(shown.planted)
        gr.HTML(html("about.heading", "How often the classifier errs"))
        errors = figure(elem_id="dl-errors", min_height=220)
        errors_sentence = gr.HTML("")
        gr.Markdown(LIMITS)
        gr.HTML(html("about.lens", about.lens_facts(lens), foreign_lines(studio)))
    AboutTab(studio, attribute, prompt, shares, rests, planted, errors, errors_sentence).connect()
