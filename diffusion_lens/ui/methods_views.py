"""What the Methods tab shows, as HTML: the stored table, what each method is, and the same seeds three times."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from diffusion_lens.base.types import Attribute
from diffusion_lens.results.comparison import UNSTEERED, Comparison, MethodRow
from diffusion_lens.results.comparison_tables import BEST, COLUMNS, NOT_MEASURED, PARTS, best, cells, verdict
from diffusion_lens.studio.methods_live import Trio
from diffusion_lens.studio.pictures import data_uri
from diffusion_lens.studio.studio import Row

if TYPE_CHECKING:
    from diffusion_lens.methods.protocol import Method

MEANING = {
    "strength": "the best setting by the rule below, of the method's own scale",
    "fd": "distance of the shares from the target; 0 is balance",
    "fd_floor": "what FD reaches by chance at perfect balance",
    "log_ratio_corrected": "0 is balance, corrected for the classifier's error",
    "spd": "largest difference between two shares",
    "kept": "share of images whose other attributes stayed as they were",
    "certain": "share of images that the classifier decides",
    "subgroup_entropy": "how unsure the classifier is within each class",
    "activation_ratio": "size of the bottleneck, 1 is as it was; ! leaves the data's range",
    "seconds_to_fit": "once", "seconds_per_image": "on the machine that made the table",
}  # fmt: skip


def table_html(comparison: Comparison, part: str) -> str:
    """One part of the table: best values marked, what was not measured said."""
    fields = PARTS.get(part, PARTS["balance"])
    leaders = best(comparison)
    labels = comparison.labels
    head = "".join(
        f"<th scope='col' title='{escape(labels.get(f) or MEANING.get(f, ''), quote=True)}'>{escape(COLUMNS[f])}</th>"
        for f in fields
    )
    body = "".join(_row(row, fields, leaders) for row in comparison.rows)
    config = comparison.config
    prompt = "no prompt" if config.prompt is None else f"“{config.prompt}”" if config.prompt else "no words"
    caption = (
        f"{comparison.attribute.name}, {prompt}: {config.n} images per method at its best setting, "
        f"{config.n_tune} at every other strength; 95 % intervals in brackets"
    )
    return (
        f'<div class="dl-scroll dl-bench" tabindex="0"><table><caption>{escape(caption)}. <b>★</b> best value of the '
        f"column.</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: MethodRow, fields: tuple[str, ...], leaders: dict[str, frozenset[str]]) -> str:
    kind = "dl-base" if row.method == UNSTEERED else "dl-control" if row.is_control else ""
    kind += " dl-own" if row.method == "difflens" else ""
    head = f"<th scope='row'>{escape(row.name)}</th>"
    if row.note:
        return f"<tr class='{kind}'>{head}<td colspan='{len(fields) - 1}'>not run: {escape(row.note)}</td></tr>"
    told = [_cell(text, f, row, leaders) for f, text in zip(fields, cells(row, fields), strict=True) if f != "name"]
    return f"<tr class='{kind.strip()}'>{head}{''.join(told)}</tr>"


def _cell(text: str, field: str, row: MethodRow, leaders: dict[str, frozenset[str]]) -> str:
    leads = field in BEST and row.method in leaders.get(field, frozenset())
    quiet = text.startswith((NOT_MEASURED, "two classes"))
    text = escape(text).replace(" (", " <small>(").replace(")", ")</small>") if "(" in text else escape(text)
    text = text.replace(", ", "<br>") if field in ("shares", "subgroup_entropy") else text
    mark = '<b class="dl-star"><span aria-hidden="true">★</span><span class="dl-hidden">best:</span></b> '
    body = f"{mark}<b>{text}</b>" if leads else f'<span class="dl-missing">{text}</span>' if quiet else text
    return f"<td{' class=dl-best' if leads else ''}>{body}</td>"


def verdict_html(comparison: Comparison) -> str:
    """Who is best where, in words."""
    return f'<p class="dl-says dl-verdict">{escape(verdict(comparison))}</p>'


def notes_html(comparison: Comparison) -> str:
    """How the numbers were made."""
    named = {**MEANING, **comparison.labels}
    rows = "".join(
        f"<tr><th scope='row'>{escape(COLUMNS[f])}</th><td>{escape(named[f])}</td></tr>" for f in COLUMNS if f in named
    )
    config = comparison.config
    told = (
        f"{comparison.rule} The best setting is then drawn anew on {config.n} seeds that neither tuning nor fitting "
        f"saw. Fits may use {config.n_fit} images, and read classes with the lens's probes; the image classifier "
        f"({comparison.classifier_id}) judges, and no method sees it. Measured with the SAE {comparison.sae_id}."
    )
    return (
        f'<details class="dl-table"><summary>How the table was made, and what its columns are</summary>'
        f"<p>{escape(told)}</p><div class='dl-scroll' tabindex='0'><table><tbody>{rows}</tbody></table></div></details>"
    )


def empty_html(attribute: str, problem: str = "") -> str:
    """What to do where no comparison is stored."""
    why = escape(problem) if problem else (
        f"This lens holds no comparison for <b>{escape(attribute)}</b> yet. One command fits every method, tunes each "
        "on its own seeds, measures it on others and stores the table here:"
    )  # fmt: skip
    return (
        f'<section class="dl-empty"><h3>Nothing to compare yet</h3><p>{why}</p>'
        "<pre><code>python -m diffusion_lens compare --store</code></pre>"
        "<p>All attributes take about an hour on two free cores (an estimate); "
        f"<code>-a {escape(attribute)}</code> does one alone, and a "
        "stopped run goes on where it was. Below, any method can be tried on a few images now.</p></section>"
    )


def method_html(method: Method, expected: float) -> str:
    """What a method is, where it comes from, and what its fit will cost."""
    cost = "Nothing to wait for: it is fitted." if not expected else f"Fitting takes {_about(expected)}, once."
    return (
        f'<article class="dl-method">{heading(method)}'
        f"<p>{escape(method.explanation)}</p><p class='dl-quiet'>Source: {escape(method.source)}. "
        f"<b>{cost}</b></p></article>"
    )


def heading(method: Method) -> str:
    """A method's name and kind."""
    return f"<h3>{escape(method.name)} <small>{escape(method.kind)}</small></h3>"


def _about(seconds: float) -> str:
    if seconds < 5:
        return "a few seconds"
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} minutes"


def trio_html(trio: Trio, attribute: Attribute) -> str:
    """The three rows, each with the share that it shows."""
    picture, view = trio.picture, trio.picture.view
    same = np.array_equal(picture.before.images, picture.after.images)
    still = " (which changes nothing: turn it in Explore)" if same else ""
    rows = (
        ("Before, the model as it is", picture.before, "dl-before"),
        (f"DiffLens as Explore is set, β = {picture.beta:g}{still}", picture.after, "dl-lens"),
        (f"{trio.name}, {trio.strength_name} = {trio.wish.strength:g}, towards {trio.goal}", trio.other, "dl-other"),
    )
    return "".join(
        f'<section class="dl-row {kind}"><h3>{escape(title)}</h3>{_bar(row, attribute, view.target)}'
        f'<div class="dl-images">{_figures(row, picture.before, view.seeds, attribute, title)}</div></section>'
        for title, row, kind in rows
    )


def _figures(row: Row, before: Row, seeds: range, attribute: Attribute, title: str) -> str:
    parts = []
    for i, seed in enumerate(seeds):
        name, was = _name(row, i, attribute), _name(before, i, attribute)
        moved = name != was
        alt = f"Seed {seed}, {title}: read as {name}{f', was {was}' if moved else ''}"
        mark = '<span aria-hidden="true">↻ </span>' if moved else ""
        parts.append(
            f'<figure class="{"dl-moved" if moved else ""}"><img src="{data_uri(row.images[i])}" alt="{escape(alt)}" '
            f'decoding="sync"><figcaption aria-hidden="true">{mark}{escape(name)}</figcaption></figure>'
        )
    return "".join(parts)


def _name(row: Row, i: int, attribute: Attribute) -> str:
    return attribute.classes[int(row.labels[i])] if row.certain[i] else "uncertain"


def _bar(row: Row, attribute: Attribute, target: str) -> str:
    from diffusion_lens.results.stats import share_interval

    column, n = attribute.index(target), int(row.certain.sum())
    k = int(((row.labels == column) & row.certain).sum())
    if not n:
        return '<div class="dl-bar"><p>no image was decided</p></div>'
    low, high = share_interval(k, n)
    undecided = f", {len(row.certain) - n} uncertain" if len(row.certain) > n else ""
    return (
        f'<div class="dl-bar"><p><span>{k} of {n} read as {escape(target)}{undecided} · {k / n:.0%} '
        f'(95 %: {low:.0%} to {high:.0%})</span></p><div class="dl-track" aria-hidden="true">'
        f'<i style="left:{low:.1%};width:{high - low:.1%}"></i><b style="left:{k / n:.1%}"></b>'
        f'<u style="left:{1 / len(attribute.classes):.1%}"></u></div></div>'
    )


def said(trio: Trio, attribute: Attribute) -> str:
    """One sentence for the status line."""
    column = attribute.index(trio.picture.view.target)

    def count(row: Row) -> str:
        return f"{int(((row.labels == column) & row.certain).sum())} of {int(row.certain.sum())}"

    flag = "" if trio.activation_ratio is None or 0.8 <= trio.activation_ratio <= 1.25 else (
        f" The bottleneck is {trio.activation_ratio:.1f} × its usual size: expect odd images."
    )  # fmt: skip
    return (
        f"Read as {trio.picture.view.target}: before {count(trio.picture.before)}, DiffLens "
        f"{count(trio.picture.after)}, {trio.name} {count(trio.other)}. Drawn in {trio.seconds:.1f} s.{flag} "
        f"{len(trio.picture.view.seeds)} images show what a method does, not how often."
    )
