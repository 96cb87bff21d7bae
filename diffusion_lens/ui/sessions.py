"""What gradio keeps of a visitor is let go when they have left, and the memory goes back to the system."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from diffusion_lens.studio.status import give_back

log = logging.getLogger(__name__)

GRACE = 900.0
"""Seconds for which the page of somebody who left is kept: a telephone that shows another app comes back to it."""
EVERY = 60.0
"""Seconds between two looks."""


def free_left(demo: Any, grace: float = GRACE, now: Callable[[], datetime] = datetime.now) -> int:
    """Let go of the sessions that were closed and not used for ``grace`` seconds; returns how many.

    Gradio itself drops what a closed session's states hold after an hour, and its page never, until there are
    ``state_session_capacity`` others.
    """
    holder, limit = demo.state_holder, now() - timedelta(seconds=grace)
    with holder.lock:
        gone = [
            name
            for name, session in holder.session_data.items()
            if session.is_closed and holder.time_last_used.get(name, datetime.min) <= limit
        ]
        for name in gone:
            holder.session_data.pop(name, None)
            holder.time_last_used.pop(name, None)
    return len(gone)


def keep_tidy(demo: Any) -> threading.Thread:
    """Look every minute, for as long as the process lives."""

    def look() -> None:
        pause = threading.Event()
        while not pause.wait(EVERY):
            try:
                if free_left(demo, GRACE):
                    give_back()
            except Exception:
                log.exception("Sessions of visitors who left could not be freed.")

    thread = threading.Thread(target=look, name="tidy", daemon=True)
    thread.start()
    return thread
