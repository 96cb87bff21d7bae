"""What a visitor reads when some work ends early."""

from __future__ import annotations

import logging

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.ui import texts
from diffusion_lens.ui.html import html

log = logging.getLogger(__name__)


def explain(error: Exception) -> str:
    """The status line for whatever ended some work; surprises are logged."""
    if isinstance(error, LensError):
        return html("parts.status", str(error), bad=True)
    if isinstance(error, Cancelled):
        return html("parts.status", texts.STOPPED)
    log.error("Work for a visitor failed.", exc_info=error)
    return html("parts.status", texts.FAILED.format(kind=type(error).__name__), bad=True)
