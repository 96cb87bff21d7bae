"""Plain words for what is drawn and steered: people of a class, shares in ten, what a feature does."""

from __future__ import annotations

from diffusion_lens.base.types import FeatureCard
from diffusion_lens.results.dissection import FeatureEffect
from diffusion_lens.studio.feature_rows import FeatureRow
from diffusion_lens.studio.state import EMPTY_PROMPT
from diffusion_lens.studio.studio import Picture

PEOPLE = {
    ("gender", "male"): "men", ("gender", "female"): "women", ("age", "young"): "young people",
    ("age", "adult"): "adults", ("age", "old"): "old people", ("tone", "light"): "people with light skin",
    ("tone", "medium"): "people with medium skin", ("tone", "brown"): "people with brown skin",
    ("tone", "dark"): "people with dark skin",
}  # fmt: skip
"""(attribute, class) → people whom an image classifier reads so; the bundled lenses' and most others' names."""

ONE = {
    ("gender", "male"): "man", ("gender", "female"): "woman", ("tone", "light"): "light skin",
    ("tone", "medium"): "medium skin", ("tone", "brown"): "brown skin", ("tone", "dark"): "dark skin",
}  # fmt: skip

ATTRIBUTES = {"gender": "perceived gender presentation", "age": "perceived age", "tone": "perceived skin tone"}
PORTRAIT = "a portrait of "
ACRONYMS = {"ceo": "CEO"}


def people(attribute: str, label: str) -> str:
    """People of a class: ``men``; for unknown classes ``images read as blond``."""
    return PEOPLE.get((attribute, label), f"images read as {label}")


def one(attribute: str, label: str) -> str:
    """One image of a class, under it: ``man``."""
    return ONE.get((attribute, label), label)


def now(attribute: str, label: str) -> str:
    """What stands under an image that changed: ``now a man``, ``now old``."""
    article = "a " if (attribute, label) in ONE and attribute == "gender" else ""
    return f"now {article}{one(attribute, label)}"


def attribute_name(attribute: str) -> str:
    """An attribute as people should read it."""
    return ATTRIBUTES.get(attribute, attribute)


def subject(prompt: str) -> str:
    """A prompt as the sentence names it: ``a nurse`` for "a portrait of a nurse"."""
    if prompt in ("", EMPTY_PROMPT):
        return "nothing in particular"
    if not prompt.startswith(("a portrait of a ", "a portrait of an ")):
        return f"“{prompt}”"
    return " ".join(ACRONYMS.get(word, word) for word in prompt.removeprefix(PORTRAIT).split())


def in_ten(attribute: str, label: str, share: float) -> str:
    """A share in words: ``9 women in 10``."""
    named, tenths = people(attribute, label), round(10 * share)
    if tenths >= 10:
        return f"almost only {named}"
    if (attribute, label) in PEOPLE:
        return f"{tenths} {named} in 10" if " " not in named else f"{tenths} in 10 {named}"
    return f"{tenths} in 10 {named}"


def feature_name(card: FeatureCard, effect: FeatureEffect | None) -> str:
    """What a feature does, as it was measured or guessed."""
    if effect is not None:
        return effect_name(effect)
    return f"Fires on {card.label}" if card.label else "No name yet"


def effect_name(effect: FeatureEffect) -> str:
    """A measured effect of a feature alone, with the strength it was measured at: ``At −4: more women (44 in 100)``."""
    name = effect.attribute
    if name in ATTRIBUTES:
        label = people(name, effect.label)
    else:  # "long hair" says of what it is, "blue" does not
        told = set(name.split()) & set(effect.label.split())
        label = effect.label if told else f"{effect.label} ({name})"
    return f"At {strength(effect.beta)}: more {label} ({100 * effect.difference:.0f} in 100)"


def strength(beta: float) -> str:
    """A strength as people read it: ``−4``."""
    return f"{beta:g}".replace("-", "−")


def sought(effect: FeatureEffect) -> str:
    """What a search for words looks into, of one effect."""
    return f"{effect.attribute} {effect.label} {people(effect.attribute, effect.label)}".lower()


def feature_says(row: FeatureRow, attribute: str) -> str:
    """The line under a row's name: which way it pushes, how often it fires, whether its name is a guess."""
    named = people(attribute, row.pushes)
    pushes = {
        "target": f"pushes towards {named}",
        "opposite": f"pushes {'away from' if row.against else 'towards'} {named}",
    }.get(row.role, "added by you")
    told = [pushes, f"fires on {rate(row.card.density)}"]
    if row.effect is None and row.card.label:
        told.append("a guess from images")
    return " · ".join(told)


def alone(picture: Picture) -> str:
    """What one feature alone changed in the images of a view: ``alone at 3, here: 2 of 8 now men; smile 3 of 8``."""
    view, before, after = picture.view, picture.before, picture.after
    head = f"alone at {strength(view.own[0][1])}, here: "
    target = after.readings[view.attribute].attribute.index(view.target)
    new = after.certain & (after.labels == target) & ~(before.certain & (before.labels == target))
    told = [f"{int(new.sum())} of {len(new)} now {people(view.attribute, view.target)}"] if new.any() else []
    moved = []
    for name, read in after.readings.items():
        was = before.readings[name]
        n = int((read.certain & was.certain & (read.labels != was.labels)).sum())
        if n and not (name == view.attribute and told):
            moved.append((n, f"{name} {n} of {len(new)}"))
    told += [text for _, text in sorted(moved, key=lambda pair: -pair[0])[:2]]
    return head + ("; ".join(told) or f"nothing changed in {len(new)}")


def rate(share: float) -> str:
    """``5.7 %``, ``16 %``."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
