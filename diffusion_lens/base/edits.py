"""An edit in words, made from its ``EditSpec``; nothing reads these words back."""

from __future__ import annotations

from diffusion_lens.base.types import TURNED, EditSpec, FittedMethod, Intervention


def describe(spec: EditSpec) -> str:
    """What an edit does, in one line that ends in its digest: equal text, equal edit."""
    return f"{_words(spec)} · {spec.digest}"


def describe_goal(classes: tuple[str, ...], shares: tuple[float, ...]) -> str:
    """Target shares in words, classes of none left out: ``"female 50%, male 50%"``."""
    return ", ".join(f"{label} {share:.0%}" for label, share in zip(classes, shares, strict=True) if share)


def _words(spec: EditSpec) -> str:
    if spec.method is not None:
        return _method_words(spec.method, spec.strength)
    if spec.custom is not None:
        return spec.custom.name
    held = f"; holding {', '.join(spec.holds)}" if spec.holds else ""
    return "; ".join(_intervention_words(i) for i in spec.interventions) + held


def _method_words(method: FittedMethod, strength: float) -> str:
    goal = describe_goal(method.classes, method.target)
    return f"{method.name} towards {method.attribute} {goal}, strength {strength:g}"


def _intervention_words(intervention: Intervention) -> str:
    features = intervention.features
    mirror = f" and {len(intervention.opposite.ids)} mirrored" if intervention.opposite is not None else ""
    window = intervention.window
    steps = "every step" if window is None else f"steps {window[0]}-{window[1] - 1}"
    images = "" if intervention.only_seeds is None else f", {len(intervention.only_seeds)} chosen images"
    apart = f", {len(intervention.overrides)} set apart" if intervention.overrides else ""
    painted = "" if intervention.everywhere else f", at {_painted(intervention.where or ())}"
    return (
        f"{intervention.mode} {len(features.ids)}{mirror} features for {features.attribute}={features.target}"
        f" by beta {intervention.beta:g}{apart}, {steps}, {intervention.sampler}{images}{painted}"
    )


def _painted(where: tuple[str, ...]) -> str:
    turned = sum(row.count(TURNED) for row in where)
    return f"{turned} of {sum(map(len, where))} positions"
