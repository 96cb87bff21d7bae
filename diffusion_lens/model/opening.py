"""A folder or a hub repository to a pipeline, every part of which was in the files.

The libraries make up what is missing: tensors at random, tokenizers of two words. Each network is therefore loaded by
itself and must use every tensor of its files and get every tensor from them; the pipeline is put together of these.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import LensError
from diffusion_lens.base.weights import LOAD_ERRORS, reason
from diffusion_lens.model.claims import check_claims
from diffusion_lens.model.families.registry import supported
from diffusion_lens.model.run_options import is_missing_folder
from diffusion_lens.model.stored import INDEX, StoredPipeline, check_shards, open_stored, stored_parts, weight_files

CHECKER, EXTRACTOR = "safety_checker", "feature_extractor"
HALF = "fp16"
"""The variant that published models have where they lack plain weights."""
AGAIN = "fetch it again, or use the files that belong together."
LENGTH = "_max_sequence_length"
"""Our note in a pipeline's index, which diffusers passes over, of the ``max_sequence_length`` it was trained for."""
DERIVED = ("position_ids",)
"""Ends of names of tensors that older files store and networks compute."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A pipeline in memory, the files that it came from, and a sentence for what a person should know of it.

    ``max_sequence_length``: what its index notes that its own call is given, ``None`` where it notes nothing.
    """

    pipeline: Any
    stored: StoredPipeline
    notes: tuple[str, ...]
    max_sequence_length: int | None = None


def open_pipeline(
    source: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    offline: bool = False,
    variant: str | None = None,
    safety_checker: bool = True,
) -> Opened:
    """Load a diffusers folder or a hub repository; safetensors only, no code from it is run.

    Args:
        variant: of the weights, e.g. ``fp16``; by default the plain ones, or the only variant where there are none.
        safety_checker: ``False`` leaves the model's own checker out, or does without a deleted one.

    Raises:
        LensError: names the part and the tensor that is missing, foreign or of another shape; the files that are
            missing or broken; or the kind of pipeline that is not supported.
    """
    left_out: dict[str, None] = {} if safety_checker else {CHECKER: None}
    folder = _folder(source, revision, offline, variant, left_out)
    index = _index(source, folder)
    supported(index.get("_class_name"))
    if not safety_checker and not (folder / EXTRACTOR).is_dir():
        left_out[EXTRACTOR] = None
    parts = {name: named for name, named in stored_parts(folder).items() if name not in left_out}
    for name in parts:
        _check_folder(source, folder, name)
    stored = open_stored(folder, variant, without=tuple(left_out))
    if variant is not None and variant not in stored.variants.values():
        raise LensError(f"{source} has no weights of the variant '{variant}'; it has {_known_variants(folder, parts)}.")
    networks = {
        name: _load_part(source, name, folder / name, kind, dtype, stored.variants[name])
        for name, kind in ((name, _class(*named)) for name, named in parts.items())
        if kind is not None
    }
    for name in set(parts) - set(networks):
        check_claims(name, folder / name, ())
    # What the index leaves empty is said: diffusers takes some of it for missing.
    given: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]} | networks
    if not safety_checker and CHECKER in index:
        given |= {**{name: None for name in left_out if name in index}, "requires_safety_checker": False}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, **given
        )
    except LOAD_ERRORS as error:
        raise _unreadable(source, error) from error
    length = index.get(LENGTH)
    return Opened(pipe, stored, _notes(stored.variants, variant), length if isinstance(length, int) else None)


def _folder(
    source: str | Path, revision: str | None, offline: bool, variant: str | None, left_out: Mapping[str, None]
) -> Path:
    """The folder itself, or where the hub's files lie; a repository of half-precision weights alone is taken as such.

    Raises ``LensError`` where there is neither.
    """
    folder = Path(source)
    if folder.exists():
        if not (folder / INDEX).is_file():
            raise LensError(f"{source} is no diffusers pipeline: it has no {INDEX}.")
        return folder
    if is_missing_folder(source):
        raise LensError(f"There is no folder {source}; check the path.")
    failed: Exception | None = None
    for wanted in (variant,) if variant is not None else (None, HALF):
        try:
            found = Path(
                DiffusionPipeline.download(
                    str(source), revision=revision, local_files_only=offline, use_safetensors=True, variant=wanted,
                    **left_out,
                )
            )  # fmt: skip
        except LOAD_ERRORS as error:
            failed = failed or error
            continue
        if wanted is not None or any(found.glob("*/*.safetensors")):
            return found
    assert failed is not None
    raise _unreadable(source, failed) from failed


def _unreadable(source: str | Path, error: Exception, what: str = "as a diffusers pipeline") -> LensError:
    hint = "" if Path(source).exists() else "; check the name and the network, or give a folder on this machine"
    return LensError(f"{source} could not be loaded {what}{hint}. Reason: {reason(error)}")


def _index(source: str | Path, folder: Path) -> dict[str, Any]:
    try:
        index = read_json(folder / INDEX)
    except LensError as error:
        raise _unreadable(source, error) from None
    if not isinstance(index, dict):
        raise _unreadable(source, LensError(f"{INDEX} lists no parts."))
    return index


def _check_folder(source: str | Path, folder: Path, name: str) -> None:
    if (folder / name).is_dir() and any((folder / name).iterdir()):
        return
    advice = "fetch it again"
    if name in (CHECKER, EXTRACTOR):
        advice = "fetch it again, or leave the checker out with safety_checker=False (--no-safety-checker)"
    raise LensError(f"{source} could not be loaded: its part {name}/ is missing; {advice}.")


def _class(library: str, name: str) -> Any:
    """The class of a part that is a network, by the index; ``None`` for other parts and for unknown classes."""
    home: Any = getattr(diffusers.pipelines, library, None)
    if library in ("diffusers", "transformers"):
        home = importlib.import_module(library)
    kind = getattr(home, name, None)
    networks = (diffusers.ModelMixin, PreTrainedModel)
    return kind if isinstance(kind, type) and issubclass(kind, networks) else None


def _known_variants(folder: Path, parts: Iterable[str]) -> str:
    found = {variant for name in parts for variant in weight_files(folder / name) if variant is not None}
    return ", ".join(sorted(found)) or "none but the plain ones"


def _load_part(
    source: str | Path, name: str, folder: Path, kind: Any, dtype: torch.dtype, variant: str | None
) -> nn.Module:
    """One network, all of whose tensors were in the files, and none besides."""
    files = weight_files(folder).get(variant, ())
    try:
        check_shards(name, files)
        check_claims(name, folder, files)
        with _aloud():
            network, report = kind.from_pretrained(
                str(folder), variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True,
                # Reported by name and refused below.
                ignore_mismatched_sizes=True,
                **{"dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype": dtype},
            )  # fmt: skip
    except LensError as error:
        raise LensError(f"{source} could not be loaded. {error}") from None
    except LOAD_ERRORS as error:
        raise _unreadable(source, error, f"(its part {name})") from error
    _check_report(source, name, report)
    return network


@contextmanager
def _aloud() -> Iterator[None]:
    """Let the libraries say which tensors they miss, all of them, also where their other remarks are turned off."""
    names = ("diffusers.models.modeling_utils", "transformers.modeling_utils")
    loggers = [logger for logger in map(logging.getLogger, names) if not logger.isEnabledFor(logging.WARNING)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_report(source: str | Path, name: str, report: Mapping[str, Any]) -> None:
    wrong = sorted(report["mismatched_keys"], key=lambda entry: str(entry[0]))
    if wrong:
        tensor, stored, wanted = wrong[0]
        raise LensError(
            f"The {name} of {source} has a tensor '{tensor}' of the shape {tuple(stored)} where its config.json asks "
            f"for {tuple(wanted)}; they belong to different models."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise LensError(f"The {name} of {source} lacks the tensor '{missing[0]}' ({len(missing)} in all); {AGAIN}")
    foreign = sorted(key for key in report["unexpected_keys"] if not key.endswith(DERIVED))
    if foreign:
        raise LensError(
            f"The {name} of {source} has a tensor '{foreign[0]}' that its config.json knows nothing of "
            f"({len(foreign)} in all); {AGAIN}"
        )


def _notes(variants: Mapping[str, str | None], asked: str | None) -> tuple[str, ...]:
    taken = {name: variant for name, variant in variants.items() if variant is not None}
    if asked is not None or not taken:
        return ()
    kinds = ", ".join(sorted({str(variant) for variant in taken.values()}))
    return (f"The weights of {', '.join(sorted(taken))} are those of the variant {kinds}: there are no others.",)
