"""What a model draws unedited, prompt by prompt, as counted once and kept in its lens; reads without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from diffusion_lens.base.files import read_json, write_json
from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError, Share


@dataclass(frozen=True)
class CountedShares:
    """Shares of unedited images.

    Attributes:
        shares: prompt (``""`` for none) → attribute → every class's share, corrected for the classifier's error.
        n_steps, guidance_scale: how the images were drawn; ``first_seed``: from which seed on.
        classifier_id: who read them.
    """

    shares: Mapping[str, Mapping[str, tuple[Share, ...]]]
    n_steps: int
    guidance_scale: float
    first_seed: int
    classifier_id: str


_READER = TypeAdapter(CountedShares)


def save_shares(path: Path, counted: CountedShares) -> None:
    """Write them as JSON."""
    write_json(path, to_plain(counted))


def load_shares(path: Path) -> CountedShares:
    """Read what ``save_shares`` wrote; raises ``LensError`` that names a file of another kind."""
    try:
        return _READER.validate_python(read_json(path))
    except ValidationError:
        raise LensError(f"{path} holds no counted shares; run check --full --part 1 --store again.") from None
