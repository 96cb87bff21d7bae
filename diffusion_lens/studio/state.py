"""What a visitor asks to see, its checks, and its link."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from diffusion_lens.base.types import (
    LEFT,
    MAX_SEED,
    TURNED,
    EditSpec,
    FeatureSet,
    Intervention,
    LensError,
    Sampler,
    check_where,
    strength_of,
)
from diffusion_lens.base.where import Where, check_grid, from_link, to_link
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.steering.settings import Scale as Scale
from diffusion_lens.steering.settings import feature_sets
from diffusion_lens.steering.settings import scale as scale

LINK_VERSION = "1"
SEED_COUNTS = (8, 16)
MAX_PROMPT = 200
MAX_FEATURES = 200
MAX_OWN = 64
"""Features with a strength of their own."""

EMPTY_PROMPT = "(no words)"
"""What people see in place of the empty prompt."""


@dataclass(frozen=True)
class View:
    """Everything that decides the images on screen.

    Attributes:
        beta: strength of the whole set; ``own``: features turned apart from it, (id, strength of that feature itself).
        n_features: features per pole. window: half-open range of edited steps, ``None`` for all.
        hold: other attributes that the turn leaves alone.
        solo: features that alone are steered, each at its own strength or else at β; none: all of the set.
        where: the positions of the site's map that are steered, as ``Intervention.where``; ``None`` for all.
    """

    prompt: str | None
    attribute: str
    target: str
    beta: float
    n_features: int
    sampler: Sampler
    window: tuple[int, int] | None
    n_seeds: int = 8
    first_seed: int = 0
    own: tuple[tuple[int, float], ...] = ()
    hold: tuple[str, ...] = ()
    solo: tuple[int, ...] = ()
    where: Where | None = None

    @property
    def seeds(self) -> range:
        """The seeds drawn."""
        return range(self.first_seed, self.first_seed + self.n_seeds)


def shown_prompt(prompt: str) -> str:
    """A prompt as a field for it shows it."""
    return prompt or EMPTY_PROMPT


def read_prompt(lens: DiffusionLens, shown: str | None) -> str | None:
    """The prompt behind what a field shows, spaces tidied; ``None`` for models that take none."""
    if lens.prompts == (None,):
        return None
    text = " ".join(str(shown or "").split())
    return "" if text == EMPTY_PROMPT else text


def steerable(lens: DiffusionLens) -> tuple[str, ...]:
    """Attributes that can be turned at once: those with a shipped setting."""
    return tuple(a.name for a in lens.attributes if a.name in lens.settings)


def holdable(lens: DiffusionLens, attribute: str) -> tuple[str, ...]:
    """Attributes that a turn of ``attribute`` can leave alone: the others that the lens steers."""
    return tuple(name for name in steerable(lens) if name != attribute)


def default_view(lens: DiffusionLens, attribute: str | None = None) -> View:
    """What the app opens with: the prompt of the first stored sweep, its seeds, at the identity."""
    names = steerable(lens)
    if not names:
        raise LensError("This lens ships no setting to turn; fit it with at least one.")
    attribute = attribute or names[0]
    setting = lens.setting(attribute)
    stored = next((s for s in lens.sweeps if s.attribute.name == attribute and not s.is_control), None)
    prompt = stored.request.prompt if stored and stored.request.prompt in lens.prompts else lens.prompts[0]
    first = stored.request.seeds[0] if stored else 0
    return View(
        prompt, attribute, setting.target, setting.identity, setting.n_features, setting.sampler,
        setting.window, first_seed=first, hold=setting.hold,
    )  # fmt: skip


def check(lens: DiffusionLens, view: View) -> None:
    """Raise ``LensError``, one sentence for the visitor, where a view asks for what cannot be drawn."""
    check_prompt(lens, view.prompt)
    if view.attribute not in steerable(lens):
        raise LensError(f"This lens does not steer '{view.attribute}'; choose {', '.join(steerable(lens))}.")
    lens.attribute_named(view.attribute).index(view.target)
    ends = scale(lens.setting(view.attribute))
    for name, beta in (("β", view.beta), *((f"The strength of feature #{i}", b) for i, b in view.own)):
        if not (math.isfinite(beta) and ends.low <= beta <= ends.high):
            raise LensError(f"{name} must lie between {ends.low:g} and {ends.high:g}; it is {beta:g}.")
    if view.n_seeds not in SEED_COUNTS:
        raise LensError(f"Draw {' or '.join(map(str, SEED_COUNTS))} images at once; {view.n_seeds} were asked for.")
    if not 0 <= view.first_seed <= MAX_SEED - view.n_seeds:
        raise LensError("The first seed must be a whole number from 0 up.")
    d_sae = lens.atlas.density.size
    if not 1 <= view.n_features <= min(MAX_FEATURES, d_sae):
        raise LensError(f"Turn between 1 and {min(MAX_FEATURES, d_sae)} features per pole; it is {view.n_features}.")
    if any(not 0 <= i < d_sae for i in (*(i for i, _ in view.own), *view.solo)):
        raise LensError(f"This lens has features 0 to {d_sae - 1}.")
    if max(len(view.own), len(view.solo)) > MAX_OWN:
        raise LensError(f"Up to {MAX_OWN} features can have a strength of their own; here are {len(view.own)}.")
    if len({i for i, _ in view.own}) < len(view.own):
        raise LensError("A feature has one strength of its own, not two.")
    if view.where is not None:
        check_where(view.where)
        check_grid(view.where, grid(lens))
        if not any(TURNED in row for row in view.where):
            raise LensError("Nothing is painted, so nothing would be steered; paint a position, or steer everywhere.")
    n_steps = lens.manifest.n_steps
    if view.window is not None and not 0 <= view.window[0] < view.window[1] <= n_steps:
        raise LensError(f"The turned steps must start before they end, within steps 1 to {n_steps}.")
    if view.sampler not in ("asymmetric", "symmetric"):
        raise LensError(f"The sampler is asymmetric or symmetric, not '{view.sampler}'.")
    free = holdable(lens, view.attribute)
    strange = [name for name in view.hold if name not in free]
    if strange:
        raise LensError(f"'{strange[0]}' cannot be kept here; choose among {', '.join(free) or 'nothing'}.")


def grid(lens: DiffusionLens) -> tuple[int, int]:
    """Rows and columns of the site's map, which a brush paints on."""
    rows, columns = lens.atlas.heatmaps.shape[-2:]
    return int(rows), int(columns)


def check_prompt(lens: DiffusionLens, prompt: str | None) -> None:
    """Refuse words the model never saw, naming those it knows."""
    if prompt is None:
        return
    if len(prompt) > MAX_PROMPT:
        raise LensError(f"A prompt has at most {MAX_PROMPT} characters; this one has {len(prompt)}.")
    lens.check_words(prompt)


def poles(lens: DiffusionLens, view: View) -> tuple[FeatureSet, FeatureSet | None]:
    """The features turned together, and those turned the other way."""
    attribution = lens.attributions[view.attribute]
    return feature_sets(attribution, lens.setting(view.attribute), view.target, view.n_features)


def interventions(lens: DiffusionLens, view: View) -> tuple[Intervention, ...]:
    """What a view does to the model; empty where nothing would change."""
    setting = lens.setting(view.attribute)
    features, opposite = poles(lens, view)
    members = {*features.ids, *(opposite.ids if opposite else ())}
    strength = strength_of(setting.mode, view.beta)
    apart = {i: strength_of(setting.mode, beta) for i, beta in view.own}
    if view.solo:
        apart = {i: apart.get(i, strength if i in members else 0.0) for i in view.solo}
        strength = 0.0
    # Each feature's own strength is told of itself; the opposite pole mirrors what it is given.
    inside = {i: -s for i, s in apart.items() if opposite and i in opposite.ids}
    inside |= {i: s for i, s in apart.items() if i in features.ids}
    found = []
    if strength or any(inside.values()):
        found.append(
            Intervention(
                features, setting.mode, strength=strength, opposite=opposite, overrides=tuple(inside.items()),
                window=view.window, sampler=view.sampler, hold=view.hold, where=view.where,
            )
        )  # fmt: skip
    for i, own in apart.items():
        if i not in inside and own:
            alone = FeatureSet((i,), (0.0,), view.attribute, view.target, features.sae_id)
            found.append(
                Intervention(
                    alone, setting.mode, strength=own, window=view.window, sampler=view.sampler, hold=view.hold,
                    where=view.where,
                )
            )  # fmt: skip
    return tuple(found)


def edit_spec(lens: DiffusionLens, view: View) -> EditSpec | None:
    """The edit on screen as data, without what its probes are; ``None`` where nothing would change."""
    found = interventions(lens, view)
    return EditSpec(found) if found else None


def is_recommended(lens: DiffusionLens, view: View) -> bool:
    """Whether a view steers the lens's own set as it ships it, at whatever strength and towards whatever class."""
    setting = lens.setting(view.attribute)
    shipped = (setting.n_features, setting.sampler, setting.window, set(setting.hold))
    asked = (view.n_features, view.sampler, view.window, set(view.hold))
    return not (view.own or view.solo or view.where) and asked == shipped


def to_query(view: View) -> str:
    """A link's query string that opens this view again."""
    values: dict[str, Any] = {"v": LINK_VERSION}
    if view.prompt is not None:
        values["p"] = view.prompt
    values.update(a=view.attribute, t=view.target, b=f"{view.beta:g}", n=view.n_seeds, s=view.first_seed)
    values.update(k=view.n_features, m=view.sampler)
    values["w"] = "all" if view.window is None else f"{view.window[0]}-{view.window[1]}"
    if view.hold:
        values["h"] = ",".join(view.hold)
    if view.own:
        values["f"] = ",".join(f"{i}:{b:g}" for i, b in view.own)
    if view.solo:
        values["o"] = ",".join(map(str, view.solo))
    if view.where:
        values["x"] = to_link(view.where)
    return "?" + urlencode(values)


def from_query(lens: DiffusionLens, query: Mapping[str, str]) -> View | None:
    """The view that a link asks for; ``None`` if it asks for none. Raises ``LensError`` for a broken link."""
    if "v" not in query:
        return None
    if query["v"] != LINK_VERSION:
        raise LensError("This link was made by another version of the app; the opening view is shown instead.")
    try:
        view = _read_query(lens, query)
        check(lens, view)
    except (ValueError, KeyError, OverflowError) as error:
        reason = str(error) if isinstance(error, LensError) else "it is incomplete or damaged."
        raise LensError(f"This link cannot be opened: {reason} The opening view is shown instead.") from None
    return view


def _read_query(lens: DiffusionLens, query: Mapping[str, str]) -> View:
    attribute = query["a"]
    if attribute not in steerable(lens):
        raise LensError(f"this lens does not steer '{attribute[:40]}'.")
    base = default_view(lens, attribute)
    window = None
    if query["w"] != "all":
        first, stop = query["w"].split("-")
        window = (int(first), int(stop))
    own = tuple((int(i), float(b)) for i, b in (part.split(":") for part in query.get("f", "").split(",") if part))
    if len(own) > MAX_OWN or len({i for i, _ in own}) < len(own):
        raise LensError("it steers a feature twice, or too many.")
    solo = tuple(int(i) for i in query.get("o", "").split(",") if i)
    prompt = None if base.prompt is None else query["p"]
    hold = tuple(name for name in query.get("h", "").split(",") if name)
    if len(set(hold)) < len(hold):
        raise LensError("it keeps an attribute twice.")
    sampler: Any = query["m"]
    return View(
        prompt, attribute, query["t"], float(query["b"]), int(query["k"]), sampler, window,
        int(query["n"]), int(query["s"]), own, hold, solo, from_link(query["x"]) if "x" in query else None,
    )  # fmt: skip


def from_values(lens: DiffusionLens, values: Mapping[str, Any]) -> View:
    """The view that a page asks for by name, every value unchecked until here; raises ``LensError``, one sentence.

    Names are the fields of ``View``; ``own`` maps a feature's number, as text, to its strength. What is missing is as
    the attribute's recommended setting has it, at the strength that changes nothing.
    """
    if not isinstance(values, Mapping):
        raise LensError("The page asked for something that cannot be read; load it again.")
    base = default_view(lens, str(values.get("attribute") or steerable(lens)[0]))
    own, window = values.get("own") or {}, values.get("window")
    if not isinstance(own, Mapping) or not (window is None or (isinstance(window, list | tuple) and len(window) == 2)):
        raise LensError("The page asked for something that cannot be read; load it again.")
    view = View(
        prompt=read_prompt(lens, values["prompt"]) if "prompt" in values else base.prompt,
        attribute=base.attribute,
        target=str(values.get("target") or base.target),
        beta=as_strength(values.get("beta", base.beta), "β"),
        n_features=whole(values.get("n_features", base.n_features), "The number of features"),
        sampler=values.get("sampler", base.sampler),
        window=_window(lens, window),
        n_seeds=whole(values.get("n_seeds", base.n_seeds), "The number of images"),
        first_seed=whole(values.get("first_seed", base.first_seed), "The first seed"),
        own=tuple(
            (whole(i, "A feature's number"), as_strength(b, f"The strength of feature #{i}")) for i, b in own.items()
        ),
        hold=_in_order(values.get("hold", base.hold), holdable(lens, base.attribute)),
        solo=tuple(whole(i, "A feature's number") for i in _listed(values.get("solo"))),
        where=_painted(values.get("where")),
    )
    check(lens, view)
    return view


def to_values(view: View) -> dict[str, Any]:
    """A view as ``from_values`` reads it, as plain JSON values."""
    return {
        "prompt": None if view.prompt is None else shown_prompt(view.prompt),
        "attribute": view.attribute,
        "target": view.target,
        "beta": view.beta,
        "n_features": view.n_features,
        "sampler": view.sampler,
        "window": None if view.window is None else list(view.window),
        "n_seeds": view.n_seeds,
        "first_seed": view.first_seed,
        "own": {str(i): b for i, b in view.own},
        "hold": list(view.hold),
        "solo": list(view.solo),
        "where": None if view.where is None else list(view.where),
    }


def as_strength(value: Any, name: str) -> float:
    """A number, or one sentence that names what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LensError(f"{name} must be a number; it is '{str(value)[:40]}'.") from None


def whole(value: Any, name: str) -> int:
    """A whole number, or one sentence that names what is none."""
    number = as_strength(value, name)
    if not abs(number) < 2**63 or number != int(number):
        raise LensError(f"{name} must be a whole number; it is {str(value)[:40]}.")
    return int(number)


def _window(lens: DiffusionLens, window: Any) -> tuple[int, int] | None:
    if window is None:
        return None
    first, stop = whole(window[0], "The first step"), whole(window[1], "The last step")
    return None if (first, stop) == (0, lens.manifest.n_steps) else (first, stop)


def _painted(value: Any) -> Where | None:
    rows = tuple(str(row) for row in _listed(value))
    return rows if any(LEFT in row for row in rows) else None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _in_order(chosen: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """What is chosen, in the order of ``known``; strangers last, for the check to name."""
    names = [str(name) for name in _listed(chosen)]
    return (*(name for name in known if name in names), *(name for name in names if name not in known))
