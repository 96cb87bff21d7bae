"""What happens in Explore: from what the page asks for, by name, to what it shows, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl
from uuid import uuid4

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.studio import feature_rows, jobs, mix, state
from diffusion_lens.studio.atlas import valid_feature
from diffusion_lens.studio.curves import of_results
from diffusion_lens.studio.lane import Wait
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.state import View
from diffusion_lens.studio.steps import step_strip
from diffusion_lens.studio.studio import DRAFT_STEPS, Picture, Studio
from diffusion_lens.ui import flip_books, scene, texts, words
from diffusion_lens.ui.errors import told
from diffusion_lens.ui.scene import Scene

MAX_QUERY = 4000


@dataclass(frozen=True)
class Ask:
    """What the page asks for, checked.

    Attributes:
        serial: counts the page's questions; an answer carries that of its question, and the page drops late ones.
        adopt: the page is to take over ``view``: it asked by a link, or for an attribute with nothing set.
        draft: few steps are enough; a slider is being dragged. known: names the unedited images that the page has.
        no_book: the page could not fetch the flip-book's frames.
    """

    view: View
    serial: int
    adopt: bool = False
    draft: bool = False
    known: str = ""
    no_book: bool = False


def opening(studio: Studio) -> View:
    """What the page opens with: the most one-sided stored prompt, unchanged."""
    view = opening_view(studio)
    return replace(view, beta=state.scale(studio.lens.setting(view.attribute)).identity)


def first_scene(studio: Studio) -> Scene:
    """The opening view with its stored images, if any; the curve comes on arrival, because intervals take scipy."""
    view = opening(studio)
    picture = studio.stored(view)
    shown = {} if picture is None else {"pictures": scene.picture_values(picture)}
    return {"serial": 0, **scene.frame(studio, view), **shown}


def asked(view: View) -> dict[str, Any]:
    """The component's value that asks for a view; set by another tab, it is drawn when Explore is looked at."""
    return {"view": state.to_values(view), "serial": 0, "from": "server"}


def serial_of(value: Any) -> int:
    """The number of a question, 0 where it has none."""
    serial = value.get("serial") if isinstance(value, Mapping) else None
    return serial if isinstance(serial, int) and not isinstance(serial, bool) else 0


def read_view(studio: Studio, value: Any) -> View:
    """The view that the component holds, checked; raises ``LensError``, one sentence."""
    values = value.get("view") if isinstance(value, Mapping) else None
    return opening(studio) if values is None else state.from_values(studio.lens, values)


def read_ask(studio: Studio, value: Any) -> Ask:
    """The question that the component holds, checked; raises ``LensError``, one sentence."""
    if not isinstance(value, Mapping):
        return Ask(opening(studio), 0, adopt=True)
    serial, query = serial_of(value), value.get("query")
    if isinstance(query, str):
        if len(query) > MAX_QUERY:
            raise LensError("This link is too long to be one of ours; the opening view is shown instead.")
        found = state.from_query(studio.lens, dict(parse_qsl(query.lstrip("?"), keep_blank_values=True)))
        return Ask(found or opening(studio), serial, adopt=True)
    known = value.get("known")
    return Ask(
        read_view(studio, value), serial, adopt=bool(value.get("fresh")), draft=value.get("draft") is True,
        known=known if isinstance(known, str) else "", no_book=value.get("no_book") is True,
    )  # fmt: skip


def draw(studio: Studio, visitor: str, value: Any) -> Iterator[Scene]:
    """What the page asks for, part by part: words and curve at once, stored images if any, then what is drawn now.

    A drawing that the visitor's next one ended says nothing more. Takes and gives plain values, which a lent GPU's
    process can be sent.
    """
    try:
        ask = read_ask(studio, value)
        whole: Scene = {}
        for news in _draft(studio, visitor, ask) if ask.draft else _full(studio, visitor, ask):
            whole = {**whole, **news}
            yield whole  # all of it: a busy page may see the last of two answers alone
    except Cancelled:
        return
    except Exception as error:
        yield {"serial": serial_of(value), "alert": told(error), "pending": False}


def _draft(studio: Studio, visitor: str, ask: Ask) -> Iterator[Scene]:
    if studio.lens.is_ready:
        images = studio.draft(ask.view, visitor)
        yield {"serial": ask.serial, "pictures": scene.draft_values(ask.view, images, DRAFT_STEPS)}
    else:
        yield {"serial": ask.serial, "said": texts.WAKING}


def _full(studio: Studio, visitor: str, ask: Ask) -> Iterator[Scene]:
    view, head = ask.view, {"serial": ask.serial, "adopt": ask.adopt}
    around = {
        **head, **scene.frame(studio, view), "curve": scene.curve_values(studio, view), "alert": "", "pending": True,
        "book": None if ask.no_book else flip_books.page_values(studio, view),
    }  # fmt: skip
    stored = studio.stored(view)
    known, exact = ask.known, stored is not None and abs(stored.beta - view.beta) < 1e-6
    if stored is not None and (exact or not studio.lens.is_ready):
        around |= {"pictures": scene.picture_values(stored, known), "pending": not exact}
        around["said"] = "" if exact else texts.WAKING
        known = scene.before_key(view, True)
    yield around
    if exact or around["book"]:
        yield {"pending": False}  # stored frames show this view at every strength
        return
    for made in jobs.drawings(studio, visitor, view):
        if isinstance(made, Picture):
            yield {**head, "pictures": scene.picture_values(made, known), "pending": False, "said": ""}
        elif isinstance(made, Wait):
            yield {**head, "said": f"{made.text[0].upper()}{made.text[1:]}.", "pending": True}
        else:
            yield {**head, "pictures": scene.preview_values(made), "pending": True}


def measure(studio: Studio, visitor: str, value: Any) -> Iterator[Scene]:
    """Measure exactly what is on screen: how far it is, the curve as far as it is known, and that it is done."""
    try:
        view = read_view(studio, value)
        yield {"measuring": {"done": 0.0, "left": "", "of": state.to_values(view)}}
        for event in mix.mix_events(studio, visitor, view):
            news: Scene = {"measuring": {"done": event.done, "left": texts.seconds(event.seconds_left)}}
            curve = of_results(studio.lens, event.results, view, "this")
            if curve is not None:
                news |= {"curve": scene.curve_values(studio, view, curve), "curve_of": state.to_values(view)}
            yield news
        final = scene.curve_values(studio, view)
        yield {"measuring": None, "curve": final, "curve_of": state.to_values(view), "said": texts.MEASURED}
    except Exception as error:
        stopped = isinstance(error, Cancelled)
        yield {"measuring": None, **({"said": texts.STOPPED} if stopped else {"alert": told(error)})}


def alone(studio: Studio, visitor: str, value: Any) -> Iterator[Scene]:
    """What one feature changes alone in this setting, at the far end of its slider, on the images on screen."""
    try:
        view = read_view(studio, value)
        feature = valid_feature(studio.lens, value.get("alone") if isinstance(value, Mapping) else None)
        if feature is None:
            raise LensError("There is no such feature; choose one of the list.")
        far = far_end(studio, view)
        picture = studio.draw(replace(view, own=((feature, far),), solo=(feature,)), f"{visitor}:alone")
        yield {"alone": {"id": feature, "says": words.alone(picture), "of": state.to_values(view)}}
    except Exception as error:
        yield {"alone": {}, "alert": "" if isinstance(error, Cancelled) else told(error)}


def far_end(studio: Studio, view: View) -> float:
    """The end of the slider that is further from changing nothing."""
    ends = state.scale(studio.lens.setting(view.attribute))
    return ends.high if ends.high - ends.identity >= ends.identity - ends.low else ends.low


def stop(studio: Studio, visitor: str) -> None:
    """End the visitor's measuring at its next step."""
    studio.stops.stop(f"{visitor}:mix")


def with_features(studio: Studio, value: Any, features: Sequence[int]) -> View:
    """The view with more features, each clearly steered; everything else stays."""
    view = read_view(studio, value)
    known = {i for i, _ in view.own}
    more = tuple((int(i), far_end(studio, view)) for i in dict.fromkeys(features) if i not in known)
    added = replace(view, own=(*more, *view.own))
    state.check(studio.lens, added)
    return added


def with_subject(studio: Studio, value: Any, prompt: str | None, attribute: str) -> View:
    """The view of another prompt or attribute: another attribute comes with its own recommended steer, unchanged."""
    view = read_view(studio, value)
    asked_for = state.read_prompt(studio.lens, prompt)
    if attribute == view.attribute or attribute not in state.steerable(studio.lens):
        return replace(view, prompt=asked_for)
    fresh = state.default_view(studio.lens, attribute)
    return replace(fresh, prompt=asked_for, n_seeds=view.n_seeds, first_seed=view.first_seed)


def find(studio: Studio, question: Any) -> dict[str, Any]:
    """Rows of features for the page: by words (``text``), more of the set (``n``), or by number (``ids``)."""
    try:
        if not isinstance(question, Mapping):
            raise LensError("Type a number or a word.")
        view = state.from_values(studio.lens, question.get("view") or {})
        if "text" in question:
            return {"rows": scene.found(studio.lens, view, str(question["text"])[:200])}
        if "n" in question:
            ids = feature_rows.shown(studio.lens, view, state.whole(question["n"], "The number of rows"))
        else:
            given = question.get("ids")
            every = given if isinstance(given, list) else []
            ids = tuple(i for x in every[: state.MAX_OWN] if (i := valid_feature(studio.lens, x)) is not None)
        return {"rows": [scene.row_values(studio.lens, view, i) for i in ids]}
    except Exception as error:
        return {"rows": [], "alert": told(error)}


def strip(studio: Studio, question: Any) -> dict[str, Any]:
    """The first seed on screen step by step, for choosing which steps are steered: small images, noise first."""
    try:
        if not studio.lens.is_ready:
            return {"alert": texts.NO_STRIP}
        view = read_view(studio, question)
        found = step_strip(studio, view, view.first_seed, uuid4().hex)
        return {"steps": list(found.steps), "images": [scene.thumb(image) for image in found.images]}
    except Exception as error:
        return {"alert": told(error)}
