"""What a lens is fitted from: two equal configurations give equal lenses."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, model_validator

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.features.atlas import AtlasConfig
from diffusion_lens.features.train_sae import SAETrainConfig
from diffusion_lens.fit.choose import ChooseConfig
from diffusion_lens.results.manifest import Setting

STAGES = (
    "sample", "label", "collect", "sae", "probes", "attribution", "atlas", "settings", "effects", "sweeps",
    "flip-books",
)  # fmt: skip
"""In order; each depends on all before it."""


class FitConfig(StrictConfig):
    """Everything that decides what a fitted lens is; two equal configurations give equal lenses.

    Attributes:
        name: of the lens. model: a diffusers folder or hub id; ``model_id`` is what requests call it,
            ``variant`` which of its weight files are read (see ``load_model``).
        hook_name: the site that is read and edited (``model.sites.Site``).
        size, max_sequence_length: of the model's own call (see ``load_model``), where that is not left its own.
        bundle_pipeline: copy the pipeline into the lens, so that the folder is complete.
        classifier: folder of the classifier that judges. labeller: of the one whose reading trains the probes
            and chooses the settings (``None``: the same; a lens says so, for what mitigates should not be the judge).
        attributes: names of what is to be steered; the classifier knows their classes.
        sampling_prompts: prompts drawn from in turn (empty: unconditional). prompts: suggested to users.
        n_images: images sampled and labelled. first_seed: of them.
        per_class: certain images per class (at most) on which activations are collected.
        batch_size: images drawn at once; part of the result in the last bits.
        even_probes: train each probe as if the other attributes were as frequent in every class (``even_weights``);
            else images count alike, and an attribute's probe also learns what comes with it under the prompts.
        attribution_images: images per attribute that integrated gradients are averaged over.
        pool_images: images of the atlas.
        settings: how attributes are steered; those without one get theirs by ``choose``.
        effect_features, effect_images: per class, how many top features are steered alone, on how many images;
            0 leaves causal effects out.
        sweep_attributes: what is swept (empty: every attribute).
        sweep_prompts: prompts swept with ``sweep_images`` images per strength from ``sweep_first_seed`` on.
        sweep_controls: also sweep random features with the same setting.
        flip_books: also draw a flip-book of everything that is swept, for instant dragging in the app.
    """

    name: str
    model: str
    revision: str | None = None
    variant: str | None = None
    model_id: str
    hook_name: str = "mid_block"
    size: tuple[int, int] | None = None
    max_sequence_length: int | None = Field(default=None, ge=0)
    bundle_pipeline: bool = False
    classifier: str
    labeller: str | None = None
    attributes: tuple[str, ...] = Field(min_length=1)
    sampling_prompts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    n_steps: int = Field(ge=1)
    guidance_scale: float = Field(default=1.0, ge=0)
    n_images: int = Field(ge=1)
    first_seed: int = Field(default=1_000_000, ge=0)
    per_class: int = Field(ge=2)
    batch_size: int = Field(default=16, ge=1)
    sae: SAETrainConfig
    probe_weight_decay: float | None = None
    even_probes: bool = True
    attribution_images: int = Field(default=256, ge=1)
    pool_images: int = Field(default=512, ge=1)
    atlas: AtlasConfig = AtlasConfig()
    settings: tuple[Setting, ...] = ()
    choose: ChooseConfig = ChooseConfig()
    effect_features: int = Field(default=0, ge=0)
    effect_images: int = Field(default=64, ge=1)
    sweep_attributes: tuple[str, ...] = ()
    sweep_prompts: tuple[str, ...] = ()
    sweep_images: int = Field(default=100, ge=2)
    sweep_first_seed: int = Field(default=0, ge=0)
    sweep_controls: bool = False
    flip_books: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> FitConfig:
        steered = [setting.attribute for setting in self.settings]
        if len(set(steered)) != len(steered) or not set(steered) <= set(self.attributes):
            raise ValueError("settings must name attributes of this lens, each once")
        if not set(self.sweep_attributes) <= set(self.attributes):
            raise ValueError("sweep_attributes must name attributes of this lens")
        if not self.sampling_prompts and (self.prompts or self.sweep_prompts):
            raise ValueError("a model without sampling prompts is unconditional and takes no prompts")
        return self

    @property
    def draws(self) -> tuple[str | None, ...]:
        """The prompts sampled from; ``(None,)`` for unconditional models."""
        return self.sampling_prompts or (None,)

    @property
    def swept(self) -> tuple[str, ...]:
        """The attributes that are swept."""
        return self.sweep_attributes or self.attributes

    @property
    def sweeps(self) -> tuple[str | None, ...]:
        """The prompts swept; ``(None,)`` for unconditional models."""
        return self.sweep_prompts if self.sampling_prompts else (None,)


STAGE_KEYS: dict[str, tuple[str, ...]] = {
    "sample": (
        "revision", "model_id", "sampling_prompts", "n_steps", "guidance_scale", "n_images", "first_seed",
        "batch_size", "size", "max_sequence_length",
    ),
    "label": (),
    "collect": ("hook_name", "attributes", "per_class", "seed"),
    "sae": ("sae",),
    "probes": ("probe_weight_decay", "even_probes"),
    "attribution": ("attribution_images",),
    "atlas": ("pool_images", "atlas"),
    "settings": ("settings", "choose"),
    "effects": ("effect_features", "effect_images"),
    "sweeps": ("sweep_attributes", "sweep_prompts", "sweep_images", "sweep_first_seed", "sweep_controls"),
    "flip-books": ("flip_books",),
}  # fmt: skip


LATER = ("size", "max_sequence_length")
FIRST_ASKED = {"labeller": "label", "classifier": "settings"}
"""Classifier → the first stage that it decides."""


def stage_hashes(config: FitConfig, identities: dict[str, str]) -> dict[str, str]:
    """Stage → 12 hex digits over its part of the configuration and that of every stage before it.

    ``identities``: what the model and classifiers are; their paths do not count. A classifier counts from the stage
    on that first asks it, so that another one, or people, may read images that are sampled already.
    """
    values: dict[str, Any] = config.model_dump(mode="json")
    always = {name: text for name, text in identities.items() if name not in FIRST_ASKED}
    digest = hashlib.sha256(json.dumps(always, sort_keys=True).encode())
    hashes = {}
    for stage in STAGES:
        # Keys that older work lacks count from when they are used: what was made before is found again.
        part = {key: values[key] for key in STAGE_KEYS[stage] if key not in LATER or values[key] is not None}
        part |= {name: identities.get(name) for name, first in FIRST_ASKED.items() if first == stage}
        digest.update(json.dumps([stage, part], sort_keys=True).encode())
        hashes[stage] = digest.hexdigest()[:12]
    return hashes
