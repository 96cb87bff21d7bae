"""The depth experiment on the bundled world (after Hakemi et al., Deeper Diffusion Models Amplify Bias, 2505.17560).

U-Nets of several depths learn from the same drawings with the same seeds. The planted shares are known exactly, so
amplification, generated minus planted share, is measured and not guessed: per attribute, prompt, depth, guidance
scale, with and without mid-block bypass. Minority → majority flips are counted on paired seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from pydantic import Field, model_validator

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, EditSpec, Predictions
from diffusion_lens.base.workspace import Workspace, digest
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.measuring.observe import observe
from diffusion_lens.methods.bypass import BypassEdit, BypassOptions
from diffusion_lens.model.generate import request
from diffusion_lens.model.pipelines import DiffusionModel, load_model
from diffusion_lens.portraits import world
from diffusion_lens.portraits.autoencoder import encode_all
from diffusion_lens.portraits.data import draw_many
from diffusion_lens.portraits.denoiser import Denoiser, DenoiserTrainConfig, train_denoiser
from diffusion_lens.portraits.networks import DenoiserConfig
from diffusion_lens.portraits.recipe import save_pipeline
from diffusion_lens.results import metrics, stats
from diffusion_lens.results.depth import DepthPoint, DepthResult, Flips
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.measurement_files import load_measured, save_measured


class DepthConfig(StrictConfig):
    """What is trained and drawn.

    Attributes:
        shapes: name → U-Net, shallowest first; at least three.
        train: steps, batch size and seed of every training (``shape`` is replaced).
        n_drawings: pictures all of them learn from. prompts, guidance_scales: what is drawn from each.
        n, first_seed: images per prompt, scale and setting, on the same seeds everywhere.
        bypass: λ_max of the mid-block bypass; ``bypass_options`` its window and ramp.
        attributes: those whose shares are compared with the planted ones.
    """

    shapes: dict[str, DenoiserConfig] = Field(
        default_factory=lambda: {
            "2 levels": DenoiserConfig(channels=(32, 64), attention=(False, True), text_width=64),
            "3 levels": DenoiserConfig(channels=(32, 64, 96), attention=(False, False, True), text_width=64),
            "4 levels": DenoiserConfig(
                channels=(32, 64, 96, 128), attention=(False, False, False, True), text_width=64
            ),
        }
    )
    train: DenoiserTrainConfig = DenoiserTrainConfig(
        n_steps=1100, batch_size=64, coarse_weight=0.0, bottleneck_weight=0.0
    )
    n_drawings: int = Field(default=12_000, ge=1)
    prompts: tuple[str, ...] = ("", "a portrait of a firefighter", "a portrait of a nurse")
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    n: int = Field(default=150, ge=stats.MIN_PAIRS)
    first_seed: int = 11_000_000
    n_steps: int = Field(default=20, ge=1)
    bypass: float = Field(default=0.5, gt=0, le=1)
    bypass_options: BypassOptions = Field(default_factory=lambda: BypassOptions.parse({}))
    attributes: tuple[str, ...] = tuple(a.name for a in world.STEERABLE)
    batch_size: int = Field(default=50, ge=1)

    @model_validator(mode="after")
    def _deep_enough(self) -> DepthConfig:
        if len(self.shapes) < 3:
            raise ValueError("name at least three depths")
        unknown = set(self.attributes) - {a.name for a in world.ATTRIBUTES}
        if unknown:
            raise ValueError(f"this world has no attribute {min(unknown)}")
        return self


def planned_images(config: DepthConfig) -> int:
    """Images that a whole run draws; guided ones cost two forward passes a step."""
    settings = [
        (bypassed, prompt, scale)
        for bypassed in (False, True)
        for prompt in config.prompts
        for scale in config.guidance_scales
        if prompt or bypassed or scale == config.guidance_scales[0]
    ]
    return len(config.shapes) * len(settings) * config.n


def run_depth(
    config: DepthConfig,
    vae: AutoencoderTiny,
    classifier: Classifier,
    work: Path,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> DepthResult:
    """Train every depth, draw from each, measure; every finished training and drawing in ``work`` is read back.

    ``progress`` tells the trainings and drawings by name. Raises ``LensError`` where ``work`` holds another experiment.
    """
    pieces = Workspace(work)
    identity = [config.model_dump(mode="json", exclude={"batch_size"}), classifier.classifier_id]
    refusal = f"{work} holds another depth experiment; choose a new folder, or the same settings."
    pieces.claim("config", identity, refusal)
    training, drawing = (progress or Progress()).parts(2)
    _train_all(config, vae, pieces, device, training)
    settings = [(b, p, scale) for b in (False, True) for p in config.prompts for scale in config.guidance_scales]
    bars = iter(drawing.parts(len(config.shapes) * len(settings)))
    readings: dict[tuple[str, bool, str, float], dict[str, Predictions]] = {}
    sizes: dict[str, int] = {}
    for name in config.shapes:
        model = load_model(pieces.path(_pipeline(name)), device=device, offline=True)
        sizes[name] = sum(p.numel() for p in model.denoiser.parameters())
        for setting in settings:
            found = _read(config, model, classifier, pieces.part("readings"), (name, *setting), next(bars))
            readings[(name, *setting)] = found
    result = DepthResult(
        tuple(_points(config, readings, classifier)), tuple(_flips(config, readings)), sizes,
        config.model_dump(mode="json"), classifier.classifier_id,
    )  # fmt: skip
    write_json(work / "depth.json", to_plain(result))
    return result


def _train_all(
    config: DepthConfig, vae: AutoencoderTiny, pieces: Workspace, device: torch.device, progress: Progress
) -> None:
    missing = [name for name in config.shapes if not pieces.has(_pipeline(name))]
    if not missing:
        progress.found()
        return
    drawing, *bars = progress.parts((1, *(4 for _ in missing)), ("drawing", *missing))
    drawings = draw_many(config.n_drawings, first_seed=0, progress=drawing)
    latents = encode_all(vae, torch.from_numpy(drawings.images), device=device)

    def train(name: str, bar: Progress) -> Denoiser:
        checkpoint = pieces.part(f"checkpoint-{_slug(name)}")
        return train_denoiser(
            latents,
            list(drawings.captions),
            config.train.model_copy(update={"shape": config.shapes[name]}),
            device=device,
            checkpoint=checkpoint.folder,
            resume=checkpoint.has("state.safetensors"),
            progress=bar,
        )

    for name, bar in zip(missing, bars, strict=True):
        pieces.keep(_pipeline(name), partial(train, name, bar), lambda path, nets: save_pipeline(nets, vae, path))


def _read(
    config: DepthConfig,
    model: DiffusionModel,
    classifier: Classifier,
    pieces: Workspace,
    where: tuple[str, bool, str, float],
    progress: Progress,
) -> dict[str, Predictions]:
    """What the classifier reads in one setting's images, drawn once and kept."""
    name, bypassed, prompt, scale = where
    if not prompt and not bypassed:  # both halves of a guided step are told nothing: the scale changes nothing
        scale = config.guidance_scales[0]
        where = (name, bypassed, prompt, scale)
    wanted = [a.name for a in classifier.attributes if a.name in config.attributes]

    def make() -> Measurement:
        seeds = range(config.first_seed, config.first_seed + config.n)
        return observe(
            model, request(model, prompt, seeds, config.n_steps, scale), _bypass(config) if bypassed else None,
            classifier, n_examples=0, batch_size=config.batch_size, progress=bar,
        )  # fmt: skip

    bar = progress.part(1.0, f"{name}{', bypassed' if bypassed else ''}, guidance {scale:g}")
    found = pieces.piece(
        digest(where), make, lambda path, made: save_measured(path, "reading", {}, [made]),
        lambda path: load_measured(path, "reading")[1][0], bar,
    )  # fmt: skip
    return {name: found.readings[name] for name in wanted}


def _points(
    config: DepthConfig, readings: Mapping[tuple[str, bool, str, float], dict[str, Predictions]], classifier: Classifier
) -> list[DepthPoint]:
    points = []
    for (depth, bypassed, prompt, scale), found in readings.items():
        planted = world.planted_shares(prompt)
        for name, p in found.items():
            shares = stats.shares(p.counts, p.n_uncertain, p.attribute, classifier.confusion[name])
            truth = tuple(float(s) for s in planted[name])
            points.append(
                DepthPoint(
                    depth, bypassed, prompt, scale, name, shares, truth,
                    tuple(s.corrected - t for s, t in zip(shares, truth, strict=True)),
                    tuple(
                        (s.corrected_interval[0] - t, s.corrected_interval[1] - t)
                        for s, t in zip(shares, truth, strict=True)
                    ),
                    _majority(p.attribute, truth),
                )
            )  # fmt: skip
    return points


def _flips(config: DepthConfig, readings: Mapping[tuple[str, bool, str, float], dict[str, Predictions]]) -> list[Flips]:
    """Every two depths, shallower first; and every depth without and with bypass."""
    names = list(config.shapes)
    pairs: list[tuple[tuple[str, bool], tuple[str, bool]]] = [
        *(((names[i], False), (names[j], False)) for i in range(len(names)) for j in range(i + 1, len(names))),
        *(((name, False), (name, True)) for name in names),
    ]
    found = []
    for first, second in pairs:
        for prompt in config.prompts:
            for scale in config.guidance_scales:
                before, after = (readings[(*where, prompt, scale)] for where in (first, second))
                found += [
                    count_flips((_title(*first), _title(*second)), prompt, scale, before[name], after[name])
                    for name in before
                ]
    return found


def count_flips(titles: tuple[str, str], prompt: str, scale: float, before: Predictions, after: Predictions) -> Flips:
    """Flips into and out of the planted majority class, among images decided both times, with McNemar's test."""
    majority = _majority(before.attribute, tuple(world.planted_shares(prompt)[before.attribute.name]))
    index = before.attribute.index(majority)
    both = (metrics.decided_labels(before) >= 0) & (metrics.decided_labels(after) >= 0)
    if not both.any():
        return Flips(*titles, prompt, scale, before.attribute.name, majority, 0, 0, 1.0, 0)
    test = stats.mcnemar(before.labels[both] == index, after.labels[both] == index)
    return Flips(
        *titles, prompt, scale, before.attribute.name, majority, test.gained, test.lost, test.p_value, int(both.sum())
    )


def _majority(attribute: Attribute, planted: Sequence[float]) -> str:
    return attribute.classes[int(np.argmax(planted))]


def _title(depth: str, bypassed: bool) -> str:
    return f"{depth}, bypassed" if bypassed else depth


def _pipeline(name: str) -> str:
    return f"pipeline-{_slug(name)}"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _bypass(config: DepthConfig) -> BypassEdit:
    options = config.bypass_options
    spec = EditSpec.of_custom("mid-block bypass", config.bypass, options.model_dump(mode="json"))
    return BypassEdit(config.bypass, options, spec)
