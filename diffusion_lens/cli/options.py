"""Options that several commands share, and what is made from them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from diffusion_lens.run_options import DTYPES, Dtype, RunOptions
from diffusion_lens.run_options import pick_device as pick_device
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


RUN_FLAGS: dict[str, tuple[Any, Any]] = {
    "device": (DeviceOption, "auto"),
    "dtype": (
        Annotated[
            str, typer.Option(help=f"Number format of the diffusion model: {', '.join(DTYPES)}; half ones need a GPU.")
        ],
        "fp32",
    ),
    "compile": (
        Annotated[bool, typer.Option("--compile", help="Compile the U-Net's blocks: a slow start, then faster.")],
        False,
    ),
    "slicing": (
        Annotated[bool, typer.Option("--slicing", help="Save memory: attention and decoding in slices; slower.")],
        False,
    ),
    "offload": (
        Annotated[bool, typer.Option("--offload", help="Save GPU memory: keep idle parts of the model on the CPU.")],
        False,
    ),
}
"""Flag → its annotation and default; together they make ``RunOptions``."""

DEFAULT_RUN = RunOptions()
R = TypeVar("R")


def with_run_flags(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command ``RUN_FLAGS`` in place of its parameter ``running: RunOptions``."""
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name != "running":
            parameters.append(parameter)
            continue
        parameters += [
            inspect.Parameter(name, parameter.kind, default=default, annotation=annotation)
            for name, (annotation, default) in RUN_FLAGS.items()
        ]

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> R:
        values = {name: kwargs.pop(name) for name in RUN_FLAGS if name in kwargs}
        return command(*args, **kwargs, running=run_options(**values))

    # typer reads a command's flags off its signature
    cast(Any, run).__signature__ = signature.replace(parameters=parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def run_options(dtype: str = "fp32", **values: Any) -> RunOptions:
    """The flags as ``RunOptions``, a device picked and checked."""
    if dtype not in DTYPES:
        raise LensError(f"--dtype is {', '.join(DTYPES)}; '{dtype}' is none of them.")
    return RunOptions(dtype=cast(Dtype, dtype), **values).resolved()


def hide_loading_bars() -> None:
    """Keep the libraries' bars over a pipeline's parts and weights off standard error; downloads still show theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def open_lens(source: str, running: RunOptions | str = "auto") -> DiffusionLens:
    """Open a lens, after checking its files; the bundled one is found from any working directory.

    ``running``: how its diffusion model runs, or just the device.
    """
    from diffusion_lens.lens import DiffusionLens

    hide_loading_bars()
    if not source:
        beside = Path(__file__).resolve().parents[2] / BUNDLED
        source = str(BUNDLED if BUNDLED.is_dir() else beside)
    options = run_options(device=running) if isinstance(running, str) else running
    return DiffusionLens.from_pretrained(source, options=options)


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
