# %% [markdown]
# # 2 · Attribution: which features does a probe listen to?
#
# **One idea:** an attribution splits a probe's answer among the features, so that the parts add up to the answer. It describes the probe. Whether a feature *causes* anything is another question.
#
# *About 30 minutes. A free CPU runtime is enough: 2 GB of memory.* Exercises say how hard (🔴 of five), how important (🔵 of five) and how long they may take.

# %%
# In Colab or a clean Python: SOURCE is where you have Diffusion Lens, a folder, a wheel, or "git+https://…".
SOURCE = "."
import importlib.util

if importlib.util.find_spec("diffusion_lens") is None:
    # %pip install -q {SOURCE}
    pass

# %%
import os

import numpy as np
import torch
from PIL import Image

from diffusion_lens import DiffusionLens, plots
from diffusion_lens.base.assets import assets_folder

SMALL = os.environ.get("LESSON_SMALL") == "1"
lens = DiffusionLens.from_pretrained(assets_folder() / "portraits")
N = 6 if SMALL else 32
base = lens.generate("a portrait of a person", seeds=range(N), capture=True)
Image.fromarray(np.concatenate(list(base.images[:6]), axis=1))

# %% [markdown]
# ## Why a probe
#
# The classifier that judges looks at finished images. To ask which feature speaks for “male” *while* the model draws, we need a reading of the bottleneck itself: a linear **probe**, one head for each step.
#
# Code → map → logits: `s` is the code of all places of one image at one step, `[place, d_sae]`; the SAE decodes it, the probe reads the map.

# %%
sae, probe, STEP = lens.sae, lens.probes["gender"], 10
h = torch.from_numpy(base.activations.h).float()[:, STEP]
with torch.no_grad():
    codes = sae.encode(sae.to_samples(h)).reshape(N, -1, sae.cfg.d_sae)
print(f"h {tuple(h.shape)}; codes {tuple(codes.shape)}, of which {(codes > 0).float().mean():.1%} are above 0")
print(f"the probe's accuracy at step {STEP}: {float(probe.accuracy[STEP]):.0%} (chance 50 %)")


def p_male(s):
    """Codes [n, place, d_sae] → the probe's probability of “male” [n]."""
    maps = sae.from_samples(sae.decode(s).flatten(0, 1), tuple(h.shape[2:]))
    return probe.probs(maps, STEP)[:, 1]


p_male(codes).detach().numpy().round(2)

# %% [markdown]
# ## Exercise 1: gradient × activation
# *Difficulty 🔴🔴⚪⚪⚪ · importance 🔵🔵🔵⚪⚪ · spend up to 8 minutes*
#
# How much would the answer change if a feature grew a little, times how active it is: `s ∂p/∂s`.


# %% tags=["exercise"]
def gradient_x_activation(s):
    """Codes [n, place, d_sae] → scores of the same shape."""
    # <solution>
    s = s.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(p_male(s).sum(), s)
    return (s * gradient).detach()
    # </solution>


# %% tags=["check"]
_g = gradient_x_activation(codes[:2])
assert _g.shape == codes[:2].shape, (
    f"One score for each number of the code: {tuple(codes[:2].shape)}, not {tuple(_g.shape)}."
)
assert not _g.requires_grad, "Detach the result; otherwise it keeps the whole graph."
assert (_g[codes[:2] == 0] == 0).all(), "A feature that is off has a score: multiply the gradient by the code."
_e = codes[:1].clone()
_place, _feature = divmod(int(_g[0].abs().argmax()), codes.shape[2])
_e[0, _place, _feature] *= 1.001
_slope = float((p_male(_e) - p_male(codes[:1])).detach()) / 0.001
assert abs(_slope - float(_g[0, _place, _feature])) < 0.1 * abs(_slope) + 1e-3, (
    "The score is not the slope of p_male in that feature; is the probability used, and not its logarithm?"
)
print("gradient × activation is right")

# %% [markdown]
# ## Exercise 2: integrated gradients
# *Difficulty 🔴🔴🔴⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 12 minutes*
#
# Where the probe is sure, its gradient is almost 0, and so is the score, though the features decided. Integrated gradients walk from a code of zeros to `s` and add up the gradients on the way:
#
# `S = s ∫₀¹ ∂p/∂s (α s) dα`, in practice the mean of the gradients at the middles of `m` equal parts.


# %% tags=["exercise"]
def integrated_gradients(s, m=32):
    """Codes [n, place, d_sae] → scores of the same shape; the path starts at the zero code."""
    # <solution>
    total = torch.zeros_like(s)
    for i in range(m):
        here = (s.detach() * (i + 0.5) / m).requires_grad_()
        total += torch.autograd.grad(p_male(here).sum(), here)[0]
    return s * total / m
    # </solution>


# %% tags=["check"]
_s = codes[:2]
_scores = integrated_gradients(_s)
_gap = (_scores.sum((1, 2)) - (p_male(_s) - p_male(torch.zeros_like(_s))).detach()).abs().max()
_one = integrated_gradients(_s, m=1)
assert not torch.allclose(_one, _scores, atol=1e-7), (
    "m has no effect: the gradient has to be taken at m places of the path, not at s."
)
assert _gap < 0.02, (
    f"Completeness fails by {_gap:.2f}: the scores of an image should add up to p(s) − p(0). Is the mean taken over the path, and multiplied by s once?"
)
print(f"integrated gradients are right; completeness holds within {_gap:.4f}")

# %% [markdown]
# ## Exercise 3: the closed form
# *Difficulty 🔴🔴🔴🔴⚪ · importance 🔵🔵🔵⚪⚪ · spend up to 12 minutes*
#
# Decoder and probe are linear, so along the path the *logit difference* `z = logit(male) − logit(female)` runs in a straight line from `a` (at the zero code) to `b` (at `s`). Only the logistic function `σ` bends. Its mean slope on the way needs no path at all:
#
# `∫₀¹ σ'(a + α (b − a)) dα = ?`


# %% tags=["exercise"]
def mean_slope(a, b):
    """The mean of σ' between a and b, tensors of one shape; at a = b its value there."""
    # <solution>
    change = b - a
    near = change.abs() < 1e-4
    middle = torch.sigmoid((a + b) / 2)
    return torch.where(
        near, middle * (1 - middle), (torch.sigmoid(b) - torch.sigmoid(a)) / torch.where(near, 1.0, change)
    )
    # </solution>


# %% tags=["check"]
_a, _b = torch.tensor([-1.0, 0.0, 2.0]).double(), torch.tensor([3.0, 0.0, 2.0 + 1e-7]).double()
_t = (torch.arange(20000).double() + 0.5)[:, None] / 20000
_p = torch.sigmoid(_a + _t * (_b - _a))
_want = (_p * (1 - _p)).mean(0)
_got = mean_slope(_a, _b)
assert torch.isfinite(_got).all(), "Where a = b the formula divides by 0: use σ'(a) there."
assert torch.allclose(_got, _want, atol=1e-6), (
    f"The mean slope should be {_want.tolist()}; you gave {_got.tolist()}. By the fundamental theorem it is (σ(b) − σ(a)) / (b − a)."
)
print("the closed form is right")

# %% [markdown]
# ## The whole ranking, beside the library's
#
# The library uses your closed form, at every step and over all images.

# %%
ours = integrated_gradients(codes, m=8 if SMALL else 32).sum(1).mean(0)
library = lens.attribute(base, "gender")
theirs = torch.from_numpy(np.asarray(library.scores[1, STEP]))
agreement = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])
print(
    f"step {STEP}: correlation with the library {agreement:.4f}; the library's completeness gap {library.completeness_gap:.1e}"
)
simple = gradient_x_activation(codes).sum(1).mean(0)
print(f"{'feature':>8} {'IG':>8} {'g × s':>8}")
for f in ours.abs().topk(8).indices.tolist():
    print(f"{'#' + str(f):>8} {float(ours[f]):8.3f} {float(simple[f]):8.3f}")
plots.attribution_figure(library, "male")

# %% [markdown]
# Where a probe is calibrated it is seldom sure, and the two rankings nearly agree. Make it sure (`dataclasses.replace(probe, temperature=probe.temperature / 20)`) and run both again: where p is near 1, gradient × activation all but vanishes, and integrated gradients still add up to p(s) − p(0).
#
# ## A ranking is no proof
#
# The lens keeps what turning single features did in 100 paired images. Rank beside effect:

# %%
found, order = lens.dissection, np.argsort(-lens.attributions["gender"].total("male"))
for rank, feature in enumerate(order[:8].tolist(), start=1):
    rows = [r for r, f in enumerate(found.features) if f == feature]
    told = "; ".join(
        f"β = {found.betas[r]:g}: {100 * found.effects['gender'][r, 1]:+.0f} points male (q = {found.q_values['gender'][r, 1]:.2g})"
        for r in rows
    )
    print(f"rank {rank}  #{feature:<5} {told or 'not turned alone'}")

# %% [markdown]
# ## An open question
#
# The path started at a code of zeros, which no image has. Start it at the mean code of images that the classifier reads as female (`baseline=` of `lens`' functions in `diffusion_lens.features.attribute`), and compare the rankings. Which of the two baselines would you defend, and before whom?
