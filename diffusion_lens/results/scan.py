"""Where in a model an attribute can be read and where it can be steered: the result of a scan, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError

Interval = tuple[float, float]
WORTH_A_PAIR = 0.1
"""By how much the weakest attribute must be steered further before two sites are recommended in place of one."""
MAX_CELLS = 100_000
NOWHERE = "No site moved an attribute further than random directions did; try a greater strength."


@dataclass(frozen=True)
class Steps:
    """Denoising steps ``first`` to ``stop - 1``, counted from 0 (pure noise)."""

    first: int
    stop: int

    @property
    def label(self) -> str:
        """As people count, from 1."""
        return f"{self.first + 1}–{self.stop}" if self.stop - self.first > 1 else f"{self.stop}"


@dataclass(frozen=True)
class ScanSite:
    """A place in the model: its name, channels, and the grid ``(y, x)`` of its positions."""

    name: str
    d_in: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class ScanAttribute:
    """What was looked for.

    Attributes:
        target: the class that steering goes towards. share: of the images as the model draws them, as read.
        n_read: images with a certain reading, which probes and directions were learned from.
    """

    name: str
    classes: tuple[str, ...]
    target: str
    share: float
    n_read: int


@dataclass(frozen=True)
class Reading:
    """How well a linear probe reads an attribute: balanced accuracy on images that it was not trained on.

    Attributes:
        interval: at 95 %.
        shuffled: mean over ``n_shuffles`` probes that were taught labels dealt out at random: chance, as this probe
            reaches it. shuffled_range: the lowest and the highest of them.
        n: images held out.
    """

    accuracy: float
    interval: Interval
    shuffled: float
    shuffled_range: Interval
    n_shuffles: int
    n: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval lies above every probe that was taught shuffled labels."""
        return self.interval[0] > self.shuffled_range[1]


@dataclass(frozen=True)
class Moved:
    """What adding a direction did on paired seeds.

    Attributes:
        change: of the target class's share among images decided both times; ``interval`` paired, 95 %.
        kept: mean over the other attributes of the share of images that kept their class.
        n: images decided both times. n_uncertain: edited images left undecided.
        ratio: mean ``|h'| / |h|`` over edited images and steps.
    """

    change: float
    interval: Interval
    kept: float
    n: int
    n_uncertain: int
    ratio: float


@dataclass(frozen=True)
class Steering:
    """The class-mean difference added at a site, and beside it a direction of the same length made of random halves."""

    direction: Moved
    control: Moved

    @property
    def is_sure(self) -> bool:
        """Whether the direction moved the share towards the target, and further than its control."""
        return self.direction.interval[0] > max(0.0, self.control.interval[1])

    @property
    def score(self) -> float:
        """How far it moves what it should beyond the control, times what it keeps (our working form); 0 if unsure."""
        if not self.is_sure:
            return 0.0
        return max(0.0, self.direction.change - max(0.0, self.control.change)) * self.direction.kept


@dataclass(frozen=True)
class Cell:
    """One attribute at one site and some steps (``steps``: index into ``Scan.steps``)."""

    attribute: str
    site: str
    steps: int
    reading: Reading | None
    steering: Steering


@dataclass(frozen=True)
class Recommendation:
    """Where to put a lens, and why, in words."""

    sites: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Scan:
    """Every attribute at every site and range of steps.

    Attributes:
        steps: ranges of steps; the last one is the whole run (nothing is read there: a probe reads one step).
        strength: by what the class-mean difference was multiplied.
        n_drawn: images that were read and learned from; n_steered: paired images per edit, on other seeds.
        errors: attribute → share of labelled images that the classifier reads wrongly (classes count alike).
    """

    model_id: str
    classifier_id: str
    prompt: str | None
    n_steps: int
    guidance_scale: float
    strength: float
    n_drawn: int
    n_steered: int
    first_seed: int
    steps: tuple[Steps, ...]
    sites: tuple[ScanSite, ...]
    attributes: tuple[ScanAttribute, ...]
    errors: dict[str, float]
    cells: tuple[Cell, ...]

    def __repr__(self) -> str:
        names = ", ".join(a.name for a in self.attributes)
        return f"Scan({self.model_id}: {len(self.sites)} sites, {len(self.steps)} ranges of steps; {names})"

    @cached_property
    def _by_place(self) -> dict[tuple[str, str, int], Cell]:
        return {(c.attribute, c.site, c.steps): c for c in self.cells}

    def cell(self, attribute: str, site: str, steps: int) -> Cell:
        """One cell; raises ``LensError`` where it was not measured."""
        try:
            return self._by_place[attribute, site, steps]
        except KeyError:
            raise LensError(f"This scan did not measure {attribute} at {site}.") from None

    def column(self, attribute: str, site: str) -> tuple[Cell, ...]:
        """All ranges of steps of one attribute at one site."""
        return tuple(self.cell(attribute, site, i) for i in range(len(self.steps)))

    def best(self, attribute: str, site: str) -> Cell:
        """The steps in which an attribute is steered best at a site (the whole run where none is sure)."""
        return max(reversed(self.column(attribute, site)), key=lambda cell: cell.steering.score)

    def reads_best(self, attribute: str) -> Cell:
        """Where a probe reads an attribute best."""
        read = [c for c in self.cells if c.attribute == attribute and c.reading is not None]
        if not read:
            raise LensError(f"This scan did not read {attribute}.")
        return max(read, key=lambda c: c.reading.accuracy if c.reading else 0.0)

    @cached_property
    def recommendation(self) -> Recommendation:
        """See ``recommend``."""
        return recommend(self)


def balanced_accuracy(labels: np.ndarray, read: np.ndarray, n_classes: int) -> tuple[float, Interval]:
    """Mean over classes of the share recognised, with a 95 % interval; classes that do not occur are left out.

    The interval joins the classes' own by squares of their margins (Newcombe's MOVER, as for differences of shares).
    ``labels, read int64 [n]``.
    """
    from diffusion_lens.results.stats import share_interval  # takes scipy, which reading a stored scan does not need

    rows = [(int((read[labels == c] == c).sum()), int((labels == c).sum())) for c in range(n_classes)]
    rows = [(right, n) for right, n in rows if n]
    if not rows:
        raise LensError("An accuracy needs at least one labelled image.")
    shares = np.array([right / n for right, n in rows])
    bounds = np.array([share_interval(right, n) for right, n in rows])
    below, above = np.sqrt(((shares - bounds[:, 0]) ** 2).sum()), np.sqrt(((bounds[:, 1] - shares) ** 2).sum())
    mean, k = float(shares.mean()), len(rows)
    return mean, (max(0.0, mean - float(below) / k), min(1.0, mean + float(above) / k))


def recommend(scan: Scan) -> Recommendation:
    """The site at which the attribute that moves least still moves furthest; two where that helps by a tenth or more.

    Scores are ``Steering.score``, each attribute in the steps that suit it best (our working form).
    """
    names, sites = [a.name for a in scan.attributes], [s.name for s in scan.sites]
    scores = np.array([[scan.best(name, site).steering.score for name in names] for site in sites])
    one = max(range(len(sites)), key=lambda i: (scores[i].min(), scores[i].mean()))
    pairs = [(_least_and_mean(scores, p), p) for p in combinations(range(len(sites)), 2)]
    chosen: tuple[int, ...] = (one,)
    if pairs:
        (least, _), pair = max(pairs)
        if least >= scores[one].min() + WORTH_A_PAIR:
            chosen = pair
    if not scores[list(chosen)].any():
        return Recommendation(
            (), "No site moved an attribute further than random directions did; try a greater strength."
        )
    picked = tuple(sites[i] for i in chosen)
    return Recommendation(picked, " ".join(_why(scan, name, picked) for name in names))


def _least_and_mean(scores: np.ndarray, pair: Sequence[int]) -> tuple[float, float]:
    """Over attributes, of the better of some sites; ``scores [site, attribute]``."""
    best = scores[list(pair)].max(axis=0)
    return float(best.min()), float(best.mean())


def _why(scan: Scan, name: str, sites: Sequence[str]) -> str:
    cell = max((scan.best(name, site) for site in sites), key=lambda c: c.steering.score)
    target = next(a.target for a in scan.attributes if a.name == name)
    own, control = cell.steering.direction, cell.steering.control
    where = f"at {cell.site}, steps {scan.steps[cell.steps].label}"
    if not cell.steering.is_sure:
        return f"{name.capitalize()}: nothing there moves it further than its control does."
    return (
        f"{name.capitalize()}: {where}, {target} {100 * own.change:+.0f} points "
        f"({100 * own.interval[0]:+.0f} to {100 * own.interval[1]:+.0f}; control {100 * control.change:+.0f}), "
        f"{100 * own.kept:.0f} % of the other attributes kept."
    )


def save_scan(found: Scan, path: Path) -> None:
    """Write one JSON file."""
    write_json(path, to_plain(found))


def load_scan(path: Path) -> Scan:
    """Read what ``save_scan`` wrote; raises ``LensError`` that names a bad file."""
    values: Any = read_json(path)
    try:
        found = TypeAdapter(Scan).validate_python(values)
        if len(found.cells) > MAX_CELLS:
            raise ValueError
        for attribute in found.attributes:
            for site in found.sites:
                found.column(attribute.name, site.name)
        if not (found.sites and found.attributes and found.steps):
            raise ValueError
    except (ValueError, LensError):
        raise LensError(f"{path} is not a stored scan; run scan --store again.") from None
    return found


def table(scan: Scan) -> list[dict[str, Any]]:
    """One row per cell, plain values: for tables, CSV and data frames."""
    targets = {a.name: a.target for a in scan.attributes}
    return [
        {
            "attribute": c.attribute,
            "site": c.site,
            "steps": scan.steps[c.steps].label,
            **_read_columns(c.reading),
            "target": targets[c.attribute],
            **_moved_columns("", c.steering.direction),
            **_moved_columns("control ", c.steering.control),
            "sure": c.steering.is_sure,
        }
        for c in scan.cells
    ]


def _read_columns(reading: Reading | None) -> dict[str, Any]:
    if reading is None:
        return dict.fromkeys(("accuracy", "accuracy low", "accuracy high", "shuffled labels", "held out"))
    low, high = reading.interval
    return {
        "accuracy": reading.accuracy, "accuracy low": low, "accuracy high": high,
        "shuffled labels": reading.shuffled, "held out": reading.n,
    }  # fmt: skip


def _moved_columns(prefix: str, moved: Moved) -> dict[str, Any]:
    return {
        f"{prefix}change": moved.change, f"{prefix}low": moved.interval[0], f"{prefix}high": moved.interval[1],
        f"{prefix}kept": moved.kept, f"{prefix}n": moved.n, f"{prefix}undecided": moved.n_uncertain,
    }  # fmt: skip
