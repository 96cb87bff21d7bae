"""What a comparison will cost, from how fast this machine draws; and on which prompt it says most."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_lens.base.workspace import Workspace
from diffusion_lens.methods.protocol import Method
from diffusion_lens.methods.registry import find_methods
from diffusion_lens.model.generate import generate, request
from diffusion_lens.results.comparison import UNSTEERED, CompareConfig, Comparison
from diffusion_lens.results.manifest import Setting
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.studies.bench.run import FITTED, Bench, point_name
from diffusion_lens.studies.bench.shared import JudgedLens, Shared

DRAW = {"activation": 1.4}
"""Method → time per image, an unedited one taking 1, where it is not about 1 (measured on the bundled lens)."""

FIT = {
    "difflens": 80.0, "sae-lrp": 30.0, "latent-direction": 180.0, "fine-tuning": 180.0, "ddm": 480.0,
    "equisteer": 220.0, "text-sae": 60.0, "site-means": 60.0,
}  # fmt: skip
"""Method → what its fit costs beside drawing its images, in unedited images' time: measured on the bundled lens, the
second line counted from what those fits draw."""

OTHER_FIT = 20.0
PROBED = 16


@dataclass(frozen=True)
class Piece:
    """What is left of one method's row: images still to draw, and seconds for them and its fit."""

    attribute: str
    method: str
    images: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything that is left to do; expect the time right within a factor of two."""

    pieces: tuple[Piece, ...]

    @property
    def images(self) -> int:
        """Images still to draw."""
        return sum(piece.images for piece in self.pieces)

    @property
    def seconds(self) -> float:
        """Time that is left."""
        return sum(piece.seconds for piece in self.pieces)

    def after(self, attribute: str, method: str) -> float:
        """Seconds left once this piece is done."""
        names = [(piece.attribute, piece.method) for piece in self.pieces]
        done = names.index((attribute, method)) + 1 if (attribute, method) in names else 0
        return sum(piece.seconds for piece in self.pieces[done:])


def plan(
    lens: JudgedLens,
    configs: Sequence[CompareConfig],
    folder: Path,
    seconds_per_image: float,
    stored: Mapping[str, Comparison] | None = None,
) -> Plan:
    """What is left to do in ``folder``; ``stored`` comparisons of this lens say what each method costs."""
    pieces = []
    begun: set[Workspace] = set()
    for config in configs:
        bench = Bench(Shared(lens, config, folder), config, folder)
        shared = bench.shared.pieces
        unedited = {"final": config.n, "tune": config.n_tune}
        images = sum(n for name, n in unedited.items() if not shared.has(f"{name}.safetensors")) + config.n_fit
        images = 0 if shared in begun else images
        begun.add(shared)
        pieces.append(Piece(config.attribute, UNSTEERED, images, images * seconds_per_image))
        pieces += [
            _piece(bench, method, seconds_per_image, stored or {})
            for method in find_methods(config.methods)
            if not bench.finished(method)
        ]
    return Plan(tuple(pieces))


def _piece(bench: Bench, method: Method, seconds_per_image: float, stored: Mapping[str, Comparison]) -> Piece:
    own, config = bench.pieces.part(method.key), bench.config
    measured = sum(own.has(point_name(strength)) for strength in method.strengths)
    refined = config.n_refine if config.protocol == "balance" else 0
    images = config.n + config.n_explicit + config.n_tune * (len(method.strengths) - measured + refined)
    ratio, fit = costs(method.key, stored)
    fit = 0.0 if own.has(FITTED) else fit
    return Piece(bench.attribute.name, method.key, images, (images * ratio + fit) * seconds_per_image)


def costs(method: str, stored: Mapping[str, Comparison]) -> tuple[float, float]:
    """Time per image and time to fit, both in unedited images' time: as stored, else as on the bundled lens."""
    for comparison in stored.values():
        row, base = comparison.row(method), comparison.row(UNSTEERED)
        if row and base and row.seconds_per_image and base.seconds_per_image and row.strength:
            fit = (row.seconds_to_fit or 0.0) / base.seconds_per_image
            return row.seconds_per_image / base.seconds_per_image, fit
    return DRAW.get(method, 1.0), FIT.get(method, OTHER_FIT)


def probe_speed(lens: JudgedLens, prompt: str | None, batch_size: int = PROBED) -> float:
    """Seconds per unedited image on this machine now: one batch to warm up, one to measure."""
    manifest = lens.manifest
    wanted = request(lens.model, prompt, range(batch_size), manifest.n_steps, manifest.guidance_scale)
    for _ in range(2):
        begin = time.perf_counter()
        generate(lens.model, wanted, batch_size=batch_size)
    return (time.perf_counter() - begin) / batch_size


def telling_prompt(
    attribute: str, prompts: Sequence[str | None], sweeps: Sequence[SweepResult], settings: Mapping[str, Setting]
) -> str | None:
    """The prompt whose unedited images are furthest from even shares in the stored sweeps; else the first prompt."""
    off: dict[str | None, float] = {}
    for result in sweeps:
        if result.attribute.name == attribute and attribute in settings and result.request.prompt in prompts:
            identity = settings[attribute].identity
            even = 1 / len(result.attribute.classes)
            for point in result.points:
                if point.beta == identity:
                    gap = max(abs(share.corrected - even) for share in point.shares)
                    off[result.request.prompt] = max(gap, off.get(result.request.prompt, 0.0))
    return max(off, key=lambda prompt: off[prompt]) if off else prompts[0]
