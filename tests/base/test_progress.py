"""Progress: parts of parts add up to the whole, the share never falls, and one stop reaches every loop."""

from __future__ import annotations

import doctest
import threading

import pytest

from diffusion_lens.base import progress as module
from diffusion_lens.base.progress import Cancelled, Progress, Status


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shares(seen: list[Status]) -> list[float]:
    return [round(status.share, 6) for status in seen]


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(module).failed == 0


def test_steps_of_parts_are_steps_of_the_whole() -> None:
    seen: list[Status] = []
    work = Progress(seen.append)
    first = work.part(0.5, "drawing")
    first.step(1, 4)
    inner = first.parts(2)
    inner[0].step(1, 1)
    inner[1].step(1, 2)
    second = work.part(0.5)
    second.step(3, 3)
    assert shares(seen) == [0.125, 0.25, 0.375, 1.0]
    assert [status.stage for status in seen] == ["drawing", "drawing", "drawing", ""]
    assert (seen[0].done, seen[0].total) == (1, 4)
    assert [round(status.stage_share, 6) for status in seen] == [0.25, 0.5, 0.75, 1.0], "of the drawing; of all"


def test_parts_by_weight_take_what_is_left_whatever_their_sum() -> None:
    seen: list[Status] = []
    work = Progress(seen.append)
    work.part(0.2).step(1, 1)
    for part in work.parts((3, 1), ("a", "b")):
        part.step(1, 1)
    assert shares(seen) == [0.2, 0.8, 1.0] and seen[-1].stage == "b"


def test_work_of_unknown_length_takes_shares_of_what_is_left() -> None:
    seen: list[Status] = []
    work = Progress(seen.append)
    for _ in range(3):
        work.some(0.5, "one more").step(1, 1, note="loss 0.1")
    assert shares(seen) == [0.5, 0.75, 0.875] and {status.stage for status in seen} == {"one more"}
    assert [status.stage_share for status in seen] == [1.0] * 3 and seen[-1].note == "loss 0.1"


def test_weights_of_more_than_all_are_cut_and_of_nothing_are_harmless() -> None:
    seen: list[Status] = []
    work = Progress(seen.append)
    for weight in (0.75, 0.75, -1.0):
        work.part(weight).step(1, 1)
    assert shares(seen) == [0.75, 1.0, 1.0]
    assert Progress().parts(0) == [] and len(Progress().parts((0.0, 0.0))) == 2


def test_the_share_never_falls_and_never_passes_one() -> None:
    seen: list[Status] = []
    work = Progress(seen.append)
    work.step(3, 4)
    work.step(3, 8)  # the total grew: memory ran out, the batches became smaller
    work.step(9, 8)
    work.step(0, 0)
    assert shares(seen) == [0.75, 0.75, 1.0, 1.0]


def test_each_steps_when_the_body_is_done() -> None:
    seen: list[Status] = []
    work = Progress(seen.append)
    counts = []
    for item in work.each("abcd"):
        counts.append((item, len(seen)))
    assert counts == [("a", 0), ("b", 1), ("c", 2), ("d", 3)] and shares(seen) == [0.25, 0.5, 0.75, 1.0]
    assert list(Progress().each(iter("ab"), 2)) == ["a", "b"]


def test_a_stop_from_anywhere_ends_every_part_at_its_next_step() -> None:
    stop = threading.Event()
    work = Progress(stop=stop)
    part = work.part(0.5).part(0.5)
    part.step(1, 2)
    part.cancel()
    assert stop.is_set() and work.cancelled
    with pytest.raises(Cancelled):
        work.part(0.1).step(1, 2)
    with pytest.raises(Cancelled):
        list(work.each([1, 2]))


def test_a_listener_may_stop_the_work() -> None:
    def enough(status: Status) -> None:
        if status.share > 0.4:
            raise Cancelled

    work = Progress(enough)
    done = []
    with pytest.raises(Cancelled):
        for item in work.each(range(10)):
            done.append(item)
    assert done == [0, 1, 2, 3, 4]


def test_the_time_left_counts_what_was_done_and_not_what_was_found() -> None:
    seen: list[Status] = []
    clock = Clock()
    work = Progress(seen.append, clock=clock)
    found, made = work.part(0.5), work.part(0.5)
    found.found()
    assert seen[-1].seconds_left is None
    clock.now += 10.0
    made.step(1, 4)  # an eighth of the whole in ten seconds; three eighths are left
    assert seen[-1].seconds == 10.0 and seen[-1].seconds_left == pytest.approx(30.0)


def test_without_a_listener_nothing_is_told() -> None:
    Progress().step(1, 2)
