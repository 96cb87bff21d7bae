"""Naming a class in a prompt, and drawing images that are each told a prompt of their own."""

from __future__ import annotations

import numpy as np
import pytest
from lens_fixtures import PROMPTS

from diffusion_lens.base.types import Attribute, EditSpec, LensError
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.methods.controls import PromptEdit, PromptRewriting
from diffusion_lens.methods.edits import ClassDraw
from diffusion_lens.methods.prompts import name_class, said_classes
from diffusion_lens.model.denoise import condition_each
from diffusion_lens.model.generate import generate, request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.portraits import world

GENDER = Attribute("gender", ("woman", "man"))


def test_the_portraits_worlds_own_grammar() -> None:
    for noun in world.PROFILES:
        plain = world.caption(noun)
        for label in world.GENDER.classes:
            assert name_class(plain, world.GENDER, label) == world.caption(noun, gender=label)
        for label in world.AGE.classes:
            assert name_class(plain, world.AGE, label) == world.caption(noun, age=label)
        for label in world.TONE.classes:
            assert name_class(plain, world.TONE, label) == world.caption(noun, tone=label)


def test_explicit_prompts_are_seen() -> None:
    for noun in world.PROFILES:
        for attribute in world.STEERABLE:
            assert said_classes(world.caption(noun), attribute) == ()
            for label in attribute.classes:
                assert said_classes(name_class(world.caption(noun), attribute, label), attribute) == (label,)
    assert said_classes("A photo of a Woman and a man.", world.GENDER) == ("female", "male")
    assert said_classes("a human in a mantle, light on a dark wall", world.GENDER) == ()
    assert said_classes("light on a dark wall", world.TONE) == () and said_classes(None, world.AGE) == ()


def test_a_gate_leaves_explicit_prompts_alone(tiny_lens: DiffusionLens) -> None:
    from diffusion_lens.methods.bypass import Bypass

    seeds = range(3)
    told = {"prompts": PROMPTS, "seeds": [1, 2]}
    fits = [Bypass().fit(tiny_lens, "gender", "male", Bypass.options(gate=gate), **told) for gate in (False, True)]
    for prompt, kept in (("a portrait of a doctor", False), ("a portrait of a female doctor", True)):
        plain = tiny_lens.generate(prompt, seeds=seeds).images
        open_, shut = (tiny_lens.generate(prompt, f.edit(1.0), seeds=seeds).images for f in fits)
        assert not np.array_equal(open_, plain)
        assert np.array_equal(shut, plain if kept else open_)
    assert "gate" not in fits[0].record.options and fits[1].record.options["gate"] is True
    assert fits[0].digest != fits[1].digest


def test_other_sentences() -> None:
    assert name_class("", world.GENDER, "male") == "a portrait of a male person"
    assert name_class("", world.AGE, "old") == "a portrait of an old person"
    assert name_class("an engineer", world.GENDER, "male") == "a male engineer"
    told = "a portrait of a cook with glasses"
    assert name_class(told, world.GENDER, "female") == "a portrait of a female cook with glasses"
    assert name_class(told, world.TONE, "dark") == "a portrait of a cook with glasses and dark skin"
    assert name_class(told, world.GENDER, "female", template="{prompt}, {label}") == f"{told}, female"
    with pytest.raises(LensError, match="takes no prompt"):
        name_class(None, world.GENDER, "male")
    with pytest.raises(LensError, match="no class"):
        name_class(told, world.GENDER, "robot")


@pytest.mark.parametrize("kind", ["text", "xl", "lcm"])
def test_condition_each_equals_one_prompt_at_a_time(kind: str, tiny_models: dict[str, DiffusionModel]) -> None:
    model = tiny_models[kind]
    prompts = ["a woman", "a doctor", "a woman", "a nurse"]
    for scale in (1.0, 3.0):
        whole = condition_each(model, prompts, scale)
        n = len(prompts)

        def rows(values: dict[str, object], index: list[int]) -> dict[str, np.ndarray]:
            flat: dict[str, np.ndarray] = {}
            for name, value in values.items():
                inner = value if isinstance(value, dict) else {"": value}
                flat.update({f"{name}{k}": v.numpy()[index] for k, v in inner.items()})
            return flat

        for i, prompt in enumerate(prompts):
            one = model.condition(prompt, 1, scale)
            assert one.guided == whole.guided
            mine = rows(whole.kwargs, [i, n + i] if whole.guided else [i])
            for name, value in rows(one.kwargs, [0, 1] if one.guided else [0]).items():
                np.testing.assert_array_equal(mine[name], value)


def test_each_image_is_drawn_as_if_its_own_prompt_had_been_asked_for(text_model: DiffusionModel) -> None:
    edit = PromptEdit(ClassDraw(GENDER, (0.5, 0.5), 0), 0.7, "", EditSpec.of_custom("test"))
    classes = edit.classes(tuple(range(50)))
    woman, man = (next(seed for seed, label in classes.items() if label == wanted) for wanted in GENDER.classes)
    seeds = (woman, next(seed for seed in range(50) if seed not in classes), man)
    mixed = generate(text_model, request(text_model, "a portrait of a doctor", seeds, 3, 2.0), edit=edit).images
    told = ["a portrait of a woman doctor", "a portrait of a doctor", "a portrait of a man doctor"]
    for row, prompt in enumerate(told):
        whole = generate(text_model, request(text_model, prompt, seeds, 3, 2.0)).images
        np.testing.assert_array_equal(mixed[row], whole[row])


def test_strength_is_the_share_rewritten_and_grows_by_the_same_images(tiny_lens: DiffusionLens) -> None:
    fitted = PromptRewriting().fit(tiny_lens, "gender", {"female": 0.5, "male": 0.5}, prompts=PROMPTS, seeds=range(4))
    seeds = tuple(range(1000))
    some, more = (fitted.edit(s) for s in (0.3, 0.6))
    assert isinstance(some, PromptEdit) and isinstance(more, PromptEdit)
    few, many = some.classes(seeds), more.classes(seeds)
    assert len(few) / 1000 == pytest.approx(0.3, abs=0.05)
    assert len(many) / 1000 == pytest.approx(0.6, abs=0.05)
    assert few.items() <= many.items()
    assert np.mean([label == "male" for label in many.values()]) == pytest.approx(0.5, abs=0.06)
    with pytest.raises(LensError, match="from 0 to 1"):
        fitted.edit(1.2)


def test_models_without_prompts_are_refused(pixel_model: DiffusionModel, tiny_lens: DiffusionLens) -> None:
    class Unconditional:
        model = pixel_model
        manifest, probes = tiny_lens.manifest, tiny_lens.probes

    with pytest.raises(LensError, match="takes no prompt"):
        PromptRewriting().fit(Unconditional(), "gender", "male", prompts=[None], seeds=range(2))  # type: ignore[arg-type]
