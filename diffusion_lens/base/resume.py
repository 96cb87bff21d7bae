"""A training's whole state in one file, so that a killed run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_lens.base.files import atomic_path

CHECKPOINT_SECONDS = 30.0


@dataclass
class Checkpoint:
    """Saves and restores ``parts`` (anything with ``state_dict``) and the progress beside them.

    Attributes:
        path: the file; ``None``: nothing is ever saved or restored.
        identity: text that names the training; a file of another training is ignored.
        seconds: least time between two writes.
    """

    path: Path | None
    identity: str
    parts: Mapping[str, Any]
    seconds: float = CHECKPOINT_SECONDS
    written: float = field(default_factory=time.monotonic)

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write parts and ``progress`` (numbers, text, lists, tensors), whole or not at all, if it is time."""
        if self.path is None or time.monotonic() - self.written < self.seconds:
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_path(self.path) as partial:
            torch.save({"identity": self.identity, "progress": dict(progress), "states": states}, partial)
        self.written = time.monotonic()

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """Restore the parts and return the progress; ``None`` where there is no state of this training."""
        if self.path is None or not self.path.is_file():
            return None
        saved = torch.load(self.path, map_location=device, weights_only=True)
        if saved["identity"] != self.identity:
            return None
        for name, part in self.parts.items():
            part.load_state_dict(saved["states"][name])
        return saved["progress"]
