"""An SAE in SAELens' own folder: ``cfg.json`` and ``sae_weights.safetensors``, which ``SAE.load_from_disk`` opens.

What SAELens has no word for stands in its ``metadata``: ``layout`` and ``spatial`` beside its own ``hook_name`` and
``model_name``. Its TopK is ``s = TopK(ReLU((x − b_dec) W_enc + b_enc))``, ``x̂ = s W_dec + b_dec``, with ``b_dec``
subtracted where ``apply_b_dec_to_input`` says so, and k taken before the ReLU: ours (``sae.SparseAutoencoder``).

Read back: what is written here; a TopK SAE that SAELens saved, also one saved in training, whose
``rescale_acts_by_decoder_norm`` is folded in; and the form of version 0.4 (the same names, the scale beside the
weights). Everything else is refused by its format's name: nothing is read as what it is not. Checked against SAELens
6.54.12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import load_metadata, read_json, save_tensors, write_json
from diffusion_lens.base.types import LensError
from diffusion_lens.features.sae_config import SAEConfig
from diffusion_lens.features.sae_identity import FOLDED, Origin, Weights, fold, fold_decoder_norm, identify

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
ORIGIN_FILE = "origin.safetensors"
SAELENS_VERSION = "6.54.12"
"""Whose format is written; SAELens takes a configuration without one for an older form."""
CONFIG_BYTES = 2**20

FOREIGN_FILES = {"ae.pt": "dictionary_learning", "params.npz": "Gemma Scope", "sae.safetensors": "sparsify"}
SPARSIFY_KEYS = {"num_latents", "expansion_factor", "multi_topk", "transcode"}
OLD_SAELENS_KEYS = {"activation_fn", "activation_fn_str", "hook_point", "hook_layer", "finetuning_scaling_factor"}
NORMALISED = {
    "expected_average_only_in": "expects activations scaled by a factor that is not in the file",
    "covariance_whitening": "expects whitened activations",
    "constant_norm_rescale": "rescales every sample by its own norm",
    "layer_norm": "normalises every sample by its own mean and spread",
}


@dataclass(frozen=True, eq=False)
class StoredSAE:
    """The content of an SAE's folder: float32 ``weights`` by name, and their ``origin`` if they came from 0.4."""

    cfg: SAEConfig
    weights: Weights
    origin: Origin | None = None


class SAELensTopK(StrictConfig):
    """``cfg.json`` of SAELens 6 for a TopK SAE, with the fields of its training form, which change no code."""

    architecture: Literal["topk"]
    d_in: int
    d_sae: int
    k: int
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)
    use_sparse_activations: bool = False
    aux_loss_coefficient: float | None = None
    decoder_init_norm: float | None = None
    finetuning_scaling_factor: Literal[False] = False


class SAEConfig04(SAEConfig):
    """``cfg.json`` of version 0.4: ``normalise`` is the factor the input is multiplied by."""

    normalise: float = Field(default=1.0, gt=0, allow_inf_nan=False)


def write_sae(folder: Path, stored: StoredSAE) -> None:
    """Write an SAE's folder, in place of one that is there; ``origin.safetensors`` only where there is an origin."""
    cfg = stored.cfg
    values = {
        "architecture": "topk",
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "k": cfg.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": cfg.model_id,
            "hook_name": cfg.hook_name,
            "layout": cfg.layout,
            "spatial": list(cfg.spatial),
        },
    }
    weights = {name: stored.weights[name].detach().float() for name in cfg.shapes()}
    save_tensors(folder / WEIGHTS_FILE, weights, {"sae_id": identify(cfg, weights, stored.origin)})
    if stored.origin is None:
        (folder / ORIGIN_FILE).unlink(missing_ok=True)
    else:
        save_tensors(folder / ORIGIN_FILE, stored.origin.ulps, {"scale": repr(stored.origin.scale)})
    write_json(folder / CONFIG_FILE, values, indent=1)


def read_sae(folder: Path) -> StoredSAE:
    """Read an SAE's folder in any of the forms named above.

    Raises ``LensError`` for a missing or damaged file, for weights that are not the configuration's or not the
    ones that were written beside it, and for another format or architecture, by its name.
    """
    values = _read_config(folder)
    if {"layout", "normalise"} <= set(values):
        return _read_04(folder, values)
    _refuse_foreign(folder, values)
    asked = SAELensTopK.parse(values, where=str(folder / CONFIG_FILE))
    cfg = _config(folder, asked)
    weights = _read_weights(folder, cfg)
    if asked.rescale_acts_by_decoder_norm:
        return StoredSAE(cfg, _finite(folder, fold_decoder_norm(weights)))
    stored = StoredSAE(cfg, weights, _read_origin(folder, cfg))
    _check_written_id(folder, identify(cfg, weights, stored.origin))
    return stored


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        for name, form in FOREIGN_FILES.items():
            if (folder / name).is_file():
                _refuse(folder, f"an SAE in the format of {form}")
        raise LensError(f"{CONFIG_FILE} is missing from {folder}.")
    if path.stat().st_size > CONFIG_BYTES:
        raise LensError(f"{path} is larger than any SAE's configuration; restore it from the original.")
    values = read_json(path)
    if not isinstance(values, dict):
        raise LensError(f"{path} does not hold a JSON object.")
    return values


def _refuse_foreign(folder: Path, values: dict[str, Any]) -> None:
    """Raise ``LensError`` for another format, architecture or treatment of the input, by its name."""
    architecture = values.get("architecture")
    if architecture is None and SPARSIFY_KEYS & set(values):
        _refuse(folder, "an SAE in the format of sparsify (which DiffLens' published SAEs have)")
    if architecture is None and OLD_SAELENS_KEYS & set(values):
        _refuse(folder, "an SAE in the format of SAELens before version 6 (load and save it with SAELens 6)")
    if architecture is None:
        _refuse(folder, f"an SAE of unknown format ({CONFIG_FILE} names no architecture)")
    if architecture != "topk":
        _refuse(folder, f"a SAELens SAE of architecture {str(architecture)[:40]!r}")
    if (scaling := values.get("normalize_activations", "none")) != "none":
        what = NORMALISED.get(scaling, "is not known here") if isinstance(scaling, str) else "is not known here"
        _refuse(folder, f"a SAELens SAE with normalize_activations {str(scaling)[:40]!r}, which {what}")
    if (shape := values.get("reshape_activations", "none")) != "none":
        _refuse(folder, f"a SAELens SAE of attention heads (reshape_activations {str(shape)[:40]!r})")


def _refuse(folder: Path, what: str) -> NoReturn:
    raise LensError(
        f"{folder} holds {what}; only TopK SAEs in the format of SAELens 6 are read, normalisation folded in."
    )


def _config(folder: Path, asked: SAELensTopK) -> SAEConfig:
    """Ours from theirs; what a file of SAELens does not say: samples are single positions, of a place without name."""
    metadata = asked.metadata
    values = {
        "d_in": asked.d_in,
        "d_sae": asked.d_sae,
        "k": asked.k,
        "layout": metadata.get("layout") or "position",
        "hook_name": metadata.get("hook_name") or "",
        "model_id": metadata.get("model_name") or "",
        "spatial": metadata.get("spatial") or (1, 1),
        "apply_b_dec_to_input": asked.apply_b_dec_to_input,
    }
    return SAEConfig.parse(values, where=str(folder / CONFIG_FILE))


def _read_04(folder: Path, values: dict[str, Any]) -> StoredSAE:
    old = SAEConfig04.parse(values, where=str(folder / CONFIG_FILE))
    cfg = SAEConfig(**old.model_dump(exclude={"normalise"}))
    weights = _read_weights(folder, cfg)
    stored = StoredSAE(cfg, weights)
    if old.normalise != 1.0:
        folded = _finite(folder, fold(weights, old.normalise))
        stored = StoredSAE(cfg, folded, Origin.of(weights, old.normalise))
    _check_written_id(folder, identify(cfg, stored.weights, stored.origin))
    return stored


def _read_weights(folder: Path, cfg: SAEConfig) -> dict[str, Tensor]:
    found = _read_tensors(folder / WEIGHTS_FILE, cfg.shapes(), ("F64", "F32", "F16", "BF16"))
    return _finite(folder, {name: value.float() for name, value in found.items()})


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]], kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of ``shapes``; names, shapes and types are checked in the file's header before any is read."""
    if not path.is_file():
        raise LensError(f"{path.name} is missing from {path.parent}.")
    try:
        with safe_open(path, "pt") as file:
            heads = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            for name, shape in shapes.items():
                found = heads[name].get_shape() if name in heads else "nothing"
                if found != list(shape):
                    raise LensError(f"{path}: {name} should be {list(shape)}; found {found}.")
                if heads[name].get_dtype() not in kinds:
                    raise LensError(f"{path}: {name} should be of type {kinds}; found {heads[name].get_dtype()}.")
            if strangers := sorted(set(heads) - set(shapes)):
                raise LensError(f"{path} holds '{strangers[0][:40]}', which a TopK SAE does not have.")
            return {name: file.get_tensor(name) for name in shapes}
    except SafetensorError:
        raise LensError(f"{path} is damaged; restore it from the original.") from None


def _finite(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise LensError(f"{folder / WEIGHTS_FILE}: {name} is not finite; restore it from the original.")
    return weights


def _read_origin(folder: Path, cfg: SAEConfig) -> Origin | None:
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None
    ulps = _read_tensors(path, {name: cfg.shapes()[name] for name in FOLDED}, ("I8", "I32"))
    try:
        scale = float(load_metadata(path)["scale"])
    except (KeyError, ValueError):
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise LensError(f"{path} does not say which scale was folded in; restore it from the original.")
    return Origin(scale, ulps)


def _check_written_id(folder: Path, sae_id: str) -> None:
    """Against the id that was written with the weights; SAELens writes none."""
    written = load_metadata(folder / WEIGHTS_FILE).get("sae_id")
    if written not in (None, sae_id):
        raise LensError(
            f"{folder / WEIGHTS_FILE} does not belong to the {CONFIG_FILE} beside it; restore both from the original."
        )
