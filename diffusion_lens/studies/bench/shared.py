"""What all tables of one prompt share: the unedited images as they were read, and the images that fits may use.

The readings are kept on disk, so that a run that was killed, or another attribute's table, draws nothing again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from diffusion_lens.base.files import load_metadata, load_tensors, save_tensors
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import GenerationRequest, LensError, Predictions
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.judging.readers import ClipReader
from diffusion_lens.measuring.sweep import Baseline, Reading
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.protocol import OpenLens, lens_key
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.generate import OnStep, generate_batches, request
from diffusion_lens.results.comparison import CompareConfig
from diffusion_lens.studies.bench.rows import Clock, Sight, look, timed

OnStage = Callable[[str, int, int], None]
Purpose = Literal["final", "tune"]
PROMPT_FIELDS = {
    "prompt", "n", "first_seed", "n_tune", "first_tune_seed", "n_fit", "first_fit_seed", "fit_prompts", "batch_size",
    "n_examples",
}  # fmt: skip
"""Fields of a ``CompareConfig`` that decide the unedited images."""


class JudgedLens(OpenLens, Protocol):
    """A lens with its judge; methods get the same lens as an ``OpenLens``."""

    @property
    def classifier(self) -> Classifier:
        """The image classifier that judges."""

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """Suggested prompts."""


class Shared:
    """The unedited side of the tables of one prompt; every part is drawn on first use."""

    def __init__(
        self,
        lens: JudgedLens,
        config: CompareConfig,
        folder: Path,
        clip: ClipReader | None = None,
        on_stage: OnStage | None = None,
    ) -> None:
        self.lens, self.config, self.clip, self.on_stage = lens, config, clip, on_stage
        self.folder = folder / f"unedited-{self.identity[:10]}"

    @property
    def identity(self) -> str:
        """Names what is shared: equal for two tables that show the same unedited images to the same judge."""
        told = [self.config.model_dump_json(include=PROMPT_FIELDS), lens_key(self.lens)]
        told += [self.lens.classifier.classifier_id, "" if self.clip is None else self.clip.reader_id]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @cached_property
    def draws(self) -> Draws:
        """Images that fits may use."""
        prompts = self.config.fit_prompts or tuple(self.lens.prompts)
        manifest = self.lens.manifest
        return Draws(
            self.lens.model, prompts, self.config.seeds("fit"), manifest.n_steps, manifest.guidance_scale,
            batch_size=self.config.batch_size,
        )  # fmt: skip

    def request(self, purpose: Purpose) -> GenerationRequest:
        """What is drawn for tuning, or for the final row."""
        manifest, seeds = self.lens.manifest, self.config.seeds(purpose)
        return request(self.lens.model, self.config.prompt, seeds, manifest.n_steps, manifest.guidance_scale)

    def draw(self, purpose: Purpose, edit: Edit | None, stage: str) -> tuple[Sight, float, bool]:
        """Draw and look → what was seen, seconds per image, whether ``|h'|`` was measured on the way."""
        clock, wanted = Clock(), self.request(purpose)
        parts = generate_batches(
            self.lens.model, wanted, edit=edit, batch_size=self.config.batch_size, on_step=self.step(stage)
        )
        embed = None if self.clip is None or not self.config.prompt else self.clip.embed_images
        sight = look(timed(parts, clock), self.lens.classifier, embed, self.config.n_examples)
        return sight, clock.seconds / len(wanted.seeds), clock.saw_ratio

    def step(self, stage: str) -> OnStep | None:
        """Progress of one stage."""
        report = self.on_stage
        return None if report is None else lambda done, total: report(stage, done, total)

    def progress(self, stage: str) -> Progress:
        """The same for what takes a ``Progress``."""
        report = self.on_stage
        return Progress(None if report is None else lambda status: report(stage, round(1000 * status.share), 1000))

    @cached_property
    def tuning(self) -> Baseline:
        """The unedited images of the tuning seeds."""
        reading = self._unedited("tune", "unsteered images for tuning")[0].reading
        return Baseline(self.request("tune"), reading, self.lens.classifier.classifier_id)

    @cached_property
    def unsteered(self) -> tuple[Sight, float]:
        """The unedited images of the final seeds, and seconds per image."""
        return self._unedited("final", "unsteered images")

    @cached_property
    def prompt_rows(self) -> np.ndarray:
        """What stands for the prompt: CLIP's text embedding, or the mean features of its unedited tuning images."""
        if self.clip is not None and self.config.prompt:
            return self.clip.embed_texts([self.config.prompt])
        return self.tuning.reading.features.mean(axis=0, keepdims=True)

    def _unedited(self, purpose: Purpose, stage: str) -> tuple[Sight, float]:
        path = self.folder / f"{purpose}.safetensors"
        if not path.is_file():
            sight, seconds, _ = self.draw(purpose, None, stage)
            save_sight(path, sight, seconds)
        return load_sight(path, self.lens.classifier)


def save_sight(path: Path, sight: Sight, seconds_per_image: float) -> None:
    """Write what was seen of one run, whole or not at all."""
    reading = sight.reading
    arrays: dict[str, Any] = {"features": reading.features, "examples": reading.examples}
    if sight.embeddings is not reading.features:
        arrays["embeddings"] = sight.embeddings
    for name, predictions in reading.predictions.items():
        arrays[f"probs {name}"], arrays[f"certain {name}"] = predictions.probs, predictions.certain
    told = {"activation_ratio": reading.activation_ratio, "seconds_per_image": seconds_per_image}
    save_tensors(path, arrays, {"told": json.dumps(told)})


def load_sight(path: Path, classifier: Classifier) -> tuple[Sight, float]:
    """Read what ``save_sight`` wrote; raises ``LensError`` where the classifier reads other attributes."""
    arrays = load_tensors(path)
    told = json.loads(load_metadata(path)["told"])
    names = {key.removeprefix("probs ") for key in arrays if key.startswith("probs ")}
    if names != {a.name for a in classifier.attributes}:
        raise LensError(f"{path} was read by another classifier; delete it and run again.")
    predictions = {
        a.name: Predictions(arrays[f"probs {a.name}"], arrays[f"certain {a.name}"], a, classifier.classifier_id)
        for a in classifier.attributes
    }
    reading = Reading(predictions, arrays["features"], arrays["examples"], float(told["activation_ratio"]))
    return Sight(reading, arrays.get("embeddings", arrays["features"])), float(told["seconds_per_image"])
