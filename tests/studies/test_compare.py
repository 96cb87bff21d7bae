"""The bench: one table of all methods, its rule, its metrics against slow forms, its files and its resumption."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lens_fixtures import PROMPTS
from measured import row_with

from diffusion_lens.base.progress import Cancelled, Progress, Status
from diffusion_lens.base.types import LensError, LogRatio
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.registry import find_method
from diffusion_lens.results import metrics
from diffusion_lens.results.as_json import row_json
from diffusion_lens.results.comparison import BALANCE_RULE, NORM_FLAG, Measured, MethodRow, ranked
from diffusion_lens.results.comparison_store import load_comparison, save_comparison
from diffusion_lens.results.comparison_tables import (
    COLUMNS,
    NOT_MEASURED,
    PARTS,
    best,
    cells,
    columns_of,
    csv_text,
    markdown,
    number,
    short_table,
    standing,
    verdict,
)
from diffusion_lens.results.manifest import read_manifest, verify, write_manifest
from diffusion_lens.results.measurement_files import Missing
from diffusion_lens.studies.bench import run as compare
from diffusion_lens.studies.bench import shared as compare_shared
from diffusion_lens.studies.bench.plan import costs, plan, telling_prompt
from diffusion_lens.studies.bench.rows import choose, further_strength, likeness, nearest_place
from diffusion_lens.studies.bench.run import CompareConfig, Comparison, run_compare
from diffusion_lens.studies.bench.shared import Shared, load_run

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("difflens", "bypass", "h-distribution", "control-prompt")


def small(**changes: Any) -> CompareConfig:
    """A table of seconds."""
    values: dict[str, Any] = {
        "attribute": "gender", "prompt": PROMPTS[0], "methods": METHODS, "n": 56, "n_tune": 12, "n_fit": 8,
        "options": {}, "batch_size": 56, "n_examples": 2, "protocol": "points", "fit_on": "lens", "n_explicit": 0,
        **changes,
    }  # fmt: skip
    return CompareConfig(**values)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared comparison keeps its pieces."""
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def comparison(tiny_lens: DiffusionLens, work: Path) -> Comparison:
    """A finished table."""
    return run_compare(tiny_lens, small(), work)


def shown(found: Comparison) -> list[dict[str, Any]]:
    """Every number of every row."""
    return [row_json(row) for row in found.rows]


def test_every_cell_is_filled(comparison: Comparison) -> None:
    assert [row.method for row in comparison.rows] == ["unsteered", *METHODS]
    for row in comparison.rows:
        assert not row.note
        empty = [name for name in columns_of(comparison) if getattr(row, name) is None]
        assert not empty, (row.method, empty)
        assert row.n == 56 and NOT_MEASURED not in cells(row, columns_of(comparison))
    unsteered = comparison.rows[0]
    assert unsteered.fid == pytest.approx(0, abs=1e-6) and unsteered.kept == 1 and unsteered.activation_ratio == 1
    assert unsteered.image_likeness is not None and unsteered.image_likeness.value == pytest.approx(1)
    assert set(comparison.rows[1].agreement or {}) == {"age", "glasses"}


def test_rows_agree_with_a_plain_run_of_the_same_seeds(
    comparison: Comparison, tiny_lens: DiffusionLens, work: Path
) -> None:
    row = next(r for r in comparison.rows if r.method == "difflens")
    (folder,) = work.glob("gender-*")
    fitted = find_method("difflens").load(folder / "difflens" / "fitted", tiny_lens)
    seeds = comparison.config.seeds("final")
    edit = fitted.edit(row.strength) if row.strength else None
    edits = () if edit is None else (edit,)
    images = tiny_lens.generate(PROMPTS[0], *edits, seeds=seeds, batch_size=56).images
    plain = tiny_lens.generate(PROMPTS[0], seeds=seeds, batch_size=56).images
    read, before = tiny_lens.classify(images), tiny_lens.classify(plain)
    own = read["gender"]
    assert [s.count for s in row.shares] == own.counts.tolist()
    shares = own.counts / own.counts.sum()
    assert row.fd is not None and row.fd.value == pytest.approx(float(np.linalg.norm(shares - 0.5)))
    assert row.fd.interval[0] <= row.fd.value <= row.fd.interval[1]
    assert row.spd is not None and row.spd.value == pytest.approx(abs(shares[0] - shares[1]))
    assert row.agreement == {name: metrics.agreement(before[name], read[name]) for name in ("age", "glasses")}
    assert row.certain == pytest.approx(own.certain.mean())
    features = tiny_lens.classifier.features
    assert row.fid == pytest.approx(metrics.frechet_distance(features(plain), features(images)), abs=1e-6)
    cosine = metrics.cosine_to_unit(features(images).astype(float), features(plain).astype(float)).mean()
    assert row.image_likeness is not None and row.image_likeness.value == pytest.approx(cosine)
    heads = [metrics.inception_score(read[name].probs, splits=5)[0] for name in ("age", "glasses")]
    assert row.inception == pytest.approx(np.mean(heads))


def test_curves_are_on_the_tuning_seeds_and_hold_the_identity(comparison: Comparison) -> None:
    assert set(comparison.curves) == set(METHODS)
    for key, curve in comparison.curves.items():
        assert len(curve.points) == 7 and 0.0 in curve.betas
        assert curve.request.seeds == tuple(comparison.config.seeds("tune"))
        row = next(r for r in comparison.rows if r.method == key)
        assert row.strength == choose(curve.points).beta
        identity = next(p for p in curve.points if p.beta == 0)
        assert set(identity.agreement.values()) == {1.0}
    final, tune, fit = (set(comparison.config.seeds(p)) for p in ("final", "tune", "fit"))
    assert not final & tune and not final & fit and not tune & fit


def test_nothing_is_drawn_twice(
    comparison: Comparison, tiny_lens: DiffusionLens, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was drawn again")

    for module, name in ((compare_shared, "observe"), (compare, "sweep_points"), (compare, "generate")):
        monkeypatch.setattr(module, name, never)
    again = run_compare(tiny_lens, small(), work)
    assert shown(again) == shown(comparison) and set(again.curves) == set(comparison.curves)


def test_a_stopped_run_goes_on(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    stages: list[str] = []

    def stop(status: Status) -> None:
        stages.append(status.stage)
        assert 0 < status.done <= status.total
        if status.stage.startswith("Mid-block bypass: λ max 0.35"):
            raise Cancelled

    config = small(methods=("bypass",))
    with pytest.raises(Cancelled):
        run_compare(tiny_lens, config, tmp_path, progress=Progress(stop))
    assert sorted(path.name for path in tmp_path.glob("*/bypass/curve-*")) == ["curve-0", "curve-0.1", "curve-0.2"]
    stages.clear()
    with pytest.raises(Cancelled):
        run_compare(tiny_lens, config, tmp_path, progress=Progress(stop))
    assert not [s for s in stages if "λ max 0.1" in s]


def test_changed_strengths_are_noticed_and_only_the_new_ones_drawn(
    tiny_lens: DiffusionLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion_lens.methods.registry import METHODS as ALL

    config = small(methods=("bypass",))
    first = run_compare(tiny_lens, config, tmp_path)
    strengths = (*ALL["bypass"].strengths[:-1], 0.9)
    monkeypatch.setattr(type(ALL["bypass"]), "strengths", strengths)
    assert plan(tiny_lens, [config], tmp_path, 1.0).pieces[1].method == "bypass"
    drawn: list[float] = []
    real = compare.sweep_points

    def counted(*args: Any, **kwargs: Any) -> Any:
        drawn.extend(args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(compare, "sweep_points", counted)
    again = run_compare(tiny_lens, config, tmp_path)
    assert drawn == [0.9]
    assert set(again.curves["bypass"].betas) == {0.0, *strengths}
    kept = {p.beta: p for p in first.curves["bypass"].points}
    for point in again.curves["bypass"].points[:-1]:
        assert np.array_equal(point.examples, kept[point.beta].examples)


def test_goals_follow_the_approach(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    from diffusion_lens.methods.registry import METHODS as ALL

    def bench(**changes: Any) -> compare.Bench:
        config = small(**changes)
        return compare.Bench(Shared(tiny_lens, config, tmp_path), config, tmp_path)

    two, three = bench(), bench(attribute="age")
    even = {"female": 0.5, "male": 0.5}
    counts = two.shared.tuning.measurement["gender"].counts
    assert two.goal(ALL["difflens"]) == ("female", "male")[int(counts.argmin())]
    assert two.goal(ALL["h-distribution"]) == even and two.goal(ALL["bypass"]) == even
    assert bench(approach="draw").goal(ALL["difflens"]) == even
    assert three.goal(ALL["difflens"]) == {"young": 1 / 3, "adult": 1 / 3, "old": 1 / 3}
    uneven = {"female": 0.99, "male": 0.01}
    assert bench(target=uneven).goal(ALL["difflens"]) == "female"
    assert bench(target=uneven).goal(ALL["ddm"]) == uneven
    assert bench(target=uneven).identity != two.identity == bench(methods=("ddm",)).identity


def test_a_method_that_cannot_run_says_why(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    config = small(methods=("fine-tuning",), options={"fine-tuning": {"adapter": str(tmp_path / "none.safetensors")}})
    found = run_compare(tiny_lens, config, tmp_path)
    assert "none.safetensors is missing" in found.rows[1].note and not found.curves
    assert "not run" in cells(found.rows[1])[1] and "not run" in markdown(found)
    assert shown(run_compare(tiny_lens, config, tmp_path)) == shown(found)


def test_mistakes_are_found_before_anything_is_drawn(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    for config, message in (
        (small(methods=("magic",)), "no method"),
        (small(options={"bypass": {"colour": 1}}), "colour"),
        (small(attribute="height"), "does not read"),
    ):
        with pytest.raises(LensError, match=message):
            run_compare(tiny_lens, config, tmp_path, progress=Progress(lambda _: pytest.fail("something was drawn")))
    with pytest.raises(LensError, match="must not overlap"):
        CompareConfig.parse({"attribute": "gender", "prompt": "", "first_seed": 0, "first_tune_seed": 50})


def test_nothing_is_drawn_beyond_rows_curves_and_one_fit(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    config = small(methods=("activation", "bypass"), n=10, n_tune=10, n_fit=10, batch_size=10)
    stages: list[str] = []
    run_compare(tiny_lens, config, tmp_path, progress=Progress(lambda status: stages.append(status.stage)))
    # One batch of ten per stage; the fit is drawn once for all methods, and a best strength of 0 draws nothing.
    runs = set(stages)
    assert len([stage for stage in runs if "fitting" in stage]) == 1
    final = [stage for stage in runs if "final images" in stage]
    assert len(runs) + 2 - len(final) == 3 + 13 + 1


def test_the_rule() -> None:
    def made(beta: float, fd: float, keeps: float, floor: float = 0.1) -> Any:
        return SimpleNamespace(beta=beta, fd=fd, fd_floor=floor, kept=keeps)

    assert choose([made(0, 0.4, 1), made(1, 0.2, 0.9), made(2, 0.3, 0.95)]).beta == 1  # least FD
    # Both 1 and 2 lie within the noise: the one that changes less.
    assert choose([made(0, 0.4, 1), made(1, 0.09, 0.7), made(2, 0.05, 0.6), made(3, 0.11, 0.9)]).beta == 1
    assert choose([made(0, 0.09, 1), made(1, 0.02, 0.9)]).beta == 0  # nothing to mend: leave it alone
    assert choose([made(0, 0.4, 1), made(1, float("nan"), 1)]).beta == 0


def test_share_statistics_by_hand() -> None:
    labels = np.array([0] * 30 + [1] * 10 + [2] * 10)
    certain = np.ones(50, dtype=bool)
    certain[0] = False
    fd, spd = metrics.share_distances(labels, certain, np.full(3, 1 / 3))
    p = np.array([29, 10, 10]) / 49
    assert fd is not None and fd.value == pytest.approx(np.sqrt(((p - 1 / 3) ** 2).sum()))
    assert spd is not None and spd.value == pytest.approx(19 / 49)
    assert fd.interval == metrics.fd_interval(np.array([29, 10, 10]), np.full(3, 1 / 3))
    assert spd.interval == metrics.parity_interval(np.array([29, 10, 10]))
    assert metrics.share_distances(labels[:1], certain[:1], np.full(3, 1 / 3)) == (None, None)
    alone, _ = metrics.share_distances(labels[1:9], certain[1:9], np.full(3, 1 / 3))
    assert alone is not None and alone.interval[0] < alone.value  # eight images of one class are not certain of it
    assert likeness(np.ones((3, 2)), np.ones((3, 2))) is None


def at(strength: float, shares: tuple[float, ...], kept: float, n: int = 40) -> Any:
    """A point of a curve."""
    return SimpleNamespace(
        beta=strength, shares=[SimpleNamespace(corrected=s) for s in shares], kept=kept, n=n, n_uncertain=0,
        fd=float(np.linalg.norm(np.array(shares) - 1 / len(shares))) if n else float("nan"), fd_floor=0.1,
    )  # fmt: skip


def test_a_curve_is_read_where_it_meets_the_target() -> None:
    even = (0.5, 0.5)
    curve = [at(0, (0.9, 0.1), 1.0), at(1, (0.7, 0.3), 0.9), at(2, (0.3, 0.7), 0.6)]
    place = nearest_place(curve, even)
    assert place.reached and (place.strength, place.kept) == (pytest.approx(1.5), pytest.approx(0.75))
    assert place.between == (1, 2) and place.distance == pytest.approx(0)
    # A grid point as near as noise beside a crossing: the crossing is where the target is, whatever a point's luck.
    twice = [at(0, (0.9, 0.1), 1.0), at(1, (0.2, 0.8), 0.8), at(2, (0.4, 0.6), 0.5), at(3, (0.6, 0.4), 0.3)]
    assert nearest_place(twice, even).strength == pytest.approx(4 / 7)  # of two crossings the one that keeps more
    never = [at(0, (0.9, 0.1), 1.0), at(1, (0.8, 0.2), 0.9), at(2, (0.85, 0.15), 0.8)]
    far = nearest_place(never, even)
    assert not far.reached and far.strength == 1 and far.distance == pytest.approx(np.sqrt(2) * 0.3)
    assert nearest_place([*curve, at(9, (0.5, 0.5), 1.0, n=0)], even).strength == pytest.approx(1.5)
    three = [at(0, (0.8, 0.1, 0.1), 1.0), at(1, (0.2, 0.5, 0.3), 0.8)]
    start, step = np.array([0.8, 0.1, 0.1]), np.array([-0.6, 0.4, 0.2])
    slow = min(np.linspace(0, 1, 10_001), key=lambda t: float(np.linalg.norm(start + t * step - 1 / 3)))
    assert nearest_place(three, (1 / 3,) * 3).strength == pytest.approx(slow, abs=1e-3)


def test_curves_are_drawn_on_until_they_turn() -> None:
    even = (0.5, 0.5)
    rising = [at(0, (0.9, 0.1), 1.0), at(4, (0.8, 0.2), 0.9), at(8, (0.7, 0.3), 0.8)]
    assert further_strength(rising, even, 1e6) == 12 and further_strength(rising, even, 10.0) == 10
    assert further_strength(rising, even, 8.0) is None
    assert further_strength([*rising, at(12, (0.4, 0.6), 0.7)], even, 1e6) is None  # met
    assert further_strength([*rising, at(12, (0.75, 0.25), 0.7)], even, 1e6) is None  # turned
    lost = at(12, (0.6, 0.4), 0.1, n=5)
    lost.n_uncertain = 35
    assert further_strength([*rising, lost], even, 1e6) is None  # nobody to be seen any more


@pytest.fixture(scope="module")
def balanced(tiny_lens: DiffusionLens, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A table at balance."""
    methods = ("difflens", "activation", "control-random", "control-prompt")
    config = small(
        methods=methods, protocol="balance", fit_on="prompt", n_explicit=12, n_tune=24, n_fit=24, n_further=1,
        options={"difflens": {"attribution": "fitted"}, "control-random": {"attribution": "fitted"}},
    )  # fmt: skip
    return run_compare(tiny_lens, config, tmp_path_factory.mktemp("balanced"))


def test_methods_are_drawn_where_their_curve_meets_the_target(balanced: Comparison) -> None:
    assert balanced.rule == BALANCE_RULE and balanced.config.seen == "this prompt alone"
    for row in balanced.rows[1:]:
        points = balanced.curves[row.method].points
        place = nearest_place(points, balanced.target)
        assert row.strength == float(f"{place.strength:.4g}") and row.reached == place.reached
        assert len(points) <= 7 + 1 + 2 and row.figures is not None
        assert row.figures.request.seeds == tuple(balanced.config.seeds("final"))
        # Rewriting says a second class in a prompt that names one; this tokenizer reads no sentence of that length.
        assert (row.explicit is None) == (row.method == "control-prompt")
        assert row.explicit is None or 0 <= row.explicit.value <= 1
    # Random features and DiffLens rank by the same scores, fitted on the same images of this prompt alone.
    assert balanced.rows[0].explicit is not None and balanced.rows[0].rank is None


def test_ranks_and_margins_are_paired_and_ties_are_ties(balanced: Comparison) -> None:
    def slow(row: MethodRow) -> np.ndarray:
        assert row.figures is not None
        measured = row.figures.measurement
        assert measured.reference is not None
        each = []
        for i in range(row.n):
            same = [
                metrics.decided_labels(measured.readings[a])[i]
                == metrics.decided_labels(measured.reference.readings[a])[i]
                for a in ("age", "glasses")
            ]
            each.append(np.mean(same))
        return np.array(each)

    random = balanced.row("control-random")
    assert random is not None
    for row in balanced.rows[1:]:
        assert row.kept_measured is not None and row.kept_measured.value == pytest.approx(slow(row).mean())
        assert row.kept == pytest.approx(slow(row).mean())
        if row.method != "control-random" and row.strength:
            assert row.margin is not None
            assert row.margin.value == pytest.approx((slow(row) - slow(random)).mean())
    rows = [replace(row, reached=True, strength=row.strength or 1.0) for row in balanced.rows[1:]]
    found = {row.method: row.rank for row in ranked([balanced.rows[0], *rows])}
    assert found["unsteered"] is None
    for row in rows:
        ahead = 0
        for other in rows:
            if other is not row:
                gap = slow(other) - slow(row)
                draws = np.random.default_rng(5).integers(len(gap), size=(4000, len(gap)))
                ahead += float(np.quantile(gap[draws].mean(axis=1), 0.025)) > 0.004
        assert found[row.method] <= 1 + len(rows) and found[row.method] >= 1 + min(ahead, 0)
        assert abs(found[row.method] - 1 - ahead) <= 1
    same = ranked([balanced.rows[0], *(replace(rows[0], method=f"m{i}") for i in range(3))])
    assert [row.rank for row in same[1:]] == [1, 1, 1]
    unreached = ranked([balanced.rows[0], replace(rows[0], reached=False)])
    assert unreached[1].rank is None


def test_balanced_tables_round_trip_and_say_what_stands(balanced: Comparison, tmp_path: Path) -> None:
    save_comparison(balanced, tmp_path, "gender")
    loaded = load_comparison(tmp_path, "gender", Missing({}))
    assert shown(loaded) == shown(balanced) and loaded.config == balanced.config
    assert [row.rank for row in loaded.rows] == [row.rank for row in balanced.rows]
    assert "While fitting, every method saw 24 images of this prompt alone." in markdown(loaded)
    assert standing(balanced) and standing(balanced) in verdict(loaded)
    assert short_table(loaded).count("\n") == 2 + len(loaded.rows)
    assert "rank" in columns_of(loaded)


def test_what_a_method_may_see_is_the_same_for_all_and_stated(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    def shared(**changes: Any) -> Shared:
        return Shared(tiny_lens, small(**changes), tmp_path)

    assert shared(fit_on="prompt").draws.prompts == (PROMPTS[0],)
    assert shared(fit_on="lens").draws.prompts == tuple(tiny_lens.prompts)
    group = shared(fit_prompts=PROMPTS)
    assert group.draws.prompts == PROMPTS and PROMPTS[1] in group.config.seen
    assert CompareConfig(attribute="gender", prompt="").fit_on == "prompt"
    told = CompareConfig(attribute="gender", prompt="").options
    assert {tuple(values.items()) for values in told.values()} == {(("attribution", "fitted"),)}
    assert set(told) == {"difflens", "difflens-hold", "control-random", "control-flip", "control-noise"}


def test_comparisons_stored_before_there_was_balance_say_so(comparison: Comparison, tmp_path: Path) -> None:
    path = save_comparison(comparison, tmp_path, "gender")
    plain = json.loads(path.read_text())
    for name in ("protocol", "fit_on", "n_refine", "n_further", "n_explicit", "first_explicit_seed"):
        plain["config"].pop(name)
    for row in plain["rows"]:
        for name in ("reached", "explicit", "quality", "margin", "rank"):
            row.pop(name)
    path.write_text(json.dumps(plain))
    loaded = load_comparison(tmp_path, "gender", Missing({}))
    assert (loaded.config.protocol, loaded.config.fit_on) == ("points", "lens")
    assert loaded.config.seen == "all the lens's suggested prompts" and standing(loaded) == ""
    assert "rank" not in columns_of(loaded) and "margin" not in columns_of(loaded, "balance")


def test_the_activation_flag(comparison: Comparison) -> None:
    row = comparison.rows[0]
    assert not row.flagged and not replace(row, norm_ratio=NORM_FLAG).flagged
    assert replace(row, norm_ratio=NORM_FLAG + 0.01).flagged and replace(row, norm_ratio=0.7).flagged
    assert cells(replace(row, norm_ratio=2.0))[list(COLUMNS).index("activation_ratio")] == "2.00 !"


def test_edits_of_the_model_have_their_activations_measured_too(comparison: Comparison) -> None:
    row = next(r for r in comparison.rows if r.method == "control-prompt")
    assert row.activation_ratio is not None and (row.strength == 0 or row.activation_ratio != 1.0)


def test_files_round_trip(comparison: Comparison, tmp_path: Path) -> None:
    save_comparison(comparison, tmp_path, "gender")
    loaded = load_comparison(tmp_path, "gender", Missing({}))
    assert shown(loaded) == shown(comparison)
    same = ("config", "attribute", "target", "labels", "lens_key", "sae_id", "model_id", "classifier_id")
    assert [getattr(loaded, name) for name in same] == [getattr(comparison, name) for name in same]
    for key, curve in comparison.curves.items():
        kept_images = {0.0, next(row.strength for row in comparison.rows if row.method == key)}
        for point, again in zip(curve.points, loaded.curves[key].points, strict=True):
            assert again.shares == point.shares and again.fd == point.fd and again.agreement == point.agreement
            assert len(again.examples) == (len(point.examples) if point.beta in kept_images else 0)
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert [row["method"] for row in rows] == [row.method for row in comparison.rows]
    assert comparison.rows[1].fd is not None
    assert float(rows[1]["fd"]) == comparison.rows[1].fd.value and float(rows[1]["fd high"]) >= float(rows[1]["fd low"])
    assert float(rows[1]["agreement age"]) == (comparison.rows[1].agreement or {})["age"]
    text = markdown(comparison)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(comparison.rows)
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


@pytest.mark.parametrize(("change", "message"), [
    (lambda plain: plain.clear(), "another format"),
    (lambda plain: plain.update(format_version=99), "another format"),
    (lambda plain: plain.pop("rows"), "'rows'"),
    (lambda plain: plain.update(rows=[{"method": "unsteered"}]), "not a stored comparison"),
    (lambda plain: plain["rows"].reverse(), "not the unsteered one"),
    (lambda plain: plain["rows"].append({**plain["rows"][1], "measured": False}), "one per method"),
    (lambda plain: plain["curves"].pop("bypass"), "its curves are not those of its rows"),
    (lambda plain: plain["target"].append(0.0), "target is of another attribute"),
    (lambda plain: plain["places"].pop(), "Fewer measurements"),
    (lambda plain: plain["kept"]["attributes"].pop(), "readings are kept of"),
    (lambda plain: plain.update(curves=[]), "not a stored comparison"),
    (lambda plain: plain["config"].update(colour=1), "'colour' is wrong"),
])  # fmt: skip
def test_foreign_and_damaged_files_are_refused(
    comparison: Comparison, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    path = save_comparison(comparison, tmp_path, "gender")
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(LensError, match=message):
        load_comparison(tmp_path, "gender", Missing({}))


def test_a_comparison_can_live_in_the_lens(comparison: Comparison, copied_lens: Callable[[], Path]) -> None:
    folder = copied_lens()
    before = DiffusionLens.from_pretrained(folder)
    assert before.comparisons == {}
    before.store(comparison)
    path = before.store(comparison)
    assert path == folder / "comparisons" / "gender.json"
    verify(folder)
    opened = DiffusionLens.from_pretrained(folder)
    assert shown(opened.comparisons["gender"]) == shown(comparison)
    assert opened.manifest.sae_id == before.manifest.sae_id
    assert compare.lens_key(opened) == comparison.lens_key  # fitted methods still belong to it
    path.write_text(path.read_text() + " ")
    with pytest.raises(LensError, match=r"gender\.json"):
        DiffusionLens.from_pretrained(folder)


def test_another_saes_comparison_is_refused(comparison: Comparison, copied_lens: Callable[[], Path]) -> None:
    folder = copied_lens()
    for change in ({"sae_id": "0" * 16}, {"model_id": "another/model"}):
        with pytest.raises(LensError, match="measured on another"):
            DiffusionLens.from_pretrained(folder).store(replace(comparison, **change))
    save_comparison(replace(comparison, sae_id="0" * 16), folder / "comparisons", "gender")
    write_manifest(folder, read_manifest(folder))
    opened = DiffusionLens.from_pretrained(folder)
    with pytest.raises(LensError, match="measured on another SAE"):
        _ = opened.comparisons
    assert opened.sweeps, "the rest of the lens opens as before"


def test_comparisons_are_read_without_torch(comparison: Comparison, copied_lens: Callable[[], Path]) -> None:
    folder = copied_lens()
    DiffusionLens.from_pretrained(folder).store(comparison)
    code = (
        "import sys; from diffusion_lens.lens.lens import DiffusionLens; "
        f"print(len(DiffusionLens.from_pretrained({str(folder)!r}).comparisons['gender'].rows), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.split() == [str(len(comparison.rows)), "False"]


def test_best_values_by_hand(comparison: Comparison) -> None:
    unsteered, a, b, c, d = (*comparison.rows[:1], *comparison.rows[1:])

    def made(row: MethodRow, strength: float, fd: float, ratio: float, keeps: float, size: float) -> Any:
        log_ratio = LogRatio(ratio, (ratio - 1, ratio + 1), "male", "female", False)
        return row_with(row, strength=strength, fd=Measured(fd, (fd, fd)), log_ratio_corrected=log_ratio, kept=keeps,
                        activation_ratio=size, fd_floor=0.1, flagged=False)  # fmt: skip

    rows = (
        made(unsteered, 0.0, 0.4, 2.0, 1.0, 1.0), made(a, 1.0, 0.2, -0.1, 0.9, 0.5), made(b, 2.0, 0.05, 0.3, 0.8, 1.2),
        made(c, 0.0, 0.01, 0.0, 1.0, 1.0), made(d, 1.0, 0.05, 0.5, 0.7, 1.9),
    )  # fmt: skip
    table = replace(comparison, rows=rows)
    found = best(table)
    # The third of them ended at strength 0, so it competes nowhere; two share the least FD, one of them a control.
    assert found["fd"] == {b.method, d.method} and d.is_control
    assert found["log_ratio_corrected"] == {a.method}  # the sign of a ratio does not matter
    assert found["kept"] == {a.method}
    assert found["activation_ratio"] == {b.method}  # |ln 1.2| < |ln 0.5|, |ln 1.9|
    level = replace(table, rows=(rows[0], rows[2], rows[4]))
    assert best(level)["fd"] == frozenset() != best(level)["kept"]  # where all are alike, nobody leads
    said = verdict(table)
    assert f"At balance within noise: {b.name}, {d.name}." in said and f"better than none for {c.name}." in said
    worse = replace(table, rows=(rows[0], replace(rows[2], method="difflens", name="DiffLens"), rows[1]))
    worse = replace(worse, rows=(rows[0], made(a, 1.0, 0.3, 1.0, 0.1, 3.0), made(b, 1.0, 0.2, 0.9, 0.2, 1.1)))
    loses = {f: m for f, m in best(worse).items() if "difflens" in m}
    assert not {"fd", "log_ratio_corrected", "kept", "activation_ratio"} & set(loses)
    near = replace(rows[1], fd=Measured(0.35, (0.3, 0.4)), kept=0.99)  # reaches the unsteered 0.4
    idle = replace(table, rows=(rows[0], near, *rows[2:]))
    assert best(idle)["kept"] == {b.method} and f"and so best in nothing: {a.name}." in verdict(idle)
    assert verdict(replace(table, rows=(rows[0], near))).startswith("No method surely moved anything.")
    silent = replace(rows[1], note="needs a prompt")
    assert number(silent, "fd") is None and number(replace(rows[1], fid=None), "fid") is None
    assert NOT_MEASURED in cells(replace(rows[1], fid=None))


def test_a_table_of_another_attribute_draws_no_unedited_image_again(
    comparison: Comparison, tiny_lens: DiffusionLens, work: Path
) -> None:
    stages: list[str] = []
    config = small(attribute="age", methods=("bypass",), n_tune=12)
    found = run_compare(tiny_lens, config, work, progress=Progress(lambda status: stages.append(status.stage)))
    assert stages and not [stage for stage in stages if "unsteered" in stage]
    assert found.rows[0].certain is not None and found.rows[0].shares[0].label == "young"
    (kept_file,) = work.glob("unedited-*/final.safetensors")
    wanted = comparison.rows[0].figures.request
    run = load_run(kept_file, wanted, tiny_lens.classifier)
    assert run.seconds == comparison.rows[0].seconds_per_image
    assert [s.count for s in comparison.rows[0].shares] == run.measurement["gender"].counts.tolist()


def test_the_plan_shrinks_as_work_is_done(comparison: Comparison, tiny_lens: DiffusionLens, work: Path) -> None:
    configs = [small(), small(attribute="age", methods=("ddm", "fine-tuning"))]
    fresh = plan(tiny_lens, configs, work / "nowhere", 0.5)
    assert fresh.images == 56 + 12 + 8 + (4 + 2) * (56 + 6 * 12)  # the unedited images once for both tables
    left = plan(tiny_lens, configs, work, 0.5)
    assert {p.method for p in left.pieces if p.images} == {"unsteered", "ddm", "fine-tuning"}
    assert left.images == 8 + 2 * (56 + 6 * 12) and left.seconds < fresh.seconds
    assert left.after("age", "fine-tuning") == 0 < left.after("age", "ddm") < left.seconds
    row, base = comparison.row("bypass"), comparison.row("unsteered")
    assert row is not None and base is not None and row.seconds_per_image and base.seconds_per_image
    if row.strength:
        told = costs("bypass", {"gender": comparison})
        assert told[0] == pytest.approx(row.seconds_per_image / base.seconds_per_image)
    assert costs("bypass", {})[0] == 1.0


def test_the_telling_prompt(tiny_lens: DiffusionLens) -> None:
    (first,) = {s.request.prompt for s in tiny_lens.sweeps if s.attribute.name == "gender"}
    told = telling_prompt("gender", (*tiny_lens.prompts, first), tiny_lens.sweeps, tiny_lens.settings)
    assert told == first
    assert telling_prompt("gender", ("x", "y"), (), {}) == "x"
    one_sided = [replace(s, request=replace(s.request, prompt="y"), points=tuple(
        SimpleNamespace(beta=p.beta, shares=[SimpleNamespace(corrected=1.0 * (i == 0)) for i, _ in enumerate(p.shares)])
        for p in s.points)) for s in tiny_lens.sweeps]  # fmt: skip
    assert telling_prompt("gender", (first, "y"), (*tiny_lens.sweeps, *one_sided), tiny_lens.settings) == "y"


def test_the_tradeoff_figure_takes_the_curves(comparison: Comparison) -> None:
    from diffusion_lens.plots import describe_tradeoff, tradeoff_figure

    named = {curve.setting: curve for curve in comparison.curves.values()}
    figure = tradeoff_figure(named, lost="age")
    assert set(COLUMNS) == {field for fields in PARTS.values() for field in fields}
    assert {trace.name for trace in figure.data} == set(named)
    assert "DiffLens" in describe_tradeoff(named, lost="age")
