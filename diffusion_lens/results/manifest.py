"""A lens on disk: one folder of safetensors, JSON and WebP, described and sealed by ``lens.json``.

No pickles are ever read. Every file is listed with its size and sha256, so that a
missing, truncated, altered or foreign file is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import read_json, sha256_of, write_json
from diffusion_lens.base.types import Attribute, LensError, Mode, Sampler

FORMAT_VERSION = 1
MANIFEST = "lens.json"


class FileSeal(StrictConfig):
    """Size in bytes and sha256 (64 hex digits) of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BaseModelRef(StrictConfig):
    """The diffusion model that a lens opens.

    ``bundled``: the pipeline lies in ``pipeline/`` of the lens; otherwise ``source`` is a hub id or a folder.
    ``id`` is the name under which requests and the SAE know the model, on any machine.
    """

    id: str
    source: str
    revision: str | None = None
    bundled: bool = False


class AttributeConfig(StrictConfig):
    """An attribute and its ordered classes, as stored."""

    name: str
    classes: tuple[str, ...] = Field(min_length=2)

    def attribute(self) -> Attribute:
        """The result type of the same content."""
        return Attribute(self.name, self.classes)


class Setting(StrictConfig):
    """The turn that a lens ships for one attribute: which features, how, and how far.

    Attributes:
        attribute: the attribute that it steers.
        target: the class towards which a rising β leads in the shipped sweep.
        n_features: features per pole, taken in order of attribution.
        poles: ``one`` turns the target's features; ``both`` also turns the opposite's the other way.
        mode, sampler, window, hold: as in ``Intervention``.
        betas: the strengths of the shipped sweep, rising, the identity among them.
        n_seeds_chosen_on: images per strength on which this setting was chosen (0: set by hand).
        note: where the setting comes from, in one sentence.
    """

    attribute: str
    target: str
    n_features: int = Field(ge=1)
    poles: Literal["one", "both"]
    mode: Mode
    sampler: Sampler
    window: tuple[int, int] | None = None
    hold: tuple[str, ...] = ()
    betas: tuple[float, ...] = Field(min_length=1)
    n_seeds_chosen_on: int = Field(default=0, ge=0)
    note: str = ""


class Manifest(StrictConfig):
    """``lens.json``: what a lens holds and how its images are made.

    Attributes:
        attributes: those the lens steers; ``nuisances``: those the classifier reads besides.
        prompts: suggested prompts (``""`` is the empty prompt); empty for unconditional models.
        vocabulary: the words the model knows; ``None`` for models with an open vocabulary.
        settings: attribute → the shipped turn.
        classifier_id: of the one that judges images; ``labeller_id``: of the one whose reading trained the probes.
        files: path inside the folder → its seal; ``lens.json`` itself is not listed.
    """

    format_version: int = FORMAT_VERSION
    name: str
    base_model: BaseModelRef
    hook_name: str
    scheduler: str
    n_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    attributes: tuple[AttributeConfig, ...] = Field(min_length=1)
    nuisances: tuple[AttributeConfig, ...] = ()
    prompts: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    settings: dict[str, Setting] = Field(default_factory=dict)
    sae_id: str
    classifier_id: str
    labeller_id: str | None = None
    files: dict[str, FileSeal] = Field(default_factory=dict)

    @property
    def lens_id(self) -> str:
        """First 16 hex digits of the manifest's sha256: names the lens with every file in it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def seal(folder: Path) -> dict[str, FileSeal]:
    """Size and sha256 of every file under ``folder`` that belongs to a lens, by relative path, sorted."""
    return {
        name: FileSeal(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in sorted(_content(folder))
        if "/" in name or name.endswith(".safetensors")
    }


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Seal every file of ``folder`` and write ``lens.json``; returns the manifest with its seals."""
    sealed = manifest.model_copy(update={"files": seal(folder)})
    write_json(folder / MANIFEST, sealed.model_dump(mode="json"))
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """Read ``lens.json``; raises ``LensError`` if this is no lens, a newer one, or has a wrong key."""
    if not folder.is_dir():
        raise LensError(f"There is no folder {folder}; check the path of the lens.")
    if not (folder / MANIFEST).is_file():
        raise LensError(f"{folder} is not a lens: {MANIFEST} is missing.")
    values = read_json(folder / MANIFEST)
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise LensError(f"{folder / MANIFEST} is not a lens manifest: it has no format_version.")
    if version != FORMAT_VERSION:
        raise LensError(
            f"{folder / MANIFEST} has format {version}; this program reads format {FORMAT_VERSION}. "
            f"{'Update the program.' if version > FORMAT_VERSION else 'Fit the lens again.'}"
        )
    return Manifest.parse(values, where=MANIFEST)


def verify(folder: Path, manifest: Manifest | None = None) -> Manifest:
    """Check every file of a lens against its seal.

    Raises ``LensError`` naming the first file that is missing, truncated, altered (with both sha256),
    outside the folder, or foreign (not listed, yet in a subfolder from which the lens is read).
    """
    manifest = manifest or read_manifest(folder)
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    foreign = sorted(name for name in _content(folder) if "/" in name and name not in manifest.files)
    if foreign:
        raise LensError(f"{foreign[0]} does not belong to this lens ({folder}); remove it.")
    return manifest


def _check_file(folder: Path, name: str, expected: FileSeal) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise LensError(f"{MANIFEST} names '{name}', which lies outside the lens folder; do not use this lens.")
    path = folder / name
    if not path.is_file():
        raise LensError(f"{name} is missing from the lens {folder}; restore it from the original.")
    size = path.stat().st_size
    if size < expected.bytes:
        raise LensError(f"{name} is truncated: {size:,} of {expected.bytes:,} bytes; restore it from the original.")
    digest = sha256_of(path)
    if digest != expected.sha256:
        raise LensError(
            f"{name} is not the file of this lens: its sha256 is {digest}, expected {expected.sha256}; "
            "restore it from the original."
        )


def _content(folder: Path) -> Iterator[str]:
    """Relative paths of the files under ``folder``; hidden files and folders belong to other tools."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()
