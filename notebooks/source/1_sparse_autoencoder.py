# %% [markdown]
# # 1 · A sparse autoencoder from scratch
#
# **One idea:** the activity in the middle of a diffusion model can be written as a sum of a few directions out of many, and those directions can be learnt.
#
# *About 40 minutes. A free CPU runtime is enough: 2 GB of memory, nothing to download beside the packages.* Exercises say how hard (🔴 of five), how important (🔵 of five) and how long they may take; look at the solution once that time is over.

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
torch.manual_seed(0)
lens = DiffusionLens.from_pretrained(assets_folder() / "portraits")
lens

# %% [markdown]
# ## What we train on
#
# The model draws in 16 steps. At every step we read its bottleneck `h [image, step, channel, y, x]`; each place of each step of each image is one sample `x` of `d_in` numbers.

# %%
N = 12 if SMALL else 96
base = lens.generate("a portrait of a person", seeds=range(N), capture=True)
h = torch.from_numpy(base.activations.h).float()
samples = h.permute(0, 1, 3, 4, 2).reshape(-1, h.shape[2])
SCALE = (h.shape[2] / samples.pow(2).sum(1).mean()).sqrt()
held_out = torch.arange(len(h)) >= int(0.75 * N)  # whole images: places of one image resemble each other
x_train, x_test = (SCALE * h[rows].permute(0, 1, 3, 4, 2).reshape(-1, h.shape[2]) for rows in (~held_out, held_out))
print(f"h {tuple(h.shape)}: {len(x_train)} samples of {x_train.shape[1]} numbers to train on, {len(x_test)} held out")
Image.fromarray(np.concatenate(list(base.images[:8]), axis=1))

# %% [markdown]
# ## Exercise 1: encode
# *Difficulty 🔴🔴⚪⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 10 minutes*
#
# `s = TopK(ReLU((x − b_dec) W_enc + b_enc))`: of `d_sae` numbers the `k` largest stay, what is below 0 becomes 0, all others are 0.


# %% tags=["exercise"]
def encode(x, W_enc, b_enc, b_dec, k):
    """Samples [n, d_in] → feature activations [n, d_sae], at most k of them above 0."""
    # <solution>
    pre = (x - b_dec) @ W_enc + b_enc
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())
    # </solution>


# %% tags=["check"]
_x = torch.tensor([[1.0, 2.0]])
_W = torch.tensor([[1.0, 0.0, -1.0, 3.0], [0.0, 1.0, -1.0, 0.0]])
_s = encode(_x, _W, torch.zeros(4), torch.zeros(2), 2)
assert _s.shape == (1, 4), f"The result should have one row and d_sae = 4 columns; it has shape {tuple(_s.shape)}."
assert (_s >= 0).all(), "An activation is below 0: the ReLU is missing."
assert (_s > 0).sum() <= 2, "More than k activations are left: keep the k largest and set the others to 0."
assert torch.equal(_s, torch.tensor([[0.0, 2.0, 0.0, 3.0]])), (
    f"Of (1, 2, -3, 3) the two largest are 2 and 3, in their places; you gave {_s.tolist()}."
)
_b = encode(_x, _W, torch.zeros(4), torch.tensor([1.0, 0.0]), 2)
assert torch.equal(_b, torch.tensor([[0.0, 2.0, 0.0, 0.0]])), "b_dec is to be taken off x before W_enc."
print("encode is right")

# %% [markdown]
# ## Exercise 2: decode, and how much is lost
# *Difficulty 🔴⚪⚪⚪⚪ · importance 🔵🔵🔵🔵⚪ · spend up to 5 minutes*
#
# `x̂ = s W_dec + b_dec`. The *fraction of variance unexplained* (FVU) is the squared error over the squared distance of `x` from its mean: 0 is perfect, 1 is as good as always answering with the mean.


# %% tags=["exercise"]
def decode(s, W_dec, b_dec):
    """Feature activations [n, d_sae] → samples [n, d_in]."""
    # <solution>
    return s @ W_dec + b_dec
    # </solution>


def fvu(x, x_hat):
    """Fraction of variance unexplained, one number."""
    # <solution>
    return (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    # </solution>


# %% tags=["check"]
_x = torch.randn(50, 3)
assert torch.allclose(decode(torch.eye(2), torch.ones(2, 3), torch.ones(3)), torch.full((2, 3), 2.0)), (
    "decode adds up the rows of W_dec by s, then b_dec."
)
assert abs(float(fvu(_x, _x))) < 1e-6, "A perfect reconstruction has FVU 0."
assert abs(float(fvu(_x, _x.mean(0).expand_as(_x))) - 1) < 1e-5, (
    "Answering with the mean has FVU 1: divide by the distance from the mean over samples, not by the size of x."
)
print("decode and fvu are right")

# %% [markdown]
# ## Exercise 3: one step of training
# *Difficulty 🔴🔴🔴⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 15 minutes*
#
# Reconstruct, take the mean squared error, step the optimiser; then bring every row of `W_dec` back to length 1. (Why? Otherwise the code could grow small and the decoder long, and “how active” would mean nothing.)


# %% tags=["exercise"]
def train_step(parameters, optimizer, x, k):
    """One optimiser step on samples x [n, d_in]; returns the loss as a float. parameters: W_enc, b_enc, W_dec, b_dec."""
    W_enc, b_enc, W_dec, b_dec = parameters
    # <solution>
    x_hat = decode(encode(x, W_enc, b_enc, b_dec, k), W_dec, b_dec)
    loss = (x - x_hat).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    return loss.item()
    # </solution>


def new_parameters(d_in, d_sae, mean):
    """Random unit directions; the encoder begins as the decoder's transpose, b_dec at the mean."""
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    return [torch.nn.Parameter(p) for p in (W_dec.T.clone(), torch.zeros(d_sae), W_dec, mean.clone())]


# %% tags=["check"]
_p = new_parameters(x_train.shape[1], 64, x_train.mean(0))
_before = [p.detach().clone() for p in _p]
_o = torch.optim.Adam(_p, lr=1e-3)
_losses = [train_step(_p, _o, x_train[:256], 8) for _ in range(15)]
assert all(isinstance(loss, float) for loss in _losses), (
    "Return the loss as a float, e.g. loss.item(): a tensor would keep its whole graph in memory."
)
assert not torch.equal(_before[0], _p[0]), "W_enc did not change: was loss.backward() called before optimizer.step()?"
assert torch.allclose(_p[2].norm(dim=1), torch.ones(64), atol=1e-4), (
    "The rows of W_dec are not of length 1 after the step."
)
assert _losses[-1] < _losses[0], (
    f"The loss rose from {_losses[0]:.3f} to {_losses[-1]:.3f} on the same samples: is zero_grad() called?"
)
print(f"train_step is right: {_losses[0]:.3f} → {_losses[-1]:.3f}")

# %% [markdown]
# ## Train, and compare with the one that ships

# %%
D_SAE, K, STEPS = (256, 16, 60) if SMALL else (1024, 40, 700)
parameters = new_parameters(x_train.shape[1], D_SAE, x_train.mean(0))
optimizer = torch.optim.Adam(parameters, lr=2e-3)
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = 2e-3 * (1 - step / STEPS)
    batch = x_train[torch.randint(len(x_train), (1024,))]
    loss = train_step(parameters, optimizer, batch, K)
    if step % (STEPS // 5) == 0:
        print(f"step {step:4d}  loss {loss:.3f}")

# %%
W_enc, b_enc, W_dec, b_dec = (p.detach() for p in parameters)
with torch.no_grad():
    mine = encode(x_test, W_enc, b_enc, b_dec, K)
    theirs = lens.sae.encode(x_test / SCALE)
    rows = [
        (
            "mine",
            float(fvu(x_test, decode(mine, W_dec, b_dec))),
            float((mine > 0).any(0).logical_not().float().mean()),
            K,
            D_SAE,
        ),
        (
            "shipped",
            float(fvu(x_test / SCALE, lens.sae.decode(theirs))),
            float((theirs > 0).any(0).logical_not().float().mean()),
            lens.sae.cfg.k,
            lens.sae.cfg.d_sae,
        ),
    ]
print(
    f"{'':8} {'FVU':>6} {'never fires here':>17} {'k':>4} {'features':>9}   ({len(x_test)} held-out samples of {int(held_out.sum())} images)"
)
for name, lost, dead, k, size in rows:
    print(f"{name:8} {lost:6.3f} {dead:17.1%} {k:4d} {size:9d}")

# %% [markdown]
# “Never fires here” is not “dead”: a feature for turnout coats cannot fire where nobody wears one. The shipped SAE was trained on all prompts and for longer; that is most of the difference.
#
# ## What did a feature of yours find?

# %%
places = h.shape[3] * h.shape[4]
with torch.no_grad():
    all_codes = encode(SCALE * samples, W_enc, b_enc, b_dec, K).reshape(N, h.shape[1], places, D_SAE)
per_image = all_codes.amax(dim=(1, 2))
busy = (per_image > 0).float().mean(0)
lively = torch.where((busy > 0.05) & (busy < 0.6), per_image.std(0), torch.zeros(D_SAE)).topk(3).indices.tolist()
strips = [np.concatenate(list(base.images[per_image[:, f].topk(8).indices.numpy()]), axis=1) for f in lively]
print("images that excite features", lively, "most")
Image.fromarray(np.concatenate(strips, axis=0))

# %% [markdown]
# ## An open question
#
# Train with `k = 8` and with `k = 64`. FVU falls with `k`; do the strips become *clearer* or *less clear*? Nobody has a measure of “one feature, one thing” that everybody accepts. Which would you propose, and how could it be wrong?
