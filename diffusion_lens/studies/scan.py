"""The scan: for every site of a model and every range of denoising steps, how well an attribute is read there and how
far it can be steered from there, each against its control.

Reading and steering are different things: a probe finds what is there, steering needs what is used. So both are
measured. Images of one prompt are drawn and read by the classifier; per site and step a linear probe is trained on one
half of them and tested on the other, and the mean activation of a class minus that of the others is what is added on
new seeds (our working form; class means as in Latent Editing's mean-difference form).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import load_tensors, save_tensors
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, EditSpec, GenerationRequest, LensError, Predictions, Sampler
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.features.train_probe import train_probe
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.measuring.observe import Baseline, observe, observe_baseline
from diffusion_lens.model.denoise import Capture, StepContext
from diffusion_lens.model.generate import generate_batches, request
from diffusion_lens.model.pipelines import DiffusionModel, at_site, candidate_sites
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.scan import (
    Cell,
    Moved,
    Reading,
    Scan,
    ScanAttribute,
    ScanSite,
    Steering,
    Steps,
    balanced_accuracy,
)
from diffusion_lens.results.stats import error_rates

MIN_PER_CLASS = 8
"""Certain images of a class below which it is neither a target nor read."""
PROBE_GRID = 8
"""A probe reads a site's map averaged down to at most so many positions a side: larger ones hold too many numbers."""
SHUFFLES = 5
"""Probes taught shuffled labels: one alone may by chance lie along what the activations differ in most."""
STEER_SEEDS_AFTER = 1_000_000
"""Steered images take their seeds from here on, after those that directions were learned from."""


class ScanConfig(StrictConfig):
    """What is scanned.

    Attributes:
        prompt: of all images, learned from and steered; ``None`` for models without prompts.
        attributes: to look for. targets: attribute → the class to steer towards; the rarest with enough examples by
            default. sites: by name; those of ``candidate_sites`` by default.
        n_ranges: equal ranges that the steps are cut into; the whole run is measured beside them.
        n_drawn: images to learn from; n_steered: paired images per edit.
        strength: what the class-mean difference is multiplied by.
    """

    prompt: str | None
    attributes: tuple[str, ...] = Field(min_length=1)
    n_steps: int = Field(ge=1, le=1_000)
    guidance_scale: float = 1.0
    targets: Mapping[str, str] = Field(default_factory=dict)
    sites: tuple[str, ...] = ()
    n_ranges: int = Field(4, ge=1, le=32)
    n_drawn: int = Field(256, ge=32, le=100_000)
    n_steered: int = Field(48, ge=8, le=100_000)
    strength: float = Field(2.0, gt=0, le=100)
    first_seed: int = Field(20_000_000, ge=0)
    batch_size: int = Field(16, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class ScanPlan:
    """How much a scan will draw, and how long that takes at the pace of its first batch."""

    n_sites: int
    n_images: int
    seconds: float

    def describe(self) -> str:
        """One sentence."""
        minutes = max(1, round(self.seconds / 60))
        return f"{self.n_sites} sites, {self.n_images:,} images in all: about {minutes} min, and it can be stopped."


@dataclass(frozen=True, eq=False)
class AddDirection:
    """``h' = h + strength · d[step]`` with ``directions [step, c, y, x]``, inside a range of steps."""

    directions: Tensor
    strength: float
    window: tuple[int, int] | None
    spec: EditSpec
    sampler: Sampler = "symmetric"

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]``."""
        return h + self.strength * self.directions[context.index].to(h)


@dataclass(frozen=True, eq=False)
class _Looked:
    """What was drawn once for all sites: the request and who the classifier reads in it."""

    request: GenerationRequest
    readings: Mapping[str, Predictions]


@dataclass(frozen=True, eq=False)
class _AtSite:
    """What was learned at one site.

    Attributes:
        directions: attribute → class-mean difference ``[step, c, y, x]``; controls: of random halves, same length.
        readings: attribute → one per range of steps, ``None`` for the whole run.
    """

    site: ScanSite
    directions: dict[str, Tensor]
    controls: dict[str, Tensor]
    readings: dict[str, tuple[Reading | None, ...]]


def scan(
    model: DiffusionModel,
    classifier: Classifier,
    config: ScanConfig,
    work: Path,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[ScanPlan], None] | None = None,
) -> Scan:
    """Look for attributes in a model. Finished pieces stay in ``work``: a stopped scan goes on where it was.

    ``on_plan`` hears what it will cost before a scan begins.
    Raises ``LensError`` for an attribute that the classifier does not read, a site that cannot be read, and where too
    few images show a class.
    """
    attributes = [_attribute(classifier, name) for name in config.attributes]
    names = config.sites or tuple(site.name for site in candidate_sites(model))
    places = {name: at_site(model, name) for name in names}
    for place in places.values():
        _ = place.hook_shape  # refuse sites that cannot be read, before anything is drawn
    pieces = Workspace(work).part("scan", [config.model_dump(), model.model_id, classifier.classifier_id])
    steps = ranges(config.n_steps, config.n_ranges)
    drawing, learning, steering = (progress or Progress()).parts((1, len(names), 2 * len(names) * len(steps)))
    n_edits = 2 * len(names) * len(steps) * len(attributes)
    if on_plan is not None and not pieces.has("labels.safetensors"):  # a scan taken up again tells its pace itself
        images = config.n_drawn * (1 + len(names)) + config.n_steered * (1 + n_edits)
        on_plan(ScanPlan(len(names), images, images * _pace(model, config)))
    looked = _look(model, classifier, config, pieces, drawing)
    chosen = [_described(a, looked.readings[a.name], config.targets.get(a.name)) for a in attributes]
    learned = [
        _learn(place, name, looked, attributes, chosen, config, steps, pieces, part)
        for (name, place), part in zip(places.items(), learning.parts(len(names)), strict=True)
    ]
    unedited = _Unedited(model, classifier, config, steps)
    cells = []
    for found, part in zip(learned, steering.parts(len(names)), strict=True):
        bars = part.parts(len(attributes) * len(steps))
        grid = [(a, i) for a in chosen for i in range(len(steps))]
        for (about, i), bar in zip(grid, bars, strict=True):
            moved = _steer(places[found.site.name], classifier, config, found, about, steps[i], unedited, pieces, bar)
            cells.append(Cell(about.name, found.site.name, i, found.readings[about.name][i], moved))
    return Scan(
        model_id=model.model_id, classifier_id=classifier.classifier_id, prompt=config.prompt, n_steps=config.n_steps,
        guidance_scale=config.guidance_scale, strength=config.strength, n_drawn=config.n_drawn,
        n_steered=config.n_steered, first_seed=config.first_seed, steps=steps,
        sites=tuple(found.site for found in learned), attributes=tuple(chosen),
        errors={a.name: _error(classifier, a) for a in attributes}, cells=tuple(cells),
    )  # fmt: skip


def ranges(n_steps: int, n_ranges: int) -> tuple[Steps, ...]:
    """Equal ranges of the steps, in order, and the whole run last (once, where there is but one range)."""
    if n_ranges > n_steps:
        raise LensError(f"A run of {n_steps} steps cannot be cut into {n_ranges} ranges.")
    edges = np.linspace(0, n_steps, n_ranges + 1).round().astype(int)
    parts = [Steps(int(a), int(b)) for a, b in pairwise(edges)]
    return (*parts, Steps(0, n_steps)) if n_ranges > 1 else tuple(parts)


def _attribute(classifier: Classifier, name: str) -> Attribute:
    for attribute in classifier.attributes:
        if attribute.name == name:
            return attribute
    known = ", ".join(a.name for a in classifier.attributes)
    raise LensError(f"The classifier does not read '{name}'; it reads {known}.")


def _error(classifier: Classifier, attribute: Attribute) -> float:
    counts = classifier.confusion.get(attribute.name)
    return float("nan") if counts is None else 1 - float(np.diag(error_rates(counts)).mean())


def _pace(model: DiffusionModel, config: ScanConfig) -> float:
    """Seconds an image, by one batch."""
    wanted = request(model, config.prompt, range(config.batch_size), config.n_steps, config.guidance_scale)
    began = time.perf_counter()
    for _ in generate_batches(model, wanted, batch_size=config.batch_size):
        pass
    return (time.perf_counter() - began) / config.batch_size


def _look(
    model: DiffusionModel, classifier: Classifier, config: ScanConfig, pieces: Workspace, progress: Progress
) -> _Looked:
    """Draw the images to learn from and read them."""
    seeds = range(config.first_seed, config.first_seed + config.n_drawn)
    wanted = request(model, config.prompt, seeds, config.n_steps, config.guidance_scale)

    def read() -> dict[str, np.ndarray]:
        seen = observe(
            model, wanted, None, classifier, batch_size=config.batch_size, n_examples=0, progress=progress
        ).readings
        return {f"{n}.{k}": v for n, p in seen.items() for k, v in (("probs", p.probs), ("certain", p.certain))}

    arrays = pieces.tensors("labels", read, progress)
    return _Looked(
        wanted,
        {
            a.name: Predictions(arrays[f"{a.name}.probs"], arrays[f"{a.name}.certain"], a, classifier.classifier_id)
            for a in classifier.attributes
        },
    )


def _described(attribute: Attribute, read: Predictions, target: str | None) -> ScanAttribute:
    """Which class to steer towards: the one asked for, else the rarest that has enough examples."""
    counts = np.bincount(read.labels[read.certain], minlength=len(attribute.classes))
    if target is not None and target not in attribute.classes:
        raise LensError(f"{attribute.name} has no class '{target}'; it has {', '.join(attribute.classes)}.")
    enough = [i for i, n in enumerate(counts) if n >= MIN_PER_CLASS and counts.sum() - n >= MIN_PER_CLASS]
    wanted = [attribute.index(target)] if target is not None else sorted(enough, key=lambda i: counts[i])
    if not wanted or wanted[0] not in enough:
        raise LensError(
            f"Too few of {len(read.certain)} images show {target or 'two classes'} of {attribute.name}; "
            "draw more, or from another prompt."
        )
    return ScanAttribute(
        attribute.name,
        attribute.classes,
        attribute.classes[wanted[0]],
        float(counts[wanted[0]] / counts.sum()),
        int(counts.sum()),
    )


def _learn(
    place: DiffusionModel,
    name: str,
    looked: _Looked,
    attributes: Sequence[Attribute],
    chosen: Sequence[ScanAttribute],
    config: ScanConfig,
    steps: Sequence[Steps],
    pieces: Workspace,
    progress: Progress,
) -> _AtSite:
    """Directions, their controls, and what probes read, at one site."""
    site = ScanSite(name, place.d_in, (int(place.spatial[0]), int(place.spatial[1])))
    key = f"site-{_file_name(name)}"

    def learn() -> dict[str, np.ndarray]:
        return _sums(place, looked, attributes, chosen, config, steps, progress)

    arrays = pieces.piece(f"{key}.safetensors", learn, save_tensors, load_tensors, progress)

    def read() -> dict[str, Any]:
        return {
            a.name: [to_plain(_read(arrays["pooled"][:, i], looked.readings[a.name], a, config.seed))
                     for i in range(arrays["pooled"].shape[1])]
            for a in attributes
        }  # fmt: skip

    values = TypeAdapter(dict[str, tuple[Reading, ...]]).validate_python(pieces.values(f"{key}-read", read))
    whole = (None,) * (len(steps) - arrays["pooled"].shape[1])
    return _AtSite(
        site,
        {a.name: torch.from_numpy(arrays[f"{a.name}.direction"]) for a in attributes},
        {a.name: torch.from_numpy(arrays[f"{a.name}.control"]) for a in attributes},
        {name: (*found, *whole) for name, found in values.items()},
    )


def _sums(
    place: DiffusionModel,
    looked: _Looked,
    attributes: Sequence[Attribute],
    chosen: Sequence[ScanAttribute],
    config: ScanConfig,
    steps: Sequence[Steps],
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Class means of the activations, batch by batch, and what probes will read: one step of every range, pooled."""
    rng = np.random.default_rng(config.seed)
    weights = {}
    for about in chosen:
        read = looked.readings[about.name]
        mine = read.certain & (read.labels == about.classes.index(about.target))
        weights[f"{about.name}.direction"] = _contrast(mine, read.certain & ~mine)
        weights[f"{about.name}.control"] = _contrast(*_random_halves(mine, read.certain, rng))
    partial_ranges = [s for s in steps if s.stop - s.first < config.n_steps] or list(steps)
    middles = [(s.first + s.stop - 1) // 2 for s in partial_ranges]
    totals: dict[str, Tensor] = {}
    pooled = []
    for rows, h in _activations(place, looked.request, config, progress):
        for key, weight in weights.items():
            own = torch.from_numpy(weight[rows]).float()
            part = torch.einsum("n,nscyx->scyx", own, h)
            totals[key] = totals[key] + part if key in totals else part
        pooled.append(pool(h[:, middles]).half())
    for about in chosen:
        direction, control = f"{about.name}.direction", f"{about.name}.control"
        totals[control] *= _length(totals[direction]) / _length(totals[control]).clamp_min(1e-12)
    return {**{key: value.numpy() for key, value in totals.items()}, "pooled": torch.cat(pooled).numpy()}


def _contrast(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Weights ``[n]`` whose sum over images is the mean of ``mine`` minus that of ``others``."""
    return mine / max(1, mine.sum()) - others / max(1, others.sum())


def _random_halves(mine: np.ndarray, certain: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The certain images in two halves drawn at random, with as many that are ``mine`` in one as in the other.

    Halves that differ in the attribute by chance would, drawn out to the direction's length, steer it.
    """
    drawn = np.zeros_like(mine)
    for group in (mine, certain & ~mine):
        rows = rng.permutation(np.flatnonzero(group))
        drawn[rows[: len(rows) // 2]] = True
    return drawn, certain & ~drawn


def _length(directions: Tensor) -> Tensor:
    """The length of each step's direction, ``[step, 1, 1, 1]``."""
    return directions.flatten(1).norm(dim=1)[:, None, None, None]


def _activations(
    place: DiffusionModel, wanted: GenerationRequest, config: ScanConfig, progress: Progress
) -> Iterator[tuple[slice, Tensor]]:
    """Activations ``float32 [n, step, c, y, x]`` batch by batch, with the rows that they are of."""
    start = 0
    for part in generate_batches(
        place, wanted, capture=Capture(dtype=np.float32), batch_size=config.batch_size, progress=progress
    ):
        assert part.activations is not None
        h = torch.from_numpy(part.activations.h)
        yield slice(start, start + len(h)), h
        start += len(h)


def pool(h: Tensor) -> Tensor:
    """Maps ``[n, step, c, y, x]`` averaged down to at most ``PROBE_GRID`` positions a side."""
    n, k, c, y, x = h.shape
    size = (min(y, PROBE_GRID), min(x, PROBE_GRID)) if x > 1 else (min(y, PROBE_GRID**2), 1)
    return F.adaptive_avg_pool2d(h.reshape(n * k, c, y, x), size).reshape(n, k, c, *size)


def _read(h: np.ndarray, read: Predictions, attribute: Attribute, seed: int) -> Reading:
    """Train a probe on one half of the certain images, test it on the other; and others taught shuffled labels."""
    rng = np.random.default_rng(seed)
    counts = np.bincount(read.labels[read.certain], minlength=len(attribute.classes))
    present = [i for i, n in enumerate(counts) if n >= MIN_PER_CLASS]
    rows = np.flatnonzero(read.certain & np.isin(read.labels, present))
    small = replace(attribute, classes=tuple(attribute.classes[i] for i in present))
    labels = np.searchsorted(present, read.labels[rows])
    first = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[::2] for c in range(len(present))])
    train = np.isin(np.arange(len(rows)), first)
    h = h[rows]
    accuracy, interval = _test(h, labels, labels, train, small, seed)
    chance = []
    for _ in range(SHUFFLES):
        dealt = labels.copy()
        dealt[train] = rng.permutation(labels[train])
        chance.append(_test(h, dealt, labels, train, small, seed)[0])
    return Reading(
        accuracy, interval, float(np.mean(chance)), (min(chance), max(chance)), SHUFFLES, int((~train).sum())
    )


def _test(
    h: np.ndarray, taught: np.ndarray, true: np.ndarray, train: np.ndarray, attribute: Attribute, seed: int
) -> tuple[float, tuple[float, float]]:
    probe = train_probe(torch.from_numpy(h[train])[:, None], taught[train], attribute, holdout=0.1, seed=seed)
    read = probe.logits(torch.from_numpy(h[~train]).float(), 0).argmax(1).numpy()
    return balanced_accuracy(true[~train], read, len(attribute.classes))


class _Unedited:
    """The unedited run that every edit is compared with and restarts from, drawn when the first one needs it."""

    def __init__(
        self, model: DiffusionModel, classifier: Classifier, config: ScanConfig, steps: Sequence[Steps]
    ) -> None:
        first = config.first_seed + STEER_SEEDS_AFTER
        seeds = range(first, first + config.n_steered)
        self._draw = partial(
            observe_baseline,
            model,
            request(model, config.prompt, seeds, config.n_steps, config.guidance_scale),
            classifier,
            restart_steps=[s.first for s in steps],
            batch_size=config.batch_size,
            n_examples=0,
        )

    @cached_property
    def run(self) -> Baseline:
        """Its measurement, and the latents from which edited runs restart."""
        return self._draw()


def _steer(
    place: DiffusionModel,
    classifier: Classifier,
    config: ScanConfig,
    found: _AtSite,
    about: ScanAttribute,
    steps: Steps,
    unedited: _Unedited,
    pieces: Workspace,
    progress: Progress,
) -> Steering:
    """Add the direction, and its control, in a range of steps on new seeds, and read what comes of it."""

    def draw(directions: Tensor, what: str, part: Progress) -> Moved:
        window = None if steps.stop - steps.first == config.n_steps else (steps.first, steps.stop)
        spec = EditSpec.of_custom(f"scan {what}", found.site.name, about.name, about.target, window, config.strength)
        edit = AddDirection(directions, config.strength, window, spec)
        before = unedited.run
        after = observe(
            place, before.request, edit, classifier, reference=before.measurement, start=before.start,
            batch_size=config.batch_size, n_examples=0, progress=part,
        )  # fmt: skip
        return moved(after, about)

    def both() -> dict[str, Any]:
        one, other = progress.parts(2)
        own = draw(found.directions[about.name], "direction", one)
        return to_plain(Steering(own, draw(found.controls[about.name], "control", other)))

    key = f"steer-{_file_name(found.site.name)}-{_file_name(about.name)}-{steps.first}-{steps.stop}"
    return TypeAdapter(Steering).validate_python(pieces.values(key, both, progress))


def moved(after: Measurement, about: ScanAttribute) -> Moved:
    """What an edited run changed against its reference."""
    figures = after[about.name]
    change = next((c for c in figures.own_changes if c.label == about.target), None)
    value, (low, high), n = (float("nan"), (-1.0, 1.0), 0) if change is None else (
        change.difference, change.interval, change.n
    )  # fmt: skip
    return Moved(
        float(value), (float(low), float(high)), float(figures.kept), n, figures.n_uncertain,
        float(after.activation_ratio),
    )  # fmt: skip


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in text)
