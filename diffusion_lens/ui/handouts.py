"""What a teacher prints or shows: worksheet, key and slides, each a page of its own with its own style."""

from __future__ import annotations

from urllib.parse import urlsplit

import segno

from diffusion_lens.studio.classroom import Classroom
from diffusion_lens.studio.glossary import GLOSSARY
from diffusion_lens.studio.learn import STOPS
from diffusion_lens.ui.html import html

DOCUMENTS = (("worksheet", "Worksheet, two pages"), ("key", "Key, two pages"), ("slides", "Slides"))
LONGEST = 200
"""Characters of an address that a QR code is made of."""


def document(room: Classroom, asked: object) -> str:
    """One of ``DOCUMENTS`` as a whole page; ``asked``: its key, and the address of the app for the QR codes.

    What is asked for comes from a page: an unknown key gives the first, a bad address no codes.
    """
    what, address = asked if isinstance(asked, list) and len(asked) == 2 else ("", "")
    kind = next((key for key, _ in DOCUMENTS if key == what), DOCUMENTS[0][0])
    base = safe_address(address)
    codes = {stop.number: qr(f"{base}?tab=learn&station={stop.number}") for stop in STOPS} if base else {}
    name = room.studio.lens.manifest.name
    return html(f"handouts.{kind}", room.course.stations, room.items, GLOSSARY, codes, base, name)


def safe_address(address: object) -> str:
    """A web address without its query, or ``""`` where it is none: it comes from a page."""
    text = str(address)[:LONGEST]
    try:
        parts = urlsplit(text)
    except ValueError:
        return ""
    plain = all(c.isascii() and c.isprintable() and c not in " <>\"'`\\" for c in text)
    return f"{parts.scheme}://{parts.netloc}{parts.path}" if plain and parts.scheme in ("http", "https") else ""


def qr(address: str) -> str:
    """A QR code as an inline image, made here: nobody else is asked for it."""
    return str(segno.make(address, error="m").svg_data_uri(scale=3, border=2))
