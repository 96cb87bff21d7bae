"""What every method promises: strength 0 changes nothing, a fit saves and loads, a foreign lens is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS

from diffusion_lens.base.files import write_json
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.progress import Cancelled, Progress, Status
from diffusion_lens.base.types import Attribute, EditSpec, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.draws import Draws, class_means, mean_differences, read_classes
from diffusion_lens.methods.edits import ClassDraw
from diffusion_lens.methods.protocol import Fitted, Method, lens_key, target_shares
from diffusion_lens.methods.registry import METHODS, find_methods

SEEDS = tuple(range(500, 532))
QUICK: dict[str, dict[str, Any]] = {
    "difflens": {"attribution": "fitted"},
    "latent-direction": {"iterations": 2},
    "latent-editing": {"t_edit": 200},
    "fine-tuning": {"iterations": 2, "rank": 2, "batch_size": 4, "confidence": 0.0, "jump": 2},
    "ddm": {"iterations": 2, "rank": 2, "batch_size": 4, "n_other": 6},
    "stereoclinic": {"n_steps": 2, "top": 50.0},
    "equisteer": {"n_named": 4},
    "text-sae": {"d_sae": 32, "k": 4, "iterations": 10},
}


@pytest.fixture(scope="module")
def draws(tiny_lens: DiffusionLens) -> Draws:
    """Images that all methods are fitted on."""
    return Draws(tiny_lens.model, PROMPTS, SEEDS, 4, 2.0)


def fit(method: Method, lens: DiffusionLens, draws: Draws, **changes: Any) -> Fitted:
    """Fit quickly, to an uneven target that every method can take."""
    target = changes.pop("target", {"female": 0.25, "male": 0.75})
    options = method.options(**{**QUICK.get(method.key, {}), **changes})
    return method.fit(lens, "gender", target, options, prompts=PROMPTS, seeds=SEEDS, draws=draws)


@pytest.fixture(scope="module")
def fitted(tiny_lens: DiffusionLens, draws: Draws) -> dict[str, Fitted]:
    """Every method, fitted once."""
    return {key: fit(method, tiny_lens, draws) for key, method in METHODS.items()}


@pytest.mark.parametrize("key", METHODS)
def test_strength_zero_is_no_edit_bit_for_bit(key: str, tiny_lens: DiffusionLens, fitted: dict[str, Fitted]) -> None:
    seeds = range(6)
    plain = tiny_lens.generate(PROMPTS[0], seeds=seeds, capture=True)
    same = tiny_lens.generate(PROMPTS[0], fitted[key].edit(0), seeds=seeds, capture=True)
    assert np.array_equal(plain.images, same.images)
    assert plain.activations is not None and same.activations is not None
    assert np.array_equal(plain.activations.h, same.activations.h)


@pytest.mark.parametrize("key", METHODS)
def test_a_strength_changes_images_and_leaves_the_model_as_it_was(
    key: str, tiny_lens: DiffusionLens, fitted: dict[str, Fitted]
) -> None:
    seeds = range(6)
    before = {name: p.clone() for name, p in tiny_lens.model.denoiser.named_parameters()}
    flags = {name: p.requires_grad for name, p in tiny_lens.model.denoiser.named_parameters()}
    strong = METHODS[key].strengths[-1]
    plain = tiny_lens.generate(PROMPTS[0], seeds=seeds, capture=True).activations
    moved = tiny_lens.generate(PROMPTS[0], fitted[key].edit(strong), seeds=seeds, capture=True).activations
    assert plain is not None and moved is not None
    # Captured before the edit of each step, so what differs is what earlier steps did to the latents.
    assert not np.array_equal(plain.h[:, -1], moved.h[:, -1])
    after = dict(tiny_lens.model.denoiser.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: p.requires_grad for name, p in after.items()} == flags
    again = tiny_lens.generate(PROMPTS[0], seeds=seeds, capture=True).activations
    assert again is not None and np.array_equal(again.h, plain.h)


@pytest.mark.parametrize("key", METHODS)
def test_save_and_load(key: str, tiny_lens: DiffusionLens, fitted: dict[str, Fitted], tmp_path: Path) -> None:
    fitted[key].save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}
    loaded = METHODS[key].load(tmp_path, tiny_lens)
    assert loaded.record == fitted[key].record and loaded.digest == fitted[key].digest
    strong, seeds = METHODS[key].strengths[-1], range(4)
    first, second = (tiny_lens.generate(PROMPTS[1], f.edit(strong), seeds=seeds) for f in (fitted[key], loaded))
    assert np.array_equal(first.images, second.images) and first.edit == second.edit


@pytest.mark.parametrize("key", METHODS)
def test_images_are_drawn_again_from_data_and_the_saved_method(
    key: str, tiny_lens: DiffusionLens, fitted: dict[str, Fitted], tmp_path: Path
) -> None:
    strong, seeds = METHODS[key].strengths[-1], range(5)
    drawn = tiny_lens.generate(PROMPTS[1], fitted[key].edit(strong), seeds=seeds)
    spec = from_plain(EditSpec, json.loads(json.dumps(to_plain(drawn.edit))))
    assert spec == drawn.edit == fitted[key].spec(strong) and spec.digest == fitted[key].spec(strong).digest
    assert spec != fitted[key].spec(strong / 2)
    stored = replace(drawn, edit=spec, images=np.zeros_like(drawn.images))
    fitted[key].save(tmp_path)
    again = tiny_lens.reproduce(stored, fitted=tmp_path)
    assert np.array_equal(again.images, drawn.images) and again.edit == drawn.edit
    if fitted[key].tensors:
        with pytest.raises(LensError, match="say where it was saved"):
            tiny_lens.reproduce(stored)
    else:
        assert np.array_equal(tiny_lens.reproduce(stored).images, drawn.images)
    other = replace(spec, method=replace(spec.method, digest="0" * 12))
    with pytest.raises(LensError, match="another fit"):
        tiny_lens.edit_of(other, fitted=fitted[key])
    with pytest.raises(LensError, match="another lens"):
        tiny_lens.edit_of(replace(spec, method=replace(spec.method, lens_key="0" * 16)))


@pytest.mark.parametrize("key", METHODS)
def test_a_foreign_lens_is_refused(
    key: str, tiny_lens: DiffusionLens, fitted: dict[str, Fitted], tmp_path: Path
) -> None:
    fitted[key].save(tmp_path)
    record = fitted[key].record.model_dump(mode="json")
    write_json(tmp_path / "method.json", {**record, "lens_key": "0" * 16})
    with pytest.raises(LensError, match="another lens"):
        METHODS[key].load(tmp_path, tiny_lens)


@pytest.mark.parametrize("key", METHODS)
def test_each_method_explains_itself_and_declares_its_options(key: str) -> None:
    method = METHODS[key]
    assert method.key == key and len(method.explanation) > 100 and method.source
    assert "our" in method.explanation  # each says what is our working form, or that it is our control
    schema = method.options.model_json_schema()["properties"]
    assert all("title" in value for value in schema.values())
    # The same budget of tuning for all: as many strengths each, rising, none of them the identity.
    assert len(method.strengths) == 6 and list(method.strengths) == sorted(method.strengths)
    assert method.strengths[0] > 0


@pytest.mark.parametrize("key", ["activation", "latent-direction", "latent-editing", "fine-tuning", "ddm", "sae-lrp"])
def test_a_fit_can_be_cancelled_and_shows_progress(key: str, tiny_lens: DiffusionLens) -> None:
    seen: list[float] = []

    def stop(status: Status) -> None:
        seen.append(status.share)
        if len(seen) == 6:
            raise Cancelled

    method = METHODS[key]
    options = method.options(**QUICK.get(key, {}))
    with pytest.raises(Cancelled):
        method.fit(tiny_lens, "gender", "male", options, prompts=PROMPTS, seeds=SEEDS, progress=Progress(stop))
    assert np.allclose(np.diff([0.0, *seen]), seen[0]) and 0 < seen[-1] < 1, "even steps of one bar"
    assert not any("lora" in name for name, _ in tiny_lens.model.denoiser.named_modules())


def test_drawing_counts_towards_every_methods_fit(fitted: dict[str, Fitted], draws: Draws) -> None:
    assert draws.seconds > 0
    assert fitted["activation"].record.seconds > draws.seconds
    assert fitted["bypass"].record.seconds < draws.seconds


def test_a_method_never_sees_the_classifier(tiny_lens: DiffusionLens, draws: Draws) -> None:
    class Blind:
        """The lens without its classifier."""

        def __getattr__(self, name: str) -> Any:
            assert name not in ("classifier", "classify", "evaluate"), "a method looked at the classifier"
            return getattr(tiny_lens, name)

    for key, method in METHODS.items():
        blind: Any = Blind()
        made = fit(method, blind, draws)
        tiny_lens.generate(PROMPTS[0], made.edit(method.strengths[0]), seeds=range(2))
        assert made.record.method == key


def test_targets() -> None:
    age = Attribute("age", ("young", "adult", "old"))
    assert target_shares(age, "adult") == (0.0, 1.0, 0.0)
    assert target_shares(age, {"old": 0.25, "young": 0.75}) == (0.75, 0.0, 0.25)
    with pytest.raises(LensError, match="add up to 1"):
        target_shares(age, {"old": 0.25})
    with pytest.raises(LensError, match="no class"):
        target_shares(age, "ancient")


def test_registry_lookups() -> None:
    assert find_methods("all") == tuple(METHODS.values())
    assert [m.key for m in find_methods("bypass, ddm,bypass")] == ["bypass", "ddm"]
    with pytest.raises(LensError, match="no method"):
        find_methods("magic")


def test_foreign_options_and_draws_are_refused(tiny_lens: DiffusionLens, draws: Draws) -> None:
    with pytest.raises(LensError, match="takes BypassOptions"):
        METHODS["bypass"].fit(
            tiny_lens, "gender", "male", METHODS["ddm"].options(), prompts=PROMPTS, seeds=SEEDS, draws=draws
        )
    with pytest.raises(LensError, match="other prompts or seeds"):
        METHODS["bypass"].fit(tiny_lens, "gender", "male", prompts=PROMPTS[:1], seeds=SEEDS, draws=draws)
    with pytest.raises(LensError, match="does not steer"):
        METHODS["bypass"].fit(tiny_lens, "glasses", "none", prompts=PROMPTS, seeds=SEEDS)


def test_lens_key_follows_the_model_not_the_results(copied_lens: Callable[[], Path], tiny_lens: DiffusionLens) -> None:
    same = DiffusionLens.from_pretrained(copied_lens())
    assert lens_key(same) == lens_key(tiny_lens)
    manifest = same.manifest
    fewer = {name: seal for name, seal in manifest.files.items() if not name.startswith("sweeps/")}
    object.__setattr__(same, "manifest", manifest.model_copy(update={"files": fewer}))
    assert lens_key(same) == lens_key(tiny_lens)
    object.__setattr__(same, "manifest", manifest.model_copy(update={"sae_id": "0" * 16}))
    assert lens_key(same) != lens_key(tiny_lens)


def test_read_classes_weighs_steps_by_accuracy(tiny_lens: DiffusionLens, draws: Draws) -> None:
    accuracy = (0.5, 0.9, 0.3, 0.7)
    probe = replace(tiny_lens.probes["gender"], accuracy=torch.tensor(accuracy))
    batch = draws.batches()[0]
    read = read_classes(probe, batch.h)
    above = [max(0.0, a - 0.5) for a in accuracy]
    for i in range(len(batch.seeds)):
        logs = [probe.probs(batch.h[i : i + 1, s].float(), s)[0].double().log() for s in range(4)]
        mixed = sum(w / sum(above) * log for w, log in zip(above, logs, strict=True))
        assert read[i] == pytest.approx(torch.softmax(torch.as_tensor(mixed), 0).numpy(), abs=1e-6)


def test_class_means_and_differences_against_a_loop(tiny_lens: DiffusionLens, draws: Draws) -> None:
    probe = tiny_lens.probes["gender"]
    batches = draws.batches()
    means, counts = class_means(batches, probe)
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for batch in batches:
        read = read_classes(probe, batch.h)
        for i in range(len(batch.seeds)):
            rows[int(read[i].argmax())].append(batch.h[i].float())
    assert counts.tolist() == [len(rows[0]), len(rows[1])]
    for label in (0, 1):
        torch.testing.assert_close(means[label], torch.stack(rows[label]).mean(0))
    torch.testing.assert_close(mean_differences(means, counts)[0], means[0] - means[1])
    three = torch.tensor([[1.0], [2.0], [6.0]])
    assert mean_differences(three, np.array([1, 3, 1]))[0].item() == pytest.approx(1 - (3 * 2 + 6) / 4)


def test_draws_use_every_seed_once(tiny_lens: DiffusionLens) -> None:
    draws = Draws(tiny_lens.model, PROMPTS, range(37), 4, 2.0, batch_size=8)
    plan = draws.plan()
    assert sorted(seed for _, seeds in plan for seed in seeds) == list(range(37))
    assert max(len(seeds) for _, seeds in plan) == 8 and draws.steps_left == 4 * len(plan)
    with pytest.raises(LensError, match="at least one prompt"):
        Draws(tiny_lens.model, (), range(3), 4, 2.0)


def test_class_draw_depends_on_the_seed_alone() -> None:
    draw = ClassDraw(Attribute("g", ("a", "b")), (0.3, 0.7), 5)
    together = draw.rows(tuple(range(2000)))
    assert together[17] == draw.rows((17,))[0]
    assert float(together.double().mean()) == pytest.approx(0.7, abs=0.04)
    assert draw.rows((1, 2, 1)).tolist()[0] == draw.rows((1, 2, 1)).tolist()[2]


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e9])
def test_impossible_strengths_are_refused(strength: float, fitted: dict[str, Fitted]) -> None:
    with pytest.raises(LensError, match="finite number"):
        fitted["difflens"].edit(strength)
