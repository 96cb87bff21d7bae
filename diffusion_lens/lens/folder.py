"""The parts of a lens folder, loaded when they are first needed.

Precomputed results show before torch and diffusers are even imported; that is why the heavy modules are
imported inside methods here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from diffusion_lens.base.files import check_empty, copy_file, read_json
from diffusion_lens.base.foreign import check_rows, count_tables, reading
from diffusion_lens.base.sheets import SheetIndex, load_sheets
from diffusion_lens.base.transaction import changing, read_whole
from diffusion_lens.base.types import Atlas, Attribute, Attribution, LensError
from diffusion_lens.results.comparison import Comparison
from diffusion_lens.results.counted import CountedShares
from diffusion_lens.results.dissection import Dissection, to_atlas
from diffusion_lens.results.joint import JointResult
from diffusion_lens.results.kinds import kind_of, load_stored
from diffusion_lens.results.manifest import MANIFEST, BaseModelRef, Manifest, Setting, commit, read_manifest, verify
from diffusion_lens.results.measurement_files import Missing
from diffusion_lens.results.records import load_atlas, load_attributions
from diffusion_lens.results.sweeps import SweepResult

if TYPE_CHECKING:
    from typing_extensions import Self

    from diffusion_lens.features.probes import Probe
    from diffusion_lens.features.sae import SparseAutoencoder
    from diffusion_lens.judging.classify import Classifier
    from diffusion_lens.model.pipelines import DiffusionModel
    from diffusion_lens.model.run_options import RunOptions

T = TypeVar("T")
RESTORE = "restore it from the original"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Parts:
    """Values made once, each under its own lock: one part may load in the background while others are used."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._values: dict[str, Any] = {}

    def get(self, name: str, make: Callable[[], T]) -> T:
        """The value under ``name``; ``make`` runs at most once at a time, and again only if it raised."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.RLock())
        with lock:
            if name not in self._values:
                self._values[name] = make()
            return self._values[name]

    def put(self, name: str, value: Any) -> None:
        """Set a value that is already made."""
        self._values[name] = value

    def drop(self, name: str) -> None:
        """Forget a value: it is made again when it is asked for."""
        self._values.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether the value is there without waiting."""
        return name in self._values


@dataclass(frozen=True, eq=False)
class LensFolder:
    """A checked lens folder and its parts, each read on first use.

    ``manifest`` says how images are made; ``device`` and ``dtype`` are the diffusion model's.
    """

    folder: Path
    manifest: Manifest
    device: str = "cpu"
    dtype: Any = None
    offline: bool = False
    options: RunOptions | None = None
    _parts: Parts = field(default_factory=Parts, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str = "cpu",
        dtype: Any = None,
        revision: str | None = None,
        offline: bool = False,
        classifier: Classifier | None = None,
        options: RunOptions | None = None,
    ) -> Self:
        """Open a lens folder or a hub repository after checking every file against its sha256.

        Args:
            dtype: a torch dtype for the diffusion model; ``None`` is float32.
            classifier: judge images by this one instead of the lens's own.
            options: where and how the diffusion model runs, in place of ``device`` and ``dtype``.

        Raises:
            LensError: names the file that is missing, truncated, altered or foreign.
        """
        folder = _find(source, revision, offline)
        if options is not None:
            options = options.resolved()
            device = options.device
        lens = cls(folder, verify(folder), device, dtype, offline, options)
        if classifier is not None:
            lens._parts.put("classifier", classifier)
        return lens

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the lens into a new or empty folder, whole or not at all, and check the copy.

        Raises ``LensError`` where the folder is not empty, or where this lens is no longer as it was opened.
        """
        target = Path(folder)
        check_empty(target)
        with changing(target) as change:
            for name in (*self.manifest.files, MANIFEST):
                copy_file(self.folder / name, change.staged / name)
            verify(change.staged)
            change.commit(last=MANIFEST)

    def store(self, result: Any) -> Path:
        """Keep a result in the lens folder, whole or not at all, in place of an earlier one of the same thing.

        What can be stored: a ``Comparison``, ``Dissection``, ``JointResult``, ``CountedShares`` or ``SweepResult``.
        Only its own files are sealed; one writer at a time, others wait. Returns its main file.

        Raises:
            LensError: a result measured on another model, SAE or classifier, another type, or a folder that cannot be
                written.
        """
        kind = kind_of(type(result))
        with changing(self.folder) as change:
            manifest = read_manifest(self.folder)
            kind.check(result, manifest)
            stem = kind.stem(result)
            kind.save(result, change.staged / kind.folder, stem)
            sealed = commit(change, manifest, removed=kind.files(stem, manifest))
        object.__setattr__(self, "manifest", sealed)  # the lens on the disk is now this one
        self._parts.drop(kind.result.__name__)
        self._parts.drop("atlas")
        return self.folder / kind.main(stem)

    def stored(self, kind: type[T]) -> Mapping[str, T]:
        """The results of one type that the lens keeps, e.g. ``lens.stored(Comparison)``, by the stem of their files.

        Raises ``LensError`` for a type that no lens keeps, a damaged file, or a result of another lens.
        """
        known = kind_of(kind)

        def read() -> dict[str, T]:
            missing = Missing(self.confusion, self.manifest.base_model.id)
            return dict(load_stored(self.folder, known, read_manifest(self.folder), self.manifest, missing))

        return self._parts.get(kind.__name__, lambda: read_whole(self.folder, MANIFEST, read))

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the lens to the Hugging Face hub with the logged-in account; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        allowed = [MANIFEST, *self.manifest.files]
        info = api.upload_folder(repo_id=repo_id, folder_path=str(self.folder), allow_patterns=allowed)
        return str(info.commit_url)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """The attributes that this lens steers."""
        return tuple(a.attribute() for a in self.manifest.attributes)

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """Suggested prompts; ``(None,)`` for unconditional models."""
        return self.manifest.prompts or (None,)

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Attribute → how the lens steers it."""
        return self.manifest.settings

    @property
    def fitted_from(self) -> Mapping[str, Any]:
        """The ``FitConfig`` that the lens was fitted from, as stored; empty where it was made in another way."""
        name = "fit/config.json"
        return _mapping(self.folder / name) if name in self.manifest.files else {}

    @property
    def d_sae(self) -> int:
        """Features of the SAE, read without its weights."""
        path = self.folder / "sae/cfg.json"
        with reading(path, "an SAE's configuration", RESTORE):
            return int(_mapping(path)["d_sae"])

    @property
    def model(self) -> DiffusionModel:
        """The diffusion model (seconds on first use; see ``warm_up``)."""
        return self._parts.get("model", self._load_model)

    @property
    def is_ready(self) -> bool:
        """Whether the diffusion model is loaded."""
        return self._parts.has("model")

    def warm_up(self) -> threading.Thread:
        """Load model, SAE and classifier in a background thread; whoever needs them meanwhile waits for it."""

        def load() -> None:
            _ = (self.model, self.sae, self.classifier)

        thread = threading.Thread(target=load, name="lens warm-up", daemon=True)
        thread.start()
        return thread

    @property
    def sae(self) -> SparseAutoencoder:
        """The sparse autoencoder of the bottleneck, on ``device``."""
        return self._parts.get("sae", self._load_sae)

    @property
    def classifier(self) -> Classifier:
        """The image classifier that judges."""
        return self._parts.get("classifier", self._load_classifier)

    @property
    def confusion(self) -> Mapping[str, np.ndarray]:
        """Attribute → counts ``[true, read]`` of the judging classifier, read without loading its network."""
        if self._parts.has("classifier"):
            return self.classifier.confusion
        name = "classifier/config.json"
        if name not in self.manifest.files:
            return {}
        with reading(self.folder / name, "a classifier's description", RESTORE):
            known = [a.attribute() for a in (*self.manifest.attributes, *self.manifest.nuisances)]
            return count_tables(_mapping(self.folder / name).get("confusion", {}), known)

    @property
    def probes(self) -> dict[str, Probe]:
        """Attribute → its per-step probe on the bottleneck."""
        return self._parts.get("probes", self._load_probes)

    @property
    def attributions(self) -> dict[str, Attribution]:
        """Attribute → the shipped attribution, by integrated gradients."""
        return self._parts.get("attributions", self._load_attributions)

    @property
    def atlas(self) -> Atlas:
        """The map and examples of all features, with the effects and names of a stored dissection."""
        return self._parts.get("atlas", self._load_atlas)

    @property
    def pool(self) -> np.ndarray:
        """Images of the atlas, ``uint8 [n, H, W, 3]``."""
        return self._parts.get("pool", partial(load_sheets, self.folder / "examples", "pool"))

    @property
    def sweeps(self) -> tuple[SweepResult, ...]:
        """Sweeps computed when the lens was made, and those stored since."""
        return tuple(self.stored(SweepResult).values())

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """Attribute → the stored table of all methods; empty where none was stored."""
        return {found.attribute.name: found for found in self.stored(Comparison).values()}

    @property
    def dissection(self) -> Dissection | None:
        """What single features control, where ``dissect --store`` measured it."""
        return next(iter(self.stored(Dissection).values()), None)

    @property
    def counted(self) -> CountedShares | None:
        """What the model draws unedited under every prompt, where ``check --store`` counted it."""
        return next(iter(self.stored(CountedShares).values()), None)

    @property
    def together(self) -> JointResult | None:
        """Several attributes steered at once, where ``together --store`` measured it."""
        return next(iter(self.stored(JointResult).values()), None)

    def _load_attributions(self) -> dict[str, Attribution]:
        path = self.folder / "attribution.safetensors"
        found = load_attributions(path)
        with reading(path, "a file of this lens's attributions", RESTORE):
            for attribute in self.attributes:
                own = found[attribute.name]
                fits = own.attribute == attribute and own.sae_id == self.manifest.sae_id
                if not fits or own.scores.shape[1:] != (self.manifest.n_steps, self.d_sae):
                    raise ValueError(f"the scores of {attribute.name} are of other classes, steps or features")
        return found

    def _load_atlas(self) -> Atlas:
        path = self.folder / "atlas.safetensors"
        atlas, dissection = load_atlas(path), self.dissection
        n_pool = SheetIndex.load(self.folder / "examples/pool.json").n
        with reading(path, "this lens's atlas", RESTORE):
            if atlas.sae_id != self.manifest.sae_id or len(atlas.density) != self.d_sae:
                raise ValueError("it is of another SAE")
            for name in ("top_images", "random_images", "near_images"):
                check_rows(name, getattr(atlas, name), n_pool, least=-1)
            for one in (*self.manifest.attributes, *self.manifest.nuisances):
                if one.name in atlas.effects and atlas.effects[one.name].shape[1] != len(one.classes):
                    raise ValueError(f"the effects on {one.name} are of other classes")
        return atlas if dissection is None else to_atlas(dissection, atlas)

    def _load_model(self) -> DiffusionModel:
        import torch

        from diffusion_lens.model.pipelines import load_model

        base = self.manifest.base_model
        model = load_model(
            self.folder / "pipeline" if base.bundled else base.source,
            device=self.device,
            dtype=self.dtype or torch.float32,
            hook_name=self.manifest.hook_name,
            revision=base.revision,
            offline=self.offline,
            model_id=base.id,
            options=self.options,
            variant=base.variant,
            vocabulary=self.manifest.vocabulary,
            size=base.size,
            max_sequence_length=base.max_sequence_length,
        )
        _check_identity(base, model)
        return model

    def _load_sae(self) -> SparseAutoencoder:
        from diffusion_lens.features.sae import SparseAutoencoder

        sae = SparseAutoencoder.load(self.folder / "sae", device=self.device)
        if sae.sae_id != self.manifest.sae_id or sae.cfg.model_id != self.manifest.base_model.id:
            raise LensError(f"sae/ in {self.folder} belongs to another lens; restore it from the original.")
        return sae

    def _load_probes(self) -> dict[str, Probe]:
        from diffusion_lens.features.probes import load_probes

        path = self.folder / "probes.safetensors"
        found = load_probes(path, self.device)
        with reading(path, "a file of this lens's probes", RESTORE):
            for attribute in self.attributes:
                own = found[attribute.name]
                if own.attribute != attribute or own.n_steps != self.manifest.n_steps:
                    raise ValueError(f"the probe of {attribute.name} is of other classes or steps")
        return found

    def _load_classifier(self) -> Classifier:
        from diffusion_lens.judging.described import open_classifier

        if not (self.folder / "classifier").is_dir():
            raise LensError(
                f"This lens was judged by the classifier {self.manifest.classifier_id}, which is not stored with it; "
                "give it to from_pretrained(..., classifier=...)."
            )
        classifier = open_classifier(self.folder / "classifier", device=self.device, offline=self.offline)
        if classifier.classifier_id != self.manifest.classifier_id:
            raise LensError(
                f"classifier/ in {self.folder} belongs to another lens, or the weights that it names are not on this "
                "machine as they were; restore it from the original, or fetch them again."
            )
        return classifier


def _check_identity(base: BaseModelRef, model: DiffusionModel) -> None:
    """Raise ``LensError`` unless every part holds what it held when the lens was made, as far as that was noted."""
    found = model.stored.digests() if base.digests and model.stored is not None else base.digests
    for part, digest in base.digests.items():
        if found.get(part) != digest:
            raise LensError(
                f"The {part} of {base.source if not base.bundled else 'this lens'} is not the one that this lens was "
                f"made on (its content is {found.get(part, 'missing')}, expected {digest}): the lens's features mean "
                "nothing in another model; restore it, or fit a lens to this one."
            )


def _mapping(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise LensError(f"{path} does not hold a JSON object; {RESTORE}.")
    return values


def _find(source: str | Path, revision: str | None, offline: bool) -> Path:
    path = Path(source)
    if path.is_dir() or isinstance(source, Path) or not HUB_NAME.fullmatch(str(source)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, local_files_only=offline))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LensError(f"There is no folder {source}, and the hub did not give it: {reason[0]}") from None
