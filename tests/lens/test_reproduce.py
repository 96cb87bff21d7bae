"""What was drawn is drawn again from its request and its edit as data; functions of one's own are edits too."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_fixtures import PROMPTS

from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.types import EditSpec, FeatureSet, GenerationRequest, Intervention, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.model.custom import FunctionEdit, fingerprint
from diffusion_lens.model.denoise import StepContext

SEEDS = (4, 9, 11)


@dataclass(frozen=True)
class Kept:
    """A result as it comes back from a file: no arrays, a request and an edit."""

    request: GenerationRequest
    edit: EditSpec | None


def kept(result: Any) -> Kept:
    """Through JSON and back."""
    values = json.loads(json.dumps({"request": to_plain(result.request), "edit": to_plain(result.edit)}))
    edit = None if values["edit"] is None else from_plain(EditSpec, values["edit"])
    return Kept(from_plain(GenerationRequest, values["request"]), edit)


def interventions(lens: DiffusionLens) -> dict[str, tuple[Intervention, ...]]:
    """Every way to steer by features."""
    steer, age = lens.intervention("gender", "male", 3.0), lens.intervention("age", "old", 2.0)
    first, mirrored = steer.features.ids[0], steer.opposite.ids[0] if steer.opposite else 0
    return {
        "scale": (steer,),
        "add": (replace(steer, mode="add", strength=0.7),),
        "suppress": (replace(steer, mode="suppress", strength=1.0),),
        "one pole": (replace(steer, opposite=None),),
        "window": (replace(steer, window=(1, 3)),),
        "symmetric": (replace(steer, sampler="symmetric"),),
        "overrides": (replace(steer, strength=0.1, overrides=((first, -0.9), (mirrored, 2.0))),),
        "only seeds": (replace(steer, only_seeds=frozenset({9})),),
        "hold": (replace(steer, hold=("age",)),),
        "several": (replace(steer, sampler="symmetric"), replace(age, sampler="symmetric", hold=("gender",))),
    }


NAMES = (
    "scale", "add", "suppress", "one pole", "window", "symmetric", "overrides", "only seeds", "hold", "several",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_edited_images_come_again_from_data(tiny_lens: DiffusionLens, name: str) -> None:
    drawn = tiny_lens.generate(PROMPTS[0], *interventions(tiny_lens)[name], seeds=SEEDS)
    plain = tiny_lens.generate(PROMPTS[0], seeds=SEEDS)
    assert not np.array_equal(drawn.images, plain.images)
    for result in (drawn, kept(drawn), kept(tiny_lens.measure(drawn))):
        again = tiny_lens.reproduce(result)
        np.testing.assert_array_equal(again.images, drawn.images)
        assert (again.request, again.edit, again.activation_ratio) == (
            drawn.request,
            drawn.edit,
            drawn.activation_ratio,
        )


def test_all_these_edits_differ(tiny_lens: DiffusionLens) -> None:
    assert set(interventions(tiny_lens)) == set(NAMES)
    specs = [tiny_lens.edit(*given).spec for given in interventions(tiny_lens).values()]
    assert len(set(specs)) == len({spec.digest for spec in specs}) == len(NAMES)


SHIPPED = """
from diffusion_lens.lens.lens import DiffusionLens
lens = DiffusionLens.from_pretrained("assets/portraits")
for name, setting in lens.settings.items():
    print(name, lens.edit(lens.intervention(name, setting.target, setting.betas[-1])).spec.digest)
"""


def test_digests_of_the_shipped_settings_are_the_same_in_every_process() -> None:
    root = Path(__file__).resolve().parents[2]
    told = []
    for seed in ("1", "2"):  # of Python's own hashes, which must not matter
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", SHIPPED], capture_output=True, text=True, check=True, cwd=root, env=environment
        )
        told.append(dict(line.split() for line in done.stdout.splitlines()))
    lens = DiffusionLens.from_pretrained(root / "assets" / "portraits")
    own = {
        name: lens.edit(lens.intervention(name, setting.target, setting.betas[-1])).spec.digest
        for name, setting in lens.settings.items()
    }
    assert told[0] == told[1] == own and len({*own.values()}) == len(own) == 3


@pytest.mark.parametrize("mode", ["scale", "add", "suppress"])
def test_strength_zero_is_no_edit_bit_for_bit(tiny_lens: DiffusionLens, mode: Any) -> None:
    plain = tiny_lens.generate(PROMPTS[0], seeds=SEEDS, capture=True)
    none = replace(tiny_lens.intervention("gender", "male", 3.0), mode=mode, strength=0.0, hold=("age",))
    same = tiny_lens.generate(plain.request, none, capture=True)
    np.testing.assert_array_equal(same.images, plain.images)
    assert plain.activations is not None and same.activations is not None
    np.testing.assert_array_equal(same.activations.h, plain.activations.h)


def test_unedited_images_come_again(tiny_lens: DiffusionLens) -> None:
    drawn = tiny_lens.generate(PROMPTS[0], seeds=SEEDS)
    np.testing.assert_array_equal(tiny_lens.reproduce(kept(drawn)).images, drawn.images)
    with pytest.raises(LensError, match="another edit than the result's"):
        tiny_lens.reproduce(drawn, edit=lambda h, context: h)


def test_a_spec_is_drawn_like_its_edit(tiny_lens: DiffusionLens) -> None:
    drawn = tiny_lens.generate(PROMPTS[0], tiny_lens.intervention("gender", "male", 3.0), seeds=SEEDS)
    assert drawn.edit is not None
    again = tiny_lens.generate(PROMPTS[0], seeds=SEEDS, edit=drawn.edit)
    named = tiny_lens.generate(PROMPTS[0], seeds=SEEDS, edit=tiny_lens.intervention("gender", "male", 3.0))
    np.testing.assert_array_equal(again.images, drawn.images)
    np.testing.assert_array_equal(named.images, drawn.images)


def test_what_another_lens_made_is_refused(tiny_lens: DiffusionLens) -> None:
    spec = tiny_lens.edit(replace(tiny_lens.intervention("gender", "male", 3.0), hold=("age",))).spec
    with pytest.raises(LensError, match="what other probes read"):
        tiny_lens.edit_of(replace(spec, hold_digest="0" * 12))
    foreign = FeatureSet((1,), (1.0,), "gender", "male", "f" * 16)
    with pytest.raises(LensError, match="belong to SAE ffff"):
        tiny_lens.edit_of(EditSpec((Intervention(foreign, "scale", strength=1.0),)))


def test_a_function_is_an_edit(tiny_lens: DiffusionLens) -> None:
    seen: list[StepContext] = []

    def late(h: torch.Tensor, context: StepContext) -> torch.Tensor:
        seen.append(context)
        return h.mul_(1.5) if context.index >= 2 else h

    plain = tiny_lens.generate(PROMPTS[0], seeds=SEEDS, capture=True)
    drawn = tiny_lens.generate(PROMPTS[0], seeds=SEEDS, edit=late, capture=True)
    assert [context.index for context in seen] == [0, 1, 2, 3] and {c.seeds for c in seen} == {SEEDS}
    assert not np.array_equal(drawn.images, plain.images) and drawn.activation_ratio == pytest.approx(1.5)
    assert plain.activations is not None and drawn.activations is not None
    # Captured before the edit of each step: the first that can differ is the one after step 2.
    np.testing.assert_array_equal(drawn.activations.h[:, :3], plain.activations.h[:, :3])
    assert not np.array_equal(drawn.activations.h[:, 3], plain.activations.h[:, 3])
    windowed = tiny_lens.generate(PROMPTS[0], FunctionEdit(lambda h, _: 1.5 * h, window=(2, 4)), seeds=SEEDS)
    np.testing.assert_array_equal(windowed.images, drawn.images)


def test_a_function_is_given_again_to_be_reproduced(tiny_lens: DiffusionLens) -> None:
    def double(h: torch.Tensor, context: StepContext) -> torch.Tensor:
        return 2 * h

    drawn = tiny_lens.generate(PROMPTS[0], seeds=SEEDS, edit=double)
    assert drawn.edit is not None and drawn.edit.custom is not None and drawn.edit.custom.name == "double"
    np.testing.assert_array_equal(tiny_lens.reproduce(kept(drawn), edit=double).images, drawn.images)
    with pytest.raises(LensError, match="'double' is an edit of one's own"):
        tiny_lens.reproduce(kept(drawn))
    with pytest.raises(LensError, match="another edit than the result's"):
        tiny_lens.reproduce(drawn, edit=lambda h, context: 3 * h)


def test_a_function_that_returns_no_map_is_refused(tiny_lens: DiffusionLens) -> None:
    with pytest.raises(LensError, match="it returned NoneType"):
        tiny_lens.generate(PROMPTS[0], seeds=SEEDS, edit=lambda h, context: None)
    with pytest.raises(LensError, match="must keep the shape"):
        tiny_lens.generate(PROMPTS[0], seeds=SEEDS, edit=lambda h, context: h[:1])
    with pytest.raises(LensError, match="a function of h and its context"):
        tiny_lens.generate(PROMPTS[0], seeds=SEEDS, edit=3)  # type: ignore[arg-type]
    with pytest.raises(LensError, match="one other edit"):
        tiny_lens.generate(PROMPTS[0], tiny_lens.intervention("age", "old", 2), seeds=SEEDS, edit=lambda h, context: h)


FACTOR, SHIFT = 2.0, torch.zeros(2)


def by_global(h: Any, context: Any) -> Any:
    return FACTOR * h + SHIFT.sum()


def by_helper(h: Any, context: Any) -> Any:
    return by_global(h, context)


def by_closure(factor: Any) -> Any:
    return lambda h, context: factor * h


def test_functions_are_told_apart_by_code_and_by_values(monkeypatch: pytest.MonkeyPatch) -> None:
    same = [by_closure(2.0), by_closure(2.0), by_closure(torch.ones(2)), by_closure(torch.ones(2))]
    digests = [fingerprint(f) for f in same]
    assert digests[0] == digests[1] != digests[2] == digests[3]
    others = [
        by_closure(3.0), by_closure("2.0"), by_closure([2.0]), by_closure({"a": 2.0}), by_closure(np.ones(2)),
        by_closure(torch.ones(2, dtype=torch.bfloat16)), by_closure(torch.ones(3)), by_closure(object()),
        by_closure(object()), by_closure(by_closure(2.0)), by_closure(np.mean), by_closure(np.sum), by_global,
        by_helper, functools.partial(by_helper, context=1), functools.partial(by_helper, context=2),
        lambda h, context: h + 1, lambda h, context: h + 2, lambda h, context: h - 2,
        lambda h, context, f=1.0: f * h, lambda h, context, f=2.0: f * h,
        lambda h, context: (lambda x: x + 1)(h), lambda h, context: (lambda x: x + 2)(h),
    ]  # fmt: skip
    found = [fingerprint(f) for f in others]
    assert len({*digests, *found}) == 2 + len(others)
    before = fingerprint(by_global), fingerprint(by_helper)
    for name, value in (("FACTOR", 3.0), ("SHIFT", torch.ones(2))):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, value)
            assert fingerprint(by_global) != before[0] and fingerprint(by_helper) != before[1]
    assert (fingerprint(by_global), fingerprint(by_helper)) == before


def test_a_function_that_names_itself_has_a_fingerprint() -> None:
    def again(h: Any, context: Any, depth: int = 0) -> Any:
        return h if depth else again(h, context, 1)

    assert fingerprint(again) == fingerprint(again)
