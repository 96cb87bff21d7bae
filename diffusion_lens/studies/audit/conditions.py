"""What is done to a model: the edits of a plan, made for a subject that can take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.files import read_json
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.types import Attribute, EditSpec, Intervention, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.controls import PromptEdit
from diffusion_lens.methods.edits import ClassDraw
from diffusion_lens.methods.protocol import RECORD_FILE, target_shares
from diffusion_lens.methods.registry import find_method
from diffusion_lens.model.denoise import Edit
from diffusion_lens.steering.settings import control_intervention
from diffusion_lens.studies.audit.plan import EditPlan, check_sums
from diffusion_lens.studies.audit.subjects import Subject


class _Named(StrictConfig):
    """Just the key of a stored method's record."""

    model_config = StrictConfig.model_config | {"extra": "ignore"}
    method: str


def applies(edit: EditPlan, subject: Subject) -> bool:
    """Whether a subject can be edited so: features need a lens, rewriting a model that takes prompts."""
    if edit.kind == "rewrite":
        return subject.can_draw and subject.suggested != (None,)
    return subject.lens is not None


def make_edit(edits: Sequence[EditPlan], number: int, subject: Subject, folder: Path) -> Edit:
    """Edit ``number`` (from 0) of a plan for a subject; ``folder``: where the plan's files lie.

    Raises:
        LensError: what the lens does not steer, another lens's features or method, or an edit unlike the pinned one.
    """
    edit = edits[number]
    made = _make(edits, edit, subject, folder)
    if edit.pin and made.spec.digest != edit.pin:
        raise LensError(
            f"The edit '{edit.name}' is no longer what was planned ({made.spec.digest}, the plan says {edit.pin}); "
            "restore what it was made of, or plan anew into another folder."
        )
    return made


def _make(edits: Sequence[EditPlan], edit: EditPlan, subject: Subject, folder: Path) -> Edit:
    if edit.kind == "rewrite":
        return _rewriting(edit, subject)
    lens = subject.lens
    if lens is None:
        raise LensError(f"{subject.name} is no lens, and steering needs one; leave the edit '{edit.name}' out.")
    if edit.kind == "steer":
        return lens.edit(*(lens.intervention(t.attribute, t.label, t.beta) for t in edit.turns))
    if edit.kind == "spec":
        return lens.edit_of(spec_of(edit, folder), fitted=folder / edit.folder if edit.folder else None)
    if edit.kind == "method":
        place = folder / edit.folder if (folder / edit.folder).exists() else Path(edit.folder)
        key = _Named.load(place / RECORD_FILE).method
        return find_method(key).load(place, lens).edit(edit.strength)
    return lens.edit(*_controls(edits, edit, lens, folder))


def spec_of(edit: EditPlan, folder: Path) -> EditSpec:
    """The edit as data that a plan holds or names; raises ``LensError`` where it is none."""
    values = edit.spec if edit.spec is not None else read_json(folder / edit.file)
    try:
        return from_plain(EditSpec, values)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise LensError(f"The edit '{edit.name or edit.file}' is no edit as data ({reason}).") from None


def interventions_of(edit: EditPlan, lens: DiffusionLens, folder: Path) -> tuple[Intervention, ...]:
    """The features' interventions that an edit is made of; empty for other kinds."""
    if edit.kind == "steer":
        return tuple(lens.intervention(t.attribute, t.label, t.beta) for t in edit.turns)
    return spec_of(edit, folder).interventions if edit.kind == "spec" else ()


def _controls(edits: Sequence[EditPlan], edit: EditPlan, lens: DiffusionLens, folder: Path) -> list[Intervention]:
    if not 0 <= edit.of < len(edits) or edits[edit.of].kind not in ("steer", "spec"):
        raise LensError("A control imitates an edit of features: 'of' is that edit's number, counted from 0.")
    own = interventions_of(edits[edit.of], lens, folder)
    activity = lens.atlas.activity
    return [control_intervention(one, "random", activity, edit.seed + i) for i, one in enumerate(own)]


def _rewriting(edit: EditPlan, subject: Subject) -> Edit:
    attribute = next((a for a in subject.attributes if a.name == edit.attribute), None)
    if attribute is None:
        known = ", ".join(a.name for a in subject.attributes)
        raise LensError(f"Prompts cannot be rewritten for '{edit.attribute}'; what is read here is {known}.")
    shares = target_shares(attribute, edit.shares or _even(attribute))
    decides = (attribute.name, list(shares), edit.share, edit.template, edit.seed)
    words = f"{edit.share:.0%} of prompts name a class of {attribute.name}"
    spec = EditSpec.of_custom(words, *decides)
    return PromptEdit(ClassDraw(attribute, shares, edit.seed), edit.share, edit.template, spec)


def _even(attribute: Attribute) -> dict[str, float]:
    return {label: 1 / len(attribute.classes) for label in attribute.classes}


def freeze_edits(
    edits: Sequence[EditPlan], subjects: Sequence[Subject], folder: Path, *, controls: bool
) -> tuple[EditPlan, ...]:
    """The edits with names, digests and contents of files, and a control after each edit of features.

    Raises ``LensError`` where no subject can take an edit, or two edits have one name.
    """
    found: list[EditPlan] = []
    for edit in edits:
        able = next((subject for subject in subjects if applies(edit, subject)), None)
        if able is None:
            what = "a model that takes prompts" if edit.kind == "rewrite" else "a lens"
            raise LensError(f"The edit '{edit.name or edit.kind}' needs {what}, and no subject is one; leave it out.")
        if edit.shares:
            check_sums(edit.shares, f"{edit.attribute} in the edit")
        spec = to_plain(spec_of(edit, folder)) if edit.kind == "spec" else None
        full = edit.model_copy(update={"name": edit.name or _name(edit), "spec": spec, "file": ""})
        pinned = make_edit([*found, full], len(found), able, folder).spec.digest
        found.append(full.model_copy(update={"pin": pinned}))
        lens = able.lens
        if controls and lens is not None and interventions_of(full, lens, folder):
            control = EditPlan(kind="control", name=f"random features (control of {full.name})", of=len(found) - 1)
            pinned = make_edit([*found, control], len(found), able, folder).spec.digest
            found.append(control.model_copy(update={"pin": pinned}))
    names = ["unedited", *(edit.name for edit in found)]
    if len(set(names)) < len(names):
        raise LensError("Two edits have one name, or one is called 'unedited'; name them apart.")
    return tuple(found)


def _name(edit: EditPlan) -> str:
    if edit.kind == "steer":
        return " and ".join(f"{t.attribute} towards {t.label}, β = {t.beta:g}" for t in edit.turns)
    if edit.kind == "rewrite":
        return f"prompts name {edit.attribute}"
    if edit.kind == "method":
        return f"{Path(edit.folder).name}, strength {edit.strength:g}"
    return "edited as on screen" if edit.kind == "spec" else "control"
