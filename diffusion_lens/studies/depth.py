"""The depth experiment on the bundled world (after Mian et al., Deeper Diffusion Models Amplify Bias, 2505.17560).

U-Nets of several depths learn from the same drawings with the same seeds. The planted shares are known exactly, so
amplification, generated minus planted share, is measured and not guessed: per attribute, prompt, depth, guidance
scale, with and without mid-block bypass. Minority → majority flips are counted on paired seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from pydantic import Field, model_validator

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import Attribute, EditSpec, LensError, Predictions
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.measuring.observe import observe
from diffusion_lens.methods.bypass import BypassEdit, BypassOptions
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.generate import request
from diffusion_lens.model.pipelines import DiffusionModel, load_model
from diffusion_lens.portraits import world
from diffusion_lens.portraits.autoencoder import encode_all
from diffusion_lens.portraits.data import draw_many
from diffusion_lens.portraits.denoiser import DenoiserTrainConfig, train_denoiser
from diffusion_lens.portraits.networks import DenoiserConfig
from diffusion_lens.portraits.recipe import save_pipeline
from diffusion_lens.results import metrics, stats
from diffusion_lens.results.depth import DepthPoint, DepthResult, Flips
from diffusion_lens.results.measurement_files import load_measured, save_measured

OnStage = Callable[[str, int, int], None]


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
    on_stage: OnStage | None = None,
) -> DepthResult:
    """Train every depth, draw from each, measure; every finished training and drawing in ``work`` is read back.

    ``on_stage(stage, done, total)`` may raise to stop. Raises ``LensError`` where ``work`` holds another experiment.
    """
    _claim(work, config, classifier)
    _train_all(config, vae, work, device, on_stage)
    readings: dict[tuple[str, bool, str, float], dict[str, Predictions]] = {}
    sizes: dict[str, int] = {}
    for name in config.shapes:
        model = load_model(_folder(work, name), device=device, offline=True)
        sizes[name] = sum(p.numel() for p in model.unet.parameters())
        for bypassed in (False, True):
            for prompt in config.prompts:
                for scale in config.guidance_scales:
                    found = _read(config, model, classifier, work, (name, bypassed, prompt, scale), on_stage)
                    readings[name, bypassed, prompt, scale] = found
    result = DepthResult(
        tuple(_points(config, readings, classifier)), tuple(_flips(config, readings)), sizes,
        config.model_dump(mode="json"), classifier.classifier_id,
    )  # fmt: skip
    write_json(work / "depth.json", to_plain(result))
    return result


def _train_all(
    config: DepthConfig, vae: AutoencoderTiny, work: Path, device: torch.device, on_stage: OnStage | None
) -> None:
    missing = [name for name in config.shapes if not (_folder(work, name) / "planted.json").is_file()]
    if not missing:
        return
    drawings = draw_many(config.n_drawings, first_seed=0, on_step=_step(on_stage, "drawing"))
    latents = encode_all(vae, torch.from_numpy(drawings.images), device=device)
    for name in missing:
        checkpoint = work / f"checkpoint-{_slug(name)}"
        nets = train_denoiser(
            latents,
            list(drawings.captions),
            config.train.model_copy(update={"shape": config.shapes[name]}),
            device=device,
            checkpoint=checkpoint,
            resume=(checkpoint / "state.safetensors").is_file(),
            on_step=_training_step(on_stage, name),
        )
        save_pipeline(nets, vae, _folder(work, name))


def _read(
    config: DepthConfig,
    model: DiffusionModel,
    classifier: Classifier,
    work: Path,
    where: tuple[str, bool, str, float],
    on_stage: OnStage | None,
) -> dict[str, Predictions]:
    """What the classifier reads in one setting's images, drawn once and kept."""
    name, bypassed, prompt, scale = where
    if not prompt and not bypassed:  # both halves of a guided step are told nothing: the scale changes nothing
        scale = config.guidance_scales[0]
        where = (name, bypassed, prompt, scale)
    wanted = [a.name for a in classifier.attributes if a.name in config.attributes]
    path = work / "readings" / f"{hashlib.sha256(repr(where).encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        seeds = range(config.first_seed, config.first_seed + config.n)
        edit: Edit | None = _bypass(config) if bypassed else None
        stage = f"{name}{', bypassed' if bypassed else ''}, guidance {scale:g}"
        found = observe(
            model, request(model, prompt, seeds, config.n_steps, scale), edit, classifier, n_examples=0,
            batch_size=config.batch_size, on_step=_step(on_stage, stage),
        )  # fmt: skip
        save_measured(path.parent, path.stem, {}, [found])
    _, (found,) = load_measured(path.parent, path.stem)
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


def _claim(work: Path, config: DepthConfig, classifier: Classifier) -> None:
    path = work / "config.json"
    told = [config.model_dump(mode="json", exclude={"batch_size"}), classifier.classifier_id]
    if path.is_file() and read_json(path) != told:
        raise LensError(f"{work} holds another depth experiment; choose a new folder, or the same settings.")
    write_json(path, told)


def _folder(work: Path, name: str) -> Path:
    return work / f"pipeline-{_slug(name)}"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _bypass(config: DepthConfig) -> BypassEdit:
    options = config.bypass_options
    spec = EditSpec.of_custom("mid-block bypass", config.bypass, options.model_dump(mode="json"))
    return BypassEdit(config.bypass, options, spec)


def _step(on_stage: OnStage | None, stage: str) -> Callable[[int, int], None] | None:
    return None if on_stage is None else lambda done, total: on_stage(stage, done, total)


def _training_step(on_stage: OnStage | None, name: str) -> Callable[[int, int, float], None] | None:
    if on_stage is None:
        return None
    return lambda done, total, loss: on_stage(f"{name} (loss {loss:.4f})", done, total)
