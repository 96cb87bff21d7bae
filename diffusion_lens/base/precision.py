"""Where half-precision training pays: on GPUs, and on CPUs that multiply bfloat16 in hardware."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 is faster than single precision; on a CPU without AVX-512 BF16 or AMX it is far slower."""
    if device.type == "cuda":
        return True
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 for training, switched on only where it is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device))


def short_attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU, plain attention: over sixteen positions it trains ten times as fast as the flash kernel."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
