"""The per-step linear attribute probe on the flattened bottleneck h (the paper's "h-classifier")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lens.base.files import load_header, load_metadata, load_tensors, save_tensors
from diffusion_lens.base.foreign import check_array, reading
from diffusion_lens.base.plain import from_plain, to_plain
from diffusion_lens.base.types import Attribute, LensError


@dataclass(frozen=True, eq=False)
class Probe:
    """One linear head per denoising step (DiffLens).

    Attributes:
        attribute: what it reads; its classes give the order of the logits.
        weight: ``[step, class, c·y·x]`` on the flattened map. bias: ``[step, class]``.
        accuracy: ``[step]``, class-balanced on held-out images: the mean over classes of the share
            recognised, so that chance is 1 / number of classes whatever their frequencies.
        temperature: divides the logits before the softmax.
    """

    attribute: Attribute
    weight: Tensor
    bias: Tensor
    accuracy: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        steps, classes = self.bias.shape if self.bias.ndim == 2 else (-1, -1)
        fits = self.weight.ndim == 3 and tuple(self.weight.shape[:2]) == (steps, classes)
        if not fits or classes != len(self.attribute.classes) or tuple(self.accuracy.shape) != (steps,):
            raise LensError(
                f"The probe of {self.attribute.name} does not fit together: weight {list(self.weight.shape)}, "
                f"bias {list(self.bias.shape)}, accuracy {list(self.accuracy.shape)}, "
                f"{len(self.attribute.classes)} classes."
            )
        if not self.temperature > 0:
            raise LensError(f"The probe's temperature must be above 0; it is {self.temperature}.")

    @property
    def n_steps(self) -> int:
        """Denoising steps it has a head for."""
        return self.weight.shape[0]

    def logits(self, h: Tensor, step: int) -> Tensor:
        """Maps ``h [n, c, y, x]`` at denoising step ``step`` → ``[n, class]``, before temperature.

        Raises ``LensError`` for a step without a head and for maps of another size.
        """
        if not 0 <= step < self.n_steps:
            raise LensError(f"The probe of {self.attribute.name} has steps 0 to {self.n_steps - 1}; asked for {step}.")
        flat = h.flatten(1)
        if flat.shape[1] != self.weight.shape[2]:
            raise LensError(
                f"The probe of {self.attribute.name} reads {self.weight.shape[2]} numbers per image; "
                f"it was given {flat.shape[1]}."
            )
        return flat @ self.weight[step].to(flat).T + self.bias[step].to(flat)

    def probs(self, h: Tensor, step: int) -> Tensor:
        """Maps ``h [n, c, y, x]`` → class probabilities ``[n, class]``: ``softmax(logits / temperature)``."""
        return (self.logits(h, step) / self.temperature).softmax(dim=1)

    def to(self, device: torch.device | str) -> Probe:
        """The same probe on another device."""
        return replace(
            self, weight=self.weight.to(device), bias=self.bias.to(device), accuracy=self.accuracy.to(device)
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the attribute, for a safetensors file."""
        return {
            "weight": self.weight.contiguous(),
            "bias": self.bias.contiguous(),
            "accuracy": self.accuracy.contiguous(),
            "temperature": torch.tensor([self.temperature], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, attribute: Attribute, tensors: Mapping[str, Tensor]) -> Probe:
        """The inverse of ``tensors``; raises ``LensError`` that names a missing tensor."""
        missing = {"weight", "bias", "accuracy", "temperature"} - set(tensors)
        if missing:
            raise LensError(f"The probe of {attribute.name} lacks {', '.join(sorted(missing))}.")
        return cls(
            attribute, tensors["weight"], tensors["bias"], tensors["accuracy"], float(tensors["temperature"].item())
        )


def save_probes(path: Path, probes: Mapping[str, Probe]) -> None:
    """Write the probes of several attributes as ``<attribute>.<tensor>``."""
    tensors = {f"{name}.{part}": value for name, probe in probes.items() for part, value in probe.tensors().items()}
    save_tensors(path, tensors, {name: json.dumps(to_plain(probe.attribute)) for name, probe in probes.items()})


def load_probes(path: Path, device: str = "cpu") -> dict[str, Probe]:
    """Read what ``save_probes`` wrote, by attribute name."""
    arrays, found = load_tensors(path), {}
    with reading(path, "a file of probes", "restore it from the original"):
        for name in load_metadata(path):
            attribute = from_plain(Attribute, load_header(path, name))
            parts = {
                key.removeprefix(f"{name}."): torch.from_numpy(
                    # an accuracy may be unknown: probes that others published come without
                    check_array(key, value, (None,) * value.ndim, finite=not key.endswith(".accuracy"))
                )
                for key, value in arrays.items()
                if key.startswith(f"{name}.")
            }
            found[name] = Probe.from_tensors(attribute, parts).to(device)
    return found
