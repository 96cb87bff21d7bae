"""Flip-books of a lens's recommended turns: as a stage of a fit, and added to a lens that is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import Attribute, Attribution, GenerationRequest, LensError, strength_of
from diffusion_lens.base.workspace import Workspace
from diffusion_lens.features.probes import Probe
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.fit.measure import read_settings, read_sweeps
from diffusion_lens.fit.stages import Work, read_attributions, read_probes, read_sae
from diffusion_lens.judging.classify import Classifier
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.balance import balance
from diffusion_lens.measuring.flip_book import draw_flip_book
from diffusion_lens.model.generate import Edit, request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.results.flip_book import (
    LEAST_STRENGTHS,
    LENS_BYTES,
    MAX_SPRITE_BYTES,
    FlipBook,
    load_flip_book,
    save_flip_book,
)
from diffusion_lens.results.manifest import Setting
from diffusion_lens.results.sweeps import SweepResult
from diffusion_lens.steering.intervene import make_edit
from diffusion_lens.steering.settings import describe_setting, make_intervention, strengths

SEEDS = 8
"""As many images as the app shows."""
BOOK = "book"
"""Stem of one book's files in the work folder."""


@dataclass(frozen=True)
class Parts:
    """What a book is drawn with: models, and what the lens knows of its features."""

    model: DiffusionModel
    classifier: Classifier
    sae: SparseAutoencoder
    probes: Mapping[str, Probe]
    attributions: Mapping[str, Attribution]
    sweeps: Sequence[SweepResult]


def fit_flip_books(work: Work) -> None:
    """The stage of a fit: every attribute on every swept prompt, a folder each; nothing where none are wanted."""
    config = work.config
    plan = [(p, name) for p in range(len(config.sweeps)) for name in config.swept] if config.flip_books else []
    if not plan:
        return
    parts = Parts(
        work.model, work.classifier, read_sae(work), read_probes(work), read_attributions(work), read_sweeps(work)
    )
    settings, pieces, mine = read_settings(work), work.pieces("flip-books"), work.processes.share(plan)
    for (p, name), bar in zip(mine, work.progress.parts(len(mine)), strict=True):
        seeds = range(config.sweep_first_seed, config.sweep_first_seed + SEEDS)
        wanted = request(work.model, config.sweeps[p], seeds, config.n_steps, config.guidance_scale)
        make = partial(
            _draw, parts, settings[name], work.attribute(name), wanted, _room(len(plan)), pieces.part("frames"), bar
        )
        pieces.keep(f"{p:02d}-{name}", make, lambda path, book: save_flip_book(book, path, BOOK), bar)


def read_flip_books(work: Work) -> list[FlipBook]:
    """The finished books, in the order of their prompts."""
    folders = work.pieces("flip-books").names("[0-9]*")
    return [load_flip_book(path, BOOK) for path in folders if (path / f"{BOOK}.json").is_file()]


def flip_books(
    lens: DiffusionLens,
    plan: Sequence[tuple[str | None, str]],
    *,
    work: str | Path,
    first_seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[FlipBook]:
    """Books of a lens, one as soon as it is drawn, for ``lens.store``; ``plan``: (prompt, attribute) of each.

    ``work`` keeps the frames: killed, the same call goes on. All sprites together take ``LENS_BYTES`` at most.

    Raises:
        LensError: an attribute without a setting, or a prompt that the model does not take.
    """
    for _, name in plan:
        lens.setting(name)
    parts = Parts(lens.model, lens.classifier, lens.sae, lens.probes, lens.attributions, lens.sweeps)
    keep = Workspace(Path(work))
    for (prompt, name), bar in zip(plan, (progress or Progress()).parts(len(plan)), strict=True):
        wanted = lens.request(prompt, range(first_seed, first_seed + SEEDS))
        attribute = lens.attribute_named(name)
        yield _draw(parts, lens.setting(name), attribute, wanted, _room(len(plan)), keep.part("frames"), bar)


def plan_of(lens: DiffusionLens, prompts: Sequence[str | None], names: Sequence[str]) -> list[tuple[str | None, str]]:
    """Prompts × attributes: those with a stored sweep first, for they are looked at first; empty lists mean all.

    Raises ``LensError`` for an attribute that the lens does not steer.
    """
    chosen = list(names) or [a.name for a in lens.attributes if a.name in lens.settings]
    if not chosen:
        raise LensError("This lens ships no setting to turn, so there is no flip-book to draw.")
    swept = {(s.request.prompt, s.attribute.name) for s in lens.sweeps}
    every = [(prompt, name) for prompt in (prompts or lens.prompts) for name in chosen]
    return sorted(every, key=lambda own: own not in swept)


def _room(n: int) -> int:
    return min(MAX_SPRITE_BYTES, LENS_BYTES // n)


def _draw(
    parts: Parts, setting: Setting, attribute: Attribute, wanted: GenerationRequest, max_bytes: int, keep: Workspace,
    progress: Progress,
) -> FlipBook:  # fmt: skip
    attribution = parts.attributions[setting.attribute]

    def edit_at(beta: float) -> Edit | None:
        if beta == setting.identity:
            return None
        steer = make_intervention(attribution, setting, setting.target, strength_of(setting.mode, beta))
        return make_edit([steer], parts.sae, parts.probes)

    even = _even(parts, setting, wanted.prompt)
    return draw_flip_book(
        parts.model, wanted, edit_at, strengths(setting, len(attribute.classes), LEAST_STRENGTHS, even),
        parts.classifier, attribute, setting.target, setting=describe_setting(setting), sae_id=parts.sae.sae_id,
        max_bytes=max_bytes, keep=keep, progress=progress,
    )  # fmt: skip


def _even(parts: Parts, setting: Setting, prompt: str | None) -> list[float]:
    """Where a stored sweep of this prompt meets the even share, to two decimals, as the app goes there."""
    found = []
    for sweep in parts.sweeps:
        own = (sweep.request.prompt, sweep.attribute.name, sweep.target, sweep.is_control)
        if own == (prompt, setting.attribute, setting.target, False):
            table = parts.classifier.confusion[setting.attribute]
            even = balance(sweep, table, target_share=1 / len(sweep.attribute.classes))
            found += [round(even.beta, 2)] if even.reached else []
    return found
