"""A model that cannot run, for what its files say, ends in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.base.weights import reason
from diffusion_lens.model.memory import is_out_of_memory


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turn what goes wrong inside into a ``LensError``: ``what: why``. Memory that runs out goes through as it is."""
    try:
        yield
    except (LensError, Cancelled):
        raise
    except Exception as error:  # tokenizers raise nothing more special
        if is_out_of_memory(error):
            raise
        raise LensError(f"{what}: {reason(error)}") from error
