"""What a measurement says of one attribute, where some images are left undecided: each number from the right images."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_lens.base.types import Attribute, GenerationRequest, Predictions
from diffusion_lens.results import metrics, stats
from diffusion_lens.results.measurement import Measurement

GENDER = Attribute("gender", ("female", "male"))
GLASSES = Attribute("glasses", ("no", "yes"))
CONFUSION = np.array([[190, 10], [6, 194]])
N = 60


def measured(n_undecided: int, *, glasses_undecided: int = 0, reference: Measurement | None = None) -> Measurement:
    """60 images: 15 read as male; the last ``n_undecided`` (all most probably female) undecided in gender."""
    probs = np.where(np.arange(N)[:, None] < 15, [[0.2, 0.8]], [[0.8, 0.2]])
    decided = np.arange(N) < N - n_undecided
    glasses = Predictions(np.tile([0.9, 0.1], (N, 1)), np.arange(N) < N - glasses_undecided, GLASSES, "c")
    return Measurement(
        GenerationRequest("a portrait", tuple(range(N)), 3, 1.0, "m"), None,
        {"gender": Predictions(probs, decided, GENDER, "c"), "glasses": glasses},
        {"gender": CONFUSION, "glasses": CONFUSION}, "c", reference=reference,
    )  # fmt: skip


def test_undecided_images_count_in_no_share_and_no_noise_floor() -> None:
    found = measured(40)["gender"]
    assert (found.n, found.n_uncertain, found.counts.tolist()) == (20, 40, [5, 15])
    assert found.fd == pytest.approx(np.sqrt(2) * 0.25)
    assert found.fd_floor == metrics.fd_null_floor(20) > metrics.fd_null_floor(60)
    assert found.fd_interval == metrics.fd_interval(np.array([5, 15]))
    assert found.shares[1].n == 20 and found.shares[1].raw_interval == stats.share_interval(15, 20)
    assert found.log_ratio is not None and found.log_ratio.value == pytest.approx(np.log(3))


def test_fd_is_measured_from_the_stated_target() -> None:
    found = measured(40).figures("gender", (0.1, 0.9))
    assert found.fd == pytest.approx(np.sqrt(2) * 0.15)
    assert found.fd_floor == metrics.fd_null_floor(20, np.array([0.1, 0.9])) < metrics.fd_null_floor(20)
    assert found.fd_interval == metrics.fd_interval(np.array([5, 15]), np.array([0.1, 0.9]))


def test_an_image_that_becomes_undecided_did_not_keep_its_class() -> None:
    before = measured(0)
    after = measured(0, glasses_undecided=12, reference=before)
    assert after.agreement == {"gender": 1.0, "glasses": pytest.approx(48 / 60)}
    assert after["gender"].kept == pytest.approx(48 / 60) and after["glasses"].kept == 1
    # Undecided both times is the same answer; paired changes speak of the images decided both times alone.
    again = measured(0, glasses_undecided=12, reference=measured(0, glasses_undecided=12))
    assert again.agreement["glasses"] == 1
    assert {c.n for c in after["glasses"].own_changes} == {48}


def test_nothing_decided_leaves_numbers_open() -> None:
    found = measured(60)["gender"]
    assert np.isnan(found.fd) and np.isnan(found.fd_floor) and found.log_ratio is None
    assert found.fd_interval == pytest.approx((0, np.sqrt(0.5)))
