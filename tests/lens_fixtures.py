"""A whole lens on the tiny text pipeline, fitted once per session in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_lens.base.types import Attribute
from diffusion_lens.features.atlas import AtlasConfig
from diffusion_lens.features.train_sae import SAETrainConfig
from diffusion_lens.fit.config import FitConfig
from diffusion_lens.fit.run import Models, fit
from diffusion_lens.judging.classify import HeadsClassifier, calibrate, train_heads
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.manifest import Setting

PROMPTS = ("a portrait of a doctor", "a portrait of a nurse")
VOCABULARY = (
    "a", "an", "portrait", "of", "doctor", "nurse", "person", "female", "male", "young", "adult", "old",
)  # fmt: skip
STEPS = 4
GENDER = Attribute("gender", ("female", "male"))
AGE = Attribute("age", ("young", "adult", "old"))
GLASSES = Attribute("glasses", ("none", "glasses"))


def make_classifier(model: DiffusionModel) -> HeadsClassifier:
    """A classifier of the text model's own images that errs on one in twenty."""
    parts = [
        generate(model, request(model, prompt, range(10_000, 10_128), STEPS, 2.0), batch_size=64).images
        for prompt in PROMPTS
    ]
    return classifier_of(*parts)


def classifier_of(*parts: np.ndarray) -> HeadsClassifier:
    """A classifier of images ``uint8 [n, H, W, 3]``, each part from one prompt.

    Its network is random. Its heads cut the main directions in which features vary within a prompt, so that
    every class is common; the labels it is calibrated on are its own answers, a twentieth of them changed.
    """
    images = np.concatenate(parts)
    attributes = (GENDER, AGE, GLASSES)
    blank = torch.zeros(len(images), len(attributes), dtype=torch.int64)
    enlarge = max(1, 16 // images.shape[1])
    pixels = torch.from_numpy(images.repeat(enlarge, axis=1).repeat(enlarge, axis=2))
    made = train_heads(pixels, blank, attributes, n_steps=1, lr=1e-9, widths=(8, 8, 8, 16), augment=lambda x, _: x)
    features = torch.from_numpy(made.features(images)).double()
    within = torch.cat([part - part.mean(dim=0) for part in features.chunk(len(parts))])
    axes = torch.linalg.svd(within, full_matrices=False)[2][:3]
    score = features @ axes.T
    axes, score = 6 * axes / score.std(dim=0)[:, None], 6 * score / score.std(dim=0)
    cuts = torch.quantile(score, torch.tensor([1 / 3, 1 / 2, 2 / 3], dtype=torch.float64), dim=0)
    weight = torch.stack([-axes[0], axes[0], -axes[1], 0 * axes[1], axes[1], -axes[2], axes[2]])
    bias = torch.stack([cuts[1, 0], -cuts[1, 0], cuts[0, 1], 0 * cuts[0, 1], -cuts[2, 1], cuts[1, 2], -cuts[1, 2]])
    made.network.heads.weight.data.copy_(weight)
    made.network.heads.bias.data.copy_(bias)
    answers = np.stack([made.logits(images)[1][a.name].argmax(axis=1) for a in attributes], axis=1)
    noisy = answers.copy()
    for column, attribute in enumerate(attributes):
        noisy[column::20, column] = (noisy[column::20, column] + 1) % len(attribute.classes)
    return calibrate(made, images, noisy, max_uncertain=0.1)


def tiny_config(**changes: Any) -> FitConfig:
    """A fit of seconds: two steered attributes, one nuisance, 32 features."""
    settings = tuple(
        Setting(attribute=name, target=target, n_features=3, poles="both", mode="scale", sampler="asymmetric",
                betas=(-4.0, 1.0, 6.0))
        for name, target in (("gender", "male"), ("age", "old"))
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": "tiny", "model": "tiny-text", "model_id": "tiny-text", "bundle_pipeline": True, "classifier": "tiny",
        "attributes": ("gender", "age"), "sampling_prompts": PROMPTS, "prompts": (*PROMPTS, ""),
        "vocabulary": VOCABULARY, "n_steps": STEPS,
        "guidance_scale": 2.0, "n_images": 96, "per_class": 24, "batch_size": 16,
        "sae": SAETrainConfig(d_sae=32, k=4, n_steps=60, batch_size=256), "attribution_images": 32, "pool_images": 40,
        "atlas": AtlasConfig(n_top=4, n_random=2, layout="pca"), "settings": settings, "effect_features": 1,
        "effect_images": 16, "sweep_prompts": PROMPTS[:1], "sweep_images": 24, "sweep_controls": True, **changes,
    }  # fmt: skip
    return FitConfig(**values)


@pytest.fixture(scope="session")
def tiny_fit_models(text_model: DiffusionModel) -> Models:
    """What ``tiny_lens`` is fitted with."""
    classifier = make_classifier(text_model)
    return Models(text_model, classifier, classifier)


@pytest.fixture(scope="session")
def tiny_lens_folder(tiny_fit_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``tiny_lens``; do not change it (copy it first)."""
    folder = tmp_path_factory.mktemp("lens")
    fit(tiny_config(), folder / "tiny", work=folder / "work", models=tiny_fit_models)
    return folder / "tiny"


@pytest.fixture(scope="session")
def tiny_lens(tiny_lens_folder: Path) -> DiffusionLens:
    """A complete lens on the tiny text pipeline: attributes gender and age, nuisance glasses; do not change it."""
    return DiffusionLens.from_pretrained(tiny_lens_folder)


@pytest.fixture(scope="session")
def prompt_free_lens(pixel_model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> DiffusionLens:
    """A complete lens on the tiny unconditional pixel pipeline; do not change it."""
    folder = tmp_path_factory.mktemp("prompt-free")
    made = generate(pixel_model, request(pixel_model, None, range(10_000, 10_128), STEPS, 1.0), batch_size=64).images
    judge = classifier_of(made)
    config = tiny_config(
        name="prompt-free", model="tiny-pixel", model_id=pixel_model.model_id, sampling_prompts=(), prompts=(),
        sweep_prompts=(), vocabulary=None, guidance_scale=1.0, n_images=64, effect_features=0,
        sweep_attributes=("gender",),
    )  # fmt: skip
    return fit(config, folder / "lens", work=folder / "work", models=Models(pixel_model, judge, judge))


@pytest.fixture
def copied_lens(tiny_lens_folder: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the tiny lens's folder that a test may damage."""

    def copy() -> Path:
        target = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        DiffusionLens.from_pretrained(tiny_lens_folder).save_pretrained(target)
        return target

    return copy
