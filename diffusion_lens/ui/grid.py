"""The before and after grid and what it measures, as HTML."""

from __future__ import annotations

from html import escape

import numpy as np

from diffusion_lens.base.types import Attribute
from diffusion_lens.base.validity import count_faults, find_constant
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.sweeps import SweepPoint
from diffusion_lens.studio.pictures import data_uri
from diffusion_lens.studio.previews import Preview
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Picture, Row
from diffusion_lens.ui import texts


def row_html(picture: Picture, attribute: Attribute, *, edited: bool) -> str:
    """One row of images, each with what the classifier reads in it; edited images that changed class say so."""
    row, before = (picture.after, picture.before) if edited else (picture.before, picture.before)
    seeds = picture.view.seeds
    figures = "".join(_figure(row, before, i, seed, attribute, edited) for i, seed in enumerate(seeds))
    return _section(_title(picture.view, picture.beta, edited), figures, edited)


def preview_html(preview: Preview[Row], attribute: Attribute, *, edited: bool) -> str:
    """One row of images that were not measured and say so; empty places for those that are not drawn yet."""
    view, row = preview.view, preview.after if edited else preview.before
    title = _title(view, view.beta, edited)
    if isinstance(row, Row):
        figures = "".join(_figure(row, row, i, seed, attribute, edited) for i, seed in enumerate(view.seeds))
        return _section(title, figures, edited)
    if row is None:
        blank = '<figure aria-hidden="true"><div class="dl-blank"></div><figcaption>…</figcaption></figure>'
        return _section(f"{title}, being drawn", blank * view.n_seeds, edited)
    figures = "".join(_unread(image, seed, edited) for image, seed in zip(row, view.seeds, strict=True))
    return _section(f"{title} <small>preview by {escape(preview.name)}</small>", figures, edited)


def _title(view: View, beta: float, edited: bool) -> str:
    apart = "".join(f", #{i} at {b:g}" for i, b in view.own)
    return f"After, β = {beta:g}{apart}" if edited else "Before, the model as it is"


def _section(title: str, figures: str, edited: bool) -> str:
    kind = "dl-after" if edited else "dl-before"
    return f'<section class="dl-row {kind}"><h3>{title}</h3><div class="dl-images">{figures}</div></section>'


def _unread(image: np.ndarray, seed: int, edited: bool) -> str:
    alt = f"Seed {seed}, {'after' if edited else 'before'} the turn: a preview, not measured"
    return (
        f'<figure class="dl-preview"><img src="{data_uri(image)}" alt="{alt}" decoding="sync">'
        '<figcaption aria-hidden="true">preview</figcaption></figure>'
    )


def _figure(row: Row, before: Row, i: int, seed: int, attribute: Attribute, edited: bool) -> str:
    name = _name(row, i, attribute)
    moved = edited and _name(before, i, attribute) != name
    sure = "" if row.confidence is None else f", {row.confidence[i]:.0%} sure"
    change = f", was {_name(before, i, attribute)}" if moved else ""
    alt = escape(f"Seed {seed}, {'after' if edited else 'before'} the turn: read as {name}{sure}{change}")
    mark = '<span aria-hidden="true">↻ </span>' if moved else ""
    style = "dl-moved" if moved else ""
    return (
        f'<figure class="{style}"><img src="{data_uri(row.images[i])}" alt="{alt}" decoding="sync">'
        f'<figcaption aria-hidden="true">{mark}{escape(name)}</figcaption></figure>'
    )


def _name(row: Row, i: int, attribute: Attribute) -> str:
    return attribute.classes[int(row.labels[i])] if row.certain[i] else "uncertain"


def measure_html(lens: DiffusionLens, picture: Picture, stored: SweepPoint | None) -> str:
    """Share and log ratio of the images on screen, and what they cannot show."""
    view = picture.view
    attribute = lens.attribute_named(view.attribute)
    rows = [("Before", picture.before), ("After", picture.after)]
    bars = "".join(_bar(name, row, attribute, view.target) for name, row in rows)
    ratios = "" if len(attribute.classes) != 2 else "".join(_ratio(name, row, attribute) for name, row in rows)
    table = (
        f"<table><caption>ln({escape(attribute.classes[1])} / {escape(attribute.classes[0])}), 0 is balance</caption>"
        f"<tbody>{ratios}</tbody></table>"
        if ratios
        else ""
    )
    return (
        f'<section class="dl-measure" aria-label="What the images on screen measure">'
        f"<h3>Read as {escape(view.target)}, on screen <small>line: an even share</small></h3>"
        f"{bars}{table}{_side_effects(picture)}{_limits(picture, attribute, stored)}</section>"
    )


def summary(picture: Picture, attribute: Attribute) -> str:
    """One sentence for the status line and for screen readers."""
    target = picture.view.target
    column = attribute.index(target)
    (a, n_a), (b, n_b) = (_count(row, column) for row in (picture.before, picture.after))
    source = "stored result" if picture.stored else f"drawn in {picture.seconds:.1f} s"
    off = "" if picture.preview_error is None else f" {texts.PREVIEW_ERROR.format(off=picture.preview_error)}"
    return f"β = {picture.beta:g}: {b} of {n_b} read as {target}, before {a} of {n_a} ({source}).{off}"


def _count(row: Row, column: int) -> tuple[int, int]:
    return int(((row.labels == column) & row.certain).sum()), int(row.certain.sum())


def _bar(name: str, row: Row, attribute: Attribute, target: str) -> str:
    from diffusion_lens.results.stats import share_interval

    k, n = _count(row, attribute.index(target))
    if n == 0:
        return f'<div class="dl-bar"><p><b>{name}</b> no image was decided</p></div>'
    low, high = share_interval(k, n)
    uncertain = len(row.certain) - n
    undecided = f", {uncertain} uncertain" if uncertain else ""
    # Images that overflowed or were censored are black: all that show nobody are told by their pixels.
    invalid = count_faults(find_constant(row.images)).get("constant", 0)
    undecided += f" ({invalid} of them black or one flat colour: nobody is on them)" if invalid else ""
    text = f"{k} of {n}{undecided} · {k / n:.0%} (95 %: {low:.0%} to {high:.0%})"
    return (
        f'<div class="dl-bar"><p><b>{name}</b> <span>{text}</span></p>'
        f'<div class="dl-track" aria-hidden="true"><i style="left:{low:.1%};width:{high - low:.1%}"></i>'
        f'<b style="left:{k / n:.1%}"></b><u style="left:{1 / len(attribute.classes):.1%}"></u></div></div>'
    )


def _ratio(name: str, row: Row, attribute: Attribute) -> str:
    from diffusion_lens.results.stats import log_ratio_interval

    counts = [_count(row, i)[0] for i in (1, 0)]
    if not sum(counts):
        return f"<tr><th scope='row'>{name}</th><td>–</td><td></td></tr>"
    second, first = attribute.classes[1], attribute.classes[0]
    ratio = log_ratio_interval(*counts, numerator=second, denominator=first)
    value, span = ratio.text.split(" ", 1)
    return (
        f"<tr title='{ratio.note}'><th scope='row'>{name}</th><td class='dl-big'>{value}</td>"
        f"<td>{span.strip('()')}</td></tr>"
    )


def _side_effects(picture: Picture) -> str:
    """What else the classifier reads differently on the same seeds."""
    before, after = picture.before.readings, picture.after.readings
    moved, kept = [], []
    for name in after:
        if name == picture.view.attribute:
            continue
        sure = before[name].certain & after[name].certain
        n = int((sure & (before[name].labels != after[name].labels)).sum())
        if n:
            moved.append((n, f"{escape(name)} in {n} of {int(sure.sum())}"))
        else:
            kept.append(escape(name))
    if not moved and not kept:
        return ""
    words = "; ".join(text for _, text in sorted(moved, reverse=True))
    changed = f"<b>What else changed:</b> {words}." if moved else "<b>Nothing else changed.</b>"
    same = f" Unchanged: {', '.join(kept)}." if kept and moved else ""
    return f'<p class="dl-side">{changed}{same}</p>'


def _limits(picture: Picture, attribute: Attribute, stored: SweepPoint | None) -> str:
    from diffusion_lens.results.stats import share_interval

    column = attribute.index(picture.view.target)
    k, n = _count(picture.after, column)
    low, high = share_interval(k, n) if n else (0.0, 1.0)
    width = f"{100 * (high - low):.0f} points"
    words = [
        f"{len(picture.after.images)} images show what the turn does, not how often: the interval is {width} wide."
    ]
    zero = len(attribute.classes) == 2 and any(
        _count(row, c)[0] == 0 for row in (picture.before, picture.after) for c in (0, 1)
    )
    if zero:
        words.append("* A count is zero, so ½ was added to both.")
    if stored is not None:
        share = stored.shares[column]
        low, high = share.corrected_interval
        words.append(
            f"The stored sweep counted {share.n} images at β = {stored.beta:g}: "
            f"<b>{share.corrected:.0%}</b> {escape(share.label)} ({low:.0%} to {high:.0%}, corrected for the "
            f"classifier's error, {share.n_uncertain} uncertain)."
        )
    if picture.activation_ratio is not None and abs(np.log(max(picture.activation_ratio, 1e-9))) > np.log(1.5):
        words.append(f"The bottleneck is now {picture.activation_ratio:.1f} × its usual size: expect odd images.")
    return "".join(f'<p class="dl-quiet">{w}</p>' for w in words)
