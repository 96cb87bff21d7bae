"""Named endpoints over the same functions as app and command line, for ``gradio_client`` and for MCP.

Every function takes and gives plain JSON values, checks them as the app does, and answers a mistake in one sentence.
Their docstrings are what a client, or a language model, is told of them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar
from uuid import uuid4

import gradio as gr
import gradio.events
import numpy as np
from PIL import Image

from diffusion_lens.base.edits import describe
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError, as_number, as_seeds, as_whole
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.as_json import figures_json, sweep_json
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studio import atlas, cards, jobs, state
from diffusion_lens.studio.atlas_map import confidence_of
from diffusion_lens.studio.jobs import SHIPPED
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio, import_engine
from diffusion_lens.ui import words
from diffusion_lens.ui.atlas import name_of

MAX_IMAGES = 64
"""Images that one call draws; a sweep has the app's own limit."""

MAX_PROMPTS = 16
MAX_FOUND = 200
F = TypeVar("F", bound=Callable[..., Any])


def told(function: F) -> F:
    """A mistake comes to the client as its one sentence."""

    @wraps(function)
    def answer(*values: Any, **named: Any) -> Any:
        try:
            return function(*values, **named)
        except LensError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return answer  # type: ignore[return-value]


class Endpoints:
    """The endpoints of an app; every one takes ``lens``, the name of one of its lenses, the first by default."""

    def __init__(self, studios: Sequence[Studio]) -> None:
        self._studios = {studio.lens.manifest.name: studio for studio in studios}

    def connect(self) -> None:
        """Add them to an open ``gr.Blocks``."""
        for function, group in (
            (self.generate, "live"), (self.features, "read"), (self.feature, "read"), (self.sweep, "long"),
            (self.balance, "long"),
        ):  # fmt: skip
            limit = {"read": 8, "live": 8, "long": 4}[group]
            gr.events.api(told(function), api_name=function.__name__, concurrency_id=group, concurrency_limit=limit)

    def generate(
        self,
        prompt: str | list[str] = "",
        seeds: int | list[int] = 0,
        attribute: str = "",
        target: str = "",
        beta: float | None = None,
        features: dict[str, float] | None = None,
        keep: list[str] | None = None,
        lens: str = "",
    ) -> list[dict[str, Any]]:
        """
        Draw images, unedited or steered, and say how an image classifier perceives them.

        Args:
            prompt: What to draw; a list draws each on the same seeds. Leave empty for models without prompts.
            seeds: One seed or a list of seeds; an image depends on its own seed alone. At most 64 images a call.
            attribute: What is steered, e.g. "gender"; the lens's first attribute by default.
            target: The class steered towards, e.g. "male"; the recommended one by default.
            beta: Steering strength of the recommended features; 1 leaves the model unchanged. None: unchanged.
            features: Strengths of single features by number, e.g. {"716": 3.0}.
            keep: Other attributes to try to keep as they are; the recommended ones by default.
            lens: Name of the lens; the app's first by default.

        Returns:
            One entry per prompt: seeds, images as PNG data addresses, how each was perceived, and the shares.
        """
        studio = self._studio(lens)
        chosen = as_seeds(seeds)
        prompts = _prompts(studio.lens, prompt)
        if len(chosen) * len(prompts) > MAX_IMAGES:
            raise LensError(f"One call draws up to {MAX_IMAGES} images; this asks for {len(chosen) * len(prompts)}.")
        view = _view(studio.lens, attribute, target, beta, features, keep)
        return [_drawn(studio, text, chosen, view) for text in prompts]

    def features(self, query: str = "", attribute: str = "", n: int = 20, lens: str = "") -> list[dict[str, Any]]:
        """
        Find features of the sparse autoencoder: by words or number, or those attributed most to an attribute.

        Args:
            query: Words such as "glasses", or a feature's number; looks through the names of all features.
            attribute: Without a query: list the features most attributed to this attribute's recommended class.
            n: How many at most, up to 200.
            lens: Name of the lens; the app's first by default.

        Returns:
            Features with number, name in words, what the name rests on, and the measured effect.
        """
        opened = self._studio(lens).lens
        many = as_whole(n, "n")
        if not 1 <= many <= MAX_FOUND:
            raise LensError(f"n lies between 1 and {MAX_FOUND}; it is {many}.")
        text = _text(query, "The query")
        if text.strip():
            hits = atlas.search(opened, text, words.sought)[:many]
            return [_hit(opened, hit.feature, hit.confidence, None) for hit in hits]
        name = _attribute(opened, attribute)
        best = opened.feature_set(name, opened.setting(name).target, many)
        pairs = zip(best.ids, best.scores, strict=True)
        return [_hit(opened, i, confidence_of(opened, i), float(score)) for i, score in pairs]

    def feature(self, number: int, lens: str = "") -> dict[str, Any]:
        """
        Everything known of one feature: name, how often it fires, attribution, and what steering it alone changed.

        Args:
            number: The feature's number.
            lens: Name of the lens; the app's first by default.

        Returns:
            The feature's card without its images; effects are differences of shares with 95 % intervals and q values.
        """
        opened = self._studio(lens).lens
        found = atlas.valid_feature(opened, as_whole(number, "A feature's number"))
        if found is None:
            raise LensError(f"This lens has features 0 to {opened.atlas.density.size - 1}; there is no {number}.")
        card = opened.card(found)
        plain = {
            "number": found, "name": name_of(opened, found), "confidence": confidence_of(opened, found),
            "label": card.label, "fires_on": card.density, "steps": card.steps, "step_profile": card.step_profile,
            "attribution": card.attribution, "rank": card.rank, "effects": cards.effects(opened, card),
        }  # fmt: skip
        return dict(to_plain(plain))

    def sweep(
        self,
        prompt: str = "",
        attribute: str = "",
        n: int = 0,
        strengths: int = 0,
        controls: list[str] | None = None,
        lens: str = "",
    ) -> list[dict[str, Any]]:
        """
        Shares and log ratio along the steering strength, on the same seeds, with random features as a control.

        Args:
            prompt: What to draw; one prompt.
            attribute: What is steered; the lens's first attribute by default.
            n: Images per strength, up to 512. 0 takes the sweep that is stored with the lens, or else draws 32.
            strengths: How many strengths; 0 takes the recommended ones.
            controls: "random" (as many features drawn at random) and "flip" (swapped directions); random by default.
            lens: Name of the lens; the app's first by default.

        Returns:
            One sweep for the features and one per control: every point with n, shares, intervals and counts.
        """
        studio = self._studio(lens)
        return [sweep_json(result) for result in _swept(studio, prompt, attribute, n, strengths, controls)]

    def balance(
        self, prompt: str = "", attribute: str = "", share: float | None = None, n: int = 0, lens: str = ""
    ) -> dict[str, Any]:
        """
        The steering strength at which a class has its even share (or another share), with its 95 % interval.

        Args:
            prompt: What to draw; one prompt.
            attribute: What is steered; the lens's first attribute by default.
            share: The wanted share of the recommended class, between 0 and 1; even shares by default.
            n: Images per strength, up to 512. 0 takes the sweep that is stored with the lens, or else draws 32.
            lens: Name of the lens; the app's first by default.

        Returns:
            The strength with its interval, whether the share is reached within the measured range, and a sentence.
        """
        studio = self._studio(lens)
        if share is not None and not 0 < (share := as_number(share, "The share")) < 1:
            raise LensError(f"The share lies between 0 and 1; it is {share:g}.")
        results = _swept(studio, prompt, attribute, n, SHIPPED, [])
        main = next(result for result in results if not result.is_control)
        import_engine()
        from diffusion_lens.measuring.balance import balance

        name = main.attribute.name
        wanted = 1 / len(main.attribute.classes) if share is None else share
        found = balance(main, studio.lens.classifier.confusion[name], target_share=wanted)
        return dict(to_plain(found)) | {"n": main.points[0].shares[0].n, "attribute": name}

    def _studio(self, lens: Any) -> Studio:
        name = _text(lens, "The lens")
        found = self._studios.get(name) if name else next(iter(self._studios.values()))
        if found is None:
            raise LensError(f"There is no lens '{name}' here; choose {', '.join(self._studios)}.")
        return found


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise LensError(f"{what} is a text; this is {value!r:.60}.")
    return value


def _prompts(lens: DiffusionLens, given: Any) -> list[str | None]:
    """The prompts of a call, checked as in the app."""
    texts = given if isinstance(given, list) else [given]
    if not 1 <= len(texts) <= MAX_PROMPTS:
        raise LensError(f"Give 1 to {MAX_PROMPTS} prompts; these are {len(texts)}.")
    read = [state.read_prompt(lens, _text(text, "A prompt")) for text in texts]
    for text, prompt in zip(texts, read, strict=True):
        if prompt is None and text:
            raise LensError("This model takes no prompt; leave it empty.")
        state.check_prompt(lens, prompt)
    return read


def _attribute(lens: DiffusionLens, given: Any) -> str:
    name, known = _text(given, "The attribute"), state.steerable(lens)
    if name and name not in known:
        raise LensError(f"This lens does not steer '{name}'; choose {', '.join(known)}.")
    return name or known[0]


def _view(lens: DiffusionLens, attribute: Any, target: Any, beta: Any, features: Any, keep: Any) -> View:
    """What is steered, checked as in the app; nothing where neither a strength nor features are given."""
    base = state.default_view(lens, _attribute(lens, attribute))
    own = {} if features is None else features
    if not isinstance(own, dict):
        raise LensError('Features are given with their strengths, e.g. {"716": 3.0}.')
    strengths = []
    for name, value in own.items():
        if not str(name).strip().isdigit():
            raise LensError(f"A feature is given by its number; this is '{name}'.")
        strengths.append((int(name), as_number(value, f"The strength of feature #{name}")))
    held = base.hold if keep is None else keep
    if not isinstance(held, list | tuple) or not all(isinstance(name, str) for name in held):
        raise LensError("What to keep is a list of attributes.")
    view = View(
        base.prompt, base.attribute, _text(target, "The target") or base.target,
        base.beta if beta is None else as_number(beta, "β"), base.n_features, base.sampler, base.window,
        own=tuple(strengths), hold=tuple(held),
    )  # fmt: skip
    state.check(lens, view)
    return view


def _drawn(studio: Studio, prompt: str | None, seeds: tuple[int, ...], view: View) -> dict[str, Any]:
    import_engine()
    lens = studio.lens
    turns = state.interventions(lens, view)
    request = lens.request(prompt, seeds)
    with studio.work(f"{uuid4().hex}:api", urgent=False) as progress:
        made = lens.generate(request, *turns, progress=progress)
    measured = lens.measure(made)
    read = {
        name: [p.attribute.classes[k] if sure else "uncertain" for k, sure in zip(p.labels, p.certain, strict=True)]
        for name, p in measured.readings.items()
    }
    return {
        "prompt": prompt, "seeds": list(seeds), "images": [_png(image) for image in made.images],
        "perceived": read, "measured": figures_json(measured[view.attribute]),
        "edit": None if measured.edit is None else describe(measured.edit), "classifier": measured.classifier_id,
    }  # fmt: skip


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _hit(lens: DiffusionLens, feature: int, confidence: str, score: float | None) -> dict[str, Any]:
    effect = atlas.main_effect(lens, feature)
    found = {
        "number": feature, "name": name_of(lens, feature), "confidence": confidence,
        "fires_on": float(lens.atlas.density[feature]), "effect": effect,
    }  # fmt: skip
    if score is not None and math.isfinite(score):
        found["attribution"] = score
    return dict(to_plain(found))


def _swept(
    studio: Studio, prompt: Any, attribute: Any, n: Any, strengths: Any, controls: Any
) -> tuple[SweepResult, ...]:  # fmt: skip
    """The stored sweep where one is asked for and there is one; else measured now."""
    lens = studio.lens
    (text,) = _prompts(lens, _text(prompt, "The prompt"))
    name, many, grid = _attribute(lens, attribute), as_whole(n, "n"), as_whole(strengths, "The number of strengths")
    asked = ["random"] if controls is None else controls
    if not isinstance(asked, list) or any(control not in ("random", "flip") for control in asked):
        raise LensError('Controls are a list of "random" and "flip".')
    stored = studio.sweeps(text, name)
    if many == 0 and grid == SHIPPED and stored:
        return stored
    if grid != SHIPPED and not 2 <= grid <= 33:
        raise LensError(f"A sweep has 2 to 33 strengths; these are {grid}.")
    job = jobs.sweep_job(studio, text, name, n_strengths=grid, n=many or 32, controls=tuple(asked))
    results: tuple[SweepResult, ...] = ()
    for event in jobs.sweep_events(studio, uuid4().hex, job):
        results = event.results
    return results
