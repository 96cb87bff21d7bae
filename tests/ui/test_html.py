"""Everything that templates write is escaped, and a value that a template needs is never missing."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from diffusion_lens.ui.html import TEMPLATES, html


def test_values_are_escaped_whatever_they_hold() -> None:
    said = html("parts.status", "<script>alert('x')</script> & \"more\"", bad=True)
    assert "<script>" not in said and "&lt;script&gt;" in said and "&amp;" in said and 'role="alert"' in said


def test_a_missing_value_is_an_error_and_no_gap() -> None:
    with pytest.raises(UndefinedError):
        html("parts.sentence")


def test_no_template_switches_escaping_off() -> None:
    for path in TEMPLATES.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "|safe" not in text and "autoescape false" not in text, path.name
