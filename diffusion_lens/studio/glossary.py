"""Twelve words that the app and its lessons use, each in a sentence or two; the one place where they are explained."""

from __future__ import annotations

GLOSSARY: dict[str, str] = {
    "diffusion model": (
        "A network that draws an image by removing noise step by step. The same seed gives the same noise, and so the "
        "same image."
    ),
    "bottleneck": (
        "The narrow middle of the network, where an image in the making is described by the fewest numbers. Features "
        "are read and steered there."
    ),
    "sparse autoencoder": (
        "A second, small network (SAE) that writes the bottleneck's activity as a sum of a few directions out of "
        "thousands."
    ),
    "feature": (
        "One of those directions. It is active in some images and off in most; what it stands for has to be found "
        "out, and may be several things at once."
    ),
    "probe": "A linear classifier that reads an attribute from the bottleneck, without looking at the finished image.",
    "attribution": (
        "How much of a probe's answer each feature accounts for. It says what the probe listens to, not what happens "
        "when the feature is turned."
    ),
    "steering strength": (
        "β, the number a feature's activity is multiplied by while the model draws: 1 leaves it, 0 switches it off, 2 "
        "doubles it."
    ),
    "perceived attribute": (
        "What a classifier reads in a picture, for example perceived gender presentation. It is never anybody's "
        "identity, and the classifier errs at a known rate."
    ),
    "interval": (
        "The range of shares that agree with what was counted. A 95 % interval misses the true share in about one "
        "count of twenty; fewer images make it wider."
    ),
    "log ratio": (
        "ln(count of one class / count of the other): 0 is balance, about +0.7 is two to one, about −0.7 one to two."
    ),
    "control": (
        "The same measurement with something that should not matter, here as many features drawn at random. What "
        "moves there is no effect of the features you chose."
    ),
    "side effect": (
        "Whatever else changes when one attribute is steered, counted on the same seeds: glasses, hair, age, clothing."
    ),
}
"""Word → what it means here."""
