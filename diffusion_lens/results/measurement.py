"""``Measurement``: what was read in one run, the only type in which shares are counted.

It holds readings, not numbers: shares, ratios, distances and changes are derived where they are asked for, and kept
for the next time. ``measurement["gender"]`` is what it says of one attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from diffusion_lens.base.edits import describe
from diffusion_lens.base.types import (
    Attribute,
    Change,
    EditSpec,
    Fault,
    GenerationRequest,
    LensError,
    LogRatio,
    Predictions,
    Share,
    same_request_but_edit,
)
from diffusion_lens.base.validity import count_faults, say_faults
from diffusion_lens.results import display

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

NO_IMAGES = np.zeros((0, 1, 1, 3), np.uint8)


@dataclass(frozen=True)
class Recorded:
    """What results of version 0.4 kept of a run in place of its readings, for the attributes that were not steered.

    Attributes:
        agreement: attribute → share of images that kept their class. changes: paired, against the unedited images.
        shares: attribute → shares of decided images ``[class]``.
    """

    agreement: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a classifier read in the images of one run, and against which.

    Attributes:
        request: what was drawn. edit: how it was edited; ``None`` for unedited images.
        readings: attribute → predictions, one row per seed of the request.
        confusion: attribute → counts ``[true, read]`` of the classifier on labelled held-out images.
        faults: per image, why it shows nobody and is so undecided; empty where all may be read.
        activation_ratio: mean ``|h'| / |h|`` over edited images and steps; 1 where nothing was edited.
        features: the classifier's image features ``[n, d]``; ``None`` once stored, or where it has none.
        frechet: Fréchet distance of ``features`` from the reference's; ``None`` below ``metrics.MIN_FRECHET`` images.
        examples: the first few images, ``uint8 [m, H, W, 3]``.
        reference: the unedited run of the same request; ``None`` where this is one, or none was drawn.
        recorded: stands in for readings that a result of version 0.4 did not keep.
    """

    request: GenerationRequest
    edit: EditSpec | None
    readings: Mapping[str, Predictions]
    confusion: Mapping[str, np.ndarray]
    classifier_id: str
    faults: tuple[Fault | None, ...] = ()
    activation_ratio: float = 1.0
    features: np.ndarray | None = field(default=None, repr=False)
    frechet: float | None = None
    examples: np.ndarray = field(default_factory=lambda: NO_IMAGES, repr=False)
    reference: Measurement | None = field(default=None, repr=False)
    recorded: Recorded | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        wrong = [name for name, p in self.readings.items() if len(p.certain) != self.n and self.recorded is None]
        if wrong:
            raise LensError(f"The reading of {wrong[0]} has other images than the request has seeds.")
        if self.reference is not None:
            check_reference(self, self.reference)

    def __getitem__(self, attribute: str) -> Figures:
        """The figures of one attribute, FD against equal shares; raises ``LensError`` that lists what was read."""
        return self.figures(attribute)

    def __repr__(self) -> str:
        prompt = "no prompt" if self.request.prompt is None else repr(self.request.prompt)
        edit = "unedited" if self.edit is None else describe(self.edit)
        return f"Measurement({self.n} images of {prompt}, {edit}; {', '.join(self.readings)})"

    def to_frame(self) -> pd.DataFrame:
        """A row per attribute and class, with counts, intervals, and what moved against the reference."""
        moved = {(c.attribute, c.label): c for c in self.changes}
        rows = []
        for name in self.readings:
            for share in self[name].shares if name in self.confusion else ():
                change = moved.get((name, share.label))
                paired = {} if change is None else {
                    "moved": change.difference, "moved low": change.interval[0], "moved high": change.interval[1],
                }  # fmt: skip
                rows.append({"attribute": name, **display.share_row(share), **paired})
        return display.frame(rows)

    def plot(self, attribute: str | None = None) -> go.Figure:
        """The shares of one attribute (the first by default), before and after where there is a reference."""
        return display.plot(self[attribute or next(iter(self.readings))])

    def _repr_html_(self) -> str:
        first = next(iter(self.readings))
        figures = self[first]
        rows = [display.share_row(share) for share in figures.shares] if first in self.confusion else []
        pictures = [("edited" if self.edit else "unedited", self.examples)]
        if self.reference is not None and self.reference is not self:
            pictures.insert(0, ("unedited", self.reference.examples))
        others = ", ".join(list(self.readings)[1:])
        note = f"{first} as a classifier read it{f'; also read: {others}' if others else ''}. "
        return display.page(repr(self), rows, pictures, note + say_faults(self.n_invalid, self.n))

    @property
    def n(self) -> int:
        """Images, decided or not."""
        return len(self.request.seeds)

    @property
    def invalid_note(self) -> str:
        """One sentence on the images that show nobody, by kind; empty where none does."""
        return say_faults(self.n_invalid, self.n)

    @property
    def n_invalid(self) -> dict[Fault, int]:
        """Images that show nobody, by what is wrong with them; they stand among the undecided."""
        return count_faults(self.faults)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """What was read, image by image."""
        return tuple(p.attribute for p in self.readings.values())

    def figures(self, attribute: str, target: tuple[float, ...] | None = None) -> Figures:
        """The figures of one attribute; ``target [class]`` is what FD is measured from, equal shares by default."""
        if attribute not in self.readings:
            raise LensError(f"The classifier does not read '{attribute}'; it reads {', '.join(self.readings)}.")
        return Figures(self, self.readings[attribute].attribute, target)

    @cached_property
    def agreement(self) -> dict[str, float]:
        """Attribute → share of images that kept their class against the reference; empty without one."""
        from diffusion_lens.results import metrics

        kept = dict(self.recorded.agreement) if self.recorded else {}
        if self.reference is not None:
            before = self.reference.readings
            kept |= {k: metrics.agreement(before[k], p) for k, p in self.readings.items() if k in before}
        return kept

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """How every class's share moved against the reference, with paired intervals; empty without one."""
        from diffusion_lens.results import metrics

        found = list(self.recorded.changes) if self.recorded else []
        if self.reference is not None:
            before = self.reference.readings
            found += [c for k, p in self.readings.items() if k in before for c in metrics.changes(before[k], p)]
        return tuple(found)

    @cached_property
    def shares_read(self) -> dict[str, tuple[float, ...]]:
        """Attribute → shares of the decided images ``[class]``, not corrected; NaN where none was decided."""
        read = {name: _shares(p.counts) for name, p in self.readings.items()}
        return dict(self.recorded.shares) | read if self.recorded else read

    def against(self, reference: Measurement | None) -> Measurement:
        """The same readings measured against an unedited run (itself, for the unedited point of a sweep)."""
        from diffusion_lens.results import metrics

        features, before = self.features, None if reference is None else reference.features
        distance = None
        if features is not None and before is not None and len(features) >= metrics.MIN_FRECHET:
            distance = metrics.frechet_distance(before, features)
        return replace(self, reference=reference, frechet=distance)

    def crossings(self, first: str, second: str) -> np.ndarray:
        """Images per pair of classes, decided in both attributes, ``int64 [class of first, class of second]``."""
        from diffusion_lens.results import metrics

        return metrics.intersections(self[first].predictions, self[second].predictions)


def join(first: Measurement, more: Measurement) -> Measurement:
    """Two unedited runs of one prompt on different seeds as one; raises ``LensError`` for other runs."""
    if replace(first.request, seeds=more.request.seeds) != more.request or first.classifier_id != more.classifier_id:
        raise LensError("Only runs that differ in their seeds alone can be joined.")
    readings = {
        name: replace(
            p,
            probs=np.concatenate([p.probs, more.readings[name].probs]),
            certain=np.concatenate([p.certain, more.readings[name].certain]),
        )
        for name, p in first.readings.items()
    }
    request = replace(first.request, seeds=first.request.seeds + more.request.seeds)
    faults = _every(first) + _every(more) if first.faults or more.faults else ()
    return replace(
        first, request=request, readings=readings, faults=faults, features=None, frechet=None, reference=None
    )


def _every(one: Measurement) -> tuple[Fault | None, ...]:
    return one.faults or (None,) * one.n


def check_reference(run: Measurement, reference: Measurement) -> None:
    """Raise ``LensError`` unless ``reference`` is of the same request, read by the same classifier."""
    same_request_but_edit(run, reference)
    if run.classifier_id != reference.classifier_id:
        raise LensError("The reference was read by another classifier; read both with one.")


def _shares(counts: np.ndarray) -> tuple[float, ...]:
    total = counts.sum()
    return tuple(float(c) for c in counts / total) if total else (float("nan"),) * len(counts)


@dataclass(frozen=True, eq=False, repr=False)
class Figures:
    """What a measurement says of one attribute; every number is derived from the readings on first use.

    ``target [class]`` is what FD is measured from; ``None`` stands for equal shares.
    """

    measurement: Measurement
    attribute: Attribute
    target: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        counted = ", ".join(
            f"{count} {label}" for label, count in zip(self.attribute.classes, self.counts, strict=True)
        )
        return f"{type(self).__name__}({self.attribute.name}: {counted}, {self.n_uncertain} undecided)"

    def to_frame(self) -> pd.DataFrame:
        """A row per class, with counts and intervals."""
        return display.frame([display.share_row(share) for share in self.shares])

    def plot(self) -> go.Figure:
        """The shares, before and after where there is a reference."""
        return display.plot(self)

    def _repr_html_(self) -> str:
        known = self.attribute.name in self.measurement.confusion
        rows = [display.share_row(share) for share in self.shares] if known else []
        name = describe(self.edit) if self.edit else "unedited"
        return display.page(repr(self), rows, [(name, self.examples)], say_faults(self.measurement.n_invalid, self.n))

    @property
    def predictions(self) -> Predictions:
        """The reading, image by image."""
        return self.measurement.readings[self.attribute.name]

    @property
    def request(self) -> GenerationRequest:
        """What was drawn."""
        return self.measurement.request

    @property
    def edit(self) -> EditSpec | None:
        """How it was edited."""
        return self.measurement.edit

    @property
    def classifier_id(self) -> str:
        """Who read it."""
        return self.measurement.classifier_id

    @property
    def counts(self) -> np.ndarray:
        """Decided images per class ``[class]``."""
        return self.predictions.counts

    @property
    def n(self) -> int:
        """Decided images."""
        return int(self.counts.sum())

    @property
    def n_uncertain(self) -> int:
        """Images left undecided."""
        return self.predictions.n_uncertain

    @property
    def labels(self) -> np.ndarray:
        """Class index per image ``int64 [n]``; ``certain`` says which count."""
        return self.predictions.labels

    @property
    def certain(self) -> np.ndarray:
        """Which images are decided, ``bool [n]``."""
        return self.predictions.certain

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """One per class, raw and corrected for the classifier's error, in class order."""
        from diffusion_lens.results import stats

        confusion = self.measurement.confusion
        if self.attribute.name not in confusion:
            raise LensError(
                f"The classifier's error on {self.attribute.name} is not known; calibrate it on labelled images."
            )
        return stats.shares(self.counts, self.n_uncertain, self.attribute, confusion[self.attribute.name])

    @cached_property
    def _log_ratios(self) -> tuple[LogRatio | None, LogRatio | None]:
        from diffusion_lens.results import stats

        return stats.log_ratios(self.shares)

    @property
    def log_ratio(self) -> LogRatio | None:
        """``ln`` of the second class's share over the first's, as counted; ``None`` for more than two classes."""
        return self._log_ratios[0]

    @property
    def log_ratio_corrected(self) -> LogRatio | None:
        """The same after correction for the classifier's error."""
        return self._log_ratios[1]

    @property
    def goal(self) -> np.ndarray:
        """What FD is measured from ``[class]``."""
        k = len(self.attribute.classes)
        return np.full(k, 1 / k) if self.target is None else np.asarray(self.target, dtype=np.float64)

    @cached_property
    def fd(self) -> float:
        """Fairness discrepancy of the decided images from ``goal``; NaN where none is decided."""
        from diffusion_lens.results import metrics

        return metrics.fairness_discrepancy(np.array(_shares(self.counts)), self.goal)

    @cached_property
    def fd_interval(self) -> tuple[float, float]:
        """The 95 % interval of ``fd``; all that FD can be where none is decided."""
        from diffusion_lens.results import metrics

        return metrics.fd_interval(self.counts, self.goal)

    @cached_property
    def fd_floor(self) -> float:
        """The 95 % point of FD where as many images truly follow ``goal``: below it FD shows nothing."""
        from diffusion_lens.results import metrics

        return metrics.fd_null_floor(self.n, self.goal)

    @property
    def agreement(self) -> dict[str, float]:
        """The other attributes → share of images that kept their class against the reference."""
        return {name: kept for name, kept in self.measurement.agreement.items() if name != self.attribute.name}

    @property
    def kept(self) -> float:
        """Mean of ``agreement``; 1 where no other attribute is read."""
        others = list(self.agreement.values())
        return float(np.mean(others)) if others else 1.0

    @property
    def changes(self) -> tuple[Change, ...]:
        """The other attributes' classes against the reference, with paired intervals."""
        return tuple(c for c in self.measurement.changes if c.attribute != self.attribute.name)

    @property
    def own_changes(self) -> tuple[Change, ...]:
        """This attribute's classes against the reference, with paired intervals."""
        return tuple(c for c in self.measurement.changes if c.attribute == self.attribute.name)

    @property
    def spillover(self) -> dict[str, tuple[float, ...]]:
        """The other attributes → shares of their decided images ``[class]``."""
        return {k: s for k, s in self.measurement.shares_read.items() if k != self.attribute.name}

    @property
    def activation_ratio(self) -> float:
        """Mean ``|h'| / |h|`` over edited images and steps; 1 where nothing was edited."""
        return self.measurement.activation_ratio

    @property
    def fid(self) -> float | None:
        """``Measurement.frechet``."""
        return self.measurement.frechet

    @property
    def examples(self) -> np.ndarray:
        """The first few images, ``uint8 [m, H, W, 3]``."""
        return self.measurement.examples
