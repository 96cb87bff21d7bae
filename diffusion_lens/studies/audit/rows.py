"""What a report says beyond shares: the fairness discrepancy in both of its forms, and how good the images are.

Images are read batch by batch as they are drawn and dropped; only numbers are kept until all prompts are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_lens.base.types import Generation, LensError, Predictions
from diffusion_lens.judging.readers import ClipReader
from diffusion_lens.measuring.quality import (
    ClipScore,
    FeatureSource,
    FeatureStatistics,
    FrechetResult,
    clip_score,
    frechet_of_features,
)
from diffusion_lens.results import metrics, stats

UNEDITED = "the unedited images of the same seeds"
SPLITS = 10
"""Parts of an Inception score, as it is usually given."""
BLANK = np.zeros((1, 64, 64, 3), np.uint8)

Run = tuple[str | None, str | None]
"""A prompt and an edit in words, ``None``: unedited."""


@dataclass(frozen=True)
class Discrepancy:
    """DiffLens' FD, the distance of the shares of one attribute from equal shares, raw (not corrected).

    Attributes:
        prompt, edit: whose images; ``pooled``: those of all prompts together (then ``prompt`` is ``None``).
        hard: of the classes of the ``n_hard`` decided images. soft: of the mean class probabilities of all
            ``n_soft`` images, as DiffLens' code takes it.
        floor_hard, floor_soft: what 95 % of balanced models stay below when as many images are counted; the
            soft form varies less than counts, so that its floor is on the safe side.
    """

    prompt: str | None
    edit: str | None
    pooled: bool
    attribute: str
    hard: float
    floor_hard: float
    n_hard: int
    soft: float
    floor_soft: float
    n_soft: int


@dataclass(frozen=True, eq=False)
class Measures:
    """Which image qualities are measured, and with what; by default none.

    Attributes:
        fid: whose features a Fréchet distance is of.
        reference: what it is a distance from; ``None``: ``UNEDITED``. ``reference_name`` says so in words.
        inception: gives class probabilities, for the Inception score.
        clip: for CLIP-T, and CLIP-I where there is an edit.
    """

    fid: FeatureSource | None = None
    reference: FeatureStatistics | None = None
    reference_name: str = UNEDITED
    inception: FeatureSource | None = None
    clip: ClipReader | None = None

    def check(self, prompts: Sequence[str | None], n: int, *, edited: bool) -> None:
        """Refuse what ``n`` images per prompt cannot give; raises ``LensError`` before anything is drawn."""
        if self.fid is not None:
            self._check_fid(self.fid, n, edited)
        if self.inception is not None and n < 10 * SPLITS:
            raise LensError(f"An Inception score needs >= {10 * SPLITS} images per prompt; {n} were asked for.")
        if self.clip is not None and not edited and not any(prompts):
            raise LensError("CLIP compares images with prompts, or edited with unedited ones; add a prompt or a turn.")
        if self.clip is not None and n < stats.MIN_PAIRS:
            raise LensError(f"CLIP scores need >= {stats.MIN_PAIRS} images per prompt; {n} were asked for.")

    def _check_fid(self, source: FeatureSource, n: int, edited: bool) -> None:
        if self.reference is None and not edited:
            raise LensError("A distance from the unedited images needs edited ones; add a turn.")
        if n < metrics.MIN_FRECHET:
            raise LensError(f"{source.label} needs >= {metrics.MIN_FRECHET} images per prompt; {n} were asked for.")
        known = None if self.reference is None else self.reference.n
        if known is not None and known < metrics.MIN_FRECHET:
            raise LensError(
                f"{source.label} needs >= {metrics.MIN_FRECHET} reference images; {self.reference_name} has {known}."
            )
        d = source.features(BLANK).shape[1]
        if self.reference is not None and self.reference.mean.size != d:
            raise LensError(
                f"{self.reference_name} holds statistics of {self.reference.mean.size} features, "
                f"but {source.name} gives {d}; make them again."
            )


@dataclass(frozen=True)
class Seen:
    """What was read of one run's images: features ``[n, d]``, class probabilities, CLIP embeddings."""

    features: np.ndarray | None = None
    probs: np.ndarray | None = None
    clip: np.ndarray | None = None


def see(measures: Measures, seen: list[Seen], part: Generation) -> None:
    """Append what ``measures`` reads of a batch to ``seen``."""
    seen.append(_see(part.images, measures))


def _see(images: np.ndarray, m: Measures) -> Seen:
    clip = None if m.clip is None else m.clip.embed_images(images)
    if m.fid is not None and m.fid is m.inception and m.fid.both is not None:
        return Seen(*m.fid.both(images), clip)
    features = None if m.fid is None else m.fid.features(images)
    probs = None if m.inception is None or m.inception.probs is None else m.inception.probs(images)
    return Seen(features, probs, clip)


def joined(seen: Sequence[Seen]) -> Seen:
    """All batches of a run as one, in order."""

    def join(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if found else None

    return Seen(join([s.features for s in seen]), join([s.probs for s in seen]), join([s.clip for s in seen]))


@dataclass(frozen=True)
class QualityRow:
    """The image quality of one run, or of all prompts together (``pooled``; then ``prompt`` is ``None``).

    Attributes:
        fid: Fréchet distance from the stated reference; of unedited images only where that is not themselves.
        inception_score: mean and standard deviation over ``SPLITS`` parts.
        clip_i: edited images against unedited ones of the same seed.
        clip_t: images against their prompts; pooled, the interval speaks of these prompts alone.
        note: what to bear in mind about ``fid``, or empty.
    """

    prompt: str | None
    edit: str | None
    pooled: bool
    n: int
    fid: FrechetResult | None = None
    inception_score: tuple[float, float] | None = None
    clip_i: ClipScore | None = None
    clip_t: ClipScore | None = None
    note: str = ""


@dataclass(frozen=True)
class ImageQuality:
    """Rows per prompt and pooled, and in words what they were measured with; an empty text: not measured."""

    fid: str
    reference: str
    inception_score: str
    clip: str
    rows: tuple[QualityRow, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """The different notes of all rows."""
        return tuple(dict.fromkeys(row.note for row in self.rows if row.note))


def image_quality(measures: Measures, runs: Sequence[Run], seen: Sequence[Seen], n: int) -> ImageQuality:
    """The quality of every run of ``n`` images, and of all prompts together where there are several.

    ``runs`` are in the order in which an audit draws them: an edited run follows the unedited one of its prompt.
    """
    groups: dict[str | None, list[int]] = {}
    for place, (_, edit) in enumerate(runs):
        groups.setdefault(edit, []).append(place)
    rows = [_row(measures, runs, seen, [place], n) for place in range(len(runs))]
    rows += [_row(measures, runs, seen, group, n) for group in groups.values() if len(group) > 1]
    reader = measures.clip
    return ImageQuality(
        fid="" if measures.fid is None else measures.fid.label,
        reference="" if measures.fid is None else measures.reference_name,
        inception_score="" if measures.inception is None else f"{measures.inception.name}, {SPLITS} splits",
        clip="" if reader is None else f"{reader.config.model_id}, weights {reader.reader_id}",
        rows=tuple(rows),
    )


def _row(m: Measures, runs: Sequence[Run], seen: Sequence[Seen], places: list[int], n: int) -> QualityRow:
    edit = runs[places[0]][1]
    own = [seen[place] for place in places]
    before = [seen[place - 1] for place in places] if edit is not None else []
    fid = _fid(m, own, before)
    return QualityRow(
        prompt=runs[places[0]][0] if len(places) == 1 else None,
        edit=edit,
        pooled=len(places) > 1,
        n=n * len(places),
        fid=fid,
        inception_score=_inception_score(own),
        clip_i=_clip([s.clip for s in own], [s.clip for s in before]),
        clip_t=_clip([s.clip for s in own], _texts(m.clip, [runs[place][0] for place in places])),
        note="" if fid is None else fid.note,
    )


def _fid(m: Measures, own: Sequence[Seen], before: Sequence[Seen]) -> FrechetResult | None:
    features, unedited = joined(own).features, joined(before).features
    reference = unedited if m.reference is None else m.reference
    if m.fid is None or features is None or reference is None:
        return None
    return frechet_of_features(features, reference, m.fid)


def _inception_score(own: Sequence[Seen]) -> tuple[float, float] | None:
    probs = [s.probs for s in own if s.probs is not None]
    if not probs:
        return None
    # Seed by seed, so that every split holds all prompts: a score is of variety within a split.
    return metrics.inception_score(np.stack(probs, axis=1).reshape(-1, probs[0].shape[1]), splits=SPLITS)


def _texts(reader: ClipReader | None, prompts: Sequence[str | None]) -> list[np.ndarray | None]:
    if reader is None:
        return []
    return [reader.embed_texts([prompt]) if prompt else None for prompt in prompts]


def _clip(own: Sequence[np.ndarray | None], other: Sequence[np.ndarray | None]) -> ClipScore | None:
    """The score of paired embeddings, run by run; runs that lack one side are left out."""
    pairs = [
        (a, np.broadcast_to(b, a.shape)) for a, b in zip(own, other, strict=False) if a is not None and b is not None
    ]
    if len(pairs) < 2:
        return clip_score(*pairs[0]) if pairs else None
    values = [metrics.cosine_to_unit(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs]
    estimate = stats.cluster_bootstrap(values, paired_seeds=True, fixed_prompts=True)
    return ClipScore(estimate.value, estimate.interval, 2 * estimate.value - 1, sum(map(len, values)))


def discrepancies(
    runs: Sequence[Run], readings: Sequence[Mapping[str, Predictions]], names: Sequence[str]
) -> tuple[Discrepancy, ...]:
    """FD of each named attribute in every run, and of all prompts together where there are several."""
    rows: list[Discrepancy] = []
    groups: dict[str | None, list[Mapping[str, Predictions]]] = {}
    for (prompt, edit), reading in zip(runs, readings, strict=True):
        groups.setdefault(edit, []).append(reading)
        rows += [_discrepancy(prompt, edit, name, [reading[name]]) for name in names]
    for edit, group in groups.items():
        if len(group) > 1:
            rows += [_discrepancy(None, edit, name, [reading[name] for reading in group]) for name in names]
    return tuple(rows)


def _discrepancy(prompt: str | None, edit: str | None, name: str, parts: Sequence[Predictions]) -> Discrepancy:
    counts = np.sum([part.counts for part in parts], axis=0)
    probs = np.concatenate([part.probs for part in parts])
    decided, k = int(counts.sum()), len(counts)
    return Discrepancy(
        prompt=prompt,
        edit=edit,
        pooled=len(parts) > 1,
        attribute=name,
        hard=metrics.fairness_discrepancy(counts / decided) if decided else float("nan"),
        floor_hard=metrics.fd_null_floor(decided, k),
        n_hard=decided,
        soft=metrics.fairness_discrepancy(probs),
        floor_soft=metrics.fd_null_floor(len(probs), k),
        n_soft=len(probs),
    )


@dataclass(frozen=True)
class MeasureRow:
    """One number of one run, as a table takes it; ``source`` says with what it was measured."""

    prompt: str | None
    edit: str | None
    pooled: bool
    measure: str
    value: float
    n: int
    source: str
    low: float | None = None
    high: float | None = None
    floor: float | None = None


def measure_rows(found: Sequence[Discrepancy], quality: ImageQuality | None) -> list[MeasureRow]:
    """Every discrepancy and every measured quality, one number a row."""
    rows = []
    for d in found:
        run = (d.prompt, d.edit, d.pooled)
        rows.append(MeasureRow(*run, f"FD {d.attribute}, hard", d.hard, d.n_hard, "decided images", floor=d.floor_hard))
        rows.append(MeasureRow(*run, f"FD {d.attribute}, soft", d.soft, d.n_soft, "all images", floor=d.floor_soft))
    for q in quality.rows if quality is not None else ():
        assert quality is not None
        run = (q.prompt, q.edit, q.pooled)
        if q.fid is not None:
            rows.append(MeasureRow(*run, q.fid.label, q.fid.value, q.fid.n, f"from {quality.reference}"))
        if q.inception_score is not None:
            mean, spread = q.inception_score
            told = f"{quality.inception_score}, standard deviation {spread:.6g}"
            rows.append(MeasureRow(*run, "Inception score", mean, q.n, told))
        for name, score in (("CLIP-I", q.clip_i), ("CLIP-T", q.clip_t)):
            if score is not None:
                low, high = score.interval
                rows.append(MeasureRow(*run, name, score.value, score.n, quality.clip, low, high))
    return rows
