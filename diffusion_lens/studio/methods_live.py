"""Any method on what Explore shows: fitted in the background, kept, and drawn on the same seeds. Without gradio."""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from diffusion_lens.base.progress import Cancelled, Status
from diffusion_lens.base.types import LensError
from diffusion_lens.results.comparison import CompareConfig, Comparison
from diffusion_lens.studio.fits import KeptFits
from diffusion_lens.studio.jobs import TELL_EVERY, Event, stream
from diffusion_lens.studio.recent import Recent
from diffusion_lens.studio.state import View, check
from diffusion_lens.studio.studio import Picture, Row, Studio, import_engine

if TYPE_CHECKING:
    from diffusion_lens.lens.lens import DiffusionLens
    from diffusion_lens.methods.draws import Draws
    from diffusion_lens.methods.protocol import Fitted, Method

KEPT_FITS = 24
FITS_BYTES = 96 * 2**20
MAX_FIT_SECONDS = 600.0
"""A fit that is expected to take longer is refused here: it belongs on the command line."""

USUAL_SPEED = 13.0
"""Images per second of the bundled lens on two free cores, where no stored comparison tells this lens's own."""

EVEN = "even shares"
Kind = Literal["number", "whole", "choice", "switch", "text"]
PLAIN: tuple[tuple[type, Kind], ...] = ((bool, "switch"), (int, "whole"), (float, "number"))
HIDDEN = {"adapter"}
"""Options that are not offered to visitors: files of the server."""


@dataclass(frozen=True)
class Wish:
    """What a visitor wants to see beside DiffLens.

    Attributes:
        even: aim at even shares, a class drawn per image; else at Explore's class. Methods that aim at a whole
            distribution, or at nothing, always get even shares.
        options: the method's options as sorted JSON.
    """

    method: str
    strength: float
    even: bool = False
    options: str = "{}"


@dataclass(frozen=True)
class OptionField:
    """One declared option, as an interface needs it."""

    name: str
    title: str
    info: str
    kind: Kind
    default: Any
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    optional: bool = False


@dataclass(frozen=True)
class Trio:
    """The same seeds three times: unedited, turned by DiffLens as Explore is set, and by another method."""

    picture: Picture
    other: Row
    wish: Wish
    name: str
    goal: str
    strength_name: str
    seconds: float
    activation_ratio: float | None


@dataclass(frozen=True)
class News(Event):
    """Where a wish stands; the last one carries the pictures."""

    text: str = ""
    trio: Trio | None = None


def option_fields(method: Method) -> tuple[OptionField, ...]:
    """The options that a method declares, in order, without those that visitors may not set."""
    found = []
    for name, field in method.options.model_fields.items():
        if name in HIDDEN:
            continue
        parts = [part for part in get_args(field.annotation) if part is not type(None)]
        optional = get_origin(field.annotation) is not Literal and type(None) in get_args(field.annotation)
        kind = parts[0] if optional else field.annotation
        limits: dict[str, Any] = {}
        for limit in field.metadata:
            for told, end in (("ge", "low"), ("gt", "low"), ("le", "high"), ("lt", "high")):
                if (value := getattr(limit, told, None)) is not None:
                    limits[end] = value
        choices = tuple(str(c) for c in get_args(kind)) if get_origin(kind) is Literal else ()
        shown: Kind = "choice" if choices else next((told for plain, told in PLAIN if kind is plain), "text")
        found.append(OptionField(
            name, field.title or name.replace("_", " "), field.description or "", shown, field.default, choices,
            **limits, optional=optional,
        ))  # fmt: skip
    return tuple(found)


def read_options(method: Method, values: Mapping[str, Any]) -> str:
    """Options by name as an interface holds them, as the JSON of a ``Wish``; missing ones are the declared.

    Raises ``LensError`` that names a wrong option.
    """
    told: dict[str, Any] = {}
    for field in option_fields(method):
        value = values.get(field.name, field.default)
        if value in (None, "") and (field.optional or field.kind == "text"):
            value = None if field.optional else ""
        elif field.kind == "whole" and isinstance(value, float) and value.is_integer():
            value = int(value)
        told[field.name] = value
    options = method.options.parse(told, where=f"the options of {method.name}")
    return json.dumps(options.model_dump(mode="json"), sort_keys=True)


class MethodBench:
    """Fits of all visitors, on a model of their own: a fit may take minutes and change weights meanwhile."""

    def __init__(self, studio: Studio, kept: KeptFits | None = None) -> None:
        self.studio = studio
        self._fits: Recent[Fitted] = Recent(KEPT_FITS, FITS_BYTES)
        self._kept = kept or KeptFits()
        self._fitting = threading.Lock()
        self._own: tuple[DiffusionLens, Draws] | None = None

    def method(self, key: str) -> Method:
        """The method of that key."""
        import_engine()
        from diffusion_lens.methods.registry import find_method

        return find_method(key)

    def target(self, method: Method, view: View, wish: Wish) -> str | dict[str, float]:
        """What the method is fitted to."""
        if method.aim == "class" and not wish.even:
            return view.target
        classes = self.studio.lens.attribute_named(view.attribute).classes
        return {label: 1 / len(classes) for label in classes}

    def known(self, view: View, wish: Wish) -> Fitted | None:
        """The fit of a wish, if it was made before: in this process, or kept on disk."""
        key = self._key(view, wish)
        found = self._fits.get(key)
        if found is None:
            found = self._kept.load(self._name(view, wish), self.method(wish.method), self.studio.lens)
            if found is not None:
                self._fits.put(key, found)
        return found

    def estimate(self, view: View, wish: Wish) -> float:
        """Seconds that the fit is expected to take on this machine; 0 if it is made already."""
        if self.known(view, wish) is not None:
            return 0.0
        from diffusion_lens.studies.bench.plan import costs

        method, options = self.method(wish.method), json.loads(wish.options)
        stored = self._stored()
        _, fit = costs(method.key, stored)
        default = method.options.model_validate({}).model_dump().get("iterations")
        fit *= options.get("iterations", default) / default if default else 1.0
        draws = 0 if self._own is not None else len(fit_seeds())
        return (fit + draws) * self._seconds_per_image(stored)

    def _stored(self) -> dict[str, Comparison]:
        try:
            return dict(self.studio.lens.comparisons)
        except LensError:
            return {}

    def _seconds_per_image(self, stored: dict[str, Comparison]) -> float:
        base = next((row for c in stored.values() if (row := c.row("unsteered"))), None)
        return 1 / USUAL_SPEED if base is None or not base.seconds_per_image else base.seconds_per_image

    def events(self, visitor: str, view: View, wish: Wish) -> Iterator[News]:
        """Fit where needed, then draw; raises ``LensError`` for a bad wish and ``Cancelled`` when stopped.

        It can be stopped as soon as this returns.
        """
        check(self.studio.lens, view)
        owner = f"{visitor}:methods"
        method = self.method(wish.method)
        expected = self.estimate(view, wish)
        if expected > MAX_FIT_SECONDS:
            raise LensError(
                f"This fit would take about {expected / 60:.0f} minutes; choose fewer iterations here, or run it with: "
                f"python -m diffusion_lens compare --methods {method.key}."
            )

        flag = self.studio.stops.start(owner)

        def job(emit: Callable[[News], None]) -> None:
            fitted = self.known(view, wish) or self._fit(owner, flag, method, view, wish, expected, emit)
            emit(News(1.0, None, (), "Drawing the same seeds …"))
            emit(News(1.0, None, (), "", self._draw(visitor, flag, view, wish, fitted)))

        return stream(job, flag.set)

    def _key(self, view: View, wish: Wish) -> tuple[Any, ...]:
        target = self.target(self.method(wish.method), view, wish)
        return (wish.method, view.attribute, json.dumps(target), wish.options)

    def _name(self, view: View, wish: Wish) -> str:
        """The name of a wish's fit on disk: with the images that it is fitted on, and the method's own code."""
        from diffusion_lens.methods.protocol import lens_key

        lens = self.studio.lens
        code = hashlib.sha256(Path(inspect.getfile(type(self.method(wish.method)))).read_bytes()).hexdigest()
        decides = [code, *self._key(view, wish), list(lens.prompts), [fit_seeds().start, fit_seeds().stop]]
        return self._kept.name(wish.method, lens_key(lens), decides)

    def _fit(
        self, owner: str, flag: threading.Event, method: Method, view: View, wish: Wish, expected: float,
        emit: Callable[[News], None],
    ) -> Fitted:  # fmt: skip
        while not self._fitting.acquire(timeout=TELL_EVERY):
            if flag.is_set():
                raise Cancelled
            emit(News(0.0, None, (), "Another visitor's fit goes first …"))
        try:
            again = self.known(view, wish)
            return again or self._fit_now(owner, flag, method, view, wish, expected, emit)
        finally:
            self._fitting.release()

    def _fit_now(
        self, owner: str, flag: threading.Event, method: Method, view: View, wish: Wish, expected: float,
        emit: Callable[[News], None],
    ) -> Fitted:  # fmt: skip
        began = told = time.monotonic()
        emit(News(0.0, expected, (), f"Fitting {method.name} …"))

        def tell(status: Status) -> None:
            nonlocal told
            now = time.monotonic()
            if now - began > 2 * MAX_FIT_SECONDS:
                raise LensError(f"The fit of {method.name} took too long and was stopped; choose fewer iterations.")
            if now - told >= TELL_EVERY:
                told, left = now, status.seconds_left
                text = f"Fitting {method.name}: {status.share:.0%}"
                emit(News(status.share, expected if left is None else left, (), text))

        if flag.is_set():
            raise Cancelled
        with self.studio.work(owner, urgent=False, tell=tell, flag=flag) as progress:
            lens, draws = self._private()
            options = method.options.parse(json.loads(wish.options), where=f"the options of {method.name}")
            fitted = method.fit(
                lens, view.attribute, self.target(method, view, wish), options, prompts=draws.prompts,
                seeds=draws.seeds, progress=progress, draws=draws,
            )  # fmt: skip
        self._kept.keep(self._name(view, wish), fitted)
        return self._fits.put(self._key(view, wish), replace(fitted, lens=self.studio.lens))

    def _private(self) -> tuple[DiffusionLens, Draws]:
        """A second copy of the lens with the images that fits use.

        Fits hold its model's lock and change its weights while other visitors' images are drawn between their steps.
        """
        if self._own is None:
            from diffusion_lens.lens.folder import Parts
            from diffusion_lens.methods.draws import Draws

            lens = replace(self.studio.lens, _parts=Parts())
            manifest = lens.manifest
            self._own = (
                lens,
                Draws(lens.model, lens.prompts, fit_seeds(), manifest.n_steps, manifest.guidance_scale, batch_size=16),
            )
        return self._own

    def _draw(self, visitor: str, flag: threading.Event, view: View, wish: Wish, fitted: Fitted) -> Trio:
        picture = self.studio.draw(view, visitor)
        lens, method = self.studio.lens, fitted.method
        began = time.monotonic()
        request = lens.request(view.prompt, view.seeds)
        # Urgent work gives way to nobody: while weights are changed, no other visitor's step may run.
        with self.studio.work(f"{visitor}:methods", urgent=True, flag=flag) as progress:
            images, ratio = picture.before.images, None
            if wish.strength:
                edit = fitted.edit(wish.strength)
                made = lens.generate(request, edit, batch_size=len(request.seeds), progress=progress)
                images, ratio = made.images, made.activation_ratio
            read = lens.classify(images)
        own = read[view.attribute]
        row = Row(images, own.labels, own.certain, own.probs.max(axis=1), read)
        goal = ", ".join(f"{c} {s:.0%}" for c, s in zip(fitted.record.classes, fitted.record.target, strict=True) if s)
        return Trio(
            picture, row, wish, method.name, goal, method.strength_name,
            time.monotonic() - began, ratio,
        )  # fmt: skip


def fit_seeds() -> range:
    """The seeds that the bench fits on, so that a fit made here is the table's own."""
    return CompareConfig(attribute="any", prompt=None).seeds("fit")
