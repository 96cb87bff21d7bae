"""The page of claims: made from stored results, up to date, and with the right names."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.registry import METHODS
from diffusion_lens.studies.claims import METHOD_CLAIMS, card_with, claims, claims_markdown, stored_comparisons

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_of_the_stored_results() -> None:
    lens = DiffusionLens.from_pretrained(ROOT / "assets" / "portraits")
    page = claims_markdown(claims(lens, ROOT / "assets"), stored_comparisons(lens, ROOT / "assets"))
    assert (ROOT / "docs" / "CLAIMS.md").read_text() == page, (
        "run: python -m diffusion_lens claims --out docs/CLAIMS.md"
    )


def test_the_cards_tables_are_of_the_stored_comparisons() -> None:
    lens = DiffusionLens.from_pretrained(ROOT / "assets" / "portraits")
    card = (ROOT / "docs" / "MODEL_CARD.md").read_text()
    assert card_with(card, stored_comparisons(lens, ROOT / "assets")) == card, (
        "run: python -m diffusion_lens claims --card docs/MODEL_CARD.md"
    )
    with pytest.raises(LensError, match="no place"):
        card_with("# A card", lens.comparisons)


def test_every_claim_is_of_a_known_method_and_has_a_command() -> None:
    assert {source.method for source in METHOD_CLAIMS} <= set(METHODS)
    lens = DiffusionLens.from_pretrained(ROOT / "assets" / "portraits")
    for claim in claims(lens, ROOT / "assets"):
        assert all((claim.claim, claim.source, claim.experiment, claim.verdict, claim.command))


def test_sources_are_cited_with_their_first_authors() -> None:
    """Machine-made citations put Mian first and give StereoClinic no title; six places did."""
    wrong = ("Mian et " + "al", "StereoClinic, ACM")
    for pattern in ("diffusion_lens/**/*.py", "diffusion_lens/**/*.html", "docs/*.md", "*.md", "assets/*.json"):
        for path in ROOT.glob(pattern):
            text = path.read_text(encoding="utf-8")
            assert not [name for name in wrong if name in text], path
    assert "Selective Neural" in METHODS["stereoclinic"].source and "Hakemi" in METHODS["bypass"].source
    assert "Huang" in METHODS["ddm"].source
