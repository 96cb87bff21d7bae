"""Several attributes steered at once, each to its own target: the joint table before and after, spillover,
interference, and whether the order matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_lens.base.edits import describe
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Change, Intervention, LensError, Predictions, Sampler
from diffusion_lens.measuring.observe import observe
from diffusion_lens.methods.protocol import Target, target_shares
from diffusion_lens.model.generate import request
from diffusion_lens.results import metrics
from diffusion_lens.results.joint import TOGETHER, JointResult, JointTable
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.steering.intervene import FeatureEdit, draw_classes, make_edit
from diffusion_lens.steering.settings import make_intervention
from diffusion_lens.studies.bench.run import JudgedLens


@dataclass(frozen=True)
class Steer:
    """One attribute's part: ``target`` a class or shares; ``strength`` 0 is the identity, as for every method."""

    target: Target
    strength: float


def parse_steer(lens: JudgedLens, text: str) -> tuple[str, Steer]:
    """``gender=male:0.5`` or ``gender=even:1`` → attribute and its part; raises ``LensError`` for anything else."""
    name, equals, rest = text.partition("=")
    label, colon, number = rest.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        strength = float("nan")
    if not (equals and colon) or not np.isfinite(strength):
        raise LensError(f"Write a steer like gender=even:1 or gender=male:0.5; got '{text}'.")
    if name not in lens.settings:
        raise LensError(f"This lens ships no setting for {name}; it has {', '.join(lens.settings)}.")
    classes = lens.attributions[name].attribute.classes
    return name, Steer({c: 1 / len(classes) for c in classes} if label == "even" else label, strength)


def interventions(
    lens: JudgedLens, attribute: str, steer: Steer, seeds: Sequence[int], *, draw_seed: int, sampler: Sampler | None
) -> list[Intervention]:
    """One attribute's turns: the shipped setting, each image towards the class drawn for it."""
    if attribute not in lens.settings:
        raise LensError(f"This lens ships no setting for {attribute}; it has {', '.join(lens.settings)}.")
    setting, attribution = lens.settings[attribute], lens.attributions[attribute]
    setting = setting.model_copy(update={"sampler": sampler}) if sampler else setting
    shares = target_shares(attribution.attribute, steer.target)
    target = dict(zip(attribution.attribute.classes, shares, strict=True))
    drawn = draw_classes(attribution.attribute, target, seeds, draw_seed)
    return [
        make_intervention(
            attribution, setting, label, steer.strength, only_seeds=None if target[label] == 1 else group
        )
        for label, group in drawn.items() if target[label] > 0
    ]  # fmt: skip


def joint_edit(
    lens: JudgedLens,
    steers: Mapping[str, Steer],
    seeds: Sequence[int],
    *,
    draw_seed: int = 0,
    sampler: Sampler | None = None,
    reverse: bool = False,
) -> FeatureEdit:
    """One edit from all attributes' turns; classes are drawn independently from attribute to attribute.

    Where settings differ in sampler, name one. ``reverse`` applies them in the opposite order.
    """
    turns = [
        turn
        for number, (name, steer) in enumerate(steers.items())
        for turn in interventions(lens, name, steer, seeds, draw_seed=draw_seed + number, sampler=sampler)
    ]
    return make_edit(turns[::-1] if reverse else turns, lens.sae, lens.probes)


def steer_together(
    lens: JudgedLens,
    prompt: str | None,
    steers: Mapping[str, Steer],
    seeds: Sequence[int],
    *,
    draw_seed: int = 0,
    sampler: Sampler | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> JointResult:
    """Draw unsteered, every attribute alone, all together, and all in reverse order, on the same seeds."""
    if len(steers) < 2:
        raise LensError("Steering together takes at least two attributes.")
    manifest = lens.manifest
    wanted = request(lens.model, prompt, seeds, manifest.n_steps, manifest.guidance_scale)
    alone = {
        name: make_edit(
            interventions(lens, name, steer, seeds, draw_seed=draw_seed + i, sampler=sampler), lens.sae, lens.probes
        )
        for i, (name, steer) in enumerate(steers.items())
    }
    both, backwards = (
        joint_edit(lens, steers, seeds, draw_seed=draw_seed, sampler=sampler, reverse=r) for r in (False, True)
    )
    edits: dict[str, FeatureEdit | None] = {"": None, **alone, TOGETHER: both, "reversed": backwards}
    found: dict[str, Measurement] = {}
    for (name, edit), bar in zip(edits.items(), (progress or Progress()).parts(len(edits)), strict=True):
        found[name] = observe(
            lens.model, wanted, edit, lens.classifier, reference=found.get(""), batch_size=batch_size, n_examples=0,
            progress=bar,
        )  # fmt: skip
    return _result(lens, prompt, steers, found, alone, both)


def _result(
    lens: JudgedLens,
    prompt: str | None,
    steers: Mapping[str, Steer],
    found: Mapping[str, Measurement],
    alone: Mapping[str, FeatureEdit],
    both: FeatureEdit,
) -> JointResult:
    names, after = list(steers), found[TOGETHER]
    spillover = {name: one.changes for name, one in found.items() if name in (*names, TOGETHER)}
    turned = [{f for i in edit.interventions for f in _features(i)} for edit in alone.values()]
    shared = {f for i, own in enumerate(turned) for other in turned[i + 1 :] for f in own & other}
    return JointResult(
        before=joint_table([found[""].readings[name] for name in names]),
        after=joint_table([after.readings[name] for name in names]),
        shares={name: after[name].shares for name in names},
        spillover=spillover,
        interference={name: _interference(spillover, name) for name in names},
        shared_features=tuple(sorted(shared)),
        order_matters=_differ(after, found["reversed"]),
        description=describe(both.spec),
        steered={name: _told(lens, name, steer) for name, steer in steers.items()},
        prompt=prompt,
        sae_id=lens.sae.sae_id,
    )


def joint_table(readings: Sequence[Predictions]) -> JointTable:
    """Count every combination of classes, among images decided in all of ``readings`` (of the same images)."""
    decided = np.logical_and.reduce([p.certain for p in readings])
    classes = tuple(p.attribute.classes for p in readings)
    counts = np.zeros([len(c) for c in classes], dtype=np.int64)
    np.add.at(counts, tuple(p.labels[decided] for p in readings), 1)
    return JointTable(tuple(p.attribute.name for p in readings), classes, counts, len(decided))


def _told(lens: JudgedLens, name: str, steer: Steer) -> str:
    attribute = lens.attributions[name].attribute
    shares = target_shares(attribute, steer.target)
    goal = ", ".join(f"{label} {share:.0%}" for label, share in zip(attribute.classes, shares, strict=True) if share)
    return f"{goal}; strength {steer.strength:g}"


def _interference(spillover: Mapping[str, Sequence[Change]], name: str) -> dict[str, float]:
    alone, together = (
        {c.label: c.difference for c in spillover[key] if c.attribute == name} for key in (name, TOGETHER)
    )
    return {label: together[label] - alone[label] for label in alone if label in together}


def _differ(a: Measurement, b: Measurement) -> float:
    changed = [metrics.decided_labels(p) != metrics.decided_labels(b.readings[name]) for name, p in a.readings.items()]
    return float(np.logical_or.reduce(changed).mean())


def _features(intervention: Intervention) -> tuple[int, ...]:
    return (*intervention.features.ids, *(intervention.opposite.ids if intervention.opposite else ()))
