"""Read the artefacts that DiffLens publishes: SAE folders, feature lists and h-classifiers.

Their SAE is a pair of convolutions, ``s = TopK(ReLU(conv(h)))`` and ``ĥ = decoder(s)`` with a bias of its own. It is
mapped exactly: ``b_dec`` is the decoder's bias, and ``apply_b_dec_to_input=False`` keeps it out of the encoder, which
reads h itself. A kernel that covers the map (one code per image) becomes the "map" layout. Edits go by difference as
everywhere in the lens; ``published.py`` has their edit and attribution to the letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from diffusion_lens.base.checkpoints import read_pt, read_state_dict
from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import check_empty
from diffusion_lens.base.transaction import changing
from diffusion_lens.base.types import Attribute, Attribution, FeatureSet, LensError
from diffusion_lens.features.probes import Probe, save_probes
from diffusion_lens.features.sae import SparseAutoencoder, from_published
from diffusion_lens.results import records
from diffusion_lens.results.manifest import AttributeConfig, BaseModelRef, Manifest, Setting, commit_whole

HOOK_NAME = "mid_block"
N_STEPS = 50
SHIPPED_FEATURES = 30

P2_ATTRIBUTES = (
    Attribute("gender", ("female", "male")),
    Attribute("age", ("young", "adult", "old")),
    Attribute("race", ("white", "black", "asian", "indian")),
)
"""Class order of the published P2 h-classifiers' outputs; FairFace's perceived labels."""

SD_ATTRIBUTES = (
    Attribute("gender", ("male", "female")),
    Attribute("age", ("child", "adult", "old")),
    Attribute("race", ("white", "black", "asian", "indian")),
)
"""Class order of the published Stable Diffusion h-classifiers' outputs (gender the other way round than in P2)."""


class PublishedSAEConfig(StrictConfig):
    """``cfg.json`` of a published SAE folder; ``num_latents`` 0 means ``d_in · expansion_factor``."""

    d_in: int = Field(gt=0)
    k: int = Field(gt=0)
    expansion_factor: int = Field(default=32, gt=0)
    num_latents: int = Field(default=0, ge=0)
    normalize_decoder: bool = True
    multi_topk: bool = False

    @property
    def d_sae(self) -> int:
        """Dictionary size."""
        return self.num_latents or self.d_in * self.expansion_factor


def load_sae(
    folder: Path, *, model_id: str, hook_name: str = HOOK_NAME, spatial: tuple[int, int] = (8, 8)
) -> SparseAutoencoder:
    """An SAE from ``cfg.json`` and ``sae.safetensors``.

    Args:
        model_id: the model that the activations come from. spatial: ``(y, x)`` of its bottleneck map.

    Raises:
        LensError: a file is missing or damaged, or the two do not belong together.
    """
    cfg = PublishedSAEConfig.load(folder / "cfg.json")
    state = {name: tensor.float() for name, tensor in read_state_dict(folder / "sae.safetensors").items()}
    if "encoder.weight" in state and tuple(state["encoder.weight"].shape[:2]) != (cfg.d_sae, cfg.d_in):
        raise LensError(
            f"cfg.json speaks of {cfg.d_in} channels and {cfg.d_sae} features, sae.safetensors has an encoder of "
            f"{list(state['encoder.weight'].shape)}; they do not belong together."
        )
    return from_published(state, k=cfg.k, spatial=spatial, hook_name=hook_name, model_id=model_id)


def load_features(folder: Path, attribute: Attribute, sae: SparseAutoencoder) -> dict[str, FeatureSet]:
    """Class → its published features, best first, from ``<folder>/<class>.pt`` (a list or 1-D tensor of ids).

    The published lists carry no scores. ``scores`` fall evenly from 1 by rank: they say the order and nothing else.

    Raises:
        LensError: names the file that is missing, damaged, or holds something else.
    """
    return {label: _feature_set(folder / f"{label}.pt", attribute, label, sae) for label in attribute.classes}


def _feature_set(path: Path, attribute: Attribute, label: str, sae: SparseAutoencoder) -> FeatureSet:
    values = read_pt(path)
    values = values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else values
    if not isinstance(values, list) or not values or not all(type(i) is int for i in values):
        raise LensError(f"{path.name} does not hold a list of feature numbers; it is no DiffLens feature list.")
    if not all(0 <= i < sae.cfg.d_sae for i in values):
        raise LensError(f"{path.name} names a feature outside the SAE's {sae.cfg.d_sae}; it belongs to another SAE.")
    if len(set(values)) != len(values):
        raise LensError(f"{path.name} names a feature twice; fetch it again.")
    ranks = tuple(1 - rank / len(values) for rank in range(len(values)))
    return FeatureSet(tuple(values), ranks, attribute.name, label, sae.sae_id)


def load_h_classifier(
    path: Path,
    attribute: Attribute,
    *,
    n_steps: int = N_STEPS,
    temperature: float = 1.0,
    order: Literal["reversed", "sampling"] = "reversed",
) -> Probe:
    """The published per-step linear heads, ``linears.{t}.weight, linears.{t}.bias``, as a ``Probe``.

    There are 49 heads (P2) or 48 (Stable Diffusion) for 50 steps. Their code counts heads from the clean end: head t
    reads denoising step ``n_heads - t`` (order ``reversed``), so the first step has none, and for Stable Diffusion nor
    has the last. ``sampling`` is for heads counted from the noisy end. A step without a published head gets a zero
    head, which gives equal probabilities and zero attribution, as if the step were left out.

    Args:
        attribute: its classes in the order of the outputs (``P2_ATTRIBUTES``, ``SD_ATTRIBUTES``).
        temperature: divides the logits; published: 8 for gender in P2, 1 for age and race.

    Returns:
        A probe of ``n_steps`` heads. ``accuracy`` is NaN (not published), and chance for zero heads.
    """
    state = read_state_dict(path)
    heads = len(state) // 2
    names = [f"linears.{t}.{kind}" for t in range(heads) for kind in ("weight", "bias")]
    if not heads or set(names) != set(state):
        wrong = next(iter(sorted(set(names) ^ set(state))))
        raise LensError(f"{path.name} is no h-classifier: '{wrong}' is missing or foreign.")
    steps = [heads - t if order == "reversed" else t for t in range(heads)]
    if max(steps) >= n_steps:
        raise LensError(f"{path.name} has {heads} heads, too many for {n_steps} steps in this order.")
    shape = state[names[0]].shape
    n_classes = len(attribute.classes)
    for t in range(heads):
        weight, bias = state[f"linears.{t}.weight"], state[f"linears.{t}.bias"]
        if weight.ndim != 2 or weight.shape != shape or len(weight) != n_classes or tuple(bias.shape) != (n_classes,):
            raise LensError(
                f"{path.name}: head {t} has shapes {list(weight.shape)} and {list(bias.shape)}; "
                f"{attribute.name} has {n_classes} classes."
            )
    weights, biases = torch.zeros(n_steps, *shape), torch.zeros(n_steps, n_classes)
    accuracy = torch.full((n_steps,), 1 / n_classes)
    for t, step in enumerate(steps):
        weights[step], biases[step] = state[f"linears.{t}.weight"].float(), state[f"linears.{t}.bias"].float()
        accuracy[step] = torch.nan
    return Probe(attribute, weights, biases, accuracy, temperature)


@dataclass(frozen=True)
class PublishedAttribute:
    """Where one attribute's artefacts lie: the folder of its feature lists, and its h-classifier (``None``: none)."""

    attribute: Attribute
    features: Path
    classifier: Path | None = None
    temperature: float = 1.0


def import_difflens(
    sae_dir: Path,
    attributes: Sequence[PublishedAttribute],
    model_id: str,
    out: Path,
    *,
    source: str | None = None,
    n_steps: int = N_STEPS,
    guidance_scale: float = 1.0,
    prompts: tuple[str, ...] = (),
    spatial: tuple[int, int] = (8, 8),
) -> Manifest:
    """Write a lens folder from published artefacts: the SAE, the probes, and the feature lists.

    The lens generates, edits, probes and attributes. It has no image classifier, atlas or sweeps, which are not
    published: give ``DiffusionLens.from_pretrained`` a classifier to judge images. The feature lists are kept as an
    attribution by the method ``published list (rank)``, whose scores say the order and nothing else.

    Args:
        model_id: the name that the SAE and requests know the model by. source: its hub id or pipeline folder
            (for P2, the folder that ``convert_p2.convert`` wrote); the default is ``model_id``.
        out: a new or empty folder.
        prompts: suggested prompts; empty for unconditional models.

    Raises:
        LensError: names the file that is missing, damaged, or does not belong to the SAE.
    """
    if not attributes:
        raise LensError("Name at least one attribute to import.")
    check_empty(out)
    sae = load_sae(sae_dir, model_id=model_id, spatial=spatial)
    probes, attributions = {}, {}
    for part in attributes:
        name = part.attribute.name
        attributions[name] = _ranking(load_features(part.features, part.attribute, sae), part.attribute, sae, n_steps)
        if part.classifier is not None:
            probe = load_h_classifier(part.classifier, part.attribute, n_steps=n_steps, temperature=part.temperature)
            if probe.weight.shape[2] != sae.cfg.channels * spatial[0] * spatial[1]:
                raise LensError(
                    f"{part.classifier.name} reads {probe.weight.shape[2]} numbers; the SAE's map has others."
                )
            probes[name] = probe
    manifest = Manifest(
        name=f"DiffLens artefacts for {model_id}",
        base_model=BaseModelRef(id=model_id, source=source or model_id),
        hook_name=sae.cfg.hook_name,
        scheduler="DDIMScheduler",
        n_steps=n_steps,
        guidance_scale=guidance_scale,
        attributes=tuple(AttributeConfig(name=p.attribute.name, classes=p.attribute.classes) for p in attributes),
        prompts=prompts,
        settings={name: _setting(attribution) for name, attribution in attributions.items()},
        sae_id=sae.sae_id,
        classifier_id="none",
    )
    with changing(out) as change:
        sae.save(change.staged / "sae")
        save_probes(change.staged / "probes.safetensors", probes)
        records.save_attributions(change.staged / "attribution.safetensors", attributions)
        return commit_whole(change, manifest)


def _ranking(
    features: dict[str, FeatureSet], attribute: Attribute, sae: SparseAutoencoder, n_steps: int
) -> Attribution:
    """The published lists in the shape of an attribution: rank scores, spread evenly over the steps."""
    scores = np.zeros((len(attribute.classes), n_steps, sae.cfg.d_sae), np.float32)
    for row, label in enumerate(attribute.classes):
        scores[row][:, list(features[label].ids)] = np.asarray(features[label].scores, np.float32) / n_steps
    return Attribution(
        scores=scores,
        completeness_gap=float("nan"),
        attribute=attribute,
        method="published list (rank)",
        baseline="not published",
        sae_id=sae.sae_id,
        n_images=0,
    )


def _setting(attribution: Attribution) -> Setting:
    """Their form of edit: scale one pole's first features, asymmetric sampler, every step."""
    return Setting(
        attribute=attribution.attribute.name,
        target=attribution.attribute.classes[0],
        n_features=SHIPPED_FEATURES,
        poles="one",
        mode="scale",
        sampler="asymmetric",
        betas=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
        note="DiffLens' published features, scaled; no strength was chosen on images here.",
    )
