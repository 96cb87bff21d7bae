"""A lens on disk: one folder of safetensors, JSON and WebP, described and sealed by ``lens.json``.

No pickles are ever read. Every file is listed with its size and sha256, so that a
missing, truncated, altered or foreign file is refused by name. Whoever changes a lens does so in one ``changing``
block (see ``transaction``) and ends it with ``commit``, which seals the files of that block alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import read_json, sha256_of, write_json
from diffusion_lens.base.transaction import Change, check_inside, read_whole, settle
from diffusion_lens.base.types import Attribute, LensError, Mode, Sampler, beta_of

FORMAT_VERSION = 1
MANIFEST = "lens.json"
REQUIRED = ("sae/cfg.json", "sae/sae_weights.safetensors", "probes.safetensors", "attribution.safetensors")
"""What every lens has."""
REQUIRED_BUNDLED = ("pipeline/model_index.json",)
REQUIRED_FITTED = ("atlas.safetensors", "examples/pool.json")
"""What a fit makes besides; ``FITTED`` tells that a lens was fitted."""
FITTED = "fit/config.json"


class FileSeal(StrictConfig):
    """Size in bytes and sha256 (64 hex digits) of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BaseModelRef(StrictConfig):
    """The diffusion model that a lens opens.

    ``bundled``: the pipeline lies in ``pipeline/`` of the lens; otherwise ``source`` is a hub id or a folder.
    ``id`` is the name under which requests and the SAE know the model, on any machine; ``variant`` that of its weight
    files; ``digests`` (part → 16 hex digits, see ``model.stored``) say what it is, empty where a lens never noted it.
    ``size`` (height, width in pixels) and ``max_sequence_length`` are given to its own call, where that is not told its
    own.
    """

    id: str
    source: str
    revision: str | None = None
    bundled: bool = False
    variant: str | None = None
    digests: dict[str, str] = Field(default_factory=dict)
    size: tuple[int, int] | None = None
    max_sequence_length: int | None = Field(default=None, ge=0)


class AttributeConfig(StrictConfig):
    """An attribute and its ordered classes, as stored."""

    name: str
    classes: tuple[str, ...] = Field(min_length=2)

    def attribute(self) -> Attribute:
        """The result type of the same content."""
        return Attribute(self.name, self.classes)


class Setting(StrictConfig):
    """How a lens steers one attribute: which features, how, and how far.

    Attributes:
        attribute: the attribute that it steers.
        target: the class towards which a rising β leads in the shipped sweep.
        n_features: features per pole, taken in order of attribution.
        poles: ``one`` steers the target's features; ``both`` also steers the opposite's the other way.
        mode, sampler, window, hold: as in ``Intervention``.
        betas: the strengths of the shipped sweep as people read them, rising, the identity among them.
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

    @property
    def identity(self) -> float:
        """The β that changes nothing."""
        return beta_of(self.mode, 0.0)


class Manifest(StrictConfig):
    """``lens.json``: what a lens holds and how its images are made.

    Attributes:
        attributes: those the lens steers; ``nuisances``: those the classifier reads besides.
        prompts: suggested prompts (``""`` is the empty prompt); empty for unconditional models.
        vocabulary: the words the model knows; ``None`` for models with an open vocabulary.
        settings: attribute → how it is steered.
        classifier_id: of the one that judges images; ``labeller_id``: of the one whose reading trained the probes.
            ``judged_apart`` says whether the two are different ones.
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
    def judged_apart(self) -> bool:
        """Whether another classifier judges than the one that labelled and chose."""
        return self.labeller_id is not None and self.labeller_id != self.classifier_id

    @property
    def lens_id(self) -> str:
        """First 16 hex digits of the manifest's sha256: names the lens with every file in it."""
        # Fields that older lenses lack count from when they are used: a lens keeps its name.
        later = ("variant", "digests", "size", "max_sequence_length")
        unused = {name for name in later if getattr(self.base_model, name) in (None, {}, "")}
        return hashlib.sha256(self.model_dump_json(exclude={"base_model": unused}).encode()).hexdigest()[:16]


def seal(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileSeal]:
    """Size and sha256 by relative path, sorted: of ``names``, or of every file that belongs to a lens."""
    return {
        name: FileSeal(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in sorted(content(folder) if names is None else names)
    }


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Vouch for every file that lies in ``folder``, and write ``lens.json``; returns the manifest with its seals.

    For whoever has just made the whole folder. What adds to a lens uses ``commit``.
    """
    sealed = manifest.model_copy(update={"files": seal(folder)})
    write_json(folder / MANIFEST, sealed.model_dump(mode="json"), indent=1)
    return sealed


def commit(change: Change, manifest: Manifest, *, removed: Iterable[str] = ()) -> Manifest:
    """Let the files of a change into a lens: they are sealed, those ``removed`` go, all others keep their seals.

    Nobody looks at the others here: one that was damaged before is refused afterwards as well.
    """
    gone = set(removed)
    files = {name: own for name, own in manifest.files.items() if name not in gone}
    files |= seal(change.staged, change.names())
    return _commit(change, manifest, files, gone)


def commit_whole(change: Change, manifest: Manifest, *, adopted: Iterable[str] = ()) -> Manifest:
    """Make the files of a change the whole lens: everything else that was one goes.

    ``adopted``: files that lie in the folder already, and that whoever calls has made or used.
    """
    files = seal(change.folder, adopted) | seal(change.staged, change.names())
    return _commit(change, manifest, files, set(content(change.folder)) - set(files))


def _commit(change: Change, manifest: Manifest, files: dict[str, FileSeal], removed: set[str]) -> Manifest:
    sealed = manifest.model_copy(update={"files": dict(sorted(files.items()))})
    write_json(change.staged / MANIFEST, sealed.model_dump(mode="json"), indent=1)
    change.commit(removed=removed, last=MANIFEST)
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """Read ``lens.json``; raises ``LensError`` if this is no lens, a newer one, or has a wrong key."""
    if not folder.is_dir():
        raise LensError(f"There is no folder {folder}; check the path of the lens.")
    settle(folder)
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
    """Check every file of a lens against its seal; a change that was interrupted is finished first.

    Raises ``LensError`` naming the first file that is missing, not listed though every lens has it, truncated, altered
    (with both sha256), outside the folder, or foreign (not listed, yet where the lens is read from).
    """
    return read_whole(folder, MANIFEST, lambda: _verify(folder, manifest or read_manifest(folder)))


def _verify(folder: Path, manifest: Manifest) -> Manifest:
    for name in required(manifest):
        if name not in manifest.files:
            raise LensError(
                f"{MANIFEST} of {folder} does not list {name}, which it must; restore it from the original."
            )
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    foreign = sorted(set(content(folder)) - set(manifest.files))
    if foreign:
        raise LensError(f"{foreign[0]} does not belong to this lens ({folder}); remove it.")
    return manifest


def required(manifest: Manifest) -> tuple[str, ...]:
    """The files that a lens of this kind must have."""
    bundled = REQUIRED_BUNDLED if manifest.base_model.bundled else ()
    return REQUIRED + bundled + (REQUIRED_FITTED if FITTED in manifest.files else ())


def _check_file(folder: Path, name: str, expected: FileSeal) -> None:
    check_inside(folder, name)
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


def content(folder: Path) -> Iterator[str]:
    """Relative paths of the files that a lens is read from: all in subfolders, and safetensors at the top.

    Hidden files and folders belong to other tools.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(place).relative_to(folder)
        for name in names:
            if not name.startswith(".") and (inner.parts or name.endswith(".safetensors")):
                yield (inner / name).as_posix()
