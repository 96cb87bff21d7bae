"""What is known of a lens before anybody draws: its parts, planted shares, and what was counted in unedited images."""

from __future__ import annotations

import json
from dataclasses import dataclass

from diffusion_lens.base.types import Share
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.steering.settings import describe_setting


@dataclass(frozen=True)
class KnownShares:
    """One prompt's shares of one attribute; no prompt counts as "".

    Attributes:
        planted: ``[class]``; ``None`` where the model comes without such a table.
        counted: in unedited images; ``None`` where none were counted.
    """

    prompt: str
    planted: tuple[float, ...] | None
    counted: tuple[Share, ...] | None

    @property
    def known(self) -> bool:
        """Whether anything is."""
        return bool(self.planted or self.counted)

    @property
    def truth(self) -> dict[str, float] | None:
        """Class → planted share, where both are known of the same classes."""
        if self.planted is None or self.counted is None or len(self.planted) != len(self.counted):
            return None
        return {s.label: p for s, p in zip(self.counted, self.planted, strict=True)}

    @property
    def least_difference(self) -> float:
        """A difference of shares below this cannot be told from chance: half the widest interval."""
        intervals = [s.corrected_interval for s in self.counted or ()]
        return max((high - low for low, high in intervals), default=1.0) / 2


def planted_shares(lens: DiffusionLens) -> dict[str, dict[str, list[float]]]:
    """Prompt → attribute → planted shares, where the model comes with such a table; otherwise empty."""
    path = lens.folder / "pipeline" / "planted.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["prompts"])
    except (ValueError, KeyError, TypeError):
        return {}


def counted_shares(lens: DiffusionLens) -> dict[tuple[str, str], tuple[Share, ...]]:
    """(prompt, attribute) → shares of unedited images, from whatever counted most."""
    most: dict[tuple[str, str], tuple[Share, ...]] = {}
    for result in lens.sweeps:
        setting = lens.settings.get(result.attribute.name)
        identity = setting.identity if setting else None
        for point in result.points:
            if point.beta == identity:
                most.setdefault((result.request.prompt or "", result.attribute.name), point.shares)
    for prompt, by_attribute in lens.counted.shares.items() if lens.counted else ():
        for name, shares in by_attribute.items():
            before = most.get((prompt, name))
            if before is None or before[0].n < shares[0].n:
                most[prompt, name] = shares
    return most


def attributes_known(lens: DiffusionLens) -> dict[str, tuple[str, ...]]:
    """Attribute → classes: those that the lens steers, then the others that were counted (sweeps count none)."""
    counted = {name for own in lens.counted.shares.values() for name in own} if lens.counted else set()
    others = [a for a in lens.manifest.nuisances if a.name in counted]
    return {a.name: a.classes for a in (*lens.manifest.attributes, *others)}


def prompts_known(lens: DiffusionLens) -> list[str]:
    """Every prompt that is suggested or planted, in order; a model without prompts has "" alone."""
    return list(dict.fromkeys([*(p or "" for p in lens.prompts), *planted_shares(lens)]))


def known_shares(lens: DiffusionLens, attribute: str) -> dict[str, KnownShares]:
    """What is known of one attribute, by prompt."""
    planted, counted = planted_shares(lens), counted_shares(lens)
    known = {}
    for prompt in prompts_known(lens):
        table = planted.get(prompt, {}).get(attribute)
        known[prompt] = KnownShares(prompt, tuple(table) if table else None, counted.get((prompt, attribute)))
    return known


def lens_facts(lens: DiffusionLens) -> list[tuple[str, str]]:
    """What is open, as (name, value): enough to find the same lens again."""
    m = lens.manifest
    facts = [
        ("lens", f"{m.name}, {m.lens_id}"), ("model", m.base_model.id),
        ("sampler", f"{m.scheduler}, {m.n_steps} steps"),
        ("guidance", f"{m.guidance_scale:g}"), ("site", m.hook_name),
        ("SAE", f"{m.sae_id}, {lens.atlas.density.size} features"), ("judged by", m.classifier_id),
    ]  # fmt: skip
    facts += [("noted when opened", note) for note in (lens.model.notes if lens.is_ready else ())]
    for name, setting in lens.settings.items():
        note = f"; {setting.note}" if setting.note else ""
        facts.append((f"turn for {name}", describe_setting(setting) + note))
    return facts
