"""Where and how a model runs: device, number format, compiling, and what to do when memory is short.

No heavy import here: the app reads its options before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import LensError

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ENVIRONMENT = "DIFFUSION_LENS_"
TEXTS = ("device", "dtype", "preview")
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def gpu_is_lent() -> bool:
    """Whether a GPU is lent for the time of one call (ZeroGPU), which the ``spaces`` package stands for."""
    return find_spec("spaces") is not None


class RunOptions(StrictConfig):
    """One place for everything that changes where and how a model runs, and not what it is.

    Attributes:
        device: as torch names it, or ``auto``: ``cuda`` where there is one.
        dtype: of the diffusion model; SAE, probes and classifier stay in single precision.
        compile: compile the U-Net's down- and up-blocks (E1: last bits change; minutes at the first call).
        slicing: attention in two parts and one image at a time through the decoder (E1; slower, less memory).
        offload: the pipeline's parts wait in the CPU's memory until they are needed (E0; slower, less memory).
        preview: a tiny autoencoder, as hub id or folder, that shows the app's images before the full decode (E3: shown
            alone and never measured); empty for none.
        safety_checker: keep the model's own checker, where it has one: it paints images that it refuses black.
    """

    device: str = "auto"
    dtype: Dtype = "fp32"
    compile: bool = False
    slicing: bool = False
    offload: bool = False
    preview: str = ""
    safety_checker: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], *, device: str = "cpu") -> RunOptions:
        """Read ``DIFFUSION_LENS_DEVICE``, ``_DTYPE``, ``_COMPILE``, ``_SLICING``, ``_OFFLOAD``, ``_PREVIEW``,
        ``_SAFETY_CHECKER``.

        ``device`` is the default; where a GPU is lent per call, that is ``cuda``.
        Raises ``LensError`` that names the variable whose value is none.
        """
        values: dict[str, Any] = {"device": "cuda" if gpu_is_lent() else device}
        for name in cls.model_fields:
            text = environment.get(ENVIRONMENT + name.upper())
            if text is None:
                continue
            values[name] = text if name in TEXTS else _switch(ENVIRONMENT + name.upper(), text)
        if values.get("dtype", "fp32") not in DTYPES:
            raise LensError(f"{ENVIRONMENT}DTYPE is {', '.join(DTYPES)}; '{values['dtype']}' is none of them.")
        return cls.parse(values, where="the environment")

    @property
    def torch_dtype(self) -> Any:
        """``dtype`` as torch's own."""
        import torch

        return getattr(torch, DTYPES[self.dtype])

    def resolved(self) -> RunOptions:
        """The same with a device that exists in place of ``auto``.

        Raises ``LensError`` where this machine cannot run so: an unknown device, half precision on a CPU that has
        none, offloading without a GPU, compiling where a GPU is lent per call, a preview from a folder that is not.
        """
        chosen = self.model_copy(update={"device": pick_device(self.device)})
        on_cpu = chosen.device.startswith("cpu")
        if on_cpu and self.dtype == "fp16":
            raise LensError("fp16 needs a GPU; choose --dtype fp32 on a CPU.")
        if on_cpu and self.dtype == "bf16" and not _cpu_has_bf16():
            raise LensError("This CPU multiplies bf16 about a hundred times slower than fp32; choose --dtype fp32.")
        if self.compile and gpu_is_lent():
            raise LensError("Compiling does not work where a GPU is lent for each call; leave --compile out.")
        if self.offload and on_cpu:
            raise LensError("--offload moves parts of a model to a GPU in turn and there is none; leave it out.")
        if self.offload and self.compile:
            raise LensError("--compile and --offload do not go together; choose one.")
        if is_missing_folder(self.preview):
            raise LensError(f"There is no folder {self.preview} for --preview; check the path.")
        return chosen


def is_missing_folder(source: str | Path) -> bool:
    """Whether ``source`` can only be a folder, and there is none: hub names never start like a path.

    Without this a mistyped folder would be looked up on the network.
    """
    path = Path(source)
    return not path.exists() and (str(source).startswith((".", "/", "~")) or len(path.parts) > 2)


def pick_device(name: str) -> str:
    """``auto`` → ``cuda`` where torch finds one; raises ``LensError`` for a device that is not there."""
    if name == "cpu":
        return name  # the app's first page does not wait for torch
    if gpu_is_lent():
        import spaces  # noqa: F401  (before torch: it stands in for the GPU until one is lent)
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise LensError(f"There is no device '{name}' here; choose cpu, or auto.") from None
    return name


def _cpu_has_bf16() -> bool:
    import torch

    from diffusion_lens.base.precision import fast_bf16

    return fast_bf16(torch.device("cpu"))


def _switch(name: str, text: str) -> bool:
    word = text.strip().lower()
    if word not in (*YES, *NO):
        raise LensError(f"{name} is 1 or 0; '{text}' is neither.")
    return word in YES
