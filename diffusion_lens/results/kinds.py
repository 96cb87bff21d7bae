"""The kinds of result that a lens keeps: where each lies, how it is written and read, and to which lens it belongs.

``lens.store`` and ``lens.stored`` go by this list alone: a new kind of result is one more entry here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.results.comparison import Comparison
from diffusion_lens.results.comparison_store import load_comparison, save_comparison
from diffusion_lens.results.counted import CountedShares, load_shares, save_shares
from diffusion_lens.results.dissection import Dissection, load_dissection, save_dissection
from diffusion_lens.results.flip_book import MAX_BOOKS, FlipBook, load_flip_book, save_flip_book
from diffusion_lens.results.joint import JointResult, load_joint, save_joint
from diffusion_lens.results.manifest import Manifest
from diffusion_lens.results.measurement_files import Missing
from diffusion_lens.results.records import load_sweep, save_sweep
from diffusion_lens.results.scan import Scan, load_scan, save_scan
from diffusion_lens.results.sweeps import SweepResult

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One kind of stored result.

    Attributes:
        result: its type, by which it is asked for. command: makes and stores it.
        place: its main file inside a lens; ``*`` stands for the stem, where there may be several. Arrays may lie beside
            it as ``<stem>.safetensors``, images as ``<stem>-examples…``.
        stem: a result's own; storing another one of the same stem replaces it.
        save: writes ``result, folder, stem``. load: reads ``folder, stem``, with what files of version 0.4 lack.
        belongs: what a result was measured with → what it should be in a lens, by name.
        most: how many of them a lens may hold.
    """

    name: str
    result: type[T]
    command: str
    place: str
    stem: Callable[[T], str]
    save: Callable[[T, Path, str], object]
    load: Callable[[Path, str, Missing], T]
    belongs: Callable[[T, Manifest], dict[str, tuple[str, str]]]
    most: int = 10_000

    @property
    def folder(self) -> str:
        """The folder inside a lens, ``""`` for the top."""
        return self.place.rpartition("/")[0]

    def main(self, stem: str) -> str:
        """The main file of a result."""
        return self.place.replace("*", stem)

    def stems(self, manifest: Manifest) -> list[str]:
        """Those of the results that a lens holds, sorted."""
        wanted = re.compile(re.escape(self.place).replace(r"\*", "([^/]+)"))
        found = (wanted.fullmatch(name) for name in sorted(manifest.files) if not name.endswith("-examples.json"))
        return [match[1] if match.groups() else Path(match[0]).stem for match in found if match]

    def files(self, stem: str, manifest: Manifest) -> list[str]:
        """The files of one result in a lens."""
        own = re.compile(rf"{re.escape(self.main(stem).rpartition('.')[0])}(\.\w+|-examples(-\d+\.webp|\.json))")
        return [name for name in manifest.files if own.fullmatch(name)]

    def check(self, result: T, manifest: Manifest) -> None:
        """Raise ``LensError`` where a result was measured on another lens than the one of ``manifest``."""
        for what, (own, wanted) in self.belongs(result, manifest).items():
            if own != wanted:
                raise LensError(
                    f"This {self.name} was measured on another {what} ({own}; this lens has {wanted}); "
                    f"run: {self.command}."
                )


def _of_comparison(found: Comparison, manifest: Manifest) -> dict[str, tuple[str, str]]:
    return {
        "model": (found.model_id, manifest.base_model.id),
        "SAE": (found.sae_id, manifest.sae_id),
        "attribute": _known(found.attribute, manifest),
    }


def _known(own: Attribute, manifest: Manifest) -> tuple[str, str]:
    """An attribute's name, and what it should be: itself, where the lens reads it with the same classes."""
    known = [a.attribute() for a in (*manifest.attributes, *manifest.nuisances)]
    return own.name, own.name if own in known else ", ".join(a.name for a in known)


def _of_sweep(found: SweepResult, manifest: Manifest) -> dict[str, tuple[str, str]]:
    return {
        "model": (found.request.model_id, manifest.base_model.id),
        "SAE": (found.provenance.get("sae", manifest.sae_id), manifest.sae_id),
        "classifier": (found.classifier_id, manifest.classifier_id),
        "attribute": _known(found.attribute, manifest),
    }


def _sweep_stem(found: SweepResult) -> str:
    """After those of a fit, which are numbered; the same measurement again replaces itself."""
    own = repr((found.request, found.attribute, found.target, found.setting, found.is_control))
    digest = hashlib.sha256(own.encode()).hexdigest()[:8]
    return f"{_file_name(found.attribute.name)}{'-control' if found.is_control else ''}-{digest}"


def _of_flip_book(found: FlipBook, manifest: Manifest) -> dict[str, tuple[str, str]]:
    known = [a.attribute() for a in manifest.attributes]
    own = found.attribute
    return {
        "model": (found.request.model_id, manifest.base_model.id),
        "SAE": (found.sae_id, manifest.sae_id),
        "classifier": (found.classifier_id, manifest.classifier_id),
        "attribute": (own.name, own.name if own in known else ", ".join(a.name for a in known)),
    }


def _flip_book_stem(found: FlipBook) -> str:
    """By request, attribute and turn; the same strengths drawn again replace themselves."""
    own = repr((found.request, found.attribute, found.edit))
    return f"{_file_name(found.attribute.name)}-{hashlib.sha256(own.encode()).hexdigest()[:8]}"


def _scan_stem(found: Scan) -> str:
    """One scan of a prompt: another one replaces it."""
    prompt = re.sub(r"[^a-z0-9]+", "-", (found.prompt or "").lower()).strip("-")
    return f"scan-{prompt}"[:80].rstrip("-") if prompt else "scan"


def _file_name(text: str) -> str:
    return text.replace(" ", "-")


KINDS: tuple[Kind[Any], ...] = (
    Kind(
        "sweep", SweepResult, "fit", "sweeps/*.json", _sweep_stem, save_sweep, load_sweep, _of_sweep
    ),
    Kind(
        "comparison", Comparison, "compare --store", "comparisons/*.json",
        lambda found: _file_name(found.attribute.name), save_comparison, load_comparison, _of_comparison,
    ),
    Kind(
        "dissection", Dissection, "dissect --store", "dissection.safetensors", lambda _: "dissection",
        lambda found, folder, stem: save_dissection(folder / f"{stem}.safetensors", found),
        lambda folder, stem, _: load_dissection(folder / f"{stem}.safetensors"),
        lambda found, manifest: {"SAE": (found.sae_id, manifest.sae_id)},
    ),
    Kind(
        "result of steering together", JointResult, "together --store", "together/together.json", lambda _: "together",
        lambda found, folder, stem: save_joint(found, folder / f"{stem}.json"),
        lambda folder, stem, _: load_joint(folder / f"{stem}.json"),
        lambda found, manifest: {"SAE": (found.sae_id, manifest.sae_id)},
    ),
    Kind(
        "count of shares", CountedShares, "check --full --part 1 --store", "counted/shares.json", lambda _: "shares",
        save_shares, load_shares,
        lambda found, manifest: {"classifier": (found.classifier_id, manifest.classifier_id)},
    ),
    Kind(
        "flip-book", FlipBook, "flip-books", "flip-books/*.json", _flip_book_stem, save_flip_book,
        lambda folder, stem, _: load_flip_book(folder, stem), _of_flip_book, MAX_BOOKS,
    ),
    Kind(
        "scan", Scan, "scan --store", "scans/*.json", _scan_stem,
        lambda found, folder, stem: save_scan(found, folder / f"{stem}.json"),
        lambda folder, stem, _: load_scan(folder / f"{stem}.json"),
        lambda found, manifest: {
            "model": (found.model_id, manifest.base_model.id),
            "classifier": (found.classifier_id, manifest.classifier_id),
        },
    ),
)  # fmt: skip


def kind_of(result: type[T]) -> Kind[T]:
    """The kind of a type of result; raises ``LensError`` that lists those a lens keeps."""
    for kind in KINDS:
        if kind.result is result:
            return cast(Kind[T], kind)
    known = ", ".join(kind.result.__name__ for kind in KINDS)
    raise LensError(f"A lens keeps no {result.__name__}; it keeps {known}.")


def load_stored(
    folder: Path, kind: Kind[T], listed: Manifest, lens: Manifest, missing: Missing
) -> Iterator[tuple[str, T]]:
    """Stem and result of every result of a kind that the manifest ``listed`` names.

    Raises ``LensError`` for a damaged one, and for one that does not belong to ``lens``.
    """
    stems = kind.stems(listed)
    if len(stems) > kind.most:
        raise LensError(f"This lens holds {len(stems):,} {kind.name}s, and may hold {kind.most:,}; remove some.")
    for stem in stems:
        found = kind.load(folder / kind.folder, stem, missing)
        kind.check(found, lens)
        yield stem, found
