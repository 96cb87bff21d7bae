"""Frozen, strict configurations: an unknown or missing key is an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffusion_lens.base.files import read_json, write_text
from diffusion_lens.base.types import LensError

C = TypeVar("C", bound="StrictConfig")


class StrictConfig(BaseModel):
    """Base of every configuration: immutable, no unknown keys, one-sentence errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls: type[C], values: dict[str, Any], *, where: str = "the configuration") -> C:
        """Build from a mapping; raises ``LensError`` that names the first wrong key and its fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or cls.__name__
            raise LensError(f"{where}: '{key}' is wrong ({first['msg'].lower()}).") from None

    @classmethod
    def load(cls: type[C], path: Path) -> C:
        """Read a JSON file; raises ``LensError`` that names the file."""
        values = read_json(path)
        if not isinstance(values, dict):
            raise LensError(f"{path} does not hold a JSON object.")
        return cls.parse(values, where=path.name)

    def save(self, path: Path) -> None:
        """Write as indented JSON, whole or not at all."""
        write_text(path, self.model_dump_json(indent=2) + "\n")
