"""Low-rank adapters through peft: put in, trained, taken out again without a trace, kept as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lens.base.files import load_tensors
from diffusion_lens.base.types import LensError
from diffusion_lens.model.denoise import condition_each
from diffusion_lens.model.families.base import Conditioning
from diffusion_lens.model.families.unet import encode_text
from diffusion_lens.model.pipelines import DiffusionModel

NAME = "lens"
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class LoraShape:
    """Rank, α and the names of the layers adapted, by their ends; an empty tuple leaves that part alone."""

    rank: int
    alpha: float
    unet: tuple[str, ...] = UNET_TARGETS
    text: tuple[str, ...] = ()


@dataclass
class Adapters:
    """Adapters in place. ``parameters`` train; ``tensors`` are what to keep."""

    parts: dict[str, nn.Module]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of all parts."""
        return [p for module in self.parts.values() for name, p in module.named_parameters() if "lora_" in name]

    def tensors(self) -> dict[str, Tensor]:
        """``<part>.<peft name>`` → weights."""
        peft = _peft()
        return {
            f"{part}.{name}": value.detach().cpu().clone()
            for part, module in self.parts.items()
            for name, value in peft.get_peft_model_state_dict(module, adapter_name=NAME).items()
        }

    @contextmanager
    def off(self) -> Iterator[None]:
        """The unadapted model, inside."""
        layers = [layer for module in self.parts.values() for _, layer in _layers(module)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


@contextmanager
def adapters(
    model: DiffusionModel,
    shape: LoraShape,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Iterator[Adapters]:
    """Put adapters into a model (``tensors`` as ``Adapters.tensors`` gave them, or fresh ones), take them out again.

    Fresh ones change nothing: B is zero, A drawn from ``seed``. On the way out every module, flag and attribute is
    the one it was. Hold the model's lock meanwhile. Raises ``LensError`` where peft is missing or tensors do not fit.
    """
    peft = _peft()
    wanted = _parts(model, shape)
    before = {part: (_flags(module), hasattr(module, "peft_config")) for part, (module, _) in wanted.items()}
    found = Adapters({})
    try:
        for part, (module, targets) in wanted.items():
            config = peft.LoraConfig(
                r=shape.rank, lora_alpha=shape.alpha, target_modules=list(targets), lora_dropout=0.0, bias="none"
            )
            found.parts[part] = module
            with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; ours follow below
                peft.inject_adapter_in_model(config, module, adapter_name=NAME)
            if tensors is None:
                _initialise(module, seed)
            else:
                _fill(peft, module, part, tensors)
            for _, layer in _layers(module):
                layer.set_scale(NAME, scale)
        yield found
    finally:
        for part, module in found.parts.items():
            _take_out(module, *before[part])


def applied(model: DiffusionModel, shape: LoraShape, tensors: Mapping[str, Tensor], scale: float) -> Any:
    """A context manager in which the model is adapted; for ``WeightEdit.model_context``."""
    return adapters(model, shape, tensors=tensors, scale=scale)


def encode(model: DiffusionModel, prompt: str | None, n: int, adapted: Adapters) -> Conditioning:
    """Unguided conditioning with gradients to a text encoder's adapters; the cached one where there are none."""
    if "text" not in adapted.parts or prompt is None:
        return model.condition(prompt, n, 1.0)
    embeds = encode_text(model.pipeline, prompt)["embeds"].to(model.device, model.dtype)
    return Conditioning({"encoder_hidden_states": embeds.expand(n, *embeds.shape[1:])}, guided=False, n=n)


def encode_each(model: DiffusionModel, prompts: Sequence[str | None], adapted: Adapters) -> Conditioning:
    """The same for one image per prompt; row ``i`` equals ``encode`` of ``prompts[i]`` alone."""
    if len(set(prompts)) == 1:
        return encode(model, prompts[0], len(prompts), adapted)
    if "text" not in adapted.parts:
        return condition_each(model, prompts, 1.0)
    known = {prompt: encode(model, prompt, 1, adapted).kwargs["encoder_hidden_states"] for prompt in set(prompts)}
    rows = torch.cat([known[prompt] for prompt in prompts])
    return Conditioning({"encoder_hidden_states": rows}, guided=False, n=len(prompts))


def read_adapter(path: Path | str) -> tuple[dict[str, Tensor], int, float]:
    """``(tensors, rank, α)`` of an adapter file: safetensors, named as peft or as diffusers do.

    Raises ``LensError`` where the file is missing, or holds no LoRA of a U-Net or text encoder.
    """
    path = Path(path)
    found: dict[str, Tensor] = {}
    for name, array in load_tensors(path).items():
        short = _peft_name(name)
        if short is not None:
            found[short] = torch.from_numpy(array).float()
    ranks = {value.shape[0] for name, value in found.items() if name.endswith("lora_A.weight")}
    if not found or len(ranks) != 1:
        raise LensError(f"{path.name} is no LoRA of one rank for a U-Net or text encoder; give one as safetensors.")
    rank = ranks.pop()
    return found, rank, float(rank)


def targets_of(tensors: Mapping[str, Tensor], part: str) -> tuple[str, ...]:
    """Full names of the layers that stored tensors adapt in one part."""
    ends = (".lora_A.weight", ".lora_B.weight")
    own = [name.removeprefix(f"{part}.") for name in tensors if name.startswith(f"{part}.")]
    return tuple(sorted({name[: -len(end)] for name in own for end in ends if name.endswith(end)}))


def _peft_name(name: str) -> str | None:
    """``unet.….lora_A.weight`` for the namings in use; ``None`` for what is no LoRA weight."""
    name = name.replace("base_model.model.", "").replace(".default", "").replace("_lora.", ".lora.")
    name = name.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")
    name = name.replace(".processor.", ".").replace("to_out.lora_", "to_out.0.lora_")
    name = "text." + name.removeprefix("text_encoder.") if name.startswith("text_encoder.") else name
    known = name.startswith(("unet.", "text.")) and name.endswith(("lora_A.weight", "lora_B.weight"))
    return name if known else None


def _parts(model: DiffusionModel, shape: LoraShape) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    parts: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    if shape.unet:
        parts["unet"] = (model.denoiser, shape.unet)
    if shape.text and model.kind == "text":
        parts["text"] = (model.pipeline.text_encoder, shape.text)
    for part, (module, targets) in parts.items():
        names = [name for name, _ in module.named_modules()]
        if not any(name == t or name.endswith(f".{t}") for name in names for t in targets):
            raise LensError(f"The model's {part} has none of the layers {', '.join(targets[:4])} that are adapted.")
    return parts


def _initialise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5  # peft's own Kaiming bound
                drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(drawn.to(parameter) * bound)
            elif "lora_B" in name:
                parameter.zero_()


def _fill(peft: Any, module: nn.Module, part: str, tensors: Mapping[str, Tensor]) -> None:
    own = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
    expected = peft.get_peft_model_state_dict(module, adapter_name=NAME)
    shapes, wanted = ({n: tuple(t.shape) for n, t in table.items()} for table in (own, expected))
    wrong = sorted(n for n in {*shapes, *wanted} if shapes.get(n) != wanted.get(n))
    if wrong:
        raise LensError(f"The adapter does not fit this model's {part}, first at {wrong[0]}; fit it again.")
    peft.set_peft_model_state_dict(module, own, adapter_name=NAME)


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]


def _flags(module: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(p, p.requires_grad) for p in module.parameters()]


def _take_out(module: nn.Module, flags: list[tuple[nn.Parameter, bool]], had_config: bool) -> None:
    for name, layer in _layers(module):
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent)._modules[child] = layer.get_base_layer()
    if not had_config and hasattr(module, "peft_config"):
        del module.peft_config
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise LensError("Methods that change weights need peft; install it with: pip install peft.") from None
    return peft
