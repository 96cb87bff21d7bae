"""One lens's class for everybody on this server: the stations and the quiz once made, the room, the live pane.

A visitor's ``Record`` is theirs: it lives in their browser and is checked whenever it comes back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from diffusion_lens.base.types import LensError
from diffusion_lens.studio.learn import OWN, Course, Guess, Lesson, Verdict, judge, read_guess
from diffusion_lens.studio.learn_live import Live
from diffusion_lens.studio.learn_stored import main_sweep, strength_for, subject
from diffusion_lens.studio.quiz import Item, quiz, score
from diffusion_lens.studio.room import Room, Sentence, Tally
from diffusion_lens.studio.stations import course
from diffusion_lens.studio.studio import Studio

QUIZ, WORDS, TEACH = "quiz", "words", "teach"
"""Places of the class beside its stations."""


@dataclass(frozen=True)
class Record:
    """How far a visitor is: guesses by station, the stations whose measurement they have seen, answers of the quiz."""

    guesses: Mapping[int, Guess] = field(default_factory=dict)
    shown: frozenset[int] = frozenset()
    quiz: Mapping[str, str] = field(default_factory=dict)

    def guessed(self, number: int, guess: Guess) -> Record:
        """With a guess at one station."""
        return replace(self, guesses={**self.guesses, number: guess})

    def again(self, number: int) -> Record:
        """Without the guess at one station."""
        left = {k: v for k, v in self.guesses.items() if k != number}
        return replace(self, guesses=left, shown=self.shown - {number})


class Classroom:
    """The class on one lens; safe from several threads."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.room = Room()
        self.live = Live(studio)
        self._guard = threading.Lock()
        self._own_target = cache(self._strength_for)

    @property
    def course(self) -> Course:
        """The stations, computed once."""
        with self._guard:
            return self._course

    @property
    def items(self) -> tuple[Item, ...]:
        """The exit quiz, computed once."""
        with self._guard:
            return self._items

    @cached_property
    def _course(self) -> Course:
        return course(self.studio)

    @cached_property
    def _items(self) -> tuple[Item, ...]:
        return quiz(self.studio)

    def lesson(self, number: int) -> Lesson:
        """A station that this lens serves; raises ``LensError``."""
        found = self.course.station(number)
        if isinstance(found, Lesson):
            return found
        raise LensError(f"This lens cannot serve station {number}: {found.lacks}")

    def read_place(self, raw: object) -> str:
        """A place of the class: the number of a station, or one of the others; the first where it is none."""
        known = [str(s.stop.number) for s in self.course.stations] + [QUIZ, WORDS, TEACH]
        return str(raw) if str(raw) in known else known[0]

    def guess(self, record: Record, number: int, raw: Any, visitor: str) -> Record:
        """Take a visitor's guess, count it in the room, and share its text where they chose to."""
        lesson = self.lesson(number)
        guess = read_guess(lesson, raw)
        self.room.answer(str(number), visitor, guess.said)
        if lesson.form == "words":
            text = guess.text if guess.shared else ""
            self.room.share(str(number), visitor, Sentence(guess.said, text))
        return record.guessed(number, guess)

    def verdict(self, lesson: Lesson, guess: Guess) -> Verdict:
        """A guess beside what was measured; a target of one's own with the strength that meets it."""
        found = judge(lesson, guess)
        if guess.value != OWN or guess.share is None:
            return found
        return replace(found, words=f"{found.words} {self._own_target(guess.share)}")

    def _strength_for(self, percent: int) -> str:
        """In words, on the stored sweep; every share once."""
        if not 0 < percent < 100:
            return "No strength can be read off for none or all of the images."
        view = subject(self.studio)
        result = main_sweep(self.studio, view.prompt, view.attribute)
        return strength_for(self.studio, result, percent / 100).note

    def tally(self, lesson: Lesson) -> Tally | None:
        """How the room answered a station; shares in rising order, choices by how many made them."""
        found = self.room.tally(str(lesson.stop.number))
        if found is None or lesson.form != "share":
            return found
        return Tally(tuple(sorted(found.counts, key=lambda pair: int(pair[0].split()[0]))), found.n)

    def answer_quiz(self, record: Record, answers: Mapping[str, Any]) -> Record:
        """Take all answers of the quiz; raises ``LensError`` while one is open."""
        score(self.items, answers)
        return replace(record, quiz={item.key: str(answers[item.key]) for item in self.items})

    def to_plain(self, record: Record) -> dict[str, Any]:
        """What the browser keeps."""
        return {
            "lens": self.studio.lens.manifest.lens_id,
            "stations": {str(k): {"value": g.value, "share": g.share, "text": g.text, "shared": g.shared}
                         for k, g in record.guesses.items()},
            "shown": sorted(record.shown),
            "quiz": dict(record.quiz),
        }  # fmt: skip

    def from_plain(self, raw: Any) -> Record:
        """What a browser kept, checked part by part; of another lens, or no record: an empty one."""
        values = raw if isinstance(raw, Mapping) else {}
        if values.get("lens") != self.studio.lens.manifest.lens_id:
            return Record()
        record = Record()
        kept, seen, answers = (values.get(name) for name in ("stations", "shown", "quiz"))
        for station in self.course.stations:
            number = station.stop.number
            if isinstance(station, Lesson) and isinstance(kept, Mapping) and str(number) in kept:
                try:
                    record = record.guessed(number, read_guess(station, kept[str(number)]))
                except LensError:
                    continue
        shown = frozenset(n for n in record.guesses if isinstance(seen, list) and n in seen)
        try:
            done = self.answer_quiz(record, answers) if isinstance(answers, Mapping) and answers else record
        except LensError:
            done = record
        return replace(done, shown=shown)
