"""Evidence cards of SAE features, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from diffusion_lens.base.types import Examples, FeatureCard
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.dissection import Dissection, FeatureEffect, effects_of, is_sure
from diffusion_lens.studio.pictures import data_uri, spotlight
from diffusion_lens.studio.state import View, poles

N_SLOTS = 6
THUMBS = 3


def slots(lens: DiffusionLens, view: View, pinned: int | None = None) -> tuple[int, ...]:
    """The features shown as cards: the strongest of each pole in turn, a pinned one first."""
    features, opposite = poles(lens, view)
    own = list(features.ids)
    other = list(opposite.ids) if opposite else []
    half = N_SLOTS // 2 if other else N_SLOTS
    shown = [*own[:half], *other[: N_SLOTS - min(half, len(own))]]
    moved = [i for i, _ in view.own if i not in shown]
    first = [pinned, *moved] if pinned is not None and pinned not in moved else moved
    keep = [i for i in shown if i not in first]
    return tuple([*first[:N_SLOTS], *keep][:N_SLOTS])


def role(lens: DiffusionLens, view: View, feature: int) -> str:
    """What the set does with a feature: ``target``, ``opposite`` or ``apart``."""
    features, opposite = poles(lens, view)
    if feature in features.ids:
        return "target"
    return "opposite" if opposite and feature in opposite.ids else "apart"


def small_card(lens: DiffusionLens, view: View, feature: int) -> str:
    """A card for the strip in Explore."""
    card = lens.card(feature)
    part = role(lens, view, feature)
    other = lens.attribute_named(view.attribute).opposite(view.target)
    # Of three classes or more, the opposite pole speaks against the target: its ranks run from the other end.
    against = part == "opposite" and other is None
    label = other if part == "opposite" and other else view.target
    tag = "from the atlas" if part == "apart" else f"speaks {'against' if against else 'for'} {label}"
    totals = lens.attributions[view.attribute].total(label) * (-1 if against else 1)
    score = float(totals[feature])
    share = float(np.clip(score / max(float(totals.max()), 1e-12), 0, 1))
    place = f"rank {1 + int((totals > score).sum())}"
    return (
        f'<article class="dl-card dl-{part}" aria-label="Feature {feature}, {escape(tag)}">'
        f'<header><b>#{feature}</b><span class="dl-tag">{escape(tag)}</span></header>'
        f"{_label(card)}{thumbs(card.top, THUMBS, feature)}"
        f'<div class="dl-meter" role="img" aria-label="Attribution {score:.3g}, {place}">'
        f'<i style="width:{share:.0%}"></i></div>'
        f"<p><span>{place}</span><span>fires on {_percent(card.density)}</span></p></article>"
    )


def empty_card() -> str:
    """The place of a card where there is no feature left."""
    return '<article class="dl-card dl-none">no further feature</article>'


def large_card(lens: DiffusionLens, feature: int) -> str:
    """Everything the atlas knows of one feature."""
    card = lens.card(feature)
    fires = "It never fires on the images of the atlas (dead)." if card.dead else (
        f"It fires on {_percent(card.density)} of positions, images and steps."
    )  # fmt: skip
    parts = [
        f'<article class="dl-large" aria-label="Feature {feature}"><h2>Feature #{feature}</h2>{_label(card)}',
        f"<p>{fires}</p>",
        _gallery("Strongest on", card.top, feature),
        _gallery("Also fires on, drawn at random", card.random, feature),
        _gallery("Just misses", card.near, feature),
        _attribution_table(card),
        effects_html(lens, card),
        "</article>",
    ]
    return "".join(parts)


def thumbs(examples: Examples, n: int, feature: int) -> str:
    """The first ``n`` images, lit where the feature fires."""
    if not len(examples.images):
        return '<p class="dl-quiet">no example image</p>'
    heat = len(examples.heatmaps) == len(examples.images)
    pictures = []
    for i, image in enumerate(examples.images[:n]):
        lit = spotlight(image, examples.heatmaps[i]) if heat else image
        where = _where(examples.heatmaps[i]) if heat else ""
        alt = f"Example {i + 1} of feature {feature}{where}"
        pictures.append(f'<img src="{data_uri(lit)}" alt="{alt}" decoding="sync">')
    return f'<div class="dl-thumbs">{"".join(pictures)}</div>'


def _gallery(title: str, examples: Examples, feature: int) -> str:
    if not len(examples.images):
        return ""
    return f"<h3>{title}</h3>{thumbs(examples, 8, feature)}"


def _label(card: FeatureCard) -> str:
    if not card.label:
        return '<p class="dl-label dl-quiet">no label</p>'
    return f'<p class="dl-label" title="{escape(card.label_source)}">{escape(card.label)}</p>'


def _where(heat: np.ndarray) -> str:
    """In words, where a heatmap is highest."""
    heat = np.nan_to_num(np.asarray(heat, dtype=np.float32))
    if heat.max(initial=0) <= 0:
        return ""
    y, x = np.unravel_index(int(heat.argmax()), heat.shape)
    rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
    row, column = rows[int(3 * y / heat.shape[0])], columns[int(3 * x / heat.shape[1])]
    return f", strongest at the {row} {column}"


def _attribution_table(card: FeatureCard) -> str:
    rows = [
        f"<tr><th scope='row'>{escape(attribute)}: {escape(label)}</th><td>{score:+.4f}</td>"
        f"<td>{card.rank[attribute][label]}</td></tr>"
        for attribute, scores in card.attribution.items()
        for label, score in scores.items()
    ]
    return (
        "<h3>Attribution to each class</h3><table><thead><tr><th scope='col'>class</th>"
        f"<th scope='col'>attribution</th><th scope='col'>rank</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def effects_html(lens: DiffusionLens, card: FeatureCard) -> str:
    """What turning this feature alone changes, attribute by attribute: sure effects first, all others folded away."""
    title = "<h3>Effect when it alone is turned</h3>"
    found = lens.dissection
    own = effects_of(found, card.id) if found is not None else ()
    if found is None or not own:
        return title + _untested(lens, card)
    sure = [e for e in own if is_sure(found, e)]
    quiet = [name for name in found.classes if name not in {e.attribute for e in sure}]
    if not np.isfinite([e.q_value for e in own]).any():
        said = f"It never fires on these {found.n} images, so turning it changes nothing in them."
    elif not sure:
        said = f"Nothing that the classifier reads moved for sure on {found.n} paired images."
    else:
        said = f"Nothing sure on {', '.join(quiet)}." if quiet else ""
    rest = [e for e in own if e not in sure and np.isfinite(e.difference)]
    return (
        f"{title}{_effect_table(sure, 'moved for sure') if sure else ''}<p>{escape(said)}</p>"
        f"<details class='dl-table'><summary>All {len(own)} effects measured</summary>"
        f"{_effect_table([*sure, *rest], 'points, 95 % interval')}</details>"
        f'<p class="dl-quiet">{escape(_how(found))}</p>'
    )


def _untested(lens: DiffusionLens, card: FeatureCard) -> str:
    """Effects that the fit measured without a test, or how to measure them."""
    if not card.effects:
        found = lens.dissection
        many = "" if found is None else f" {len(found.ids())} other features were: see “Show” above the map."
        return f'<p class="dl-quiet">Not measured for this feature; turn it in Explore.{many}</p>'
    known = [
        f"<tr><th scope='row'>{escape(attribute)}: {escape(label)}</th><td>{100 * change:+.0f} points</td></tr>"
        for attribute, changes in card.effects.items()
        for label, change in changes.items()
        if np.isfinite(change) and abs(change) >= 0.005
    ]
    body = f"<table><tbody>{''.join(known)}</tbody></table>" if known else "<p>No share moved by half a point.</p>"
    source = f"{card.effect_source}; without a test of chance." if card.effect_source else ""
    return f'{body}<p class="dl-quiet">{escape(source)}</p>'


def _effect_table(effects: Sequence[FeatureEffect], title: str) -> str:
    rows = [
        f"<tr><th scope='row'>{escape(e.attribute)}: {escape(e.label)}</th><td>{e.beta:g}</td><td>{_points(e)}</td>"
        f"<td>{_q(e)}</td></tr>"
        for e in sorted(effects, key=lambda e: -abs(np.nan_to_num(e.difference)))
    ]
    return (
        f"<div class='dl-scroll' tabindex='0'><table><thead><tr><th scope='col'>{escape(title)}</th>"
        "<th scope='col'>β</th><th scope='col'>points (95 %)</th><th scope='col'>q</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _points(effect: FeatureEffect) -> str:
    low, high = effect.interval
    return f"{100 * effect.difference:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


def _q(effect: FeatureEffect) -> str:
    if np.isnan(effect.q_value):
        return "not tested"
    return "&lt; 0.001" if effect.q_value < 0.001 else f"{effect.q_value:.3f}"


def _how(found: Dissection) -> str:
    return (
        f"{found.source[:1].upper()}{found.source[1:]}; McNemar's test on paired seeds, false discovery rate "
        f"{found.alpha:.0%} over all features and classes."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
