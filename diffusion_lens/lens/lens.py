"""``DiffusionLens``: one object in front of everything; no maths of its own.

Heavy modules are imported inside methods, so that a lens opens and shows precomputed results before torch
and diffusers are imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import numpy as np

from diffusion_lens.base.progress import Progress
from diffusion_lens.base.types import (
    Attribute,
    Attribution,
    Control,
    EditSpec,
    FeatureCard,
    FeatureSet,
    Generation,
    GenerationRequest,
    Intervention,
    LensError,
    Mode,
    Predictions,
    Reproducible,
    Sampler,
    Seeds,
    as_seeds,
    as_whole,
)
from diffusion_lens.features.atlas import feature_card
from diffusion_lens.lens.folder import LensFolder
from diffusion_lens.model.prompts import check_words, unknown_pieces
from diffusion_lens.results import display
from diffusion_lens.results.manifest import Setting
from diffusion_lens.results.measurement import Figures, Measurement
from diffusion_lens.results.sweeps import Balance, SweepPoint, SweepResult, collect
from diffusion_lens.steering.settings import (
    control_intervention,
    describe_setting,
    feature_sets,
    make_intervention,
)

if TYPE_CHECKING:
    from diffusion_lens.measuring.observe import Baseline
    from diffusion_lens.methods.protocol import Fitted
    from diffusion_lens.model.custom import EditFunction
    from diffusion_lens.model.generate import Edit, OnLatents, Trajectory

AnyEdit: TypeAlias = "Intervention | Edit | EditSpec | EditFunction"
"""What can be given as one edit: an intervention, an edit, one as data, or a function ``(h, context) -> h``."""


@dataclass(frozen=True, eq=False, repr=False)
class DiffusionLens(LensFolder):
    """A diffusion model opened at its bottleneck: the model, its SAE features, and what they do.

    Made by ``from_pretrained`` (a folder or a hub id) or by ``fit.fit`` (any diffusers model).
    """

    def __repr__(self) -> str:
        steers = ", ".join(a.name for a in self.attributes)
        m = self.manifest
        return f"DiffusionLens({m.name!r}: {m.base_model.id} at {m.hook_name}, steers {steers}; {m.lens_id})"

    def _repr_html_(self) -> str:
        rows = [{"attribute": a.name, "classes": ", ".join(a.classes)} for a in self.attributes]
        return display.page(repr(self), rows, [("what its features were read on", self.pool)])

    def attribute_named(self, name: str) -> Attribute:
        """The steerable attribute of that name; raises ``LensError`` that lists them."""
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        known = ", ".join(a.name for a in self.attributes)
        raise LensError(f"This lens does not steer '{name}'; it steers {known}.")

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """Words, numbers and signs of the prompt that the model never saw, in order; none for an open vocabulary."""
        return unknown_pieces(prompt, self.manifest.vocabulary)

    def check_words(self, prompt: str) -> None:
        """Raise ``LensError`` for what the model never saw, without waiting for it; drawing checks the rest."""
        check_words(prompt, self.manifest.vocabulary)

    def request(
        self,
        prompt: str | None,
        seeds: Seeds,
        *,
        n_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> GenerationRequest:
        """What to draw, with the lens's own steps and guidance unless told otherwise."""
        return GenerationRequest(
            prompt,
            as_seeds(seeds),
            self.manifest.n_steps if n_steps is None else n_steps,
            self.manifest.guidance_scale if guidance_scale is None else guidance_scale,
            self.manifest.base_model.id,
        )

    def generate(
        self,
        prompt: str | GenerationRequest | None,
        *edits: Intervention | Edit,
        seeds: Seeds | None = None,
        edit: AnyEdit | None = None,
        capture: bool = False,
        batch_size: int = 16,
        progress: Progress | None = None,
        start: Trajectory | None = None,
        on_latents: OnLatents | None = None,
    ) -> Generation:
        """Draw one image per seed, with interventions (several act at once) or one other edit.

        ``prompt`` is a text with ``seeds``, or a finished request. ``edit`` may also be data (``EditSpec``) or a
        function ``(h, context) -> h`` of your own: ``h [n, c, y, x]`` is the bottleneck of the images
        ``context.seeds`` at step ``context.index`` (``model.custom.FunctionEdit`` takes a window and a sampler).
        ``capture`` keeps the bottleneck of every step (float16). ``progress`` may be cancelled at every step;
        ``start`` is a recorded trajectory; ``on_latents`` sees each batch's request and latents before they are
        decoded.
        """
        from diffusion_lens.model.generate import Capture, generate

        return generate(
            self.model,
            self._request(prompt, seeds),
            edit=self._one_edit(edits, edit),
            capture=Capture() if capture else None,
            batch_size=batch_size,
            progress=progress,
            start=start,
            on_latents=on_latents,
        )

    def _request(self, prompt: str | GenerationRequest | None, seeds: Seeds | None) -> GenerationRequest:
        if isinstance(prompt, GenerationRequest):
            if seeds is not None:
                raise LensError("Give seeds with a prompt, or a finished request; not both.")
            return prompt
        if seeds is None:
            raise LensError("Say which seeds to draw, e.g. seeds=range(16).")
        return self.request(prompt, seeds)

    def reproduce(
        self,
        result: Reproducible,
        *,
        fitted: Fitted | Path | str | None = None,
        edit: AnyEdit | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Generation:
        """Draw a generation's or a measurement's images again; equal bit for bit on the same machine.

        ``fitted``: see ``edit_of``. ``edit``: the function or edit itself, where it was one of your own. Methods that
        push a whole batch (H-Distribution) need the ``batch_size`` of then.
        """
        again = None if edit is None else self._one_edit((), edit)
        if again is None and result.edit is not None:
            again = self.edit_of(result.edit, fitted=fitted)
        if (None if again is None else again.spec) != result.edit:
            raise LensError("This is another edit than the result's; give the one that it was drawn with.")
        return self.generate(result.request, edit=again, batch_size=batch_size, progress=progress)

    def edit_of(self, spec: EditSpec, *, fitted: Fitted | Path | str | None = None) -> Edit:
        """The edit that a spec describes.

        ``fitted``: for a method that learned something, the fitted method or the folder where it was saved.

        Raises:
            LensError: for the features, the probes or the methods of another lens, a method whose tensors are not
                given, or an edit of somebody's own.
        """
        if spec.method is not None:
            from diffusion_lens.methods.registry import fitted_of

            return fitted_of(spec.method, self, fitted).edit(spec.strength)
        if spec.custom is not None:
            raise LensError(f"'{spec.custom.name}' is an edit of one's own, kept by name; give it again (edit=…).")
        edit = self.edit(*spec.interventions)
        if edit.spec != spec:
            raise LensError("This edit holds still what other probes read; use the lens that it was made with.")
        return edit

    def _one_edit(self, edits: Sequence[Intervention | Edit], other: AnyEdit | None = None) -> Edit | None:
        given = [edit for edit in (*edits, other) if edit is not None]
        interventions = [edit for edit in given if isinstance(edit, Intervention)]
        others = [edit for edit in given if not isinstance(edit, Intervention)]
        if len(others) + bool(interventions) > 1:
            raise LensError("Give either interventions, which act together, or one other edit.")
        if not others:
            return self.edit(*interventions) if interventions else None
        return self._as_edit(others[0])

    def _as_edit(self, edit: Edit | EditSpec | EditFunction) -> Edit:
        from diffusion_lens.model.custom import FunctionEdit

        if isinstance(edit, EditSpec):
            return self.edit_of(edit)
        return cast("Edit", edit) if hasattr(edit, "apply") else FunctionEdit(edit)

    def edit(self, *interventions: Intervention) -> Edit:
        """One edit of the bottleneck from one or several interventions; refuses features of another SAE."""
        from diffusion_lens.steering.intervene import make_edit

        return make_edit(interventions, self.sae, self.probes)

    def attribute(
        self, generation: Generation, attribute_name: str, *, method: str = "integrated_gradients"
    ) -> Attribution:
        """Which features carry an attribute in these images; the generation must have captured every step.

        ``method``: ``integrated_gradients`` or ``gradient_x_activation`` (both through the probe), or
        ``activation_difference`` (by the classifier's reading of the images).
        """
        from diffusion_lens.features import attribute

        if generation.activations is None:
            raise LensError("This generation has no activations; draw it again with capture=True.")
        h = generation.activations.h
        known = {
            "integrated_gradients": attribute.integrated_gradients,
            "gradient_x_activation": attribute.gradient_x_activation,
        }
        if method == "activation_difference":
            predictions = self.measure(generation).readings[attribute_name]
            sure = predictions.certain
            return attribute.activation_difference(self.sae, h[sure], predictions.labels[sure], predictions.attribute)
        if method not in known:
            raise LensError(f"'{method}' is no attribution method; choose {', '.join(known)} or activation_difference.")
        return known[method](self.sae, self.probes[self.attribute_named(attribute_name).name], h)

    def setting(self, attribute_name: str) -> Setting:
        """How the lens steers an attribute."""
        self.attribute_named(attribute_name)
        if attribute_name not in self.settings:
            raise LensError(f"This lens ships no setting for {attribute_name}; make an Intervention by hand.")
        return self.settings[attribute_name]

    def feature_set(self, attribute_name: str, target: str, n: int | None = None) -> FeatureSet:
        """The shipped features for one class, best first; ``n`` replaces their number."""
        setting = self.setting(attribute_name)
        return feature_sets(self.attributions[attribute_name], setting, target, n)[0]

    def intervention(
        self,
        attribute_name: str,
        target: str,
        beta: float,
        *,
        n_features: int | None = None,
        mode: Mode | None = None,
        opposite: FeatureSet | Literal["shipped"] | None = "shipped",
        overrides: Sequence[tuple[int, float]] = (),
        window: tuple[int, int] | Literal["shipped"] | None = "shipped",
        sampler: Sampler | None = None,
        only_seeds: frozenset[int] | None = None,
        hold: tuple[str, ...] | None = None,
        where: tuple[str, ...] | None = None,
    ) -> Intervention:
        """The shipped setting of an attribute, towards ``target`` at ``beta``.

        ``n_features`` replaces the number of features per pole; the others, where given, fields of ``Intervention``.
        ``beta`` and the numbers in ``overrides`` are β: with ``scale`` 1 changes nothing, with the other modes 0.
        """
        setting = self.setting(attribute_name)
        mode = mode or setting.mode
        shipped = make_intervention(self.attributions[attribute_name], setting, target, 0.0, n_features=n_features)
        return Intervention.at_beta(
            shipped.features, mode, beta, opposite=shipped.opposite if opposite == "shipped" else opposite,
            overrides=overrides, window=setting.window if window == "shipped" else window,
            sampler=sampler or setting.sampler, only_seeds=only_seeds, hold=setting.hold if hold is None else hold,
            where=where,
        )  # fmt: skip

    def classify(self, images: np.ndarray) -> dict[str, Predictions]:
        """Attribute → the classifier's reading of ``uint8 [n, H, W, 3]``, nuisances included."""
        return self.classifier.predict(images)

    def measure(self, generation: Generation, *, reference: Measurement | Generation | None = None) -> Measurement:
        """What the classifier reads in these images; ``reference``: the same request, unedited."""
        from diffusion_lens.measuring.observe import read

        base = self.measure(reference) if isinstance(reference, Generation) else reference
        return read([generation], generation.request, self.classifier, reference=base)

    def evaluate(
        self, generation: Generation, attribute_name: str, *, reference: Measurement | Generation | None = None
    ) -> Figures:
        """Shares, log ratio and FD of one attribute in these images; see ``measure``."""
        return self.measure(generation, reference=reference)[attribute_name]

    def sweep_points(
        self,
        prompt: str | GenerationRequest | None,
        attribute: str | FeatureSet,
        target: str | None = None,
        betas: Sequence[float] | None = None,
        *,
        n: int = 100,
        seeds: Seeds | None = None,
        control: Control | None = None,
        control_seed: int = 0,
        baseline: Baseline | None = None,
        target_shares: Mapping[str, float] | None = None,
        batch_size: int = 16,
        n_examples: int = 8,
        progress: Progress | None = None,
    ) -> Iterator[SweepPoint]:
        """Measure each strength on the same seeds, one point as soon as it is drawn.

        Args:
            attribute: a steerable attribute (its shipped setting) or a ``FeatureSet`` (steered in the shipped mode).
            betas: the shipped grid by default; ``seeds``: ``range(n)`` by default.
            control: ``random`` steers as many features as active, drawn at random, ``flip`` the two poles exchanged.
            baseline, target_shares, batch_size, n_examples, progress: see ``sweep.sweep_points``.
        """
        from diffusion_lens.measuring.sweep import sweep_points

        name, target = self._goal(attribute, target)
        request = prompt if isinstance(prompt, GenerationRequest) else self.request(prompt, seeds_of(n, seeds))
        chosen = self.setting(name).betas if betas is None else betas

        def edit_at(beta: float) -> Edit | None:
            if beta == self.setting(name).identity:
                return None
            return self.edit(self._at_beta(attribute, target, beta, control, control_seed))

        read = {a.name: a for a in self.classifier.attributes}
        return sweep_points(
            self.model, request, edit_at, chosen, self.classifier, read[name], target, baseline=baseline,
            target_shares=target_shares, batch_size=batch_size, n_examples=n_examples, progress=progress,
        )  # fmt: skip

    def sweep(
        self,
        prompt: str | GenerationRequest | None,
        attribute: str | FeatureSet,
        target: str | None = None,
        betas: Sequence[float] | None = None,
        *,
        n: int = 100,
        seeds: Seeds | None = None,
        control: Control | None = None,
        control_seed: int = 0,
        baseline: Baseline | None = None,
        target_shares: Mapping[str, float] | None = None,
        batch_size: int = 16,
        n_examples: int = 8,
        progress: Progress | None = None,
    ) -> SweepResult:
        """All of ``sweep_points`` as one result."""
        request = prompt if isinstance(prompt, GenerationRequest) else self.request(prompt, seeds_of(n, seeds))
        name, target = self._goal(attribute, target)
        points = self.sweep_points(
            request, attribute, target, betas, control=control, control_seed=control_seed, baseline=baseline,
            target_shares=target_shares, batch_size=batch_size, n_examples=n_examples, progress=progress,
        )  # fmt: skip
        return collect(
            points,
            target=target,
            setting=self._describe(attribute, name, control, control_seed),
            control=control,
            control_seed=control_seed,
            provenance={"lens": self.manifest.lens_id, "sae": self.manifest.sae_id},
        )

    def balance(
        self,
        prompt: str | GenerationRequest | None,
        attribute_name: str,
        *,
        target: str | None = None,
        target_share: float = 0.5,
        betas: Sequence[float] | None = None,
        n: int = 100,
        seeds: Seeds | None = None,
        progress: Progress | None = None,
    ) -> Balance:
        """The strength (and its interval) at which the corrected share of ``target`` meets ``target_share``."""
        from diffusion_lens.measuring.balance import balance

        result = self.sweep(prompt, attribute_name, target, betas, n=n, seeds=seeds, progress=progress)
        return balance(result, self.classifier.confusion[attribute_name], target_share=target_share)

    def _goal(self, attribute: str | FeatureSet, target: str | None) -> tuple[str, str]:
        if isinstance(attribute, FeatureSet):
            return attribute.attribute, target or attribute.target
        return attribute, target or self.setting(attribute).target

    def _at_beta(
        self, attribute: str | FeatureSet, target: str, beta: float, control: Control | None, seed: int
    ) -> Intervention:
        if isinstance(attribute, FeatureSet):
            setting = self.setting(attribute.attribute)
            steer = Intervention.at_beta(
                attribute, setting.mode, beta, window=setting.window, sampler=setting.sampler, hold=setting.hold
            )
        else:
            steer = self.intervention(attribute, target, beta)
        return steer if control is None else control_intervention(steer, control, self.atlas.activity, seed)

    def _describe(self, attribute: str | FeatureSet, name: str, control: Control | None, seed: int) -> str:
        setting = self.setting(name)
        if isinstance(attribute, FeatureSet):
            setting = setting.model_copy(update={"n_features": len(attribute.ids), "poles": "one"})
        return describe_setting(setting, control, seed)

    def card(self, feature_id: int) -> FeatureCard:
        """Everything known of one feature."""
        nuisances = [a.attribute() for a in self.manifest.nuisances]
        return feature_card(self.atlas, self.attributions, self.pool, feature_id, nuisances=nuisances)


def seeds_of(n: int, seeds: Seeds | None) -> Seeds:
    """The seeds given, or the first ``n``; none is an error, not a reason to draw others."""
    return range(as_whole(n, "n")) if seeds is None else seeds
