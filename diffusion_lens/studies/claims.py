"""Each claim of the sources beside our experiment and what it says: made from stored results, never by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffusion_lens.base.types import LensError
from diffusion_lens.results.bypass import BypassResult, load_bypass
from diffusion_lens.results.comparison import UNSTEERED, Comparison, Measured, MethodRow
from diffusion_lens.results.comparison_store import load_comparison
from diffusion_lens.results.comparison_tables import short_table, standing
from diffusion_lens.results.depth import DepthResult, load_depth
from diffusion_lens.results.depth_apart import MINORITIES, ApartResult, load_apart
from diffusion_lens.results.measurement_files import Missing

NOT_YET = "not measured yet"
OLDER = (
    "Where a comparison is of the best of six strengths, it was made by version 0.4 with fits on all prompts pooled: "
    "DDM's target set then held one nurse, and StereoClinic damped the rare class of half the prompts, so that their "
    "rows say *no effect* of the fit and not of the method. Such rows rank grid points; those at balance rank methods."
)
HEAD = "| claim | source | our experiment | verdict | command |\n|---|---|---|---|---|\n"


class Stored(Protocol):
    """The part of a lens that claims are read from."""

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """Attribute → stored comparison."""


@dataclass(frozen=True)
class Claim:
    """One row: what a source says, where, what was done here, what came out with its interval, and how to do it."""

    claim: str
    source: str
    experiment: str
    verdict: str
    command: str


@dataclass(frozen=True)
class Source:
    """What a method's source says of it, for the rows that the comparison answers."""

    method: str
    claim: str
    source: str


METHOD_CLAIMS = (
    Source("difflens", "Scaling the features that carry a bias brings shares to balance.", "Shi et al., CVPR 2025"),
    Source("difflens-hold", "With the other attributes held, the same features still reach balance.", "ours"),
    Source("sae-lrp", "Features found by relevance reach balance, too.", "ours, after Bach et al. 2015"),
    Source("activation", "Single neurons, scaled, reach balance, too.", "Bills et al. 2023, as in Shi et al."),
    Source("latent-direction", "One learned vector per concept balances shares.", "Li et al., CVPR 2024"),
    Source("latent-editing", "A shift of h at every step edits what is meant.", "Kwon et al., ICLR 2023"),
    Source("h-distribution", "Guidance on a batch's reading brings it to the target.", "Parihar et al., CVPR 2024"),
    Source("fine-tuning", "Adapters aligned to a distribution draw it.", "Shen et al., ICLR 2024"),
    Source("bypass", "Passing by the mid-block lessens bias.", "Hakemi, Akhtar, Hassan and Mian, 2505.17560"),
    Source("ddm", "Fine-tuned beside an indicator, the model is fairer.", "Huang et al., 2503.12536"),
    Source("stereoclinic", "Damping the neurons of a stereotype mitigates it.", "Zhou et al., ACM MM 2025"),
    Source("equisteer", "Even levels along cross-attention directions balance shares.", "EquiSteer, ECCV 2026"),
    Source("text-sae", "Features of the text embedding alone reach balance.", "SAE Debias, 2507.20973"),
    Source("control-prompt", "Saying the class in the prompt is the plain remedy.", "control"),
)


def stored_comparisons(lens: Stored, assets: Path) -> dict[str, Comparison]:
    """The lens's comparisons by attribute, and those at balance that ``compare --out assets/balance`` wrote."""
    found = dict(lens.comparisons)
    for path in sorted((assets / "balance").glob("*/comparison.json")):
        one = load_comparison(path.parent, path.stem, Missing({}))
        found[f"{one.attribute.name} at balance"] = one
    return found


def claims(lens: Stored, assets: Path) -> list[Claim]:
    """Every claim with what the stored results of ``lens`` and of the ``assets`` folder say of it."""
    comparisons = stored_comparisons(lens, assets)
    found = [_method_claim(source, comparisons) for source in METHOD_CLAIMS]
    found.append(_reach_claim(comparisons))
    depth = load_depth(assets / "depth.json") if (assets / "depth.json").is_file() else None
    apart = load_apart(assets / "depth-apart.json") if (assets / "depth-apart.json").is_file() else None
    found += _depth_claims(depth, apart)
    quality = load_bypass(assets / "bypass.json") if (assets / "bypass.json").is_file() else ()
    found.append(_quality_claim(quality))
    found.append(
        Claim(
            "With the indicator FD and SPD are lower than without, on the same 80/20 set.",
            "Huang et al., 2503.12536",
            "`--methods ddm` with the presets *as the authors' code* and *plain LoRA* (α = 0), several trainings each",
            NOT_YET,
            "`compare --methods ddm` with `alpha` 0 and 0.05",
        )
    )
    return found


def _method_claim(source: Source, comparisons: Mapping[str, Comparison]) -> Claim:
    told = []
    for name, comparison in comparisons.items():
        row, base = comparison.row(source.method), comparison.row(UNSTEERED)
        if row is None or base is None:
            continue
        told.append(f"{name}: {said_of_row(row, base, comparison)}")
    return Claim(
        source.claim, source.source, "the comparison (below)", "; ".join(told) or NOT_YET,
        f"`compare -m {source.method} --store`",
    )  # fmt: skip


def said_of_comparison(comparison: Comparison) -> str:
    """How a comparison was made, in a sentence."""
    config = comparison.config
    balance = config.protocol == "balance"
    at = "every method where its curve meets even shares" if balance else "every method at the best of six strengths"
    prompt = "no prompt" if config.prompt is None else f"'{config.prompt}'"
    return (
        f"**{comparison.attribute.name}**, {prompt}: {at}, found on {config.n_tune} images a strength and drawn on "
        f"{config.n} others; methods fitted on {config.n_fit} images of {config.seen}."
    )


def said_of_row(row: MethodRow, base: MethodRow, comparison: Comparison) -> str:
    """What a method's row says, with its intervals."""
    if row.note:
        return f"not run ({row.note.rstrip('.')})"
    if row.fd is None or base.fd is None:
        return "no image was decided"
    moved = f"FD {base.fd.value:.2f} → {row.fd.value:.2f} ({_ends(row.fd)})"
    kept = "" if row.kept is None else f", {row.kept:.0%} of the rest kept"
    margin = "" if row.margin is None else f", {row.margin.value:+.0%} over random features ({_shares(row.margin)})"
    undecided = f", {row.n_uncertain} of {row.n} undecided" if row.n_uncertain else ""
    return f"{_word(row, base, comparison)}: {moved}{kept}{margin}{undecided}"


def _word(row: MethodRow, base: MethodRow, comparison: Comparison) -> str:
    assert row.fd is not None and base.fd is not None
    if not row.strength:
        return "**no effect**"
    nearer = row.fd.interval[1] < base.fd.interval[0]
    floor = row.fd_floor or 0.0
    if comparison.config.protocol == "balance" and row.reached is False:
        return "**nearer, not at balance**" if nearer else "**not shown**"
    if row.fd.value <= floor:
        return "**holds**, at balance within noise"
    return "**holds in part**, nearer" if nearer else "**not shown**"


def _reach_claim(comparisons: Mapping[str, Comparison]) -> Claim:
    told = []
    for name, comparison in comparisons.items():
        if len(comparison.attribute.classes) != 2:
            continue
        reach = {key: _range(comparison, key) for key in comparison.curves}
        order = sorted(reach, key=lambda key: reach[key][0] - reach[key][1])
        named = {row.method: row.name for row in comparison.rows}
        ranges = "; ".join(f"{named[key]} {reach[key][0]:+.1f} to {reach[key][1]:+.1f}" for key in order[:6])
        place = order.index("difflens") + 1 if "difflens" in order else 0
        told.append(f"{name}: DiffLens has the {_ordinal(place)} widest range of {len(order)} ({ranges})")
    return Claim(
        "DiffLens controls bias more broadly than other methods (Finding 4).",
        "Shi et al., CVPR 2025",
        "range of the log ratio along every method's curve of strengths, all on one axis; corrected, as drawn",
        "; ".join(told) or NOT_YET,
        "`compare --store`, the Methods tab",
    )


def _range(comparison: Comparison, key: str) -> tuple[float, float]:
    values = [p.log_ratio_corrected.value for p in comparison.curves[key].points if p.log_ratio_corrected is not None]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _ordinal(place: int) -> str:
    return {0: "no known", 1: "1st", 2: "2nd", 3: "3rd"}.get(place, f"{place}th")


def _depth_claims(depth: DepthResult | None, apart: ApartResult | None) -> list[Claim]:
    source = "Hakemi, Akhtar, Hassan and Mian, 2505.17560"
    if apart is None:
        verdict = f"{NOT_YET} at equal size"
        if depth is not None:
            sizes = ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in depth.parameters.items())
            verdict += f"; a series that widens, too ({sizes}), one training each, cannot tell depth from size"
        experiment = "three depths at equal size, three trainings each"
        return [Claim("Deeper models amplify bias.", source, experiment, verdict, "`portraits depth-apart --store`")]
    found = []
    for family, claim in (
        ("depth", "Deeper models amplify bias."),
        ("size", "Larger models do (to tell the two apart)."),
    ):
        sizes = ", ".join(f"{name} ({apart.of(name)[0].parameters / 1e6:.2f} M)" for name in apart.families[family])
        told = " ".join(apart.verdict(family, minority) for minority in MINORITIES)
        flips = apart.net_flips(family, MINORITIES[0])
        if flips is not None:
            told += f" On the same noise {flips.value * 100:+.1f} in 100 images leave men ({_points(flips)})."
        experiment = f"{sizes}; men {apart.planted['male']:.0%}, blond men {apart.planted['blond male']:.2%} planted"
        found.append(Claim(claim, source, experiment, told, "`portraits depth-apart --store`"))
    return found


def _quality_claim(results: Sequence[BypassResult]) -> Claim:
    told = " ".join(
        f"{one.model_id.rpartition('/')[2]}, {one.prompt or 'no words'!r}: {one.verdict}" for one in results
    )
    done = "; ".join(f"{one.model_id.rpartition('/')[2]}, n = {one.points[0].n} a setting" for one in results)
    return Claim(
        "Bypassing the mid-block consistently improves image quality (version 1's abstract).",
        "Hakemi, Akhtar, Hassan and Mian, 2505.17560",
        f"Fréchet distance to drawings in the judge's features, paired over seeds{'; ' * bool(done)}{done}",
        told or NOT_YET,
        "`bypass --store`",
    )


def _ends(value: Measured) -> str:
    return f"{value.interval[0]:.2f} to {value.interval[1]:.2f}"


def _shares(value: Measured) -> str:
    return f"{value.interval[0]:+.0%} to {value.interval[1]:+.0%}"


def _points(value: Measured) -> str:
    return f"{value.interval[0] * 100:+.1f} to {value.interval[1] * 100:+.1f}"


def claims_markdown(found: Sequence[Claim], comparisons: Mapping[str, Comparison]) -> str:
    """The whole page."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    rows = "".join(
        f"| {' | '.join(cell(t) for t in (c.claim, c.source, c.experiment, c.verdict, c.command))} |\n" for c in found
    )
    described = "".join(f"- {said_of_comparison(one)}\n" for one in comparisons.values())
    if any(one.config.protocol == "points" for one in comparisons.values()):
        described += f"\n{OLDER}\n"
    return (
        "# Claims of the sources, and what came out here\n\n"
        "Made by `python -m diffusion_lens claims --out docs/CLAIMS.md` from the results that are stored in "
        "`assets/`; a test asks whether it is up to date. Intervals are 95 %. All of it is of a small model of "
        "drawn faces whose shares are known: a necessary test of a method, no evidence about photographs. Where a "
        "source could not be read in full, the method is our working form, as its description says.\n\n"
        f"{HEAD}{rows}\n## The comparison\n\n{described}"
    )


BEGIN, END = "<!-- comparison: made by `claims --card` -->\n", "<!-- end of comparison -->\n"


def card_tables(comparisons: Mapping[str, Comparison]) -> str:
    """The stored comparisons as a model card shows them: how each was made, who stands where, and the table."""
    parts = []
    for one in comparisons.values():
        parts.append(f"{said_of_comparison(one)}\n")
        if standing(one):
            parts.append(f"{standing(one)}\n")
        parts.append(short_table(one))
    return "\n".join(parts)


def card_with(card: str, comparisons: Mapping[str, Comparison]) -> str:
    """A model card's text with its tables of the comparisons made anew; raises ``LensError`` without their place."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LensError(f"This card has no place for the comparison; write {BEGIN.strip()} and {END.strip()} there.")
    return f"{before}{BEGIN}\n{card_tables(comparisons)}\n{END}{after}"
