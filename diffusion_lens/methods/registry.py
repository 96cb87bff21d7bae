"""All methods by key, in the order of the bench's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion_lens.base.types import FittedMethod, LensError
from diffusion_lens.methods.activation import Activation
from diffusion_lens.methods.bypass import Bypass
from diffusion_lens.methods.controls import MatchedNoise, PromptRewriting, RandomFeatures, SignFlip
from diffusion_lens.methods.ddm import DDM
from diffusion_lens.methods.difflens import DiffLens, DiffLensHeld
from diffusion_lens.methods.equisteer import EquiSteer
from diffusion_lens.methods.fine_tuning import FineTuning
from diffusion_lens.methods.h_distribution import HDistribution
from diffusion_lens.methods.latent_direction import LatentDirection
from diffusion_lens.methods.latent_editing import LatentEditing
from diffusion_lens.methods.protocol import Fitted, FittedRecord, Method, OpenLens, lens_key
from diffusion_lens.methods.sae_alternatives import SaeGradient, SaeLrp
from diffusion_lens.methods.site_means import SiteMeans
from diffusion_lens.methods.stereoclinic import StereoClinic
from diffusion_lens.methods.text_features import TextFeatures

METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        DiffLens(), DiffLensHeld(), SaeLrp(), SaeGradient(), Activation(), LatentDirection(), LatentEditing(),
        HDistribution(), FineTuning(), Bypass(), DDM(), StereoClinic(), EquiSteer(), TextFeatures(),
        SiteMeans(), RandomFeatures(), SignFlip(), MatchedNoise(), PromptRewriting(),
    )
}  # fmt: skip


def find_method(key: str) -> Method:
    """The method of that key; raises ``LensError`` that lists them."""
    if key not in METHODS:
        raise LensError(f"'{key}' is no method; choose from {', '.join(METHODS)}.")
    return METHODS[key]


def find_methods(keys: str | Sequence[str]) -> tuple[Method, ...]:
    """Methods by key; ``all`` is every one, ``a,b`` or a sequence some of them, each once."""
    names = [k.strip() for k in keys.split(",")] if isinstance(keys, str) else list(keys)
    if names == ["all"]:
        return tuple(METHODS.values())
    return tuple(find_method(name) for name in dict.fromkeys(names))


def fitted_of(spec: FittedMethod, lens: OpenLens, source: Fitted | Path | str | None = None) -> Fitted:
    """The fitted method that a spec names.

    ``source``: the method itself, or the folder where ``Fitted.save`` put it. A method without tensors needs none: its
    spec says everything.

    Raises:
        LensError: for another lens, another fit than the spec's, or no ``source`` where one is needed.
    """
    method = find_method(spec.key)
    if spec.lens_key != lens_key(lens):
        raise LensError(f"This edit by {method.name} was fitted to another lens; open that one.")
    if source is None:
        fitted = Fitted(method, lens, _record_of(spec, method), {})
    else:
        fitted = source if isinstance(source, Fitted) else method.load(Path(source), lens)
    if fitted.digest != spec.digest:
        given = "say where it was saved (fitted=…)" if source is None else "what was given is another fit"
        raise LensError(f"This edit needs what {method.name} learned ({spec.digest}); {given}.")
    return fitted


def _record_of(spec: FittedMethod, method: Method) -> FittedRecord:
    options = method.options.parse(dict(spec.options), where=f"the options of {method.name}")
    return FittedRecord(
        method=spec.key, lens_key=spec.lens_key, attribute=spec.attribute, classes=spec.classes, target=spec.target,
        options=options.told(), prompts=spec.prompts, seeds=spec.seeds, seconds=0.0,
    )  # fmt: skip
