"""One check of prompts, in the one place that draws: nothing unknown, nothing cut off, nothing invisible."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MAX_TOKENS

from diffusion_lens.base.types import LensError
from diffusion_lens.model.activations import SampleSpec, collect_to
from diffusion_lens.model.generate import generate, record_trajectory, request
from diffusion_lens.model.pipelines import DiffusionModel
from diffusion_lens.model.prompts import check_words, unknown_pieces

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ("a", "portrait", "of", "nurse", "firefighter", "x-ray", "doctor's")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("", ()),
        ("A Portrait  of a\tnurse\n", ()),
        ("a portrait of a zebra", ("zebra",)),
        ("a portrait of a (firefighter:1.4)", ("(", ":", "1.4", ")")),
        ("a ((nurse))", ("((", "))")),
        ("a nurse, 2024", (",", "2024")),
        ("a nurse 🚒👩‍🚒", ("🚒👩‍🚒",)),
        ("a_nurse", ("_",)),
        ("nurse2", ("2",)),
        ("x-ray doctor's x–ray", ("x", "–", "ray")),
        ("ｎｕｒｓｅ", ("ｎｕｒｓｅ",)),
        ("nursé nurse\u0301", ("nursé", "nursé")),
        ("a nurse.", (".",)),
        ("一 nurse", ("一",)),
    ],
)
def test_everything_that_a_closed_vocabulary_has_not_is_named(prompt: str, unknown: tuple[str, ...]) -> None:
    assert unknown_pieces(prompt, KNOWN) == unknown
    assert unknown_pieces(prompt, None) == ()
    if unknown:
        with pytest.raises(LensError, match=r"never saw .*; the words it knows are a, portrait") as caught:
            check_words(prompt, KNOWN)
        assert f"“{unknown[0]}”" in str(caught.value)
    else:
        check_words(prompt, KNOWN)


def test_pieces_lose_nothing_but_white_space() -> None:
    text = "(a:1.4), 2024 – «nurse» 🚒_x it's 3,5!"
    assert "".join(unknown_pieces(text, ())) == "".join(text.split())


@pytest.mark.parametrize("character", ["\ufeff", "\u200b", "\u202e", "\x00", "\x07", "\u00ad", "\ud800"])
def test_invisible_characters_are_refused_by_number(character: str) -> None:
    for vocabulary in (None, KNOWN):
        with pytest.raises(LensError, match=f"U\\+{ord(character):04X}"):
            check_words(f"{character}a nurse", vocabulary)


@pytest.mark.parametrize(
    "prompt", ["👩‍🚒 at work", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "می‌خواهم", "a\u00a0nurse\n", "at 10:30 (a clock)", "f(x), [1]"]
)
def test_what_an_open_vocabulary_may_hold(prompt: str) -> None:
    check_words(prompt)


@pytest.mark.parametrize("prompt", ["a (firefighter:1.4)", "(red hair : .5)", "[nurse:0.5]", "x (a, b:1.25) y"])
def test_weights_are_refused_where_they_would_be_read_as_text(prompt: str) -> None:
    with pytest.raises(LensError, match="Weights are not read"):
        check_words(prompt)


# --- in the model


def long_prompt(n: int) -> str:
    """``n`` tokens between the two that begin and end a text."""
    return " ".join(("a", "of")[i % 2] for i in range(n))


@pytest.mark.parametrize("kind", ["text", "xl", "lcm"])
def test_what_would_be_cut_off_is_named(kind: str, tiny_models: dict[str, DiffusionModel]) -> None:
    model = tiny_models[kind]
    fits = long_prompt(MAX_TOKENS - 2)
    model.check_prompt(fits)
    with pytest.raises(LensError, match=f"{MAX_TOKENS + 2} tokens and the model reads {MAX_TOKENS}: “man woman” would"):
        model.check_prompt(f"{fits} man woman")


def test_words_that_the_tokenizer_cannot_read_are_named(text_model: DiffusionModel) -> None:
    for word in ("42", "🚒", "<|endoftext|>", "nurse<|startoftext|>"):
        with pytest.raises(LensError, match="cannot read"):
            text_model.check_prompt(f"a nurse {word}")


@pytest.mark.parametrize("prompt", ["a zebra", "a nurse, 2", long_prompt(MAX_TOKENS), "\ufeffa nurse", "a (nurse:1.4)"])
def test_nothing_draws_or_encodes_such_a_prompt(prompt: str, text_model: DiffusionModel, tmp_path: Path) -> None:
    closed = replace(text_model, vocabulary=("a", "nurse"))
    wanted = request(closed, prompt, [0], 2)
    for draw in (
        lambda: generate(closed, wanted),
        lambda: record_trajectory(closed, wanted),
        lambda: closed.condition(prompt, 1, 1.0),
        lambda: collect_to(tmp_path / "store", closed, [wanted], SampleSpec()),
    ):
        with pytest.raises(LensError):
            draw()
    assert generate(closed, request(closed, "a nurse", [0], 2)).images.shape == (1, 16, 16, 3)


def test_a_cached_prompt_does_not_open_a_closed_vocabulary(text_model: DiffusionModel) -> None:
    text_model.condition("a doctor", 1, 1.0)
    with pytest.raises(LensError, match="never saw “doctor”"):
        replace(text_model, vocabulary=("a", "nurse")).condition("a doctor", 1, 1.0)


def test_words_are_checked_without_torch() -> None:
    code = (
        "import sys\nfrom diffusion_lens.model.prompts import check_words\ncheck_words('a nurse', ('a', 'nurse'))\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
