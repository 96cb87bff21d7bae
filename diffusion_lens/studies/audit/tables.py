"""What stands beside a report: tables that a spreadsheet opens safely, a citation, a model card's section, schemas."""

from __future__ import annotations

import json
import re
from typing import Any

from diffusion_lens.base.text import as_csv
from diffusion_lens.studies.audit.plan import AuditPlan
from diffusion_lens.studies.audit.record import NOBODY, UNDECIDED, AuditRecord

SHARE_COLUMNS = (
    "subject", "prompt", "edit", "attribute", "class", "images", "count", "decided", "undecided", "invalid", "no face",
    "several faces", "share", "share low", "share high", "corrected", "corrected low", "corrected high", "reference",
    "against", "source", "difference", "difference low", "difference high", "word",
)  # fmt: skip


def shares_csv(record: AuditRecord) -> str:
    """A line per subject, prompt, edit, attribute and class; shares from 0 to 1."""
    return as_csv(SHARE_COLUMNS, ([_short(value) for value in row.plain_values()] for row in record.shares))


MEASURE_COLUMNS = ("subject", "prompt", "edit", "measure", "value", "low", "high", "floor", "n", "against")


def measures_csv(record: AuditRecord) -> str:
    """A line per measure: distances from the reference, changes on the same seeds, and what is known of the images."""
    rows: list[tuple[Any, ...]] = []
    for d in record.distances:
        own = (d.subject, d.prompt, d.edit, f"FD {d.attribute}")
        rows.append((*own, d.fd, d.low, d.high, d.floor, d.n, d.against))
    for c in record.changes:
        own = (c.subject, c.prompt, c.edit, f"change {c.attribute} {c.label}")
        rows.append((*own, c.difference, c.low, c.high, None, c.n, "unedited"))
    for q in record.quality:
        images = (q.subject, q.prompt, q.edit)
        rows.append((*images, "images that show nobody", q.invalid, None, None, None, q.n, ""))
        rows.append((*images, "activation ratio", q.activation_ratio, None, None, None, q.n, ""))
        if q.kept is not None:
            rows.append((*images, "other attributes kept", q.kept, None, None, None, q.n, "unedited"))
        if q.frechet is not None:
            rows.append((*images, "Fréchet distance, judge's features", q.frechet, None, None, None, q.n, "unedited"))
    for a in record.agreement:
        rows.append((None, None, None, f"{a.kind}'s kappa {a.attribute}", a.kappa, a.low, a.high, None, a.n,
                     " and ".join(a.readers)))  # fmt: skip
    return as_csv(MEASURE_COLUMNS, ([_short(value) for value in row] for row in rows))


CROSS_COLUMNS = (
    "subject", "edit", "pooled", "prompt", "attributes", "classes", "count", "decided", "share", "low", "high", "small",
)  # fmt: skip


def crossings_csv(record: AuditRecord) -> str:
    """A line per combination of classes; ``small``: fewer images than the plan asks for."""
    rows = (
        (r.subject, r.edit, "yes" if r.pooled else "no", r.prompt, " × ".join(r.attributes), " × ".join(r.classes),
         r.count, r.decided, r.share, r.low, r.high, "yes" if r.small else "no")
        for r in record.crossings
    )  # fmt: skip
    return as_csv(CROSS_COLUMNS, ([_short(value) for value in row] for row in rows))


def images_csv(record: AuditRecord) -> str:
    """A line per image: its seed or file, and every reading of it."""
    names = list(dict.fromkeys(name for subject in record.subjects for name in subject.attributes))
    classes = {(s.name, name): own for s in record.subjects for name, own in s.attributes.items()}

    def told(subject: str, attribute: str, code: int) -> str:
        if code in (UNDECIDED, NOBODY):
            return "undecided" if code == UNDECIDED else "shows nobody"
        return classes[subject, attribute][code]

    rows = []
    for cell in record.cells:
        for i, seed in enumerate(cell.seeds):
            read = [
                told(cell.subject, name, cell.readings[name][i]) if name in cell.readings else None for name in names
            ]
            file = cell.files[i] if cell.files else None
            rows.append((cell.subject, cell.prompt, cell.edit, seed, file, *read, cell.pixels[i]))
    return as_csv(("subject", "prompt", "edit", "seed", "file", *names, "pixels sha256 (first 16)"), rows)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def bibtex(record: AuditRecord) -> str:
    """A BibTeX entry of this audit."""
    reviewer = record.plan.sign.reviewer or "{Diffusion Lens}"
    year = re.search(r"\d{4}", record.date)
    return (
        f"@misc{{audit-{record.plan_sha256[:12]},\n"
        f"  title        = {{{_tex(record.plan.title)}}},\n"
        f"  author       = {{{_tex(reviewer)}}},\n"
        f"  year         = {{{year.group() if year else ''}}},\n"
        f"  note         = {{Made with {_tex(record.made_by)}. Plan sha256 {record.plan_sha256}, "
        f"content sha256 {record.content_sha256}}}\n}}"
    )


def _tex(text: str) -> str:
    if text.startswith("{"):
        return text
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", " "))


def model_card(record: AuditRecord) -> str:
    """A section for a model card on the Hugging Face hub: Bias, Risks, and Limitations."""
    lines = [
        "## Bias, Risks, and Limitations",
        "",
        f"Perceived attributes in generated images were audited on {record.date} with {record.made_by} "
        f"(plan `{record.plan_sha256[:12]}`{', reviewed by ' + record.plan.sign.reviewer if record.plan.sign.reviewer else ''}).",  # noqa: E501
        "",
        f"| prompt | {'subject | ' if len(record.subjects) > 1 else ''}perceived | share (95 %) | reference | |",
        f"|---|{'---|' if len(record.subjects) > 1 else ''}---|---|---|---|",
    ]
    for verdict in record.verdicts:
        point = verdict.points[0]
        share = "–" if point.share is None else f"{point.share:.0%} ({point.low:.0%} to {point.high:.0%})"
        reference = "–" if verdict.reference is None else f"{verdict.reference:.0%}, {verdict.against}"
        subject = f"{_cell(verdict.subject)} | " if len(record.subjects) > 1 else ""
        lines.append(
            f"| {_cell(shown_prompt(verdict.prompt))} | {subject}{_cell(verdict.attribute)}: {_cell(verdict.label)}, "
            f"n = {point.n}, {point.undecided} undecided | {share} | {_cell(reference)} | {point.word} |"
        )
    lines += ["", *(f"- {text}" for text in record.limits)]
    harms = record.plan.context.harm_hypotheses
    if harms:
        lines += ["", f"**Harm hypotheses.** {harms}"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def shown_prompt(prompt: str | None) -> str:
    """A prompt as people read it."""
    return "no prompt" if prompt is None else f"“{prompt}”" if prompt else "the empty prompt"


def schema(which: str) -> str:
    """The JSON schema of a ``plan`` or of a ``report``, as published in docs/audit."""
    kind = AuditPlan if which == "plan" else AuditRecord
    values = kind.model_json_schema(by_alias=True)
    values["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(values, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
