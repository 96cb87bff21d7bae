"""The stages of a fit that make a lens's parts: plain functions that read earlier stages' folders and fill their own.

A stage keeps its pieces in a ``Workspace``, and so resumes where it was killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from diffusion_lens.base.files import load_tensors, save_tensors, write_json
from diffusion_lens.base.processes import ALONE, Processes
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, Attribution, GenerationRequest, LensError, Predictions
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.features.atlas import build_atlas
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.features.probes import Probe, load_probes, save_probes
from diffusion_lens.features.raking import even_weights
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.features.train_probe import train_probe
from diffusion_lens.features.train_sae import train_sae
from diffusion_lens.fit.config import FitConfig
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.judging.labelled import HumanLabels
from diffusion_lens.model.activations import ActivationStore, SampleSpec, collect_to
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results import metrics
from diffusion_lens.results.records import load_attributions, save_atlas, save_attributions

SHARED_STAGES = ("sample", "label", "collect", "settings", "effects", "sweeps", "flip-books")
"""Stages that several processes share, since they draw; the main one does the others alone."""
MIN_PER_CLASS = 4
"""Certain images of a class that a probe needs at least."""


@dataclass(frozen=True, eq=False)
class Work:
    """What every stage gets: configuration, models, and each stage's own folder.

    ``progress`` is the part of the bar that belongs to the stage; a stop loses nothing that is finished.
    Several ``processes`` share the work of the stages that draw images (``SHARED_STAGES``).
    """

    config: FitConfig
    model: DiffusionModel
    classifier: Classifier
    labeller: Classifier
    folders: Mapping[str, Path]
    progress: Progress = field(default_factory=Progress)
    processes: Processes = ALONE

    def pieces(self, stage: str) -> Workspace:
        """What a stage has finished."""
        return Workspace(self.folders[stage])

    @property
    def chooser(self) -> Classifier:
        """Who settings are chosen by: the labeller, so that the judge has seen no step of the fit.

        People's labels are of images that exist; beside them, and beside a labeller whose error is not known, it is the
        judge that chooses.
        """
        known = all(name in self.labeller.confusion for name in self.config.attributes)
        return self.labeller if known and not isinstance(self.labeller, HumanLabels) else self.classifier

    def attribute(self, name: str) -> Attribute:
        """A steered attribute, with the classes that the labeller knows; the judge must know the same."""
        for attribute in self.labeller.attributes:
            if attribute.name == name:
                if attribute not in self.classifier.attributes:
                    raise LensError(f"The classifier does not read {name} with the labeller's classes; choose another.")
                return attribute
        known = ", ".join(a.name for a in self.labeller.attributes)
        raise LensError(f"The labeller does not read '{name}'; it reads {known}.")

    def rows(self) -> list[tuple[str | None, int]]:
        """Prompt and seed of every sampled image, prompt by prompt."""
        prompts = self.config.draws
        seeds = range(self.config.first_seed, self.config.first_seed + self.config.n_images)
        return [(prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds[i :: len(prompts)]]


def requests_of(work: Work, rows: Sequence[int] | np.ndarray) -> list[GenerationRequest]:
    """Sampled ``rows`` (rising) as one request per prompt, in their order."""
    everything = work.rows()
    seeds: dict[str | None, list[int]] = {}
    for row in rows:
        prompt, seed = everything[row]
        seeds.setdefault(prompt, []).append(seed)
    config = work.config
    return [request(work.model, p, s, config.n_steps, config.guidance_scale) for p, s in seeds.items()]


def sample(work: Work) -> None:
    """Draw ``n_images`` images, a file per batch."""
    size = work.config.batch_size
    plan = [
        replace(whole, seeds=whole.seeds[start : start + size])
        for whole in requests_of(work, range(work.config.n_images))
        for start in range(0, len(whole.seeds), size)
    ]
    mine = work.processes.share(list(enumerate(plan)))
    for (number, wanted), part in zip(mine, work.progress.parts(len(mine)), strict=True):
        draw = partial(_draw, work, wanted, part)
        work.pieces("sample").keep(f"{number:06d}.safetensors", draw, save_tensors, part)


def _draw(work: Work, wanted: GenerationRequest, progress: Progress) -> dict[str, np.ndarray]:
    drawn = generate(work.model, wanted, batch_size=work.config.batch_size, progress=progress)
    return {"images": drawn.images}


def sampled(work: Work) -> Iterator[np.ndarray]:
    """Sampled images, a batch at a time, in order."""
    for path in work.pieces("sample").names("[0-9]*.safetensors"):
        yield load_tensors(path)["images"]


def label(work: Work) -> None:
    """Read every sampled image with the labeller, a file per batch."""
    mine = work.processes.share(work.pieces("sample").names("[0-9]*.safetensors"))
    for source, part in zip(mine, work.progress.parts(len(mine)), strict=True):
        work.pieces("label").keep(source.name, partial(_labels_of, work, source), save_tensors, part)
        part.step(1, 1)


def _labels_of(work: Work, images: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, read in work.labeller.predict(load_tensors(images)["images"]).items():
        arrays |= {f"{name}.probs": read.probs, f"{name}.certain": read.certain}
    return arrays


def read_labels(work: Work) -> dict[str, Predictions]:
    """The labeller's reading of the sampled images, by attribute."""
    parts = [load_tensors(path) for path in work.pieces("label").names("[0-9]*.safetensors")]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    return {
        a.name: Predictions(joined(f"{a.name}.probs"), joined(f"{a.name}.certain"), a, work.labeller.classifier_id)
        for a in work.labeller.attributes
    }


def select(
    readings: Mapping[str, Predictions], names: Sequence[str], per_class: int, seed: int
) -> dict[str, np.ndarray]:
    """Rows on which each attribute is learned: up to ``per_class`` certain images of each class, drawn at random.

    Raises ``LensError`` where a class has fewer than four.
    """
    rng = np.random.default_rng(seed)
    chosen = {}
    for name in names:
        predictions = readings[name]
        rows = []
        for number, text in enumerate(predictions.attribute.classes):
            found = np.flatnonzero(predictions.certain & (predictions.labels == number))
            if len(found) < MIN_PER_CLASS:
                raise LensError(
                    f"Only {len(found)} of {len(predictions.certain)} images read as {name} = {text}; "
                    "sample more images, or prompts that show it."
                )
            rows.append(rng.permutation(found)[:per_class])
        chosen[name] = np.sort(np.concatenate(rows))
    return chosen


def collect_activations(work: Work) -> None:
    """Run the selected images again and keep the bottleneck of every step, float16, a file per batch."""
    config = work.config
    chosen = select(read_labels(work), config.attributes, config.per_class, config.seed)
    everyone = np.unique(np.concatenate(list(chosen.values())))
    arrays = {"everyone": everyone, **{f"of.{name}": rows for name, rows in chosen.items()}}
    save_tensors(work.folders["collect"] / "rows.safetensors", arrays)
    collect_to(
        work.folders["collect"] / "h",
        work.model,
        requests_of(work, everyone),
        SampleSpec(layout="map"),
        batch_size=config.batch_size,
        progress=work.progress,
        processes=work.processes,
    )


def _selected(work: Work) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sampled rows whose activations were collected, and each attribute's own among them."""
    arrays = load_tensors(work.folders["collect"] / "rows.safetensors")
    return arrays["everyone"], {name: arrays[f"of.{name}"] for name in work.config.attributes}


@dataclass(frozen=True)
class PositionChunks:
    """A store of whole maps as chunks of samples ``[m, c]``, one per position; the same chunks every time."""

    store: ActivationStore
    channels: int

    def __iter__(self) -> Iterator[Tensor]:
        for maps in self.store:
            yield maps.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(0, 1)


def fit_sae(work: Work) -> None:
    """Train the SAE on all collected activations."""
    config = work.config.sae
    store = ActivationStore(work.folders["collect"] / "h", seed=config.seed)
    sae, log = train_sae(
        store if config.layout == "map" else PositionChunks(store, work.model.d_in),
        config,
        model_id=work.model.model_id,
        hook_name=work.model.hook_name,
        spatial=work.model.spatial,
        device=work.model.device,
        progress=work.progress,
        checkpoint=work.folders["sae"] / "training.pt",
    )
    sae.save(work.folders["sae"] / "sae")
    (work.folders["sae"] / "training.pt").unlink(missing_ok=True)
    write_json(work.folders["sae"] / "log.json", {"fvu": log.fvu, "l0": log.l0, "dead_share": log.dead_share})


def read_sae(work: Work) -> SparseAutoencoder:
    """The trained SAE, on the model's device."""
    return SparseAutoencoder.load(work.folders["sae"] / "sae", device=work.model.device)


def activations_of(work: Work, rows: np.ndarray) -> np.ndarray:
    """Collected activations ``[n, step, c, y, x]`` of sampled ``rows`` (rising)."""
    return np.concatenate(list(_some_activations(work, rows)))


def _some_activations(work: Work, rows: np.ndarray) -> Iterator[np.ndarray]:
    everyone, _ = _selected(work)
    store = ActivationStore(work.folders["collect"] / "h")
    shape = (-1, work.config.n_steps, *work.model.hook_shape)
    n_files = len(list(store.folder.glob("shard-*.safetensors")))
    parts = (store.shard(number).h.reshape(shape) for number in range(n_files))
    return _picked(parts, np.isin(everyone, rows))


def _picked(parts: Iterator[np.ndarray], wanted: np.ndarray) -> Iterator[np.ndarray]:
    """From consecutive parts of a long array, the entries where ``wanted``, without holding the whole."""
    start = 0
    for part in parts:
        yield part[wanted[start : start + len(part)]]
        start += len(part)


def fit_probes(work: Work) -> None:
    """Train one probe per attribute on its own balanced images, a file each."""
    _, chosen = _selected(work)
    readings = read_labels(work)
    extra = {} if work.config.probe_weight_decay is None else {"weight_decay": work.config.probe_weight_decay}

    def train(name: str) -> dict[str, Probe]:
        rows, device = chosen[name], work.model.device
        h, labels = activations_of(work, rows), readings[name].labels[rows]
        others = [metrics.decided_labels(readings[other])[rows] for other in chosen if other != name]
        weights = even_weights(labels, others) if work.config.even_probes else None
        seed = work.config.seed
        return {name: train_probe(h, labels, work.attribute(name), weights=weights, seed=seed, device=device, **extra)}

    for name in work.progress.each(list(chosen)):
        work.pieces("probes").keep(f"{name}.safetensors", partial(train, name), save_probes)


def read_probes(work: Work) -> dict[str, Probe]:
    """Attribute → probe, on the model's device."""
    found: dict[str, Probe] = {}
    for name in work.config.attributes:
        found.update(load_probes(work.folders["probes"] / f"{name}.safetensors", str(work.model.device)))
    return found


def fit_attributions(work: Work) -> None:
    """Integrated gradients of every attribute on its own images, a file each."""
    sae, probes, chosen = read_sae(work), read_probes(work), _selected(work)[1]

    def attribute(name: str) -> dict[str, Attribution]:
        some = np.random.default_rng(work.config.seed).permutation(chosen[name])[: work.config.attribution_images]
        return {name: integrated_gradients(sae, probes[name], activations_of(work, some))}

    for name in work.progress.each(list(chosen)):
        work.pieces("attribution").keep(f"{name}.safetensors", partial(attribute, name), save_attributions)


def read_attributions(work: Work) -> dict[str, Attribution]:
    """Attribute → attribution."""
    found: dict[str, Attribution] = {}
    for name in work.config.attributes:
        found.update(load_attributions(work.folders["attribution"] / f"{name}.safetensors"))
    return found


def fit_atlas(work: Work) -> None:
    """Read every feature on a pool of images, drawn at random among those with activations, and keep the pool."""
    everyone, _ = _selected(work)
    rows = np.sort(np.random.default_rng(work.config.seed).permutation(everyone)[: work.config.pool_images])
    readings = {name: replace(p, probs=p.probs[rows], certain=p.certain[rows]) for name, p in read_labels(work).items()}
    steps = range(work.config.n_steps)
    atlas = build_atlas(read_sae(work), lambda: _some_activations(work, rows), steps, readings, work.config.atlas)
    images = np.concatenate(list(_picked(sampled(work), np.isin(np.arange(work.config.n_images), rows))))
    save_tensors(work.folders["atlas"] / "pool.safetensors", {"images": images, "rows": rows})
    save_atlas(work.folders["atlas"] / "atlas.safetensors", atlas)
