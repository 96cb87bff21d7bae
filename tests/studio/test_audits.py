"""Audits of the app without the app: plans, caps, uploads, runs that are stopped and taken up again, signatures."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from audits import PROMPTS, save_images

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studies.audit.plan import images_for_precision
from diffusion_lens.studies.audit.record import read_record
from diffusion_lens.studies.audit.verify import verify
from diffusion_lens.studio import audit
from diffusion_lens.studio.audit import FOLDER_VARIABLE, Wish
from diffusion_lens.studio.studio import Studio

WISH = Wish(prompts="\n".join(PROMPTS), precision=30.0, blind=8, attributes=("gender",))


@pytest.fixture
def studio(tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "audits"))
    return Studio(tiny_lens)


def test_an_outline_counts_what_is_drawn(studio: Studio) -> None:
    found = audit.outline(studio, replace(WISH, steer=True, attribute="gender", target="male", beta=3.0, rewrite=True))
    assert found.images == found.per_prompt * 2 * 4 and not found.too_large  # unedited, steered, control, rewritten
    assert audit.outline(studio, replace(WISH, precision=3.0)).images == 2 * images_for_precision(3)
    assert "more than the 6,000" in audit.outline(studio, replace(WISH, precision=1.0)).too_large
    with pytest.raises(LensError, match="Use the command"):
        audit.begin(studio, replace(WISH, precision=1.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": " \n"}, "Write one prompt or more"),
        ({"prompts": "a zebra"}, "zebra"),
        ({"prompts": "\n".join(f"a portrait of a doctor {'x' * i}" for i in range(50))}, "up to 40 prompts"),
        ({"against": "table", "table": ""}, "Write the reference table"),
        (
            {"against": "table", "table": "attribute,class,share,source\ngender,male,1,\n"},
            "The reference table, line 2",
        ),
        ({"what": "images"}, "Upload the images"),
        ({"what": "images", "files": ("a.exe",)}, "a.exe is neither an image nor a CSV"),
    ],
)
def test_mistakes_are_one_sentence(change: dict[str, object], said: str, studio: Studio) -> None:
    with pytest.raises(LensError, match=said):
        audit.begin(studio, replace(WISH, **change))  # type: ignore[arg-type]
    assert not list(audit.audits_folder().glob("*"))


def test_a_run_is_stopped_taken_up_signed_and_verified(studio: Studio, tmp_path: Path) -> None:
    name = audit.begin(studio, WISH)
    events = audit.run_events(studio, "me", name)
    for news in events:
        if news.page:
            assert "Under way: 1 of 2 prompts" in news.page
            studio.stops.stop("me:audit")
            break
    with pytest.raises(Cancelled):
        list(events)
    kept = {path.name: path.stat().st_mtime_ns for path in (audit.folder_of(name) / "work").glob("*.safetensors")}
    with pytest.raises(LensError, match="not finished"):
        audit.sign(studio, name, {"reviewer": "R"})
    *_, last = audit.run_events(Studio(studio.lens), "me again", name)
    assert last.done and "not signed" in last.page
    assert (
        kept.items()
        <= {
            path.name: path.stat().st_mtime_ns for path in (audit.folder_of(name) / "work").glob("*.safetensors")
        }.items()
    )
    before = read_record(audit.folder_of(name) / "audit.json")
    page, files = audit.sign(studio, name, {"reviewer": "R <b>", "notes": "seen"})
    assert "signed by R &lt;b&gt;" in page
    with zipfile.ZipFile(files) as archive:
        archive.extractall(tmp_path)
    record = read_record(tmp_path / "audit" / "audit.json")
    assert record.plan_sha256 == before.plan_sha256 and record.plan.sign.notes == "seen"
    assert verify(record, tmp_path, sample=0).holds


def test_people_answer_and_are_told_how_far_they_agree(studio: Studio) -> None:
    name = audit.begin(studio, WISH)
    list(audit.run_events(studio, "me", name))
    blind = audit.blind_of(studio, name)
    assert [number for number, _ in blind.images] == list(range(8)) and blind.attributes[0].name == "gender"
    n, told = audit.answer(studio, name, "A", "gender", {str(i): ("female", "male")[i % 2] for i in range(8)})
    assert n == 8 and "Cohen's κ of A and the judge" in told
    for rater, answers, said in [
        (" ", {"0": "male"}, "Write your name"),
        ("A", {"99": "male"}, "not of this audit's images"),
        ("A", {"0": "robot"}, "not of this audit's images"),
        ("A", {"../x": "male"}, "not of this audit's images"),
    ]:
        with pytest.raises(LensError, match=said):
            audit.answer(studio, name, rater, "gender", answers)


def test_uploaded_images_are_audited(studio: Studio, tmp_path: Path) -> None:
    images = studio.lens.generate(PROMPTS[0], seeds=range(6), batch_size=4).images
    table = save_images(tmp_path / "made", images, ["made elsewhere"])
    files = tuple(str(path) for path in sorted(table.parent.iterdir()))
    name = audit.begin(studio, Wish(what="images", files=files, attributes=("gender",)))
    *_, last = audit.run_events(studio, "me", name)
    assert last.done and "made elsewhere" in last.page
    twice = (*files, str(tmp_path / "again" / "0.png"))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "0.png").write_bytes(np.zeros(4).tobytes())
    with pytest.raises(LensError, match=r"called 0\.png"):
        audit.begin(studio, Wish(what="images", files=twice))


@pytest.mark.parametrize("name", ["", "../../etc", "0" * 16, "ZZ"])
def test_a_foreign_id_is_refused(name: str, studio: Studio) -> None:
    with pytest.raises(LensError, match="no audit of this id"):
        audit.folder_of(name)
