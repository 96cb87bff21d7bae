"""Samples are the activations they say they are, depend on their image alone, and survive a killed run."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_lens.base.progress import Cancelled, Progress, Status
from diffusion_lens.base.types import GenerationRequest, LensError
from diffusion_lens.model.activations import ActivationStore, Samples, SampleSpec, collect_to, plan
from diffusion_lens.model.generate import Capture, generate, request
from diffusion_lens.model.pipelines import DiffusionModel, wrap_pipeline

STEPS = 4


def collect(*asked: Any, **more: Any) -> Samples:
    """Samples collected at one go."""
    with TemporaryDirectory() as folder:
        return collect_to(Path(folder), *asked, **more).load()


@pytest.fixture
def requests(text_model: DiffusionModel) -> list[GenerationRequest]:
    """Two prompts, five images."""
    return [
        request(text_model, "a man", [1, 2, 3], STEPS, 2.0),
        request(text_model, "a woman", [1, 9], STEPS, 2.0),
    ]


def test_every_sample_is_the_activation_at_its_step_and_position(
    text_model: DiffusionModel, requests: list[GenerationRequest]
) -> None:
    spec = SampleSpec(n_steps_kept=2, positions=0.25, dtype="float32", seed=3)
    samples = collect(text_model, requests, spec)
    full = [generate(text_model, r, capture=Capture(dtype=np.float32)).activations for r in requests]
    assert samples.h.shape == (5 * 2 * 4, 8)
    for i in range(len(samples)):
        activations = full[samples.request[i]]
        assert activations is not None
        image = activations.seeds.index(int(samples.seed[i]))
        y, x = divmod(int(samples.position[i]), 4)
        assert np.array_equal(samples.h[i], activations.h[image, samples.step[i], :, y, x])
    keys = set(zip(samples.request, samples.seed, samples.step, samples.position, strict=True))
    assert len(keys) == len(samples), "no position is kept twice"


def test_whole_maps_come_flattened_channel_first(text_model: DiffusionModel, requests: list[GenerationRequest]) -> None:
    samples = collect(text_model, requests[:1], SampleSpec(layout="map", n_steps_kept=3, dtype="float32"))
    activations = generate(text_model, requests[0], capture=Capture(dtype=np.float32)).activations
    assert activations is not None and samples.h.shape == (9, 8 * 4 * 4)
    assert np.array_equal(samples.h[4], activations.h[1, samples.step[4]].reshape(-1))
    assert not samples.position.any()


def test_everything_is_kept_by_default(text_model: DiffusionModel, requests: list[GenerationRequest]) -> None:
    samples = collect(text_model, requests, SampleSpec(dtype="float32"))
    h = generate(text_model, requests[0], capture=Capture(dtype=np.float32)).activations
    assert h is not None
    rows = samples.h[samples.request == 0]
    assert np.array_equal(rows, h.h.transpose(0, 1, 3, 4, 2).reshape(-1, 8))


def same(a: Samples, b: Samples) -> bool:
    """Equal up to what the batch size does to the last bits."""
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("step", "position", "seed", "request")) and bool(
        np.allclose(a.h, b.h, atol=1e-4)
    )


def test_the_sample_depends_on_the_seed_and_not_on_the_batches(
    text_model: DiffusionModel, requests: list[GenerationRequest]
) -> None:
    spec = SampleSpec(n_steps_kept=2, positions=0.5, dtype="float32")
    whole = collect(text_model, requests, spec)
    assert same(whole, collect(text_model, requests, spec, batch_size=2))
    other = collect(text_model, requests, spec.model_copy(update={"seed": 1}))
    assert not np.array_equal(whole.position, other.position)
    by_image = whole.step.reshape(5, -1)
    assert len({tuple(steps) for steps in by_image}) > 1, "images keep different steps"
    assert set(whole.step.tolist()) <= set(range(STEPS))


def test_nothing_is_decoded_and_runs_stop_early(text_model: DiffusionModel, monkeypatch: Any) -> None:
    calls: list[int] = []
    handle = text_model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(DiffusionModel, "decode", lambda *_: pytest.fail("decoded"))
    asked = request(text_model, "a man", [5], 10)
    samples = collect(text_model, [asked], SampleSpec(n_steps_kept=1))
    handle.remove()
    assert len(calls) == samples.step[0] + 1 < 10


def test_the_budget_is_kept(text_model: DiffusionModel, requests: list[GenerationRequest]) -> None:
    everything = plan(text_model, requests, SampleSpec())
    assert (everything.steps, everything.positions, everything.width) == (STEPS, 16, 8)
    assert everything.n_rows == 5 * STEPS * 16 and everything.n_bytes == everything.n_rows * 8 * 2
    for budget in (everything.n_bytes, everything.n_bytes - 1, 5 * 8 * 2 * 3):
        spec = SampleSpec(byte_budget=budget)
        sizes = plan(text_model, requests, spec)
        assert 0 < sizes.n_bytes <= budget
        assert collect(text_model, requests, spec).h.nbytes == sizes.n_bytes
    assert plan(text_model, requests, SampleSpec(byte_budget=5 * 8 * 2 * 3)).steps == 3
    with pytest.raises(LensError, match="raise byte_budget"):
        plan(text_model, requests, SampleSpec(byte_budget=5 * 8 * 2 - 1))


def test_impossible_samples_are_refused(text_model: DiffusionModel, requests: list[GenerationRequest]) -> None:
    mixed = [requests[0], request(text_model, "a man", [1], STEPS + 1)]
    for asked, spec, message in (
        ([], SampleSpec(), "at least one request"),
        (mixed, SampleSpec(), "same number of steps"),
        (requests, SampleSpec(positions=0), "positions is a share"),
        (requests, SampleSpec(layout="map", positions=0.5), "whole maps"),
        (requests, SampleSpec(n_steps_kept=STEPS + 1), "between 1 and 4 steps"),
    ):
        with pytest.raises(LensError, match=message):
            plan(text_model, asked, spec)


def test_overflow_in_half_precision_is_noticed(tiny_text_pipeline: Any) -> None:
    model = wrap_pipeline(tiny_text_pipeline, "x")
    handle = model.hook_module.register_forward_hook(lambda m, args, out: out * 1e8)
    asked = [request(model, "a man", [1], 1)]
    try:
        with pytest.raises(LensError, match="collect them as float32"):
            collect(model, asked, SampleSpec())
        assert np.isfinite(collect(model, asked, SampleSpec(dtype="float32")).h).all()
    finally:
        handle.remove()


def test_a_killed_run_resumes_and_loses_at_most_one_shard(
    text_model: DiffusionModel, requests: list[GenerationRequest], tmp_path: Path
) -> None:
    spec = SampleSpec(positions=0.5, dtype="float32")

    def cancel(status: Status) -> None:
        if status.share > 0.7:  # in the third of three batches
            raise Cancelled

    with pytest.raises(Cancelled):
        collect_to(tmp_path, text_model, requests, spec, batch_size=2, progress=Progress(cancel))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with pytest.raises(LensError, match="1 shards are missing"):
        ActivationStore(tmp_path)
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    store = collect_to(tmp_path, text_model, requests, spec, batch_size=2)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before
    at_once = collect(text_model, requests, spec, batch_size=2)
    for name in ("h", "step", "position", "seed", "request"):
        assert np.array_equal(getattr(store.load(), name), getattr(at_once, name))
    assert len(store) == len(at_once) == store.plan.n_rows


def test_a_store_refuses_other_settings_and_foreign_shards(
    text_model: DiffusionModel, requests: list[GenerationRequest], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    collect_to(one, text_model, requests[:1], SampleSpec())
    with pytest.raises(LensError, match="other settings"):
        collect_to(one, text_model, requests[1:], SampleSpec())
    collect_to(two, text_model, requests[:1], SampleSpec(seed=1))
    (one / "shard-00000.safetensors").write_bytes((two / "shard-00000.safetensors").read_bytes())
    with pytest.raises(LensError, match="belongs to another collection"):
        ActivationStore(one).load()
    (one / "shard-00000.safetensors").write_bytes(b"junk")
    with pytest.raises(LensError, match="damaged"):
        ActivationStore(one).load()
    with pytest.raises(LensError, match=r"store\.json is missing"):
        ActivationStore(tmp_path / "none")


def test_chunks_hold_every_sample_once_mixed_and_repeatably(
    text_model: DiffusionModel, requests: list[GenerationRequest], tmp_path: Path
) -> None:
    store = collect_to(tmp_path, text_model, requests, SampleSpec(dtype="float32"), batch_size=1)
    small = ActivationStore(tmp_path, seed=4, chunk_bytes=store.plan.n_bytes // 2)
    chunks = list(small)
    assert len(chunks) == 2
    assert all(torch.equal(a, b) for a, b in zip(chunks, small, strict=True))
    rows = torch.cat(chunks).numpy()
    everything = store.load().h
    assert rows.shape == everything.shape and not np.array_equal(rows, everything)
    assert np.array_equal(np.sort(rows, axis=0), np.sort(everything, axis=0))
    assert len(list(store)) == 1
