"""Read and edit a model at one site, and re-run only what lies above a U-Net's bottleneck.

Everything here registers on enter and removes on exit, also after an exception. Nothing counts steps:
the caller says which step it is at. A bare module stands for its own output: a tensor, or a tuple or list whose first
item is one, ``[n, c, y, x]`` or ``[n, tokens, c]``, the latter being presented as ``[n, c, tokens, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from diffusion_lens.base.types import LensError
from diffusion_lens.model.sites import Port

Rows = slice | Tensor
"""Which images of a batch: a slice, or a 1-D tensor of row numbers."""


class PerImage(tuple[Tensor, ...]):
    """One tensor per image, each of its own length."""


@dataclass
class Tap:
    """What the last call of a module took in and gave out; ``calls`` counts its calls inside the context.

    ``h`` and ``h_in`` are ``[n, c, y, x]``; ``h_in`` is ``None`` where the input is no such tensor.
    """

    h: Tensor | None = None
    h_in: Tensor | None = None
    calls: int = 0

    def output(self) -> Tensor:
        """The tensor read; raises ``LensError`` where the module never ran."""
        if self.h is None:
            raise LensError("The hooked module did not run in this model's forward pass; choose another hook name.")
        return self.h


@contextmanager
def intercept(place: nn.Module | Port, fn: Callable[[Tensor, Tensor | None], Tensor | None]) -> Iterator[None]:
    """Call ``fn(h, h_in)`` at every call of the module; a tensor it returns replaces ``h``, ``None`` leaves it.

    ``h [n, c, y, x]`` is what the site reads, ``h_in`` the module's own input in the same form (or ``None``).
    """
    port = place if isinstance(place, Port) else Port(place)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        h, h_in = port.read(output, args, kwargs)
        edited = fn(h, h_in)
        return None if edited is None else port.write(output, h, edited)

    handle = port.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture(place: nn.Module | Port) -> Iterator[Tap]:
    """Read a site: the yielded ``Tap`` holds its last ``h`` and input, graph and device unchanged."""
    tap = Tap()

    def keep(h: Tensor, h_in: Tensor | None) -> None:
        tap.h, tap.h_in, tap.calls = h, h_in, tap.calls + 1

    with intercept(place, keep):
        yield tap


@contextmanager
def edit_output(place: nn.Module | Port, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the site's ``h [n, c, y, x]`` by ``fn(h)`` (same shape; cast back to the module's dtype)."""
    with intercept(place, lambda h, _: fn(h)):
        yield


def select_rows(value: Any, rows: Rows, n: int) -> Any:
    """``rows`` of every tensor with ``n`` rows inside nested tuples, lists and dicts; anything else as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == n else value
    if isinstance(value, PerImage):
        return PerImage(value[rows] if isinstance(rows, slice) else (value[int(i)] for i in rows))
    if isinstance(value, dict):
        return {key: select_rows(item, rows, n) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(select_rows(item, rows, n) for item in value)
    return value


class UpPath:
    """The part of a U-Net above its mid-block, replayed with another bottleneck.

    ``record()`` notes what the up-blocks were given during one ordinary forward; ``replay(h)`` then runs the
    up-blocks and the output convolution alone. With all rows it is bit-identical to a full forward whose
    mid-block returned ``h``; with a part of the rows it is so up to the batch size's effect on the last bits.
    """

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @staticmethod
    def supports(unet: Any, hook_name: str) -> bool:
        """Whether a replay is exact: hook on the mid-block, up-blocks that hand on one tensor."""
        return (
            hook_name == "mid_block"
            and type(unet) in (UNet2DModel, UNet2DConditionModel)
            and not any(hasattr(block, "skip_conv") for block in unet.up_blocks)
            and unet.config.get("time_embedding_type") != "fourier"
        )

    @contextmanager
    def record(self) -> Iterator[UpPath]:
        """Note the up-blocks' arguments of the forward that runs inside this context."""
        self._calls = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((args, kwargs))

        with ExitStack() as stack:
            for block in self._unet.up_blocks:
                stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            yield self

    def replay(self, h: Tensor, rows: Rows = slice(None)) -> Tensor:
        """The U-Net's output for ``rows`` of the recorded batch, had its mid-block returned ``h [len(rows), c, y, x]``.

        Raises ``LensError`` where nothing was recorded.
        """
        blocks = self._unet.up_blocks
        if len(self._calls) != len(blocks):
            raise LensError("Record one forward pass before a replay.")
        first_args, first_kwargs = self._calls[0]
        n = (first_args[0] if first_args else first_kwargs["hidden_states"]).shape[0]
        sample = h
        for block, (args, kwargs) in zip(blocks, self._calls, strict=True):
            # The first argument is the running sample: it is replaced, so it is not worth slicing.
            rest = select_rows(args[1:], rows, n)
            named = {k: select_rows(v, rows, n) for k, v in kwargs.items() if k != "hidden_states"}
            sample = block(sample, *rest, **named) if args else block(hidden_states=sample, **named)
        if self._unet.conv_norm_out is not None:
            sample = self._unet.conv_act(self._unet.conv_norm_out(sample))
        return self._unet.conv_out(sample)

    def clear(self) -> None:
        """Let the recorded tensors go."""
        self._calls = []
