"""All markup of the app: macros of the jinja2 templates beside this file, everything in them escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusion_lens.studio.cards import lit
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
