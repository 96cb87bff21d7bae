"""The scan: sums equal their slow form, probes read what is planted and nothing else, and a stopped scan goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_lens.base.progress import Cancelled, Progress, Status
from diffusion_lens.base.types import Attribute, LensError, Predictions
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.denoise import Capture
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import at_site
from diffusion_lens.results.scan import Scan, Steps
from diffusion_lens.studies import scan as module
from diffusion_lens.studies.scan import PROBE_GRID, ScanConfig, ScanPlan, pool, ranges, scan

SITES = ("mid_block", "up_blocks.0")
GENDER = Attribute("gender", ("female", "male"))


def config_of(lens: DiffusionLens, **changes: Any) -> ScanConfig:
    values: dict[str, Any] = {
        "prompt": lens.prompts[0], "attributes": ("gender",), "n_steps": 4, "guidance_scale": 2.0, "sites": SITES,
        "n_ranges": 2, "n_drawn": 48, "n_steered": 16, "batch_size": 16,
    }  # fmt: skip
    return ScanConfig(**values | changes)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scan")


@pytest.fixture(scope="module")
def found(tiny_lens: DiffusionLens, work: Path) -> Scan:
    return scan(tiny_lens.model, tiny_lens.classifier, config_of(tiny_lens), work)


def test_every_cell_is_measured(found: Scan, tiny_lens: DiffusionLens) -> None:
    assert [s.name for s in found.sites] == list(SITES)
    assert found.sites[0].d_in == tiny_lens.model.d_in
    assert found.steps == (Steps(0, 2), Steps(2, 4), Steps(0, 4))
    assert len(found.cells) == len(SITES) * 3
    for cell in found.cells:
        assert (cell.reading is None) == (found.steps[cell.steps] == Steps(0, 4))
        assert cell.steering.direction.n + cell.steering.direction.n_uncertain <= 16
    assert 0 < found.errors["gender"] < 0.2


def test_directions_equal_their_slow_form(found: Scan, tiny_lens: DiffusionLens, work: Path) -> None:
    from diffusion_lens.base.files import load_tensors

    config = config_of(tiny_lens)
    place = at_site(tiny_lens.model, "up_blocks.0")
    seeds = range(config.first_seed, config.first_seed + config.n_drawn)
    drawn = generate(
        place, request(place, config.prompt, seeds, 4, 2.0), capture=Capture(dtype=np.float32), batch_size=16
    )
    read = tiny_lens.classifier.predict(drawn.images)["gender"]
    assert drawn.activations is not None
    h, label = drawn.activations.h, read.attribute.index(found.attributes[0].target)
    mine, others = read.certain & (read.labels == label), read.certain & (read.labels != label)
    slow = h[mine].mean(0) - h[others].mean(0)
    (stored,) = work.rglob("site-up_blocks.0.safetensors")
    arrays = load_tensors(stored)
    np.testing.assert_allclose(arrays["gender.direction"], slow, atol=1e-5)
    lengths = [np.linalg.norm(arrays[f"gender.{k}"].reshape(4, -1), axis=1) for k in ("direction", "control")]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    cosine = (arrays["gender.direction"] * arrays["gender.control"]).sum() / (lengths[0] * lengths[1]).sum()
    assert abs(cosine) < 0.9


def test_a_finished_scan_draws_nothing(
    found: Scan, tiny_lens: DiffusionLens, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(module, "observe", never)
    monkeypatch.setattr(module, "generate_batches", never)
    again = scan(tiny_lens.model, tiny_lens.classifier, config_of(tiny_lens), work)
    assert again.cells == found.cells


def test_a_stopped_scan_goes_on_to_the_same_result(found: Scan, tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    def stop(status: Status) -> None:
        if status.share > 0.5:
            raise Cancelled

    with pytest.raises(Cancelled):
        scan(tiny_lens.model, tiny_lens.classifier, config_of(tiny_lens), tmp_path, progress=Progress(stop))
    n_kept = len(list(tmp_path.rglob("*.json")))
    assert n_kept > 0
    again = scan(tiny_lens.model, tiny_lens.classifier, config_of(tiny_lens), tmp_path)
    assert again.cells == found.cells


def test_a_scan_is_kept_in_a_lens(found: Scan, copied_lens: Any) -> None:
    lens = DiffusionLens.from_pretrained(copied_lens())
    lens.store(found)
    (kept,) = DiffusionLens.from_pretrained(lens.folder).stored(Scan).values()
    assert kept.cells == found.cells


def test_its_cost_is_told_first_and_not_again(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    told: list[str] = []

    def listen(plan: ScanPlan) -> None:
        told.append(plan.describe())

    config = config_of(tiny_lens, sites=SITES[:1], n_ranges=1, n_drawn=32, n_steered=8)
    for _ in range(2):
        scan(tiny_lens.model, tiny_lens.classifier, config, tmp_path, on_plan=listen)
    (only,) = told
    assert only.startswith("1 sites") and f"{32 * 2 + 8 * (1 + 2):,} images" in only


def test_a_probe_reads_what_is_planted_and_not_what_is_not() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    probs = np.eye(2)[labels]
    read = Predictions(probs, np.ones(200, bool), GENDER, "planted")
    noise = rng.normal(size=(200, 3, 2, 2)).astype(np.float32)
    planted = noise + 3 * (labels[:, None, None, None] - 0.5)
    known, unknown = module._read(planted, read, GENDER, 0), module._read(noise, read, GENDER, 0)
    assert known.accuracy > 0.95 and known.is_sure and known.shuffled_range[1] < known.interval[0]
    assert not unknown.is_sure and abs(unknown.accuracy - 0.5) < 0.2


def test_large_maps_are_averaged_for_the_probe() -> None:
    h = torch.arange(2 * 16 * 16, dtype=torch.float32).reshape(1, 1, 2, 16, 16)
    small = pool(h)
    assert small.shape == (1, 1, 2, PROBE_GRID, PROBE_GRID)
    assert small[0, 0, 0, 0, 0] == pytest.approx(float(h[0, 0, 0, :2, :2].mean()))
    assert torch.equal(pool(h[..., :4, :4]), h[..., :4, :4])


def test_the_controls_halves_differ_in_nothing_but_chance() -> None:
    rng = np.random.default_rng(0)
    certain = rng.random(200) < 0.9
    mine = certain & (rng.random(200) < 0.2)
    one, other = module._random_halves(mine, certain, rng)
    assert not (one & other).any() and np.array_equal(one | other, certain)
    assert abs(int((one & mine).sum()) - int((other & mine).sum())) <= 1
    assert abs(int(one.sum()) - int(other.sum())) <= 2


def test_ranges_cover_the_run_once() -> None:
    assert ranges(10, 3) == (Steps(0, 3), Steps(3, 7), Steps(7, 10), Steps(0, 10))
    assert ranges(4, 1) == (Steps(0, 4),)
    with pytest.raises(LensError, match="4 steps"):
        ranges(4, 5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attributes": ("hats",)}, "does not read 'hats'"),
        ({"targets": {"gender": "nobody"}}, "has no class 'nobody'"),
        ({"sites": ("attic",)}, "attic"),
    ],
)
def test_mistakes_are_told_before_anything_long(
    tiny_lens: DiffusionLens, work: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(LensError, match=sentence):
        scan(tiny_lens.model, tiny_lens.classifier, config_of(tiny_lens, **changes), work)
