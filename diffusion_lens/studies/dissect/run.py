"""What each SAE feature controls, found without labels given by hand: turn it alone, up and down, on paired seeds, and
read everything that the image classifier reads (DiffLens' last finding: single features of hair, glasses, skin).

A scaled feature changes nothing before it first fires. Every image so restarts from the unedited run at the step
where its feature first fires there, and images on which it never fires are not drawn again (E1: equal to a run from
noise up to the last bits of another batch). Images of several features share one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from diffusion_lens.base.files import load_tensors, save_tensors
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import (
    EditSpec,
    FeatureSet,
    GenerationRequest,
    Intervention,
    LensError,
    Mode,
    Predictions,
    Sampler,
)
from diffusion_lens.base.words import duration
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.measuring.observe import observe
from diffusion_lens.methods.protocol import lens_key
from diffusion_lens.model.denoise import Capture, StepContext, Trajectory
from diffusion_lens.model.generate import join, record_trajectory, request
from diffusion_lens.results import stats
from diffusion_lens.results.dissection import Dissection
from diffusion_lens.steering.intervene import make_edit
from diffusion_lens.studies.bench.run import JudgedLens
from diffusion_lens.studies.dissect.choose import choose_features
from diffusion_lens.studies.dissect.config import DissectConfig

Turn = tuple[int, float]
"""A feature, and the β it is turned to."""

BLOCK = 16
"""Turns whose images share batches; a stopped run loses one block at most."""

UP_SHARE = 0.67
"""What an asymmetric edit adds to a step: the part above the bottleneck once more (about two thirds)."""

CHOICE = {"features", "betas", "min_density", "by", "top", "choice_images"}
"""What only says which turns are measured: runs that differ here share a folder."""

MEASURED = ("effects", "low", "high", "p_values")


@dataclass(frozen=True, eq=False)
class FeatureTurns:
    """Image by image another feature turned alone, by difference, as ``intervene.make_edit`` turns one.

    ``turn``: seed → the feature turned in its image, and how far.
    """

    sae: SparseAutoencoder
    turn: dict[int, Turn]
    mode: Mode
    sampler: Sampler
    window: tuple[int, int]

    @property
    def spec(self) -> EditSpec:
        """One intervention per image."""
        return EditSpec(
            tuple(
                replace(
                    _alone(self.sae, feature, self.mode, beta, self.sampler), window=self.window,
                    only_seeds=frozenset({seed}),
                )
                for seed, (feature, beta) in self.turn.items()
            )
        )  # fmt: skip

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """The edited ``h [n, c, y, x]`` of the images ``context.seeds``."""
        turns = [self.turn[seed] for seed in context.seeds]
        ids, own = np.unique([feature for feature, _ in turns], return_inverse=True)
        scale, shift = torch.ones(len(h), len(ids)), torch.zeros(len(h), len(ids))
        for row, (feature, beta) in enumerate(turns):
            ((_, gain, add),) = _alone(self.sae, feature, self.mode, beta, self.sampler).coefficients()
            scale[row, own[row]], shift[row, own[row]] = gain, add
        return h + self.sae.edit_delta(h, ids.tolist(), scale, shift)


@dataclass(frozen=True)
class Plan:
    """The unedited run, and what is left to draw.

    Attributes:
        turns: to be measured, in order. start: the unedited run, restartable. before: its reading.
        first: step at which each feature first fires on each image, ``[image, d_sae]`` (``n_steps``: never).
        seconds: an estimate, from the time that the unedited run took.
    """

    request: GenerationRequest
    turns: tuple[Turn, ...]
    start: Trajectory
    before: dict[str, Predictions]
    first: np.ndarray
    image_steps: int
    seconds: float

    @property
    def images(self) -> int:
        """Images that can change and are drawn; the others cannot."""
        return int((self.first[:, [feature for feature, _ in self.turns]] < self.request.n_steps).sum())

    def describe(self) -> str:
        """What will be done and how long it takes, in one sentence."""
        every = len(self.turns) * len(self.request.seeds)
        return (
            f"{len(self.turns)} turns of features on {len(self.request.seeds)} images each: {self.images:,} of "
            f"{every:,} images can change and are drawn, from where the feature first fires: about "
            f"{duration(self.seconds)}."
        )


def dissect(
    lens: JudgedLens,
    config: DissectConfig,
    folder: Path,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> Dissection:
    """Measure every chosen feature; a file per turn in ``folder``, so that a stopped run goes on.

    Returns everything that ``folder`` holds: a second call with other features or β adds them. ``on_plan`` hears what
    is left to do before it begins. Raises ``LensError`` where nothing can be measured.
    """
    chosen = choose_features(lens, config)
    _check_turn(lens, config, chosen[0])
    told = config.model_dump(mode="json", exclude=CHOICE | {"alpha", "batch_size"})
    half = [str(lens.model.dtype)] if lens.model.dtype != torch.float32 else []  # measured apart from single precision
    pieces = Workspace(folder)
    identity = [told, lens_key(lens), lens.classifier.classifier_id, *half]
    refusal = f"{folder} holds another dissection; choose a new folder, or the same settings."
    pieces.claim("dissection", identity, refusal)
    turns = [(feature, beta) for feature in chosen for beta in config.betas]
    missing = [turn for turn in turns if not pieces.has(_name(turn))]
    if missing:
        plan = make_plan(lens, config, missing)
        if on_plan is not None:
            on_plan(plan)
        blocks = [missing[offset : offset + BLOCK] for offset in range(0, len(missing), BLOCK)]
        steps = [(plan.request.n_steps - plan.first[:, [feature for feature, _ in block]]).sum() for block in blocks]
        for block, bar in zip(blocks, (progress or Progress()).parts(steps), strict=True):
            for turn, arrays in measure_block(lens, config, plan, block, bar).items():
                pieces.keep(_name(turn), partial(dict, arrays), save_tensors)
    return read_dissection(lens, config, folder)


def make_plan(lens: JudgedLens, config: DissectConfig, turns: Sequence[Turn]) -> Plan:
    """Draw and read the unedited images, and see when each feature fires on them."""
    manifest, seeds = lens.manifest, range(config.first_seed, config.first_seed + config.n)
    wanted = request(lens.model, config.prompt, seeds, manifest.n_steps, manifest.guidance_scale)
    sae, classifier = lens.sae, lens.classifier  # loaded before the clock starts
    began = time.monotonic()
    parts: list[Trajectory] = []
    fired: list[np.ndarray] = []
    for offset in range(0, config.n, config.batch_size):
        part = replace(wanted, seeds=wanted.seeds[offset : offset + config.batch_size])
        run = record_trajectory(
            lens.model, part, capture=Capture(dtype=np.float32), batch_size=config.batch_size
        )  # fmt: skip
        activations = run.generation.activations
        assert activations is not None
        fired.append(first_firing(sae, activations.h))
        parts.append(replace(run, generation=replace(run.generation, activations=None)))
    first = np.concatenate(fired)
    if config.mode == "add":
        first = np.zeros_like(first)
    start = Trajectory(
        join([part.generation for part in parts], wanted),
        {step: torch.cat([part.latents[step] for part in parts]) for step in parts[0].latents},
        {step: sum((part.generator_states[step] for part in parts), ()) for step in parts[0].generator_states},
    )
    before = classifier.predict(start.generation.images)
    steps = int((wanted.n_steps - first[:, [feature for feature, _ in turns]]).sum())
    cost = 1 + UP_SHARE * (config.sampler == "asymmetric")
    seconds = (time.monotonic() - began) / (config.n * wanted.n_steps) * steps * cost
    return Plan(wanted, tuple(turns), start, before, first, steps, seconds)


def first_firing(sae: SparseAutoencoder, h: np.ndarray) -> np.ndarray:
    """Step at which each feature first fires at any position, ``h [n, step, c, y, x]`` → int32 ``[n, d_sae]``.

    The number of steps stands for never.
    """
    codes = sae.codes(h)
    n, n_steps = codes.indices.shape[:2]
    first = np.full((n, codes.d_sae), n_steps, np.int32)
    for step in reversed(range(n_steps)):
        ids, active = codes.indices[:, step].reshape(n, -1), codes.values[:, step].reshape(n, -1) > 0
        rows = np.broadcast_to(np.arange(n)[:, None], ids.shape)
        first[rows[active], ids[active]] = step
    return first


def measure_block(
    lens: JudgedLens,
    config: DissectConfig,
    plan: Plan,
    turns: Sequence[Turn],
    progress: Progress | None = None,
) -> dict[Turn, dict[str, np.ndarray]]:
    """Make each of ``turns`` alone → turn → ``<part>.<attribute>`` ``[class]`` and ``flips.<attribute>`` ``[1]``."""
    n_steps, seeds = plan.request.n_steps, plan.request.seeds
    place = {seed: i for i, seed in enumerate(seeds)}
    after = {turn: {name: (p.probs.copy(), p.certain.copy()) for name, p in plan.before.items()} for turn in turns}
    first = plan.first[:, [feature for feature, _ in turns]]
    batches = list(plan_batches(first, n_steps, config.batch_size))
    steps = [sum(n_steps - int(first[i, j]) for i, j in batch) for batch in batches]
    for batch, bar in zip(batches, (progress or Progress()).parts(steps), strict=True):
        begin = min(first[i, j] for i, j in batch)
        part = replace(plan.request, seeds=tuple(seeds[i] for i, _ in batch))
        edit = FeatureTurns(
            lens.sae, {seeds[i]: turns[j] for i, j in batch}, config.mode, config.sampler, (int(begin), n_steps)
        )
        found = observe(
            lens.model, part, edit, lens.classifier, start=plan.start, batch_size=len(batch), n_examples=0,
            progress=bar,
        )  # fmt: skip
        for name, read in found.readings.items():
            for row, seed in enumerate(part.seeds):
                probs, certain = after[edit.turn[seed]][name]
                probs[place[seed]], certain[place[seed]] = read.probs[row], read.certain[row]
    return {turn: _compare(plan, turn[0], after[turn]) for turn in turns}


def plan_batches(first: np.ndarray, n_steps: int, size: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of (image, turn) that begin at like steps, no image twice in one; ``first [image, turn]``.

    Pairs that never fire are left out.
    """
    pairs = sorted((int(first[i, j]), int(j), int(i)) for i, j in np.argwhere(first < n_steps))
    open_batches: list[list[tuple[int, int]]] = []
    for _, j, i in pairs:
        room = next((b for b in open_batches if all(i != taken for taken, _ in b)), None)
        if room is None:
            room = []
            open_batches.append(room)
        room.append((i, j))
        if len(room) == size:
            open_batches.remove(room)
            yield room
    yield from open_batches


def _compare(plan: Plan, feature: int, after: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    fires = bool((plan.first[:, feature] < plan.request.n_steps).any())
    found: dict[str, np.ndarray] = {}
    for name, before in plan.before.items():
        now = replace(before, probs=after[name][0], certain=after[name][1])
        moved = paired_effects(before, now)
        if not fires:
            moved[3] = np.nan  # nothing was tested: these images cannot change
        found |= {f"{part}.{name}": moved[i] for i, part in enumerate(MEASURED)}
        both = before.certain & now.certain
        turned = (before.labels != now.labels)[both]
        found[f"flips.{name}"] = np.array([turned.mean() if len(turned) else np.nan])
    return found


def paired_effects(before: Predictions, after: Predictions) -> np.ndarray:
    """``[4, class]``: difference of shares, its interval's ends, and McNemar's p, among images decided both times.

    NaN, and p = 1, where no image is.
    """
    both = before.certain & after.certain
    n_classes = len(before.attribute.classes)
    if not both.any():
        return np.stack([np.full(n_classes, v) for v in (np.nan, np.nan, np.nan, 1.0)])
    columns = []
    for label in range(n_classes):
        old, new = before.labels[both] == label, after.labels[both] == label
        moved = stats.paired_difference(old, new)
        columns.append([moved.value, *moved.interval, stats.mcnemar(old, new).p_value])
    return np.array(columns).T


def read_dissection(lens: JudgedLens, config: DissectConfig, folder: Path) -> Dissection:
    """Collect what ``dissect`` measured, all that ``folder`` holds."""
    classes = {a.name: a.classes for a in lens.classifier.attributes}
    pieces = Workspace(folder)
    done = sorted(_turn(path) for path in pieces.names("[0-9]*.safetensors"))
    if not done:
        raise LensError(f"No feature has been dissected in {folder} yet.")
    rows = [load_tensors(pieces.path(_name(turn))) for turn in done]
    betas = sorted({beta for _, beta in done}, reverse=True)

    def table(part: str) -> dict[str, np.ndarray]:
        return {name: np.stack([row[f"{part}.{name}"] for row in rows]) for name in classes}

    prompt = "" if config.prompt is None else f' of "{config.prompt}"'
    p_values, told = table("p_values"), " and ".join(f"{beta:g}" for beta in betas)
    return Dissection(
        features=tuple(feature for feature, _ in done),
        betas=tuple(beta for _, beta in done),
        classes=classes,
        effects=table("effects"),
        low=table("low"),
        high=table("high"),
        p_values=p_values,
        q_values=q_values(p_values),
        flips={name: column[:, 0] for name, column in table("flips").items()},
        sae_id=lens.sae.sae_id,
        source=f"turned alone ({config.mode}, β = {told}, {config.sampler}) on {config.n} images{prompt}",
        alpha=config.alpha,
        n=config.n,
    )


def q_values(p_values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """p after Benjamini–Hochberg over every feature, attribute and class together; NaN stays and counts as no test."""
    flat = np.concatenate([p.ravel() for p in p_values.values()])
    adjusted, real = np.full(len(flat), np.nan), np.isfinite(flat)
    if real.any():
        adjusted[real] = multipletests(flat[real], method="fdr_bh")[1]
    parts = np.split(adjusted, np.cumsum([p.size for p in p_values.values()])[:-1])
    return {name: part.reshape(p.shape) for (name, p), part in zip(p_values.items(), parts, strict=True)}


def _check_turn(lens: JudgedLens, config: DissectConfig, feature: int) -> None:
    for beta in config.betas:
        make_edit([_alone(lens.sae, feature, config.mode, beta, config.sampler)], lens.sae)


def _alone(sae: SparseAutoencoder, feature: int, mode: Mode, beta: float, sampler: Sampler) -> Intervention:
    return Intervention.at_beta(FeatureSet((feature,), (0.0,), "", "", sae.sae_id), mode, beta, sampler=sampler)


def _name(turn: Turn) -> str:
    return f"{turn[0]:06d}_{turn[1]!r}.safetensors"


def _turn(path: Path) -> Turn:
    feature, beta = path.stem.split("_")
    return int(feature), float(beta)
