"""Edits by plain functions: ``lens.generate(…, edit=lambda h, context: …)``."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lens.base.types import EditSpec, LensError, Sampler
from diffusion_lens.model.denoise import StepContext

EditFunction = Callable[[Tensor, StepContext], Tensor]


@dataclass(frozen=True, eq=False)
class FunctionEdit:
    """An edit by a function of one's own: ``h [n, c, y, x]`` and where it stands → the edited h.

    The function is called at every step of ``window``, with the conditional half of a guided batch; it finds the step
    in ``context.index`` and the images in ``context.seeds``. It may change the ``h`` that it is given.

    Attributes:
        name: as shown; the function's own by default.
        spec: tells this edit from others by the function's code and the values that it reads (``fingerprint``).
    """

    function: EditFunction
    name: str = ""
    sampler: Sampler = "symmetric"
    window: tuple[int, int] | None = None
    spec: EditSpec = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise LensError("An edit of your own is a function of h and its context that returns the edited h.")
        name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        spec = EditSpec.of_custom(name.strip("<>"), self.sampler, self.window, fingerprint(self.function))
        object.__setattr__(self, "spec", spec)

    def apply(self, h: Tensor, context: StepContext) -> Tensor:
        """What the function returns; raises ``LensError`` where that is no tensor."""
        edited = self.function(h.clone(), context)
        if not isinstance(edited, Tensor):
            raise LensError(f"The edit must return the edited h, a tensor; it returned {type(edited).__name__}.")
        return edited


def fingerprint(function: Callable[..., Any]) -> str:
    """16 hex digits over a function's code and the values that it can reach: defaults, closure, globals it names.

    Numbers, texts, arrays, containers of them, and functions of the same module count by their content. Any other
    object counts as itself, in this process: functions that use two of them are never taken for one.
    """
    module = getattr(function, "__module__", None)
    told = json.dumps(_content(function, module, frozenset()), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _content(value: Any, module: str | None, seen: frozenset[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen:
        return "itself"
    within = functools.partial(_content, module=module, seen=seen | {id(value)})
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(raw.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray | np.generic) and not np.asarray(value).dtype.hasobject:
        raw = np.ascontiguousarray(value)
        return ["array", str(raw.dtype), list(raw.shape), hashlib.sha256(raw.tobytes()).hexdigest()]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(within, value)]
    if isinstance(value, dict):
        return ["dict", *([within(k), within(v)] for k, v in value.items())]
    if isinstance(value, CodeType):
        return ["code", value.co_code.hex(), list(value.co_names), *map(within, value.co_consts)]
    if isinstance(value, functools.partial):
        return ["partial", *map(within, (value.func, value.args, value.keywords))]
    if isinstance(value, MethodType):
        return ["method", *map(within, (value.__func__, value.__self__))]
    if isinstance(value, FunctionType) and value.__module__ == module:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        reached = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        own = (value.__code__, value.__defaults__, value.__kwdefaults__, cells, reached)
        return ["function", *map(within, own)]
    named = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if named is not None:  # a module, a class, or another library's function
        return ["named", str(getattr(value, "__module__", "")), str(named)]
    return ["object", type(value).__qualname__, id(value)]


def _names(code: CodeType) -> Iterator[str]:
    """Every name that code uses, nested functions included, in a stable order."""
    yield from dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
