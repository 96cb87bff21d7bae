"""Where the files that ship with the project lie: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path


def assets_folder() -> Path:
    """The folder of bundled lenses and of the app's own files, whatever the working folder."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "assets"
    return inside if inside.is_dir() else package.parent / "assets"
