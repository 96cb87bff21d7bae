"""Prompts that a CLIP classifier reads by."""

from __future__ import annotations

from photo_models import LABEL_MAP, hub_folder, photos  # noqa: F401

PROMPTS = {"gender": {"male": ("a man",), "female": ("a woman", "a nurse")}}
