"""Image quality against hand-computed values; references of every kind give the same distance."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from quality_sources import COLOUR, PretendInception, mean_colour
from scipy.linalg import sqrtm
from tiny_clip import save_tiny_clip

from diffusion_lens.base.types import LensError
from diffusion_lens.judging.readers import ClipConfig, ClipReader
from diffusion_lens.measuring.quality import (
    INCEPTION,
    FeatureSource,
    FeatureStatistics,
    classifier_source,
    clip_i,
    clip_source,
    clip_t,
    folder_statistics,
    frechet,
    inception_score,
    inception_source,
    load_statistics,
)


def drawn(n: int, seed: int, shift: int = 0, side: int = 6) -> np.ndarray:
    """Images of one random colour each, so that features are that colour."""
    colours = np.random.default_rng(seed).integers(0, 200, (n, 1, 1, 3)) + shift
    return np.broadcast_to(colours, (n, side, side, 3)).astype(np.uint8)


def test_a_shift_of_all_colours_by_hand() -> None:
    images = drawn(60, 0)
    result = frechet(images + np.uint8(50), images, COLOUR)  # one unit in each of three features
    assert result.value == pytest.approx(3.0, abs=1e-6)
    assert (result.label, result.n, result.n_reference, result.d) == ("FID, colour features", 60, 60, 3)
    assert result.note == ""
    assert frechet(images, images, COLOUR).value == pytest.approx(0, abs=1e-6)


def test_every_kind_of_reference_gives_the_textbook_distance(tmp_path: Path) -> None:
    images, other = drawn(70, 1), drawn(80, 2, shift=20)
    a, b = mean_colour(images), mean_colour(other)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    statistics = FeatureStatistics.of(b, "colour")
    statistics.save(tmp_path / "saved" / "colour.safetensors")
    np.savez(tmp_path / "colour.npz", mu=b.mean(0), sigma=np.cov(b.T))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(other):
        larger = image.repeat(1 + i % 2, axis=0)  # two sizes
        Image.fromarray(larger).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    references = (other, statistics, tmp_path / "saved" / "colour.safetensors", tmp_path / "images")
    for reference in references:
        result = frechet(images, reference, COLOUR)
        assert result.value == pytest.approx(expected, rel=1e-6) and result.n_reference == 80
    unsaid = frechet(images, str(tmp_path / "colour.npz"), COLOUR)
    assert unsaid.value == pytest.approx(expected, rel=1e-6) and unsaid.n_reference is None


def test_made_up_rows_have_exactly_the_statistics() -> None:
    features = np.random.default_rng(0).normal(size=(9, 4)) * [1, 2, 0, 5] + 3  # one constant feature
    statistics = FeatureStatistics.of(features, "x")
    rows = statistics.as_features()
    np.testing.assert_allclose(rows.mean(axis=0), features.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(np.cov(rows.T), np.cov(features.T), atol=1e-10)


def test_few_images_are_refused_or_noted() -> None:
    with pytest.raises(LensError, match="needs >= 50 of each; got 10 images and 60 reference"):
        frechet(drawn(10, 0), drawn(60, 1), COLOUR)
    few = FeatureStatistics.of(mean_colour(drawn(20, 0)), "colour")
    with pytest.raises(LensError, match="60 images and 20 reference"):
        frechet(drawn(60, 0), few, COLOUR)
    assert "compare only" in frechet(drawn(3, 0), drawn(5, 1), COLOUR, min_images=2).note
    with pytest.raises(LensError, match=">= 2 images"):
        FeatureStatistics.of(np.zeros((1, 3)), "colour")


def test_statistics_of_other_features_are_refused() -> None:
    foreign = FeatureStatistics.of(mean_colour(drawn(60, 0)), INCEPTION)
    with pytest.raises(LensError, match="of Inception v3 features, not of colour"):
        frechet(drawn(60, 0), foreign, COLOUR)
    assert FeatureSource(INCEPTION, mean_colour).label == "FID"


@pytest.mark.parametrize("name", ["cut.npz", "cut.safetensors", "pickled.npz", "lacking.npz"])
def test_broken_statistics_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 nonsense")
    if name == "pickled.npz":
        np.savez(path, mu=np.array([Path("x")], dtype=object), sigma=np.eye(1))
    elif name == "lacking.npz":
        np.savez(path, mu=np.zeros(2))
    with pytest.raises(LensError, match=name):
        load_statistics(path)


def test_statistics_of_a_wrong_shape_or_place_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", mu=np.zeros(2), sigma=np.eye(3))
    with pytest.raises(LensError, match=r"odd.npz holds a mean of \(2,\)"):
        load_statistics(tmp_path / "odd.npz")
    with pytest.raises(LensError, match="no statistics file"):
        load_statistics(tmp_path / "none.npz")
    with pytest.raises(LensError, match="must hold 2 to"):
        folder_statistics(tmp_path, COLOUR)


def test_inception_score_by_hand() -> None:
    def two_classes(images: np.ndarray) -> np.ndarray:
        return np.eye(2)[images[:, 0, 0, 0] % 2]

    images = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    score, spread = inception_score(images, FeatureSource("x", mean_colour, two_classes), splits=2)
    assert score == pytest.approx(2.0) and spread == pytest.approx(0.0)
    with pytest.raises(LensError, match="colour gives no class probabilities"):
        inception_score(images, COLOUR)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ClipReader:
    prompts = {"gender": {"female": ("a woman",), "male": ("a man",)}}
    folder = save_tiny_clip(tmp_path_factory.mktemp("clip"))
    return ClipReader.load(ClipConfig(model_id=str(folder), prompts=prompts, face_prompts={}), offline=True)


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def test_clip_i_by_hand(reader: ClipReader) -> None:
    edited, original = noise(12, 0), noise(12, 1)
    cosines = [
        float(reader.embed_images(e[None])[0] @ reader.embed_images(o[None])[0])
        for e, o in zip(edited, original, strict=True)
    ]
    score = clip_i(edited, original, reader)
    assert score.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert score.value == pytest.approx((np.mean(cosines) + 1) / 2, abs=1e-5)
    assert score.interval[0] < score.value < score.interval[1] and score.n == 12
    assert clip_i(original, original, reader).value == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(LensError, match="12 edited and 11 unedited"):
        clip_i(edited, original[:11], reader)


def test_clip_t_by_hand(reader: ClipReader) -> None:
    images = noise(10, 2)
    rows = reader.embed_images(images)
    one = clip_t(images, "a portrait of a doctor", reader)
    assert one.cosine == pytest.approx(
        float((rows @ reader.embed_texts(["a portrait of a doctor"])[0]).mean()), abs=1e-5
    )
    texts = ["a doctor", "a nurse"] * 5
    own = [float(r @ reader.embed_texts([t])[0]) for r, t in zip(rows, texts, strict=True)]
    assert clip_t(images, texts, reader).cosine == pytest.approx(np.mean(own), abs=1e-5)
    with pytest.raises(LensError, match="got 3 for 10 images"):
        clip_t(images, texts[:3], reader)
    assert clip_source(reader).features(images).shape == (10, 8)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = PretendInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_source(fidelity: None, tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    torch.save({"scale": torch.tensor([1.0, 2.0])}, path)
    source = inception_source(path)
    images = drawn(70, 3)
    expected = images.mean(axis=(1, 2))[:, :2] / 255 * [1, 2]
    np.testing.assert_allclose(source.features(images), expected, atol=1e-5)
    assert source.probs is not None and source.label == "FID"
    odds = np.exp(10 * (expected[:, 0] - expected[:, 1]))
    np.testing.assert_allclose(source.probs(images)[:, 0], odds / (1 + odds), atol=1e-5)


def test_inception_weights_that_cannot_be_used(fidelity: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LensError, match=r"inception-2015-12-05-6726825d.pth is missing; get it from torch-fidelity"):
        inception_source(tmp_path / "none.pth")
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(LensError, match=r"evil.pth"):
        inception_source(evil)
    torch.save({"other": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(LensError, match=r"foreign.pth is not torch-fidelity's Inception"):
        inception_source(tmp_path / "foreign.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(LensError, match="pip install torch-fidelity"):
        inception_source(evil)


def test_a_classifier_gives_its_penultimate_layer() -> None:
    class Stand:
        classifier_id, attributes, confusion = "x", (), {}

        def predict(self, images: np.ndarray) -> dict:
            return {}

        def features(self, images: np.ndarray) -> np.ndarray:
            return mean_colour(images)

    source = classifier_source(Stand())
    assert source.label == "FID, portraits features"
    np.testing.assert_array_equal(source.features(drawn(2, 0)), mean_colour(drawn(2, 0)))
