"""Files that a page offers, as addresses that hold all of them: nothing is kept on the server."""

from __future__ import annotations

import base64


def data_address(text: str, kind: str) -> str:
    """An address that holds a text of a MIME type, e.g. ``text/csv``."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"
