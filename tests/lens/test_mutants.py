"""A stranger's lens may hold anything: it is opened, or refused in a sentence, within a gibibyte and a while.

``LENS_MUTANTS=20`` makes so many mutants of every file (a minute or more); a few of each are made by default.
"""

from __future__ import annotations

import os
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from dissected import dissection
from mutants import bounded, copy_of, mutate, use

from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.results.comparison import UNSTEERED, CompareConfig, Comparison, MethodRow
from diffusion_lens.results.counted import CountedShares
from diffusion_lens.results.joint import JointResult, JointTable
from diffusion_lens.results.manifest import MANIFEST

PER_FILE = int(os.environ.get("LENS_MUTANTS", "2"))


@pytest.fixture(scope="module")
def full_lens(tiny_lens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny lens with a result of every kind in it."""
    folder = tmp_path_factory.mktemp("full") / "lens"
    shutil.copytree(tiny_lens_folder, folder)
    lens = DiffusionLens.from_pretrained(folder)
    prompt = lens.prompts[0]
    unedited = lens.measure(lens.generate(prompt, seeds=range(8)))
    edit = lens.intervention("gender", "male", 6.0)
    edited = lens.measure(lens.generate(prompt, edit, seeds=range(8)), reference=unedited)
    lens.store(dissection(lens.manifest.sae_id))
    lens.store(CountedShares({str(prompt): unedited}))
    gender = lens.attribute_named("gender")
    rows = tuple(
        MethodRow(key, key, "none", False, "male", 1.0, "β", 8, one.figures("gender", (0.5, 0.5)))
        for key, one in ((UNSTEERED, unedited),)
    )
    lens.store(Comparison(
        config=CompareConfig(attribute="gender", prompt=prompt), attribute=gender, target=(0.5, 0.5), rows=rows,
        curves={}, labels={}, rule="a rule", lens_key="k", sae_id=lens.manifest.sae_id,
        model_id=lens.manifest.base_model.id, classifier_id=lens.manifest.classifier_id,
    ))  # fmt: skip
    table = JointTable(
        ("gender", "age"), (gender.classes, lens.attribute_named("age").classes), np.ones((2, 3), int), 8
    )
    lens.store(JointResult(
        table, table, {"gender": edited["gender"].shares}, {"gender": edited["gender"].changes},
        {"gender": {"male": 0.1}}, (1,), 0.0, "both", {"gender": "male"}, prompt, lens.manifest.sae_id,
    ))  # fmt: skip
    return folder


def test_the_lens_that_is_mutated_opens_whole(full_lens: Path) -> None:
    assert use(full_lens, draw=True) == []


def test_no_mutant_gives_a_traceback_hangs_or_eats_memory(full_lens: Path, tmp_path: Path) -> None:
    names = sorted([*DiffusionLens.from_pretrained(full_lens).manifest.files, MANIFEST])
    refused = 0
    for name in names:
        for turn in range(PER_FILE):
            folder = tmp_path / "mutant"
            copy_of(full_lens, folder)
            done = mutate(folder, name, random.Random(zlib.crc32(f"{name} {turn}".encode())))
            try:
                with bounded():
                    refused += bool(use(folder, draw=name.startswith(("pipeline", "probes", "sae", MANIFEST))))
            except BaseException as error:
                error.add_note(f"mutant {turn} of {done}")
                raise
            shutil.rmtree(folder)
    assert refused > len(names) * PER_FILE // 4, "the mutants hardly change anything"
