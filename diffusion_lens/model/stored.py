"""A pipeline's files: which hold the weights, whether they are whole, and a digest of what each part holds.

Digests are of content (names, shapes and bytes of tensors, settings, vocabulary), whatever the files are called and
however they are split: a model under the same name with other weights has others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import LensError

INDEX = "model_index.json"
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<older>\w+))?\.safetensors"
)
UNSEALED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that change nothing about what is drawn, or may be left out."""
BOOKKEEPING = ("transformers_version", "dtype", "torch_dtype", "architectures")
"""Notes in configurations that a library writes for itself, beside those that begin with an underscore."""
BLOCK = 1 << 20


@dataclass(frozen=True)
class StoredPipeline:
    """A folder with a ``model_index.json``, and which part's weights are taken from which variant's files."""

    folder: Path
    variants: Mapping[str, str | None]

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Part → library and class, as the index names them; parts that it leaves empty are not listed."""
        return stored_parts(self.folder)

    def weights(self, part: str) -> tuple[Path, ...]:
        """The safetensors files of one part; empty for parts without weights."""
        return weight_files(self.folder / part).get(self.variants.get(part), ())

    def digests(self) -> dict[str, str]:
        """Part → 16 hex digits over its content, for every part that decides what is drawn."""
        return {part: self._digest(part) for part in sorted(self.parts) if part not in UNSEALED}

    def _digest(self, part: str) -> str:
        digest, folder = hashlib.sha256(), self.folder / part
        weights = self.weights(part)
        for name in ("config.json", "scheduler_config.json"):
            if (folder / name).is_file():
                digest.update(_plain_settings(folder / name).encode())
        if not weights:
            for text in _vocabulary(folder):
                digest.update(text)
        for name, chunks in _tensors(weights):
            digest.update(name.encode())
            for chunk in chunks:
                digest.update(chunk)
        return digest.hexdigest()[:16]


def open_stored(folder: Path, variant: str | None = None, *, without: Sequence[str] = ()) -> StoredPipeline:
    """The files of a pipeline folder: each part's of ``variant`` if it has those, else its plain ones, else its only.

    Raises ``LensError`` where a part has several variants and it was not said which.
    """
    parts = [part for part in stored_parts(folder) if part not in without]
    return StoredPipeline(folder, {part: _variant(part, folder / part, variant) for part in parts})


def _variant(part: str, folder: Path, asked: str | None) -> str | None:
    there = weight_files(folder)
    if asked in there or None in there or not there:
        return asked if asked in there else None
    if len(there) == 1 and asked is None:
        return next(iter(there))
    raise LensError(
        f"The {part} in {folder.parent} has its weights in the variants {', '.join(sorted(map(str, there)))}; choose "
        "one with variant=NAME (--variant)."
    )


def stored_parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Part → library and class of a pipeline folder; raises ``LensError`` where its index is none."""
    index = read_json(folder / INDEX)
    if not isinstance(index, dict):
        raise LensError(f"{folder / INDEX} is no list of a pipeline's parts; fetch the model again.")
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (pair[0], pair[1]) for name, pair in pairs.items() if all(isinstance(text, str) for text in pair)}


def weight_files(folder: Path) -> dict[str | None, tuple[Path, ...]]:
    """Variant (``None``: the plain one) → the safetensors files of its weights, in order."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = WEIGHTS.fullmatch(path.name)
        if match:
            found.setdefault(match["variant"] or match["older"], []).append(path)
    return {variant: tuple(files) for variant, files in found.items()}


def check_shards(part: str, files: Sequence[Path]) -> None:
    """Raise ``LensError`` unless split weights hold just what their index lists (libraries trust the index)."""
    match = WEIGHTS.fullmatch(files[0].name) if files else None
    if match is None or "-of-" not in files[0].name:
        return
    ending = f".{match['variant'] or match['older']}" if match["variant"] or match["older"] else ""
    mine = list(files[0].parent.glob(f"*.safetensors.index{ending}.json"))
    if not mine:
        return
    index = read_json(mine[0])
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict):
        raise LensError(f"{mine[0]} is no index of weights; fetch the {part} again.")
    held = {name for path in files if path.name in set(listed.values()) for name in _header(path)}
    for name in sorted(set(listed) - held):
        raise LensError(f"The {part} lacks the tensor '{name}', which {mine[0].name} lists; fetch it again.")
    for name in sorted(held - set(listed)):
        raise LensError(f"The {part} has a tensor '{name}' that {mine[0].name} does not list; fetch it again.")


def _plain_settings(path: Path) -> str:
    values = read_json(path, infinite=True)
    kept = {k: v for k, v in values.items() if not k.startswith("_") and k not in BOOKKEEPING}
    return json.dumps(kept, sort_keys=True)


def _vocabulary(folder: Path) -> Iterator[bytes]:
    """What decides a tokenizer's numbers: its vocabulary files, and the length at which it cuts."""
    for path in sorted(folder.glob("*")):
        if path.suffix == ".json" and path.name not in ("scheduler_config.json", "special_tokens_map.json"):
            values: Any = read_json(path)
            if path.name == "tokenizer_config.json":
                values = values.get("model_max_length")
            yield path.name.encode() + json.dumps(values, sort_keys=True).encode()
        elif path.suffix in (".txt", ".jinja"):  # merges, chats: a clone may have changed the line ends
            yield "\n".join(path.read_text(encoding="utf-8").splitlines()).encode()
        elif path.suffix == ".model":
            yield path.read_bytes()


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Every tensor over all files, by name: what it is, and its bytes."""
    places = {name: (path, *place) for path in files for name, place in _header(path).items()}
    for name in sorted(places):
        path, about, start, stop = places[name]
        yield f"{name} {about}", _bytes(path, start, stop)


def _bytes(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            block = file.read(min(BLOCK, stop - start))
            if not block:
                raise LensError(f"{path} is cut short; fetch it again.")
            start += len(block)
            yield block


def _header(path: Path) -> dict[str, tuple[str, int, int]]:
    """Tensor → its type and shape, and where its bytes begin and end in the file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= path.stat().st_size - 8:
                raise ValueError
            values = json.loads(file.read(size))
        return {
            name: (f"{value['dtype']} {value['shape']}", *(8 + size + end for end in value["data_offsets"]))
            for name, value in values.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise LensError(f"{path.name} is missing from {path.parent}; fetch it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise LensError(f"{path} is not a readable safetensors file; fetch it again.") from None
