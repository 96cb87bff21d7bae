"""Storing into a lens: old or new after every kill, one writer at a time, and no seal on what somebody else changed."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kills import at_once, die_at, die_by_signal, needs_fork
from measured import measured

from diffusion_lens.base import transaction
from diffusion_lens.base.files import save_tensors, sha256_of, write_json
from diffusion_lens.base.transaction import changing, settle
from diffusion_lens.base.types import Attribute, GenerationRequest, LensError
from diffusion_lens.lens.folder import LensFolder
from diffusion_lens.results.counted import CountedShares
from diffusion_lens.results.kinds import KINDS, kind_of
from diffusion_lens.results.manifest import (
    MANIFEST,
    AttributeConfig,
    BaseModelRef,
    Manifest,
    commit,
    commit_whole,
    read_manifest,
    required,
    verify,
    write_manifest,
)
from diffusion_lens.results.measurement import Measurement
from diffusion_lens.results.sweeps import SweepPoint, SweepResult

GENDER = Attribute("gender", ("female", "male"))


def manifest() -> Manifest:
    """Of a lens that bundles its pipeline."""
    return Manifest(
        name="small",
        base_model=BaseModelRef(id="small", source="pipeline", bundled=True),
        hook_name="mid_block",
        scheduler="DDIMScheduler",
        n_steps=4,
        guidance_scale=2.0,
        attributes=(AttributeConfig(name="gender", classes=GENDER.classes),),
        sae_id="0" * 16,
        classifier_id="1" * 16,
    )


def fill(folder: Path, seed: int) -> None:
    """What every lens has, of random numbers."""
    rng = np.random.default_rng(seed)
    for name in required(manifest()):
        if name.endswith(".json"):
            write_json(folder / name, {"seed": seed})
        else:
            save_tensors(folder / name, {"w": rng.normal(size=7)})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A lens folder of a few small files: enough to store into, not to draw with."""
    folder = tmp_path / "small"
    fill(folder, 0)
    write_manifest(folder, manifest())
    return folder


def opened(folder: Path) -> LensFolder:
    return LensFolder.from_pretrained(folder)


def counted(first_seed: int) -> CountedShares:
    return CountedShares({"": images(prompt="", first_seed=first_seed)})


def images(n: int = 4, prompt: str = "a nurse", first_seed: int = 0, **changes: object) -> Measurement:
    """Some images, every second one male, as the small lens's classifier read them."""
    found = measured({GENDER: np.arange(n) % 2}, **changes)
    request = GenerationRequest(prompt, tuple(range(first_seed, first_seed + n)), 4, 2.0, "small")
    return replace(found, request=request, classifier_id="1" * 16)


def first_seed_of(lens: LensFolder) -> int:
    """Which count the lens holds."""
    assert lens.counted is not None
    return lens.counted.measurements[""].request.seeds[0]


def sweep(n_images: int = 3, target: str = "male", setting: str = "a turn") -> SweepResult:
    """One point, with some images."""
    shown = np.random.default_rng(n_images).integers(0, 255, (n_images, 8, 8, 3), np.uint8)
    point = SweepPoint(images(examples=shown), GENDER, beta=1.0)
    return SweepResult((point,), GENDER, target, point.request, setting, "1" * 16, False, {"sae": "0" * 16})


def files(folder: Path) -> dict[str, str]:
    """Name → sha256 of everything but hidden files."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in found)
    return {name: sha256_of(folder / name) for name in names if not name.startswith(".")}


def refit(folder: Path) -> None:
    with changing(folder) as change:
        fill(change.staged, 1)
        commit_whole(change, manifest().model_copy(update={"name": "refitted"}))


class TestKinds:
    def test_a_result_is_kept_and_found_again(self, small: Path) -> None:
        lens = opened(small)
        assert lens.counted is None and lens.sweeps == ()
        assert lens.store(counted(1)) == small / "counted" / "shares.json"
        path = lens.store(sweep())
        assert path.parent == small / "sweeps"
        for here in (lens, opened(small)):
            assert first_seed_of(here) == 1 and len(here.sweeps) == 1
            assert here.manifest == verify(small)
        assert lens.sweeps[0].points[0].examples.shape == (3, 8, 8, 3)

    def test_the_same_measurement_again_replaces_its_files_and_others_stay(self, small: Path) -> None:
        lens = opened(small)
        first = lens.store(sweep(3))
        assert (small / "sweeps" / f"{first.stem}-examples-00.webp").is_file()
        assert lens.store(sweep(0)) == first, "other images, the same request"
        assert not list(first.parent.glob("*examples*"))
        lens.store(sweep(2, setting="another turn"))
        assert len(lens.sweeps) == len(opened(small).sweeps) == 2

    def test_what_a_lens_does_not_keep_is_refused_by_name(self, small: Path) -> None:
        with pytest.raises(LensError, match=r"A lens keeps no int; it keeps SweepResult, Comparison"):
            opened(small).store(3)
        with pytest.raises(LensError, match="A lens keeps no Path"):
            opened(small).stored(Path)

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (
                CountedShares({"": replace(images(prompt=""), classifier_id="2")}),
                r"This count of shares was measured on another classifier \(2;",
            ),
            (replace(sweep(), classifier_id="2"), "another classifier"),
            (replace(sweep(), provenance={"sae": "2"}), "another SAE"),
            (replace(sweep(), request=replace(sweep().request, model_id="2")), "another model"),
        ],
    )
    def test_a_result_of_another_lens_is_refused_and_leaves_no_trace(
        self, small: Path, result: object, message: str
    ) -> None:
        before = files(small)
        with pytest.raises(LensError, match=message):
            opened(small).store(result)
        assert files(small) == before

    def test_a_stored_result_of_another_lens_is_refused_when_read(self, small: Path) -> None:
        opened(small).store(counted(1))
        write_manifest(small, read_manifest(small).model_copy(update={"classifier_id": "2" * 16}))
        with pytest.raises(LensError, match="another classifier"):
            _ = opened(small).counted

    def test_every_kind_names_its_files_and_no_other_kinds(self) -> None:
        names = {kind.main("x"): kind for kind in KINDS}
        listed = manifest().model_copy(
            update={"files": dict.fromkeys([*names, "sweeps/x-examples.json", "other.json"])}
        )
        for name, kind in names.items():
            assert [kind.main(stem) for stem in kind.stems(listed)] == [name]
            assert name in kind.files(kind.stems(listed)[0], listed)
            assert kind_of(kind.result) is kind
        (sweeps,) = (kind for kind in KINDS if kind.result is SweepResult)
        assert sweeps.files("x", listed) == ["sweeps/x.json", "sweeps/x-examples.json"]


class TestSeals:
    def test_a_store_does_not_vouch_for_what_somebody_else_changed(self, small: Path) -> None:
        lens = opened(small)
        (small / "probes.safetensors").write_bytes(b"x" * (small / "probes.safetensors").stat().st_size)
        lens.store(counted(1))
        with pytest.raises(LensError, match=r"probes\.safetensors is not the file of this lens"):
            opened(small)

    def test_a_store_does_not_adopt_a_foreign_file(self, small: Path) -> None:
        lens = opened(small)
        (small / "pipeline" / "unet.bin").write_bytes(b"x")
        lens.store(counted(1))
        with pytest.raises(LensError, match=r"unet\.bin does not belong"):
            opened(small)
        assert (small / "pipeline" / "unet.bin").is_file(), "nor does it remove what is not its own"

    def test_a_whole_new_lens_takes_the_place_of_all_of_the_old_one(self, small: Path) -> None:
        opened(small).store(sweep())
        (small / "README.md").write_text("a card")
        refit(small)
        assert opened(small).manifest.name == "refitted" and opened(small).sweeps == ()
        assert not (small / "sweeps").exists() and (small / "README.md").is_file()

    def test_adopted_files_are_sealed_as_they_lie(self, small: Path) -> None:
        (small / "pipeline" / "model_index.json").write_text("{}")
        with changing(small) as change:
            fill(change.staged, 1)
            shutil.rmtree(change.staged / "pipeline")
            commit_whole(change, manifest(), adopted=["pipeline/model_index.json"])
        assert verify(small).files["pipeline/model_index.json"].bytes == 2

    def test_another_process_refits_while_this_one_has_the_lens_open(self, small: Path) -> None:
        lens = opened(small)
        with changing(small) as change:
            fill(change.staged, 1)
            commit_whole(change, manifest().model_copy(update={"classifier_id": "2" * 16}))
        with pytest.raises(LensError, match="another classifier"):
            lens.store(counted(1))


class TestWhole:
    def test_an_error_while_writing_leaves_the_old_lens(self, small: Path) -> None:
        before = files(small)
        with pytest.raises(RuntimeError), changing(small) as change:
            fill(change.staged, 1)
            raise RuntimeError
        assert files(small) == before and not (small / transaction.STAGED).exists()
        verify(small)

    def test_an_error_while_moving_leaves_the_new_lens(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = os.replace, []

        def breaks(source: Path, target: Path) -> None:
            calls.append(target)
            if Path(target) == small / "probes.safetensors":
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", breaks)
        with pytest.raises(KeyboardInterrupt):
            refit(small)
        monkeypatch.undo()
        assert (small / transaction.PENDING).is_dir()
        assert verify(small).name == "refitted" and not (small / transaction.PENDING).exists()

    @needs_fork
    @pytest.mark.parametrize("change", ["first", "again", "whole"])
    def test_killed_at_any_touch_of_a_file_the_lens_is_the_old_one_or_the_new_one(
        self, small: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fsync", lambda _: None)  # milliseconds each; the process that dies counts them
        if change == "again":
            opened(small).store(sweep(3))
            opened(small).store(counted(0))
        stored = {"first": sweep(3), "again": sweep(0), "whole": None}[change]
        old = read_manifest(small)
        seen = set()
        for point in range(1000):
            folder = tmp_path / f"{change}-{point}"
            shutil.copytree(small, folder)
            lens = opened(folder)
            died = die_at(point, lambda: refit(folder) if stored is None else lens.store(stored))  # noqa: B023
            found = verify(folder)
            seen.add(found.lens_id)
            assert found.lens_id == old.lens_id or len(seen - {old.lens_id}) == 1
            assert set(files(folder)) == {*found.files, MANIFEST}
            LensFolder.from_pretrained(folder).store(counted(7))  # no lock is left behind
            assert first_seed_of(opened(folder)) == 7
            shutil.rmtree(folder)
            if not died:
                break
        assert not died and point > 40 and len(seen) == 2

    @needs_fork
    def test_killed_by_signal_while_storing_all_the_time(self, small: Path) -> None:
        rng, lens = random.Random(0), opened(small)

        def work() -> None:
            for n in (0, 1, 2, 3):
                lens.store(sweep(n))
                lens.store(counted(n))

        for _ in range(40):
            die_by_signal(work, 0.005, 0.15, rng)
            found = verify(small)
            assert set(files(small)) == {*found.files, MANIFEST}
            assert all(len(s.points) == 1 for s in opened(small).sweeps)
        lens.store(counted(99))
        assert first_seed_of(opened(small)) == 99

    def test_a_change_that_cannot_be_finished_here_is_named(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (small / transaction.PENDING).mkdir()
        write_json(small / transaction.PENDING / transaction.JOURNAL, [])
        with pytest.raises(LensError, match="not the journal of a change"):
            verify(small)

    @pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "a\\b"])
    def test_a_journal_cannot_reach_outside_its_folder(self, small: Path, name: str) -> None:
        outside = small.parent / "outside"
        outside.write_text("mine")
        (small / transaction.PENDING).mkdir()
        write_json(small / transaction.PENDING / transaction.JOURNAL, {"removed": [name], "last": None})
        with pytest.raises(LensError, match="outside the lens folder"):
            settle(small)
        assert outside.read_text() == "mine"


class TestOneWriter:
    def test_a_second_writer_is_told_who_holds_the_lens(self, small: Path) -> None:
        with changing(small):
            with pytest.raises(LensError, match=f"is being written by process {os.getpid()} on"), changing(small, 0.1):
                pass
            verify(small)  # reading needs no lock
        with changing(small, 0.1):
            pass

    def test_a_second_writer_waits_for_the_first(self, small: Path) -> None:
        begun, order = threading.Event(), []

        def first() -> None:
            with changing(small) as change:
                begun.set()
                time.sleep(0.2)
                write_json(change.staged / "counted" / "shares.json", {"first": True})
                commit(change, read_manifest(small))
                order.append("first")

        thread = threading.Thread(target=first)
        thread.start()
        begun.wait()
        opened(small).store(counted(2))
        order.append("second")
        thread.join()
        assert order == ["first", "second"] and first_seed_of(opened(small)) == 2

    @needs_fork
    def test_many_writers_and_readers_at_once_lose_nothing(self, small: Path) -> None:
        lens = opened(small)

        def writer(number: int) -> Callable[[], object]:
            return lambda: [lens.store(sweep(2, setting=f"{number} {i}")) for i in range(4)]

        def reader() -> None:
            for _ in range(30):
                assert all(len(s.points[0].examples) == 2 for s in opened(small).sweeps)

        assert at_once([writer(0), reader, writer(1), reader, writer(2)]) == [0] * 5
        assert len(opened(small).sweeps) == 12
        assert {s.setting for s in opened(small).sweeps} == {f"{n} {i}" for n in range(3) for i in range(4)}
