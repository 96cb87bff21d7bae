"""What happens in the Methods tab: the stored comparison at once, any method live on request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from diffusion_lens.base.types import LensError
from diffusion_lens.plots import describe_strengths, describe_tradeoff, strength_figure, tradeoff_figure
from diffusion_lens.results.comparison import Comparison
from diffusion_lens.studio.methods_live import EVEN, MethodBench, Wish, read_options
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Studio, import_engine
from diffusion_lens.ui import methods_views, texts
from diffusion_lens.ui.errors import explain
from diffusion_lens.ui.explore_handlers import Page, read_view
from diffusion_lens.ui.figure import figure_value

LOSSES = {"other attributes changed": "others", "distance from the unedited images": "fid"}
AIMS = ("Explore's class", EVEN)
FIRST_METHOD = "activation"


def stored(studio: Studio) -> tuple[Mapping[str, Comparison], str]:
    """The lens's comparisons by attribute, and what is wrong with them, if anything is."""
    try:
        return studio.lens.comparisons, ""
    except LensError as error:
        return {}, str(error)


def compared(studio: Studio, attribute: str, part: str, lost: str) -> tuple[Any, ...]:
    """verdict, table, trade-off, its sentence, strengths, its sentence, notes, whether there are plots."""
    found, problem = stored(studio)
    comparison = found.get(attribute)
    if comparison is None:
        return methods_views.empty_html(attribute, problem), "", None, "", None, "", "", gr.update(visible=False)
    names = {row.method: row.name for row in comparison.rows}
    curves = {names[key]: curve for key, curve in comparison.curves.items()}
    chosen = {row.name: row.strength for row in comparison.rows if row.method in comparison.curves}
    cost: Any = LOSSES.get(lost, "others")
    table = methods_views.table_html(comparison, part)
    verdict = methods_views.verdict_html(comparison)
    notes = methods_views.notes_html(comparison)
    if not curves:
        return verdict, table, None, "", None, "", notes, gr.update(visible=False)
    if not any(point.agreement for curve in curves.values() for point in curve.points):
        cost = "fid"
    strong = [names["difflens"]] if "difflens" in comparison.curves else []
    told = {"lost": cost, "fid_name": "distance"}
    trade, across = describe_tradeoff(curves, **told), describe_strengths(curves)
    return (
        verdict, table,
        figure_value(tradeoff_figure(curves, chosen=chosen, emphasised=strong, **told), trade), _folded(trade),
        figure_value(strength_figure(curves, chosen=chosen, emphasised=strong), across), _folded(across),
        notes, gr.update(visible=True),
    )  # fmt: skip


def _folded(text: str) -> str:
    return f'<details class="dl-table"><summary>The same in words</summary><p>{escape(text)}</p></details>'


def method_choices() -> list[tuple[str, str]]:
    """(name, key) of every method but DiffLens, which always stands beside."""
    import_engine()
    from diffusion_lens.methods.registry import METHODS

    return [(method.name, key) for key, method in METHODS.items() if key != "difflens"]


def start_methods(current: str | None) -> Any:
    """The choice of methods, once torch is there."""
    choices = method_choices()
    known = {key for _, key in choices}
    return gr.update(choices=choices, value=current if current in known else FIRST_METHOD, interactive=True)


def describe(
    bench: MethodBench, page: Page, key: str | None, aim: str, values: Sequence[Any], shown: str = ""
) -> tuple[Any, ...]:
    """Explanation, aim and strength for the method now chosen; nothing new where ``shown`` explains it already."""
    if not key:
        return gr.skip(), gr.skip(), gr.skip()
    method = bench.method(key)
    if methods_views.heading(method) in shown:
        return gr.skip(), gr.skip(), gr.skip()
    top = max(method.strengths)
    comparison = stored(bench.studio)[0].get(str(values[1]))
    row = comparison.row(key) if comparison else None
    value = row.strength if row and row.strength else method.strengths[len(method.strengths) // 2]
    try:
        expected = bench.estimate(
            read_view(bench.studio, page, values), Wish(key, value, aim == EVEN, _defaults(bench, key))
        )
    except LensError:
        expected = 0.0
    only_even = method.aim != "class"
    return (
        methods_views.method_html(method, expected),
        gr.update(value=EVEN if only_even else aim, interactive=not only_even),
        gr.update(
            value=value, minimum=0, maximum=top, step=round(top / 40, 4), label=f"Strength: {method.strength_name}"
        ),
    )


def _defaults(bench: MethodBench, key: str) -> str:
    import json

    return json.dumps(bench.method(key).options.model_validate({}).model_dump(mode="json"), sort_keys=True)


def run(
    bench: MethodBench, page: Page, key: str | None, aim: str, strength: Any, options: Sequence[Any],
    values: Sequence[Any],
) -> Iterator[tuple[Any, ...]]:  # fmt: skip
    """Fit and draw. Yields pictures, status, run button, stop button."""
    busy = (gr.update(visible=False), gr.update(visible=True))
    idle = (gr.update(visible=True), gr.update(visible=False))
    try:
        view, wish = _ask(bench, page, key, aim, strength, options, values)
        yield gr.skip(), texts.status("Waiting for a turn …"), *busy
        for news in bench.events(page.visitor, view, wish):
            if news.trio is None:
                yield gr.skip(), texts.status(f"{news.text}{texts.seconds(news.seconds_left)}"), *busy
                continue
            attribute = bench.studio.lens.attribute_named(view.attribute)
            shown = methods_views.trio_html(news.trio, attribute)
            yield shown, texts.status(methods_views.said(news.trio, attribute)), *idle
    except Exception as error:
        yield gr.skip(), explain(error), *idle


def _ask(
    bench: MethodBench, page: Page, key: str | None, aim: str, strength: Any, options: Sequence[Any],
    values: Sequence[Any],
) -> tuple[View, Wish]:  # fmt: skip
    if not key:
        raise LensError("Choose a method first.")
    method = bench.method(key)
    view = read_view(bench.studio, page, values)
    try:
        amount = float(strength)
    except (TypeError, ValueError):
        raise LensError(f"The strength must be a number; it is '{strength}'.") from None
    if not 0 <= amount <= max(method.strengths):
        raise LensError(
            f"The strength of {method.name} lies between 0 and {max(method.strengths):g}; it is {amount:g}."
        )
    told = read_options(method, tuple(options)) if options else _defaults(bench, key)
    return view, Wish(key, amount, aim == EVEN, told)
