"""What the app computes: pictures, sweeps and balances, shared caches, one lane. Knows nothing of gradio."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from diffusion_lens.base.progress import Progress, Status
from diffusion_lens.base.types import EditSpec, GenerationRequest, LensError, Predictions
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.as_json import sweep_json
from diffusion_lens.results.sweeps import SweepPoint, SweepResult
from diffusion_lens.steering.settings import control_intervention, describe_setting
from diffusion_lens.studio.lane import Lane, Stops, Wait
from diffusion_lens.studio.previews import Preview, Sight
from diffusion_lens.studio.recent import Recent
from diffusion_lens.studio.state import View, check, interventions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from diffusion_lens.model.generate import Edit, OnLatents, Trajectory

log = logging.getLogger(__name__)
_importing = threading.Lock()

KEPT_BASES = 16
BASE_BYTES = 16 * 2**20
ALL_BASES_BYTES = 128 * 2**20
KEPT_ROWS = 24
ALL_ROWS_BYTES = 96 * 2**20
KEPT_MIXES = 32
ALL_MIXES_BYTES = 64 * 2**20
DRAFT_STEPS = 4
"""Of a draft, shown while a slider is dragged (E3): to look at, never to measure."""


def import_engine() -> None:
    """Import torch, diffusers and what stands on them, one thread at a time.

    diffusers fills its modules lazily: two threads that import it at once get half of it.
    """
    with _importing:
        import diffusion_lens.measuring.sweep  # noqa: F401


@dataclass(frozen=True)
class Row:
    """Images of some seeds as the classifier read one attribute.

    Attributes:
        images: ``uint8 [n, H, W, 3]``. labels: class index ``[n]``. certain: ``[n]``, False is "uncertain".
        confidence: probability of the label ``[n]``; ``None`` for stored readings.
        readings: every attribute's predictions; empty for stored readings.
    """

    images: np.ndarray
    labels: np.ndarray
    certain: np.ndarray
    confidence: np.ndarray | None = None
    readings: dict[str, Predictions] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """Before and after on the same seeds. ``beta`` is the strength shown (a stored picture may be the nearest one).

    ``preview_error``: of the previews that were shown first, in levels of 255; ``None`` where there were none.
    """

    view: View
    beta: float
    before: Row
    after: Row
    stored: bool
    seconds: float = 0.0
    activation_ratio: float | None = None
    preview_error: float | None = None


class _SeenError(Exception):
    """Ends a drawing whose preview is all that was wanted."""


@dataclass(frozen=True)
class Base:
    """The unedited run of a request, with every attribute read."""

    start: Trajectory
    readings: dict[str, Predictions]


class Studio:
    """One lens for all visitors; several lenses of one app share the lane and the stops of the first (``beside``).

    ``path``: of the lens's page under the app's address.
    """

    def __init__(self, lens: DiffusionLens, beside: Studio | None = None, path: str = "") -> None:
        self.lens = lens
        self.path = path
        self.lane: Lane = beside.lane if beside else Lane()
        self.stops: Stops = beside.stops if beside else Stops()
        self.seen = threading.Event()
        self.bases: Recent[Base] = Recent(KEPT_BASES, ALL_BASES_BYTES)
        self.rows: Recent[tuple[np.ndarray, dict[str, Predictions], float | None]] = Recent(KEPT_ROWS, ALL_ROWS_BYTES)
        self.mixes: Recent[tuple[SweepResult, ...]] = Recent(KEPT_MIXES, ALL_MIXES_BYTES)
        self._warming = False

    def warm_up(self, patience: float = 0.0) -> None:
        """Load the model in the background, once: when a visitor has ``seen`` the page, or after ``patience`` s."""
        if self._warming:
            return
        self._warming = True

        def load() -> None:
            self.seen.wait(patience)
            try:
                import_engine()
                self.lens.warm_up().join()
                for line in foreign_lines(self):
                    log.warning("%s: %s", self.lens.manifest.name, line)
            except Exception:
                log.exception("The model could not be loaded ahead of time.")

        threading.Thread(target=load, name="warm-up", daemon=True).start()

    def sweeps(self, prompt: str | None, attribute: str) -> tuple[SweepResult, ...]:
        """Stored sweeps of one prompt and attribute, controls last."""
        found = [s for s in self.lens.sweeps if s.request.prompt == prompt and s.attribute.name == attribute]
        return tuple(sorted(found, key=lambda s: s.is_control))

    @cached_property
    def foreign(self) -> tuple[SweepResult, ...]:
        """Stored sweeps that were made with another setting, or another kind of control, than the shipped ones."""
        return tuple(result for result in self.lens.sweeps if not _as_shipped(self.lens, result))

    def stored_point(self, view: View) -> SweepPoint | None:
        """The measured point of a stored sweep that this view stands on or nearest to (its own setting alone)."""
        setting = self.lens.settings[view.attribute]
        shipped = (setting.target, setting.n_features, setting.sampler, setting.window, set(setting.hold))
        asked = (view.target, view.n_features, view.sampler, view.window, set(view.hold))
        if view.own or view.solo or view.where or asked != shipped:
            return None
        for result in self.sweeps(view.prompt, view.attribute):
            if not result.is_control:
                return min(result.points, key=lambda p: abs(p.beta - view.beta))
        return None

    def stored(self, view: View) -> Picture | None:
        """The nearest stored before and after; ``None`` if these seeds were not stored."""
        after = self.stored_point(view)
        before = None if after is None else self.stored_point(replace(view, beta=self._identity(view)))
        if after is None or before is None:
            return None
        result = next(s for s in self.sweeps(view.prompt, view.attribute) if not s.is_control)
        n = view.n_seeds
        if tuple(view.seeds) != result.request.seeds[:n] or min(len(before.examples), len(after.examples)) < n:
            return None
        rows = [Row(p.examples[:n], p.labels[:n], p.certain[:n]) for p in (before, after)]
        return Picture(view, after.beta, rows[0], rows[1], stored=True, activation_ratio=after.activation_ratio)

    @property
    def previews(self) -> bool:
        """Whether a tiny autoencoder shows images before they are decoded in full; known before anything is loaded."""
        return self.lens.options is not None and bool(self.lens.options.preview)

    def draw(
        self,
        view: View,
        visitor: str = "",
        *,
        on_preview: Callable[[Preview[Row]], None] | None = None,
        on_wait: Callable[[Wait], None] | None = None,
        flag: threading.Event | None = None,
    ) -> Picture:
        """Draw the view now: unedited images from the cache where they are, edited ones restarted from them.

        ``on_preview`` is called with what a tiny autoencoder shows (see ``previews``) before images are decoded in
        full; they alone are measured and kept. ``on_wait``, ``flag``: see ``work``.
        Raises ``LensError`` for a view that cannot be drawn and ``Cancelled`` when the visitor ended it.
        """
        check(self.lens, view)
        began = time.monotonic()
        turns = interventions(self.lens, view)
        request = self.lens.request(view.prompt, view.seeds)
        with self.work(f"{visitor}:draw", urgent=True, flag=flag, on_wait=on_wait) as progress:
            sight: Sight[Row] | None = None
            if on_preview is not None:
                sight = Sight(self.lens.model, view, bool(turns), on_preview, progress.check)
            base = self._base(request, progress, sight.unedited() if sight else None)
            before = _row(base.start.generation.images, base.readings, view.attribute)
            edit = self.lens.edit(*turns) if turns else None
            key = (request, edit.spec.digest if edit else None)
            drawn = self.rows.get(key)
            if drawn is None:
                drawn = (base.start.generation.images, base.readings, None)
                if edit is not None:
                    made = self.lens.generate(
                        request, edit, batch_size=len(request.seeds), progress=progress, start=base.start,
                        on_latents=sight.edited(before) if sight else None,
                    )  # fmt: skip
                    drawn = (made.images, self.lens.classify(made.images), made.activation_ratio)
                self.rows.put(key, drawn)
        after = _row(drawn[0], drawn[1], view.attribute)
        error = sight.error(before.images, after.images) if sight else None
        return Picture(view, view.beta, before, after, False, time.monotonic() - began, drawn[2], error)

    def draft(self, view: View, visitor: str = "") -> np.ndarray:
        """The edited images in few steps, ``uint8 [n, H, W, 3]``: what the full ones will roughly be, not measured.

        Raises ``LensError`` for a view that cannot be drawn and ``Cancelled`` when the visitor's next drawing ended it.
        """
        check(self.lens, view)
        full = self.lens.manifest.n_steps
        steps = min(DRAFT_STEPS, full)
        request = self.lens.request(view.prompt, view.seeds, n_steps=steps)
        if view.window is not None:
            first = min(view.window[0] * steps // full, steps - 1)
            view = replace(view, window=(first, max(first + 1, -(-view.window[1] * steps // full))))
        with self.work(f"{visitor}:draw", urgent=True) as progress:
            turns = interventions(self.lens, view)
            edit = self.lens.edit(*turns) if turns else None
            if not self.previews:
                return self.lens.generate(request, edit=edit, batch_size=len(request.seeds), progress=progress).images
            return self._previewed(request, edit, progress)

    def _previewed(self, request: GenerationRequest, edit: Edit | None, progress: Progress) -> np.ndarray:
        """The images as the tiny autoencoder decodes them; the full decode is never begun."""
        seen: list[np.ndarray] = []

        def on_latents(part: GenerationRequest, latents: Tensor) -> None:
            seen.append(self.lens.model.decode_preview(latents))
            if sum(map(len, seen)) == len(request.seeds):
                raise _SeenError

        with suppress(_SeenError):
            self.lens.generate(
                request, edit=edit, batch_size=len(request.seeds), progress=progress, on_latents=on_latents
            )
        return np.concatenate(seen)

    def _base(self, request: GenerationRequest, progress: Progress, on_latents: OnLatents | None) -> Base:
        base = self.bases.get(request)
        if base is not None:
            return base
        from diffusion_lens.model.generate import record_trajectory

        start = record_trajectory(
            self.lens.model, request, batch_size=len(request.seeds), progress=progress, max_bytes=BASE_BYTES,
            on_latents=on_latents,
        )  # fmt: skip
        return self.bases.put(request, Base(start, self.lens.classify(start.generation.images)))

    @contextmanager
    def work(
        self,
        owner: str,
        *,
        urgent: bool,
        tell: Callable[[Status], None] | None = None,
        on_wait: Callable[[Wait], None] | None = None,
        flag: threading.Event | None = None,
    ) -> Iterator[Progress]:
        """A turn on the lane; yields the progress of the work, which gives way at every step and ends when stopped.

        ``owner`` is a visitor and what they do; ``stops.stop(owner)`` ends it at its next step. ``flag``: one that
        ``stops.start(owner)`` gave before, for whoever ends this work and no later one of the same owner.
        ``tell`` hears of every step, ``on_wait`` how long it takes until there is a turn.
        Raises ``LensError`` for long work (not ``urgent``) of a visitor whose other long work still runs.
        """
        import_engine()
        flag = flag or self.stops.start(owner)
        ended = Progress(stop=flag)

        def wait(queue: Wait) -> None:
            ended.check()
            if on_wait is not None:
                on_wait(queue)

        with (
            nullcontext() if urgent else self.stops.one_long_job(owner),
            self.lane.hold(urgent=urgent, tell=wait) as turn,
        ):

            def hear(status: Status) -> None:
                if tell is not None:
                    tell(status)
                turn.give_way()

            progress = Progress(hear, stop=flag)
            progress.check()
            yield progress

    def _identity(self, view: View) -> float:
        return self.lens.settings[view.attribute].identity


def _as_shipped(lens: DiffusionLens, result: SweepResult) -> bool:
    setting = lens.settings.get(result.attribute.name)
    if setting is None or result.target != setting.target:
        return False
    edited = [point for point in result.points if point.edit is not None]
    if not edited:  # version 0.4 kept what it steered in words alone
        seeds = {0, int(lens.fitted_from.get("seed", 0))}
        return result.setting in {describe_setting(setting, result.control, seed) for seed in seeds}
    furthest = max(edited, key=lambda point: abs(point.beta - setting.identity))
    try:
        steer = lens.intervention(setting.attribute, setting.target, furthest.beta)
        if result.control is not None:
            steer = control_intervention(steer, result.control, lens.atlas.activity, result.control_seed)
    except LensError:  # today's setting has no such control
        return False
    return furthest.edit is not None and replace(furthest.edit, hold_digest="") == EditSpec((steer,))


def foreign_lines(studio: Studio) -> list[str]:
    """One sentence per stored sweep that is not of the shipped setting."""
    lines = []
    for result in studio.foreign:
        setting = studio.lens.settings.get(result.attribute.name)
        ours = describe_setting(setting) if setting else "none"
        prompt = (
            "without a prompt" if result.request.prompt is None else f"of “{result.request.prompt or '(no words)'}”"
        )
        if result.is_control:
            what, lack = "stored control", "no control of today's is made so"
        else:
            what, lack = "stored sweep", f"the lens ships {ours}"
        lines.append(
            f"The {what} {prompt}, {result.attribute.name} towards {result.target}, was made with "
            f"{result.setting}; {lack}."
        )
    return lines


def _row(images: np.ndarray, readings: dict[str, Predictions], attribute: str) -> Row:
    read = readings[attribute]
    return Row(images, read.labels, read.certain, read.probs.max(axis=1), readings)


def as_json(results: tuple[SweepResult, ...]) -> str:
    """Sweeps as JSON text, without their example images."""
    return json.dumps([sweep_json(result) for result in results], ensure_ascii=False)
