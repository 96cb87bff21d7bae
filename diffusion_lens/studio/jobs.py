"""Work of one visitor as streams of events, stoppable at every step: sweeps, balances, images after their previews."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diffusion_lens.base.progress import Status
from diffusion_lens.base.types import Control, LensError
from diffusion_lens.results.sweeps import Balance, SweepPoint, SweepResult
from diffusion_lens.steering.settings import describe_setting
from diffusion_lens.studio.lane import Wait
from diffusion_lens.studio.previews import Preview
from diffusion_lens.studio.state import View, check_prompt
from diffusion_lens.studio.studio import Picture, Row, Studio, import_engine

T = TypeVar("T")
MAX_SWEEP_IMAGES = 512
BALANCE_IMAGES = 48
BALANCE_STRENGTHS = 7
BATCH = 16
EXAMPLES = 4
TELL_EVERY = 0.4
SHIPPED = 0
"""In place of a number of strengths: those that the lens ships."""


@dataclass(frozen=True)
class SweepJob:
    """A sweep that a visitor asked for: ``n`` images per strength on seeds 0, 1, …, with its controls."""

    prompt: str | None
    attribute: str
    target: str
    betas: tuple[float, ...]
    n: int
    controls: tuple[Control, ...] = ()


@dataclass(frozen=True)
class Event:
    """News of a job: the share of the work done, seconds left (``None``: unknown), everything measured so far."""

    done: float
    seconds_left: float | None
    results: tuple[SweepResult, ...]


class Teller:
    """Makes events of a job's progress, now and then, with everything measured so far."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self.results: tuple[SweepResult, ...] = ()
        self._emit = emit
        self._share = 0.0
        self._left: float | None = None
        self._last = time.monotonic()

    def hear(self, status: Status) -> None:
        """Of every step; few of them become events."""
        self._share, self._left = status.share, status.seconds_left
        if time.monotonic() - self._last >= TELL_EVERY:
            self.send()

    def send(self) -> None:
        """An event now."""
        self._last = time.monotonic()
        self._emit(Event(self._share, self._left, self.results))


def stream(job: Callable[[Callable[[T], None]], None], stop: Callable[[], None]) -> Iterator[T]:
    """Run ``job(emit)`` in a thread and yield what it emits; closing the iterator calls ``stop``.

    What the job raises is raised here, after everything that it emitted.
    """
    box: queue.Queue[T | BaseException | None] = queue.Queue()

    def run() -> None:
        try:
            job(box.put)
        except BaseException as error:
            box.put(error)
        else:
            box.put(None)

    threading.Thread(target=run, name="job", daemon=True).start()
    try:
        while (item := box.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop()


def drawings(studio: Studio, visitor: str, view: View) -> Iterator[Wait | Preview[Row] | Picture]:
    """The picture of a view, after its previews where a tiny autoencoder shows them; closing it ends the drawing.

    Where others are drawn for first, how long that takes is told before.

    Raises ``LensError`` for a view that cannot be drawn and ``Cancelled`` when the visitor ended it.
    """
    if not studio.previews and not studio.lane.drawing:
        yield studio.draw(view, visitor)
        return
    flag = studio.stops.start(f"{visitor}:draw")

    def job(emit: Callable[[Wait | Preview[Row] | Picture], None]) -> None:
        emit(studio.draw(view, visitor, on_preview=emit if studio.previews else None, on_wait=emit, flag=flag))

    yield from stream(job, flag.set)


def sweep_events(studio: Studio, visitor: str, job: SweepJob, purpose: str = "sweep") -> Iterator[Event]:
    """Measure strength by strength; raises ``LensError`` for a bad job and ``Cancelled`` when stopped.

    It can be stopped as soon as this returns, before the first strength is asked for.
    """
    _check(studio, job)
    owner = f"{visitor}:{purpose}"
    flag = studio.stops.start(owner)
    return stream(lambda emit: _sweep(studio, owner, flag, job, emit), flag.set)


def sweep_job(
    studio: Studio, prompt: str | None, attribute: str, *, n_strengths: int, n: int, controls: tuple[Control, ...]
) -> SweepJob:
    """A sweep towards the shipped class over the shipped strengths, or so many between their ends.

    Raises ``LensError`` for an attribute that is not steered, and for a control that its setting does not have.
    """
    setting = studio.lens.setting(attribute)
    betas = sorted({*setting.betas, setting.identity})
    if n_strengths != SHIPPED:
        low, high = betas[0], betas[-1]
        between = (round(low + (high - low) * i / (n_strengths - 1), 4) for i in range(n_strengths))
        betas = sorted({setting.identity, *between})
    if "flip" in controls and setting.poles == "one":
        raise LensError("This setting turns one pole only, so its poles cannot be exchanged; untick that control.")
    return SweepJob(prompt, attribute, setting.target, tuple(betas), n, controls)


def n_points(results: Sequence[SweepResult]) -> int:
    """Strengths measured so far, those of controls too."""
    return sum(len(result.points) for result in results)


def balance_where_known(studio: Studio, results: Sequence[SweepResult]) -> Balance | None:
    """Where the features' own sweep is balanced; ``None`` before the model is there, or for too few images."""
    main = next((r for r in results if not r.is_control), None)
    if main is None or not studio.lens.is_ready:
        return None
    try:
        return find_balance(studio, main)
    except LensError:
        return None


def find_balance(studio: Studio, result: SweepResult) -> Balance:
    """Where the sweep's target class has its even share."""
    import_engine()
    from diffusion_lens.measuring.balance import balance

    share = 1 / len(result.attribute.classes)
    return balance(result, studio.lens.classifier.confusion[result.attribute.name], target_share=share)


def _check(studio: Studio, job: SweepJob) -> None:
    check_prompt(studio.lens, job.prompt)
    studio.lens.attribute_named(job.attribute).index(job.target)
    if not 2 <= job.n <= MAX_SWEEP_IMAGES:
        raise LensError(f"A sweep in the app draws 2 to {MAX_SWEEP_IMAGES} images per strength; it is {job.n}.")


def _sweep(studio: Studio, owner: str, flag: threading.Event, job: SweepJob, emit: Callable[[Event], None]) -> None:
    import_engine()
    from diffusion_lens.measuring.observe import observe_baseline

    lens = studio.lens
    setting = lens.setting(job.attribute)
    edited = sum(beta != setting.identity for beta in job.betas)
    controls: Sequence[Control | None] = (None, *job.controls)
    teller = Teller(emit)
    request = lens.request(job.prompt, range(job.n))
    with studio.work(owner, urgent=False, tell=teller.hear, flag=flag) as progress:
        unedited, *bars = progress.parts((1, *(edited for _ in controls)))
        base = observe_baseline(
            lens.model, request, lens.classifier, restart_steps=setting.window[:1] if setting.window else (),
            batch_size=BATCH, n_examples=EXAMPLES, progress=unedited,
        )  # fmt: skip
        finished: tuple[SweepResult, ...] = ()
        for control, bar in zip(controls, bars, strict=True):
            points: list[SweepPoint] = []
            for point in lens.sweep_points(
                request, job.attribute, job.target, job.betas, control=control, baseline=base, batch_size=BATCH,
                n_examples=EXAMPLES, progress=bar,
            ):  # fmt: skip
                points.append(point)
                teller.results = (*finished, _result(studio, job, control, points))
                teller.send()
            finished = teller.results


def _result(studio: Studio, job: SweepJob, control: Control | None, points: Sequence[SweepPoint]) -> SweepResult:
    from diffusion_lens.results.sweeps import collect

    lens = studio.lens
    return collect(
        points,
        target=job.target,
        setting=describe_setting(lens.setting(job.attribute), control),
        control=control,
        provenance={"lens": lens.manifest.lens_id, "sae": lens.manifest.sae_id},
    )
