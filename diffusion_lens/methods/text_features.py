"""Features of the prompt's embedding (after SAE Debias, arXiv 2507.20973): a k-sparse autoencoder on text alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion_lens.base.types import EditSpec, GenerationRequest, LensError
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.features.train_sae import SAETrainConfig, train_sae
from diffusion_lens.methods.edits import ClassDraw, NoEdit, RequestEdit, WeightEdit
from diffusion_lens.methods.equisteer import need_text_unet
from diffusion_lens.methods.prompts import name_class
from diffusion_lens.methods.protocol import Fitted, Learned, Method, MethodOptions, Task
from diffusion_lens.model.denoise import Edit
from diffusion_lens.model.pipelines import DiffusionModel


class TextFeaturesOptions(MethodOptions):
    """The dictionary of the text embeddings, and how many of its features are steered."""

    d_sae: int = Field(512, ge=8, le=65_536, title="Features of the dictionary")
    k: int = Field(16, ge=1, le=4_096, title="Active at once")
    iterations: int = Field(400, ge=1, le=100_000, title="Training steps")
    n_features: int = Field(
        16, ge=1, le=65_536, title="Features steered", description="Per class, largest difference first."
    )
    seed: int = Field(0, ge=0, title="Seed of the training")


class TextFeatures(Method):
    """SAE features of the text embedding."""

    key = "text-sae"
    name = "SAE on text (SAE Debias-style)"
    kind = "SAE features"
    source = "After SAE Debias, arXiv 2507.20973"
    explanation = (
        "Trains a k-sparse autoencoder on embeddings of sentences: the lens's prompts, plain and with every class of "
        "its attributes said. A class's features are those that fire more when it is said than when the others are; "
        "their mean difference, decoded, is added to what the U-Net is told, at every token. The U-Net and its images "
        "are never looked at, so the same dictionary serves every model with this text encoder. Each image is given a "
        "class drawn from the target shares. Sentences, scores and the additive edit are our working form (after SAE "
        "Debias, arXiv 2507.20973)."
    )
    options = TextFeaturesOptions
    strengths = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)

    def learn(self, task: Task) -> Learned:
        """``directions [class, c]``: the decoded difference of the steered features of every class."""
        model, options, attribute = task.model, task.options, task.attribute
        need_text_unet(model, self.name)
        told = [p for p in dict.fromkeys((*task.draws.prompts, *task.lens.manifest.prompts)) if p is not None]
        attributes = [probe.attribute for probe in task.lens.probes.values()]
        named = [name_class(p, a, label) for p in told for a in attributes for label in a.classes]
        sentences = [text for text in dict.fromkeys((*told, *named)) if sayable(model, text)]
        samples = torch.cat([embedding(model, text) for text in sentences])
        config = SAETrainConfig(
            d_sae=options.d_sae, k=min(options.k, options.d_sae), n_steps=options.iterations,
            batch_size=min(1024, len(samples)), seed=options.seed,
        )  # fmt: skip
        sae, log = train_sae(
            samples, config, model_id=model.model_id, hook_name="text embedding", spatial=(1, 1),
            device=model.device, progress=task.progress,
        )  # fmt: skip
        by_class = [[name_class(p, attribute, label) for p in task.draws.prompts] for label in attribute.classes]
        codes = torch.stack([mean_code(model, sae, prompts) for prompts in by_class])
        n = len(codes)
        return Learned(
            {"directions": steered_directions((codes - codes.mean(0)) * n / (n - 1), sae.W_dec, options.n_features)},
            {"fvu": log.fvu, "sentences": len(sentences)},
        )

    def build(self, fitted: Fitted, strength: float) -> Edit:
        """Every image's embedding moved by ``strength`` times the direction of the class drawn for it."""
        spec = fitted.spec(strength)
        if strength == 0:
            return NoEdit(spec)
        draw = ClassDraw(fitted.attribute, fitted.record.target, fitted.options.draw_seed)
        return RequestEdit(partial(_for_batch, fitted.tensors["directions"], draw, strength, spec), spec)


def sayable(model: DiffusionModel, text: str) -> bool:
    """Whether the model knows the words, and reads so many."""
    try:
        model.check_prompt(text)
    except LensError:
        return False
    return True


def embedding(model: DiffusionModel, prompt: str) -> Tensor:
    """What the U-Net is told of a prompt, a row per token ``[tokens, c]``."""
    rows: Tensor = model.condition(prompt, 1, 1.0).kwargs["encoder_hidden_states"][0]
    return rows.float()


def mean_code(model: DiffusionModel, sae: SparseAutoencoder, prompts: Sequence[str]) -> Tensor:
    """Mean feature activations over the tokens of some sentences, ``[d_sae]``."""
    with torch.no_grad():
        return torch.stack([sae.encode(embedding(model, prompt)).mean(0) for prompt in prompts]).mean(0)


def steered_directions(scores: Tensor, decoder: Tensor, n_features: int) -> Tensor:
    """``Σ score_i W_dec[i]`` over the features of largest positive ``scores [class, d_sae]`` → ``[class, c]``."""
    top = scores.topk(min(n_features, scores.shape[1]), dim=1)
    kept = torch.zeros_like(scores).scatter(1, top.indices, top.values.clamp_min(0))
    return kept @ decoder.to(kept)


def _for_batch(
    directions: Tensor, draw: ClassDraw, strength: float, spec: EditSpec, request: GenerationRequest
) -> WeightEdit:
    return WeightEdit(partial(told_more, shift=strength * directions[draw.rows(request.seeds)]), spec)


@contextmanager
def told_more(model: DiffusionModel, *, shift: Tensor) -> Iterator[None]:
    """Add ``shift [n, c]`` to every token of what the U-Net is told, in the conditional half of a batch."""

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        told = kwargs["encoder_hidden_states"]
        moved = told[-len(shift) :] + shift.to(told)[:, None]
        return args, {**kwargs, "encoder_hidden_states": torch.cat([told[: -len(shift)], moved])}

    handle = model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
