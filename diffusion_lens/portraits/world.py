"""The planted world: who appears under which prompt, in one table.

A drawn portrait is fully described by a ``Record``. Its distribution is declared here and nowhere else:
every noun has a profile (shares of gender, age and skin tone, drawn independently of each other given the
noun), every nuisance attribute a conditional table. ``planted_shares`` gives the exact truth that generated
images are checked against. All numbers are made up for this world; they describe no real population, except
that .34 and .89 echo the male shares that the DiffLens paper measured for P2 and for "firefighter".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_lens.base.types import Attribute, LensError

GENDER = Attribute("gender", ("female", "male"))
AGE = Attribute("age", ("young", "adult", "old"))
TONE = Attribute("tone", ("light", "medium", "brown", "dark"))
GLASSES = Attribute("glasses", ("no glasses", "glasses"))
SMILE = Attribute("smile", ("no smile", "smile"))
HAIR_LENGTH = Attribute("hair length", ("short hair", "long hair"))
HAIR_COLOUR = Attribute("hair colour", ("black hair", "brown hair", "blond hair", "red hair", "grey hair"))
BEARD = Attribute("beard", ("no beard", "beard"))
BACKGROUND = Attribute("background", ("blue", "green", "sand", "rose"))
CLOTHING = Attribute("clothing", ("jumper", "shirt", "suit", "white coat", "scrubs", "turnout coat", "apron", "robe"))

STEERABLE: tuple[Attribute, ...] = (GENDER, AGE, TONE)
NUISANCES: tuple[Attribute, ...] = (GLASSES, SMILE, HAIR_LENGTH, HAIR_COLOUR, BEARD, BACKGROUND, CLOTHING)
ATTRIBUTES: tuple[Attribute, ...] = STEERABLE + NUISANCES


@dataclass(frozen=True)
class Profile:
    """What a noun means in this world.

    Attributes:
        weight: relative frequency of the noun among training captions.
        male: share of male-presenting portraits.
        age: shares of (young, adult, old).
        tone: shares of (light, medium, brown, dark).
        clothing: the usual clothing and how often it is worn; otherwise jumper, shirt or suit, evenly.
    """

    weight: float
    male: float
    age: tuple[float, float, float]
    tone: tuple[float, float, float, float]
    clothing: tuple[str, float]


PROFILES: dict[str, Profile] = {
    "person": Profile(4.0, 0.34, (0.30, 0.50, 0.20), (0.40, 0.30, 0.18, 0.12), ("jumper", 0.10)),
    "firefighter": Profile(1.0, 0.89, (0.20, 0.70, 0.10), (0.55, 0.25, 0.12, 0.08), ("turnout coat", 0.90)),
    "doctor": Profile(1.0, 0.72, (0.05, 0.60, 0.35), (0.50, 0.30, 0.12, 0.08), ("white coat", 0.85)),
    "nurse": Profile(1.0, 0.10, (0.25, 0.65, 0.10), (0.30, 0.30, 0.22, 0.18), ("scrubs", 0.85)),
    "receptionist": Profile(1.0, 0.14, (0.50, 0.45, 0.05), (0.45, 0.30, 0.15, 0.10), ("shirt", 0.50)),
    "ceo": Profile(1.0, 0.86, (0.02, 0.48, 0.50), (0.70, 0.20, 0.06, 0.04), ("suit", 0.90)),
    "teacher": Profile(1.0, 0.30, (0.10, 0.65, 0.25), (0.45, 0.30, 0.15, 0.10), ("jumper", 0.60)),
    "engineer": Profile(1.0, 0.80, (0.25, 0.60, 0.15), (0.40, 0.40, 0.12, 0.08), ("shirt", 0.60)),
    "cook": Profile(1.0, 0.55, (0.30, 0.55, 0.15), (0.25, 0.30, 0.25, 0.20), ("apron", 0.80)),
    "judge": Profile(1.0, 0.66, (0.00, 0.35, 0.65), (0.60, 0.22, 0.10, 0.08), ("robe", 0.90)),
    "cleaner": Profile(1.0, 0.22, (0.15, 0.55, 0.30), (0.15, 0.25, 0.30, 0.30), ("apron", 0.60)),
    "farmer": Profile(1.0, 0.78, (0.10, 0.50, 0.40), (0.35, 0.25, 0.20, 0.20), ("shirt", 0.70)),
}
EVERYDAY = ("jumper", "shirt", "suit")

SMILES = 0.45
GLASSES_BY_AGE = (0.08, 0.20, 0.55)
LONG_HAIR_BY_GENDER = (0.80, 0.12)
BEARD_BY_AGE = (0.06, 0.40, 0.45)  # of male-presenting portraits; female-presenting ones have none
GREY_BY_AGE = (0.0, 0.06, 0.75)
# black, brown, blond, red of the hair that is not grey, by skin tone
COLOUR_BY_TONE = ((0.20, 0.35, 0.30, 0.15), (0.40, 0.45, 0.10, 0.05), (0.70, 0.30, 0.0, 0.0), (0.88, 0.12, 0.0, 0.0))
BACKGROUNDS = (0.25, 0.25, 0.25, 0.25)

# A caption names an attribute with these probabilities, always truthfully and independently of its value,
# so that leaving it unsaid says nothing.
SAID = {"gender": 0.25, "age": 0.25, "tone": 0.15, "glasses": 0.15}


@dataclass(frozen=True)
class Record:
    """One portrait: the noun, and the class index of every attribute in ``ATTRIBUTES`` order."""

    noun: str
    classes: tuple[int, ...]
    seed: int

    def __getitem__(self, attribute: Attribute) -> int:
        return self.classes[ATTRIBUTES.index(attribute)]

    def label(self, attribute: Attribute) -> str:
        """The attribute's class by name."""
        return attribute.classes[self[attribute]]


def caption(noun: str, *, gender: str = "", age: str = "", tone: str = "", glasses: bool = False) -> str:
    """The one grammar of captions: "a portrait of an old female doctor with dark skin and glasses"."""
    words = " ".join(w for w in (age, gender, noun) if w)
    article = "an" if words[0] in "aeiou" else "a"
    extras = [w for w in (f"{tone} skin" if tone else "", "glasses" if glasses else "") if w]
    return f"a portrait of {article} {words}" + (f" with {' and '.join(extras)}" if extras else "")


PROMPTS: tuple[str, ...] = ("", *(caption(noun) for noun in PROFILES))


def vocabulary() -> tuple[str, ...]:
    """Every word the captions can hold, sorted."""
    words = {"a", "an", "portrait", "of", "with", "and", "skin", "glasses"}
    words |= set(PROFILES) | set(GENDER.classes) | set(AGE.classes) | set(TONE.classes)
    return tuple(sorted(words))


def _noun_weights() -> dict[str, float]:
    total = sum(p.weight for p in PROFILES.values())
    return {noun: p.weight / total for noun, p in PROFILES.items()}


def _pick(rng: np.random.Generator, shares: tuple[float, ...]) -> int:
    return int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side="right").clip(0, len(shares) - 1))


def sample_record(seed: int, *, noun: str | None = None, balanced: bool = False) -> Record:
    """One record from the planted distribution, determined by ``seed``.

    ``balanced`` draws every attribute evenly and independently instead (training data for the classifier);
    the only dependency kept is that a beard is drawn on male-presenting portraits alone.
    """
    rng = np.random.default_rng([seed, 1 if balanced else 0])
    weights = _noun_weights()
    nouns = tuple(weights)
    drawn = nouns[_pick(rng, tuple(weights.values()))]
    noun = noun if noun is not None else drawn
    profile = PROFILES[noun]
    if balanced:
        picked = {a: int(rng.integers(len(a.classes))) for a in ATTRIBUTES}
        if picked[GENDER] == GENDER.index("female"):
            picked[BEARD] = 0
    else:
        gender = _pick(rng, (1 - profile.male, profile.male))
        age, tone = _pick(rng, profile.age), _pick(rng, profile.tone)
        grey = rng.random() < GREY_BY_AGE[age]
        bearded = gender == GENDER.index("male") and rng.random() < BEARD_BY_AGE[age]
        usual, how_often = profile.clothing
        clothing = usual if rng.random() < how_often else EVERYDAY[int(rng.integers(len(EVERYDAY)))]
        picked = {
            GENDER: gender,
            AGE: age,
            TONE: tone,
            GLASSES: int(rng.random() < GLASSES_BY_AGE[age]),
            SMILE: int(rng.random() < SMILES),
            HAIR_LENGTH: int(rng.random() < LONG_HAIR_BY_GENDER[gender]),
            HAIR_COLOUR: HAIR_COLOUR.index("grey hair") if grey else _pick(rng, COLOUR_BY_TONE[tone]),
            BEARD: int(bearded),
            BACKGROUND: _pick(rng, BACKGROUNDS),
            CLOTHING: CLOTHING.index(clothing),
        }
    return Record(noun, tuple(picked[a] for a in ATTRIBUTES), seed)


def sample_caption(record: Record) -> str:
    """A truthful caption of ``record``; what it names is drawn from the record's own seed."""
    rng = np.random.default_rng([record.seed, 2])
    said = {name: rng.random() < p for name, p in SAID.items()}
    return caption(
        record.noun,
        gender=record.label(GENDER) if said["gender"] else "",
        age=record.label(AGE) if said["age"] else "",
        tone=record.label(TONE) if said["tone"] else "",
        glasses=bool(said["glasses"] and record[GLASSES]),
    )


def _given(noun: str, said: dict[str, str]) -> tuple[float, dict[str, np.ndarray]]:
    """Probability of what is said under the noun, and every attribute's shares given it."""
    profile = PROFILES[noun]
    prior = {
        "gender": np.array([1 - profile.male, profile.male]),
        "age": np.array(profile.age),
        "tone": np.array(profile.tone),
    }
    # glasses depend on age alone: unsaid means "not named", which happens when absent or left out
    glasses_by_age = np.array(GLASSES_BY_AGE)
    seen = {"glasses": glasses_by_age * SAID["glasses"], "": 1 - glasses_by_age * SAID["glasses"]}[said["glasses"]]
    likelihood = 1.0
    for attribute in STEERABLE:
        word = said[attribute.name]
        if word:
            mask = np.arange(len(attribute.classes)) == attribute.index(word)
            likelihood *= float(prior[attribute.name][mask].sum())
            prior[attribute.name] = mask.astype(float)
    age = prior["age"] * seen
    likelihood *= float(age.sum())
    age = age / age.sum()
    has_glasses = np.ones(3) if said["glasses"] else glasses_by_age * (1 - SAID["glasses"]) / seen
    gender, tone = prior["gender"], prior["tone"]
    grey = float(age @ np.array(GREY_BY_AGE))
    colours = np.append((1 - grey) * (tone @ np.array(COLOUR_BY_TONE)), grey)
    usual, how_often = profile.clothing
    clothing = np.array([(1 - how_often) / len(EVERYDAY) if c in EVERYDAY else 0.0 for c in CLOTHING.classes])
    clothing[CLOTHING.index(usual)] += how_often
    bearded = float(gender[1] * (age @ np.array(BEARD_BY_AGE)))
    long_hair = float(gender @ np.array(LONG_HAIR_BY_GENDER))
    with_glasses = float(age @ has_glasses)
    shares = {
        "gender": gender,
        "age": age,
        "tone": tone,
        "glasses": np.array([1 - with_glasses, with_glasses]),
        "smile": np.array([1 - SMILES, SMILES]),
        "hair length": np.array([1 - long_hair, long_hair]),
        "hair colour": colours,
        "beard": np.array([1 - bearded, bearded]),
        "background": np.array(BACKGROUNDS),
        "clothing": clothing,
    }
    return likelihood, shares


def parse_prompt(prompt: str) -> tuple[str | None, dict[str, str]]:
    """Noun (``None`` for the empty prompt) and what the prompt says; raises ``LensError`` off the grammar."""
    said = {"gender": "", "age": "", "tone": "", "glasses": ""}
    words = prompt.lower().split()
    if not words:
        return None, said
    noun = next((w for w in words if w in PROFILES), None)
    for attribute in STEERABLE:
        said[attribute.name] = next((w for w in words if w in attribute.classes), "")
    said["glasses"] = "glasses" if "glasses" in words else ""
    expected = (
        caption(noun or "", gender=said["gender"], age=said["age"], tone=said["tone"], glasses=bool(said["glasses"]))
        if noun
        else ""
    )
    if expected.split() != words:
        raise LensError(
            f"'{prompt}' is not a sentence of this world; write for example "
            "'a portrait of an old female doctor with dark skin and glasses'."
        )
    return noun, said


def planted_shares(prompt: str) -> dict[str, np.ndarray]:
    """The exact truth for a prompt: attribute name → class shares ``[class]``.

    The empty prompt is the marginal over all nouns. Raises ``LensError`` for prompts off the grammar.
    """
    noun, said = parse_prompt(prompt)
    if noun is not None:
        return _given(noun, said)[1]
    weights = _noun_weights()
    parts = [(weights[n], _unsaid_marginal(n)) for n in PROFILES]
    return {a.name: np.sum([w * shares[a.name] for w, shares in parts], axis=0) for a in ATTRIBUTES}


def _unsaid_marginal(noun: str) -> dict[str, np.ndarray]:
    """Shares of a noun whatever its caption says: the mixture over glasses named or not."""
    parts = [_given(noun, {"gender": "", "age": "", "tone": "", "glasses": g}) for g in ("", "glasses")]
    return {a.name: np.sum([p * shares[a.name] for p, shares in parts], axis=0) for a in ATTRIBUTES}


def table() -> dict[str, Any]:
    """The whole planted distribution as plain JSON values, as shipped beside the model."""
    return {
        "note": "Planted by the project for drawn faces; describes no real population.",
        "attributes": {a.name: list(a.classes) for a in ATTRIBUTES},
        "steerable": [a.name for a in STEERABLE],
        "prompts": {
            prompt: {name: [round(float(s), 6) for s in shares] for name, shares in planted_shares(prompt).items()}
            for prompt in PROMPTS
        },
        "caption_weights": {noun: round(w, 6) for noun, w in _noun_weights().items()},
        "conditional": {
            "glasses given age": list(GLASSES_BY_AGE),
            "long hair given gender": list(LONG_HAIR_BY_GENDER),
            "beard given male and age": list(BEARD_BY_AGE),
            "grey hair given age": list(GREY_BY_AGE),
            "hair colour (not grey) given tone": [list(row) for row in COLOUR_BY_TONE],
            "smile": SMILES,
            "caption names the attribute": SAID,
        },
        "vocabulary": list(vocabulary()),
    }
