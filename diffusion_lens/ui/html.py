"""All markup of the app: macros of the jinja2 templates beside this file, everything in them escaped."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from diffusion_lens.studio.cards import lit
from diffusion_lens.studio.glossary import GLOSSARY
from diffusion_lens.studio.pictures import data_uri

TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters["data_uri"] = data_uri
    made.filters["lit"] = lit
    made.filters["percent"] = percent
    made.filters["points"] = points
    made.filters["terms"] = terms
    return made


def html(macro: str, *values: Any, **named: Any) -> str:
    """What a macro writes: ``html("depth.flips", flips, majority)`` calls ``flips`` of ``templates/depth.html``."""
    template, _, name = macro.partition(".")
    return str(getattr(_environment().get_template(f"{template}.html").module, name)(*values, **named)).strip()


def percent(share: float) -> str:
    """``64%``."""
    return f"{share:.0%}"


def points(difference: float) -> str:
    """A difference of shares in points: ``+12``."""
    return f"{100 * difference:+.0f}"


def terms(text: str) -> Markup:
    """A text, escaped, in which the first of each of the glossary's words shows what it means."""
    open_ones = dict(GLOSSARY)

    def explained(match: re.Match[str]) -> str:
        meaning = open_ones.pop(match[1].lower(), None)
        return match[0] if meaning is None else html("learn.term", match[1], meaning) + match[2]

    words = "|".join(map(re.escape, GLOSSARY))
    return Markup(re.sub(rf"\b({words})(s?)\b", explained, str(escape(text)), flags=re.IGNORECASE))
