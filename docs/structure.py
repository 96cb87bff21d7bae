"""Draw ``docs/images/structure.svg`` from the imports: the stations as rows, an arrow for each that another one uses.

``python docs/structure.py``; a test fails where the picture is of other imports than today's.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffusion_lens"
PICTURE = ROOT / "docs" / "images" / "structure.svg"
ROOM, GAP, LEFT, WIDE = 30, 10, 20, 190

sys.path.insert(0, str(ROOT / "tests"))
from test_architecture import ORDER  # noqa: E402

DOES = {
    "base": "types, files, progress", "results": "what was measured, derived and kept", "plots": "figures",
    "model": "load, hook, denoise, decode", "judging": "images → perceived attributes",
    "measuring": "observe, sweep, balance", "features": "SAE, probes, attribution, atlas",
    "steering": "which features, how far", "interop": "others' formats", "portraits": "the drawn world",
    "lens": "the facade and its folder", "methods": "a file a method", "fit": "from a model to a lens",
    "studies": "long measurements", "studio": "what a visitor does", "ui": "the app", "cli": "the commands",
}  # fmt: skip


def uses() -> Counter[tuple[str, str]]:
    """(station, station it imports from) → how many modules do so."""
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0]
        if own not in ORDER:
            continue
        others = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusion_lens."):
                others.add(str(node.module).split(".")[1])
        found.update((own, other) for other in others - {own})
    return found


def draw() -> str:
    """The picture: top is what people touch, bottom what everything uses; arcs on the right lead down."""
    rows = list(reversed(ORDER))
    y = {name: 20 + i * (ROOM + GAP) for i, name in enumerate(rows)}
    lines = []
    for (own, other), count in sorted(uses().items()):
        top, bottom = y[own] + ROOM / 2, y[other] + ROOM / 2
        bend = LEFT + WIDE + 330 + (bottom - top) * 0.42
        lines.append(
            f'<path d="M{LEFT + WIDE + 330} {top:.0f} C{bend:.0f} {top:.0f} {bend:.0f} {bottom:.0f} '
            f'{LEFT + WIDE + 330} {bottom:.0f}" stroke-width="{min(4, 0.5 + count / 5):.1f}"/>'
        )
    rooms = "".join(
        f'<rect x="{LEFT}" y="{y[name]}" width="{WIDE}" height="{ROOM}" rx="4" fill="#e8eef7" stroke="#7a8aa0"/>'
        f'<text x="{LEFT + 12}" y="{y[name] + 20}" font-weight="600" fill="#222">{name}</text>'
        f'<text x="{LEFT + WIDE + 12}" y="{y[name] + 20}" fill="#555">{DOES[name]}</text>'
        for name in rows
    )
    height = 20 + len(rows) * (ROOM + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 {height}" font-family="system-ui, sans-serif" '
        f'font-size="14" role="img" aria-label="The stations of Diffusion Lens; imports only lead down">'
        f'<rect width="880" height="{height}" fill="#fff"/>{rooms}'
        f'<g fill="none" stroke="#0072b2" stroke-opacity=".45">{"".join(lines)}</g></svg>\n'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {len(uses())} arrows between {len(ORDER)} stations")
