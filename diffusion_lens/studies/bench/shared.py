"""What all tables of one prompt share: the unedited images as they were read, and the images that fits may use.

The readings are kept on disk, so that a run that was killed, or another attribute's table, draws nothing again.
"""

from __future__ import annotations

import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from diffusion_lens.base.files import load_metadata, load_tensors, save_tensors
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Generation, GenerationRequest, LensError, Predictions
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.judging.readers import ClipReader
from diffusion_lens.measuring.observe import Baseline, observe
from diffusion_lens.methods.draws import Draws
from diffusion_lens.methods.protocol import OpenLens, lens_key
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.generate import request
from diffusion_lens.results.comparison import CompareConfig
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.studies.bench.rows import Run

Purpose = Literal["final", "tune"]
PROMPT_FIELDS = {
    "prompt", "n", "first_seed", "n_tune", "first_tune_seed", "n_fit", "first_fit_seed", "fit_on", "fit_prompts",
    "batch_size", "n_examples",
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
    ) -> None:
        self.lens, self.config, self.clip, self.bar = lens, config, clip, Progress()
        self.pieces = Workspace(folder).part("unedited", self.identity)

    @property
    def identity(self) -> tuple[str, ...]:
        """Names what is shared: equal for two tables that show the same unedited images to the same judge."""
        reader = "" if self.clip is None else self.clip.reader_id
        config = self.config.model_dump_json(include=PROMPT_FIELDS)
        return (config, lens_key(self.lens), self.lens.classifier.classifier_id, reader)

    @cached_property
    def draws(self) -> Draws:
        """Images that fits may use."""
        of_lens = tuple(self.lens.prompts) if self.config.fit_on == "lens" else (self.config.prompt,)
        prompts = self.config.fit_prompts or of_lens
        manifest = self.lens.manifest
        return Draws(
            self.lens.model, prompts, self.config.seeds("fit"), manifest.n_steps, manifest.guidance_scale,
            batch_size=self.config.batch_size,
        )  # fmt: skip

    def request(self, purpose: Purpose) -> GenerationRequest:
        """What is drawn for tuning, or for the final row."""
        manifest, seeds = self.lens.manifest, self.config.seeds(purpose)
        return request(self.lens.model, self.config.prompt, seeds, manifest.n_steps, manifest.guidance_scale)

    def draw(self, purpose: Purpose, edit: Edit | None, stage: str, reference: Measurement | None = None) -> Run:
        """Draw and read one run; ``embed`` is CLIP's where there is one, else the classifier's features serve."""
        embed = None if self.clip is None or not self.config.prompt else self.clip.embed_images
        rows: list[np.ndarray] = []
        saw_edit, reading = False, 0.0

        def look(part: Generation) -> None:
            nonlocal saw_edit, reading
            saw_edit = saw_edit or part.activation_ratio is not None
            if embed is not None:
                begin = time.perf_counter()
                rows.append(embed(part.images))
                reading += time.perf_counter() - begin

        begin, wanted = time.perf_counter(), self.request(purpose)
        found = observe(
            self.lens.model, wanted, edit, self.lens.classifier, reference=reference, on_batch=look,
            batch_size=self.config.batch_size, n_examples=self.config.n_examples, progress=self.stage(stage),
        )  # fmt: skip
        seconds = (time.perf_counter() - begin - reading) / len(wanted.seeds)
        return Run(found, np.concatenate(rows) if rows else features_of(found), seconds, saw_edit)

    def stage(self, name: str) -> Progress:
        """A named part of ``bar``, which is the bar of the row in the making: nobody knows what it finds finished."""
        return self.bar.some(0.25, name)

    @cached_property
    def tuning(self) -> Baseline:
        """The unedited images of the tuning seeds."""
        return Baseline(self._unedited("tune", "unsteered images for tuning").measurement)

    @cached_property
    def unsteered(self) -> Run:
        """The unedited images of the final seeds."""
        return self._unedited("final", "unsteered images")

    @cached_property
    def prompt_rows(self) -> np.ndarray:
        """What stands for the prompt: CLIP's text embedding, or the mean features of its unedited tuning images."""
        if self.clip is not None and self.config.prompt:
            return self.clip.embed_texts([self.config.prompt])
        return features_of(self.tuning.measurement).mean(axis=0, keepdims=True)

    def _unedited(self, purpose: Purpose, stage: str) -> Run:
        return self.pieces.piece(
            f"{purpose}.safetensors", partial(self.draw, purpose, None, stage), save_run,
            partial(load_run, wanted=self.request(purpose), classifier=self.lens.classifier),
        )  # fmt: skip


def features_of(measurement: Measurement) -> np.ndarray:
    """The classifier's features; raises ``LensError`` where it has none."""
    if measurement.features is None:
        raise LensError("This classifier has no image features; give --clip, or another classifier.")
    return measurement.features


def save_run(path: Path, run: Run) -> None:
    """Write an unedited run with probabilities and features, whole or not at all."""
    found = run.measurement
    arrays: dict[str, Any] = {"features": features_of(found), "examples": found.examples}
    if run.embeddings is not found.features:
        arrays["embeddings"] = run.embeddings
    for name, predictions in found.readings.items():
        arrays[f"probs {name}"], arrays[f"certain {name}"] = predictions.probs, predictions.certain
    save_tensors(path, arrays, {"seconds_per_image": repr(run.seconds)})


def load_run(path: Path, wanted: GenerationRequest, classifier: Classifier) -> Run:
    """Read what ``save_run`` wrote; raises ``LensError`` where the classifier reads other attributes."""
    arrays = load_tensors(path)
    names = {key.removeprefix("probs ") for key in arrays if key.startswith("probs ")}
    if names != {a.name for a in classifier.attributes}:
        raise LensError(f"{path} was read by another classifier; delete it and run again.")
    readings = {
        a.name: Predictions(arrays[f"probs {a.name}"], arrays[f"certain {a.name}"], a, classifier.classifier_id)
        for a in classifier.attributes
    }
    found = Measurement(
        wanted, None, readings, classifier.confusion, classifier.classifier_id, features=arrays["features"],
        examples=arrays["examples"],
    )  # fmt: skip
    seconds = float(load_metadata(path)["seconds_per_image"])
    return Run(found, arrays.get("embeddings", arrays["features"]), seconds, saw_edit=True)
