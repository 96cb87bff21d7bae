"""Audits: the same numbers as ``evaluate``, in three files that need nothing from elsewhere."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffusion_lens.base.edits import describe
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import ASSUMED, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studies.audit.run import COLUMNS, Audit, audit, render, table_text, write_report

PROMPTS = ("a portrait of a doctor", "a portrait of a nurse")
SEEDS = range(500, 524)
NOTES = "Looks <script>alert(1)</script> fine & tidy."


@pytest.fixture(scope="module")
def found(tiny_lens: DiffusionLens) -> Audit:
    turn = tiny_lens.intervention("gender", "male", 3.0)
    return audit(
        tiny_lens, PROMPTS, SEEDS, turns=[turn], reviewer="A. Reviewer", notes=NOTES,
        command="python -m diffusion_lens audit", date="2026-01-02",
    )  # fmt: skip


def test_numbers_are_those_of_evaluate(found: Audit, tiny_lens: DiffusionLens) -> None:
    base = tiny_lens.generate(PROMPTS[1], seeds=SEEDS)
    edited = tiny_lens.generate(base.request, tiny_lens.intervention("gender", "male", 3.0))
    plain, turned = found.findings[2:]
    assert (plain.prompt, plain.edit, turned.edit) == (PROMPTS[1], None, describe(edited.edit))
    for name in ("gender", "age"):
        assert plain.evaluations[name].shares == tiny_lens.evaluate(base, name).shares
        expected = tiny_lens.evaluate(edited, name, reference=base)
        assert turned.evaluations[name].shares == expected.shares
        assert turned.evaluations[name].changes == expected.changes
    assert np.array_equal(plain.examples, base.images[:16])


def test_facts_name_everything_that_was_used(found: Audit, tiny_lens: DiffusionLens) -> None:
    text = " ".join(found.facts.values())
    manifest = tiny_lens.manifest
    for needed in (manifest.lens_id, manifest.sae_id, manifest.classifier_id, "DDIMScheduler, 4 steps", "500 to 523"):
        assert needed in text
    assert found.files == {name: seal.sha256 for name, seal in manifest.files.items()}


def test_classes_together_count_decided_images(found: Audit) -> None:
    unedited = next(c for c in found.crossings if c.edit is None)
    assert unedited.counts.shape == (2, 3)
    decided = sum(f.evaluations["gender"].n for f in found.findings if f.edit is None)
    assert 0 < unedited.counts.sum() <= decided


def test_pooled_shares_are_means_over_prompts(found: Audit) -> None:
    rows = {(p.attribute, p.label): p.estimate for p in found.pooled if p.edit is None}
    plain = [f for f in found.findings if f.edit is None]
    mean = np.mean([f.evaluations["gender"].shares[1].raw for f in plain])
    assert rows["gender", "male"].value == pytest.approx(mean)
    assert rows["gender", "male"].value + rows["gender", "female"].value == pytest.approx(1)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))


def test_page_is_self_contained_and_safe(found: Audit) -> None:
    text = render(found)
    page = Page()
    page.feed(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert "&lt;script&gt;" in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert len(page.images) == 4
    for image in page.images:
        assert str(image["src"]).startswith("data:image/webp;base64,") and "gender:" in str(image["alt"])
    for needed in ("A. Reviewer", "2026-01-02", *PROMPTS, "python -m diffusion_lens audit", "read as female"):
        assert needed in text
    assert render(found) == text


def test_an_assumed_error_is_called_so(found: Audit) -> None:
    words = "assumed to have no error, not measured"
    assert found.assumed == () and words not in render(found)
    guessed = replace(found, confusion={**found.confusion, "gender": ASSUMED * np.eye(2, dtype=np.int64)})
    assert guessed.assumed == ("gender",) and render(guessed).count(words) == 1


def test_files_hold_the_same_shares(found: Audit, tmp_path: Path) -> None:
    page, values, rows, measures = write_report(found, tmp_path / "new")
    assert page.read_text(encoding="utf-8") == render(found)
    stored = json.loads(values.read_text(encoding="utf-8"))
    lines = list(csv.DictReader(io.StringIO(rows.read_text(encoding="utf-8"))))
    assert len(lines) == 4 * (2 + 3 + 2)
    male = [line for line in lines if line["class"] == "male" and not line["edit"]]
    for line, finding in zip(male, found.findings[::2], strict=True):
        share = finding.evaluations["gender"].shares[1]
        assert (int(line["count"]), int(line["decided"])) == (share.count, share.n)
        assert float(line["corrected"]) == pytest.approx(share.corrected, abs=1e-6)
    assert stored["findings"][0]["evaluations"]["gender"]["shares"][1]["label"] == "male"
    table = list(csv.DictReader(io.StringIO(measures.read_text(encoding="utf-8"))))
    assert len(table) == 2 * len(found.discrepancies)
    for d, hard, soft in zip(found.discrepancies, table[::2], table[1::2], strict=True):
        assert (hard["measure"], soft["measure"]) == (f"FD {d.attribute}, hard", f"FD {d.attribute}, soft")
        assert (hard["prompt"], hard["pooled"]) == (d.prompt or "", "yes" if d.pooled else "no")
        assert float(hard["value"]) == pytest.approx(d.hard, rel=1e-5) and int(hard["n"]) == d.n_hard
        assert float(soft["floor"]) == pytest.approx(d.floor_soft, rel=1e-5) and hard["low"] == ""
    names = ["audit.csv", "audit.html", "audit.json", "measures.csv"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names


def test_table_defuses_formulas(found: Audit) -> None:
    from dataclasses import replace

    first = found.findings[0].measurement
    asked = replace(first.request, prompt="=1+1")
    tricky = replace(found, findings=(replace(found.findings[0], measurement=replace(first, request=asked)),))
    first = next(csv.DictReader(io.StringIO(table_text(tricky))))
    assert tuple(first) == COLUMNS and first["prompt"] == "'=1+1"


def test_prompts_must_be_given_once(tiny_lens: DiffusionLens) -> None:
    for prompts in ((), (PROMPTS[0], PROMPTS[0])):
        with pytest.raises(LensError, match="different prompts"):
            audit(tiny_lens, prompts, SEEDS)


def test_progress_counts_all_runs(tiny_lens: DiffusionLens) -> None:
    seen: list[float] = []
    audit(tiny_lens, PROMPTS, range(4), progress=Progress(lambda status: seen.append(status.share)))
    assert seen == pytest.approx([i / 8 for i in range(1, 9)])
