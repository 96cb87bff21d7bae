"""A training that was stopped goes on to the very same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from watching import steps

from diffusion_lens.base.resume import Checkpoint
from diffusion_lens.features import train_sae as train
from diffusion_lens.features.train_sae import SAETrainConfig, train_sae

PLACE: dict[str, Any] = {"model_id": "tiny", "hook_name": "mid_block", "spatial": (2, 2)}
CONFIG = SAETrainConfig(d_sae=16, k=2, n_steps=40, batch_size=32, dead_after=5)


class Stopped(Exception):
    """Stands for a kill."""


def samples() -> torch.Tensor:
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 1


def stop_at(step: int) -> Any:
    def on_step(done: int, total: int) -> None:
        if done == step:
            raise Stopped

    return on_step


def test_a_stopped_training_ends_where_an_undisturbed_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    whole, whole_log = train_sae(samples(), CONFIG, **PLACE)
    with pytest.raises(Stopped):
        train_sae(samples(), CONFIG, **PLACE, checkpoint=tmp_path / "t.pt", progress=steps(stop_at(23)))
    seen: list[int] = []
    resumed, log = train_sae(
        samples(), CONFIG, **PLACE, checkpoint=tmp_path / "t.pt", progress=steps(lambda done, _: seen.append(done))
    )
    assert seen[0] == 24
    assert resumed.sae_id == whole.sae_id
    assert log == whole_log


def test_the_state_of_another_training_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    train_sae(samples(), CONFIG, **PLACE, checkpoint=tmp_path / "t.pt")
    other = CONFIG.model_copy(update={"seed": 1})
    resumed, _ = train_sae(samples(), other, **PLACE, checkpoint=tmp_path / "t.pt")
    assert resumed.sae_id == train_sae(samples(), other, **PLACE)[0].sae_id


def test_nothing_is_written_before_its_time_or_without_a_path(tmp_path: Path) -> None:
    part = torch.nn.Linear(1, 1)
    Checkpoint(tmp_path / "t.pt", "x", {"part": part}, seconds=3600).save({"step": 1})
    Checkpoint(None, "x", {"part": part}, seconds=0).save({"step": 1})
    assert list(tmp_path.iterdir()) == []
    assert Checkpoint(None, "x", {"part": part}).load() is None
