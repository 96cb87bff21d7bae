"""Options that several commands share, and what is made from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_lens.types import MAX_IMAGES, MAX_SEED, Intervention, LensError

if TYPE_CHECKING:
    from diffusion_lens.lens import DiffusionLens

BUNDLED = Path("assets/portraits")

LensOption = Annotated[
    str,
    typer.Option("--lens", "-l", envvar="DIFFUSION_LENS", help="Lens folder or hub id; the bundled one by default."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Also write an interactive plot to this file.")]
ImagesOption = Annotated[int, typer.Option("--images", "-n", help="How many images, one seed each.")]
FirstSeedOption = Annotated[int, typer.Option("--first-seed", help="Seeds count up from here.")]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Images drawn at once.")]
AttributeOption = Annotated[str, typer.Option("--attribute", "-a", help="The attribute to look at, e.g. gender.")]
TargetOption = Annotated[
    str | None, typer.Option("--target", "-t", help="The class to turn towards; the lens's own by default.")
]
PromptArgument = Annotated[
    str | None,
    typer.Argument(help="What to draw; '' is the empty prompt. Leave it out for models without prompts."),
]


def pick_device(name: str) -> str:
    """``auto`` → ``cuda`` where torch finds one; raises ``LensError`` for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise LensError(f"There is no device '{name}' here; choose cpu, or auto.") from None
    return name


def hide_loading_bars() -> None:
    """Keep the libraries' bars over a pipeline's parts and weights off standard error; downloads still show theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def open_lens(source: str, device: str = "auto") -> DiffusionLens:
    """Open a lens, after checking its files; the bundled one is found from any working directory."""
    from diffusion_lens.lens import DiffusionLens

    hide_loading_bars()
    if not source:
        beside = Path(__file__).resolve().parents[2] / BUNDLED
        source = str(BUNDLED if BUNDLED.is_dir() else beside)
    return DiffusionLens.from_pretrained(source, device=pick_device(device))


def seeds_of(n: int, first: int) -> range:
    """``n`` seeds from ``first`` on; checked before anything large is made."""
    if not 1 <= n <= MAX_IMAGES:
        raise LensError(f"Ask for 1 to {MAX_IMAGES:,} images; you asked for {n:,}.")
    if not 0 <= first <= MAX_SEED - n:
        raise LensError("Seeds are whole numbers from 0 to 2^63 - 1.")
    return range(first, first + n)


def checked_prompt(lens: DiffusionLens, prompt: str | None) -> str | None:
    """The prompt as the lens takes it; refuses words that the model never saw, and a prompt where none is taken."""
    if lens.prompts == (None,):
        if prompt:
            raise LensError("This model takes no prompt; leave it out.")
        return None
    if prompt is None:
        shown = ", ".join(f"'{p}'" for p in lens.prompts[:3])
        raise LensError(f"This model needs a prompt, for example {shown}.")
    strangers = lens.unknown_words(prompt)
    if strangers:
        known = ", ".join(lens.manifest.vocabulary or ())
        raise LensError(f"The model never saw the word '{strangers[0]}'; it knows: {known}.")
    return prompt


def parse_betas(text: str | None) -> tuple[float, ...] | None:
    """``"-1,0,1.5"`` → numbers; ``None`` stays ``None``."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise LensError(f"Strengths are numbers with commas between them, like '-1,0,1,2'; got '{text}'.") from None


def parse_turn(lens: DiffusionLens, text: str) -> Intervention:
    """``"gender=male:2"`` → the lens's shipped turn of gender towards male at β = 2."""
    attribute, equals, rest = text.partition("=")
    label, colon, number = rest.rpartition(":")
    try:
        beta = float(number)
    except ValueError:
        beta = None
    if not (equals and colon and attribute and label) or beta is None:
        raise LensError(f"Write a turn as attribute=class:strength, like gender=male:2; got '{text}'.")
    return lens.intervention(attribute.strip(), label.strip(), beta)
