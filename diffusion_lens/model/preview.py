"""A tiny autoencoder beside the full one: images to look at before the full decode (E3), never to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from diffusion_lens.base.types import LensError
from diffusion_lens.base.weights import LOAD_ERRORS, reason
from diffusion_lens.model.placement import decoder
from diffusion_lens.model.run_options import RunOptions


@dataclass(frozen=True, eq=False)
class PreviewDecoder:
    """``network`` decodes the pipeline's final latents as they are; ``name`` is what visitors read beside them."""

    name: str
    network: AutoencoderTiny


def load_preview(
    options: RunOptions, pipe: Any, device: torch.device, dtype: torch.dtype, *, offline: bool = False
) -> PreviewDecoder | None:
    """The tiny autoencoder that ``options`` name (hub id or folder, safetensors only); ``None`` where they name none.

    Raises ``LensError`` where its files are missing, broken or of another network, and where it does not decode the
    latents of ``pipe``: a pixel model, another number of channels, another size.
    """
    source = options.preview
    if not source:
        return None
    if decoder(pipe) is None:
        raise LensError(f"--preview is for models of latents, and {type(pipe).__name__} draws pixels; leave it out.")
    network = _load(source, offline)
    _check_fit(source, network, decoder(pipe))
    network = network.to(device=device, dtype=dtype).eval()
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    if options.slicing:
        network.enable_slicing()
    folder = Path(source)
    return PreviewDecoder(folder.resolve().name if folder.exists() else source, network)


def _load(source: str, offline: bool) -> AutoencoderTiny:
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise LensError(f"{source} is no tiny autoencoder: it has no config.json; check --preview.")
    try:
        kind = AutoencoderTiny.load_config(source, local_files_only=offline).get("_class_name", "unknown")
        if kind == AutoencoderTiny.__name__:
            network, report = AutoencoderTiny.from_pretrained(
                source, local_files_only=offline, use_safetensors=True, output_loading_info=True
            )
    except LOAD_ERRORS as error:
        hint = "" if Path(source).exists() else "; check the name and the network, or give a folder on this machine"
        raise LensError(f"The preview {source} could not be loaded{hint}. Reason: {reason(error)}") from error
    if kind != AutoencoderTiny.__name__:
        raise LensError(f"--preview takes an AutoencoderTiny, and {source} is of the kind {kind}; choose another.")
    # diffusers fills missing weights with random ones and goes on
    absent = [name for name in report["missing_keys"] if name.startswith("decoder.")]
    if absent:
        raise LensError(f"The preview {source} lacks {len(absent)} of its decoder's weights; fetch it again.")
    return network


def _check_fit(source: str, network: AutoencoderTiny, full: Any) -> None:
    theirs, ours = network.config.latent_channels, full.config.latent_channels
    if theirs != ours:
        raise LensError(
            f"The preview {source} decodes latents of {theirs} channels and this model's have {ours}; choose the tiny "
            "autoencoder made for this model."
        )
    made = (_enlargement(network), network.config.out_channels)
    wanted = (2 ** (len(full.config.block_out_channels) - 1), full.config.out_channels)
    if made != wanted:
        raise LensError(
            f"The preview {source} makes {made[0]} pixels a side of each latent in {made[1]} colours and this model "
            f"{wanted[0]} in {wanted[1]}; choose the tiny autoencoder made for this model."
        )


def _enlargement(network: AutoencoderTiny) -> int:
    """Pixels a side that one latent becomes."""
    return int(network.config.upsampling_scaling_factor ** (len(network.config.num_decoder_blocks) - 1))
