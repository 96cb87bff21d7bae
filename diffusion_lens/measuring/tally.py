"""What a classifier reads in images, added up batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from diffusion_lens.base.types import Attribute, Predictions, Share
from diffusion_lens.results import stats


@dataclass
class Tally:
    """Decided images per class and undecided ones, by attribute, added up over batches."""

    counts: dict[str, np.ndarray] = field(default_factory=dict)
    uncertain: dict[str, int] = field(default_factory=dict)
    n: int = 0

    def add(self, predictions: dict[str, Predictions], n: int) -> None:
        """Count one batch."""
        for name, reading in predictions.items():
            self.counts[name] = self.counts.get(name, np.zeros(len(reading.attribute.classes), int)) + reading.counts
            self.uncertain[name] = self.uncertain.get(name, 0) + reading.n_uncertain
        self.n += n

    def shares(self, attribute: Attribute, confusion: np.ndarray) -> tuple[Share, ...]:
        """Every class's share, corrected by the classifier's confusion matrix, in class order."""
        return stats.shares(self.counts[attribute.name], self.uncertain[attribute.name], attribute, confusion)
