"""Reading photographs: the networks against slow twins, and every image counted whatever its faces."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photo_models import LABEL_MAP, hub_folder, photos  # noqa: F401
from tiny_clip import save_tiny_clip
from transformers import CLIPModel, CLIPProcessor, ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.base.weights import weight_file, weights_folder
from diffusion_lens.judging.faces import face_crop, yunet_detector
from diffusion_lens.judging.fairface import OUTPUTS, PAPER_MAP, FairFaceReader, ResNet34
from diffusion_lens.judging.photos import PhotoClassifier
from diffusion_lens.judging.readers import FACES, ClipConfig, ClipReader, HubReader, LabelMap, Scores, pool_labels

PROMPTS = {"gender": {"female": ("a woman", "a portrait of a woman"), "male": ("a man",)}}
FACE_PROMPTS = dict(zip(FACES, (("an object",), ("a person",), ("people", "a group")), strict=True))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip_config(clip_folder: Path) -> ClipConfig:
    return ClipConfig(model_id=str(clip_folder), prompts=PROMPTS, face_prompts=FACE_PROMPTS)


def test_clip_reads_like_its_definition(clip_config: ClipConfig) -> None:
    model, processor = (kind.from_pretrained(clip_config.model_id) for kind in (CLIPModel, CLIPProcessor))
    images = photos(3)

    def text(prompt: str) -> torch.Tensor:
        e = model.get_text_features(**processor.tokenizer([prompt], return_tensors="pt")).pooler_output[0]
        return e / e.norm()

    female = text("a woman") + text("a portrait of a woman")
    classes = torch.stack([female / female.norm(), text("a man")])
    whole = clip_config.model_copy(update={"face_prompts": {}})
    read = PhotoClassifier(ClipReader.load(whole, offline=True)).read(images)
    for i, image in enumerate(images):
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        e = model.get_image_features(pixel_values=pixels).pooler_output[0]
        e = e / e.norm()
        expected = torch.softmax(model.logit_scale.exp() * classes @ e, dim=0)
        np.testing.assert_allclose(read.predictions["gender"].probs[i], expected.detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(read.features[i], e.detach().numpy(), atol=1e-5)


def test_clip_counts_every_image(clip_config: ClipConfig) -> None:
    classifier = PhotoClassifier(ClipReader.load(clip_config, offline=True))
    read = classifier.read(photos(70))
    assert read.faces is not None and len(read.faces) == 70
    assert sum(read.tally("gender").values()) == 70
    assert list(read.tally("gender")) == ["female", "male", "uncertain", "no face", "several faces"]
    whole = PhotoClassifier(ClipReader.load(clip_config.model_copy(update={"face_prompts": {}}), offline=True))
    assert whole.read(photos(2)).faces is None
    assert whole.predict(np.zeros((0, 40, 40, 3), np.uint8))["gender"].probs.shape == (0, 2)
    assert whole.classifier_id != classifier.classifier_id


def test_clip_face_prompts_choose_the_nearest(clip_config: ClipConfig) -> None:
    reader = ClipReader.load(clip_config, offline=True)
    faces = reader.read(list(photos(6))).faces
    cosines = reader.embed_images(photos(6)) @ reader.ensemble(list(FACE_PROMPTS.values())).T
    np.testing.assert_array_equal(faces, cosines.argmax(axis=1))


def test_missing_clip_and_bad_prompts_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LensError, match="hf download nobody/nothing"):
        ClipReader.load(ClipConfig(model_id="nobody/nothing"), offline=True)
    with pytest.raises(LensError, match="at least two classes"):
        ClipReader.load(ClipConfig(model_id=str(tmp_path), prompts={"gender": {"female": ("a",)}}))
    with pytest.raises(LensError, match="no face, one face, several faces"):
        ClipReader.load(ClipConfig(model_id=str(tmp_path), face_prompts={"one face": ("a",)}))


def test_any_transformers_classifier_with_a_label_map(hub_folder: Path) -> None:  # noqa: F811
    classifier = PhotoClassifier(HubReader.load(str(hub_folder), LABEL_MAP, offline=True))
    images = photos(3)
    model = ResNetForImageClassification.from_pretrained(hub_folder).eval()
    pixels = ViTImageProcessorPil.from_pretrained(hub_folder)(images=list(images), return_tensors="pt")["pixel_values"]
    own = model(pixel_values=pixels).logits.softmax(dim=1).detach().numpy()
    female, male = own[:, 1] + own[:, 2], own[:, 3]
    expected = np.stack([female, male], axis=1) / (female + male)[:, None]
    got = classifier.predict(images)["gender"]
    np.testing.assert_allclose(got.probs, expected, atol=1e-5)
    assert got.attribute == Attribute("gender", ("female", "male"))
    hidden = model.resnet(pixel_values=pixels).last_hidden_state.mean(dim=(2, 3)).detach().numpy()
    np.testing.assert_allclose(classifier.features(images), hidden, atol=1e-5)


def test_unknown_labels_of_a_classifier_are_named(hub_folder: Path) -> None:  # noqa: F811
    with pytest.raises(LensError, match="no label 'lady'; its labels are cat, girl, man, woman"):
        HubReader.load(str(hub_folder), {"gender": {"female": ("lady",), "male": ("man",)}}, offline=True)


def test_pooling_by_hand() -> None:
    pooled, inside = pool_labels(np.array([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 1.0]]), [[0], [1, 2]])
    np.testing.assert_allclose(pooled, [[1 / 6, 5 / 6], [0.5, 0.5]])
    np.testing.assert_allclose(inside, [0.6, 0.0])


@pytest.fixture(scope="module")
def fairface_network() -> ResNet34:
    torch.manual_seed(0)
    network = ResNet34().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def test_fairface_is_a_resnet34(fairface_network: ResNet34) -> None:
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3], layer_type="basic", num_labels=18
    )
    twin = ResNetForImageClassification(config).eval()
    renamed = {}
    for key, value in fairface_network.state_dict().items():
        parts = key.split(".")
        if parts[0] == "fc":
            name = f"classifier.1.{parts[1]}"
        elif parts[0] in ("conv1", "bn1"):
            name = f"resnet.embedder.embedder.{_twin_kind(parts[0])}.{parts[1]}"
        else:
            stage = f"resnet.encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
            if parts[2] == "downsample":
                name = f"{stage}.shortcut.{('convolution', 'normalization')[int(parts[3])]}.{parts[4]}"
            else:
                name = f"{stage}.layer.{int(parts[2][-1]) - 1}.{_twin_kind(parts[2])}.{parts[3]}"
        renamed[name] = value
    twin.load_state_dict(renamed)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(fairface_network(x)[1], twin(x).logits, rtol=1e-4, atol=1e-4)


def _twin_kind(name: str) -> str:
    return "convolution" if name.startswith("conv") else "normalization"


def test_fairface_outputs_become_the_papers_classes(fairface_network: ResNet34, tmp_path: Path) -> None:
    weights = {k: v.clone() for k, v in fairface_network.state_dict().items()}
    weights["fc.weight"].zero_()
    race = np.array([0.1, 0.2, 0.2, 0.1, 0.05, 0.05, 0.3])
    age = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9]) / 45
    weights["fc.bias"] = torch.from_numpy(np.log(np.concatenate([race, [0.7, 0.3], age]))).float()
    path = tmp_path / "res34_fair_align_multi_7_20190809.pt"
    torch.save(weights, path)
    classifier = PhotoClassifier(FairFaceReader.load(path), crop=True)
    read = classifier.predict(photos(2, side=50))
    assert read["gender"].attribute.classes == ("female", "male")
    np.testing.assert_allclose(read["gender"].probs, [[0.3, 0.7]] * 2, atol=1e-5)
    np.testing.assert_allclose(read["age"].probs, [[6 / 45, 22 / 45, 17 / 45]] * 2, atol=1e-5)
    assert read["race"].attribute.classes == ("White", "Black", "Asian", "Indian")
    np.testing.assert_allclose(read["race"].probs, [np.array([0.1, 0.2, 0.15, 0.05]) / 0.5] * 2, atol=1e-5)
    assert read["gender"].certain.all() and not read["age"].certain.any()
    assert classifier.features(photos(2, side=50)).shape == (2, 512)
    assert sum(len(labels) for labels in OUTPUTS.values()) == 18


def test_fairface_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_LENS_WEIGHTS", str(tmp_path))
    assert weights_folder() == tmp_path
    with pytest.raises(LensError, match="FairFace repository") as caught:
        FairFaceReader.load()
    assert str(tmp_path / "res34_fair_align_multi_7_20190809.pt") in str(caught.value)
    foreign = tmp_path / "foreign.pt"
    torch.save({"fc.weight": torch.zeros(2, 2)}, foreign)
    with pytest.raises(LensError, match=r"foreign.pt is not FairFace's ResNet-34"):
        FairFaceReader.load(foreign)
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(LensError, match=r"evil.pt"):
        FairFaceReader.load(evil)
    (tmp_path / "there").touch()
    assert weight_file("there", "nowhere") == tmp_path / "there"


def test_fairface_files_of_four_and_seven_races_are_told_apart(fairface_network: ResNet34, tmp_path: Path) -> None:
    def load(name: str, **labels: LabelMap) -> FairFaceReader:
        torch.save(fairface_network.state_dict(), tmp_path / name)
        return FairFaceReader.load(tmp_path / name, **labels)

    for name in ("res34_fair_align_multi_4_20190809.pt", "fairface-4.pt", "FairFace4.pt"):
        with pytest.raises(LensError, match=f"{name} is FairFace's file of four races"):
            load(name)
    for name in ("fairface.pt", "res34_20190807.pt"):
        with pytest.raises(LensError, match="Nothing tells whether"):
            load(name)
        assert load(name, label_map={"gender": PAPER_MAP["gender"]}).attributes[0].name == "gender"
    for name in ("res34_fair_align_multi_7_20190809.pt", "fairface_7.pth"):
        assert [a.name for a in load(name).attributes] == ["gender", "age", "race"]


@dataclass(frozen=True, eq=False)
class Brightness:
    """A reader without a network: the mean brightness is the probability of "light"; remembers what it saw."""

    seen: list[np.ndarray]
    inside: float = 1.0
    reader_id: str = "brightness"
    attributes: tuple[Attribute, ...] = (Attribute("tone", ("light", "dark")),)

    def read(self, images: Sequence[np.ndarray]) -> Scores:
        self.seen[:] = list(images)
        light = np.array([image.mean() / 255 for image in images])
        probs = {"tone": np.stack([light, 1 - light], axis=1)}
        return Scores(probs, {"tone": np.full(len(images), self.inside)}, light[:, None])


def boxes(n: int) -> np.ndarray:
    return np.array([[4.0, 4.0, 8.0, 8.0]] * n).reshape(n, 4)


def plain_photos() -> np.ndarray:
    """Five images whose first pixel states how many faces a pretend detector finds."""
    images = np.full((5, 20, 20, 3), 255, np.uint8)
    images[3] = 140
    images[:, -1] = 0
    images[:, 0, 0, 0] = (0, 1, 2, 1, 3)
    return images


def pretend_detector(image: np.ndarray) -> np.ndarray:
    return boxes(int(image[0, 0, 0]))


def test_no_face_several_faces_and_uncertain_are_counted() -> None:
    read = PhotoClassifier(Brightness([]), pretend_detector).read(plain_photos())
    np.testing.assert_array_equal(read.faces, [0, 1, 2, 1, 2])
    tone = read.predictions["tone"]
    np.testing.assert_array_equal(tone.certain, [False, True, False, False, False])
    np.testing.assert_allclose(tone.probs[[0, 2, 4]], 0.5)
    assert tone.n_uncertain == 4
    assert read.tally("tone") == {"light": 1, "dark": 0, "uncertain": 1, "no face": 1, "several faces": 2}


def test_only_a_single_face_is_cropped() -> None:
    reader = Brightness([])
    PhotoClassifier(reader, pretend_detector, crop=True).predict(plain_photos())
    assert [image.shape[0] for image in reader.seen] == [20, 224, 20, 224, 20]


def test_mass_outside_the_classes_makes_an_image_uncertain() -> None:
    images = np.full((1, 8, 8, 3), 255, np.uint8)
    images[:, -1] = 0
    assert PhotoClassifier(Brightness([], inside=0.5)).predict(images)["tone"].certain.all()
    assert not PhotoClassifier(Brightness([], inside=0.49)).predict(images)["tone"].certain.any()


def test_rules_change_certainty_and_identity() -> None:
    classifier = PhotoClassifier(Brightness([]), confusion={"tone": np.eye(2)})
    images = np.full((1, 8, 8, 3), 153, np.uint8)
    images[:, ::2] = 255  # on average 0.8 against 0.2
    np.testing.assert_allclose(classifier.predict(images)["tone"].probs, [[0.8, 0.2]])
    softer = classifier.with_rules({"tone": 2.0}, {"tone": 0.7})
    np.testing.assert_allclose(softer.predict(images)["tone"].probs, [[2 / 3, 1 / 3]])
    assert classifier.predict(images)["tone"].certain.all() and not softer.predict(images)["tone"].certain.any()
    assert softer.classifier_id != classifier.classifier_id and softer.confusion == {}
    np.testing.assert_allclose(softer.logits(images)["tone"], np.log([[0.8, 0.2]]))
    assert replace(classifier, crop=True).classifier_id != classifier.classifier_id
    with pytest.raises(LensError, match="2 by 2"):
        classifier.with_confusion({"tone": np.eye(3)}, {})


def test_face_crop_by_hand() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 20:40] = 200  # the box itself
    inner = face_crop(image, np.array([20, 10, 20, 20]), margin=0.0, size=20)
    np.testing.assert_array_equal(inner, np.full((20, 20, 3), 200, np.uint8))
    wide = face_crop(image, np.array([20, 10, 20, 20]), margin=0.25, size=30)
    np.testing.assert_array_equal(wide, image[5:35, 15:45])
    image[:, 0] = 90
    outside = face_crop(image, np.array([0, 10, 10, 20]), margin=0.5, size=40)  # columns -15 to 25, rows 0 to 40
    assert (outside[:, :16] == 90).all() and (outside[:, 17:35] == 0).all()


def test_yunet_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(LensError, match="pip install opencv-python-headless"):
        yunet_detector()
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace())
    with pytest.raises(LensError, match=r"face_detection_yunet_2023mar.onnx is missing; get it from the OpenCV Zoo"):
        yunet_detector(tmp_path / "none.onnx")


def test_yunet_gets_bgr_and_gives_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        size: tuple[int, int]

        def setInputSize(self, size: tuple[int, int]) -> None:
            self.size = size

        def detect(self, image: np.ndarray) -> tuple[int, np.ndarray | None]:
            assert self.size == (image.shape[1], image.shape[0])
            return 1, None if image[0, 0, 2] < 200 else np.arange(15.0)[None]

    fake = SimpleNamespace(FaceDetectorYN=SimpleNamespace(create=lambda *arguments: Network()), error=RuntimeError)
    monkeypatch.setitem(sys.modules, "cv2", fake)
    (tmp_path / "yunet.onnx").touch()
    detect = yunet_detector(tmp_path / "yunet.onnx")
    image = np.zeros((8, 12, 3), np.uint8)
    assert detect(image).shape == (0, 4)
    image[:, :, 0] = 255  # red
    np.testing.assert_array_equal(detect(image), [[0, 1, 2, 3]])
