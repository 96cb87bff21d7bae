"""The stored depth experiment: do deeper networks overstate what they were shown? What can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusion_lens.base.types import Share
from diffusion_lens.results.depth import DepthPoint, DepthResult, depth_series

BYPASSED = ", bypassed"


@dataclass(frozen=True)
class DepthQuestion:
    """Which class of which attribute, in images of which prompt; ``bypass``: also with the deepest block passed by."""

    attribute: str
    prompt: str
    label: str
    bypass: bool


@dataclass(frozen=True)
class DepthLines:
    """One class's share by depth: a line per guidance scale and bypass. ``planted``: its share in the drawings."""

    depths: list[str]
    lines: dict[str, list[Share]]
    planted: float


def attributes(result: DepthResult) -> list[str]:
    """What was measured, in the order of the experiment."""
    return list(dict.fromkeys(p.attribute for p in result.points))


def prompts(result: DepthResult) -> list[str]:
    """The prompts measured, in the order of the experiment."""
    return list(dict.fromkeys(p.prompt for p in result.points))


def classes(result: DepthResult, attribute: str) -> tuple[str, ...]:
    """The classes of one attribute."""
    return tuple(s.label for s in next(p.shares for p in result.points if p.attribute == attribute))


def majority(result: DepthResult, attribute: str, prompt: str) -> str:
    """The class planted most often there."""
    return next(p.majority for p in result.points if (p.attribute, p.prompt) == (attribute, prompt))


def first_question(result: DepthResult) -> DepthQuestion:
    """What is shown first: where depth moved a share furthest beyond its intervals; else the first of everything."""
    found = max(
        ((name, prompt, label) for name in attributes(result) for prompt in prompts(result)
         for label in classes(result, name)),
        key=lambda asked: clear_move(result, *asked),
    )  # fmt: skip
    if clear_move(result, *found) <= 0:
        attribute, known = attributes(result)[0], prompts(result)
        prompt = known[1] if len(known) > 1 else known[0]
        return DepthQuestion(attribute, prompt, majority(result, attribute, prompt), bypass=True)
    return DepthQuestion(*found, bypass=True)


def clear_move(result: DepthResult, attribute: str, prompt: str, label: str) -> float:
    """How far apart the intervals of two depths lie at most, at one guidance scale and without bypass; 0: they meet."""
    furthest = 0.0
    column = classes(result, attribute).index(label)
    for scale in {p.guidance_scale for p in result.points}:
        ends = [
            p.shares[column].corrected_interval
            for p in result.points
            if (p.attribute, p.prompt, p.guidance_scale, p.bypass) == (attribute, prompt, scale, False)
        ]
        if ends:
            furthest = max(furthest, max(low for low, _ in ends) - min(high for _, high in ends))
    return furthest


def with_majority(result: DepthResult, question: DepthQuestion) -> DepthQuestion:
    """The same question of the class planted most often: where attribute or prompt are others now."""
    return replace(question, label=majority(result, question.attribute, question.prompt))


def depth_lines(result: DepthResult, question: DepthQuestion) -> DepthLines:
    """The shares behind the figure. Raises ``LensError`` for what was not measured."""
    lines: dict[str, list[Share]] = {}
    depths: list[str] = []
    planted = 0.0
    for bypassed in (False, True) if question.bypass else (False,):
        for scale in sorted({p.guidance_scale for p in result.points}):
            depths, shares, planted = depth_series(
                result, question.attribute, question.label, prompt=question.prompt, guidance_scale=scale,
                bypass=bypassed,
            )  # fmt: skip
            lines[f"guidance {scale:g}{BYPASSED if bypassed else ''}"] = shares
    return DepthLines(depths, lines, planted)


def points_of(result: DepthResult, question: DepthQuestion) -> list[DepthPoint]:
    """Every depth and setting of the question's attribute and prompt."""
    return [p for p in result.points if (p.attribute, p.prompt) == (question.attribute, question.prompt)]
