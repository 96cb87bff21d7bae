"""The queue of the app: who goes next, what those who wait are told, and what ends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.jobs import drawings
from diffusion_lens.studio.lane import PATIENCE, Lane, Line, Stops, Ticket, Wait
from diffusion_lens.studio.recent import Recent, bytes_of
from diffusion_lens.studio.state import default_view
from diffusion_lens.studio.studio import Picture, Studio


class Clock:
    """Tells the time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def long(number: int) -> Ticket:
    return Ticket(number, False, 0.0)


def urgent(number: int) -> Ticket:
    return Ticket(number, True, 0.0)


def run(costs: dict[Ticket, float], until: float) -> dict[Ticket, float]:
    """Long works that take ``costs`` seconds a step, all there from the start; what each had of the lane."""
    line, clock, had = Line(), Clock(), dict.fromkeys(costs, 0.0)
    for ticket in costs:
        line.join(ticket, clock())
    while clock() < until:
        ticket = line.order()[0]
        line.start(ticket, clock())
        clock.now += costs[ticket]
        had[ticket] += line.end(clock())
        line.join(ticket, clock())
    return had


class TestOrder:
    def test_sweeps_of_several_visitors_progress_alike_whatever_their_steps_cost(self) -> None:
        had = run({long(0): 1.0, long(1): 5.0, long(2): 0.25}, 300.0)
        assert max(had.values()) - min(had.values()) <= 5.0, "no two differ by more than the longest step"

    def test_whoever_comes_later_gets_as_much_from_then_on_and_no_more(self) -> None:
        line, first, second = Line(), long(0), long(1)
        line.join(first, 0.0)
        line.start(first, 0.0)
        line.join(second, 100.0)
        line.end(100.0)
        line.join(first, 100.0)
        assert second.used == first.used == 100.0

    def test_a_slider_move_goes_before_sweeps_and_after_moves_before_it(self) -> None:
        line = Line()
        sweep, move, another = long(0), urgent(1), urgent(2)
        for ticket, now in ((sweep, 0.0), (move, 1.0), (another, 2.0)):
            line.join(ticket, now)
        assert line.order() == [move, another, sweep]

    def test_a_sweep_that_has_waited_long_goes_before_a_move_that_has_only_come(self) -> None:
        line, sweep, move = Line(), long(0), urgent(1)
        line.join(sweep, 0.0)
        line.join(move, PATIENCE + 0.1)
        assert line.order() == [sweep, move]

    def test_moves_that_never_end_do_not_starve_a_sweep(self) -> None:
        line, sweep, now, turns = Line(), long(0), 0.0, 0
        line.join(sweep, now)
        moves = iter(range(1, 1000))
        for _ in range(100):
            line.join(urgent(next(moves)), now)
            ticket = line.order()[0]
            line.start(ticket, now)
            now += 1.0
            line.end(now)
            if ticket is sweep:
                turns += 1
                line.join(sweep, now)
        assert turns >= 8, "though a move comes every second and takes one"


class TestWaiting:
    def test_who_waits_is_told_how_many_go_before_and_how_long_they_take(self) -> None:
        clock, told = Clock(), []
        lane = Lane(clock)
        for _ in range(60):  # moves of four seconds, until the estimate has settled
            with lane.hold(urgent=True):
                clock.now += 4.0
        heard, here = threading.Event(), threading.Event()

        def tell(wait: Wait) -> None:
            told.append(wait)
            heard.set()

        def move() -> None:
            with lane.hold(urgent=True, tell=tell):
                here.set()

        with lane.hold(urgent=True):
            clock.now += 1.0
            thread = threading.Thread(target=move)
            thread.start()
            assert heard.wait(20) and not here.is_set()
        thread.join()
        assert told[0].ahead == 1 and told[0].seconds == pytest.approx(3.0)
        assert told[0].text == "busy: one before you, about 3 s"
        assert Wait(3, 40.4).text == "busy: 3 before you, about 40 s"

    def test_waiting_can_be_ended_and_leaves_the_queue_as_it_was(self) -> None:
        lane = Lane()

        def give_up(_: Wait) -> None:
            raise Cancelled

        with lane.hold(urgent=True):
            thread_failed = []

            def move() -> None:
                try:
                    with lane.hold(urgent=True, tell=give_up):
                        pytest.fail("it had the lane")
                except Cancelled:
                    thread_failed.append(True)

            thread = threading.Thread(target=move)
            thread.start()
            thread.join(20)
            assert thread_failed and lane.waiting == 0 and lane.drawing
        assert not lane.drawing

    def test_a_sweep_that_is_ended_while_it_gives_way_does_not_free_anothers_lane(self) -> None:
        lane, inside = Lane(), threading.Event()
        let_go = threading.Event()

        def move() -> None:
            with lane.hold(urgent=True):
                inside.set()
                let_go.wait(20)

        def stop(_: Wait) -> None:
            raise Cancelled

        with pytest.raises(Cancelled), lane.hold(urgent=False, tell=stop) as turn:
            thread = threading.Thread(target=move)
            thread.start()
            while not lane.waiting:
                time.sleep(0.001)
            turn.give_way()
        assert inside.is_set() and lane.drawing
        let_go.set()
        thread.join()
        assert not lane.drawing


class TestStops:
    def test_two_visitors_without_a_name_do_not_stop_each_other(self) -> None:
        stops = Stops()
        mine, yours = stops.start(":draw"), stops.start(":draw")
        stops.stop(":draw")
        stops.leave("")
        assert not mine.is_set() and not yours.is_set() and stops.n_running == 0

    def test_everything_of_a_visitor_ends_when_they_leave_and_nothing_of_others(self) -> None:
        stops = Stops()
        mine, too, yours = stops.start("me:draw"), stops.start("me:anything"), stops.start("me2:draw")
        stops.leave("me")
        assert mine.is_set() and too.is_set() and not yours.is_set() and stops.n_running == 1

    def test_one_visitor_has_one_long_job_at_a_time(self) -> None:
        stops = Stops()
        with stops.one_long_job("me:sweep"):
            with (
                pytest.raises(LensError, match="what you began under Sweep still runs"),
                stops.one_long_job("me:balance"),
            ):
                pass
            with stops.one_long_job("you:balance"), stops.one_long_job(":balance"), stops.one_long_job(":sweep"):
                pass
            with stops.one_long_job("me:sweep"):  # begun anew: the one before has been told to stop
                pass
        with stops.one_long_job("me:balance"):
            pass


class TestRecent:
    def test_bytes_are_bounded_and_the_oldest_goes_first(self) -> None:
        kept: Recent[np.ndarray] = Recent(10, 100)
        for i in range(3):
            kept.put(i, np.zeros(40, np.uint8))
        assert kept.get(0) is None and kept.get(1) is not None and kept.bytes == 80
        kept.put(1, np.zeros(50, np.uint8))
        assert kept.bytes == 90 and len(kept) == 2
        kept.put(3, np.zeros(101, np.uint8))
        assert kept.get(3) is None and kept.get(2) is not None, "what is too large alone is not kept"
        kept.clear()
        assert kept.bytes == len(kept) == 0

    def test_arrays_are_counted_once_wherever_they_stand(self) -> None:
        array = np.zeros(8, np.float32)
        assert bytes_of({"a": [array, (array,)], "b": torch.zeros(2, dtype=torch.float64), "c": "text"}) == 32 + 16


def test_a_drawing_that_must_wait_says_so_first_and_is_the_same(tiny_lens: DiffusionLens) -> None:
    studio = Studio(tiny_lens)
    view = default_view(tiny_lens)
    (alone,) = drawings(studio, "me", view)
    with studio.lane.hold(urgent=True):
        shown = drawings(studio, "me", view)
        first = next(shown)
        assert isinstance(first, Wait) and first.ahead == 1
    *_, last = shown
    assert isinstance(last, Picture) and isinstance(alone, Picture)
    assert np.array_equal(last.after.images, alone.after.images)


def test_a_drawing_that_waits_ends_when_nobody_looks_any_more(tiny_lens: DiffusionLens) -> None:
    studio = Studio(tiny_lens)
    with studio.lane.hold(urgent=True):
        shown = drawings(studio, "me", default_view(tiny_lens))
        next(shown)
        shown.close()  # type: ignore[attr-defined]
        while studio.lane.waiting:
            time.sleep(0.01)
