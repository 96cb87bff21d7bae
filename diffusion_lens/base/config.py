"""Frozen, strict configurations: an unknown or missing key is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion_lens.types import LensError, Mode, Sampler

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
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LensError(f"{path.name} is missing from {path.parent}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise LensError(f"{path} is not readable JSON; restore it from the original.") from None
        if not isinstance(values, dict):
            raise LensError(f"{path} does not hold a JSON object.")
        return cls.parse(values, where=path.name)

    def save(self, path: Path) -> None:
        """Write as indented JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class Setting(StrictConfig):
    """The turn that a lens ships for one attribute: which features, how, and how far.

    Attributes:
        attribute: the attribute that it steers.
        target: the class towards which a rising β leads in the shipped sweep.
        n_features: features per pole, taken in order of attribution.
        poles: ``one`` turns the target's features; ``both`` also turns the opposite's the other way.
        mode, sampler, window, hold: as in ``Intervention``.
        betas: the strengths of the shipped sweep, rising, the identity among them.
        n_seeds_chosen_on: images per strength on which this setting was chosen (0: set by hand).
        note: where the setting comes from, in one sentence.
    """

    attribute: str
    target: str
    n_features: int = Field(ge=1)
    poles: Literal["one", "both"]
    mode: Mode
    sampler: Sampler
    window: tuple[int, int] | None = None
    hold: tuple[str, ...] = ()
    betas: tuple[float, ...] = Field(min_length=1)
    n_seeds_chosen_on: int = Field(default=0, ge=0)
    note: str = ""
