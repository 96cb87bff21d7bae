"""What a visitor reads when some work ends early."""

from __future__ import annotations

import logging

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.ui import texts
from diffusion_lens.ui.html import html

log = logging.getLogger(__name__)


def told(error: Exception) -> str:
    """The sentence for whatever ended some work; surprises are logged."""
    if isinstance(error, LensError):
        return str(error)
    if isinstance(error, Cancelled):
        return texts.STOPPED
    log.error("Work for a visitor failed.", exc_info=error)
    return texts.FAILED.format(kind=type(error).__name__)


def explain(error: Exception) -> str:
    """The same as a status line; what is no plain end stands out."""
    return html("parts.status", told(error), bad=not isinstance(error, Cancelled))
