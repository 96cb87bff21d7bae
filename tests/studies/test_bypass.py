"""Bypass and quality: precision and recall by hand, paired gains by simulation, a small study and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens_fixtures import PROMPTS

from diffusion_lens.base.files import write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.generate import generate, request
from diffusion_lens.results import metrics
from diffusion_lens.results.bypass import joined, load_bypass
from diffusion_lens.studies import bypass as study
from diffusion_lens.studies.bypass import BypassConfig, Window, paired_gain, run_bypass


def slow_precision(reference: np.ndarray, images: np.ndarray, k: int) -> float:
    """Kynkäänniemi et al., one pair at a time."""
    inside = 0
    for image in images:
        for i, own in enumerate(reference):
            others = sorted(float(np.linalg.norm(own - other)) for j, other in enumerate(reference) if j != i)
            if np.linalg.norm(image - own) <= others[k - 1]:
                inside += 1
                break
    return inside / len(images)


def test_precision_and_recall_by_hand() -> None:
    rng = np.random.default_rng(0)
    reference, images = rng.normal(size=(30, 3)), rng.normal(size=(20, 3)) * 0.4
    precision, recall = metrics.precision_recall(reference, images, k=2)
    assert precision == pytest.approx(slow_precision(reference, images, 2))
    assert recall == pytest.approx(slow_precision(images, reference, 2))
    assert precision > recall  # narrow images: all of them plausible, most of the world missing
    with pytest.raises(LensError, match="more than 3"):
        metrics.precision_recall(reference[:3], images)


def test_mean_distance_by_hand() -> None:
    x = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    assert metrics.mean_distance(x) == pytest.approx((5 + 1 + np.sqrt(18)) / 3)


def test_paired_gains_cover_and_cancel_what_both_share() -> None:
    rng = np.random.default_rng(1)
    same = rng.normal(size=(120, 4))
    reference = rng.normal(size=(500, 4))

    def distance(x: np.ndarray) -> float:
        return metrics.frechet_distance(reference, x)

    none = paired_gain(same, same, distance, level=0.95, n_boot=50)
    assert none.value == 0 and none.interval == (0.0, 0.0)
    shifted = same + np.array([0.5, 0, 0, 0])
    worse = paired_gain(same, shifted, distance, level=0.95, n_boot=200)
    assert worse.value == pytest.approx(distance(same) - distance(shifted)) and worse.interval[1] < 0
    inside = 0
    for seed in range(60):
        own = np.random.default_rng(100 + seed)
        a = own.normal(size=(80, 2))
        b = a + own.normal(size=(80, 2)) * 0.3 + 0.3
        found = paired_gain(a, b, lambda x: float(x.mean()), level=0.9, n_boot=200, seed=seed)
        inside += found.interval[0] <= -0.3 <= found.interval[1]
    assert 46 <= inside <= 60


def test_a_small_study(tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = np.random.default_rng(0).integers(0, 255, size=(60, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(study, "draw_prompt", lambda prompt, n: drawings)
    config = BypassConfig(
        prompt=PROMPTS[0], strengths=(0.5,), windows=(Window(), Window(last=1.0)), n=50, n_drawings=60, batch_size=50
    )
    result = run_bypass(tiny_lens, config, tmp_path)
    assert len(result.points) == 2 + 4 and len(result.bypassed) == 4
    for point in result.points:
        assert (point.gain is None) == (point.strength == 0) == (point.wider is None)
        base = next(p for p in result.points if p.guidance_scale == point.guidance_scale and not p.strength)
        if point.gain is not None:
            assert point.gain.value == pytest.approx(base.frechet - point.frechet, abs=1e-6)
    seeds = range(config.first_seed, config.first_seed + 50)
    plain = generate(tiny_lens.model, request(tiny_lens.model, PROMPTS[0], seeds, 4, 3.0), batch_size=50).images
    features = tiny_lens.classifier.features(plain)
    guided = next(p for p in result.points if p.guidance_scale == 3.0 and not p.strength)
    expected = metrics.frechet_distance(tiny_lens.classifier.features(drawings), features)
    assert guided.frechet == pytest.approx(expected, rel=1e-4)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was drawn again")

    monkeypatch.setattr(study, "observe", never)
    assert run_bypass(tiny_lens, config, tmp_path) == result
    write_json(tmp_path / "bypass.json", to_plain((result,)))
    assert load_bypass(tmp_path / "bypass.json") == (result,)
    assert joined((result,), result) == (result,)
    assert "settings" in result.verdict
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(LensError, match="no stored study"):
        load_bypass(tmp_path / "bad.json")
