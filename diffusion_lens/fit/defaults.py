"""From a model and a few words to a whole ``FitConfig``: what each kind of model is fitted with unless told otherwise.

| kind of model | steps | guidance | images | batch |
|---|---|---|---|---|
| Stable Diffusion 1/2 | 50 | 7.5 | 2,000 | 16 |
| SDXL | 50 | 5 | 2,000 | 4 |
| few-step (LCM, TCD, turbo) | 4 | none; 8.5 as an embedding where the model has one | 2,000 | 16 |
| unconditional, pixel or latent | 50 | none | 4,000 | 16 |
| transformers | those of the pipeline's own call | | 2,000 | 4 |

Steps, guidance and the dictionary (8 features per channel, 32 active, one code per position) are the papers' and the
pipelines' own [DiffLens, code]; the counts are our working form. At most 500 images per class are collected, fewer
where their bottlenecks would take more than ``STORE_BYTES``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lens.base.text import read_text
from diffusion_lens.base.types import LensError
from diffusion_lens.features.atlas import AtlasConfig
from diffusion_lens.features.train_sae import SAETrainConfig
from diffusion_lens.fit.choose import ChooseConfig
from diffusion_lens.fit.config import FitConfig
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.model.pipelines import DiffusionModel

STORE_BYTES = 20_000_000_000
"""Budget of the activation store."""
MAX_PER_CLASS = 500
MIN_PER_CLASS = 8
FEATURES_PER_CHANNEL = 8
ACTIVE = 32
QUICK_IMAGES = 200


@dataclass(frozen=True)
class KindDefaults:
    """Steps, guidance scale, images sampled, and images drawn at once."""

    n_steps: int
    guidance_scale: float
    n_images: int
    batch_size: int


def kind_defaults(model: DiffusionModel) -> KindDefaults:
    """The row of the table above that ``model`` belongs to."""
    family = model.family
    if not model.splits_step and model.is_text:
        embedded = getattr(model.denoiser.config, "time_cond_proj_dim", None) is not None
        return KindDefaults(4, 8.5 if embedded else 1.0, 2000, 16)
    return KindDefaults(*family.defaults, 2000 if model.is_text else 4000, family.fit_batch)


def default_config(
    model: DiffusionModel,
    judge: Classifier,
    *,
    source: str,
    classifier: str,
    attributes: Sequence[str] = (),
    prompts: Sequence[str] = (),
    quick: bool = False,
    sae: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> FitConfig:
    """A configuration for ``model``, found at ``source``, judged by ``judge``, found under ``classifier``.

    Args:
        attributes: what is steered; empty: all that the judge reads. Their classes are the judge's.
        prompts: sampled and suggested; the first is swept.
        quick: a small lens in a tenth of the time, for a first look.
        sae, changes: keys of ``SAETrainConfig`` and ``FitConfig`` that take the place of the defaults.

    Raises:
        LensError: an attribute that the judge does not read, prompts where none are taken or none where they are.
    """
    names = tuple(attributes) or tuple(a.name for a in judge.attributes)
    classes = _classes(judge, names)
    if model.is_text and not prompts:
        raise LensError("This model draws from prompts; give some, with --prompts 'a photo of a doctor'.")
    if prompts and not model.is_text:
        raise LensError("This model takes no prompt; leave --prompts out.")
    kind, given = kind_defaults(model), {k: v for k, v in (changes or {}).items() if v is not None}
    n_steps = given.get("n_steps", kind.n_steps)
    values: dict[str, Any] = {
        "name": model.model_id.rpartition("/")[2],
        "model": source,
        "model_id": model.model_id,
        "hook_name": model.hook_name,
        "size": model.settings.size,
        "max_sequence_length": model.settings.max_sequence_length,
        "classifier": classifier,
        "attributes": names,
        "sampling_prompts": tuple(prompts),
        "prompts": tuple(prompts),
        "n_steps": n_steps,
        "guidance_scale": kind.guidance_scale,
        "n_images": QUICK_IMAGES if quick else kind.n_images,
        "batch_size": kind.batch_size,
        "per_class": _per_class(model, n_steps, sum(classes.values())),
        "effect_features": 0 if quick else 2,
        "effect_images": 32,
        "sweep_prompts": tuple(prompts)[:1],
        "sweep_images": 24 if quick else 100,
        "sweep_controls": not quick,
        "flip_books": not quick,
        **({"attribution_images": 32, "pool_images": 96, "atlas": AtlasConfig(layout="pca")} if quick else {}),
        "sae": {
            "d_sae": FEATURES_PER_CHANNEL * model.d_in, "k": min(ACTIVE, model.d_in),
            "n_steps": 500 if quick else 10_000, **{k: v for k, v in (sae or {}).items() if v is not None},
        },
        "choose": ChooseConfig(
            n_features=(ACTIVE,) if quick else (10, 30),
            poles=("both",),
            samplers=("asymmetric" if model.splits_step else "symmetric",),
            holds=("nothing", "others") if len(names) > 1 and not quick else ("nothing",),
            betas=(-1.0, 1.0, 3.0) if quick else ChooseConfig().betas,
            n_images=16 if quick else 64,
        ),
        **given,
    }  # fmt: skip
    values["sae"] = SAETrainConfig.parse(values["sae"], where="the SAE")
    return FitConfig.parse(values, where="the fit")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line; empty lines and lines that begin with ``#`` are left out."""
    lines = read_text(path).split("\n")
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if not found:
        raise LensError(f"{path} holds no prompt; write one a line.")
    return found


def _classes(judge: Classifier, names: Sequence[str]) -> dict[str, int]:
    known = {a.name: len(a.classes) for a in judge.attributes}
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        raise LensError(f"The classifier does not read '{strange}'; it reads {', '.join(known)}.")
    return {name: known[name] for name in names}


def _per_class(model: DiffusionModel, n_steps: int, n_classes: int) -> int:
    """Images per class whose bottlenecks (float16, every step) fit ``STORE_BYTES`` together."""
    image_bytes = 2 * n_steps * int(np.prod(model.hook_shape))
    return max(MIN_PER_CLASS, min(MAX_PER_CLASS, STORE_BYTES // (image_bytes * n_classes)))
