"""The one reader of image files: right values over modes, orientations, depths, transparency and animation."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusion_lens.base import pictures
from diffusion_lens.base.pictures import ORIENTATION, open_image, open_picture
from diffusion_lens.base.types import LensError

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


def quarters(height: int = 4, width: int = 6) -> np.ndarray:
    """Red, green, blue and grey quarters, read in lines; taller is not as wide, so that no two turns are alike."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = RED, GREEN
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = BLUE, GREY
    return image


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores of an upright picture: for every place (y, x) seen, where EXIF says that it lies."""
    height, width = upright.shape[:2]
    tall = orientation >= 5
    stored = np.zeros((width, height, 3) if tall else (height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            # EXIF: 0th row and 0th column are the visual ... : 1 top left, 2 top right, 3 bottom right, 4 bottom left,
            # 5 left top, 6 right top, 7 right bottom, 8 left bottom.
            row = height - 1 - y if orientation in (3, 4, 7, 8) else y
            column = width - 1 - x if orientation in (2, 3, 6, 7) else x
            stored[(column, row) if tall else (row, column)] = upright[y, x]
    return stored


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = quarters(32, 48)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(stored_as(upright, orientation)).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    found = open_image(tmp_path / f"a.{suffix}")
    assert found.shape == upright.shape and found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found.astype(int) - upright).max() <= (8 if suffix == "jpg" else 0)


def test_an_orientation_that_is_none_says_nothing(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 23
    Image.fromarray(quarters()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "a.png"), quarters())
    Image.fromarray(quarters()).save(tmp_path / "b.png", exif=b"Exif\0\0no such thing")
    assert np.array_equal(open_image(tmp_path / "b.png"), quarters())


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight_by_their_full_scale(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 1, 128, 129, 257, 32_768, 65_406, 65_407, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    grey = open_image(tmp_path / f"a.{suffix}")
    assert grey[0, :, 0].tolist() == [round(v / 257) for v in values[0].tolist()] == [0, 0, 0, 1, 1, 128, 254, 255, 255]
    assert (grey == grey[..., :1]).all()


def test_big_endian_and_portable_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0, 32_768, 65_535]], np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    assert open_image(tmp_path / "a.pgm")[0, :, 1].tolist() == [0, 128, 255]
    Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert open_image(tmp_path / "a.tif")[0, :, 1].tolist() == [0, 128, 255]


def test_floats_are_read_from_nought_to_one_and_refused_elsewhere(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32)).save(tmp_path / "a.tif")
    assert open_image(tmp_path / "a.tif")[0, :, 2].tolist() == [0, 64, 128, 255]
    for values in ([0, 2.5], [-0.1, 1], [np.nan, 0]):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(LensError, match=r"b\.tif has pixels of the mode F"):
            open_image(tmp_path / "b.tif")


@pytest.mark.parametrize(("mode", "values"), [("I", np.array([[0, 70_000]], np.int32)), ("LAB", None)])
def test_modes_without_a_known_black_and_white_are_named(tmp_path: Path, mode: str, values: np.ndarray | None) -> None:
    image = Image.new(mode, (2, 1)) if values is None else Image.fromarray(values)
    image.save(tmp_path / "a.tif")
    with pytest.raises(LensError, match=rf"a\.tif has pixels of the mode {mode}"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("mode", "suffix", "off"),
    [("RGB", "png", 0), ("RGB", "bmp", 0), ("P", "png", 0), ("P", "gif", 0), ("YCbCr", "jpg", 8), ("CMYK", "tif", 1),
     ("RGBA", "png", 0), ("RGBA", "webp", 0), ("RGBX", "tif", 0)],
)  # fmt: skip
def test_colours_of_every_mode(tmp_path: Path, mode: str, suffix: str, off: int) -> None:
    image = Image.fromarray(quarters(16, 32))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image.save(tmp_path / f"a.{suffix}", **options)
    assert np.abs(open_image(tmp_path / f"a.{suffix}").astype(int) - quarters(16, 32)).max() <= off


def test_grey_and_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bits.png")
    assert open_image(tmp_path / "bits.png").tolist() == [[[0] * 3, [255] * 3]]


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[10, 20, 30, 0], [0, 0, 0, 51], [9, 9, 9, 255]]], np.uint8)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").tolist() == [[[255] * 3, [204] * 3, [9] * 3]]
    Image.fromarray(np.array([[[0, 0], [0, 51], [9, 255]]], np.uint8), "LA").save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").tolist() == [[[255] * 3, [204] * 3, [9] * 3]]


def test_a_transparent_colour_lies_on_white_too(tmp_path: Path) -> None:
    Image.fromarray(quarters()).quantize(4).save(tmp_path / "a.png", transparency=0)
    opaque = Image.open(tmp_path / "a.png")
    hidden = np.asarray(opaque) == 0
    assert (open_image(tmp_path / "a.png")[hidden] == 255).all() and hidden.any()
    Image.fromarray(quarters()).save(tmp_path / "b.png", transparency=RED)
    assert open_image(tmp_path / "b.png")[0, 0].tolist() == [255] * 3
    assert open_image(tmp_path / "b.png")[-1, -1].tolist() == list(GREY)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_of_several_is_read_and_said(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options: dict[str, Any] = {"webp": {"lossless": True}}.get(suffix, {})
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    with caplog.at_level(logging.WARNING):
        assert (open_image(tmp_path / f"a.{suffix}") == RED).all()
    assert f"a.{suffix}: it has 3" in caplog.text and "first alone" in caplog.text
    assert open_picture(tmp_path / f"a.{suffix}").note
    caplog.clear()
    Image.fromarray(quarters()).save(tmp_path / "one.png")
    assert open_picture(tmp_path / "one.png").note == "" and not caplog.text


def test_colour_profiles_are_turned_into_srgb(tmp_path: Path) -> None:
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(quarters())
    for name, profile in (("srgb", srgb), ("broken", srgb[:100]), ("foreign", xyz), ("none", b"")):
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.array_equal(open_image(tmp_path / f"{name}.png"), quarters()), name


def test_a_wider_profile_changes_what_is_read(tmp_path: Path) -> None:
    """A profile with red and blue exchanged, as test pages for viewers use it, made from sRGB's own."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data = data.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    data = data.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    assert "srgb" not in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(bytes(data)))).lower()
    Image.fromarray(quarters()).save(tmp_path / "a.png", icc_profile=bytes(data))
    assert np.abs(open_image(tmp_path / "a.png").astype(int) - quarters()[..., ::-1]).max() <= 2


def test_sizes_are_checked_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(quarters()).save(tmp_path / "a.png")

    def refuse(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    monkeypatch.setattr(pictures, "_pixels", refuse)
    with pytest.raises(LensError, match=r"a\.png has more than 23 pixels"):
        open_picture(tmp_path / "a.png", max_pixels=23)
    with pytest.raises(LensError, match="its index says"):
        open_picture(tmp_path / "a.png", size=(4, 6))
    with pytest.raises(LensError, match="decoded"):
        open_picture(tmp_path / "a.png", size=(6, 4))


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = (200_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(LensError, match=r"a\.png has more than 50,000,000 pixels"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_damaged_files_are_named_at_every_length(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(LensError, match=rf"a\.{suffix}"):
            open_image(path)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).dtype == np.uint8
        except LensError as error:
            assert f"a.{suffix}" in str(error)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(LensError, match=r"a\.png is no image of a known kind"):
        open_image(tmp_path / "a.png")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(LensError, match=r"page\.eps is no image of a known kind"):
        open_image(tmp_path / "page.eps")
    with pytest.raises(LensError, match="is missing from"):
        open_image(tmp_path / "b.png")
    with pytest.raises(LensError, match="is missing from"):
        open_image(tmp_path)
