"""A classifier's reading of one generation → shares, ratio and fairness discrepancy, with their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffusion_lens.base.types import Change, EditSpec, Evaluation, GenerationRequest, Predictions
from diffusion_lens.results import metrics, stats


def evaluate(
    readings: Mapping[str, Predictions],
    attribute_name: str,
    confusion: Mapping[str, np.ndarray],
    request: GenerationRequest,
    edit: EditSpec | None,
    *,
    reference: Mapping[str, Predictions] | None = None,
) -> Evaluation:
    """Evaluate ``attribute_name`` in ``readings`` (attribute → predictions of the same images).

    Args:
        confusion: attribute → counts ``[true, read]`` of the classifier on labelled held-out images.
        reference: readings of the unedited images of the same seeds; gives agreement and paired changes.
    """
    own = readings[attribute_name]
    shares = stats.shares(own.counts, own.n_uncertain, own.attribute, confusion[attribute_name])
    raw, corrected = stats.log_ratios(shares)
    n = int(own.counts.sum())
    agreement: dict[str, float] = {}
    changes: list[Change] = []
    for name, before in (reference or {}).items():
        agreement[name] = metrics.agreement(before, readings[name])
        changes.extend(metrics.changes(before, readings[name]))
    return Evaluation(
        attribute=own.attribute,
        shares=shares,
        log_ratio=raw,
        log_ratio_corrected=corrected,
        fd=metrics.fairness_discrepancy(np.array([share.raw for share in shares])),
        fd_floor=metrics.fd_null_floor(n, len(shares)),
        n=n,
        n_uncertain=own.n_uncertain,
        agreement=agreement,
        changes=tuple(changes),
        request=request,
        edit=edit,
        classifier_id=own.classifier_id,
    )
