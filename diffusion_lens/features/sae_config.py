"""What a sparse autoencoder reads, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffusion_lens.base.config import StrictConfig

Layout = Literal["position", "map"]
# Bounds on what a file may claim, far above any SAE that exists.
Width = Annotated[int, Field(gt=0, le=2**24)]
Side = Annotated[int, Field(gt=0, le=2**14)]
Name = Annotated[str, Field(max_length=1000)]


class SAEConfig(StrictConfig):
    """What an SAE reads and how.

    Attributes:
        d_in: numbers in one sample: channels ("position") or channels · y · x ("map").
        d_sae: dictionary size. k: features kept per sample.
        layout: "position" makes every position of the map a sample (1×1 kernel), "map" the whole map one.
        hook_name, model_id: the module and the model the activations come from; empty where a file does not say.
        spatial: ``(y, x)`` of the map.
        apply_b_dec_to_input: subtract ``b_dec`` before encoding (paper eq; the published weights do not).
    """

    d_in: Width
    d_sae: Width
    k: Width
    layout: Layout
    hook_name: Name
    model_id: Name
    spatial: tuple[Side, Side]
    apply_b_dec_to_input: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> SAEConfig:
        if self.k > self.d_sae:
            raise ValueError("k must not exceed d_sae")
        if self.layout == "map" and self.d_in % (self.spatial[0] * self.spatial[1]):
            raise ValueError("d_in must be a multiple of y * x in the map layout")
        return self

    @property
    def channels(self) -> int:
        """Channels of the activation map that is read."""
        return self.d_in if self.layout == "position" else self.d_in // (self.spatial[0] * self.spatial[1])

    @property
    def code_grid(self) -> tuple[int, int]:
        """``(y, x)`` of the codes: the map itself, or ``(1, 1)`` where one code stands for the whole map."""
        return self.spatial if self.layout == "position" else (1, 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by its name in SAELens."""
        return {
            "W_dec": (self.d_sae, self.d_in),
            "W_enc": (self.d_in, self.d_sae),
            "b_dec": (self.d_in,),
            "b_enc": (self.d_sae,),
        }
