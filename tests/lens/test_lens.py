"""The facade: opens only what is whole, loads parts late, and passes on exactly what its modules compute."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lens_fixtures import PROMPTS, STEPS
from safetensors.torch import load_file, save_file
from watching import steps

from diffusion_lens.base.progress import Cancelled
from diffusion_lens.base.types import GenerationRequest, Intervention, LensError
from diffusion_lens.features.attribute import integrated_gradients
from diffusion_lens.fit.run import Models
from diffusion_lens.lens.folder import Parts
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.balance import balance
from diffusion_lens.model.generate import generate, record_trajectory
from diffusion_lens.model.stored import open_stored
from diffusion_lens.results.manifest import read_manifest, write_manifest
from diffusion_lens.steering.intervene import make_edit

DOCTOR, NURSE, SEEDS = PROMPTS[0], PROMPTS[1], tuple(range(6))


def test_a_lens_has_its_parts(tiny_lens: DiffusionLens) -> None:
    assert [a.name for a in tiny_lens.attributes] == ["gender", "age"]
    assert tiny_lens.prompts == (*PROMPTS, "")
    assert set(tiny_lens.probes) == set(tiny_lens.attributions) == set(tiny_lens.settings) == {"gender", "age"}
    assert tiny_lens.atlas.sae_id == tiny_lens.sae.sae_id == tiny_lens.manifest.sae_id
    assert tiny_lens.atlas.top_images.max() < len(tiny_lens.pool)
    assert {(s.attribute.name, s.is_control) for s in tiny_lens.sweeps} == {
        (name, control) for name in ("gender", "age") for control in (False, True)
    }
    assert [n.name for n in tiny_lens.manifest.nuisances] == ["glasses"]


def test_a_saved_lens_is_the_same_lens(tiny_lens: DiffusionLens, copied_lens: Callable[[], Path]) -> None:
    copy = DiffusionLens.from_pretrained(copied_lens())
    assert copy.manifest.lens_id == tiny_lens.manifest.lens_id
    request = tiny_lens.request(DOCTOR, SEEDS)
    turns = [lens.intervention("gender", "male", 3.0) for lens in (tiny_lens, copy)]
    images = [lens.generate(request, turn).images for lens, turn in zip((tiny_lens, copy), turns, strict=True)]
    np.testing.assert_array_equal(*images)


def test_a_lens_is_not_saved_over_something(tiny_lens: DiffusionLens, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(LensError, match="is not empty"):
        tiny_lens.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["sae/sae_weights.safetensors", "classifier/model.safetensors", "pipeline/unet/config.json", "sweeps/000-age.json"],
)
def test_a_damaged_lens_does_not_open(copied_lens: Callable[[], Path], name: str) -> None:
    folder = copied_lens()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(LensError, match=f"{name} is not the file of this lens: its sha256 is"):
        DiffusionLens.from_pretrained(folder)


def test_a_pickle_smuggled_into_a_lens_is_refused(copied_lens: Callable[[], Path]) -> None:
    folder = copied_lens()
    (folder / "pipeline" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(LensError, match=r"diffusion_pytorch_model\.bin does not belong to this lens"):
        DiffusionLens.from_pretrained(folder)


@pytest.mark.parametrize(("key", "part"), [("sae_id", "sae"), ("classifier_id", "classifier")])
def test_parts_of_another_lens_are_refused(copied_lens: Callable[[], Path], key: str, part: str) -> None:
    folder = copied_lens()
    write_manifest(folder, read_manifest(folder).model_copy(update={key: "f" * 16}))
    with pytest.raises(LensError, match=f"{part}/ in .* belongs to another lens"):
        getattr(DiffusionLens.from_pretrained(folder), part)


def test_a_lens_without_its_classifier_asks_for_one(copied_lens: Callable[[], Path], tiny_fit_models: Models) -> None:
    folder = copied_lens()
    for path in (folder / "classifier").iterdir():
        path.unlink()
    (folder / "classifier").rmdir()
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(LensError, match="which is not stored with it"):
        _ = DiffusionLens.from_pretrained(folder).classifier
    given = DiffusionLens.from_pretrained(folder, classifier=tiny_fit_models.classifier)
    assert given.classifier is tiny_fit_models.classifier


@pytest.mark.parametrize("source", ["nowhere", "./no/where", Path("a/b")])
def test_a_lens_that_is_not_there_is_named(source: str | Path) -> None:
    with pytest.raises(LensError, match="There is no folder"):
        DiffusionLens.from_pretrained(source)


def test_precomputed_results_need_neither_torch_nor_diffusers(tiny_lens_folder: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom diffusion_lens import DiffusionLens\n"
        "lens = DiffusionLens.from_pretrained(Path(sys.argv[1]))\n"
        "lens.sweeps, lens.atlas, lens.pool, lens.card(0), lens.feature_set('gender', 'male')\n"
        "assert not lens.is_ready\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'umap', 'gradio', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tiny_lens_folder)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_part_is_made_once_by_many_threads() -> None:
    parts, made, barrier = Parts(), [], threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        parts.get("x", lambda: made.append(1) or len(made))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and parts.has("x") and not parts.has("y")


def test_a_part_that_failed_is_tried_again() -> None:
    parts = Parts()
    with pytest.raises(ZeroDivisionError):
        parts.get("x", lambda: 1 // 0)
    assert parts.get("x", lambda: 5) == 5


def test_warming_up_loads_everything(tiny_lens_folder: Path) -> None:
    lens = DiffusionLens.from_pretrained(tiny_lens_folder)
    lens.warm_up().join()
    assert lens.is_ready and lens.model.model_id == "tiny-text"


def test_generating_equals_the_module(tiny_lens: DiffusionLens) -> None:
    request = tiny_lens.request(DOCTOR, SEEDS)
    assert request == GenerationRequest(DOCTOR, SEEDS, STEPS, 2.0, "tiny-text")
    plain = tiny_lens.generate(DOCTOR, seeds=SEEDS)
    np.testing.assert_array_equal(plain.images, generate(tiny_lens.model, request).images)
    turn = tiny_lens.intervention("gender", "male", 4.0)
    edited = tiny_lens.generate(request, turn)
    np.testing.assert_array_equal(
        edited.images, generate(tiny_lens.model, request, edit=make_edit([turn], tiny_lens.sae)).images
    )
    assert (edited.images != plain.images).any() and plain.edit is None
    start = record_trajectory(tiny_lens.model, request)
    np.testing.assert_array_equal(tiny_lens.generate(request, turn, start=start).images, edited.images)


def test_the_identity_changes_nothing(tiny_lens: DiffusionLens) -> None:
    plain = tiny_lens.generate(DOCTOR, seeds=SEEDS)
    same = tiny_lens.generate(plain.request, tiny_lens.intervention("gender", "male", 1.0))
    np.testing.assert_array_equal(plain.images, same.images)


def test_two_interventions_act_together_and_an_edit_acts_alone(tiny_lens: DiffusionLens) -> None:
    request = tiny_lens.request(DOCTOR, SEEDS)
    turns = (tiny_lens.intervention("gender", "male", 4.0), tiny_lens.intervention("age", "old", 4.0))
    together = tiny_lens.generate(request, *turns)
    np.testing.assert_array_equal(together.images, tiny_lens.generate(request, tiny_lens.edit(*turns)).images)
    with pytest.raises(LensError, match="either interventions"):
        tiny_lens.generate(request, turns[0], tiny_lens.edit(turns[1]))


def test_a_callback_stops_a_run(tiny_lens: DiffusionLens) -> None:
    def stop(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        tiny_lens.generate(DOCTOR, seeds=SEEDS, progress=steps(stop))
    assert len(tiny_lens.generate(DOCTOR, seeds=SEEDS).images) == len(SEEDS)


def test_seeds_come_from_one_place(tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match="which seeds"):
        tiny_lens.generate(DOCTOR)
    with pytest.raises(LensError, match="not both"):
        tiny_lens.generate(tiny_lens.request(DOCTOR, SEEDS), seeds=SEEDS)


def test_unknown_words(tiny_lens: DiffusionLens) -> None:
    assert tiny_lens.unknown_words("A portrait of a Plumber, and a nurse 7!") == ("plumber", ",", "and", "7", "!")
    opened = DiffusionLens(tiny_lens.folder, tiny_lens.manifest.model_copy(update={"vocabulary": None}))
    assert opened.unknown_words("anything goes") == ()


def test_attribution_equals_the_module_and_is_complete(tiny_lens: DiffusionLens) -> None:
    drawn = tiny_lens.generate(DOCTOR, seeds=SEEDS, capture=True)
    assert drawn.activations is not None
    found = tiny_lens.attribute(drawn, "gender")
    twin = integrated_gradients(tiny_lens.sae, tiny_lens.probes["gender"], drawn.activations.h)
    np.testing.assert_array_equal(found.scores, twin.scores)
    assert found.completeness_gap < 1e-5
    assert tiny_lens.attribute(drawn, "gender", method="gradient_x_activation").method == "gradient_x_activation"
    assert tiny_lens.attribute(drawn, "age", method="activation_difference").attribute.name == "age"
    with pytest.raises(LensError, match="no attribution method"):
        tiny_lens.attribute(drawn, "gender", method="magic")
    with pytest.raises(LensError, match="steers gender, age"):
        tiny_lens.attribute(drawn, "hat")
    with pytest.raises(LensError, match="capture=True"):
        tiny_lens.attribute(tiny_lens.generate(DOCTOR, seeds=SEEDS), "gender")


def test_features_and_interventions_follow_the_shipped_setting(tiny_lens: DiffusionLens) -> None:
    features = tiny_lens.feature_set("gender", "male")
    assert features.ids == tiny_lens.attributions["gender"].top_k(3, target="male").ids
    assert len(tiny_lens.feature_set("gender", "male", 2).ids) == 2
    turn = tiny_lens.intervention("gender", "male", 2.5, only_seeds=frozenset({1}), window=(1, 3))
    assert turn.features == features and turn.opposite is not None
    assert (turn.beta, turn.mode, turn.window, turn.only_seeds) == (2.5, "scale", (1, 3), frozenset({1}))
    assert turn.opposite.target == "female"
    added = tiny_lens.intervention(
        "gender", "male", 0.5, mode="add", opposite=None, overrides=[(features.ids[0], 0.25)], sampler="symmetric",
        hold=("age",),
    )  # fmt: skip
    assert added == Intervention(
        features, "add", strength=0.5, overrides=((features.ids[0], 0.25),), sampler="symmetric", hold=("age",)
    )
    assert turn.strength == 1.5 and tiny_lens.intervention("gender", "male", 1.0).strength == 0
    with pytest.raises(LensError, match="does not steer 'hat'"):
        tiny_lens.intervention("hat", "red", 1.0)
    with pytest.raises(LensError, match="no class of gender"):
        tiny_lens.intervention("gender", "tall", 1.0)


def test_an_evaluation_counts_what_the_classifier_reads(tiny_lens: DiffusionLens) -> None:
    base = tiny_lens.generate(DOCTOR, seeds=range(24))
    edited = tiny_lens.generate(base.request, tiny_lens.intervention("gender", "male", 5.0))
    found = tiny_lens.evaluate(edited, "gender", reference=base)
    reading = tiny_lens.classify(edited.images)["gender"]
    assert [share.count for share in found.shares] == reading.counts.tolist()
    assert found.n + found.n_uncertain == 24 and found.n_uncertain == reading.n_uncertain
    assert found.log_ratio is not None and found.log_ratio.numerator == "male"
    assert found.edit == edited.edit and found.request == base.request
    assert set(found.agreement) == {"age", "glasses"} and set(found.measurement.agreement) == {
        "gender",
        "age",
        "glasses",
    }
    same = tiny_lens.evaluate(base, "gender", reference=base)
    assert set(same.agreement.values()) == {1.0} and {c.difference for c in same.changes} == {0.0}
    assert tiny_lens.evaluate(base, "age").log_ratio is None and tiny_lens.evaluate(base, "age").agreement == {}
    with pytest.raises(LensError, match="other seeds"):
        tiny_lens.evaluate(edited, "gender", reference=tiny_lens.generate(DOCTOR, seeds=range(3)))
    with pytest.raises(LensError, match="another prompt"):
        tiny_lens.evaluate(edited, "gender", reference=tiny_lens.generate(NURSE, seeds=range(24)))
    with pytest.raises(LensError, match="does not read 'hat'"):
        tiny_lens.evaluate(edited, "hat")


def test_seeds_and_prompts_as_people_give_them(tiny_lens: DiffusionLens) -> None:
    plain = tiny_lens.generate(DOCTOR, seeds=(0, 1)).images
    np.testing.assert_array_equal(tiny_lens.generate(DOCTOR, seeds=np.arange(2)).images, plain)
    np.testing.assert_array_equal(tiny_lens.generate(DOCTOR, seeds=1).images, plain[1:])
    assert tiny_lens.sweep(DOCTOR, "gender", betas=np.array([1.0]), seeds=np.arange(2)).request.seeds == (0, 1)
    with pytest.raises(LensError, match="one prompt"):
        tiny_lens.generate([DOCTOR, NURSE], seeds=[0, 1])  # type: ignore[arg-type]
    for seeds in ([], np.array([])):
        with pytest.raises(LensError, match="this request has 0"):
            tiny_lens.sweep(DOCTOR, "gender", betas=[1.0], seeds=seeds)
    for n in (0, 2.5, "8"):
        with pytest.raises(LensError, match=r"this request has 0|n must be"):
            tiny_lens.sweep(DOCTOR, "gender", betas=[1.0], n=n)  # type: ignore[arg-type]
    for betas in ("1,2", [None], [[1.0, "x"]]):
        with pytest.raises(LensError, match="beta must be a number"):
            tiny_lens.sweep(DOCTOR, "gender", betas=betas, n=2)  # type: ignore[arg-type]


def test_a_sweep_measures_the_shipped_turn(tiny_lens: DiffusionLens) -> None:
    points = list(tiny_lens.sweep_points(DOCTOR, "gender", n=12))
    result = tiny_lens.sweep(DOCTOR, "gender", n=12)
    assert result.betas == tuple(p.beta for p in points) == (-4.0, 1.0, 6.0)
    assert result.target == "male" and not result.is_control
    edited = tiny_lens.generate(result.request, tiny_lens.intervention("gender", "male", 6.0))
    reading = tiny_lens.classify(edited.images)["gender"]
    assert [share.count for share in result.points[-1].shares] == reading.counts.tolist()
    np.testing.assert_array_equal(points[-1].labels, result.points[-1].labels)
    assert result.provenance["lens"] == tiny_lens.manifest.lens_id


def test_a_sweep_of_chosen_features_and_its_controls(tiny_lens: DiffusionLens) -> None:
    features = tiny_lens.feature_set("gender", "female", 2)
    chosen = tiny_lens.sweep(DOCTOR, features, betas=(1.0, 5.0), n=8)
    assert chosen.target == "female" and chosen.setting.startswith("2 features, one pole")
    random = tiny_lens.sweep(DOCTOR, "gender", betas=(1.0, 6.0), n=8, control="random")
    flipped = tiny_lens.sweep(DOCTOR, "gender", betas=(1.0, 6.0), n=8, control="flip")
    assert random.is_control and flipped.is_control and random.setting != flipped.setting
    turn = tiny_lens.intervention("gender", "male", 6.0)
    swapped = replace(turn, features=turn.opposite, opposite=turn.features)
    reading = tiny_lens.classify(tiny_lens.generate(flipped.request, swapped).images)["gender"]
    np.testing.assert_array_equal(flipped.points[-1].labels, reading.labels)


def test_balance_reads_the_sweep(tiny_lens: DiffusionLens) -> None:
    found = tiny_lens.balance(DOCTOR, "gender", n=24, target_share=0.4)
    result = tiny_lens.sweep(DOCTOR, "gender", n=24)
    assert found == balance(result, tiny_lens.classifier.confusion["gender"], target_share=0.4)


def test_a_card_shows_a_shipped_feature(tiny_lens: DiffusionLens) -> None:
    best = tiny_lens.feature_set("gender", "male").ids[0]
    card = tiny_lens.card(best)
    assert card.rank["gender"]["male"] == 1 and len(card.top.images) and card.top.images.shape[1:] == (16, 16, 3)
    assert {"gender", "age"} <= set(card.effects) <= {a.name for a in tiny_lens.classifier.attributes}
    assert card.effect_source


def test_pushing_uploads_the_sealed_files_alone(tiny_lens: DiffusionLens, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls["created"] = (repo_id, options["private"])

        def upload_folder(self, **options: Any) -> Any:
            calls.update(options)
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert tiny_lens.push_to_hub("me/lens", private=True) == "https://hub/commit"
    assert calls["created"] == ("me/lens", True)
    assert set(calls["allow_patterns"]) == {"lens.json", *tiny_lens.manifest.files}


def test_a_hub_lens_that_is_not_cached_is_named() -> None:
    with pytest.raises(LensError, match="no folder nobody/no-such-lens, and the hub did not give it"):
        DiffusionLens.from_pretrained("nobody/no-such-lens", offline=True)


# --- which model it is


@pytest.fixture
def unbundled(copied_lens: Callable[[], Path], tmp_path: Path) -> Path:
    """A lens whose model lies in a folder of its own, beside it: ``tmp_path / "model"``."""
    folder = copied_lens()
    shutil.move(folder / "pipeline", tmp_path / "model")
    manifest = read_manifest(folder)
    base = manifest.base_model.model_copy(update={"bundled": False, "source": str(tmp_path / "model")})
    write_manifest(folder, manifest.model_copy(update={"base_model": base}))
    return folder


def fine_tune(model: Path, part: str = "unet") -> None:
    """Change a model under its name, as further training does."""
    for file in (model / part).glob("*.safetensors"):
        save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_a_lens_notes_what_its_model_is(tiny_lens: DiffusionLens) -> None:
    noted = tiny_lens.manifest.base_model.digests
    assert noted == open_stored(tiny_lens.folder / "pipeline").digests()
    assert set(noted) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_another_model_under_the_same_name_is_refused(part: str, unbundled: Path, tmp_path: Path) -> None:
    assert DiffusionLens.from_pretrained(unbundled).generate(DOCTOR, seeds=[0]).images.any()
    fine_tune(tmp_path / "model", part)
    lens = DiffusionLens.from_pretrained(unbundled)
    with pytest.raises(LensError, match=f"The {part} of .*model is not the one that this lens was made on"):
        lens.generate(DOCTOR, lens.intervention("gender", "male", 2.0), seeds=[0])


def test_a_change_that_was_sealed_afterwards_is_refused_too(copied_lens: Callable[[], Path]) -> None:
    folder = copied_lens()
    fine_tune(folder / "pipeline")
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(LensError, match="The unet of this lens is not the one"):
        _ = DiffusionLens.from_pretrained(folder).model


def test_lenses_that_never_noted_their_model_still_open(unbundled: Path, tmp_path: Path) -> None:
    manifest = read_manifest(unbundled)
    values = manifest.model_dump(mode="json")
    for key in ("digests", "variant", "size", "max_sequence_length"):
        del values["base_model"][key]
    (unbundled / "lens.json").write_text(json.dumps(values))
    fine_tune(tmp_path / "model")
    lens = DiffusionLens.from_pretrained(unbundled)
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    assert lens.manifest.base_model.digests == {} and lens.model.model_id == manifest.base_model.id
    assert lens.manifest.lens_id == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_words_the_model_never_saw_are_refused_from_python(tiny_lens: DiffusionLens) -> None:
    for prompt in ("a portrait of a zebra", "a portrait of a (nurse:1.4)", "a nurse, 2024", "\ufeffa nurse"):
        with pytest.raises(LensError, match=r"never saw|invisible"):
            tiny_lens.generate(prompt, seeds=[0])
        with pytest.raises(LensError, match=r"never saw|invisible"):
            tiny_lens.sweep(prompt, "gender", n=2)
