"""The recipe: from nothing to the stock pipelines in ``assets/``, stage by stage, each resumable.

``draw → autoencoder → latents → denoiser (text-conditional) → denoiser (unconditional) → transformer → classifier
→ labeller``. A stage whose result lies in the work folder is read, not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, LDMPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import atomic_folder, load_metadata, load_tensors, read_json, save_tensors, write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Generation, GenerationRequest, LensError
from diffusion_lens.base.weights import weights_digest
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.judging.classify import Architecture, HeadsClassifier, calibrate, train_heads
from diffusion_lens.measuring.observe import read
from diffusion_lens.model.generate import generate_batches, request
from diffusion_lens.model.pipelines import load_model
from diffusion_lens.portraits import world
from diffusion_lens.portraits.autoencoder import AutoencoderTrainConfig, decode_images, encode_all, train_autoencoder
from diffusion_lens.portraits.data import describe, draw_many
from diffusion_lens.portraits.denoiser import Denoiser, DenoiserTrainConfig, load_average, train_denoiser, without_text
from diffusion_lens.portraits.draw import WIDE
from diffusion_lens.portraits.emphasis import Shares, emphasise, teach
from diffusion_lens.portraits.mmdit import (
    TransformerParts,
    TransformerTrainConfig,
    load_average_parts,
    make_flow_scheduler,
    sample_transformer,
    train_transformer,
)
from diffusion_lens.portraits.networks import DenoiserConfig, make_scheduler

MAX_SHARD = "9MB"  # a hub repository takes files up to 10 MB without LFS
HELD_OUT_SEED = 900_000_000
CLASSIFIER_SEED = 500_000_000
LABELLER_SEED = 600_000_000
LABELLER_HELD_OUT_SEED = 800_000_000
MATCH_SEED = 300_000_000
MAX_MATCH = 10_000
DRAWN_AT_ONCE = 20_000
N_STEPS = 16

Nets = Denoiser | TransformerParts


class RecipeConfig(StrictConfig):
    """Everything that decides what the recipe makes; the same on CPU and GPU.

    Attributes:
        n_drawings: training pictures of the denoiser.
        n_classifier: balanced training pictures of the classifier. n_labeller, labeller_steps: as the classifier's,
            of the second one that labels.
    """

    n_drawings: int = 120_000
    n_classifier: int = 60_000
    n_held_out: int = 12_000
    classifier_steps: int = 4_000
    n_labeller: int = 8_000
    labeller_steps: int = 700
    autoencoder: AutoencoderTrainConfig = AutoencoderTrainConfig()
    denoiser: DenoiserTrainConfig = DenoiserTrainConfig()
    unconditional: DenoiserTrainConfig = DenoiserTrainConfig(shape=DenoiserConfig(text_width=0), caption_dropout=0.0)
    mmdit: TransformerTrainConfig = TransformerTrainConfig()


@dataclass(frozen=True)
class Paths:
    """Where the recipe keeps its stages."""

    work: Path

    @property
    def autoencoder(self) -> Path:
        """The trained autoencoder."""
        return self.work / "autoencoder"

    @property
    def classifier(self) -> Path:
        """The trained classifier."""
        return self.work / "classifier"

    @property
    def labeller(self) -> Path:
        """The trained labeller."""
        return self.work / "labeller"

    @property
    def latents(self) -> Path:
        """Latents of the training drawings, with the autoencoder and the number that they are of."""
        return self.work / "latents.safetensors"

    def checkpoint(self, name: str) -> Path:
        """A denoiser's training state."""
        return self.work / f"checkpoint-{name}"

    def pipeline(self, name: str) -> Path:
        """A finished stock pipeline folder."""
        return self.work / name


def autoencoder_stage(config: RecipeConfig, paths: Paths, device: torch.device, progress: Progress) -> AutoencoderTiny:
    """Train the autoencoder, or read the one in the work folder."""

    def train() -> AutoencoderTiny:
        drawing, training = progress.parts((1, 9), ("drawing", "autoencoder"))
        drawn = draw_many(min(config.n_drawings, 40_000), first_seed=0, progress=drawing).images
        images = torch.from_numpy(drawn).to(device)
        return train_autoencoder(images, config.autoencoder, device=device, progress=training)

    return Workspace(paths.work).piece(
        paths.autoencoder.name, train, lambda path, model: model.save_pretrained(path),
        lambda path: AutoencoderTiny.from_pretrained(path).to(device).eval(),
    )  # fmt: skip


def latents_stage(
    config: RecipeConfig, paths: Paths, vae: AutoencoderTiny, device: torch.device, progress: Progress
) -> Tensor:
    """Latents ``float16[n_drawings, 8, 16, 16]`` of the training drawings; those in the work folder, if ``vae``'s."""
    wanted = {"of": weights_digest(vae, str(config.n_drawings))}
    if paths.latents.is_file() and load_metadata(paths.latents) == wanted:
        return torch.from_numpy(load_tensors(paths.latents)["latents"])
    parts = []
    starts = range(0, config.n_drawings, DRAWN_AT_ONCE)
    sizes = [min(DRAWN_AT_ONCE, config.n_drawings - first) for first in starts]
    for first, n, bar in zip(starts, sizes, progress.parts(sizes), strict=True):
        images = draw_many(n, first_seed=first, progress=bar).images
        parts.append(encode_all(vae, torch.from_numpy(images), device=device).cpu())
    latents = torch.cat(parts)
    save_tensors(paths.latents, {"latents": latents}, wanted)
    return latents


def denoiser_stage(
    config: RecipeConfig,
    paths: Paths,
    device: torch.device,
    progress: Progress,
    *,
    unconditional: bool = False,
    resume: bool = False,
    start: Path | None = None,
    match: int = 0,
) -> Path:
    """Train one denoiser on the latents of the planted drawings and save it as a stock pipeline.

    ``start``: a pipeline folder of this recipe, whose autoencoder is kept and whose denoiser is trained further
    with a fresh optimiser. The unconditional one may start from the text-conditional one. ``match``: so many images of
    every prompt are drawn from it first, and drawings that it makes too seldom are shown more often; what it was so
    taught is written beside the new pipeline, and another match goes on from there.
    """
    name = "unconditional" if unconditional else "pipeline"
    matching, decoder, drawing, training = progress.parts((2, 2, 1, 9), (None, None, "drawing", name))
    taught = _to_teach(config, paths, device, matching, start, match, ("",) if unconditional else world.PROMPTS)
    before, vae = (None, None) if start is None else open_parts(start)
    if isinstance(before, TransformerParts):
        raise LensError(f"{start} holds a transformer; train it further as --stage mmdit.")
    if before is not None and unconditional and before.text_encoder is not None:
        before = without_text(before, config.unconditional.shape, config.unconditional.seed)
    vae = autoencoder_stage(config, paths, device, decoder) if vae is None else vae.to(device)
    labels, captions = describe(config.n_drawings, first_seed=0)
    nets = train_denoiser(
        latents_stage(config, paths, vae, device, drawing).to(device),
        list(captions),
        config.unconditional if unconditional else config.denoiser,
        device=device,
        checkpoint=paths.checkpoint(name),
        resume=resume,
        start=before,
        emphasis=None if taught is None else emphasise(labels, captions, taught),
        progress=training,
    )
    return _finish(nets, vae, paths.pipeline(name), taught)


def transformer_stage(
    config: RecipeConfig,
    paths: Paths,
    device: torch.device,
    progress: Progress,
    *,
    resume: bool = False,
    start: Path | None = None,
    match: int = 0,
) -> Path:
    """Train the transformer on the latents that the U-Nets learn, and save it as a stock pipeline.

    ``start``: a pipeline folder of this recipe, whose autoencoder is kept. A transformer in it is trained further with
    a fresh optimiser; where it holds a U-Net, a fresh transformer is trained beside it. ``match`` as in
    ``denoiser_stage``.
    """
    before, vae = (None, None) if start is None else open_parts(start)
    parts = before if isinstance(before, TransformerParts) else None
    if match and parts is None:
        raise LensError(f"{start} holds no transformer to match; name one that --stage mmdit wrote.")
    matching, decoder, drawing, training = progress.parts((2, 2, 1, 9), (None, None, "drawing", "mmdit"))
    taught = _to_teach(config, paths, device, matching, start, match, world.PROMPTS)
    vae = autoencoder_stage(config, paths, device, decoder) if vae is None else vae.to(device)
    labels, captions = describe(config.n_drawings, first_seed=0)
    parts = train_transformer(
        latents_stage(config, paths, vae, device, drawing),
        captions,
        config.mmdit,
        device=device,
        checkpoint=paths.checkpoint("mmdit"),
        resume=resume,
        start=parts,
        emphasis=None if taught is None else emphasise(labels, captions, taught),
        progress=training,
    )
    return _finish(parts, vae, paths.pipeline("mmdit"), taught)


def _to_teach(
    config: RecipeConfig,
    paths: Paths,
    device: torch.device,
    progress: Progress,
    start: Path | None,
    match: int,
    prompts: Sequence[str],
) -> dict[str, Shares] | None:
    if start is None or not match:
        return None
    return {**teach(drawn_shares(config, paths, device, progress, start, match, prompts), match, read_taught(start))}


def _finish(nets: Nets, vae: AutoencoderTiny, folder: Path, taught: dict[str, Shares] | None) -> Path:
    save_pipeline(nets, vae, folder)
    if taught is not None:
        write_json(_taught_path(folder), to_plain(taught), indent=1)
    return folder


def average_stage(folders: Sequence[Path], out: Path) -> Path:
    """Save the mean of the weights of pipelines that were trained one from the other, as a stock pipeline.

    Each training leaves shares a few points off by chance, in its own direction; the mean of their weights is off by
    less (stochastic weight averaging: Izmailov et al., 1803.05407). What ``match`` taught them is averaged, too. Raises
    ``LensError`` for fewer than two folders, for pipelines of other shapes or with another autoencoder, and where
    ``out`` holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LensError(f"{out} is not empty; choose a new folder.")
    if len(folders) < 2:
        raise LensError("Name two or more pipeline folders to average.")
    (nets, vae), *others = [open_parts(folder) for folder in folders]
    for folder, (other, decoder) in zip(folders[1:], others, strict=True):
        if [p.shape for p in nets.parameters()] != [p.shape for p in other.parameters()]:
            raise LensError(f"The pipeline in {folder} is of another shape than that in {folders[0]}.")
        if not all(torch.equal(p, q) for p, q in zip(vae.parameters(), decoder.parameters(), strict=True)):
            raise LensError(f"The pipeline in {folder} has another autoencoder than that in {folders[0]}.")
    with torch.no_grad():
        for own in zip(nets.parameters(), *(other.parameters() for other, _ in others), strict=True):
            own[0].copy_(torch.stack(own).mean(0))
    taught = [read_taught(folder) for folder in folders]
    save_pipeline(nets, vae, out)
    if any(taught):
        planted = {prompt: world.planted_shares(prompt) for prompt in world.PROMPTS}
        every = [own or planted for own in taught]
        names = {prompt: list(own) for prompt, own in next(own for own in taught if own).items()}
        mean = {p: {a: np.mean([own[p][a] for own in every], axis=0) for a in own} for p, own in names.items()}
        write_json(_taught_path(out), to_plain(mean), indent=1)
    return out


def _taught_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-taught.json")


def read_taught(folder: Path) -> dict[str, Shares] | None:
    """The shares that ``match`` taught the pipeline in ``folder``; ``None`` where it was taught the planted ones."""
    path = _taught_path(folder)
    if not path.is_file():
        return None
    return {
        prompt: {name: np.array(own, float) for name, own in shares.items()}
        for prompt, shares in read_json(path).items()
    }


def drawn_shares(
    config: RecipeConfig,
    paths: Paths,
    device: torch.device,
    progress: Progress,
    folder: Path,
    n: int,
    prompts: Sequence[str],
) -> dict[str, Shares]:
    """Every prompt → the shares among ``n`` images of a trained pipeline, as the classifier reads them.

    Corrected for its error, undecided images left out, on seeds that nothing else is drawn from. A pipeline without
    prompts draws the empty one. Raises ``LensError`` where it cannot draw the others.
    """
    judging, drawing = progress.parts((1, 3))
    classifier = classifier_stage(config, paths, device, judging)
    draw = _sampler(folder, device, any(prompts))
    found: dict[str, Shares] = {}
    names = [f"shares of prompt {place + 1} of {len(prompts)}" for place in range(len(prompts))]
    for place, (prompt, bar) in enumerate(zip(prompts, drawing.parts(len(prompts), names), strict=True)):
        first = MATCH_SEED + place * MAX_MATCH
        wanted = GenerationRequest(prompt, tuple(range(first, first + n)), N_STEPS, 1.0, folder.name)
        parts = (Generation(images, wanted) for images in draw(prompt, range(first, first + n), bar))
        counted = read(parts, wanted, classifier, n_examples=0)
        found[prompt] = {
            a.name: np.array([share.corrected for share in counted[a.name].shares]) for a in world.ATTRIBUTES
        }
    return found


Sampler = Callable[[str, range, Progress], Iterator[np.ndarray]]


def _sampler(folder: Path, device: torch.device, prompted: bool) -> Sampler:
    if _has_transformer(folder):
        pipe = make_pipeline(*open_parts(folder)).to(device)
        return partial(sample_transformer, pipe, n_steps=N_STEPS)
    model = load_model(folder, device=device.type, offline=True)
    if not model.is_text and prompted:
        raise LensError(f"{folder} takes no prompt; match it as --stage unconditional.")

    def draw(prompt: str, seeds: range, progress: Progress) -> Iterator[np.ndarray]:
        wanted = request(model, prompt if model.is_text else None, seeds, N_STEPS)
        for part in generate_batches(model, wanted, batch_size=64, progress=progress):
            yield part.images

    return draw


def _has_transformer(folder: Path) -> bool:
    return (folder / "transformer").is_dir()


def open_parts(folder: Path) -> tuple[Nets, AutoencoderTiny]:
    """The trained parts of a pipeline folder that ``save_pipeline`` wrote, in single precision."""
    if not (folder / "model_index.json").is_file():
        raise LensError(f"{folder} holds no pipeline; name a folder that 'portraits train' wrote.")
    if _has_transformer(folder):  # diffusers opens what the folder says is left out only when told so again
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        return TransformerParts(pipe.transformer, (pipe.text_encoder, pipe.text_encoder_2), pipe.tokenizer), pipe.vae
    if (folder / "text_encoder").is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        return Denoiser(pipe.unet, pipe.text_encoder, pipe.tokenizer), pipe.vae
    pipe = LDMPipeline.from_pretrained(folder)
    return Denoiser(pipe.unet, None, None), pipe.vqvae


def export_stage(config: RecipeConfig, paths: Paths, name: str) -> Path:
    """Save the moving averages of an unfinished training (a stage's name) as a stock pipeline."""
    vae = AutoencoderTiny.from_pretrained(paths.autoencoder).eval()
    checkpoint = paths.checkpoint(name)
    if name == "mmdit":
        return save_pipeline(load_average_parts(checkpoint, config.mmdit.shape), vae, paths.pipeline(name))
    shape = (config.unconditional if name == "unconditional" else config.denoiser).shape
    return save_pipeline(load_average(checkpoint, shape), vae, paths.pipeline(name))


@dataclass(frozen=True)
class ReaderRecipe:
    """How one reader of the drawn world is trained: on how many drawings, from which seeds, with which network."""

    name: str
    n_drawings: int
    n_steps: int
    first_seed: int
    first_held_out_seed: int
    seed: int
    architecture: Architecture
    widths: tuple[int, int, int, int]
    image_size: int


def classifier_stage(
    config: RecipeConfig, paths: Paths, device: torch.device, progress: Progress, *, start: Path | None = None
) -> HeadsClassifier:
    """Train the judge on fresh balanced drawings, half of them seen through the autoencoder as samples are.

    Their colours vary more than the world's; its error is measured on the world's own. ``start``: a pipeline folder
    whose autoencoder it is; else that of the work folder.
    """
    own = ReaderRecipe(
        "classifier", config.n_classifier, config.classifier_steps, CLASSIFIER_SEED, HELD_OUT_SEED, 0, "residual",
        (32, 64, 80, 112), 64,
    )  # fmt: skip
    return _reader(own, config, paths, device, progress, start)


def labeller_stage(
    config: RecipeConfig, paths: Paths, device: torch.device, progress: Progress, *, start: Path | None = None
) -> HeadsClassifier:
    """Train the second reader: another network, seed and drawings than the judge's, on smaller images, the same way.

    It labels what probes learn from, and chooses settings, so that the judge stays one that no step of a fit has seen.
    ``start`` as in ``classifier_stage``.
    """
    own = ReaderRecipe(
        "labeller", config.n_labeller, config.labeller_steps, LABELLER_SEED, LABELLER_HELD_OUT_SEED, 1, "separable",
        (16, 24, 64, 128), 48,
    )  # fmt: skip
    return _reader(own, config, paths, device, progress, start)


def _reader(
    own: ReaderRecipe,
    config: RecipeConfig,
    paths: Paths,
    device: torch.device,
    progress: Progress,
    start: Path | None,
) -> HeadsClassifier:
    return Workspace(paths.work).piece(
        own.name,
        partial(_train_reader, own, config, paths, device, progress, start),
        lambda path, made: made.save(path),
        HeadsClassifier.load,
    )


def _train_reader(
    own: ReaderRecipe,
    config: RecipeConfig,
    paths: Paths,
    device: torch.device,
    progress: Progress,
    start: Path | None,
) -> HeadsClassifier:
    drawing, training = progress.parts((3, 4), (None, own.name))
    pieces = Workspace(paths.work)
    draw = partial(_reader_drawings, own, config, paths, device, drawing, start)
    drawn = pieces.tensors(f"{own.name}-drawings-{own.n_drawings}", draw)
    reader = train_heads(
        torch.from_numpy(drawn["images"]),
        torch.from_numpy(drawn["labels"]),
        world.ATTRIBUTES,
        n_steps=own.n_steps,
        batch_size=256 if device.type == "cuda" else 128,
        lr=2e-3,
        seed=own.seed,
        device=device,
        progress=training,
        widths=own.widths,
        architecture=own.architecture,
        image_size=own.image_size,
        checkpoint=paths.work / f"{own.name}-training.pt",
    )
    held = draw_many(config.n_held_out, first_seed=own.first_held_out_seed, balanced=True)
    return calibrate(reader, held.images, held.labels)


def _reader_drawings(
    own: ReaderRecipe,
    config: RecipeConfig,
    paths: Paths,
    device: torch.device,
    progress: Progress,
    start: Path | None,
) -> dict[str, np.ndarray]:
    """Balanced drawings ``images`` with ``labels``, the first half of them seen through the autoencoder."""
    decoder, drawing = progress.parts((2, 1), (None, "balanced drawings"))
    vae = autoencoder_stage(config, paths, device, decoder) if start is None else open_parts(start)[1].to(device)
    train = draw_many(own.n_drawings, first_seed=own.first_seed, balanced=True, variation=WIDE, progress=drawing)
    images = train.images.copy()
    half = len(images) // 2
    images[:half] = decode_images(vae, encode_all(vae, torch.from_numpy(images[:half]), device=device))
    return {"images": images, "labels": train.labels}


def make_pipeline(nets: Nets, vae: AutoencoderTiny) -> StableDiffusionPipeline | LDMPipeline | StableDiffusion3Pipeline:
    """The stock pipeline around trained parts."""
    if isinstance(nets, TransformerParts):
        return StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=nets.encoders[0],
            text_encoder_2=nets.encoders[1],
            text_encoder_3=None,
            tokenizer=nets.tokenizer,
            tokenizer_2=nets.tokenizer,
            tokenizer_3=None,
            transformer=nets.transformer,
            scheduler=make_flow_scheduler(),
        )
    if nets.text_encoder is None:
        return LDMPipeline(vqvae=vae, unet=nets.unet, scheduler=make_scheduler())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=nets.text_encoder,
        tokenizer=nets.tokenizer,
        unet=nets.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(nets: Nets, vae: AutoencoderTiny, folder: Path) -> Path:
    """Write a stock diffusers folder in fp16 safetensors, every file under 10 MB, the planted table beside it."""
    modules = [m.cpu().half() for m in (*nets.modules, vae)]
    with atomic_folder(folder) as partial:
        make_pipeline(nets, vae).save_pretrained(partial, safe_serialization=True, max_shard_size=MAX_SHARD)
        for path in partial.glob("*/config.json"):  # where parts came from is nobody's
            _edit_json(path, remove=("_name_or_path",))
        for decoder in ("vqvae", "vae"):  # diffusers writes a key that it then warns of; it sets the value itself
            if (partial / decoder).is_dir():
                _edit_json(partial / decoder / "config.json", remove=("block_out_channels",))
        for path in partial.glob("text_encoder*/config.json"):
            # transformers loads in the recorded dtype: single precision, as the rest of the pipeline does
            _edit_json(path, dtype="float32")
        if isinstance(nets, TransformerParts):  # diffusers passes over it; ``model.opening`` reads it
            _edit_json(partial / "model_index.json", _max_sequence_length=0)
        (partial / "planted.json").write_text(json.dumps(world.table(), indent=1) + "\n", encoding="utf-8")
    for module in modules:
        module.float()
    return folder


def _edit_json(path: Path, *, remove: Sequence[str] = (), **changes: str | int) -> None:
    values = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in remove}
    path.write_text(json.dumps({**values, **changes}, indent=2) + "\n", encoding="utf-8")
