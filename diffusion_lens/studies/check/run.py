"""``check``: does a lens do what the project claims? Every claim measured on seeds that nothing was chosen on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studies.check.result import CheckReport, Row, Unit, show
from diffusion_lens.studies.check.runs import FIRST_SEED, FULL, QUICK, Job, OnRows, OnStage, Sizes, refuse_shared_seeds

PARTS = (1, 2, 3, 4, 5)
TITLES = {
    1: "generated against planted shares",
    2: "classifier",
    3: "sparse autoencoder",
    4: "attribution",
    5: "sweep over β",
}


def run_check(
    lens: DiffusionLens,
    *,
    full: bool = False,
    parts: Sequence[int] = PARTS,
    sizes: Sizes | None = None,
    first_seed: int = FIRST_SEED,
    on_stage: OnStage | None = None,
    on_rows: OnRows | None = None,
) -> CheckReport:
    """Measure the rows of ``parts`` on a lens.

    Args:
        full: the large sizes, and every row must hold; otherwise no row may fail (see ``Row.verdict``).
        sizes: replace the sizes that belong to ``full``.
        on_stage: called with (stage, done, total); may raise to stop.
        on_rows: called with rows as soon as they are measured; of part 5, with every prompt's own.

    Raises:
        LensError: an unknown part, or a lens that was fitted or chosen on the check's seeds.
    """
    strange = [part for part in parts if part not in PARTS]
    if strange or not parts:
        raise LensError(f"A check has the parts {', '.join(map(str, PARTS))}; got {list(parts)}.")
    refuse_shared_seeds(lens, first_seed)
    begun = time.monotonic()
    job = Job(lens, sizes or (FULL if full else QUICK), on_stage or (lambda *_: None), first_seed, full)
    job = job if on_rows is None else replace(job, on_rows=on_rows)
    return CheckReport(
        **_measure(job, parts),
        full=full,
        lens=lens.manifest.name,
        lens_id=lens.manifest.lens_id,
        classifier_id=lens.classifier.classifier_id,
        first_seed=first_seed,
        device=lens.device,
        seconds=time.monotonic() - begun,
    )


def _measure(job: Job, parts: Sequence[int]) -> dict[str, Any]:
    """What was measured, as fields of the report."""
    from diffusion_lens.studies.check import inside, steering, world

    rows: list[Row] = []
    found: dict[str, Any] = {}

    def add(measured: Sequence[Row]) -> None:
        rows.extend(measured)
        job.on_rows(measured)

    if 1 in parts or 2 in parts:
        counted = world.draw_shares(job)
        if 1 in parts:
            add(world.share_rows(job, counted))
        if 2 in parts:
            add(world.classifier_rows(job, counted))
        found["counted"] = world.counted_shares(counted)
    if 3 in parts or 4 in parts:
        plain, rebuilt = inside.draw_inside(job)
        if 3 in parts:
            add(inside.sae_rows(job, plain, rebuilt))
        if 4 in parts:
            add(inside.attribution_rows(job, plain))
    if 5 in parts:
        steered = steering.steering_rows(job)
        rows += steered.rows
        found |= {"by_prompt": steered.by_prompt, "sweeps": steered.sweeps}
    return {"rows": tuple(rows), **found}


def plain_report(report: CheckReport) -> dict[str, Any]:
    """The report as JSON values, its sweeps and counted shares left out; ``by_prompt`` has every profession's rows."""
    fields = ("full", "lens", "lens_id", "classifier_id", "first_seed", "device", "seconds")
    plain: dict[str, Any] = {name: to_plain(getattr(report, name)) for name in fields}
    return {
        **plain,
        "holds": report.holds,
        "summary": report.summary,
        "rows": to_plain(report.rows),
        "by_prompt": to_plain(report.by_prompt),
    }


def row_texts(row: Row) -> tuple[str, str, str, str, str, str, str]:
    """Part, name, bar, value, interval, n and verdict as text."""
    value = "–" if row.value is None else show(row.value, row.unit)
    interval = "–" if row.interval is None else " to ".join(_bare(end, row.unit) for end in row.interval)
    return str(row.part), row.name, row.bar, value, interval, f"{row.n:,}" if row.n else "–", row.verdict


def _bare(value: float, unit: Unit) -> str:
    return show(value, unit).removesuffix(" points").removesuffix(" %")
