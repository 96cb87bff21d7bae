"""The later stages of a fit: how to steer each attribute, what single features do, and the precomputed sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from diffusion_lens.base.files import load_tensors, read_json, write_json
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Atlas, Attribution, Control, FeatureSet, GenerationRequest, Intervention
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.fit.choose import candidates, choose_setting, describe, measure_setting, trial_name
from diffusion_lens.fit.stages import Work, read_attributions, read_probes, read_sae
from diffusion_lens.measuring.observe import Baseline, observe_baseline
from diffusion_lens.measuring.sweep import sweep_points
from diffusion_lens.model.generate import request
from diffusion_lens.results.manifest import Setting
from diffusion_lens.results.measurement_files import Missing
from diffusion_lens.results.records import load_atlas, load_sweep, save_sweep
from diffusion_lens.results.sweeps import SweepResult, collect
from diffusion_lens.steering.intervene import make_edit
from diffusion_lens.steering.settings import control_intervention, describe_setting

SWEEP = "sweep"
"""Stem of the files of one sweep."""


def fit_settings(work: Work) -> None:
    """Take over the configured settings; choose one for every attribute that has none, a file each.

    The processes share the candidates' sweeps; the main one then reads all of them and chooses.
    """
    given = {setting.attribute: setting for setting in work.config.settings}
    pieces, asked = work.pieces("settings"), _asked(work)
    wanted = [name for name in work.config.attributes if name not in given and not pieces.has(f"{name}.json")]
    plan = [
        (name, number, setting, place)
        for place in range(len(asked))
        for name in wanted
        for number, setting in enumerate(_candidates(work, name))
    ]
    sae, probes, attributions = read_sae(work), read_probes(work), read_attributions(work)
    mine, base = work.processes.share(plan), None
    for (name, number, setting, place), bar in zip(mine, work.progress.parts(len(mine)), strict=True):
        if base is None or base.request != asked[place]:
            base = observe_baseline(
                work.model, asked[place], work.chooser, batch_size=work.config.batch_size, n_examples=0
            )
        measure_setting(
            work.model, sae, attributions[name], work.chooser, base, setting, probes=probes,
            batch_size=work.config.batch_size, n_examples=0, progress=bar,
            keep=pieces.part(name).part(trial_name(number, place)),
        )  # fmt: skip
    work.processes.wait()
    if work.processes.is_main:
        for name in work.config.attributes:
            choose = partial(_choose, work, name) if name not in given else partial(given.__getitem__, name)
            pieces.keep(f"{name}.json", choose, lambda path, setting: setting.save(path))


def _asked(work: Work) -> list[GenerationRequest]:
    """What every candidate is tried on, a request for each prompt."""
    config, grid = work.config, work.config.choose
    seeds = range(grid.first_seed, grid.first_seed + grid.n_images)
    return [
        request(work.model, prompt, seeds, config.n_steps, config.guidance_scale)
        for prompt in grid.prompts or config.draws[:1]
    ]


def _candidates(work: Work, name: str) -> list[Setting]:
    others = [other for other in work.config.attributes if other != name]
    return list(candidates(name, work.attribute(name).classes[-1], work.config.choose, others))


def _choose(work: Work, name: str) -> Setting:
    chosen, trials = choose_setting(
        work.model,
        read_sae(work),
        read_attributions(work)[name],
        work.chooser,
        _asked(work),
        _candidates(work, name),
        probes=read_probes(work),
        batch_size=work.config.batch_size,
        keep=work.pieces("settings").part(name),
    )
    write_json(work.folders["settings"] / f"{name}-trials.json", [describe(trial) for trial in trials])
    return chosen


def read_settings(work: Work) -> dict[str, Setting]:
    """Attribute → how the lens will steer it."""
    return {name: Setting.load(work.folders["settings"] / f"{name}.json") for name in work.config.attributes}


def fit_effects(work: Work) -> None:
    """Steer by the top features of every class, each alone, and measure how the class shares move, a file per feature.

    Each with the setting's mode and sampler, at its strongest strength towards the target.
    """
    config, attributions = work.config, read_attributions(work)
    if not config.effect_features:
        return
    sae, settings = read_sae(work), read_settings(work)
    owners: dict[int, Setting] = {}
    for name, attribution in attributions.items():
        for feature in sorted(_leaders(attribution, settings[name], config.effect_features)):
            owners.setdefault(feature, settings[name])
    wanted = _sweep_request(work, config.sweeps[0] if config.sweeps else config.draws[0], config.effect_images)
    base: Baseline | None = None
    mine = work.processes.share(list(owners.items()))
    drawing, *bars = work.progress.parts(1 + len(mine))

    def measure(feature: int, setting: Setting, bar: Progress) -> dict[str, np.ndarray]:
        nonlocal base
        base = base or observe_baseline(
            work.model, wanted, work.classifier, batch_size=config.batch_size, progress=drawing
        )
        return _effect(work, sae, base, feature, setting, bar)

    for (feature, setting), bar in zip(mine, bars, strict=True):
        work.pieces("effects").tensors(f"{feature}", partial(measure, feature, setting, bar), bar)
    prompt = "" if wanted.prompt is None else f' of "{wanted.prompt}"'
    source = f"turned alone as far as the shipped sweep goes, on {config.effect_images} images{prompt}"
    if work.processes.is_main:
        write_json(work.folders["effects"] / "source.json", source)


def _leaders(attribution: Attribution, setting: Setting, n: int) -> set[int]:
    classes = attribution.attribute.classes
    return {i for label in classes for i in attribution.top_k(n, target=label, window=setting.window).ids}


def _effect(
    work: Work, sae: SparseAutoencoder, base: Baseline, feature: int, setting: Setting, progress: Progress
) -> dict[str, np.ndarray]:
    """Attribute → change of class shares ``[class]`` when ``feature`` alone is steered."""
    alone = FeatureSet((feature,), (0.0,), setting.attribute, setting.target, sae.sae_id)
    steer = Intervention.at_beta(alone, setting.mode, setting.betas[-1], window=setting.window, sampler=setting.sampler)
    attribute = work.attribute(setting.attribute)
    (point,) = sweep_points(
        work.model, base.request, lambda _: make_edit([steer], sae), [steer.beta], work.classifier, attribute,
        setting.target, baseline=base, batch_size=work.config.batch_size, n_examples=0, progress=progress,
    )  # fmt: skip
    before, after = base.measurement.shares_read, point.measurement.shares_read
    return {name: np.array(after[name]) - np.array(before[name]) for name in before}


def read_atlas(work: Work) -> Atlas:
    """The atlas, with the causal effects that were measured."""
    atlas = load_atlas(work.folders["atlas"] / "atlas.safetensors")
    effects: dict[str, np.ndarray] = {}
    for path in work.pieces("effects").names("*.safetensors"):
        for name, change in load_tensors(path).items():
            table = effects.setdefault(name, np.full((len(atlas.density), len(change)), np.nan, np.float32))
            table[int(path.stem)] = change
    if not effects:
        return atlas
    return replace(atlas, effects=effects, effect_source=read_json(work.folders["effects"] / "source.json"))


def fit_sweeps(work: Work) -> None:
    """Sweep every attribute on every prompt (and its control), a folder of points each."""
    settings, config = read_settings(work), work.config
    controls: Sequence[Control | None] = (None, "random") if config.sweep_controls else (None,)
    everything = [(p, name, c) for p in range(len(config.sweeps)) for name in config.swept for c in controls]
    plan = work.processes.share(everything)
    base: Baseline | None = None
    pieces = work.pieces("sweeps")

    def measure(p: int, name: str, control: Control | None, points: Workspace, bar: Progress) -> SweepResult:
        nonlocal base
        wanted, (drawing, sweeping) = _sweep_request(work, config.sweeps[p], config.sweep_images), bar.parts((1, 9))
        if base is None or base.request != wanted:
            base = observe_baseline(work.model, wanted, work.classifier, batch_size=config.batch_size, progress=drawing)
        return _sweep(work, base, settings[name], control, points, sweeping)

    for (p, name, control), bar in zip(plan, work.progress.parts(len(plan)), strict=True):
        stem = f"{p:02d}-{name}{'' if control is None else f'-{control}'}"
        make = partial(measure, p, name, control, pieces.part(f"{stem}-points"), bar)
        pieces.keep(stem, make, lambda path, result: save_sweep(result, path, SWEEP, lossless=True), bar)


def read_sweeps(work: Work) -> list[SweepResult]:
    """The finished sweeps, in the order of their prompts."""
    folders = work.pieces("sweeps").names("[0-9]*")
    return [load_sweep(path, SWEEP, Missing({})) for path in folders if (path / f"{SWEEP}.json").is_file()]


def _sweep_request(work: Work, prompt: str | None, n: int) -> GenerationRequest:
    seeds = range(work.config.sweep_first_seed, work.config.sweep_first_seed + n)
    return request(work.model, prompt, seeds, work.config.n_steps, work.config.guidance_scale)


def _sweep(
    work: Work, base: Baseline, setting: Setting, control: Control | None, keep: Workspace, progress: Progress
) -> SweepResult:
    attribution, seed = read_attributions(work)[setting.attribute], work.config.seed
    sae, activity = read_sae(work), read_atlas(work).activity
    points = measure_setting(
        work.model,
        sae,
        attribution,
        work.classifier,
        base,
        setting,
        probes=read_probes(work),
        change=lambda own: own if control is None else control_intervention(own, control, activity, seed),
        batch_size=work.config.batch_size,
        keep=keep,
        progress=progress,
    )
    return collect(
        points,
        target=setting.target,
        setting=describe_setting(setting, control, seed),
        control=control,
        control_seed=seed,
        provenance={"sae": sae.sae_id},
    )
