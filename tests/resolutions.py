"""Resolve the lowest and the highest allowed versions of every dependency for each Python that is claimed.

``python tests/resolutions.py`` (needs uv and the network). Nothing is installed: it shows that the ranges in
requirements.txt have a solution at both ends, and prints some of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RESOLUTIONS = ("lowest-direct", "highest")
TOLD = ("torch", "diffusers", "transformers", "gradio", "numpy", "pydantic")


def resolve(python: str, resolution: str) -> list[str]:
    """``name==version`` lines; raises ``SystemExit`` that tells why there are none."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-annotate", "--no-header", "requirements.txt",
               "--resolution", resolution, "--python-version", python]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"Python {python}, {resolution}: {done.stderr.strip() or done.stdout.strip()}")
    return [line for line in done.stdout.splitlines() if "==" in line]


def main() -> None:
    """Resolve all of them."""
    for python in PYTHONS:
        for resolution in RESOLUTIONS:
            found = resolve(python, resolution)
            told = ", ".join(line for line in found if line.split("==")[0] in TOLD)
            print(f"Python {python}, {resolution}: {len(found)} packages, among them {told}")


if __name__ == "__main__":
    main()
