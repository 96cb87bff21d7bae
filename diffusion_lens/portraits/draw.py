"""The drawing: a procedural 64 × 64 portrait, fully determined by its record.

Drawn with Pillow at four times the size and reduced. Gender presentation is drawn in the shape of jaw, brows,
lashes, lips and shoulders; age in proportions, eyes and lines; each leaves the other attributes alone.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from diffusion_lens.portraits import world
from diffusion_lens.portraits.world import Record

SIZE = 64
SCALE = 4
CROP = (20, 30, 236, 246)  # the part of the canvas that is kept
Colour = tuple[int, int, int]

SKIN: dict[str, Colour] = {
    "light": (243, 211, 188),
    "medium": (218, 168, 128),
    "brown": (164, 110, 75),
    "dark": (101, 66, 48),
}
HAIR: dict[str, Colour] = {
    "black hair": (34, 28, 30),
    "brown hair": (98, 62, 38),
    "blond hair": (222, 184, 104),
    "red hair": (172, 74, 34),
    "grey hair": (188, 188, 192),
}
BACK: dict[str, Colour] = {
    "blue": (120, 160, 205),
    "green": (136, 180, 142),
    "sand": (226, 208, 164),
    "rose": (214, 154, 170),
}
JUMPERS: tuple[Colour, ...] = ((170, 62, 66), (62, 110, 82), (92, 82, 140), (204, 152, 60))
SHIRTS: tuple[Colour, ...] = ((196, 214, 236), (150, 190, 170), (236, 200, 190), (120, 130, 160))
TIES: tuple[Colour, ...] = ((160, 40, 48), (44, 78, 140), (60, 110, 70))


@dataclass(frozen=True)
class Variation:
    """How far colours vary within a class, each way: (share of the hue circle, share of the brightness)."""

    skin: tuple[float, float]
    hair: tuple[float, float]
    back: tuple[float, float]


VARIATION = Variation(skin=(0.004, 0.015), hair=(0.005, 0.04), back=(0.008, 0.04))
"""The world's: classes stay well apart, so that a generated colour between two of them is seen to be one."""
WIDE = Variation(skin=(0.008, 0.05), hair=(0.01, 0.10), back=(0.015, 0.08))
"""For the classifier's training: it should read more colours than the world has."""


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(int(np.clip(c * factor, 0, 255)) for c in colour)  # type: ignore[return-value]


def _jitter(rng: np.random.Generator, colour: Colour, hue: float, value: float) -> Colour:
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    h, v = (h + rng.uniform(-hue, hue)) % 1.0, float(np.clip(v * (1 + rng.uniform(-value, value)), 0, 1))
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h, s, v))  # type: ignore[return-value]


def _outline(cx: float, cy: float, a: float, b: float, power: float, taper: float) -> list[tuple[float, float]]:
    """A superellipse whose lower half narrows by ``taper``: the shape of a head."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    x = np.sign(cos) * np.abs(cos) ** (2 / power)
    y = np.sign(sin) * np.abs(sin) ** (2 / power)
    x = x * (1 - taper * np.clip(y, 0, 1) ** 1.5)
    return [(cx + a * px, cy + b * py) for px, py in zip(x, y, strict=True)]


def _ellipse(d: ImageDraw.ImageDraw, cx: float, cy: float, rx: float, ry: float, fill: Colour) -> None:
    d.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=fill)


def draw(record: Record, variation: Variation = VARIATION) -> np.ndarray:
    """Draw ``record``: ``uint8[64, 64, 3]``. The same record and variation give the same picture, bit for bit."""
    rng = np.random.default_rng([record.seed, 3])
    male = record.label(world.GENDER) == "male"
    age = record.label(world.AGE)
    skin = _jitter(rng, SKIN[record.label(world.TONE)], *variation.skin)
    hair = _jitter(rng, HAIR[record.label(world.HAIR_COLOUR)], *variation.hair)
    back = _jitter(rng, BACK[record.label(world.BACKGROUND)], *variation.back)

    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), back)
    d = ImageDraw.Draw(image)
    d.rectangle((0, 168, 256, 256), fill=_shade(back, 0.93))

    young, old = age == "young", age == "old"
    cx = 128 + rng.uniform(-5, 5)
    cy = (122 if young else 112) + rng.uniform(-4, 4)
    size = (0.90 if young else 1.0) * rng.uniform(0.96, 1.04)
    a = (47 if male else 43) * size * (1.04 if young else 1.0)
    b = (58 if male else 56) * size * (0.94 if young else 1.0)
    power, taper = (2.7, 0.12) if male else (2.15, 0.30)
    taper -= 0.06 if young else 0.0
    long_hair = record.label(world.HAIR_LENGTH) == "long hair"

    if long_hair:
        drop = rng.uniform(62, 84) * size
        _ellipse(d, cx, cy - 12 * size, a + 17, b + 4, _shade(hair, 0.82))
        d.rounded_rectangle((cx - a - 16, cy - 14, cx + a + 16, cy + drop), radius=24, fill=_shade(hair, 0.82))
    _torso(d, rng, record, cx, cy + b, male, young, skin)
    for side in (-1, 1):
        _ellipse(d, cx + side * (a - 1), cy + 6 * size, 8 * size, 12 * size, _shade(skin, 0.90))
    d.polygon(_outline(cx, cy, a, b, power, taper), fill=skin)
    if record.label(world.BEARD) == "beard":
        _beard(d, cx, cy, a, b, power, taper, hair, skin)
    _face(d, rng, record, cx, cy, a, b, size, skin, hair)
    _front_hair(d, rng, cx, cy, a, b, hair, male, old, long_hair)
    if record.label(world.GLASSES) == "glasses":
        _glasses(d, cx, cy, a, size, (224, 186, 92) if record.label(world.TONE) == "dark" else (28, 28, 34))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX, box=CROP), dtype=np.uint8)


def _torso(
    d: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    record: Record,
    cx: float,
    chin: float,
    male: bool,
    young: bool,
    skin: Colour,
) -> None:
    clothing = record.label(world.CLOTHING)
    shoulder = (92 if male else 74) * (0.88 if young else 1.0)
    neck = 26 if male else 18
    top = chin + 14
    pick = int(rng.integers(12))
    base: Colour = {
        "jumper": JUMPERS[pick % 4],
        "shirt": SHIRTS[pick % 4],
        "suit": ((44, 48, 66), (70, 70, 76), (58, 46, 42))[pick % 3],
        "white coat": (240, 243, 246),
        "scrubs": (58, 150, 160),
        "turnout coat": (70, 64, 48),
        "apron": (176, 140, 104),
        "robe": (30, 26, 38),
    }[clothing]
    d.rounded_rectangle((cx - shoulder, top, cx + shoulder, 300), radius=38, fill=base)
    d.polygon(
        [(cx - neck, chin - 22), (cx + neck, chin - 22), (cx + neck + 3, top + 8), (cx - neck - 3, top + 8)],
        fill=_shade(skin, 0.86),
    )
    _ellipse(d, cx, top + 6, neck + 5, 11, _shade(skin, 0.86))
    if clothing == "jumper":
        d.arc((cx - neck - 9, top - 10, cx + neck + 9, top + 22), 10, 170, fill=_shade(base, 0.75), width=7)
    elif clothing == "shirt":
        for side in (-1, 1):
            d.polygon(
                [(cx, top + 22), (cx + side * (neck + 6), top - 2), (cx + side * (neck + 20), top + 22)],
                fill=_shade(base, 1.12),
            )
        d.line((cx, top + 22, cx, 256), fill=_shade(base, 0.8), width=4)
    elif clothing in ("suit", "white coat"):
        inner = (246, 246, 246) if clothing == "suit" else (140, 178, 214)
        d.polygon([(cx - neck - 3, top), (cx + neck + 3, top), (cx, 256)], fill=inner)
        if clothing == "suit":
            d.polygon([(cx - 6, top + 12), (cx + 6, top + 12), (cx + 9, 256), (cx - 9, 256)], fill=TIES[pick % 3])
        for side in (-1, 1):
            d.polygon(
                [(cx + side * (neck + 2), top - 2), (cx + side * (neck + 20), top + 16), (cx + side * 4, 256)],
                fill=_shade(base, 0.86 if clothing == "white coat" else 0.75),
            )
    elif clothing == "scrubs":
        d.polygon([(cx - neck - 6, top), (cx + neck + 6, top), (cx, top + 32)], fill=_shade(skin, 0.94))
        d.line([(cx - neck - 8, top), (cx, top + 34), (cx + neck + 8, top)], fill=_shade(base, 0.7), width=7)
    elif clothing == "turnout coat":
        d.rectangle((cx - shoulder, top + 36, cx + shoulder, top + 52), fill=(236, 214, 60))
        d.rectangle((cx - 7, top + 8, cx + 7, 256), fill=(236, 214, 60))
    elif clothing == "apron":
        d.rounded_rectangle((cx - 40, top + 26, cx + 40, 300), radius=8, fill=(250, 250, 244))
        for side in (-1, 1):
            d.line((cx + side * 34, top + 28, cx + side * (neck + 4), top), fill=(250, 250, 244), width=8)
    elif clothing == "robe":
        d.polygon(
            [(cx - 17, top + 4), (cx + 17, top + 4), (cx + 11, top + 46), (cx - 11, top + 46)], fill=(248, 248, 250)
        )


def _beard(
    d: ImageDraw.ImageDraw,
    cx: float,
    cy: float,
    a: float,
    b: float,
    power: float,
    taper: float,
    hair: Colour,
    skin: Colour,
) -> None:
    lower = [(x, y + 3) for x, y in _outline(cx, cy, a, b, power, taper) if y > cy + 0.12 * b]
    lower.sort(key=lambda p: np.arctan2(p[1] - cy, p[0] - cx))
    d.polygon(
        [*lower, (cx - a * 0.55, cy + b * 0.42), (cx, cy + b * 0.34), (cx + a * 0.55, cy + b * 0.42)],
        fill=_shade(hair, 0.92),
    )
    _ellipse(d, cx, cy + b * 0.56, a * 0.36, b * 0.11, skin)


def _face(
    d: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    record: Record,
    cx: float,
    cy: float,
    a: float,
    b: float,
    size: float,
    skin: Colour,
    hair: Colour,
) -> None:
    male = record.label(world.GENDER) == "male"
    age = record.label(world.AGE)
    young, old = age == "young", age == "old"
    dark = sum(skin) < 280
    line = _shade(skin, 0.46 if dark else 0.58)
    eye_y = cy + (4 if young else -2) * size
    eye_dx = a * 0.45
    rx, ry = (11.5, 9.5) if young else (9.5, 6.5)
    rx, ry = rx * size, ry * size * (0.88 if old else 1.0)
    iris = ((70, 48, 34), (64, 92, 120), (70, 100, 66))[int(rng.integers(3))]
    brow = _shade(hair, 0.72)
    for side in (-1, 1):
        x = cx + side * eye_dx
        _ellipse(d, x, eye_y, rx, ry, (250, 250, 248))
        _ellipse(d, x, eye_y, ry * 0.86, ry * 0.92, iris)
        _ellipse(d, x, eye_y, ry * 0.42, ry * 0.46, (14, 12, 14))
        if not male:
            d.arc((x - rx - 2, eye_y - ry - 4, x + rx + 2, eye_y + ry + 2), 185, 355, fill=(22, 18, 20), width=5)
            d.line((x + side * rx, eye_y - 3, x + side * (rx + 6), eye_y - 9), fill=(22, 18, 20), width=4)
        brow_y = eye_y - (17 if young else 15) * size
        arch = 2 if male else 6
        d.line(
            [
                (x - rx - 3, brow_y + (arch if side < 0 else 0)),
                (x + side * 2, brow_y - arch * 0.4),
                (x + rx + 3, brow_y + (arch if side > 0 else 0)),
            ],
            fill=brow,
            width=9 if male else 4,
            joint="curve",
        )
        if old:
            d.arc((x - rx - 1, eye_y + 1, x + rx + 1, eye_y + ry + 11), 20, 160, fill=line, width=5)
            d.line((x + side * (rx + 4), eye_y + 1, x + side * (rx + 11), eye_y + 6), fill=line, width=4)
            nx = cx + side * a * 0.36
            d.line((nx, cy + b * 0.30, nx + side * a * 0.16, cy + b * 0.58), fill=line, width=6)
        if young:
            _ellipse(d, cx + side * a * 0.62, cy + b * 0.40, 11, 8, _blend(skin, (232, 96, 96), 0.30))
    if old:
        for k in range(2):
            y = cy - b * (0.46 + 0.13 * k)
            d.line((cx - a * 0.45, y, cx + a * 0.45, y), fill=line, width=6)
    nose_w = (9 if male else 6.5) * (0.8 if young else 1.0)
    d.line([(cx + 1, eye_y + 10), (cx + nose_w, cy + b * 0.30)], fill=_shade(skin, 0.80), width=5)
    d.arc((cx - nose_w, cy + b * 0.20, cx + nose_w, cy + b * 0.36), 10, 170, fill=_shade(skin, 0.68), width=5)
    mouth_y, w = cy + b * 0.56, a * (0.38 if male else 0.34)
    red = (214, 120, 112) if dark else (150, 60, 56)
    lips = _blend(skin, red, 0.55) if male else _blend(skin, (214, 48, 76), 0.85)
    if record.label(world.SMILE) == "smile":
        d.chord((cx - w, mouth_y - 15, cx + w, mouth_y + 14), 5, 175, fill=lips)
        d.chord((cx - w * 0.76, mouth_y - 10, cx + w * 0.76, mouth_y + 8), 8, 172, fill=(252, 250, 246))
    else:
        _ellipse(d, cx, mouth_y, w * 0.82, 3.2 if male else 6.2, lips)
        d.line((cx - w * 0.8, mouth_y, cx + w * 0.8, mouth_y), fill=_shade(lips, 0.62), width=3)


def _blend(one: Colour, other: Colour, share: float) -> Colour:
    return tuple(round(p * (1 - share) + q * share) for p, q in zip(one, other, strict=True))  # type: ignore[return-value]


def _front_hair(
    d: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    cx: float,
    cy: float,
    a: float,
    b: float,
    hair: Colour,
    male: bool,
    old: bool,
    long_hair: bool,
) -> None:
    line = cy - b * (rng.uniform(0.56, 0.66) if old else rng.uniform(0.44, 0.54))
    crown = [(x * 1.0, y) for x, y in _outline(cx, cy - 4, a + 6, b + 8, 2.3, 0.0) if y < line + 2]
    crown.sort()
    part = cx + rng.choice([-1.0, 1.0]) * a * rng.uniform(0.1, 0.4)
    d.polygon([*crown, (cx + a * 0.86, line + 6), (part, line - 13), (cx - a * 0.86, line + 6)], fill=hair)
    length = 0.42 if long_hair else (0.02 if male else 0.10)
    for side in (-1, 1):
        x = cx + side * (a + 1)
        d.polygon(
            [
                (x + side * 6, line - 6),
                (x - side * 9, line - 2),
                (x - side * 3, cy + b * length),
                (x + side * 7, cy + b * length),
            ],
            fill=hair,
        )


def _glasses(d: ImageDraw.ImageDraw, cx: float, cy: float, a: float, size: float, rim: Colour) -> None:
    y = cy + 1
    for side in (-1, 1):
        x = cx + side * a * 0.45
        d.ellipse((x - 18 * size, y - 15 * size, x + 18 * size, y + 15 * size), outline=rim, width=5)
        d.line((cx + side * (a * 0.45 + 17 * size), y - 2, cx + side * a, y - 4), fill=rim, width=6)
    d.line((cx - a * 0.45 + 17 * size, y - 2, cx + a * 0.45 - 17 * size, y - 2), fill=rim, width=6)


def sheet(images: np.ndarray, columns: int, *, gap: int = 2) -> Image.Image:
    """A contact sheet of ``uint8[n, H, W, 3]`` images on white."""
    n, height, width = images.shape[:3]
    rows = -(-n // columns)
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (255, 255, 255))
    for i, picture in enumerate(images):
        page.paste(Image.fromarray(picture), (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return page
