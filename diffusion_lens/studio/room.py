"""What a class has answered while this server runs: counts, and the sentences that people chose to share.

Nothing is written anywhere, and nothing outlives the process. A visitor counts once a question, their latest answer
alone. Memory is bounded in questions, visitors, sentences and their length.
"""

from __future__ import annotations

import threading
import unicodedata
from collections import Counter, OrderedDict
from dataclasses import dataclass

QUESTIONS = 64
VISITORS = 400
SENTENCES = 40
LONGEST = 280
"""Characters of a shared text."""

LEAST = 3
"""Answers below which no tally is shown: of two, each could tell the other's."""


@dataclass(frozen=True)
class Tally:
    """How a class answered one question: answer → how many gave it, the commonest first; ``n`` in all."""

    counts: tuple[tuple[str, int], ...]
    n: int


@dataclass(frozen=True)
class Sentence:
    """A text that somebody shared, and the target that they chose."""

    target: str
    text: str


class Room:
    """Answers and shared texts of everybody on this server; safe from several threads."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, OrderedDict[str, str]] = OrderedDict()
        self._shared: OrderedDict[tuple[str, str], Sentence] = OrderedDict()
        self._guard = threading.Lock()

    def answer(self, question: str, visitor: str, answer: str) -> None:
        """Count a visitor's answer, in place of their earlier one."""
        with self._guard:
            given = self._answers.setdefault(question, OrderedDict())
            self._answers.move_to_end(question)
            given[visitor] = answer[:LONGEST]
            given.move_to_end(visitor)
            while len(given) > VISITORS:
                given.popitem(last=False)
            while len(self._answers) > QUESTIONS:
                self._answers.popitem(last=False)

    def tally(self, question: str) -> Tally | None:
        """How everybody answered; ``None`` while fewer than ``LEAST`` did."""
        with self._guard:
            given = Counter(self._answers.get(question, {}).values())
        return Tally(tuple(given.most_common()), given.total()) if given.total() >= LEAST else None

    def share(self, topic: str, visitor: str, sentence: Sentence) -> None:
        """Show a visitor's text to the others, in place of their earlier one; an empty text takes it back."""
        with self._guard:
            self._shared.pop((topic, visitor), None)
            if sentence.text:
                self._shared[topic, visitor] = sentence
            while len(self._shared) > SENTENCES:
                self._shared.popitem(last=False)

    def shared(self, topic: str, visitor: str) -> tuple[Sentence, ...]:
        """What others shared, the latest first."""
        with self._guard:
            others = [own for (about, who), own in self._shared.items() if about == topic and who != visitor]
        return tuple(reversed(others))


def tidy(text: object) -> str:
    """A text as it is shown to others: one line, no control or direction marks, at most ``LONGEST`` characters."""
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in str(text)[: 4 * LONGEST])
    return " ".join(plain.split())[:LONGEST].strip()
