"""Where in a model its activations are read and edited: a module, what of it, and which stream of tokens.

A **site** is written ``module``, ``module:reading`` or ``module:reading:stream``, e.g. ``mid_block`` or
``transformer_blocks.2:update:image``. It is data; ``Port`` is the same site found in a model, where what the module
returns is taken apart and put together again. Blocks of transformers return image tokens alone, two streams as a tuple
in either order, or one joined sequence: nothing here guesses which, each family of models says so (``Layout``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from diffusion_lens.base.types import LensError

Reading = Literal["output", "update"]
Stream = Literal["image", "text", "across"]
Grid = Callable[[int], tuple[int, int]]
"""Number of image tokens → their ``(y, x)``."""
ARGUMENTS: dict[Stream, tuple[int, str]] = {"image": (0, "hidden_states"), "text": (1, "encoder_hidden_states")}
"""Stream → position and keyword of the argument that a block turns into it."""


@dataclass(frozen=True)
class Site:
    """A place in a model, as data.

    Attributes:
        module: its name inside the denoiser.
        reading: its ``output``, or its ``update``: output − input, what the module adds to the stream.
        stream: ``image`` or ``text`` tokens; ``across``: a down-block's output together with the copy of it that goes
            across to the up-path, so that an edit is not undone by the skip connection.
    """

    module: str
    reading: Reading = "output"
    stream: Stream = "image"

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site of a name; raises ``LensError`` for a reading or stream that there is not."""
        parts = name.split(":")
        module, reading, stream, *rest = (*parts, *("output", "image")[len(parts) - 1 :])
        if not module or rest or reading not in get_args(Reading) or stream not in get_args(Stream):
            raise LensError(
                f"'{name}' is no site: write module, module:{'|'.join(get_args(Reading))} or "
                f"module:output:{'|'.join(get_args(Stream))}, e.g. mid_block or transformer_blocks.2:update:image."
            )
        return cls(module, reading, stream)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The shortest name that ``parse`` reads as this site."""
        if self.stream != "image":
            return f"{self.module}:{self.reading}:{self.stream}"
        return self.module if self.reading == "output" else f"{self.module}:{self.reading}"

    def as_json(self) -> dict[str, str]:
        """The same as a JSON object; ``Site(**values)`` reads it."""
        return {"module": self.module, "reading": self.reading, "stream": self.stream}


@dataclass(frozen=True)
class Layout:
    """What the modules of one name return.

    Attributes:
        streams: those that they return, in order; with one alone, any further items of a tuple are left as they are.
        joined: the streams follow each other in one sequence, whose image tokens are counted from its near end.
        updates: whether output − input means anything: the module carries a stream on, in tokens of the same width.
        arguments: stream → position and keyword of the argument that the module turns into it.
        mask: position of an argument that is given only where sequences of one batch differ in length, whose image
            tokens then begin at different places; such batches are refused.
        across: the module also returns a list of tensors for skip connections, the last of which is its output.
    """

    streams: tuple[Stream, ...] = ("image",)
    joined: bool = False
    updates: bool = False
    arguments: tuple[tuple[Stream, tuple[int, str]], ...] = tuple(ARGUMENTS.items())
    across: bool = False
    mask: int | None = None

    def offers(self, site: Site) -> bool:
        """Whether such modules have this reading and stream."""
        if site.stream == "across":
            return self.across and site.reading == "output"
        return site.stream in self.streams and (site.reading == "output" or self.updates)

    def sites(self, module: str) -> tuple[Site, ...]:
        """Every site of a module that returns this."""
        streams: tuple[Stream, ...] = (*self.streams, *(("across",) if self.across else ()))
        every = (Site(module, reading, stream) for stream in streams for reading in get_args(Reading))
        return tuple(site for site in every if self.offers(site))


def as_map(h: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """``[n, tokens, c]`` as ``[n, c, y, x]`` (``grid``) or ``[n, c, tokens, 1]``; a 4-D tensor as it is."""
    if h.ndim == 4:
        return h
    if h.ndim == 3:
        y, x = grid or (h.shape[1], 1)
        return h.transpose(1, 2).unflatten(2, (y, x))
    raise LensError(f"The hooked module returns a tensor of shape {tuple(h.shape)}; choose one with 3 or 4 dimensions.")


@dataclass(frozen=True, eq=False)
class Port:
    """A site in a model: reads its ``h [n, c, y, x]`` out of what the module returns, and puts another in its place.

    Attributes:
        grid: number of image tokens → ``(y, x)``; ``None`` leaves tokens in a column.
    """

    module: nn.Module
    site: Site = Site("")
    layout: Layout = Layout()
    grid: Grid | None = None

    def read(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """``h`` and the module's input in the same form (``None`` where that is no such tensor)."""
        if self.layout.mask is not None and args[self.layout.mask] is not None:
            raise LensError("Prompts of different lengths cannot be read at this site in one batch; draw them apart.")
        whole = self._whole(output)
        h, given = self._tokens(whole), self._given(args, kwargs)
        h_in = None
        if given is not None and given.ndim in (3, 4):
            h_in = self._map(self._tokens(given) if given.ndim == whole.ndim else given)
        if self.site.reading == "output":
            return self._map(h), h_in
        if h_in is None or h_in.shape != self._map(h).shape:
            raise LensError(
                f"'{self.site.module}' has no update: its output is not of its input's shape; read it as output."
            )
        return self._map(h) - h_in, h_in

    def write(self, output: Any, old: Tensor, new: Tensor) -> Any:
        """The output with ``new`` where ``old`` was read; an update is changed by the difference of both."""
        if new.shape != old.shape:
            raise LensError(f"An edit must keep the shape {tuple(old.shape)}; it returned {tuple(new.shape)}.")
        whole = self._whole(output)
        if self.site.reading == "update":
            new = self._map(self._tokens(whole)) + (new - old)
        tokens = (new if whole.ndim == 4 else new.flatten(2).transpose(1, 2)).to(whole.dtype)
        return self._replaced(output, whole, self._put(whole, tokens))

    def _whole(self, output: Any) -> Tensor:
        main = output
        if isinstance(output, (tuple, list)) and output:
            main = output[0 if self.layout.joined else self._place]
        if not isinstance(main, Tensor):
            raise LensError(f"The hooked module returns {type(main).__name__}, not a tensor; choose another hook name.")
        return main

    @property
    def _place(self) -> int:
        return 0 if self.site.stream == "across" else self.layout.streams.index(self.site.stream)

    def _replaced(self, output: Any, whole: Tensor, changed: Tensor) -> Any:
        if isinstance(output, Tensor):
            return changed
        place = 0 if self.layout.joined else self._place
        items = list(output)
        items[place] = changed
        if self.site.stream == "across":
            items = [_across(item, whole, changed) if i != place else item for i, item in enumerate(items)]
        return type(output)(items)

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        position, keyword = dict(self.layout.arguments).get(self.site.stream, ARGUMENTS["image"])
        first = kwargs.get(keyword, args[position] if position < len(args) else None)
        return first if isinstance(first, Tensor) else None

    def _slice(self, tokens: int) -> slice:
        """This site's part of a joined sequence."""
        if not self.layout.joined or self.grid is None:
            return slice(None)
        y, x = self.grid(tokens)
        first = self.layout.streams[0] == "image"
        if self.site.stream == "image":
            return slice(0, y * x) if first else slice(tokens - y * x, None)
        return slice(y * x, None) if first else slice(0, tokens - y * x)

    def _tokens(self, whole: Tensor) -> Tensor:
        return whole[:, self._slice(whole.shape[1])] if self.layout.joined else whole

    def _put(self, whole: Tensor, tokens: Tensor) -> Tensor:
        if not self.layout.joined:
            return tokens
        changed = whole.clone()
        changed[:, self._slice(whole.shape[1])] = tokens
        return changed

    def _map(self, h: Tensor) -> Tensor:
        on_grid = h.ndim == 3 and self.grid is not None and self.site.stream != "text"
        return as_map(h, self.grid(h.shape[1]) if on_grid and self.grid is not None else None)


def _across(item: Any, whole: Tensor, changed: Tensor) -> Any:
    """A list of skip connections with the output's own copy replaced."""
    if not isinstance(item, (tuple, list)):
        return item
    return type(item)(changed if skip is whole else skip for skip in item)
