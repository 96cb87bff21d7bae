"""The live pane of a lesson: the same seeds before and after one turn, drawn now, shared by a class."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_lens.base.types import FeatureSet, Intervention, LensError
from diffusion_lens.steering.settings import control_intervention
from diffusion_lens.studio.learn import NOTHING, RANDOM, SET, Pane, Turn
from diffusion_lens.studio.recent import Recent
from diffusion_lens.studio.state import View
from diffusion_lens.studio.studio import Picture, Row, Studio

KEPT, KEPT_BYTES = 48, 16 * 2**20
"""Pictures of a class that are kept: thirty people turn the same few things."""


@dataclass(frozen=True)
class Wish:
    """What a visitor asks the live pane for: what is turned (``none``: nothing), how far, how many images, held."""

    key: str
    beta: float
    n: int
    hold: bool


def first_wish(pane: Pane) -> Wish:
    """What a pane opens with: the fewest images, nothing turned."""
    if not pane.turns:
        return Wish(NOTHING, 1.0, pane.counts[0], False)
    turn = pane.turns[0]
    return Wish(turn.key, turn.identity, pane.counts[0], False)


def read_wish(pane: Pane, raw: Any) -> Wish:
    """A wish as it comes from a page, checked; raises ``LensError``."""
    values = raw if isinstance(raw, Mapping) else {}
    n, beta, key = values.get("n"), values.get("beta"), str(values.get("key") or NOTHING)
    if n not in pane.counts:
        raise LensError(f"This station draws {' or '.join(map(str, pane.counts))} images.")
    if key == NOTHING:
        return Wish(NOTHING, 1.0, int(n), False)
    turn = pane.turn(key)
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not math.isfinite(beta):
        raise LensError("The strength must be a number.")
    if not turn.low <= beta <= turn.high:
        raise LensError(f"β must lie between {turn.low:g} and {turn.high:g}; it is {beta:g}.")
    return Wish(key, float(beta), int(n), bool(values.get("hold")) and bool(pane.hold))


def nearest_stored(studio: Studio, pane: Pane, wish: Wish) -> Picture | None:
    """What the lens stores at or near a wish, to be shown before anything is loaded; ``None`` where it has nothing."""
    if wish.key not in (SET, NOTHING):
        return None
    view = _view(studio, pane, wish)
    return studio.stored(view) if view.hold == studio.lens.setting(pane.attribute).hold or _idle(pane, wish) else None


class Live:
    """Draws wishes; safe from several threads."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._rows: Recent[Row] = Recent(KEPT, KEPT_BYTES)

    def draw(self, pane: Pane, wish: Wish, visitor: str) -> Picture:
        """Before and after on the same seeds; raises ``LensError`` and ``Cancelled`` as ``Studio.draw`` does."""
        view = _view(self._studio, pane, wish)
        if wish.key in (SET, NOTHING) or _idle(pane, wish):
            return self._studio.draw(view, visitor)
        before = self._studio.draw(view, visitor).before
        key: Hashable = (pane.prompt, pane.attribute, wish)
        after = self._rows.get(key)
        if after is None:
            turn = _intervention(self._studio, pane, wish)
            request = self._studio.lens.request(view.prompt, view.seeds)
            with self._studio.work(f"{visitor}:draw", urgent=True) as progress:
                images = self._studio.lens.generate(request, turn, batch_size=wish.n, progress=progress).images
                readings = self._studio.lens.classify(images)
            read = readings[pane.attribute]
            after = self._rows.put(key, Row(images, read.labels, read.certain, read.probs.max(axis=1), readings))
        return Picture(view, wish.beta, before, after, stored=False)


def turned(pane: Pane, wish: Wish) -> Turn | None:
    """What a wish turns; ``None`` where nothing."""
    return None if wish.key == NOTHING else pane.turn(wish.key)


def _idle(pane: Pane, wish: Wish) -> bool:
    turn = turned(pane, wish)
    return turn is None or wish.beta == turn.identity


def _view(studio: Studio, pane: Pane, wish: Wish) -> View:
    """The view of a wish; of a single feature or of random ones the strength is left out, and shown apart."""
    setting = studio.lens.setting(pane.attribute)
    beta = wish.beta if wish.key == SET else setting.identity
    stored = next((s for s in studio.lens.sweeps if s.request.prompt == pane.prompt), None)
    hold = setting.hold if not pane.hold else pane.hold if wish.hold else ()
    return View(
        pane.prompt, pane.attribute, pane.target, beta, setting.n_features, setting.sampler, setting.window,
        n_seeds=wish.n, first_seed=stored.request.seeds[0] if stored else 0, hold=hold,
    )  # fmt: skip


def _intervention(studio: Studio, pane: Pane, wish: Wish) -> Intervention:
    """One feature alone, as ``dissect`` turns it (scaled, asymmetric); or random features in place of the set."""
    lens = studio.lens
    if wish.key == RANDOM:
        whole = lens.intervention(pane.attribute, pane.target, wish.beta)
        return control_intervention(whole, "random", lens.atlas.activity, 0)
    feature = int(wish.key)
    alone = FeatureSet((feature,), (0.0,), pane.attribute, pane.target, lens.manifest.sae_id)
    return Intervention.at_beta(alone, "scale", wish.beta)
