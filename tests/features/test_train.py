"""Training: a planted dictionary is recovered, dead features come back, the probe meets its slow twin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_helpers import AGE, GENDER, random_maps, random_sae
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F
from watching import steps

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.features.raking import even_weights
from diffusion_lens.features.sae import SparseAutoencoder
from diffusion_lens.features.train_probe import _calibrated_temperature, train_probe
from diffusion_lens.features.train_sae import (
    SAELog,
    SAETrainConfig,
    _auxiliary,
    _batches,
    _losses,
    _project_decoder_gradient,
    evaluate_sae,
    train_sae,
)

PLACE: dict[str, Any] = {"model_id": "tiny", "hook_name": "mid_block", "spatial": (2, 2)}


def planted(n: int, *, d_in: int = 24, n_directions: int = 32, active: int = 3) -> tuple[Tensor, Tensor]:
    """Sums of ``active`` of 32 unit directions, off-centre and far from unit scale; and the directions."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(n_directions, d_in, generator=generator), dim=1)
    chosen = torch.rand(n, n_directions, generator=generator).argsort(1)[:, :active]
    amounts = 0.5 + torch.rand(n, active, generator=generator)
    codes = torch.zeros(n, n_directions).scatter(1, chosen, amounts)
    return 7 * (codes @ directions) + torch.randn(d_in, generator=generator), directions


def config(**changes: Any) -> SAETrainConfig:
    return SAETrainConfig(**{"d_sae": 40, "k": 3, "n_steps": 600, "batch_size": 256, "lr": 3e-3, **changes})


@pytest.fixture(scope="module")
def trained() -> tuple[SparseAutoencoder, SAELog]:
    return train_sae(planted(8000)[0], config(), **PLACE)


def test_a_planted_dictionary_is_recovered(trained: tuple[SparseAutoencoder, SAELog]) -> None:
    sae, log = trained
    samples, directions = planted(8000)
    assert log.fvu < 0.1 and log.l0 <= 3 and log.dead_share <= 0.1
    nearest = (directions @ F.normalize(sae.W_dec, dim=1).T).max(1).values
    assert (nearest > 0.9).float().mean() > 0.9
    shuffled = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))]
    assert evaluate_sae(sae, shuffled)[0] == pytest.approx(log.fvu, abs=0.02)


def test_the_sae_keeps_its_promises(trained: tuple[SparseAutoencoder, SAELog]) -> None:
    sae, log = trained
    samples = planted(8000)[0]
    # Unit rows for samples of mean square norm d_in, in the samples' own units.
    torch.testing.assert_close(sae.W_dec.norm(dim=1), (samples.square().sum(1).mean() / 24).sqrt().expand(40))
    assert sae.cfg.hook_name == "mid_block" and sae.cfg.layout == "position"
    assert not any(p.requires_grad for p in sae.parameters())
    assert len(log.steps) == len(log.train_fvu) == len(log.train_dead)
    assert log.train_fvu[-1] < log.train_fvu[0]


def test_fvu_and_l0_equal_a_slow_twin(trained: tuple[SparseAutoencoder, SAELog]) -> None:
    sae, x = trained[0], planted(500)[0]
    fvu, l0 = evaluate_sae(sae, x)
    slow = sum(float((row - sae(row)).square().sum()) for row in x) / float((x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(slow, rel=1e-4)
    assert l0 == pytest.approx(float((sae.encode(x) > 0).sum()) / 500)


def test_same_seed_same_sae() -> None:
    samples = planted(600)[0]
    first, again, other = (train_sae(samples, config(n_steps=20, seed=s), **PLACE)[0].sae_id for s in (0, 0, 1))
    assert first == again != other


def test_dead_features_come_back() -> None:
    """A learning rate so high that many features die at once: the auxiliary loss brings them back."""
    samples = planted(6000, n_directions=512, active=4)[0]
    shape = {"d_sae": 512, "k": 4, "n_steps": 300, "lr": 3e-2, "dead_after": 10}
    without = train_sae(samples, config(aux_k=0, **shape), **PLACE)[1]
    with_aux = train_sae(samples, config(aux_k=32, **shape), **PLACE)[1]
    assert without.dead_share > 0.2 and with_aux.dead_share < 0.1
    assert with_aux.fvu < without.fvu + 0.01


def test_auxiliary_loss_equals_a_slow_twin_whatever_the_residuals_scale() -> None:
    sae, x = random_sae(), random_maps(4).permute(0, 2, 3, 1).reshape(-1, 5)
    dead = torch.tensor([2, 5, 11])
    pre = sae.hidden_pre(x)
    residual = x - (sae.encode(x) @ sae.W_dec + sae.b_dec)
    guess = torch.zeros_like(x)
    for row in range(len(x)):
        for feature in sorted(dead.tolist(), key=lambda i, row=row: -float(pre[row, i]))[:2]:
            guess[row] += max(float(pre[row, feature]), 0.0) * sae.W_dec[feature]
    factor = max(float((guess * residual).sum() / guess.square().sum()), 0.0)
    unexplained = float((residual - factor * guess).square().sum() / residual.square().sum())
    slow = unexplained - 0.1 * float(pre[:, dead].mean())
    assert float(_losses(sae, x, dead, 2)[1]) == pytest.approx(slow, rel=1e-4)
    tiny = _auxiliary(sae, pre[:, dead], dead, residual * 1e-3, 2)
    assert float(tiny) == pytest.approx(slow, rel=1e-3)
    assert float(_losses(sae, x, dead, 0)[1]) == 0


@pytest.mark.parametrize("sparse", [1, 16])
def test_a_sparse_decode_trains_like_a_dense_one(sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffusion_lens.features.train_sae.SPARSE", sparse
    )  # 1: without a dense code; 16: with one (4 of 12)
    sae, x = random_sae().requires_grad_(True), torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    found = _losses(sae, x, torch.tensor([]).long(), 0)[0]
    found.backward()
    twin = random_sae().requires_grad_(True)
    slow = (x - twin.encode(x) @ twin.W_dec - twin.b_dec).square().sum() / (x - x.mean(0)).square().sum()
    slow.backward()
    torch.testing.assert_close(found, slow)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, atol=1e-6, rtol=1e-4)


def test_the_decoders_gradient_keeps_its_rows_on_the_sphere() -> None:
    sae = random_sae().requires_grad_(True)
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    _losses(sae, torch.randn(50, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([]).long(), 0)[
        0
    ].backward()
    assert sae.W_dec.grad is not None
    before = sae.W_dec.grad.clone()
    _project_decoder_gradient(sae)
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(12), atol=1e-6, rtol=0)
    along = (before * sae.W_dec).sum(1, keepdim=True)
    assert along.abs().max() > 1e-3
    torch.testing.assert_close(sae.W_dec.grad + along * sae.W_dec.detach(), before, atol=1e-6, rtol=1e-4)


def test_chunks_are_read_again_and_an_iterator_that_ends_is_named() -> None:
    samples = planted(1200)[0]
    parts = list(samples.half().split(400))
    assert train_sae(parts, config(n_steps=30), **PLACE)[1].fvu < 1
    with pytest.raises(LensError, match="ran out"):
        train_sae(iter(parts), config(n_steps=30), **PLACE)


def test_held_out_samples_are_never_trained_on() -> None:
    """Batches cover all other rows once per pass, and row 19 of every 20 never."""
    chunk = torch.arange(100.0)[:, None]
    batches = _batches(iter([chunk, chunk + 1000]), 30, torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches) for _ in range(6)])[:, 0].tolist()
    trained_on = [row for row in range(100) if row % 20 != 19]
    assert sorted(seen) == trained_on + [1000 + row for row in trained_on]
    assert seen != sorted(seen)


def test_progress_and_cancelling() -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(planted(600)[0], config(n_steps=9), progress=steps(stop), **PLACE)
    assert seen == [(1, 9), (2, 9), (3, 9)]


def test_a_killed_training_goes_on_though_the_last_bits_of_its_samples_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do on another number of threads."""
    monkeypatch.setattr("diffusion_lens.features.train_sae.CHECKPOINT_SECONDS", 0.0)
    samples, seen = planted(2000)[0], []

    def killed(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    asked: dict[str, Any] = {"checkpoint": tmp_path / "training.pt", **PLACE}
    with pytest.raises(KeyboardInterrupt):
        train_sae(samples, config(n_steps=8), progress=steps(killed), **asked)
    train_sae(samples * (1 + 1e-6), config(n_steps=8), progress=steps(lambda done, _: seen.append(done)), **asked)
    assert seen == [6, 7, 8]


def test_samples_that_teach_nothing_are_refused() -> None:
    for samples, word in ((torch.zeros(100, 4), "same"), (torch.full((100, 4), float("nan")), "finite")):
        with pytest.raises(LensError, match=word):
            train_sae(samples, config(), **PLACE)
    with pytest.raises(LensError, match="at least 20"):
        train_sae(torch.randn(3, 4), config(), **PLACE)
    with pytest.raises(LensError, match="warmup"):
        SAETrainConfig.parse({"d_sae": 8, "k": 2, "n_steps": 1, "warmup": 3})


def labelled(attribute: Attribute, n: int = 240, n_steps: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Maps whose class shows more clearly at later steps; the last class is rare."""
    rng = np.random.default_rng(0)
    share = np.array([0.6, 0.4] if len(attribute.classes) == 2 else [0.5, 0.3, 0.2])
    labels = rng.choice(len(share), size=n, p=share)
    centres = rng.normal(size=(len(share), 3, 2, 2))
    h = 4 * rng.normal(size=(n, n_steps, 3, 2, 2)) + 10
    for step in range(n_steps):
        h[:, step] += 3 * step * centres[labels]
    return h.astype(np.float32), labels


def sklearn_twin(
    h: np.ndarray, labels: np.ndarray, step: int, weight_decay: float, weights: np.ndarray | None = None
) -> LogisticRegression:
    """The same objective on the same scaled inputs, by another solver; ``weights`` whose classes add up alike."""
    flat = h[:, step].reshape(len(h), -1).astype(np.float64)
    flat = flat - flat.mean(0)
    flat = flat / np.sqrt((flat**2).sum(1).mean())
    balance = None if weights is not None else "balanced"
    model = LogisticRegression(C=1 / (weight_decay * len(h)), class_weight=balance, max_iter=5000, tol=1e-8)
    return model.fit(flat, labels, sample_weight=weights)


@pytest.mark.parametrize("attribute", [GENDER, AGE])
def test_probe_equals_an_independent_solver(attribute: Attribute, monkeypatch: pytest.MonkeyPatch) -> None:
    h, labels = labelled(attribute)
    rows = torch.arange(len(labels))
    # Train on every image, so that both solvers see the same ones.
    monkeypatch.setattr("diffusion_lens.features.train_probe._stratified", lambda *_: (rows, rows))
    probe = train_probe(h, labels, attribute, weight_decay=0.02, seed=0)
    for step in range(4):
        # sklearn's two-class form has one weight vector, which two mirrored halves penalise half as much.
        twin = sklearn_twin(h, labels, step, 0.02 if len(attribute.classes) == 3 else 0.01)
        flat = h[:, step].reshape(len(h), -1) - h[:, step].reshape(len(h), -1).mean(0)
        expected = twin.predict_proba(flat / np.sqrt((flat**2).sum(1).mean()))
        got = probe.logits(torch.as_tensor(h[:, step]), step).softmax(1).numpy()
        np.testing.assert_allclose(got, expected, atol=0.005)


def test_a_weighted_probe_equals_an_independent_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    h, labels = labelled(AGE)
    rows = torch.arange(len(labels))
    monkeypatch.setattr("diffusion_lens.features.train_probe._stratified", lambda *_: (rows, rows))
    weights = np.random.default_rng(1).uniform(0.2, 3, len(labels))
    for number in range(3):  # within each class they add up to a third of the images
        weights[labels == number] *= len(labels) / 3 / weights[labels == number].sum()
    probe = train_probe(h, labels, AGE, weights=7 * weights, weight_decay=0.02, seed=0)
    twin = sklearn_twin(h, labels, 3, 0.02, weights)
    flat = h[:, 3].reshape(len(h), -1) - h[:, 3].reshape(len(h), -1).mean(0)
    expected = twin.predict_proba(flat / np.sqrt((flat**2).sum(1).mean()))
    np.testing.assert_allclose(probe.logits(torch.as_tensor(h[:, 3]), 3).softmax(1).numpy(), expected, atol=0.005)


def test_even_weights_take_what_comes_with_a_class_out_of_its_probe() -> None:
    """Gender lies along one channel, age along another, and most men are old: h alone cannot tell which is which."""
    rng = np.random.default_rng(0)
    gender = rng.integers(0, 2, 4000)
    age = np.where(rng.random(4000) < 0.8, gender, 1 - gender)
    h = rng.normal(size=(4000, 1, 2, 1, 1)).astype(np.float32)
    h[:, 0, 0, 0, 0] += gender
    h[:, 0, 1, 0, 0] += 2 * age

    def leak(weights: np.ndarray | None) -> float:
        weight = train_probe(h, gender, GENDER, weights=weights, weight_decay=1.0, seed=0).weight[0]
        return float((weight[1] - weight[0])[1] / (weight[1] - weight[0])[0])

    assert leak(None) > 0.6
    assert abs(leak(even_weights(gender, [age]))) < 0.1
    assert leak(np.full(4000, 3.0)) == pytest.approx(leak(None), abs=1e-3)


def test_probe_learns_where_there_is_something_to_learn() -> None:
    h, labels = labelled(AGE, n=600)
    probe = train_probe(h, labels, AGE, seed=0)
    assert probe.weight.shape == (4, 3, 12)
    assert probe.accuracy[0] < 0.55 and probe.accuracy[3] > 0.75
    assert probe.temperature == 1.0


def test_calibrated_temperature_equals_a_grid_search() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 4000, 2, generator=generator).double()
    # Labels drawn from softmax(logits / 2): the right temperature is 2.
    labels = torch.bernoulli((logits[0] / 2).softmax(1)[:, 1], generator=generator).long()
    grid = np.exp(np.linspace(-1, 2, 600))
    slow = grid[np.argmin([float(F.cross_entropy(logits[0] / t, labels)) for t in grid])]
    got = _calibrated_temperature(logits, labels, 2)
    assert got == pytest.approx(slow, rel=0.03) and got == pytest.approx(2, rel=0.15)
    h, classes = labelled(GENDER, n=600)
    assert train_probe(h, classes, GENDER, weight_decay=1.0, temperature=None, seed=0).temperature < 0.5


def test_chunks_of_steps_and_uncertain_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    h, labels = labelled(GENDER)
    whole = train_probe(h, labels, GENDER, seed=3)
    monkeypatch.setattr("diffusion_lens.features.train_probe.PROBE_CHUNK_NUMBERS", 1)
    torch.testing.assert_close(train_probe(h, labels, GENDER, seed=3).weight, whole.weight, atol=1e-4, rtol=1e-2)
    more_h, more = np.concatenate([h, 100 + h[:20]]), np.concatenate([labels, np.full(20, -1)])
    torch.testing.assert_close(train_probe(more_h, more, GENDER, seed=3).weight, whole.weight, atol=1e-4, rtol=1e-2)


def test_probe_faults_are_named() -> None:
    h, labels = labelled(GENDER, n=40)
    with pytest.raises(LensError, match="n labels"):
        train_probe(h, labels[:-1], GENDER, seed=0)
    with pytest.raises(LensError, match="'male'"):
        train_probe(h, np.zeros(40, int), GENDER, seed=0)
    with pytest.raises(LensError, match="between"):
        train_probe(h, labels + 1, GENDER, seed=0)
    for weights in (np.ones(39), np.zeros(40)):
        with pytest.raises(LensError, match="weight above 0"):
            train_probe(h, labels, GENDER, weights=weights, seed=0)


def test_an_iterable_of_unusable_chunks_is_refused() -> None:
    def chunks() -> Iterator[Tensor]:
        yield torch.zeros(30)

    with pytest.raises(LensError, match=r"\[N, d_in\]"):
        train_sae(chunks(), config(), **PLACE)
