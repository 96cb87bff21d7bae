"""Lens folders as a hostile sender would make them: one file changed, and the whole sealed again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results import dissection
from diffusion_lens.results.manifest import MANIFEST
from diffusion_lens.studio import about, atlas, atlas_map, cards, feature_rows
from diffusion_lens.studio.curves import curve_for
from diffusion_lens.studio.opening import first_steps, opening_view
from diffusion_lens.studio.state import default_view, from_query, to_query
from diffusion_lens.studio.studio import Studio

GIB = 2**30
SECONDS = 60
"""After which a mutant counts as hanging; a whole one takes less than one."""

DEEP = 100_000
HOSTILE: tuple[str, ...] = (
    "null", "true", "-1", "0", "1.5", "1e999", "-1e308", "NaN", "1" * 5000, "99999999999", "2147483648", '""', '"x"',
    '"' + "y" * 100_000 + '"', '"\\u0000"', '"../../etc/passwd"', "[]", "{}", "[[]]", "[null]", '{"a": 1}',
    "[" * DEEP + "]" * DEEP, "[1, 2, 3]", "[[1, 2], [3, 4]]", '"nan"', "1e-320",
)  # fmt: skip
"""JSON in place of a value: other types, other sizes, nested too deep, no number, too many digits."""

PLACE = "\u2603"


def copy_of(folder: Path, target: Path) -> None:
    """The same folder, of links: a file that is changed must be written anew."""
    shutil.copytree(folder, target, copy_function=os.link)


def mutate(folder: Path, name: str, rng: random.Random) -> str:
    """Change one file of a lens in one way and seal the folder again; returns what was done."""
    path = folder / name
    data = path.read_bytes()
    changes = [_cut, _noise]
    if name.endswith(".json"):
        changes += [_json] * 8
    elif name.endswith(".safetensors"):
        changes += [_tensors] * 6 + [_header] * 4
    elif name.endswith(".webp"):
        changes += [_large_picture, _other_picture]
    done, changed = rng.choice(changes)(data, rng)
    path.unlink()
    path.write_bytes(changed)
    if name != MANIFEST:
        _seal(folder, name, changed)
    return f"{name}: {done}"


def _seal(folder: Path, name: str, data: bytes) -> None:
    """As somebody would who means harm: the file's digest fits, and the parts' digests, which need not be there, go."""
    path = folder / MANIFEST
    values = json.loads(path.read_text(encoding="utf-8"))
    values["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    values["base_model"]["digests"] = {}
    path.unlink()
    path.write_text(json.dumps(values), encoding="utf-8")


def _cut(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    at = rng.randrange(len(data) + 1)
    return f"cut at byte {at}", data[:at]


def _noise(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    changed = bytearray(data or b"\0")
    places = sorted(rng.randrange(len(changed)) for _ in range(rng.choice((1, 4, 40))))
    for at in places:
        changed[at] = rng.randrange(256)
    return f"bytes {places[:4]} changed", bytes(changed)


def _json(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    done, text = _changed_json(data.decode("utf-8"), rng)
    return done, text.encode("utf-8", "surrogatepass")


def _changed_json(text: str, rng: random.Random) -> tuple[str, str]:
    values = json.loads(text)
    places = list(_places(values, rng))
    if not places or rng.random() < 0.04:
        new = rng.choice(HOSTILE)
        return f"all of it becomes {new[:20]}", new
    holder, key, way = rng.choice(places)
    kind = rng.randrange(12)
    if kind == 0:
        del holder[key]
        return f"{way} is gone", json.dumps(values)
    if kind == 1 and isinstance(holder, list):
        holder.append(holder[key])
        return f"{way} stands twice", json.dumps(values)
    if kind == 2 and isinstance(holder, dict):
        holder["stranger"] = holder[key]
        return f"a stranger stands beside {way}", json.dumps(values)
    if kind == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((holder[key] + 1, holder[key] * 1000, -holder[key], holder[key] + 0.5))
        return f"{way} becomes {holder[key]}", json.dumps(values)
    new = rng.choice(HOSTILE)
    holder[key] = PLACE
    return f"{way} becomes {new[:20]}", json.dumps(values).replace(json.dumps(PLACE), new)


def _places(values: Any, rng: random.Random, way: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every place of a value, of long lists a few."""
    if isinstance(values, dict):
        keys: list[Any] = list(values)
    elif isinstance(values, list):
        keys = sorted(rng.sample(range(len(values)), min(4, len(values))))
    else:
        return
    for key in keys:
        yield values, key, f"{way}.{str(key)[:30]}"
        yield from _places(values[key], rng, f"{way}.{str(key)[:30]}")


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def _header(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The JSON of the file's header, or the JSON in its metadata."""
    header, body = _parts(data)
    texts = [name for name, text in header.get("__metadata__", {}).items() if text[:1] in '{["']
    if texts and rng.random() < 0.8:
        name = rng.choice(texts)
        done, text = _changed_json(header["__metadata__"][name], rng)
        header["__metadata__"][name] = text
        return f"header {name}: {done}", _joined(json.dumps(header), body)
    if rng.random() < 0.2:
        size = rng.choice((0, 2**63, 2**40, 2**31, len(data)))
        return f"a header of {size} bytes", struct.pack("<Q", size) + data[8:]
    done, text = _changed_json(json.dumps(header), rng)
    return f"header {done}", _joined(text, body)


def _tensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """An array of another name, type, shape or content, or none at all."""
    header, body = _parts(data)
    metadata = header.pop("__metadata__", None)
    arrays = {name: (own["dtype"], own["shape"], body[slice(*own["data_offsets"])]) for name, own in header.items()}
    name = rng.choice(sorted(arrays))
    kind, shape, content = arrays.pop(name)
    count = int(np.prod(shape, dtype=np.int64))
    size = len(content) // count if count else 1
    way = rng.randrange(9)
    if way == 0:
        done = "is gone"
    elif way == 1:
        done, arrays["stranger"] = "has another name", (kind, shape, content)
    elif way == 2:
        done, arrays[name] = "is flat", (kind, [count], content)
    elif way == 3:
        done, arrays[name] = "is turned", (kind, shape[::-1], content)
    elif way == 4:
        done, arrays[name] = "is empty", (kind, [0, *shape[1:]], b"")
    elif way == 5:
        done, arrays[name] = (
            "has a row more",
            (
                kind,
                [shape[0] + 1 if shape else 1, *shape[1:]],
                content + content[: len(content) // max(1, shape[0] if shape else 1)],
            ),
        )
    elif way == 6:
        other = {1: "BOOL", 2: "I16", 4: "I32", 8: "I64"}[size]
        done, arrays[name] = f"is {other}", (other, shape, content)
    elif way == 7:
        done, arrays[name] = "is all ones", (kind, shape, b"\xff" * len(content))
    else:
        large = rng.choice((10**9, 10**6))
        done, arrays[name] = "speaks of large numbers", (kind, shape, _filled(kind, count, large, content))
    return f"{name} {done}", _written(arrays, metadata)


def _filled(kind: str, count: int, number: int, content: bytes) -> bytes:
    known = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1"}
    with np.errstate(all="ignore"):
        return np.full(count, number).astype(known[kind]).tobytes() if kind in known else content


def _written(arrays: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = b""
    for name, (kind, shape, content) in arrays.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    return _joined(json.dumps(header), body)


def _large_picture(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A WebP whose own header speaks of the largest size there is."""
    kind = data[12:16]
    changed = bytearray(data)
    if kind == b"VP8L":
        changed[21:25] = struct.pack("<I", 0x0FFFFFFF | (struct.unpack("<I", data[21:25])[0] & ~0x0FFFFFFF))
    elif kind == b"VP8 ":
        changed[26:30] = struct.pack("<HH", 16383, 16383)
    else:
        changed[24:30] = b"\xfe\x3f\x00" * 2
    return "speaks of 16383 × 16383 pixels", bytes(changed)


def _other_picture(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    out = io.BytesIO()
    size = rng.choice(((1, 1), (3000, 3000), (16, 4096)))
    Image.new(rng.choice(("RGB", "L", "RGBA")), size).save(out, rng.choice(("WEBP", "PNG", "GIF", "TIFF")))
    return f"is another picture of {size}", out.getvalue()


@contextmanager
def bounded() -> Iterator[None]:
    """Let what happens inside take a gibibyte more than is taken now, and a while; on systems that can tell."""
    if not hasattr(resource, "RLIMIT_DATA") or not Path("/proc/self/status").is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    taken = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))

    def late(*_: Any) -> None:
        raise TimeoutError(f"it hangs: nothing came in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + GIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def use(folder: Path, *, draw: bool) -> list[str]:
    """Open a lens and look at all of it, as the app does; returns the sentences that came in place of a part.

    ``draw``: load its model too, and draw with it. Whatever is no ``LensError`` is raised.
    """
    told: list[str] = []

    def part(look: Callable[[], Any]) -> Any:
        try:
            return look()
        except LensError as error:
            told.append(str(error))
            return None

    lens: DiffusionLens | None = part(lambda: DiffusionLens.from_pretrained(folder))
    if lens is None:
        return told
    for look in (_features, _stored, _page, _judge, *((_draw,) if draw else ())):
        part(lambda look=look: [part(one) for one in look(lens)])
    return told


def _features(lens: DiffusionLens) -> Iterator[Callable[[], Any]]:
    yield lambda: (repr(lens), lens._repr_html_(), lens.fitted_from, lens.confusion, lens.prompts)
    yield lambda: [lens.card(i) for i in (0, 1, len(lens.atlas.density) - 1)]
    yield lambda: lens.atlas.activity
    for attribute in lens.attributes:
        yield lambda a=attribute: [lens.intervention(a.name, label, 2.0) for label in a.classes]
        yield lambda a=attribute: lens.probes[a.name]
    yield lambda: lens.sae


def _stored(lens: DiffusionLens) -> Iterator[Callable[[], Any]]:
    yield lambda: [(s.to_frame(), s.plot(), s._repr_html_(), [(p.kept, p.changes) for p in s.points])
                   for s in lens.sweeps]  # fmt: skip
    yield lambda: [(c.to_frame(), c._repr_html_()) for c in lens.comparisons.values()]
    yield lambda: lens.counted and lens.counted.shares
    yield lambda: lens.together and (lens.together.before.shares, lens.together.after.shares)

    def control() -> None:
        if (found := lens.dissection) is not None:
            dissection.summary(found)
            for name in found.classes:
                dissection.evidence(found, name)
            for feature in found.ids():
                dissection.effects_of(found, feature)

    yield control


def _page(lens: DiffusionLens) -> Iterator[Callable[[], Any]]:
    """What the first page shows."""
    studio = Studio(lens)

    def view(name: str) -> None:
        shown = replace(default_view(lens, name), beta=lens.settings[name].betas[-1])
        assert from_query(lens, dict(parse_qsl(to_query(shown)[1:], keep_blank_values=True))) == shown
        studio.stored(shown)
        for feature in feature_rows.shown(lens, shown):
            cards.effects(lens, feature_rows.feature_row(lens, shown, feature).card)
        curve_for(studio, shown)

    for name in lens.settings:
        yield lambda name=name: view(name)
    yield lambda: studio.foreign
    yield lambda: (opening_view(studio), first_steps(studio))
    yield lambda: [about.known_shares(lens, name) for name in about.attributes_known(lens)]
    yield lambda: (about.lens_facts(lens), about.counted_shares(lens), about.prompts_known(lens))
    for colour in atlas.colourings(lens):
        yield lambda colour=colour: atlas.scores(lens, colour)
    yield lambda: atlas_map.atlas_map(lens)
    yield lambda: (atlas.strongest(lens), atlas.search(lens, "glasses", lambda effect: effect.label))
    yield lambda: atlas.evidence_for(lens, "glasses")


def _judge(lens: DiffusionLens) -> Iterator[Callable[[], Any]]:
    yield lambda: lens.classify(np.zeros((2, 16, 16, 3), np.uint8))


def _draw(lens: DiffusionLens) -> Iterator[Callable[[], Any]]:
    yield lambda: lens.generate(lens.prompts[0], seeds=[1])
    for name in lens.settings:
        yield lambda name=name: lens.measure(
            lens.generate(lens.prompts[0], lens.intervention(name, lens.settings[name].target, 2.0), seeds=[1, 2])
        )
