"""The Learn tab: a class of five stations, an exit quiz, a glossary and the teacher's page, with a live pane beside it.

What a visitor has done lives in their browser (``gr.BrowserState``); what they guess is counted in the room while the
server runs. Every place of the class has an address: ``?tab=learn&station=3``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr
from markupsafe import Markup

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.results import stats
from diffusion_lens.studio.classroom import QUIZ, TEACH, WORDS, Classroom, Record
from diffusion_lens.studio.glossary import GLOSSARY
from diffusion_lens.studio.learn import STOPS, Lesson, Missing, Pane
from diffusion_lens.studio.learn_live import Wish, first_wish, nearest_stored, read_wish, turned
from diffusion_lens.studio.quiz import score
from diffusion_lens.studio.studio import Picture, Row, Studio
from diffusion_lens.ui import grid, handouts
from diffusion_lens.ui.errors import explain
from diffusion_lens.ui.figure import ASSETS
from diffusion_lens.ui.gpu import lent
from diffusion_lens.ui.html import html
from diffusion_lens.ui.lazy import built_when_looked_at, once_built
from diffusion_lens.ui.panel import READ, Component, Panel, Updates, Values
from diffusion_lens.ui.visitor import visitor_of

TAB = "learn"
KEY, SECRET = "diffusion-lens-class-", "kept in this browser alone"
"""Where a browser keeps a visitor's guesses, one for each lens. No secret: it outlives the server."""

DRAWING = "Drawing…"


@dataclass(frozen=True)
class Order:
    """What the live pane is to draw, and for whom."""

    wish: Wish
    visitor: str


@dataclass(frozen=True)
class ClassView:
    """The board, the live pane's controls and what it drew; where the visitor is, and their record."""

    board: str
    pane: str
    seen: str
    place: str
    order: Order | None
    progress: dict[str, Any]


@dataclass(frozen=True, eq=False)
class LearnTab(Panel):
    """The tab's components: the parts of a ``ClassView``."""

    room: Classroom
    elsewhere: str | None
    board: Component
    pane: Component
    seen: Component
    place: Component
    order: Component
    progress: Component

    def arrive(self, values: Values, request: gr.Request) -> Updates:
        """Open the place that the address names, with what the browser kept."""
        query = dict(getattr(request, "query_params", None) or {})
        record = self.room.from_plain(values[self.progress])
        return self._view(self.room.read_place(query.get("station")), record, visitor_of(request))

    def act(self, values: Values, event: gr.EventData, request: gr.Request) -> Updates:
        """Whatever was done on the board: another place, a guess, the reveal, the quiz. A mistake is said above it."""
        sent, visitor = data_of(event), visitor_of(request)
        place, record = self.room.read_place(values[self.place]), self.room.from_plain(values[self.progress])
        kept = {part: gr.skip() for part in self.parts(ClassView)}
        try:
            place, record = self._done(sent, place, record, visitor)
        except LensError as error:
            return kept | {self.board: board(self.room, place, record, visitor, self.elsewhere, str(error))}
        if sent.get("do") == "reveal":  # what was drawn stays
            shown = board(self.room, place, record, visitor, self.elsewhere)
            return kept | {self.board: shown, self.progress: self.room.to_plain(record)}
        return self._view(place, record, visitor)

    def _done(self, sent: Mapping[str, Any], place: str, record: Record, visitor: str) -> tuple[str, Record]:
        kind, number = sent.get("do"), int(place) if place.isdigit() else 0
        if kind == "go":
            return self.room.read_place(sent.get("to")), record
        if kind == "quiz":
            answers = sent.get("answers")
            return place, self.room.answer_quiz(record, answers if isinstance(answers, Mapping) else {})
        if kind == "again":
            return place, record.again(number) if number else replace(record, quiz={})
        if kind == "guess" and number:
            return place, self.room.guess(record, number, sent, visitor)
        if kind == "reveal" and number in record.guesses:
            return place, replace(record, shown=record.shown | {number})
        raise LensError("That cannot be done here; choose a station.")

    def _view(self, place: str, record: Record, visitor: str) -> Updates:
        lesson = lesson_at(self.room, place)
        locked = lesson is None or lesson.stop.number not in record.guesses
        wish = None if lesson is None or locked else first_wish(lesson.pane)
        return self.show(ClassView(
            board(self.room, place, record, visitor, self.elsewhere),
            "" if lesson is None else html("learn.pane", lesson.pane, wish, locked, pane_title(lesson.pane)),
            "" if lesson is None or wish is None else near(self.room, lesson.pane, wish),
            place, None if wish is None else Order(wish, visitor), self.room.to_plain(record),
        ))  # fmt: skip

    def ask(self, values: Values, event: gr.EventData, request: gr.Request) -> Updates:
        """Take what the live pane is asked for, and say that it is coming."""
        lesson = lesson_at(self.room, self.room.read_place(values[self.place]))
        if lesson is None:
            return {self.order: None, self.seen: ""}
        try:
            wish = read_wish(lesson.pane, data_of(event))
        except LensError as error:
            return {self.order: None, self.seen: explain(error)}
        return {self.order: Order(wish, visitor_of(request)), self.seen: near(self.room, lesson.pane, wish)}

    def connect(self) -> None:
        """Bind the events."""
        given, shown = {self.place, self.progress}, self.parts(ClassView)
        drawing: dict[str, Any] = {
            "fn": lent(30)(partial(draw, self.room)), "inputs": [self.place, self.order], "outputs": self.seen,
            "show_progress": "hidden", "concurrency_id": "live", "concurrency_limit": 8, "api_visibility": "private",
        }  # fmt: skip
        self.board.act(self.act, given, shown, **READ).then(**drawing)
        self.pane.turn(self.ask, {self.place}, {self.order, self.seen}, **READ).then(**drawing)
        once_built(self.arrive, {self.progress}, shown).then(**drawing)


def lesson_at(room: Classroom, place: str) -> Lesson | None:
    """The station at a place; ``None`` where there is none, or this lens does not serve it."""
    found = room.course.station(int(place)) if place.isdigit() else None
    return found if isinstance(found, Lesson) else None


def board(
    room: Classroom, place: str, record: Record, visitor: str, elsewhere: str | None = None, said: str = ""
) -> str:
    """The left side of a place. ``elsewhere``: the page of a lens that serves what this one does not."""
    places = [
        (str(s.stop.number), f"{s.stop.number} {s.stop.title}", s.stop.number in record.shown)
        for s in room.course.stations
    ]
    places += [(QUIZ, "Quiz", bool(record.quiz)), (WORDS, "Words", False), (TEACH, "Teachers", False)]
    inner = Markup(_inner(room, place, record, visitor, elsewhere))  # made by a template, which escaped it
    return html("learn.board", places, place, inner, said, bool(said))


def _inner(room: Classroom, place: str, record: Record, visitor: str, elsewhere: str | None) -> str:
    if place == QUIZ:
        results = score(room.items, record.quiz) if record.quiz else None
        return html("learn.quiz", room.items, record.quiz, results)
    if place == WORDS:
        return html("learn.words", GLOSSARY)
    if place == TEACH:
        return html("learn.teach", STOPS, handouts.DOCUMENTS)
    station, total = room.course.station(int(place)), len(STOPS)
    if isinstance(station, Missing):
        address = None if elsewhere is None else f"{elsewhere or './'}?tab={TAB}&station={place}"
        return html("learn.missing", station.stop, total, station.lacks, address)
    number = station.stop.number
    guess, shown = record.guesses.get(number), number in record.shown
    following = (str(number + 1), STOPS[number].title) if number < total else (QUIZ, "the exit quiz")
    return html(
        "learn.station", station, total, guess, shown, room.verdict(station, guess) if guess and shown else None,
        room.tally(station) if shown else None, room.room.shared(str(number), visitor), following,
    )  # fmt: skip


def pane_title(pane: Pane) -> str:
    """What the live pane draws."""
    return f"Live: {pane.prompt}" if pane.prompt else "Live: images without a prompt"


def near(room: Classroom, pane: Pane, wish: Wish) -> str:
    """The nearest stored pictures, until the drawn ones come; a line where nothing is stored."""
    found = nearest_stored(room.studio, pane, wish)
    waiting = html("parts.status", DRAWING)
    return waiting if found is None else waiting + seen(room.studio, pane, wish, found)


def draw(room: Classroom, place: str, order: Order | None) -> Any:
    """What the live pane drew; nothing where it is locked. Takes and gives plain values: a GPU may be lent for it."""
    lesson = lesson_at(room, room.read_place(place))
    if lesson is None or order is None:
        return gr.skip()
    try:
        picture = room.live.draw(lesson.pane, order.wish, order.visitor)
    except Cancelled:  # a newer wish of the same visitor is being drawn
        return gr.skip()
    except Exception as error:
        return explain(error)
    return seen(room.studio, lesson.pane, order.wish, picture)


def seen(studio: Studio, pane: Pane, wish: Wish, picture: Picture) -> str:
    """Before and after with what the classifier read; unedited images alone where nothing is turned."""
    attribute = studio.lens.attribute_named(pane.attribute)
    column, turn = attribute.index(pane.target), turned(pane, wish)
    changed = turn is not None and wish.beta != turn.identity
    rows = [Markup(grid.row_html(picture, attribute, edited=edited)) for edited in (False, True)]
    counts = [_count(row, column) for row in (picture.before, picture.after)]
    moved = _moved(picture, pane.attribute) if changed else []
    return html("learn.seen", picture, pane.target, counts, *rows, moved, changed, picture.stored)


def _count(row: Row, column: int) -> tuple[int, int, tuple[float, float]]:
    k, n = int(((row.labels == column) & row.certain).sum()), int(row.certain.sum())
    return k, n, stats.share_interval(k, n) if n else (0.0, 1.0)


def _moved(picture: Picture, attribute: str) -> list[tuple[str, int, int]]:
    """Attribute → images that changed class, of those decided both times, most first; the turned one in front."""
    before, after = picture.before.readings, picture.after.readings
    found = []
    for name in after:
        both = before[name].certain & after[name].certain
        flips = int((both & (before[name].labels != after[name].labels)).sum())
        if flips or name == attribute:
            found.append((name, flips, int(both.sum())))
    return sorted(found, key=lambda row: (row[0] != attribute, -row[1]))


def data_of(event: gr.EventData) -> Mapping[str, Any]:
    """What an event of the page carries, unchecked; nothing where it is no mapping."""
    sent = getattr(event, "_data", None)
    return sent if isinstance(sent, Mapping) else {}


def layout(studio: Studio, elsewhere: str | None) -> None:
    """Add the tab inside open ``gr.Tabs``.

    ``elsewhere``: the path of the page with the bundled lens; ``None`` where this is it, or it is not open.
    """
    room = Classroom(studio)
    with gr.Tab("Learn", id=TAB) as tab:
        progress = gr.BrowserState({}, storage_key=KEY + studio.lens.manifest.lens_id, secret=SECRET)
        built_when_looked_at(tab, lambda _: build(room, progress, elsewhere))


def build(room: Classroom, progress: Component, elsewhere: str | None) -> None:
    """Build the tab; what stands in it comes with ``arrive``, once the browser has said what it keeps."""
    script = (ASSETS / "learn.js").read_text(encoding="utf-8")

    def document(asked: Any) -> str:
        return handouts.document(room, asked)

    with gr.Row(elem_id="dl-class"):
        with gr.Column(scale=5, min_width=320):
            shown = gr.HTML(html("learn.waiting"), js_on_load=script, server_functions=[document], elem_id="dl-board")
        with gr.Column(scale=5, min_width=320, elem_id="dl-beside"):
            pane = gr.HTML("", js_on_load=script, elem_id="dl-live")
            drawn = gr.HTML("", elem_id="dl-drawn")
    LearnTab(room, elsewhere, shown, pane, drawn, gr.State(""), gr.State(None), progress).connect()
