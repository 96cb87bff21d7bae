"""The bundled image classifier: what it learns, what it refuses, and that its stated error is counted right."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from watching import steps

from diffusion_lens.base.progress import Cancelled, Progress, Status
from diffusion_lens.base.resume import Checkpoint
from diffusion_lens.base.types import Attribute, LensError, Predictions
from diffusion_lens.base.weights import weights_digest
from diffusion_lens.judging import classify
from diffusion_lens.judging.calibration import choose_threshold, confusion_counts, fit_temperature, softmax
from diffusion_lens.judging.classify import (
    HeadsClassifier,
    HeadsConfig,
    HeadsNetwork,
    calibrate,
    heads_loss,
    mild_augmentation,
    train_heads,
)

COLOUR = Attribute("colour", ("red", "green", "blue"))
SHAPE = Attribute("half", ("top", "bottom"))
WIDTHS = (8, 8, 16, 16)


def drawn(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey 32 px images with the top or bottom half in one of three colours, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, 3, n), rng.integers(0, 2, n)], axis=1)
    images = rng.integers(90, 150, (n, 32, 32, 3)).astype(np.uint8)
    for image, (colour, half) in zip(images, labels, strict=True):
        image[16 * half : 16 * half + 16, :, colour] = 230
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def trained() -> HeadsClassifier:
    images, labels = drawn(400, seed=0)
    return train_heads(images, labels, (COLOUR, SHAPE), n_steps=60, batch_size=32, lr=1e-2, widths=WIDTHS)


@pytest.fixture(scope="module")
def calibrated(trained: HeadsClassifier) -> HeadsClassifier:
    images, labels = drawn(300, seed=1)
    return calibrate(trained, images, labels, max_uncertain=0.05)


def test_it_learns_both_attributes(trained: HeadsClassifier) -> None:
    images, labels = drawn(200, seed=2)
    predictions = trained.predict(images.numpy())
    for column, attribute in enumerate((COLOUR, SHAPE)):
        assert predictions[attribute.name].attribute == attribute
        assert (predictions[attribute.name].labels == labels[:, column].numpy()).mean() > 0.95


def test_a_second_architecture_reads_as_well_and_is_another(trained: HeadsClassifier, tmp_path: Path) -> None:
    images, labels = drawn(400, seed=0)
    told = {"n_steps": 60, "batch_size": 32, "lr": 1e-2, "widths": WIDTHS}
    other = train_heads(images, labels, (COLOUR, SHAPE), architecture="separable", image_size=24, **told)  # type: ignore[arg-type]
    seen, truth = drawn(200, seed=2)
    for column, attribute in enumerate((COLOUR, SHAPE)):
        read = other.predict(seen.numpy())[attribute.name]
        assert (read.labels == truth[:, column].numpy()).mean() > 0.9
    assert other.classifier_id != trained.classifier_id and other.features(seen.numpy()).shape == (200, WIDTHS[-1])
    other.save(tmp_path)
    again = HeadsClassifier.load(tmp_path)
    assert again.classifier_id == other.classifier_id
    np.testing.assert_array_equal(again.features(seen.numpy()), other.features(seen.numpy()))


def test_ids_of_classifiers_that_came_before_the_second_architecture_stay(trained: HeadsClassifier) -> None:
    told = trained.config.model_dump_json(exclude={"confusion", "uncertain", "architecture"})
    assert trained.classifier_id == weights_digest(trained.network, told)


def test_a_killed_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "Checkpoint", partial(Checkpoint, seconds=0.0))
    images, labels = drawn(60, seed=0)
    told = {"n_steps": 8, "batch_size": 8, "widths": WIDTHS}

    def stop(status: Status) -> None:
        if status.done >= 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        train_heads(images, labels, (COLOUR, SHAPE), checkpoint=tmp_path / "c.pt", progress=Progress(stop), **told)  # type: ignore[arg-type]
    begun: list[int] = []
    again = train_heads(
        images, labels, (COLOUR, SHAPE), checkpoint=tmp_path / "c.pt",
        progress=Progress(lambda status: begun.append(status.done)), **told,
    )  # type: ignore[arg-type]  # fmt: skip
    whole = train_heads(images, labels, (COLOUR, SHAPE), **told)  # type: ignore[arg-type]
    assert again.classifier_id == whole.classifier_id and begun[0] > 1


def test_predictions_are_the_calibrated_softmax_of_the_network(calibrated: HeadsClassifier) -> None:
    images, _ = drawn(5, seed=3)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        pooled, logits = calibrated.network(x)
    expected = F.softmax(logits[:, 3:].double() / calibrated.config.temperatures["half"], dim=1).numpy()
    got = calibrated.predict(images.numpy())["half"]
    np.testing.assert_allclose(got.probs, expected, atol=1e-5)
    np.testing.assert_array_equal(got.certain, expected.max(axis=1) >= calibrated.config.thresholds["half"])
    np.testing.assert_allclose(calibrated.features(images.numpy()), pooled.numpy(), atol=1e-5)


def test_an_image_is_read_alike_in_any_batch(trained: HeadsClassifier) -> None:
    images = drawn(7, seed=4)[0].numpy()
    alone = np.concatenate([trained.predict(images[i : i + 1])["colour"].probs for i in range(7)])
    pairs = replace(trained, batch_size=2).predict(images)["colour"].probs
    np.testing.assert_allclose(trained.predict(images)["colour"].probs, alone, atol=1e-5)
    np.testing.assert_allclose(pairs, alone, atol=1e-5)


def test_larger_images_are_brought_to_size(trained: HeadsClassifier) -> None:
    small = drawn(6, seed=5)[0].numpy()
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    assert (trained.predict(large)["colour"].labels == trained.predict(small)["colour"].labels).all()


def test_no_images_give_no_predictions(trained: HeadsClassifier) -> None:
    seen = trained.read(np.zeros((0, 32, 32, 3), np.uint8))
    predictions, features = seen.predictions, seen.features
    assert predictions["colour"].probs.shape == (0, 3) and predictions["half"].n_uncertain == 0
    assert features.shape == (0, WIDTHS[-1])


def test_calibration_counts_every_held_out_image_once(calibrated: HeadsClassifier) -> None:
    images, labels = drawn(300, seed=1)
    rest = np.random.default_rng(0).permutation(300)[90:]
    predictions = calibrated.predict(images.numpy()[rest])
    for column, attribute in enumerate((COLOUR, SHAPE)):
        read = predictions[attribute.name]
        expected = np.zeros((len(attribute.classes),) * 2, dtype=int)
        undecided = np.zeros(len(attribute.classes), dtype=int)
        for truth, guess, certain in zip(labels[rest, column].numpy(), read.labels, read.certain, strict=True):
            if certain:
                expected[truth, guess] += 1
            else:
                undecided[truth] += 1
        np.testing.assert_array_equal(calibrated.confusion[attribute.name], expected)
        np.testing.assert_array_equal(calibrated.uncertain[attribute.name], undecided)
        assert expected.sum() + undecided.sum() == 210


def test_unknown_labels_stay_out_of_the_confusion(trained: HeadsClassifier) -> None:
    images, labels = drawn(100, seed=6)
    labels[::2, 0] = -1
    known = calibrate(trained, images, labels, fit_share=0.5, seed=1)
    rest = np.random.default_rng(1).permutation(100)[50:]
    assert known.confusion["colour"].sum() + known.uncertain["colour"].sum() == (rest % 2 == 1).sum()
    labels[:, 0] = -1
    with pytest.raises(LensError, match="labelled for colour"):
        calibrate(trained, images, labels)


def test_save_and_load_read_alike(calibrated: HeadsClassifier, tmp_path) -> None:
    calibrated.save(tmp_path / "classifier")
    again = HeadsClassifier.load(tmp_path / "classifier")
    images = drawn(9, seed=7)[0].numpy()
    assert again.classifier_id == calibrated.classifier_id and again.config == calibrated.config
    for name, predictions in calibrated.predict(images).items():
        np.testing.assert_array_equal(again.predict(images)[name].probs, predictions.probs)
    np.testing.assert_array_equal(again.confusion["half"], calibrated.confusion["half"])


def test_the_id_names_weights_and_decision_rule(trained: HeadsClassifier, calibrated: HeadsClassifier) -> None:
    assert trained.classifier_id != calibrated.classifier_id
    images, labels = drawn(40, seed=0)
    other = train_heads(images, labels, (COLOUR, SHAPE), n_steps=1, batch_size=4, seed=1, widths=WIDTHS)
    same = train_heads(images, labels, (COLOUR, SHAPE), n_steps=1, batch_size=4, seed=1, widths=WIDTHS)
    assert other.classifier_id != trained.classifier_id
    assert other.classifier_id == same.classifier_id


@pytest.mark.parametrize("damage", ["missing config.json", "missing model.safetensors", "cut", "foreign"])
def test_damaged_folders_are_refused_by_name(trained: HeadsClassifier, tmp_path, damage: str) -> None:
    trained.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage.startswith("missing"):
        (tmp_path / damage.split()[1]).unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
    else:
        trained.config.model_copy(update={"widths": (8, 8, 8, 8)}).save(tmp_path / "config.json")
    with pytest.raises(LensError, match=damage.split()[-1] if damage.startswith("missing") else "model.safetensors"):
        HeadsClassifier.load(tmp_path)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8), np.zeros((2, 32, 32, 4), np.uint8)],
)
def test_other_arrays_are_refused(trained: HeadsClassifier, images: np.ndarray) -> None:
    with pytest.raises(LensError, match="uint8"):
        trained.predict(images)


def test_wrong_labels_are_refused() -> None:
    images, labels = drawn(10, seed=0)
    with pytest.raises(LensError, match=r"Labels must be \[10, 2\]"):
        train_heads(images, labels[:, :1], (COLOUR, SHAPE), n_steps=1, batch_size=4, widths=WIDTHS)
    labels[3, 1] = 2
    with pytest.raises(LensError, match="half must lie from -1 to 1"):
        train_heads(images, labels, (COLOUR, SHAPE), n_steps=1, batch_size=4, widths=WIDTHS)


def test_training_leaves_the_global_generator_alone_and_can_be_stopped() -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise Stop

    seen: list[tuple[int, int]] = []
    images, labels = drawn(10, seed=0)
    before = torch.get_rng_state()
    with pytest.raises(Stop):
        train_heads(images, labels, (COLOUR, SHAPE), n_steps=9, batch_size=4, widths=WIDTHS, progress=steps(stop))
    assert seen == [(1, 9), (2, 9)]
    assert torch.equal(before, torch.get_rng_state())


def test_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([[1, 0], [-1, 1]])
    colour = np.log(3)  # only the first image is labelled
    half = (np.log(np.e + 1) - 1 + np.log(2)) / 2
    assert float(heads_loss(logits, labels, (COLOUR, SHAPE))) == pytest.approx(colour + half, rel=1e-6)


def test_the_portrait_network_is_small() -> None:
    attributes = tuple(Attribute(f"a{i}", tuple("abcd")) for i in range(10))
    with torch.device("meta"):
        network = HeadsNetwork(HeadsConfig(attributes=attributes))
    assert sum(p.numel() for p in network.parameters()) < 400_000


def test_augmentation_is_seeded_and_bounded() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, two = (mild_augmentation(images, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(one, two) and one.shape == images.shape
    assert one.abs().max() <= 1
    assert not torch.equal(one, mild_augmentation(images, torch.Generator().manual_seed(2)))
    flat = mild_augmentation(torch.zeros(64, 3, 32, 32), torch.Generator().manual_seed(3))
    assert flat.mean(dim=(1, 2, 3)).abs().max() < 0.1  # a colour never moves further than the brightness jitter


def test_temperature_is_recovered() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 6, (20_000, 3))
    cumulative = softmax(logits, 2.5).cumsum(axis=1)
    labels = (rng.random((20_000, 1)) > cumulative[:, :2]).sum(axis=1)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)


def test_threshold_leaves_at_most_the_stated_share_uncertain() -> None:
    top = np.linspace(0.5, 0.85, 100)
    probs = np.stack([top, 1 - top], axis=1)
    for share in (0.0, 0.03, 0.1):
        threshold = choose_threshold(probs, max_uncertain=share)
        assert (top < threshold).sum() == round(100 * share)
    assert choose_threshold(np.array([[0.99, 0.01]]), max_uncertain=0.0, ceiling=0.9) == 0.9
    with pytest.raises(LensError, match="max_uncertain"):
        choose_threshold(probs, max_uncertain=1.0)


def test_confusion_by_hand() -> None:
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.55, 0.45]])
    certain = np.array([True, True, True, True, False])
    table, undecided = confusion_counts(np.array([0, 1, 1, -1, 0]), Predictions(probs, certain, SHAPE, "x"))
    assert table.tolist() == [[1, 0], [1, 1]]
    assert undecided.tolist() == [1, 0]
