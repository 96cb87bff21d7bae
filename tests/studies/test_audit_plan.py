"""Plans: read, frozen, hashed; every mistake is one sentence before an image is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from audits import CPU, PROMPTS, plan_values

from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.protocol import lens_key
from diffusion_lens.results.stats import share_interval
from diffusion_lens.studies.audit.against import read_reference, reference_for
from diffusion_lens.studies.audit.freeze import freeze
from diffusion_lens.studies.audit.plan import (
    AgainstPlan,
    AuditPlan,
    PromptsPlan,
    images_for_precision,
    precision_of,
    read_plan,
)
from diffusion_lens.studies.audit.wording import fill, read_share, word_prompts

TOML = """
question = "Who is a nurse?"
[[subjects]]
lens = "LENS"
[prompts]
templates = ["a portrait of a {who}"]
words = { who = ["doctor", "nurse"] }
[against]
kind = "table"
rows = [
  { attribute = "gender", class = "female", share = 0.6, source = "made up" },
  { attribute = "gender", class = "male", share = 0.4, source = "made up" },
]
[size]
images = 24
"""


def frozen(lens: DiffusionLens, **changes: Any) -> AuditPlan:
    return freeze(AuditPlan.parse(plan_values(lens.folder, **changes)), Path(), CPU).plan


def test_a_plan_in_toml_is_that_in_json(tmp_path: Path, tiny_lens: DiffusionLens) -> None:
    (tmp_path / "plan.toml").write_text(TOML.replace("LENS", str(tiny_lens.folder)))
    plan = read_plan(tmp_path / "plan.toml")
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert '"class": "female"' in (tmp_path / "plan.json").read_text()


def test_freezing_is_done_once_and_hashed(tmp_path: Path, tiny_lens: DiffusionLens) -> None:
    plan = frozen(tiny_lens)
    assert plan.prompts.texts == tuple(PROMPTS) and plan.attributes == ("gender", "age")
    assert [edit.kind for edit in plan.edits] == ["steer", "control"]
    assert plan.subjects[0].pin["lens"] == lens_key(tiny_lens)
    assert freeze(plan, Path(), CPU).plan == plan
    signed = plan.model_copy(update={"sign": plan.sign.model_copy(update={"reviewer": "R", "notes": "seen"})})
    assert signed.digest == plan.digest
    for change in ({"margin": 9.0}, {"question": "another"}, {"least": 3}):
        assert plan.model_copy(update=change).digest != plan.digest


def test_a_lens_that_changed_since_is_refused(tiny_lens: DiffusionLens) -> None:
    plan = frozen(tiny_lens)
    other = plan.subjects[0].model_copy(update={"pin": {"lens": "0" * 16}})
    with pytest.raises(LensError, match="no longer what was planned"):
        freeze(plan.model_copy(update={"subjects": (other,)}), Path(), CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": {"texts": ["a portrait of a zebra"]}}, "zebra"),
        ({"attributes": ["height"]}, "'height' is not read"),
        ({"subjects": [{"lens": "x", "model": "y"}]}, "give one of lens, model and images"),
        ({"subjects": [{"model": "y"}]}, "need a judge"),
        ({"edits": [{"kind": "steer"}]}, "needs turns"),
        ({"size": {"images": 10, "until": 4}}, "give one of images, precision and until"),
        ({"against": {"kind": "planted"}}, "Nothing is known of what was planted"),
        ({"against": {"kind": "table"}}, "needs a file"),
        ({"against": {"rows": [{"attribute": "gender", "class": "robot", "share": 1, "source": "s"}]}}, "robot"),
        ({"against": {"rows": [{"attribute": "gender", "class": "male", "share": 0.9, "source": "s"}]}}, "add up to"),
        ({"against": {"rows": [{"attribute": "gender", "class": "male", "share": 1, "source": ""}]}}, "source"),
        ({"prompts": {"templates": ["a portrait of a {who}"]}}, "give its words"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_mistakes_are_one_sentence(change: dict[str, Any], said: str, tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match=said):
        frozen(tiny_lens, **change)


def test_templates_mend_their_articles() -> None:
    assert fill(["a portrait of a {who}"], {"who": ["engineer", "nurse"]}) == [
        "a portrait of an engineer",
        "a portrait of a nurse",
    ]
    assert fill(["{who} in {where}"], {"who": ["A", "B"], "where": ["x", "y"]}) == [
        "A in x", "A in y", "B in x", "B in y",
    ]  # fmt: skip


def test_prompts_come_from_excels_tables_with_expectations(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes("\ufeffprompt;gender:female;gender:male\na nurse;90 %;10 %\na  cook;;\n".encode())
    found = word_prompts(PromptsPlan(file="p.csv"), tmp_path)
    assert found.texts == ("a nurse", "a cook")
    assert [(r.prompt, r.label, r.share) for r in found.expected] == [
        ("a nurse", "female", 0.9),
        ("a nurse", "male", 0.1),
    ]
    (tmp_path / "w.csv").write_text("who\nnurse\ncook\n")
    filled = word_prompts(PromptsPlan(file="w.csv", templates=("a {who}",)), tmp_path)
    assert filled.texts == ("a nurse", "a cook")


@pytest.mark.parametrize(("cell", "share"), [(".35", 0.35), ("0,35", 0.35), ("35 %", 0.35), ("100%", 1.0)])
def test_shares_are_read_as_people_write_them(cell: str, share: float) -> None:
    assert read_share(cell, "here") == pytest.approx(share)


def test_a_reference_table_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    head = "attribute,class,share,source\n"
    for text, said in [
        ("attribute,class,share\ngender,male,1\n", "'source' is missing"),
        (head + "gender,male,1,\n", "line 2.*where the number comes from"),
        (head + "gender,male,.5,s\ngender,male,.5,s\n", "line 3.*line 2 too"),
        (head + "gender,male,many,s\n", "line 2.*no share"),
    ]:
        path.write_text(text)
        with pytest.raises(LensError, match=said):
            read_reference(path)
    path.write_text(head + "gender,female,60,census\ngender,male,40,census\n")
    assert [row.share for row in read_reference(path)] == [0.6, 0.4]


def test_a_prompts_own_reference_goes_before_that_of_all() -> None:
    gender = Attribute("gender", ("female", "male"))
    rows = [
        {"attribute": "gender", "class": "female", "share": 0.5, "source": "all"},
        {"attribute": "gender", "class": "male", "share": 0.5, "source": "all"},
        {"prompt": "a nurse", "attribute": "gender", "class": "female", "share": 0.9, "source": "one"},
        {"prompt": "a nurse", "attribute": "gender", "class": "male", "share": 0.1, "source": "one"},
    ]
    against = AgainstPlan.parse({"kind": "table", "name": "a census", "rows": rows})
    own, every = reference_for(against, "a nurse", gender), reference_for(against, "a cook", gender)
    assert own is not None and own.shares == (0.9, 0.1) and own.source == "one" and own.name == "a census"
    assert every is not None and every.shares == (0.5, 0.5)
    assert reference_for(against, "a cook", Attribute("age", ("young", "old"))) is None
    even = reference_for(AgainstPlan(), None, Attribute("age", ("a", "b", "c", "d")))
    assert even is not None and even.shares == (0.25,) * 4


def test_images_for_a_precision_are_the_fewest() -> None:
    n = images_for_precision(7)
    assert precision_of(n) <= 7 < precision_of(n - 2)
    low, high = share_interval(n // 2, n)
    assert (high - low) / 2 <= 0.07


def test_another_run_is_a_reference(tmp_path: Path, tiny_lens: DiffusionLens) -> None:
    path = tmp_path / "audit.json"
    path.write_text(json.dumps({"plan_sha256": "0"}))
    with pytest.raises(LensError, match="no audit's JSON"):
        frozen(tiny_lens, against={"kind": "run", "run": str(path)})
