"""Image quality and FD in audits: the same numbers as direct calls, identities, and one sentence per mistake."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import Run, mistake
from lens_fixtures import PROMPTS
from PIL import Image
from quality_sources import COLOUR, PretendInception
from tiny_clip import save_tiny_clip
from typer.testing import CliRunner

from diffusion_lens.base.types import LensError
from diffusion_lens.cli.app import app
from diffusion_lens.judging.readers import ClipConfig, ClipReader
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.measuring.quality import (
    FeatureSource,
    FeatureStatistics,
    classifier_source,
    clip_i,
    clip_t,
    frechet,
    inception_score,
    inception_source,
)
from diffusion_lens.model.generate import generate_batches
from diffusion_lens.results import metrics
from diffusion_lens.studies.audit.rows import Measures, QualityRow, Seen, image_quality
from diffusion_lens.studies.audit.run import Audit, audit, render

SEEDS = range(300, 400)
DOCTOR = PROMPTS[0]


def colours(images: np.ndarray) -> np.ndarray:
    tints = images.astype(np.float64).mean(axis=(1, 2)) / 25
    return np.exp(tints) / np.exp(tints).sum(axis=1, keepdims=True)


SOURCE = FeatureSource("colour", COLOUR.features, colours)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reader(clip_folder: Path) -> ClipReader:
    return ClipReader.load(ClipConfig(model_id=str(clip_folder), prompts={}, face_prompts={}), offline=True)


@pytest.fixture(scope="module")
def drawn(tiny_lens: DiffusionLens) -> dict[tuple[str, bool], np.ndarray]:
    """Prompt, edited → images of ``SEEDS``."""
    edit = tiny_lens.edit(tiny_lens.intervention("gender", "male", 3.0))
    found = {}
    for prompt in PROMPTS:
        for e in (None, edit):
            parts = generate_batches(tiny_lens.model, tiny_lens.request(prompt, SEEDS), edit=e, batch_size=50)
            found[prompt, e is not None] = np.concatenate([part.images for part in parts])
    return found


@pytest.fixture(scope="module")
def found(tiny_lens: DiffusionLens, reader: ClipReader) -> Audit:
    measures = Measures(fid=SOURCE, inception=SOURCE, clip=reader)
    turn = tiny_lens.intervention("gender", "male", 3.0)
    return audit(tiny_lens, PROMPTS, SEEDS, turns=[turn], measures=measures, batch_size=50)


def rows(found: Audit) -> dict[tuple[str | None, bool], QualityRow]:
    assert found.quality is not None
    return {(row.prompt, bool(row.edit)): row for row in found.quality.rows}


def test_every_prompt_as_by_direct_calls(found: Audit, drawn: Any, reader: ClipReader) -> None:
    assert found.quality is not None and len(found.quality.rows) == 6
    for prompt in PROMPTS:
        for edited in (False, True):
            row, images = rows(found)[prompt, edited], drawn[prompt, edited]
            assert (row.n, row.pooled) == (100, False)
            assert row.inception_score == pytest.approx(inception_score(images, SOURCE), rel=1e-6)
            expected = clip_t(images, prompt, reader)
            assert row.clip_t is not None and row.clip_t.cosine == pytest.approx(expected.cosine, abs=1e-6)
            assert row.clip_t.interval == pytest.approx(expected.interval, abs=1e-6)
        plain, turned = rows(found)[prompt, False], rows(found)[prompt, True]
        assert plain.fid is None and plain.clip_i is None  # nothing but themselves to compare with
        assert turned.fid is not None and turned.clip_i is not None
        direct = frechet(drawn[prompt, True], drawn[prompt, False], SOURCE)
        assert turned.fid.value == pytest.approx(direct.value, rel=1e-5) and turned.fid.value > 0
        assert (turned.fid.label, turned.fid.n_reference) == ("FID, colour features", 100)
        pair = clip_i(drawn[prompt, True], drawn[prompt, False], reader)
        assert turned.clip_i.value == pytest.approx(pair.value, abs=1e-6) and turned.clip_i.value < 1


def test_all_prompts_together_as_by_direct_calls(found: Audit, drawn: Any, reader: ClipReader) -> None:
    plain, turned = (np.concatenate([drawn[prompt, edited] for prompt in PROMPTS]) for edited in (False, True))
    row = rows(found)[None, True]
    assert (row.n, row.pooled) == (200, True)
    assert row.fid is not None and row.fid.value == pytest.approx(frechet(turned, plain, SOURCE).value, rel=1e-5)
    # seed by seed: the prompts take turns
    mixed = np.stack([drawn[prompt, True] for prompt in PROMPTS], axis=1).reshape(turned.shape)
    assert row.inception_score == pytest.approx(inception_score(mixed, SOURCE), rel=1e-6)
    texts = [prompt for prompt in PROMPTS for _ in SEEDS]
    assert row.clip_t is not None and row.clip_i is not None
    assert row.clip_t.value == pytest.approx(clip_t(turned, texts, reader).value, abs=1e-6)
    assert row.clip_i.value == pytest.approx(clip_i(turned, plain, reader).value, abs=1e-6)
    assert row.clip_i.interval[0] < row.clip_i.value < row.clip_i.interval[1] and row.clip_i.n == 200


def test_fairness_discrepancy_hard_and_soft(found: Audit, tiny_lens: DiffusionLens, drawn: Any) -> None:
    table = {(d.prompt, bool(d.edit), d.attribute): d for d in found.discrepancies}
    assert len(table) == 6 * 2
    for name in ("gender", "age"):
        reads = {key: tiny_lens.classify(images)[name] for key, images in drawn.items()}
        for (prompt, edited), read in reads.items():
            row = table[prompt, edited, name]
            share = read.counts / read.counts.sum()
            assert row.hard == pytest.approx(np.sqrt(((share - 1 / len(share)) ** 2).sum()))
            assert row.soft == pytest.approx(np.linalg.norm(read.probs.mean(axis=0) - 1 / len(share)), abs=1e-5)
            assert (row.n_hard, row.n_soft) == (read.counts.sum(), 100)
        pooled = table[None, False, name]
        plain = [reads[prompt, False] for prompt in PROMPTS]
        counts = np.sum([read.counts for read in plain], axis=0)
        assert pooled.hard == pytest.approx(metrics.fairness_discrepancy(counts / counts.sum()))
        assert pooled.soft == pytest.approx(
            metrics.fairness_discrepancy(np.mean([read.probs.mean(axis=0) for read in plain], axis=0)), abs=1e-5
        )
        assert pooled.pooled and pooled.n_soft == 200 and pooled.floor_soft < table[DOCTOR, False, name].floor_soft


def test_no_edit_is_no_distance(tiny_lens: DiffusionLens, reader: ClipReader, drawn: Any) -> None:
    source = classifier_source(tiny_lens.classifier, "own")
    itself = FeatureStatistics.of(source.features(drawn[DOCTOR, False]), "own")
    nothing = [tiny_lens.intervention("gender", "male", 1.0)]  # scaled by one
    for reference in (None, itself):
        measures = Measures(fid=source, reference=reference, clip=reader)
        same = audit(tiny_lens, [DOCTOR], SEEDS, turns=nothing, measures=measures, batch_size=50)
        assert same.quality is not None and len(same.quality.rows) == 2  # one prompt is not pooled
        plain, turned = same.quality.rows
        assert turned.fid is not None and turned.fid.value == pytest.approx(0, abs=1e-5)
        assert turned.clip_i is not None and turned.clip_i.value == pytest.approx(1, abs=1e-6)
        if reference is not None:
            assert plain.fid is not None and plain.fid.value == pytest.approx(0, abs=1e-5)


def test_the_page_names_features_reference_and_n(found: Audit) -> None:
    text = render(found)
    row = rows(found)[None, True]
    assert row.fid is not None and row.clip_i is not None
    for needed in ("FID, colour features", "the unedited images of the same seeds", "colour, 10 splits",
                   f"{row.fid.value:.4g}", f"{row.clip_i.value:.4f}", f"{row.clip_i.cosine:.4f}", "balanced up to",
                   "all prompts together, edited"):  # fmt: skip
        assert needed in text


@pytest.fixture
def run(tiny_lens_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty working folder, with the tiny lens as the default one."""
    monkeypatch.setenv("DIFFUSION_LENS", str(tiny_lens_folder))
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """torch-fidelity's stand-in; its weights lie where the answer says."""
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = PretendInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("DIFFUSION_LENS_WEIGHTS", str(tmp_path / "weights"))
    torch.save({"scale": torch.tensor([1.0, 2.0])}, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def save_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_the_command_measures_from_a_folder_and_from_its_statistics(
    run: Run,
    fidelity: Path,
    drawn: Any,
    clip_folder: Path,
    tmp_path: Path,
) -> None:
    folder = save_images(tmp_path / "reference", drawn[PROMPTS[1], False])
    source = inception_source(fidelity)
    features = source.features(drawn[PROMPTS[1], False])
    np.savez(tmp_path / "celeba.npz", mu=features.mean(axis=0), sigma=np.cov(features.T))
    images = drawn[DOCTOR, False]
    expected = frechet(images, drawn[PROMPTS[1], False], source).value
    words = ("audit", "-p", DOCTOR, "-n", 100, "--first-seed", 300, "--batch-size", 50, "--inception", fidelity)
    keep = ("--keep-statistics", "kept.safetensors")
    for reference, n in ((folder, 100), ("celeba.npz", None), ("kept.safetensors", 100)):
        kept = keep if reference == folder else ()
        more = ("--fid", reference, *kept, "--inception-score", "--clip", clip_folder, "--offline")
        done = run(*words, *more, "--json")
        assert done.exit_code == 0, done.output
        stored = json.loads(Path("audit/audit.json").read_text(encoding="utf-8"))
        assert stored["quality"] == json.loads(done.stdout)["quality"]
        (row,) = stored["quality"]["rows"]
        assert stored["quality"]["fid"] == row["fid"]["label"] == "FID"
        assert stored["quality"]["reference"] == str(reference)
        assert row["fid"]["value"] == pytest.approx(expected, rel=1e-4) and row["fid"]["n_reference"] == n
        assert row["inception_score"] == pytest.approx(inception_score(images, source), rel=1e-5)
        assert row["clip_i"] is None and 0 < row["clip_t"]["value"] < 1
        again = shlex.split(stored["command"])
        assert again[again.index("--fid") :] == [
            "--fid", str(reference), *kept, "--inception", str(fidelity), "--inception-score",
            "--clip", str(clip_folder), "--offline",
        ]  # fmt: skip


def test_the_command_with_the_classifiers_features(run: Run, tiny_lens: DiffusionLens) -> None:
    words = ("audit", "-p", DOCTOR, "-n", 50, "--turn", "gender=male:3", "--fid", "unedited")
    done = run(*words, "--fid-features", "classifier")
    assert done.exit_code == 0, done.output
    base = tiny_lens.generate(DOCTOR, seeds=range(50))
    edited = tiny_lens.generate(base.request, tiny_lens.intervention("gender", "male", 3.0))
    expected = frechet(edited.images, base.images, classifier_source(tiny_lens.classifier))
    (_, row) = json.loads(Path("audit/audit.json").read_text(encoding="utf-8"))["quality"]["rows"]
    assert row["fid"]["value"] == pytest.approx(expected.value, rel=1e-4, abs=1e-6)
    name = f"classifier {tiny_lens.classifier.classifier_id} features"
    assert row["fid"]["label"] == f"FID, {name}" and name in Path("audit/audit.html").read_text(encoding="utf-8")
    assert "Image quality" in done.stdout and f"{row['fid']['value']:.4g}" in done.stdout
    with Path("audit/measures.csv").open(encoding="utf-8") as lines:
        (line,) = [line for line in csv.DictReader(lines) if line["measure"] == row["fid"]["label"]]
    assert float(line["value"]) == pytest.approx(row["fid"]["value"], rel=1e-5) and line["with"].startswith("from ")


MISTAKES = [
    (("--fid", "unedited", "--fid-features", "classifier"), "needs edited ones; add a turn"),
    (("--fid", "nowhere", "--fid-features", "classifier"), "no folder of images and no statistics file at nowhere"),
    (("--fid", "empty", "--fid-features", "classifier"), "empty must hold 2 to 20,000 images; it holds 0"),
    (("--fid", "few", "--fid-features", "classifier"), "needs >= 50 reference images; few has 3"),
    (("--fid", "broken", "--fid-features", "classifier"), "1.png is no image of a known kind"),
    (("--fid", "notes.txt", "--fid-features", "classifier"), "notes.txt holds no feature statistics"),
    (("--fid", "array.npz"), "array.npz holds no feature statistics"),
    (("--fid", "wide.npz"), "wide.npz holds statistics of 5 features, but Inception v3 gives 2"),
    (("--fid", "nan.npz"), "nan.npz holds numbers that are not finite"),
    (("--fid", "few", "--fid-features", "eyes"), "'eyes' is none of them"),
    (("--fid", "few", "--fid-features", "clip"), "name one with --clip"),
    (("--fid-features", "classifier"), "add --fid"),
    (("--fid", "wide.npz", "--keep-statistics", "kept.safetensors"), "name a folder of images"),
    (("--fid", "few", "--keep-statistics", "kept.npz"), "'kept.npz' is another kind of file"),
    (("--inception", "x.pth"), "add one of them"),
    (("--inception-score", "--inception", "x.pth"), "get it from torch-fidelity's release v0.2.0 and save it as x.pth"),
    (("--inception-score", "-n", 99), "needs >= 100 images per prompt; 99 were asked for"),
    (("--turn", "gender=male:1", "--fid", "unedited", "-n", 49), "FID needs >= 50 images per prompt; 49"),
    (("--clip", "nowhere/clip", "--offline"), "'nowhere/clip' holds no usable CLIPModel on this machine"),
    (("--clip", "CLIP", "-n", 5), "CLIP scores need >= 10 images per prompt; 5"),
    (("--clip", "CLIP", "-p", ""), "add a prompt or a turn"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistakes_get_one_sentence_before_anything_is_drawn(
    run: Run, fidelity: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[Any, ...], sentence: str,
) -> None:  # fmt: skip
    (tmp_path / "weights").mkdir()
    cached = tmp_path / "weights" / "weights-inception-2015-12-05-6726825d.pth"
    cached.write_bytes(fidelity.read_bytes())
    (tmp_path / "empty").mkdir()
    save_images(tmp_path / "few", np.zeros((3, 8, 8, 3), np.uint8))
    (save_images(tmp_path / "broken", np.zeros((3, 8, 8, 3), np.uint8)) / "1.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no numbers")
    with (tmp_path / "array.npz").open("wb") as handle:
        np.save(handle, np.zeros(3))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    monkeypatch.setattr("diffusion_lens.studies.audit.run.observe", lambda *_, **__: pytest.fail("drew an image"))
    words = tuple(clip_folder if word == "CLIP" else word for word in words)
    prompt = () if "-p" in words else ("-p", DOCTOR)
    assert sentence in mistake(run("audit", *prompt, *words))
    assert not (tmp_path / "audit").exists()


def test_weights_that_are_missing_everywhere_are_named_with_their_place(run: Run, fidelity: Path) -> None:
    said = mistake(run("audit", "-p", DOCTOR, "--inception-score"))
    place = fidelity.parent / "weights" / "weights-inception-2015-12-05-6726825d.pth"
    assert said.endswith(f"is missing; get it from torch-fidelity's release v0.2.0 and save it as {place}.")


def test_nothing_is_measured_that_was_not_asked_for(tiny_lens: DiffusionLens) -> None:
    plain = audit(tiny_lens, [DOCTOR], range(12))
    assert plain.quality is None and "Image quality" not in render(plain)
    with pytest.raises(LensError, match="images per prompt"):
        audit(tiny_lens, [DOCTOR], range(12), measures=Measures(inception=SOURCE))


def test_images_without_a_prompt_have_no_text_to_be_compared_with(reader: ClipReader) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 12, 8))
    seen = [Seen(clip=row) for row in (rows[0], rows[1], rows[0], rows[2])]
    for prompts in ((None, "a doctor"), ("", "a doctor")):
        runs = [(prompt, edit) for prompt in prompts for edit in (None, "turned")]
        quality = image_quality(Measures(clip=reader), runs, seen, 12)
        assert [row.clip_t is None for row in quality.rows] == [True, True, False, False, False, False]
        assert [row.clip_i is None for row in quality.rows] == [True, False, True, False, True, False]
        together = quality.rows[-1]
        assert together.pooled and together.n == 24
        assert together.clip_t == quality.rows[3].clip_t and together.clip_t is not None and together.clip_t.n == 12
        assert together.clip_i is not None and together.clip_i.n == 24


def test_a_network_of_another_kind_is_not_filled_up_with_random_weights(run: Run, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    BertModel(small).save_pretrained(tmp_path / "bert")
    assert "'bert' is no CLIPModel: it lacks weights such as" in mistake(run("audit", "-p", DOCTOR, "--clip", "bert"))
