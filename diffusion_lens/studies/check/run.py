"""``check``: rows of what a lens should do, each with a bar, measured on seeds that nothing was chosen on.

The quick form is a smoke test: it finds what is far off, and says how far that is. The full form gives the figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusion_lens.base.plain import to_plain
from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studies.check.result import CheckReport, Row, Unit, show
from diffusion_lens.studies.check.runs import FIRST_SEED, FULL, QUICK, Job, OnRows, Sizes, refuse_shared_seeds

PARTS = (1, 2, 3, 4, 5)
GROUPS = {"shares": {1, 2}, "inside": {3, 4}, "steering": {5}}
"""Parts that look at the same images."""
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
    progress: Progress | None = None,
    on_rows: OnRows | None = None,
) -> CheckReport:
    """Measure the rows of ``parts`` on a lens.

    Args:
        full: the large sizes, and every row must hold; otherwise no row may fail (see ``Row.verdict``).
        sizes: replace the sizes that belong to ``full``.
        progress: tells what is drawn by name; may be cancelled.
        on_rows: called with rows as soon as they are measured; of part 5, with every prompt's own.

    Raises:
        LensError: an unknown part, or a lens that was fitted or chosen on the check's seeds.
    """
    strange = [part for part in parts if part not in PARTS]
    if strange or not parts:
        raise LensError(f"A check has the parts {', '.join(map(str, PARTS))}; got {list(parts)}.")
    refuse_shared_seeds(lens, first_seed)
    begun = time.monotonic()
    job = Job(lens, sizes or (FULL if full else QUICK), progress or Progress(), first_seed, full)
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

    groups = {name: bool(own & set(parts)) for name, own in GROUPS.items()}
    bars = iter(job.progress.parts(sum(groups.values())))
    if groups["shares"]:
        drawing, again, reading = next(bars).parts((6, 3, 1), (None, "1 shares: once more", "2 classifier: drawing"))
        counted = world.draw_shares(replace(job, progress=drawing))
        if 1 in parts:
            add(world.share_rows(replace(job, progress=again), counted))
        if 2 in parts:
            add(world.classifier_rows(replace(job, progress=reading), counted))
        found["counted"] = world.counted_shares(counted)
        found["sees"] = world.sees(job.lens, job.sizes.shares)
    if groups["inside"]:
        drawing, attributing = next(bars).parts((3, 1), (None, "4 attribution"))
        plain, rebuilt = inside.draw_inside(replace(job, progress=drawing))
        if 3 in parts:
            add(inside.sae_rows(job, plain, rebuilt))
        if 4 in parts:
            add(inside.attribution_rows(replace(job, progress=attributing), plain))
    if groups["steering"]:
        steered = steering.steering_rows(replace(job, progress=next(bars)))
        rows += steered.rows
        found |= {"by_prompt": steered.by_prompt, "sweeps": steered.sweeps}
    return {"rows": tuple(rows), **found}


def plain_report(report: CheckReport) -> dict[str, Any]:
    """The report as JSON values, its sweeps and counted shares left out; ``by_prompt`` has every profession's rows."""
    fields = ("full", "sees", "lens", "lens_id", "classifier_id", "first_seed", "device", "seconds")
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
