"""Labels by people: the CSV, raters as a classifier, and a measured error that is counted by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lens.base.types import Attribute, LensError, Predictions
from diffusion_lens.judging.classify import HeadsClassifier, train_heads
from diffusion_lens.judging.labelled import (
    HumanLabels,
    calibrate_from_folder,
    fit_from_folder,
    predict_any_size,
    read_labelled,
    write_label_sheet,
)
from diffusion_lens.judging.photos import PhotoClassifier
from diffusion_lens.judging.readers import Scores

TONE = Attribute("tone", ("light", "dark"))
SIZE = Attribute("size", ("small", "large"))


@dataclass(frozen=True)
class Red:
    """Reads "light" with the probability that the red channel of the first pixel states in per cent."""

    attributes: tuple[Attribute, ...] = (TONE, SIZE)
    reader_id: str = "red"

    def read(self, images: list[np.ndarray]) -> Scores:
        light = np.array([image[0, 0, 0] / 100 for image in images])
        probs = np.stack([light, 1 - light], axis=1)
        both = {"tone": probs, "size": probs}
        return Scores(both, {name: np.ones(len(images)) for name in both}, light[:, None])


def save(folder: Path, name: str, red: int, side: int = 8) -> None:
    image = np.zeros((side, side, 3), np.uint8)
    image[:, :, 0] = red
    image[1::2, :, 2] = 255
    Image.fromarray(image).save(folder / name)


def write(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_measured_error_by_hand(tmp_path: Path) -> None:
    # reads:            light      dark       uncertain  light      dark, not labelled
    for name, red, side in (("a", 90, 8), ("b", 20, 9), ("c", 55, 8), ("d", 99, 7), ("e", 5, 8)):
        save(tmp_path, f"{name}.png", red, side)
    path = write(tmp_path, "file,tone\na.png,light\nb.png,light\nc.png,dark\nd.png,dark\ne.png,\n")
    measured = calibrate_from_folder(PhotoClassifier(Red()), path)
    assert measured.confusion["tone"].tolist() == [[1, 1], [1, 0]]
    assert measured.uncertain["tone"].tolist() == [0, 1]
    assert "size" not in measured.confusion


def test_the_bundled_classifier_can_be_measured_too(tmp_path: Path) -> None:
    images = np.zeros((4, 16, 16, 3), np.uint8)
    labels = np.zeros((4, 1), np.int64)

    heads = train_heads(torch.from_numpy(images), torch.from_numpy(labels), (TONE,), n_steps=1, batch_size=2)
    save(tmp_path, "a.png", 0, 16)
    measured = calibrate_from_folder(heads, write(tmp_path, "file,tone\na.png,dark\n"))
    assert isinstance(measured, HeadsClassifier)
    assert measured.confusion["tone"].sum() == 1 and measured.confusion["tone"][0].sum() == 0


def test_fitted_rules_are_measured_on_other_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(200):
        red = int(rng.integers(2, 99))
        save(tmp_path, f"{i}.png", red, 4)
        # Far surer than it looks: the logit is a fifth of what it should be, so the temperature falls below 1.
        truth = "light" if rng.random() < 1 / (1 + ((100 - red) / red) ** 1.8) else "dark"
        lines.append(f"{i}.png,{truth}")
    path = write(tmp_path, "file,tone\n" + "\n".join(lines))
    fitted = fit_from_folder(PhotoClassifier(Red()), path, max_uncertain=0.1)
    assert 0.5 <= fitted.temperatures["tone"] < 0.9
    assert fitted.confusion["tone"].sum() + fitted.uncertain["tone"].sum() == 100
    assert fitted.uncertain["tone"].sum() <= 25


def test_raters_are_found_by_pixels_and_vote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    path = write_label_sheet(images, tmp_path, (TONE,))
    assert path.read_text(encoding="utf-8").splitlines() == ["file,tone", *(f"0000{i}.png," for i in range(4))]
    votes = ["00000.png,light", "00000.png,light", "00000.png,dark", "00001.png,dark", "00002.png,light"]
    write(tmp_path, "\n".join(["file,tone", *votes, "00002.png,dark", "00003.png,"]))
    raters = HumanLabels.from_csv(path, (TONE, SIZE))
    assert raters.attributes == (TONE,)
    unseen = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    read = raters.predict(np.concatenate([images[::-1], unseen]))["tone"]
    np.testing.assert_allclose(read.probs, [[0.5, 0.5], [0.5, 0.5], [0, 1], [2 / 3, 1 / 3], [0.5, 0.5]])
    np.testing.assert_array_equal(read.certain, [False, False, True, True, False])
    write(tmp_path, "file,tone\n00000.png,dark\n")
    assert HumanLabels.from_csv(path, (TONE,)).classifier_id != raters.classifier_id
    with pytest.raises(LensError, match="CLIP or Inception"):
        raters.features(images)
    assert raters.with_confusion({"tone": np.eye(2)}, {}).confusion["tone"].shape == (2, 2)


def test_majority_labels(tmp_path: Path) -> None:
    table = read_labelled(write(tmp_path, "file,tone\na,dark\na,dark\na,light\nb,dark\nb,light\nc,\n"), (TONE,))
    assert table.files == ("a", "b", "c")
    assert table.labels((TONE, SIZE)).tolist() == [[1, -1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,tone\na.png,dark\n", "needs a column 'file'"),
        ("file,colour\na.png,dark\n", "at least one of: tone, size"),
        ("file,tone\na.png,pale\n", "line 2: 'pale' is no tone; use one of light, dark"),
        ("file,tone\n", "it names 0"),
        ("file,tone\n../secret.png,dark\n", "lies outside its folder"),
        ("file,tone\nnone.png,dark\n", "none.png is missing"),
        ("file,tone\na.png,\n", "Too few images are labelled for tone"),
    ],
)
def test_label_files_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    save(tmp_path, "secret.png", 1)
    save(folder, "a.png", 1)
    with pytest.raises(LensError, match=message):
        calibrate_from_folder(PhotoClassifier(Red()), write(folder, text))
    with pytest.raises(LensError, match="no label file"):
        read_labelled(folder / "other.csv", (TONE,))


@dataclass(frozen=True)
class BySize:
    """Notes the shapes it is called with; reads the red channel's value as a class."""

    calls: list[tuple[int, ...]] = field(default_factory=list)
    attributes: tuple[Attribute, ...] = (TONE,)

    def predict(self, images: np.ndarray) -> dict[str, Predictions]:
        self.calls.append(images.shape)
        red = images[:, 0, 0, 0]
        return {"tone": Predictions(np.eye(2)[red], red == 1, TONE, "x")}

    def with_confusion(self, confusion: object, uncertain: object) -> BySize:
        return replace(self)


def test_images_of_several_sizes_keep_their_order() -> None:
    values, sides = (1, 0, 0, 1, 1), (4, 6, 4, 6, 5)
    images = [np.full((s, s, 3), v, np.uint8) for v, s in zip(values, sides, strict=True)]
    classifier = BySize()
    read = predict_any_size(classifier, images)["tone"]
    assert read.labels.tolist() == list(values) and read.certain.tolist() == [v == 1 for v in values]
    assert sorted(classifier.calls) == [(1, 5, 5, 3), (2, 4, 4, 3), (2, 6, 6, 3)]
