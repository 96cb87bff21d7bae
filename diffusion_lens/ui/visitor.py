"""Who acts: a name for each visitor's session, so that nobody stops another's work."""

from __future__ import annotations

from uuid import uuid4

import gradio as gr


def visitor_of(request: gr.Request) -> str:
    """The session's name, never empty: whoever comes without one, from a script, gets a name of their own."""
    return str(getattr(request, "session_hash", None) or uuid4().hex)
