"""What happens in Explore: plain functions from what the controls hold to what the page shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from diffusion_lens.base.types import LensError
from diffusion_lens.studio import cards, jobs, state
from diffusion_lens.studio.opening import opening_view
from diffusion_lens.studio.previews import Preview
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Picture, Row, Studio
from diffusion_lens.ui import curve, grid, texts
from diffusion_lens.ui.errors import explain
from diffusion_lens.ui.html import html

N_SLOTS = cards.N_SLOTS
N_PLAIN = 11
"""Controls before those of the cards, in the order of ``control_values``; strength is the last."""


@dataclass(frozen=True)
class Page:
    """What one visitor has before them: their name for this session, the cards shown, the row last drawn.

    ``linked``: draw on arrival; ``pending``: draw when the tab is looked at again.
    """

    visitor: str = ""
    slots: tuple[int, ...] = ()
    before: tuple[Any, ...] | None = None
    linked: bool = False
    pending: bool = False


def read_view(studio: Studio, page: Page, values: Sequence[Any]) -> View:
    """The view that the controls ask for, checked; ``values`` in the order of ``control_values``."""
    prompt, attribute, target, n_seeds, first_seed, sampler, n_features, first_step, last_step, hold, beta = values[
        :N_PLAIN
    ]
    checks, own = values[N_PLAIN : N_PLAIN + N_SLOTS], values[N_PLAIN + N_SLOTS :]
    n_steps = studio.lens.manifest.n_steps
    window = (_whole(first_step, "The first step") - 1, _whole(last_step, "The last step"))
    view = View(
        prompt=state.read_prompt(studio.lens, prompt),
        attribute=str(attribute),
        target=str(target),
        beta=_number(beta, "β"),
        n_features=_whole(n_features, "The number of features"),
        sampler=sampler,
        window=None if window == (0, n_steps) else window,
        n_seeds=_whole(n_seeds, "The number of images"),
        first_seed=_whole(first_seed, "The first seed"),
        own=tuple(
            (i, _number(b, f"The strength of feature #{i}"))
            for i, follows, b in zip(page.slots, checks, own, strict=False)
            if not follows
        ),
        hold=_in_order(hold, state.holdable(studio.lens, str(attribute))),
    )
    state.check(studio.lens, view)
    return view


def control_values(studio: Studio, view: View, slots: Sequence[int]) -> list[Any]:
    """The controls' values for a view, in the order that ``read_view`` takes."""
    window = view.window or (0, studio.lens.manifest.n_steps)
    own = dict(view.own)
    identity = state.scale(studio.lens.setting(view.attribute)).identity
    values: list[Any] = [
        state.EMPTY_PROMPT if view.prompt == "" else view.prompt, view.attribute, view.target, view.n_seeds,
        view.first_seed, view.sampler, view.n_features, window[0] + 1, window[1],
        list(view.hold), view.beta,
    ]  # fmt: skip
    filled = [*slots, *[None] * (N_SLOTS - len(slots))]
    return [*values, *(i not in own for i in filled), *(own.get(i, identity) if i is not None else identity
                                                         for i in filled)]  # fmt: skip


def control_updates(studio: Studio, view: View, slots: Sequence[int], current: Sequence[Any] = ()) -> list[Any]:
    """The same as updates of components, with the choices and ranges that the view's attribute asks for.

    What already stands so in ``current`` is left alone: a radio set twice may lose its mark on a busy page.
    """
    lens = studio.lens
    values = control_values(studio, view, slots)
    ends = state.scale(lens.setting(view.attribute))
    known = [*current[:N_PLAIN], *[None] * (N_PLAIN - len(current[:N_PLAIN]))]
    updates: list[Any] = [
        gr.skip() if v == k else gr.update(value=v) for v, k in zip(values[:N_PLAIN], known, strict=True)
    ]
    updates[2] = gr.update(value=view.target, choices=list(lens.attribute_named(view.attribute).classes))
    free = state.holdable(lens, view.attribute)
    updates[N_PLAIN - 2] = gr.update(value=list(view.hold), choices=list(free), visible=bool(free))
    updates[N_PLAIN - 1] = gr.update(value=view.beta, minimum=ends.low, maximum=ends.high, step=ends.step)
    for k, follows in enumerate(values[N_PLAIN : N_PLAIN + N_SLOTS]):
        inside = k < len(slots) and cards.role(lens, view, slots[k]) != "apart"
        updates.append(gr.update(value=follows, visible=inside))
    for k, own in enumerate(values[N_PLAIN + N_SLOTS :]):
        follows = values[N_PLAIN + k]
        label = f"β of #{slots[k]} alone" if k < len(slots) else ""
        updates.append(gr.update(
            value=own, minimum=ends.low, maximum=ends.high, step=ends.step, label=label,
            visible=k < len(slots) and not follows,
        ))  # fmt: skip
    return updates


def card_values(studio: Studio, view: View, slots: Sequence[int]) -> list[str]:
    """The cards' HTML, one per slot."""
    shown = [html("cards.small", cards.role_card(studio.lens, view, i)) for i in slots]
    return [*shown, *[html("cards.empty")] * (N_SLOTS - len(shown))]


def show(studio: Studio, page: Page, picture: Picture) -> tuple[Any, ...]:
    """before, after, curve, measures, status, link, page: for a picture that was just made."""
    attribute = studio.lens.attribute_named(picture.view.attribute)
    key = (picture.view.prompt, tuple(picture.view.seeds), attribute.name, picture.stored)
    before = gr.skip() if page.before == key else grid.row_html(picture, attribute, edited=False)
    said = grid.summary(picture, attribute)
    return (
        before,
        grid.row_html(picture, attribute, edited=True),
        drawing(studio, picture.view, picture.beta),
        measures(studio, picture),
        texts.status(said),
        texts.link(studio.path + state.to_query(picture.view)),
        replace(page, before=key, linked=False, pending=False),
    )


def foresee(studio: Studio, page: Page, preview: Preview[Row]) -> tuple[Any, ...]:
    """The same for a preview, marked: nothing is read in it or linked, and the full images replace all of it.

    The curve stays: it was measured when the lens was made, and says so.
    """
    view = preview.view
    attribute = studio.lens.attribute_named(view.attribute)
    before, after = (grid.preview_html(preview, attribute, edited=edited) for edited in (False, True))
    said = texts.status(texts.PREVIEW.format(name=preview.name))
    page = replace(page, before=None, linked=False, pending=False)
    return before, after, drawing(studio, view, view.beta), texts.unmeasured(), said, "", page


def measures(studio: Studio, picture: Picture) -> str:
    """What the images measure, beside what the stored sweep counted at this strength, if it did."""
    point = studio.stored_point(picture.view)
    counted = point if point is not None and abs(point.beta - picture.beta) < 1e-6 else None
    return grid.measure_html(studio.lens, picture, counted)


def drawing(studio: Studio, view: View, beta: float) -> str:
    """The stored sweep with a mark at this strength; empty where it is of another turn."""
    return "" if studio.stored_point(replace(view, own=())) is None else curve.curve_html(studio, view, beta)


def say(status: str, page: Any) -> tuple[Any, ...]:
    """The outputs of ``show`` with nothing changed but the status line."""
    return gr.skip(), gr.skip(), gr.skip(), gr.skip(), status, gr.skip(), page


def draw(studio: Studio, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Draw what the controls ask for; while the model loads, the nearest stored picture stands in.

    With a tiny autoencoder its previews come first, then the full images with their figures.
    """
    try:
        view = read_view(studio, page, values)
        if not studio.lens.is_ready:
            stored = studio.stored(view)
            if stored is not None:
                waking = list(show(studio, page, stored))
                waking[4], page = texts.status(texts.WAKING), waking[6]
                yield tuple(waking)
        for made in jobs.drawings(studio, page.visitor, view):
            outputs = show(studio, page, made) if isinstance(made, Picture) else foresee(studio, page, made)
            page = outputs[6]
            yield outputs
    except Exception as error:
        yield say(explain(error), page)


def change_attribute(studio: Studio, page: Page, values: Sequence[Any]) -> tuple[Any, ...]:
    """Another attribute: its shipped setting at the identity, its own cards. Returns controls, cards, page."""
    fresh = state.default_view(studio.lens, str(values[1]))
    shown = state.read_prompt(studio.lens, values[0])
    n_seeds = int(values[3]) if values[3] in state.SEED_COUNTS else fresh.n_seeds
    view = replace(fresh, prompt=shown, n_seeds=n_seeds)
    return _subject(studio, page, view, values)


def change_target(studio: Studio, page: Page, values: Sequence[Any]) -> tuple[Any, ...]:
    """Another class of the same attribute: β back to the identity, cards of the new class."""
    view = state.default_view(studio.lens, str(values[1]))
    attribute = studio.lens.attribute_named(view.attribute)
    target = str(values[2]) if values[2] in attribute.classes else view.target
    n_seeds = int(values[3]) if values[3] in state.SEED_COUNTS else view.n_seeds
    view = replace(view, target=target, prompt=state.read_prompt(studio.lens, values[0]), n_seeds=n_seeds)
    return _subject(studio, page, view, values)


def take_subject(studio: Studio, page: Page, prompt: Any, attribute: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    """Another tab's prompt and attribute, drawn when this tab is looked at again. Returns controls, cards, page."""
    page = replace(page, pending=True)
    if attribute == values[1] or attribute not in state.steerable(studio.lens):
        return (gr.update(value=prompt), *[gr.skip()] * (N_PLAIN - 1 + 3 * N_SLOTS), page)
    fresh = state.default_view(studio.lens, str(attribute))
    n_seeds = int(values[3]) if values[3] in state.SEED_COUNTS else fresh.n_seeds
    view = replace(fresh, prompt=state.read_prompt(studio.lens, prompt), n_seeds=n_seeds)
    return _subject(studio, page, view, values)


def draw_pending(studio: Studio, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
    """On return to the tab: draw what another tab has set meanwhile, if it has."""
    if page.pending:
        yield from draw(studio, replace(page, pending=False), *values)
    else:
        yield tuple(gr.skip() for _ in range(7))


def reset(studio: Studio, page: Page, values: Sequence[Any]) -> tuple[Any, ...]:
    """Everything back to the identity; prompt, attribute, class and seeds stay."""
    return change_target(studio, page, values)


def _subject(
    studio: Studio, page: Page, view: View, current: Sequence[Any] = (), pinned: int | None = None
) -> tuple[Any, ...]:
    slots = cards.slots(studio.lens, view, pinned)
    return (
        *control_updates(studio, view, slots, current),
        *card_values(studio, view, slots),
        replace(page, slots=slots),
    )


def turn_feature(studio: Studio, page: Page, feature: int | None, values: Sequence[Any]) -> tuple[Any, ...]:
    """Bring one feature from the atlas to the cards, turned alone and clearly; the rest at the identity."""
    view = state.default_view(studio.lens, str(values[1]))
    if feature is None:
        return tuple(gr.skip() for _ in range(N_PLAIN + 3 * N_SLOTS + 1))
    ends = state.scale(studio.lens.setting(view.attribute))
    far = ends.high if ends.high - ends.identity >= ends.identity - ends.low else ends.low
    view = replace(view, prompt=state.read_prompt(studio.lens, values[0]), own=((int(feature), far),))
    return _subject(studio, page, view, values, int(feature))


def open_link(studio: Studio, visitor: str, query: dict[str, str]) -> tuple[Any, ...]:
    """On arrival: controls, cards, page, status. A link sets the controls; a broken one says so."""
    page = Page(visitor=visitor, slots=cards.slots(studio.lens, state.default_view(studio.lens)))
    nothing = tuple(gr.skip() for _ in range(N_PLAIN + 3 * N_SLOTS))
    try:
        view = state.from_query(studio.lens, query)
    except LensError as error:
        return (*nothing, page, texts.status(str(error), bad=True))
    if view is None:
        # Without stored images the page would open empty, so it draws at once.
        return (*nothing, replace(page, linked=studio.stored(opening_view(studio)) is None), gr.skip())
    return (*_subject(studio, replace(page, linked=True), view), texts.status("Opening the link …"))


def draw_linked(studio: Studio, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
    """On arrival: draw if a link asked for it or nothing is stored; otherwise measure the images shown."""
    picture = None if page.linked else studio.stored(opening_view(studio))
    if picture is None:
        yield from draw(studio, page, *values)
    else:
        measured = measures(studio, picture)
        yield tuple(measured if i == 3 else gr.skip() for i in range(7))


def balance(studio: Studio, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Find the β at which the target class has its even share. Yields slider, status, stop button.

    Read off the stored sweep where there is one; otherwise measured now, stoppable.
    """
    hidden, shown = gr.update(visible=False), gr.update(visible=True)
    try:
        view = read_view(studio, page, values)
        yield gr.skip(), texts.status("Looking for the balance …"), shown
        found = jobs.stored_balance(studio, view)
        if found is None:
            last = None
            for event in jobs.balance_events(studio, page.visitor, view):
                last = event.results[-1] if event.results else last
                text = f"Measuring {jobs.BALANCE_IMAGES} images per strength: {event.done:.0%}"
                yield gr.skip(), texts.status(text + texts.seconds(event.seconds_left)), shown
            if last is None:
                raise LensError("Nothing was measured; try again.")
            found = jobs.find_balance(studio, last)
        setting = studio.lens.setting(view.attribute)
        ends = state.scale(setting)
        beta = min(max(found.beta, ends.low), ends.high)
        shipped = (setting.n_features, setting.sampler, setting.window, set(setting.hold))
        other = view.own or (view.n_features, view.sampler, view.window, set(view.hold)) != shipped
        note = f"{found.note} {texts.SHIPPED_ONLY}" if other else found.note
        yield gr.update(value=round(beta, 2)), texts.status(note), hidden
    except Exception as error:
        yield gr.skip(), explain(error), hidden


def _in_order(chosen: Any, known: Sequence[str]) -> tuple[str, ...]:
    """What a group of boxes has ticked, in the order of ``known``; strangers last, for the check to name."""
    names = [str(name) for name in chosen] if isinstance(chosen, (list, tuple)) else []
    return (*(name for name in known if name in names), *(name for name in names if name not in known))


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LensError(f"{name} must be a number; it is '{value}'.") from None


def _whole(value: Any, name: str) -> int:
    number = _number(value, name)
    if not abs(number) < 2**63 or number != int(number):
        raise LensError(f"{name} must be a whole number; it is {value}.")
    return int(number)
