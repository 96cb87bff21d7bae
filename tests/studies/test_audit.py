"""The engine and the record: the same numbers as ``measure``, pieces shared by processes, tampering found."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audits import CPU, PROMPTS, job_of, plan_values, save_images
from PIL import Image

from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results import stats
from diffusion_lens.studies.audit.engine import Job, Unit, mean_colours, pixel_digest, run_job
from diffusion_lens.studies.audit.figures import difference, record_of, word_of
from diffusion_lens.studies.audit.freeze import freeze
from diffusion_lens.studies.audit.people import people_of, save_answers, write_sheet
from diffusion_lens.studies.audit.plan import AuditPlan
from diffusion_lens.studies.audit.record import AuditRecord, read_record
from diffusion_lens.studies.audit.report import FILES, write_report
from diffusion_lens.studies.audit.tables import bibtex, model_card, schema
from diffusion_lens.studies.audit.verify import check_numbers, check_seals, verify

ROOT = Path(__file__).resolve().parents[2]
UNEDITED = "unedited"


@pytest.fixture(scope="module")
def done(tiny_lens: DiffusionLens, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A finished audit of two prompts, an edit and its control."""
    job = job_of(tiny_lens, tmp_path_factory.mktemp("audit"))
    run_job(job)
    return job


@pytest.fixture(scope="module")
def record(done: Job) -> AuditRecord:
    return write_report(done)[0]


def test_shares_are_those_of_the_lens(record: AuditRecord, tiny_lens: DiffusionLens) -> None:
    drawn = tiny_lens.generate(PROMPTS[1], seeds=range(24), batch_size=4)
    edited = tiny_lens.generate(drawn.request, tiny_lens.intervention("gender", "male", 3.0), batch_size=4)
    for edit, made in ((UNEDITED, drawn), (record.plan.edits[0].name, edited)):
        rows = [r for r in record.shares if (r.prompt, r.edit, r.attribute) == (PROMPTS[1], edit, "gender")]
        for row, share in zip(rows, tiny_lens.evaluate(made, "gender").shares, strict=True):
            assert (row.count, row.decided, row.undecided) == (share.count, share.n, share.n_uncertain)
            assert row.corrected == pytest.approx(share.corrected, rel=1e-8)
            assert row.difference == pytest.approx(share.corrected - 0.5, rel=1e-8)
    cell = next(c for c in record.cells if (c.prompt, c.edit) == (PROMPTS[1], UNEDITED))
    assert cell.pixels == tuple(bytes(pixel_digest(image)).hex() for image in drawn.images)


def test_words_follow_the_rule() -> None:
    assert word_of(0.11, 0.2, 0.1) == "far" and word_of(-0.3, -0.101, 0.1) == "far"
    assert word_of(-0.1, 0.1, 0.1) == "near" and word_of(0.05, 0.15, 0.1) == "can't tell"
    assert difference(0.5, (0.4, 0.6), 0.2, None) == pytest.approx((0.2, 0.4))
    assert difference(0.5, (0.4, 0.6), 0.2, (0.1, 0.3)) == pytest.approx((0.3 - 0.02**0.5, 0.3 + 0.02**0.5))


def test_page_one_speaks_of_all_classes(record: AuditRecord) -> None:
    ages = [v for v in record.verdicts if v.attribute == "age"]
    assert len(ages) == 2
    for verdict in ages:
        for point in verdict.points:
            words = {
                r.word for r in record.shares
                if (r.prompt, r.edit, r.attribute) == (verdict.prompt, point.edit, "age")
            }  # fmt: skip
            expected = "far" if "far" in words else "near" if words == {"near"} else "can't tell"
            assert point.word == expected


def test_crossings_hold_every_decided_image_once(record: AuditRecord, done: Job) -> None:
    rows = [r for r in record.crossings if r.pooled and r.edit == UNEDITED]
    assert len(rows) == 6 and {r.decided for r in rows} == {sum(r.count for r in rows)}
    cells = [c for c in done.cells() if c.edit == 0]
    both = sum(
        int((c.measurement["gender"].certain & c.measurement["age"].certain).sum()) for c in cells
    )  # fmt: skip
    assert rows[0].decided == both
    assert all(r.small == (r.count < 10) for r in record.crossings)


def test_a_control_stands_beside_the_edit(record: AuditRecord) -> None:
    edits = {row.edit: row.control for row in record.changes}
    assert list(edits.values()) == [False, True]
    assert all(row.steered == (row.attribute == "gender") for row in record.changes)


def test_report_holds_together(record: AuditRecord, done: Job) -> None:
    text = (done.folder / "audit.html").read_text()
    assert not re.search(r"https?://|<script", text)
    assert len(text) < 3_000_000 and text.count("<img ") == 2 * 3 * 16
    for needed in ("equal shares", record.plan_sha256[:12], "not signed", "left empty", "random features", "small"):
        assert needed in text
    for name in FILES:
        assert (done.folder / name).is_file()


def test_tables_are_safe_and_whole(record: AuditRecord, done: Job) -> None:
    rows = list(csv.DictReader(io.StringIO((done.folder / "audit.csv").read_text())))
    assert len(rows) == len(record.shares)
    assert {"undecided", "invalid", "against"} <= set(rows[0])
    images = list(csv.DictReader(io.StringIO((done.folder / "images.csv").read_text())))
    assert len(images) == 2 * 3 * 24
    plan = record.plan.model_copy(update={"title": "=HYPERLINK(1)"})
    assert "=HYPERLINK" in bibtex(record.model_copy(update={"plan": plan}))
    odd = record.shares[0].model_copy(update={"source": "=cmd()", "against": "@x"})
    from diffusion_lens.studies.audit.tables import shares_csv

    assert "'=cmd()" in shares_csv(record.model_copy(update={"shares": (odd,)}))
    assert "## Bias, Risks, and Limitations" in model_card(record)


def test_the_record_comes_back(record: AuditRecord, done: Job) -> None:
    assert read_record(done.folder / "audit.json") == record
    assert all(check.holds for check in [*check_seals(record), *check_numbers(record)])


def test_schemas_are_the_published_ones() -> None:
    for which in ("plan", "report"):
        assert (ROOT / "docs" / "audit" / f"{which}.schema.json").read_text(encoding="utf-8") == schema(which), (
            f"run: python -m diffusion_lens audit --schema {which} > docs/audit/{which}.schema.json"
        )


def test_a_second_run_draws_nothing(done: Job, tiny_lens: DiffusionLens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "make", lambda *_: pytest.fail("drew a piece again"))
    run_job(job_of(tiny_lens, done.folder))


def test_another_plan_in_the_same_folder_is_refused(done: Job, tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match="plan has changed since this audit began"):
        job_of(tiny_lens, done.folder, margin=5.0)


def tampered(record: AuditRecord, path: str, value: Any) -> AuditRecord:
    values = json.loads(json.dumps(record.plain()))
    *parts, last = path.split("/")
    place = values
    for part in parts:
        place = place[int(part) if part.isdigit() else part]
    place[int(last) if last.isdigit() else last] = value
    return AuditRecord.parse(values)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("cells/0/seeds/3", 77, "seeds"),
        ("shares/0/corrected", 0.123, "shares"),
        ("shares/0/count", 0, "shares"),
        ("plan_sha256", "0" * 64, "plan's hash"),
        ("plan/margin", 20.0, "plan's hash"),
        ("content_sha256", "0" * 64, "content's hash"),
        ("verdicts/0/points/0/word", "near", "page one"),
        ("limits/0", "all is well", "content's hash"),
    ],
)
def test_verify_finds_what_was_altered(record: AuditRecord, path: str, value: Any, what: str) -> None:
    changed = tampered(record, path, value)
    if changed == record:
        pytest.skip("the value is the same")
    found = verify(changed, Path(), sample=0)
    assert not found.holds
    assert what in {check.what for check in found.checks if not check.holds}


def test_verify_draws_a_sample_again(record: AuditRecord) -> None:
    found = verify(record, Path(), options=CPU, sample=5, seed=3)
    assert found.holds and "5 of 5 alike to the last bit" in found.checks[-2].found
    moved = [(c, row) for c in range(len(record.cells)) for row in range(24)]
    chosen = moved[int(np.random.default_rng(3).permutation(len(moved))[0])]
    cell = record.cells[chosen[0]]
    tiny = "A" * len(cell.tiny)
    forged = record.model_copy(
        update={
            "cells": tuple(
                c.model_copy(update={"tiny": tiny}) if i == chosen[0] else c for i, c in enumerate(record.cells)
            )
        }
    ).sealed()
    found = verify(forged, Path(), options=CPU, sample=1, seed=3)
    assert [check.what for check in found.checks if not check.holds] == ["pixels"]


def test_people_measure_the_judges_error(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    job = job_of(tiny_lens, tmp_path, readers={"blind": 60}, edits=[])
    run_job(job)
    assert people_of(job) is None
    sheet = write_sheet(job, job.planned.attributes)
    assert people_of(job) is None and len(list(sheet.parent.glob("*.png"))) == 48
    cells = {(c.subject, c.prompt, c.edit): c for c in job.cells()}
    read = [cells[key].measurement["gender"] for key, _ in job.blind]
    labels = [figures.labels[row] for figures, (_, row) in zip(read, job.blind, strict=True)]
    right = {i: {"gender": ("female", "male")[label]} for i, label in enumerate(labels)}
    wrong = {i: {"gender": ("female", "male")[label ^ (i % 6 == 0)]} for i, label in enumerate(labels)}
    save_answers(job, "A", right, job.planned.attributes)
    save_answers(job, "B", wrong, job.planned.attributes)
    save_answers(job, "C", right, job.planned.attributes)
    people = people_of(job)
    assert people is not None
    kinds = [(a.kind, a.readers) for a in people.agreement]
    assert ("Fleiss", ("A", "B", "C")) in kinds and ("Cohen", ("A", "B")) in kinds
    own = next(a for a in people.agreement if a.readers == ("A", "B"))
    assert own.n == 48 and own.differ == 8
    found = record_of(job, people)
    table = np.array(found.subjects[0].error["gender"].counts)
    certain = [bool(f.certain[row]) for f, (_, row) in zip(read, job.blind, strict=True)]
    assert table.sum() == sum(certain) and np.trace(table) == table.sum()
    source = found.subjects[0].error["gender"].source
    assert source == ("people in this audit" if table.sum(axis=1).min() >= stats.MIN_LABELLED else "labelled images")


def test_labels_with_mistakes_name_the_line(tiny_lens: DiffusionLens, done: Job, tmp_path: Path) -> None:
    path = tmp_path / "labels-x.csv"
    for text, said in [
        ("file,gender\n00099.png,male\n", "none of the 12 images"),
        ("file,gender\n00001.png,robot\n", "line 2: 'robot' is no gender"),
        ("name,gender\n1,male\n", "column 'file'"),
        ("file,rater,gender\n00001.png,A,male\n00001.png,A,male\n", "line 3: A has answered"),
    ]:
        path.write_text(text)
        with pytest.raises(LensError, match=said):
            people_of(done, [path])


def test_until_stops_alike_for_all_and_holds_its_intervals(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    size = {"until": 30, "most": 64, "batch_size": 4}
    job = job_of(tiny_lens, tmp_path, size=size, edits=[], attributes=["gender"])
    run_job(job)
    found = record_of(job)
    ns = {c.prompt: len(c.seeds) for c in found.cells}
    assert all(n % 8 == 0 and n < 64 for n in ns.values())
    for row in found.shares:
        if row.attribute == "gender":
            assert row.high - row.low <= 0.6 + 1e-9
            low, high = stats.share_interval(row.count, row.decided)
            assert row.low <= low and high <= row.high
    assert all(check.holds for check in [*check_seals(found), *check_numbers(found)])


def test_images_made_elsewhere_are_read_the_same(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    drawn = np.concatenate([tiny_lens.generate(p, seeds=range(12), batch_size=4).images for p in PROMPTS])
    mixed = drawn.reshape(2, 12, *drawn.shape[1:]).swapaxes(0, 1).reshape(drawn.shape)
    save_images(tmp_path / "made", mixed, PROMPTS)
    values = plan_values(tiny_lens.folder, edits=[], size={}, against={})
    values["subjects"] = [{"images": "made", "judge": str(tiny_lens.folder), "name": "elsewhere"}]
    del values["prompts"]
    job = Job(freeze(AuditPlan.parse(values), tmp_path, CPU), tmp_path / "out")
    run_job(job)
    found = record_of(job)
    for prompt in PROMPTS:
        expected = tiny_lens.evaluate(tiny_lens.generate(prompt, seeds=range(12), batch_size=4), "gender").shares
        rows = [r for r in found.shares if (r.prompt, r.attribute) == (prompt, "gender")]
        assert [r.count for r in rows] == [s.count for s in expected]
    assert verify(found, tmp_path, options=CPU, sample=6).holds


def test_odd_images_are_counted_and_said(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.fromarray(noise).convert("CMYK").save(folder / "b.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "c.png")
    Image.fromarray(noise[:1, :1]).save(folder / "d.png")
    (folder / "e.png").write_bytes(b"\x89PNG broken")
    Image.fromarray(noise).save(folder / "f.gif", save_all=True, append_images=[Image.fromarray(255 - noise)])
    Image.fromarray(np.dstack([noise, noise[..., :1]])).save(folder / "g.png")
    values = plan_values(tiny_lens.folder, edits=[], size={}, prompts={}, readers={"blind": 0})
    values["subjects"] = [{"images": str(folder), "judge": str(tiny_lens.folder)}]
    job = Job(freeze(AuditPlan.parse(values), tmp_path, CPU), tmp_path / "out")
    run_job(job)
    found, _ = write_report(job)
    row = next(r for r in found.shares if r.attribute == "gender")
    assert (row.images, row.invalid) == (7, 2) and row.decided + row.undecided == 7
    assert all(r.word == "can't tell" for r in found.shares if r.attribute == "gender")
    said = " ".join(found.subjects[0].said)
    assert "e.png" in said and "f.gif: it has 2 frames" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name\na.png\n", "column 'file'"),
        ("file\na.png\na.png\n", "line 3: a.png stands in line 2 too"),
        ("file,seed\na.png,1\nb.png,1\n", "line 3: seed 1"),
        ("file,seed\na.png,one\n", "'one' is no seed"),
        ("file\n../a.png\n", "outside"),
        ("file\n", "names no image"),
    ],
)
def test_tables_of_images_name_the_line(text: str, said: str, tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text(text)
    values = plan_values(tiny_lens.folder, edits=[], prompts={})
    values["subjects"] = [{"images": str(tmp_path), "judge": str(tiny_lens.folder)}]
    with pytest.raises(LensError, match=said):
        freeze(AuditPlan.parse(values), tmp_path, CPU)


def test_models_of_one_table_stand_side_by_side(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    images = tiny_lens.generate(PROMPTS[0], seeds=range(12), batch_size=4).images
    folder = tmp_path / "two"
    save_images(folder, images, [PROMPTS[0]])
    lines = (folder / "images.csv").read_text().splitlines()
    rows = [f"{line},{'A' if i % 2 else 'B'}" for i, line in enumerate(lines[1:])]
    (folder / "images.csv").write_text("\n".join(["file,prompt,seed,model", *rows]))
    values = plan_values(tiny_lens.folder, edits=[], prompts={}, size={})
    values["subjects"] = [{"images": str(folder), "judge": str(tiny_lens.folder)}]
    job = Job(freeze(AuditPlan.parse(values), tmp_path, CPU), tmp_path / "out")
    run_job(job)
    found = record_of(job)
    assert [s.name for s in found.subjects] == ["B", "A"]
    row = next(r for r in found.side_by_side if r.label == "female")
    first, second = (
        next(r.corrected for r in found.shares if (r.subject, r.label) == (name, "female")) for name in "BA"
    )
    assert first is not None and second is not None
    assert row.difference == pytest.approx(second - first, abs=1e-8)


def command(plan: Path, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "diffusion_lens", "audit", str(plan), "--out", str(out), "--device", "cpu"]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_make_the_record_of_one(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    """A killed worker's claim ends with it, and what two make together is what one makes, to the last byte."""
    plan, alone, out = tmp_path / "plan.json", tmp_path / "alone", tmp_path / "out"
    plan.write_text(json.dumps(plan_values(tiny_lens.folder)))
    (out / "work" / "claims").mkdir(parents=True)
    (out / "work" / "claims" / f"{Unit(0, 0, 0, 0).key}.lock").touch()  # as a killed process leaves it
    # all of them processes of their own: the last bits of a run depend on what a process has loaded before
    for started in ([command(plan, alone)], [command(plan, out), command(plan, out)]):
        told = [process.communicate(timeout=280) for process in started]
        assert not any(process.returncode for process in started), told
    mine, theirs = ((folder / "audit.json").read_bytes() for folder in (alone, out))
    one, other = json.loads(mine), json.loads(theirs)
    for values in (one, other):  # another day may have begun
        values["date"] = values["provenance"]["Plan"] = values["content_sha256"] = ""
        values["links"] = {}
    assert one == other
    assert not list((out / "work").glob("*.partial*"))


def test_mean_colours_and_digests() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4, :4] = 200
    assert mean_colours(image)[0, 0].tolist() == [200, 200, 200] and mean_colours(image)[3, 3].tolist() == [0, 0, 0]
    assert not np.array_equal(pixel_digest(image), pixel_digest(image.reshape(4, 16, 3)))


def test_rewritten_prompts_need_no_lens(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    edits = [{"kind": "rewrite", "attribute": "gender", "shares": {"female": 1.0}}]
    job = job_of(tiny_lens, tmp_path, edits=edits, size={"images": 4, "batch_size": 4}, prompts={"texts": PROMPTS[:1]})
    run_job(job)
    cell = next(c for c in job.cells() if c.edit == 1)
    asked = tiny_lens.generate("a portrait of a female doctor", seeds=range(4), batch_size=4)
    assert np.array_equal(cell.pixels, [pixel_digest(image) for image in asked.images])


def test_references_to_other_measurements_are_kept(done: Job) -> None:
    edited = next(c for c in done.cells() if c.edit == 1)
    assert edited.measurement.reference is not None and edited.measurement.agreement
    assert replace(edited.measurement, reference=None).agreement == {}
