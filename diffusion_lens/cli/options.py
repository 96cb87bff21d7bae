"""Options that several commands share, and what is made from them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from diffusion_lens.base.assets import assets_folder
from diffusion_lens.base.types import MAX_IMAGES, MAX_SEED, GenerationRequest, Intervention, LensError
from diffusion_lens.cli.image_quality import QUALITY_FLAGS, QualityFlags
from diffusion_lens.lens.bundled import FIRST
from diffusion_lens.model.run_options import DTYPES, Dtype, RunOptions
from diffusion_lens.model.run_options import pick_device as pick_device

if TYPE_CHECKING:
    from diffusion_lens.lens.lens import DiffusionLens

BATCH = 16
"""Images drawn at once where neither the call nor the lens says."""

LensOption = Annotated[
    str,
    typer.Option("--lens", "-l", envvar="DIFFUSION_LENS", help="Lens folder or hub id; the bundled one by default."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Also write an interactive plot to this file.")]
ImagesOption = Annotated[int, typer.Option("--images", "-n", help="How many images, one seed each.")]
FirstSeedOption = Annotated[int, typer.Option("--first-seed", help="Seeds count up from here.")]
BatchOption = Annotated[
    int | None, typer.Option("--batch-size", help=f"Images drawn at once; as when the lens was fitted, else {BATCH}.")
]
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
    "safety_checker": (
        Annotated[
            bool,
            typer.Option(
                "--safety-checker/--no-safety-checker", help="The model's own checker: it paints refused images black."
            ),
        ],
        True,
    ),
}
"""Flag → its annotation and default; together they make ``RunOptions``."""

DEFAULT_RUN = RunOptions()
R = TypeVar("R")


def run_options(dtype: str = "fp32", **values: Any) -> RunOptions:
    """The flags as ``RunOptions``, a device picked and checked."""
    if dtype not in DTYPES:
        raise LensError(f"--dtype is {', '.join(DTYPES)}; '{dtype}' is none of them.")
    return RunOptions(dtype=cast(Dtype, dtype), **values).resolved()


@dataclass(frozen=True)
class Opening:
    """Which lens a command opens, and how its diffusion model runs."""

    lens: str = ""
    running: RunOptions = DEFAULT_RUN

    def open(self) -> DiffusionLens:
        """See ``open_lens``."""
        return open_lens(self.lens, self.running)


@dataclass(frozen=True)
class Series:
    """The images a command draws: how many, from which seed on, how many at once (``None``: see ``batch_of``)."""

    images: int
    first_seed: int = 0
    batch_size: int | None = None

    @property
    def seeds(self) -> range:
        """See ``seeds_of``."""
        return seeds_of(self.images, self.first_seed)

    def request(self, lens: DiffusionLens, prompt: str | None, **changes: Any) -> GenerationRequest:
        """What to draw with this lens; ``changes`` go to ``DiffusionLens.request``."""
        return lens.request(checked_prompt(lens, prompt), self.seeds, **changes)


Flags = dict[str, tuple[Any, Any]]
OPENING_FLAGS: Flags = {"lens": (LensOption, ""), **RUN_FLAGS}
SERIES_FLAGS: Flags = {
    "images": (ImagesOption, inspect.Parameter.empty),
    "first_seed": (FirstSeedOption, 0),
    "batch_size": (BatchOption, None),
}
GROUPS: dict[Any, tuple[Flags, Callable[..., Any]]] = {
    RunOptions: (RUN_FLAGS, run_options),
    Opening: (OPENING_FLAGS, lambda lens, **values: Opening(lens, run_options(**values))),
    Series: (SERIES_FLAGS, Series),
    QualityFlags: (QUALITY_FLAGS, QualityFlags),
}
"""Type of a command's parameter → the flags that stand for it, and what makes it from their values."""


def with_flags(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command the flags of its parameters of a type in ``GROUPS``, in their place and with their defaults."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {}
    for parameter in signature.parameters.values():
        if parameter.annotation not in GROUPS:
            parameters.append(parameter)
            continue
        flags, make = GROUPS[parameter.annotation]
        defaults = {name: getattr(parameter.default, name, default) for name, (_, default) in flags.items()}
        groups[parameter.name] = defaults, make
        parameters += [
            inspect.Parameter(name, parameter.kind, default=defaults[name], annotation=annotation)
            for name, (annotation, _) in flags.items()
        ]

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> R:
        made = {
            group: make(**{name: kwargs.pop(name, default) for name, default in defaults.items()})
            for group, (defaults, make) in groups.items()
        }
        return command(*args, **kwargs, **made)

    # typer reads a command's flags off its signature
    cast(Any, run).__signature__ = signature.replace(parameters=parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


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
    from diffusion_lens.lens.lens import DiffusionLens

    hide_loading_bars()
    if not source:
        source = str(assets_folder() / FIRST)
    options = run_options(device=running) if isinstance(running, str) else running
    return DiffusionLens.from_pretrained(source, options=options)


def batch_of(lens: DiffusionLens, asked: int | None) -> int:
    """Images drawn at once: as many as asked for, else as the lens was fitted with, else ``BATCH``."""
    return asked if asked is not None else lens.fitted_from.get("batch_size", BATCH)


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
    lens.check_words(prompt)
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
