"""What version 0.4 drew and showed, recorded before its modules moved, is still drawn and shown.

Unedited images are equal bit for bit on one machine; processors round differently, so that a grey level is let pass
here. The edited ones may also move in their last bits, since the SAE's normalisation was folded into its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_lens.base.sheets import load_sheets
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.balance import balance

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "tests" / "data" / "version_0_4"
VALUES = json.loads((RECORDED / "figures.json").read_text(encoding="utf-8"))
FIGURES = VALUES["figures"]
SEEDS = range(700, 708)
LEVELS = 1
SHARE = 1e-3  # of values that may be a level off

DRAWINGS: dict[str, tuple[str, str | None, float, tuple[str, str, float] | None]] = {
    "plain": ("portraits", "a portrait of a nurse", 1.0, None),
    "guided": ("portraits", "a portrait of a firefighter", 2.5, None),
    "empty": ("portraits", "", 1.0, None),
    "without_prompt": ("portraits-unconditional", None, 1.0, None),
    "male_0": ("portraits", "a portrait of a firefighter", 1.0, ("gender", "male", 0.0)),
    "male_2": ("portraits", "a portrait of a nurse", 1.0, ("gender", "male", 2.0)),
    "old_2_guided": ("portraits", "a portrait of a doctor", 2.0, ("age", "old", 2.0)),
    "dark_3": ("portraits", "a portrait of a judge", 1.0, ("tone", "dark", 3.0)),
    "unchanged": ("portraits", "a portrait of a nurse", 1.0, ("gender", "male", 1.0)),
    "male_3_without_prompt": ("portraits-unconditional", None, 1.0, ("gender", "male", 3.0)),
}


@pytest.fixture(scope="module")
def lenses() -> dict[str, DiffusionLens]:
    names = ("portraits", "portraits-unconditional")
    return {name: DiffusionLens.from_pretrained(ROOT / "assets" / name) for name in names}


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    return dict(
        zip(VALUES["drawings"], np.split(load_sheets(RECORDED, "images"), len(VALUES["drawings"])), strict=True)
    )


@pytest.mark.parametrize("name", DRAWINGS)
def test_images_are_those_of_0_4(lenses: dict[str, DiffusionLens], images: dict[str, np.ndarray], name: str) -> None:
    lens_name, prompt, scale, steered = DRAWINGS[name]
    lens = lenses[lens_name]
    edits = () if steered is None else (lens.intervention(*steered),)
    drawn = lens.generate(lens.request(prompt, SEEDS, guidance_scale=scale), *edits).images
    off = np.abs(drawn.astype(int) - images[name].astype(int))
    assert off.max() <= LEVELS and (off > 0).mean() <= SHARE


def test_strength_one_draws_what_no_edit_draws(images: dict[str, np.ndarray]) -> None:
    assert (images["plain"] == images["unchanged"]).all()


def test_figures_of_a_run_are_those_of_0_4(lenses: dict[str, DiffusionLens]) -> None:
    lens = lenses["portraits"]
    base = lens.generate("a portrait of a nurse", seeds=range(700, 732), capture=True)
    edited = lens.generate(base.request, lens.intervention("gender", "male", 2.0))
    before, after = lens.measure(base), lens.measure(edited, reference=base)
    assert [share.count for share in before["gender"].shares] == FIGURES["nurse male counts unedited"]
    assert [share.count for share in after["gender"].shares] == FIGURES["nurse male counts at 2"]
    assert after["gender"].fd == pytest.approx(FIGURES["nurse fd at 2"])
    ratio = after["gender"].log_ratio
    assert ratio is not None and ratio.value == pytest.approx(FIGURES["nurse log ratio at 2"])
    assert after.agreement == pytest.approx(FIGURES["nurse agreement at 2"])
    moved = {f"{change.attribute} {change.label}": change.difference for change in after.changes}
    assert moved == pytest.approx(FIGURES["nurse changes at 2"])
    assert edited.activation_ratio == pytest.approx(FIGURES["activation ratio at 2"], abs=1e-4)
    attribution = lens.attribute(base, "gender")
    assert attribution.completeness_gap < 1e-4
    assert list(attribution.top_k(10, target="male").ids) == FIGURES["attribution top 10 of 32 images"]


def test_features_and_cards_are_those_of_0_4(lenses: dict[str, DiffusionLens]) -> None:
    lens = lenses["portraits"]
    for attribute, target in (("gender", "male"), ("age", "old"), ("tone", "dark")):
        assert list(lens.feature_set(attribute, target, 10).ids) == FIGURES[f"shipped top 10 {attribute}"]
    told = FIGURES["card of best feature"]
    card = lens.card(told["id"])
    assert (card.label, card.rank) == (told["label"], told["rank"])
    assert card.density == pytest.approx(told["density"])


@pytest.mark.parametrize("name", ["portraits", "portraits-unconditional"])
def test_stored_sweeps_are_those_of_0_4(lenses: dict[str, DiffusionLens], name: str) -> None:
    shown: list[Any] = [
        [s.attribute.name, s.request.prompt, s.is_control, [
            [p.beta, *(share.count for share in p.shares), p.shares[0].n_uncertain, p.fd, p.activation_ratio]
            for p in s.points
        ]]
        for s in lenses[name].sweeps
    ]  # fmt: skip
    told = FIGURES[f"{name} stored sweeps"]
    assert [own[:3] for own in shown] == [own[:3] for own in told]
    for mine, theirs in zip(shown, told, strict=True):
        np.testing.assert_allclose(mine[3], theirs[3], rtol=1e-6)


def test_balances_are_those_of_0_4(lenses: dict[str, DiffusionLens]) -> None:
    lens = lenses["portraits"]
    for sweep in (s for s in lens.sweeps if not s.is_control):
        beta, reached = FIGURES["balances"][f"{sweep.attribute.name}|{sweep.request.prompt}"]
        found = balance(sweep, lens.classifier.confusion[sweep.attribute.name])
        assert (found.beta, found.reached) == (pytest.approx(beta), reached)


@pytest.mark.parametrize("attribute", ["gender", "age", "tone"])
def test_comparisons_are_those_of_0_4(lenses: dict[str, DiffusionLens], attribute: str) -> None:
    for row in lenses["portraits"].comparisons[attribute].rows:
        strength, fd = FIGURES[f"comparison {attribute}"][row.method]
        assert row.strength == strength
        assert (row.fd is None) == (fd is None)
        if row.fd is not None:
            assert row.fd.value == pytest.approx(fd["value"])


def test_a_new_sweep_counts_as_in_0_4(lenses: dict[str, DiffusionLens]) -> None:
    sweep = lenses["portraits"].sweep("a portrait of a doctor", "age", betas=(0.0, 1.0, 2.0), n=16)
    for point, (beta, counts, fd) in zip(sweep.points, FIGURES["new sweep of 16"], strict=True):
        assert (point.beta, point.counts.tolist()) == (beta, counts) and point.fd == pytest.approx(fd)
