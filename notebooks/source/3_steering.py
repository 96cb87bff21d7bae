# %% [markdown]
# # 3 · Steering: turn features, and measure what it did
#
# **One idea:** an edit of the features is made *by difference*, so that a strength of 1 changes nothing at all; everything that you see is then due to the turn.
#
# *About 35 minutes. A free CPU runtime is enough: 2 GB of memory.* Exercises say how hard (🔴 of five), how important (🔵 of five) and how long they may take.

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

from diffusion_lens import DiffusionLens
from diffusion_lens.base.assets import assets_folder

SMALL = os.environ.get("LESSON_SMALL") == "1"
NURSE = "a portrait of a nurse"
SEEDS = range(4 if SMALL else 8)
lens = DiffusionLens.from_pretrained(assets_folder() / "portraits")
sae = lens.sae
features = lens.feature_set("gender", "male").ids
base = lens.generate(NURSE, seeds=SEEDS)
print(f"{len(features)} features for “male”, the first five: {features[:5]}")
Image.fromarray(np.concatenate(list(base.images), axis=1))

# %% [markdown]
# ## Exercise 1: an edit by difference
# *Difficulty 🔴🔴🔴⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 12 minutes*
#
# An SAE loses something: decode(encode(x)) is not x. Whoever replaces the bottleneck by a decoded code changes the image even where nothing was turned. So add only the *difference* that turning the chosen features makes:
#
# `h' = h + (β − 1) Σ_i s_i W_dec[i]`, summed over the chosen features i.
#
# `sae.to_samples(h)` turns maps `[n, c, y, x]` into samples, `sae.encode` gives `s [samples, d_sae]`, `sae.from_samples` turns samples back.


# %% tags=["exercise"]
def turn(h, ids, beta):
    """Maps h [n, c, y, x] → maps in which the features `ids` are beta times as active."""
    # <solution>
    s = sae.encode(sae.to_samples(h))[:, list(ids)]
    change = (beta - 1) * s @ sae.W_dec[list(ids)]
    return h + sae.from_samples(change, tuple(h.shape[2:]))
    # </solution>


# %% tags=["check"]
torch.manual_seed(0)
_h = torch.randn(2, sae.cfg.channels, *sae.cfg.spatial)
_ids = features[:20]
assert torch.equal(turn(_h, _ids, 1.0), _h), (
    "β = 1 has to give back h bit by bit. Is h itself kept, and only the difference added?"
)
_s = sae.encode(sae.to_samples(_h))
_t = _s.clone()
_t[:, list(_ids)] *= 3
_want = _h + sae.from_samples(sae.decode(_t) - sae.decode(_s), tuple(_h.shape[2:]))
_got = turn(_h, _ids, 3.0)
assert not torch.allclose(_got, _h), "β = 3 changed nothing: were the codes of the chosen features used?"
assert torch.allclose(_got, _want, atol=1e-4), (
    "At β = 3 the code of the chosen features should be three times as large: the factor of the difference is β − 1."
)
print("turn is right")

# %% [markdown]
# Your function is a valid edit of the library's: `(h, context) → h`. Half the features of men up, and look:

# %%
unchanged = lens.generate(base.request, edit=lambda h, context: turn(h, features, 1.0))
turned = lens.generate(base.request, edit=lambda h, context: turn(h, features, 3.0))
print("β = 1 gives the same images, bit by bit:", np.array_equal(unchanged.images, base.images))
Image.fromarray(np.concatenate([np.concatenate(list(g.images), axis=1) for g in (base, turned)], axis=0))

# %% [markdown]
# ## Symmetric and asymmetric
#
# A DDIM step has two terms: one points to the predicted image, one back along the noise. *Symmetric* edits both, *asymmetric* only the first (Kwon et al., 2023). The same strength is a different dose:

# %%
for sampler in ("asymmetric", "symmetric"):
    for beta in (1.5,) if SMALL else (1.5, 3.0):
        made = lens.generate(base.request, lens.intervention("gender", "male", beta, sampler=sampler))
        read = lens.measure(made, reference=base)["gender"]
        moved = np.abs(made.images.astype(float) - base.images).mean()
        print(f"{sampler:10} β = {beta:g}: {read}; pixels moved by {moved:.1f} of 255 levels")

# %% [markdown]
# ## Exercise 2: a log ratio with an interval
# *Difficulty 🔴🔴⚪⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 8 minutes*
#
# `ln(male / female)` is 0 at balance. With ½ added to both counts (for counts of 0), its standard error is `√(1/(m + ½) + 1/(f + ½))`; the 95 % interval reaches 1.96 standard errors to both sides.


# %% tags=["exercise"]
def log_ratio(male, female):
    """Counts → (value, low, high)."""
    # <solution>
    a, b = male + 0.5, female + 0.5
    value, error = np.log(a / b), np.sqrt(1 / a + 1 / b)
    return value, value - 1.96 * error, value + 1.96 * error
    # </solution>


# %% tags=["check"]
_v, _low, _high = log_ratio(24, 24)
assert abs(_v) < 1e-12, f"Equal counts give ln 1 = 0; you gave {_v:.3f}."
assert abs((_low + _high) / 2 - _v) < 1e-9, "The interval should reach equally far to both sides of the value."
assert abs(_high - 1.96 * np.sqrt(2 / 24.5)) < 1e-6, (
    f"With 24 and 24 the upper end is 1.96 √(2/24.5) = 0.56; you gave {_high:.3f}."
)
assert np.isfinite(log_ratio(0, 48)).all(), "A count of 0 gives an infinite value: add ½ to both counts."
assert log_ratio(5, 43)[0] < 0, "More women than men is below 0: male over female."
print("log_ratio is right")

# %% [markdown]
# ## The curve, and where it bends
#
# The lens keeps a sweep of 48 images a strength, on the same seeds, and its control: as many features drawn at random. Yours, on those counts:

# %%
own = [s for s in lens.sweeps if s.request.prompt == NURSE and s.attribute.name == "gender"]
main, control = (next(s for s in own if s.is_control == c) for c in (False, True))
print(f"{'β':>5} {'female':>7} {'male':>5} {'undecided':>10} {'ln(male / female)':>26}    random features")
for point, beside in zip(main.points, control.points, strict=True):
    (female, male), (f, m) = point.counts, beside.counts
    print(f"{point.beta:5g} {female:7d} {male:5d} {point.n_uncertain:10d} "
          f"{'%.2f (%.2f to %.2f)' % log_ratio(male, female):>26}    {'%.2f (%.2f to %.2f)' % log_ratio(m, f)}")  # fmt: skip
main.plot()

# %% [markdown]
# ## Exercise 3: where is it turned too far?
# *Difficulty 🔴🔴⚪⚪⚪ · importance 🔵🔵🔵🔵⚪ · spend up to 8 minutes*
#
# Beyond some strength the images leave what the model was trained on. Two signs are in the sweep: the classifier decides fewer images, and the *other* attributes change. Return the strengths above 1 at which either more than `undecided` of the images are left undecided, or fewer than `kept` of the other readings stay (`point.kept`).


# %% tags=["exercise"]
def too_far(points, undecided=0.1, kept=0.75):
    """Points of a sweep → the strengths above 1 that show a sign of over-steering."""
    # <solution>
    return [
        p.beta for p in points if p.beta > 1 and (p.n_uncertain / (p.n + p.n_uncertain) > undecided or p.kept < kept)
    ]
    # </solution>


# %% tags=["check"]
from types import SimpleNamespace as _P

_points = [_P(beta=0.0, n=10, n_uncertain=90, kept=0.1), _P(beta=2.0, n=99, n_uncertain=1, kept=0.9),
           _P(beta=3.0, n=80, n_uncertain=20, kept=0.9), _P(beta=4.0, n=100, n_uncertain=0, kept=0.5)]  # fmt: skip
assert too_far(_points) is not None, "Return a list."
assert 0.0 not in too_far(_points), "Only strengths above 1 are asked for."
assert 2.0 not in too_far(_points), (
    "At β = 2 one image in a hundred is undecided and nine in ten readings stay: no sign."
)
assert 3.0 in too_far(_points), "At β = 3 a fifth of the images is undecided. Is n the number of decided images?"
assert 4.0 in too_far(_points), "At β = 4 half of the other readings changed: one sign is enough."
print("too_far is right; in the stored sweep:", too_far(main.points))

# %% [markdown]
# ## An open question
#
# Two strengths give the same share of men, one with few features turned far, one with many turned a little. Which is the gentler edit? Say how you would measure “gentle” so that somebody who prefers the other answer could accept it.
