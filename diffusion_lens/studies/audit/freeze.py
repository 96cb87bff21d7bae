"""From a person's plan to a frozen one: files replaced by what they hold, defaults by what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_lens.base.files import read_json
from diffusion_lens.base.types import Attribute, LensError
from diffusion_lens.model.run_options import RunOptions
from diffusion_lens.studies.audit.against import check_rows, planted_rows, read_reference
from diffusion_lens.studies.audit.conditions import freeze_edits
from diffusion_lens.studies.audit.plan import (
    AgainstPlan,
    AuditPlan,
    PromptsPlan,
    ReferenceRow,
    SizePlan,
    SubjectPlan,
    images_for_precision,
)
from diffusion_lens.studies.audit.subjects import Pictures, Subject, models_in, open_subject
from diffusion_lens.studies.audit.wording import word_prompts

IMAGES = 200
"""Images of each prompt where the plan does not say."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A frozen plan with what it opens; ``folder``: where files lie that it names."""

    plan: AuditPlan
    subjects: tuple[Subject, ...]
    folder: Path

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """What is asked for, ``None``: no prompt."""
        return prompts_of(self.plan)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """Those in question, in the plan's order."""
        known = {a.name: a for a in self.subjects[0].attributes}
        return tuple(known[name] for name in self.plan.attributes)


def prompts_of(plan: AuditPlan) -> tuple[str | None, ...]:
    """The prompts of a frozen plan; ``None`` is no prompt."""
    return (*plan.prompts.texts, *((None,) if plan.prompts.unprompted else ()))


def freeze(plan: AuditPlan, folder: Path, options: RunOptions, opened: Sequence[Subject] = ()) -> Planned:
    """Open and check everything that a plan names, before an image is drawn.

    Args:
        folder: where the plan's files lie.
        opened: subjects that are open already, in order; the others are opened with ``options``.

    Raises:
        LensError: whatever cannot be opened, is unknown, does not add up, or is no longer what the plan pins.
    """
    plans = plan.subjects if plan.frozen or opened else _one_model_each(plan.subjects, folder)
    subjects = tuple(opened) or tuple(open_subject(own, folder, options) for own in plans)
    if plan.frozen:
        return Planned(plan, subjects, folder)
    worded = word_prompts(plan.prompts, folder)
    texts = worded.texts
    unprompted = plan.prompts.unprompted
    if not texts and not unprompted:
        suggested = subjects[0].suggested
        if not suggested:
            raise LensError(f"Say under which prompts {subjects[0].name} is audited.")
        texts = tuple(text for text in suggested if text is not None)
        unprompted = None in suggested
    prompts = PromptsPlan(texts=texts, unprompted=unprompted)
    asked: tuple[str | None, ...] = (*texts, *((None,) if unprompted else ()))
    for subject in subjects:
        for prompt in asked:
            subject.check_prompt(prompt)
    attributes = _attributes(plan.attributes, subjects)
    return Planned(
        plan.model_copy(
            update={
                "subjects": _pinned(subjects),
                "prompts": prompts,
                "attributes": tuple(a.name for a in attributes),
                "against": _against(plan.against, worded.expected, asked, attributes, subjects, folder),
                "edits": freeze_edits(plan.edits, subjects, folder, controls=plan.controls),
                "size": _size(plan.size, subjects, asked),
                "title": plan.title or f"Audit of {' and '.join(s.name for s in subjects)}",
                "frozen": True,
            }
        ),
        subjects,
        folder,
    )


def _pinned(subjects: Sequence[Subject]) -> tuple[SubjectPlan, ...]:
    names = [s.name for s in subjects]
    if len(set(names)) < len(names):
        raise LensError(f"Two subjects are called '{names[0]}'; give them names of their own (name = …).")
    return tuple(s.plan.model_copy(update={"name": s.name, "pin": dict(s.pin)}) for s in subjects)


def _one_model_each(plans: Sequence[SubjectPlan], folder: Path) -> list[SubjectPlan]:
    """A CSV of images of several models becomes one subject for each."""
    found = []
    for plan in plans:
        models = models_in(folder / plan.images) if plan.images and not plan.only else ("",)
        many = len(models) > 1
        found += [
            plan.model_copy(update={"only": model, "name": f"{plan.name} {model}".strip()}) if many else plan
            for model in models
        ]
    return found


def _attributes(names: Sequence[str], subjects: Sequence[Subject]) -> tuple[Attribute, ...]:
    known = {a.name: a for a in subjects[0].attributes}
    for subject in subjects[1:]:
        own = {a.name: a for a in subject.attributes}
        known = {name: a for name, a in known.items() if own.get(name) == a}
    wanted = tuple(names) or tuple(name for name in subjects[0].focus if name in known)
    for name in wanted:
        if name not in known:
            alike = " alike by all subjects" if len(subjects) > 1 else ""
            raise LensError(f"'{name}' is not read{alike}; what is read is {', '.join(known) or 'nothing'}.")
    if not wanted:
        raise LensError("The subjects are read for no attribute in common; judge all of them by one judge.")
    if len(set(wanted)) < len(wanted):
        raise LensError("An attribute is named twice; name each once.")
    return tuple(known[name] for name in wanted)


def _against(
    against: AgainstPlan,
    expected: Sequence[ReferenceRow],
    prompts: Sequence[str | None],
    attributes: Sequence[Attribute],
    subjects: Sequence[Subject],
    folder: Path,
) -> AgainstPlan:
    rows = against.rows
    if against.table:
        rows += read_reference(folder / against.table)
    if against.kind == "run" and against.run:
        rows += _rows_of_run(folder / against.run, prompts, attributes)
    if against.kind == "planted" and not rows:
        if not any(subject.has_truth for subject in subjects):
            raise LensError("Nothing is known of what was planted in this model; compare with equal shares or a table.")
        rows += planted_rows(prompts, attributes)
    said = {(row.prompt, row.attribute) for row in expected}
    rows = tuple(expected) + tuple(row for row in rows if (row.prompt, row.attribute) not in said)
    every = {a.name: a for subject in subjects for a in subject.attributes}
    check_rows(rows, tuple(every.values()), prompts)
    return against.model_copy(update={"rows": rows, "table": "", "run": ""})


def _rows_of_run(
    path: Path, prompts: Sequence[str | None], attributes: Sequence[Attribute]
) -> tuple[ReferenceRow, ...]:
    """The unedited shares of another audit, of these prompts, with their intervals."""
    values = read_json(path)
    try:
        found = [
            ReferenceRow(
                prompt=row["prompt"] or "", attribute=row["attribute"], label=row["class"], share=row["corrected"],
                source=f"{values['plan']['title']}, plan {values['plan_sha256'][:12]}", low=row["corrected_low"],
                high=row["corrected_high"],
            )
            for row in values["shares"]
            if row["edit"] == "unedited"
            and row["subject"] == values["shares"][0]["subject"]
            and row["prompt"] in prompts
            and row["attribute"] in {a.name for a in attributes}
            and row["corrected"] is not None
        ]  # fmt: skip
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise LensError(f"{path} is no audit's JSON ({type(error).__name__}: {error}).") from None
    if not found:
        raise LensError(f"{path} has measured none of these prompts and attributes; compare with another run.")
    return tuple(found)


def _size(size: SizePlan, subjects: Sequence[Subject], prompts: Sequence[str | None]) -> SizePlan:
    if size.until is not None:
        return size
    images = size.images
    if size.precision is not None:
        images = images_for_precision(size.precision)
    if images is None:
        there = [subject.count(prompt) for subject in subjects if isinstance(subject, Pictures) for prompt in prompts]
        images = max(there) if there and not any(s.can_draw for s in subjects) else IMAGES
    return size.model_copy(update={"images": images, "precision": None})
