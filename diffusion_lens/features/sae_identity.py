"""Which SAE this is: scale folded into the weights, what that rounds away, and the digest that names an SAE.

Everything that is computed with one SAE carries its ``sae_id`` and is refused by any other, so the id has to say
what is inside, not what somebody calls it. It is a digest of configuration and weights, taken anew from the content
whenever it is asked for; no file can declare one.

Version 0.4 kept a scale beside the weights and took its digest over both. Here the scale is folded into the weights
(``fold``), as SAELens folds it. Folding rounds, so the folded weights alone no longer give the old digest, and all
that was measured with such an SAE would be orphaned. An SAE that comes from 0.4 therefore keeps an ``Origin``: the
scale, and for every weight the few units in the last place that rounding took. With them the old weights come back
bit for bit, and the old id is *recomputed* from them. It holds only as long as the old weights, folded, are exactly
the weights in use: an SAE changed in any bit is another SAE, and its id is the digest of what it then holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lens.features.sae_config import SAEConfig

Weights = Mapping[str, Tensor]
FOLDED = ("W_dec", "W_enc", "b_dec")
"""The weights that carry a folded scale; ``b_enc`` is in the units of the codes."""


@dataclass(frozen=True, eq=False)
class Origin:
    """The weights that were folded, as the difference that folding them and back leaves.

    Attributes:
        scale: the factor that was folded in.
        ulps: name in ``FOLDED`` → units in the last place (int8 or int32, the weight's shape) to add.
    """

    scale: float
    ulps: Weights

    @classmethod
    def of(cls, weights: Weights, scale: float) -> Origin:
        """What to keep of ``weights`` (float32, finite) before they are replaced by ``fold(weights, scale)``."""
        near = _unfold(fold(weights, scale), scale)
        return cls(scale, {name: _smallest(_bits(weights[name]) - _bits(near[name])) for name in FOLDED})

    def restore(self, folded: Weights) -> dict[str, Tensor] | None:
        """The weights before folding, bit for bit; ``None`` if ``folded`` are not exactly theirs."""
        near = _unfold(folded, self.scale)
        found = {name: (_bits(near[name]) + self.ulps[name].int()).view(torch.float32) for name in FOLDED}
        again = fold({**folded, **found}, self.scale)
        if any(not torch.equal(again[name], folded[name]) for name in FOLDED):
            return None
        return {**folded, **found}


def fold(weights: Weights, scale: float) -> dict[str, Tensor]:
    """The weights of the SAE that does for x what ``weights`` do for ``scale · x``: the same codes, x̂ in x's units.

    ``W_enc · scale``, ``W_dec / scale``, ``b_dec / scale`` (SAELens' ``fold_activation_norm_scaling_factor``),
    in float64, then float32; on the processor, so that every machine gets the same bits.
    """
    wide = {name: weights[name].detach().cpu().double() for name in FOLDED}
    changed = {"W_enc": wide["W_enc"] * scale, "W_dec": wide["W_dec"] / scale, "b_dec": wide["b_dec"] / scale}
    return {**weights, **{name: value.float() for name, value in changed.items()}}


def fold_decoder_norm(weights: Weights) -> dict[str, Tensor]:
    """The weights of the SAE that needs no ``rescale_acts_by_decoder_norm``: unit decoder rows, the same codes.

    With ``‖W_dec[i]‖`` taken into ``W_enc`` and ``b_enc`` (SAELens' ``fold_W_dec_norm``).
    """
    wide = {name: value.detach().cpu().double() for name, value in weights.items()}
    squares = torch.zeros_like(wide["b_enc"])
    # Column by column, since the order of a library's sum, and so the id, is its own on every machine.
    for column in wide["W_dec"].T:
        squares = squares + column * column
    norm = squares.sqrt().clamp_min(1e-8)
    wide.update(W_dec=wide["W_dec"] / norm[:, None], W_enc=wide["W_enc"] * norm, b_enc=wide["b_enc"] * norm)
    return {name: value.float() for name, value in wide.items()}


def identify(cfg: SAEConfig, weights: Weights, origin: Origin | None = None) -> str:
    """The ``sae_id``: first 16 hex digits of a sha256 over configuration and weights (see above)."""
    weights = {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}
    before = None if origin is None else origin.restore(weights)
    if origin is None or before is None:
        return _digest(cfg, weights, 1.0)
    return _digest(cfg, before, origin.scale)


def _digest(cfg: SAEConfig, weights: Weights, scale: float) -> str:
    """Over what version 0.4 took it over, whose ``normalise`` was the scale: an SAE without one keeps its id too."""
    told = {**cfg.model_dump(mode="json"), "normalise": scale}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(cfg.shapes()):
        digest.update(name.encode())
        digest.update(weights[name].numpy().data)
    return digest.hexdigest()[:16]


def _unfold(weights: Weights, scale: float) -> dict[str, Tensor]:
    """The inverse of ``fold``, but for rounding."""
    wide = {name: weights[name].detach().cpu().double() for name in FOLDED}
    changed = {"W_enc": wide["W_enc"] / scale, "W_dec": wide["W_dec"] * scale, "b_dec": wide["b_dec"] * scale}
    return {name: value.float() for name, value in changed.items()}


def _bits(values: Tensor) -> Tensor:
    """Floats as whole numbers, neighbours one apart."""
    return values.detach().float().cpu().contiguous().view(torch.int32)


def _smallest(ulps: Tensor) -> Tensor:
    """int8 where it holds them all; more is lost only of numbers below the normal range."""
    return ulps.to(torch.int8) if ulps.abs().max() <= 127 else ulps
