"""A class in five stations on the lens at hand: predict, do, reveal, keep.

A lesson is plain data. Everything that it reveals is computed from what the lens stores; nothing is written down here.
Where a lens does not store what a station needs, the station is ``Missing`` and says what is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusion_lens.base.types import Examples, LensError
from diffusion_lens.studio.room import tidy

Form = Literal["share", "choice", "match", "words"]
SET, RANDOM, NOTHING = "set", "random", "none"
TOP = 12
"""Ranks of an attribution that station 3 looks through."""

MATCHED = 4
SIZES = (8, 16)
"""Images at which station 1 stops to look at the interval, before all of them."""

NEAR = 5
"""Points by which a guessed share may be off and still count as near."""

OWN, EVEN, DATA = "own", "even", "data"


@dataclass(frozen=True)
class Stop:
    """What a station is about, whatever the lens: for the timetable, the goals, the worksheet."""

    number: int
    title: str
    minutes: int
    goal: str
    misconception: str


STOPS = (
    Stop(
        1, "Who appears?", 8,
        "I can say what a share counted in 8, 16 and 48 images does and does not tell.",
        "“3 of 8 are men, so the model draws 38 % men.” Eight images leave almost every share possible.",
    ),
    Stop(
        2, "Inside", 8,
        "I can guess from examples what a feature stands for, and test the guess by turning it.",
        "“The label says what the feature is.” A label is a guess from examples; many features move several things.",
    ),
    Stop(
        3, "Attribution is not causation", 8,
        "I can tell what a probe listens to from what changes an image, and say why a control is needed.",
        "“The first in the ranking must be the cause.” The ranking describes the probe; only turning tests a cause.",
    ),
    Stop(
        4, "A turn is never free", 8,
        "I can name side effects of a turn, and how many of them a random turn has too.",
        "“Steering age changes age alone.” Features overlap, and the training data tie attributes together.",
    ),
    Stop(
        5, "Which target?", 8,
        "I can give a reason for a target share, and name somebody who might want another one.",
        "“Fifty to fifty is neutral.” Every target is a choice; a measurement tells how far away it is, not which.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Something to tap."""

    value: str
    text: str


@dataclass(frozen=True)
class Turn:
    """Something that can be turned in the live pane, and how far: ends, step, the strength it starts at."""

    key: str
    text: str
    low: float
    high: float
    step: float
    start: float
    identity: float = 1.0


@dataclass(frozen=True)
class Pane:
    """The live pane: what is drawn, what can be turned in it, and whether other attributes may be held."""

    prompt: str | None
    attribute: str
    target: str
    turns: tuple[Turn, ...]
    counts: tuple[int, ...] = (8,)
    hold: tuple[str, ...] = ()

    def turn(self, key: str) -> Turn:
        """One of the turns; raises ``LensError``."""
        for turn in self.turns:
            if turn.key == key:
                return turn
        raise LensError("This station does not turn that; choose one of its own.")


@dataclass(frozen=True)
class Bar:
    """A share (or, ``signed``, a difference of shares) with its 95 % interval and the images behind it.

    ``control``: the same with random features, on the same seeds.
    """

    name: str
    value: float
    interval: tuple[float, float]
    n: int
    undecided: int = 0
    signed: bool = False
    note: str = ""
    control: tuple[float, tuple[float, float]] | None = None


@dataclass(frozen=True)
class Matrix:
    """A table of shares: what was steered (columns) by what changed (rows); ``None`` on what was steered itself."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@dataclass(frozen=True)
class Reveal:
    """What was measured: a sentence, bars in groups, a matrix, and where it comes from."""

    headline: str
    bars: tuple[tuple[str, tuple[Bar, ...]], ...] = ()
    matrix: Matrix | None = None
    note: str = ""
    source: str = ""


@dataclass(frozen=True, eq=False)
class Lesson:
    """One station on one lens.

    Attributes:
        form: how the guess is made. choices: for ``choice``, and the targets of ``words``. items: (feature, its
            examples) of ``match``, whose words are ``choices``.
        right: the measured answer in the form of the guess; ``None`` where there is no right one (``words``).
    """

    stop: Stop
    text: str
    question: str
    form: Form
    task: str
    keep: str
    pane: Pane
    reveal: Reveal
    right: Any
    choices: tuple[Choice, ...] = ()
    items: tuple[tuple[int, Examples], ...] = ()


@dataclass(frozen=True)
class Missing:
    """A station that a lens cannot serve, and what it lacks."""

    stop: Stop
    lacks: str


@dataclass(frozen=True)
class Guess:
    """A visitor's answer: a share in per cent, a choice, a word for each feature, or a target with words.

    ``said``: in words, as the room's tally counts it; ``share``: of a target of one's own, in per cent.
    """

    value: Any
    said: str
    share: int | None = None
    text: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Verdict:
    """A guess beside what was measured. ``right``: whether it holds; ``None`` where nothing is right or wrong."""

    right: bool | None
    words: str


@dataclass(frozen=True, eq=False)
class Course:
    """The five stations on one lens."""

    stations: tuple[Lesson | Missing, ...] = field(default=())

    def station(self, number: int) -> Lesson | Missing:
        """By its number, from 1; raises ``LensError``."""
        if not 1 <= number <= len(self.stations):
            raise LensError(f"The class has stations 1 to {len(self.stations)}.")
        return self.stations[number - 1]


def read_guess(lesson: Lesson, raw: Any) -> Guess:
    """A guess as it comes from a page, checked; raises ``LensError`` that says what is missing."""
    values = raw if isinstance(raw, Mapping) else {}
    if lesson.form == "share":
        share = _percent(values.get("value"))
        return Guess(share, f"{10 * (share // 10)} to {min(100, 10 * (share // 10) + 9)} %" if share < 100 else "100 %")
    if lesson.form == "match":
        words = tuple(str(w) for w in values.get("value") or ())
        known = {choice.value: choice.text for choice in lesson.choices}
        if len(words) != len(lesson.items) or any(w not in known for w in words):
            raise LensError("Give every feature a word, then compare.")
        right = sum(a == b for a, b in zip(words, lesson.right, strict=True))
        return Guess(list(words), f"{right} of {len(words)} right")
    chosen = next((c for c in lesson.choices if c.value == values.get("value")), None)
    if chosen is None:
        raise LensError("Choose one of the answers first.")
    if lesson.form == "choice":
        return Guess(chosen.value, chosen.text)
    own = _percent(values.get("share")) if chosen.value == OWN else None
    said = chosen.text if own is None else f"{own} %"
    return Guess(chosen.value, said, own, tidy(values.get("text") or ""), bool(values.get("shared")))


def judge(lesson: Lesson, guess: Guess) -> Verdict:
    """A guess beside what was measured."""
    if lesson.form == "share":
        bar = lesson.reveal.bars[0][1][-1]
        low, high = bar.interval
        off = abs(guess.value - 100 * bar.value)
        near = off <= NEAR or 100 * low - 0.5 <= guess.value <= 100 * high + 0.5
        return Verdict(near, f"You guessed {guess.value} %; that is {off:.0f} points from what was counted.")
    if lesson.form == "match":
        right = sum(a == b for a, b in zip(guess.value, lesson.right, strict=True))
        return Verdict(right == len(lesson.right), f"{right} of your {len(lesson.right)} words agree with the turn.")
    if lesson.form == "choice":
        wanted = next(c.text for c in lesson.choices if c.value == lesson.right)
        right_one = guess.value == lesson.right
        return Verdict(
            right_one, "Your guess holds." if right_one else f"You guessed: {guess.said}. Measured: {wanted}."
        )
    return Verdict(None, f"You chose: {guess.said}.")


def drawn(prompt: str | None) -> str:
    """What a prompt makes, in a sentence."""
    return f"images for “{prompt}”" if prompt else "images without a prompt"


def perceived(attribute: str) -> str:
    """An attribute as people should read it."""
    return {"gender": "perceived gender presentation", "age": "perceived age", "tone": "skin tone"}.get(
        attribute, attribute
    )


def _percent(raw: object) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not 0 <= raw <= 100:
        raise LensError("Guess a share between 0 and 100 %.")
    return round(raw)
