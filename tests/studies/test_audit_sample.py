"""The sample report in docs: its numbers follow from its readings, and it is of the plan beside it."""

from __future__ import annotations

from pathlib import Path

from audits import CPU

from diffusion_lens.studies.audit.freeze import freeze
from diffusion_lens.studies.audit.plan import read_plan
from diffusion_lens.studies.audit.record import read_record
from diffusion_lens.studies.audit.verify import check_numbers, check_seals

DOCS = Path(__file__).resolve().parents[2] / "docs" / "audit"


def test_the_sample_holds_and_is_of_todays_plan_and_lens() -> None:
    record = read_record(DOCS / "sample" / "audit.json")
    assert [check.what for check in [*check_seals(record), *check_numbers(record)] if not check.holds] == []
    planned = freeze(read_plan(DOCS / "plan.toml"), DOCS, CPU)
    assert planned.plan.digest == record.plan_sha256, "run: python -m diffusion_lens audit docs/audit/plan.toml …"
    assert (DOCS / "sample" / "audit.html").stat().st_size < 3_000_000
