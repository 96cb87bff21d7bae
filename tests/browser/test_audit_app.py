"""The Audit tab in a real browser: from an empty page to a downloaded, verified report."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from audits import CPU, PROMPTS, save_images
from harness import marks, opened, served

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studies.audit.engine import Job, run_job
from diffusion_lens.studies.audit.freeze import freeze
from diffusion_lens.studies.audit.plan import read_plan
from diffusion_lens.studies.audit.record import read_record
from diffusion_lens.studies.audit.report import write_report
from diffusion_lens.studies.audit.verify import verify
from diffusion_lens.studio.audit import FOLDER_VARIABLE, links_of

PATIENCE = 180_000

pytestmark = marks


@pytest.fixture
def page(tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The app on the tiny lens, its Audit tab looked at; audits lie in ``tmp_path``."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "audits"))
    with served(tiny_lens) as address, opened(address, PATIENCE) as tab:
        tab.get_by_role("tab", name="Audit").click()
        tab.wait_for_selector("#dl-audit-start")
        yield tab


def step(page: Any, name: str) -> None:
    """Go on to the next step by its button."""
    page.get_by_role("button", name=f"Next: {name}").click()


def downloaded(page: Any, folder: Path) -> Path:
    """The downloaded report, unpacked."""
    with page.expect_download() as waiting:
        page.locator("#dl-audit-download").click()
    waiting.value.save_as(folder / "audit.zip")
    with zipfile.ZipFile(folder / "audit.zip") as archive:
        archive.extractall(folder)
    return folder / "audit"


def run(page: Any) -> None:
    """Start, and wait until the report is whole."""
    page.locator("#dl-audit-start").click()
    page.locator("#dl-audit-status").get_by_text("Done.").wait_for()


def test_from_an_empty_page_to_a_verified_report(page: Any, tmp_path: Path) -> None:
    page.locator("#dl-audit-prompts textarea").fill("\n".join(PROMPTS))
    step(page, "against what")
    step(page, "steering")
    page.get_by_label("Recommended steering").check()
    step(page, "how many")
    page.get_by_label("± 14 points").check()
    page.locator("#dl-audit-outline").get_by_text("images, about").wait_for()
    run(page)
    frame = page.frame_locator("#dl-audit-page iframe")
    frame.get_by_text("not signed").wait_for()
    folder = downloaded(page, tmp_path)
    record = read_record(folder / "audit.json")
    assert record.prompts == tuple(PROMPTS) and len(record.plan.edits) == 2
    assert verify(record, folder, options=CPU, sample=4).holds
    planned = freeze(read_plan(folder / "plan.json"), folder, CPU)
    job = Job(planned, tmp_path / "again")
    run_job(job)
    write_report(job, links=links_of(planned))
    assert json.loads((job.folder / "audit.json").read_text()) == json.loads((folder / "audit.json").read_text())


def test_people_read_by_keyboard_and_the_report_is_signed(page: Any, tmp_path: Path) -> None:
    page.locator("#dl-audit-prompts textarea").fill(PROMPTS[0])
    step(page, "against what")
    step(page, "steering")
    step(page, "how many")
    page.get_by_label("± 14 points").check()
    step(page, "who reads")
    run(page)
    page.get_by_text("Read them here").click()
    page.get_by_label("Your name or initials").fill("A. R.")
    page.locator("#dl-audit-load").click()
    first = page.locator("#dl-audit-grid fieldset").first
    first.wait_for()
    assert page.locator("#dl-audit-grid fieldset").count() >= 32
    first.focus()
    for key in "12" * 16:
        page.keyboard.press(key)
    page.locator(".dl-blind-count").get_by_text("32 of").wait_for()
    page.locator(".dl-blind-save").click()
    page.locator("#dl-audit-agreement").get_by_text("Cohen's κ").wait_for()
    step(page, "sign")
    page.get_by_label("Reviewer", exact=True).fill("A. Reviewer")
    page.locator("#dl-audit-sign").click()
    page.locator("#dl-audit-status").get_by_text("Signed.").wait_for()
    page.frame_locator("#dl-audit-page iframe").get_by_text("signed by A. Reviewer").wait_for()
    record = read_record(downloaded(page, tmp_path) / "audit.json")
    assert record.plan.sign.reviewer == "A. Reviewer" and record.people["raters"] == "A. R."
    assert verify(record, tmp_path, options=CPU, sample=0).holds


def test_a_folder_of_images(page: Any, tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    images = tiny_lens.generate(PROMPTS[0], seeds=range(12), batch_size=4).images
    table = save_images(tmp_path / "made", images, ["made elsewhere"])
    page.get_by_label("images of my own").check()
    page.locator("#dl-audit-files input[type=file]").set_input_files(
        [str(p) for p in sorted(table.parent.glob("*.png"))] + [str(table)]
    )
    page.locator("#dl-audit-outline").get_by_text("12 images").wait_for()
    run(page)
    record = read_record(downloaded(page, tmp_path) / "audit.json")
    assert record.prompts == ("made elsewhere",) and len(record.cells[0].seeds) == 12
