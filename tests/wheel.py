"""Build the package, install it in a fresh environment, and use it from an empty folder: what ``pip install`` gives.

``python tests/wheel.py`` with the dependencies at hand; ``--dependencies`` installs them afresh too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60 * 2**20
"""Bytes that a wheel may have."""
LOOK = (
    "import diffusion_lens, sys; from diffusion_lens.base.assets import assets_folder; "
    "lens = diffusion_lens.DiffusionLens.from_pretrained(assets_folder() / 'portraits'); "
    "images = lens.generate('a portrait of a nurse', seeds=range(2)).images; "
    "print(diffusion_lens.__version__, images.shape, diffusion_lens.__file__)"
)
COMMANDS = (
    ("--help",),
    ("generate", "a portrait of a nurse", "-n", "2", "--out", "images.png"),
    ("sweep", "a portrait of a nurse", "--attribute", "gender", "-n", "10", "--betas", "0,1"),
)


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """A command's output; its own error where it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DIFFUSION_LENS")}
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def main() -> None:
    """Build, check the size and content, install, use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dependencies", action="store_true", help="install the dependencies in the new environment")
    afresh = parser.parse_args().dependencies
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT)
        (wheel,) = place.glob("*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        for name in (
            "diffusion_lens/py.typed",
            "diffusion_lens/assets/portraits/lens.json",
            "diffusion_lens/assets/app.css",
        ):
            assert name in names, f"{name} is not in the wheel"
        assert wheel.stat().st_size < LIMIT, f"the wheel has {wheel.stat().st_size / 2**20:.0f} MiB"
        extra = () if afresh else ("--system-site-packages",)
        run(sys.executable, "-m", "venv", *extra, place / "venv")
        python = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not afresh:  # a virtual environment sees the base Python's packages, not those of the one it is made in
            site = next((place / "venv").rglob("site-packages"))
            own = [path for path in sys.path if path.endswith("site-packages")]
            (site / "outer.pth").write_text("\n".join(own) + "\n", encoding="utf-8")
        run(python, "-m", "pip", "install", "--quiet", *(() if afresh else ("--no-deps",)), wheel)
        empty = place / "empty"
        empty.mkdir()
        said = run(python, "-c", LOOK, cwd=empty)
        assert str(place / "venv") in said, f"the checkout was used, not the wheel: {said}"
        for words in COMMANDS:
            run(python, "-m", "diffusion_lens", *words, cwd=empty)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB; {said.strip()}; {len(COMMANDS)} commands")


if __name__ == "__main__":
    main()
