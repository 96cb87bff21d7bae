"""Stream bottleneck activations to a trainer, through shards on disk.

What is kept is a seeded sample of steps and positions that depends on the image's own seed and prompt alone.
A folder of shards can be filled in several sittings: a killed run loses at most one shard. Nothing is decoded,
and a run stops after the last step it keeps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import load_metadata, load_tensors, read_json, save_tensors
from diffusion_lens.base.processes import ALONE, Processes
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Activations, GenerationRequest, LensError
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.model.denoise import BatchRun, Capture
from diffusion_lens.model.generate import check
from diffusion_lens.model.memory import in_batches
from diffusion_lens.model.pipelines import DiffusionModel

STORE_FILE = "store.json"
CHUNK_BYTES = 256 * 2**20


class SampleSpec(StrictConfig):
    """What to keep of every image.

    Attributes:
        layout: ``position``: one sample ``[c]`` per position; ``map``: one sample ``[c*y*x]`` per step.
        n_steps_kept: steps kept per image, drawn without replacement; ``None`` keeps all.
        positions: share of a map's positions kept, drawn anew per step (``position`` layout only).
        byte_budget: most bytes of activations; ``positions`` (or, for maps, ``n_steps_kept``) shrinks to fit.
        dtype: of the stored samples.
        seed: of the draw.
    """

    layout: Literal["position", "map"] = "position"
    n_steps_kept: int | None = None
    positions: float = 1.0
    byte_budget: int | None = None
    dtype: Literal["float16", "float32"] = "float16"
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The size of a collection, known before it is made: per image ``steps`` steps of ``positions`` positions each.

    ``n_rows`` samples of ``width`` numbers, ``n_bytes`` of activations.
    """

    steps: int
    positions: int
    width: int
    n_rows: int
    n_bytes: int


@dataclass(frozen=True)
class Samples:
    """Activation samples ``h [N, d]`` and where each comes from.

    Attributes:
        step: step index ``[N]``; ``position``: ``y * width + x`` in the map, 0 in the map layout, ``[N]``.
        seed: the image's seed ``[N]``; ``request``: index of its request ``[N]``.
    """

    h: np.ndarray
    step: np.ndarray
    position: np.ndarray
    seed: np.ndarray
    request: np.ndarray

    def __len__(self) -> int:
        return len(self.h)


def plan(model: DiffusionModel, requests: Sequence[GenerationRequest], spec: SampleSpec) -> Plan:
    """How much ``spec`` keeps of these requests; raises ``LensError`` where not even one sample per image fits."""
    if not requests:
        raise LensError("Give at least one request to collect activations from.")
    if len({r.n_steps for r in requests}) > 1:
        raise LensError("All requests of one collection need the same number of steps.")
    if not 0 < spec.positions <= 1:
        raise LensError(f"positions is a share between 0 (excluded) and 1; it is {spec.positions}.")
    if spec.layout == "map" and spec.positions != 1:
        raise LensError("The map layout keeps whole maps; leave positions at 1.")
    n_steps, area = requests[0].n_steps, int(np.prod(model.spatial))
    steps = n_steps if spec.n_steps_kept is None else spec.n_steps_kept
    if not 1 <= steps <= n_steps:
        raise LensError(f"Keep between 1 and {n_steps} steps per image; n_steps_kept is {steps}.")
    width = model.d_in * (area if spec.layout == "map" else 1)
    positions = 1 if spec.layout == "map" else max(1, round(area * spec.positions))
    n_images, bytes_per_row = sum(len(r.seeds) for r in requests), width * np.dtype(spec.dtype).itemsize
    if spec.byte_budget is not None:
        rows = spec.byte_budget // (n_images * bytes_per_row)
        if rows < 1:
            need = n_images * bytes_per_row
            raise LensError(
                f"One sample of each image needs {need:,} bytes; raise byte_budget or ask for fewer images."
            )
        steps = min(steps, rows)
        positions = min(positions, rows // steps)
    n_rows = n_images * steps * positions
    return Plan(steps, positions, width, n_rows, n_rows * bytes_per_row)


def collect_to(
    folder: Path,
    model: DiffusionModel,
    requests: Sequence[GenerationRequest],
    spec: SampleSpec,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> ActivationStore:
    """Fill ``folder`` with one shard per batch and open it. Shards that are there already are kept.

    Several ``processes`` share the batches and wait for each other. Raises ``LensError`` where the folder holds
    another collection's shards. ``progress`` counts this process's batches.
    """
    sizes = plan(model, requests, spec)
    batches = _batches(requests, batch_size)
    description = {
        "model_id": model.model_id, "hook_name": model.hook_name, "spatial": list(model.spatial), "d_in": model.d_in,
        "spec": spec.model_dump(), "plan": asdict(sizes), "batch_size": batch_size, "n_shards": len(batches),
        "fingerprint": _fingerprint(model, requests, spec, batch_size),
    }  # fmt: skip
    shards = Workspace(folder)
    shards.claim(
        Path(STORE_FILE).stem,
        description,
        f"{folder} holds activations made with other settings; choose another folder.",
    )
    mine = processes.share(list(enumerate(batches)))
    header = {"fingerprint": str(description["fingerprint"])}
    for (number, batch), part in zip(mine, (progress or Progress()).parts(len(mine)), strict=True):
        draw, save = partial(_draw, model, *batch, spec, sizes, part), partial(_save_shard, header=header)
        shards.keep(_shard(folder, number).name, draw, save, part)
    processes.wait()
    return ActivationStore(folder)


@dataclass(frozen=True)
class ActivationStore:
    """A folder of shards. Iterating yields chunks ``[m, d]`` mixed from many shards, the same ones every time.

    Raises ``LensError`` where the folder is no store, is unfinished, or holds a foreign shard.
    """

    folder: Path
    seed: int = 0
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        missing = [
            i
            for i in range(self._description["n_shards"])
            if not Workspace(self.folder).has(_shard(self.folder, i).name)
        ]
        if missing:
            raise LensError(f"{self.folder} is unfinished: {len(missing)} shards are missing; collect again to resume.")

    @cached_property
    def _description(self) -> dict:
        return read_json(self.folder / STORE_FILE)

    @cached_property
    def plan(self) -> Plan:
        """Rows, their width, and bytes."""
        return Plan(**self._description["plan"])

    def __len__(self) -> int:
        return self.plan.n_rows

    def shard(self, index: int) -> Samples:
        """The samples of one shard."""
        path = _shard(self.folder, index)
        if load_metadata(path).get("fingerprint") != self._description["fingerprint"]:
            raise LensError(f"{path} belongs to another collection; delete it and collect again.")
        return Samples(**load_tensors(path))

    def load(self) -> Samples:
        """Everything, in the order drawn; needs ``plan.n_bytes`` of memory."""
        return _concatenate([self.shard(i) for i in range(self._description["n_shards"])])

    def __iter__(self) -> Iterator[Tensor]:
        order = np.random.default_rng(self.seed).permutation(self._description["n_shards"])
        n_chunks = min(len(order), max(1, round(self.plan.n_bytes / self.chunk_bytes)))
        for group in np.array_split(order, n_chunks):
            yield torch.from_numpy(np.concatenate([self.shard(int(i)).h for i in group]))


def _save_shard(path: Path, samples: Samples, header: dict[str, str]) -> None:
    save_tensors(path, {f.name: getattr(samples, f.name) for f in fields(Samples)}, header)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def _batches(requests: Sequence[GenerationRequest], batch_size: int) -> list[tuple[int, GenerationRequest]]:
    return [
        (index, replace(request, seeds=request.seeds[offset : offset + batch_size]))
        for index, request in enumerate(requests)
        for offset in range(0, len(request.seeds), batch_size)
    ]


def _fingerprint(
    model: DiffusionModel, requests: Sequence[GenerationRequest], spec: SampleSpec, batch_size: int
) -> str:
    parts = [[asdict(r) for r in requests], spec.model_dump(), model.model_id, model.hook_name, batch_size]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _draw(
    model: DiffusionModel, index: int, request: GenerationRequest, spec: SampleSpec, sizes: Plan, progress: Progress
) -> Samples:
    """One batch's samples, in the order image, step, position."""
    picks = [_pick(model, request, seed, spec, sizes) for seed in request.seeds]
    wanted = sorted({int(step) for steps, _ in picks for step in steps})
    capture = Capture(tuple(wanted), np.dtype(spec.dtype))
    check(model, request, None, capture, len(request.seeds))

    def read(part: GenerationRequest, told: Callable[[int], None]) -> Activations:
        return BatchRun(model, part, capture=capture).read(told)

    last = wanted[-1] + 1
    activations, *others = in_batches(model.room, request, len(request.seeds), last, read, progress)
    if others:
        h = np.concatenate([activations.h, *(part.h for part in others)])
        activations = replace(activations, h=h, seeds=request.seeds)
    if not np.isfinite(activations.h).all():
        raise LensError(f"Some activations do not fit into {spec.dtype}; collect them as float32.")
    return _concatenate([_rows(activations, i, *pick, wanted, index, spec) for i, pick in enumerate(picks)])


def _pick(
    model: DiffusionModel, request: GenerationRequest, seed: int, spec: SampleSpec, sizes: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """The steps ``[steps]`` and positions ``[steps, positions]`` kept of one image, both rising."""
    prompt = int.from_bytes(hashlib.sha256((request.prompt or "").encode()).digest()[:8], "big")
    rng = np.random.default_rng([spec.seed, seed, prompt])
    steps = np.sort(rng.permutation(request.n_steps)[: sizes.steps])
    if spec.layout == "map":
        return steps, np.zeros((sizes.steps, 1), dtype=np.int64)
    area = int(np.prod(model.spatial))
    positions = rng.permuted(np.tile(np.arange(area), (sizes.steps, 1)), axis=1)[:, : sizes.positions]
    return steps, np.sort(positions, axis=1)


def _rows(
    activations: Activations,
    image: int,
    steps: np.ndarray,
    positions: np.ndarray,
    wanted: list[int],
    request: int,
    spec: SampleSpec,
) -> Samples:
    maps = activations.h[image, np.searchsorted(wanted, steps)]
    flat = maps.reshape(*maps.shape[:2], -1)
    if spec.layout == "map":
        h = flat.reshape(len(steps), -1)
    else:
        h = np.take_along_axis(flat, positions[:, None], axis=2).transpose(0, 2, 1).reshape(-1, flat.shape[1])
    return Samples(
        h=h,
        step=np.repeat(steps, positions.shape[1]).astype(np.int16),
        position=positions.reshape(-1).astype(np.int32),
        seed=np.full(len(h), activations.seeds[image], dtype=np.int64),
        request=np.full(len(h), request, dtype=np.int32),
    )


def _concatenate(parts: Sequence[Samples]) -> Samples:
    return Samples(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Samples)))
