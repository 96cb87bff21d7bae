"""Methods fitted on this server, kept on its disk so that the next visitor need not wait; bounded, and never needed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_lens.base.types import LensError
from diffusion_lens.base.workspace import Workspace, digest

if TYPE_CHECKING:
    from diffusion_lens.methods.protocol import Fitted, Method, OpenLens

log = logging.getLogger(__name__)
FITS_VARIABLE = "DIFFUSION_LENS_FITS"
MAX_BYTES = 512 * 2**20
MAX_FITS = 200


def fits_folder() -> Path:
    """Where fits are kept: ``$DIFFUSION_LENS_FITS``, else ``~/.cache/diffusion-lens/fits``."""
    named = os.environ.get(FITS_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "diffusion-lens" / "fits"


class KeptFits:
    """Fitted methods by what decides them; the longest unused ones go first when there is no room.

    A disk that cannot be written or read is no reason to fail: the method is then fitted again.
    """

    def __init__(self, folder: Path | None = None, *, max_bytes: int = MAX_BYTES, max_fits: int = MAX_FITS) -> None:
        self._workspace = Workspace(folder or fits_folder())
        self._max_bytes, self._max_fits = max_bytes, max_fits
        self._guard = threading.Lock()

    def name(self, method: str, lens_key: str, decides: object) -> str:
        """The name of a fit: whatever decides it, and the lens that it belongs to."""
        return f"{method}-{digest([lens_key, decides])}"

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return self._workspace.has(name)

    def load(self, name: str, method: Method, lens: OpenLens) -> Fitted | None:
        """The fit of that name, now the latest used; ``None`` where there is none that can be read."""
        path = self._workspace.path(name)
        if not path.is_dir():
            return None
        try:
            found = method.load(path, lens)
            os.utime(path)
            return found
        except (LensError, OSError) as error:
            log.warning("A kept fit of %s could not be read and is dropped: %s", method.key, error)
            self._drop(path)
            return None

    def keep(self, name: str, fitted: Fitted) -> None:
        """Keep a fit, and make room for it."""
        try:
            self._workspace.keep(name, lambda: fitted, _save)
        except (LensError, OSError) as error:
            log.warning("The fit of %s could not be kept: %s", fitted.method.key, error)
            return
        self._make_room()

    def _make_room(self) -> None:
        with self._guard:
            kept = sorted(self._workspace.names("*-*"), key=_last_used)
            sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in kept if path.is_dir()}
            while kept and (len(kept) > self._max_fits or sum(sizes.values()) > self._max_bytes):
                oldest = kept.pop(0)
                sizes.pop(oldest, None)
                self._drop(oldest)

    def _drop(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def _save(path: Path, fitted: Fitted) -> None:
    path.mkdir(parents=True, exist_ok=True)
    fitted.save(path)


def _last_used(path: Path) -> float:
    return path.stat().st_mtime
