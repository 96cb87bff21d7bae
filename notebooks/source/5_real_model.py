# %% [markdown]
# # 5 · A real model
#
# **One idea:** the same few lines read and steer the middle of Stable Diffusion; nothing in the method is special to drawings. What changes is what may be concluded.
#
# *About 40 minutes.* With `MODEL = "portraits"`, as it stands, everything runs on a CPU with the bundled model (2 GB of memory). For Stable Diffusion 1.5 set `MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"` on a free GPU runtime; it fetches 5.5 GB of weights once (disk), which take 2.7 GB of GPU memory in half precision; plan for 4 GB with activations, and for some 15 minutes for the 60 images below. (Counted from the weights, not measured on such a runtime; `docs/fit-sd15.md` has time and disk of a whole lens.)

# %%
# In Colab or a clean Python: SOURCE is where you have Diffusion Lens, a folder, a wheel, or "git+https://…".
SOURCE = "."
import importlib.util

if importlib.util.find_spec("diffusion_lens") is None:
    # %pip install -q {SOURCE}
    pass

# %%
import os
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusion_lens.base.assets import assets_folder

SMALL = os.environ.get("LESSON_SMALL") == "1"
MODEL = "portraits"
GPU = torch.cuda.is_available()
source = assets_folder() / "portraits" / "pipeline" if MODEL == "portraits" else MODEL
pipe = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float16 if GPU else torch.float32)
pipe = pipe.to("cuda" if GPU else "cpu")
pipe.set_progress_bar_config(disable=True)
STEPS, GUIDANCE = (16, 1.0) if MODEL == "portraits" else (25, 7.5)
print(
    f"{MODEL}: {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} million weights in the U-Net, {'GPU' if GPU else 'CPU'}"
)


def draw(prompt, seeds):
    """One image per seed, each from its own noise."""
    images = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        images.append(pipe(prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator).images[0])
    return images


def row(images):
    """Images side by side."""
    return np.concatenate([np.asarray(image) for image in images], axis=1)


SEEDS = range(2 if SMALL else 6)
plain = draw("a portrait of a doctor", SEEDS)
Image.fromarray(row(plain))

# %% [markdown]
# ## Exercise 1: a hook that reads the middle
# *Difficulty 🔴🔴🔴⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 10 minutes*
#
# `module.register_forward_hook(f)` calls `f(module, inputs, output)` after every forward pass and returns a handle; `handle.remove()` ends it. Record the output of `pipe.unet.mid_block` at every step, and make sure that the hook is gone afterwards, *also after an error*.


# %% tags=["exercise"]
@contextmanager
def recording():
    """Yields a list to which every output of the mid block is added, detached, as float32 on the CPU."""
    # <solution>
    found = []
    handle = pipe.unet.mid_block.register_forward_hook(
        lambda module, inputs, output: found.append(output.detach().float().cpu())
    )
    try:
        yield found
    finally:
        handle.remove()
    # </solution>


# %% tags=["check"]
with recording() as _found:
    draw("a portrait of a doctor", [0])
assert len(_found) == STEPS, f"{STEPS} steps should leave {STEPS} maps; there are {len(_found)}."
assert all(not m.requires_grad for m in _found), "The maps keep their graph: detach them, or memory fills up."
try:
    with recording():
        raise RuntimeError
except RuntimeError:
    pass
assert not pipe.unet.mid_block._forward_hooks, "A hook is left after an error: remove it in a finally block."
print("recording is right; one map has the shape", tuple(_found[0].shape))

# %% [markdown]
# ## Exercise 2: a direction
# *Difficulty 🔴🔴⚪⚪⚪ · importance 🔵🔵🔵🔵⚪ · spend up to 8 minutes*
#
# A first direction needs no SAE: the mean map of one prompt minus that of another, step by step. (With guidance the batch holds two halves, unconditional and conditional; the last entry is the conditional one.)


# %% tags=["exercise"]
def mean_maps(prompt, seeds):
    """A tensor [step, c, y, x]: the mid block's mean output at each step, of the conditional half."""
    # <solution>
    total = 0
    for seed in seeds:
        with recording() as found:
            draw(prompt, [seed])
        total = total + torch.stack([maps[-1] for maps in found])
    return total / len(seeds)
    # </solution>


# %% tags=["check"]
_one, _two = mean_maps("a portrait of a doctor", [0]), mean_maps("a portrait of a doctor", [0, 1])
assert _one.ndim == 4 and len(_one) == STEPS, (
    f"The result should be [step, c, y, x] with {STEPS} steps; it has shape {tuple(_one.shape)}."
)
assert torch.equal(_one, mean_maps("a portrait of a doctor", [0])), (
    "The same seed gave other maps: is the generator seeded for each image?"
)
assert not torch.allclose(_one, _two), "Two seeds give the map of one: is the mean taken over all seeds?"
print("mean_maps is right")

# %%
TRAIN = range(100, 102 if SMALL else 112)
direction = mean_maps("a portrait of a female doctor", TRAIN) - mean_maps("a portrait of a male doctor", TRAIN)
print(
    "length of the direction at the first, middle and last step:",
    [round(float(direction[i].norm()), 2) for i in (0, STEPS // 2, -1)],
)

# %% [markdown]
# ## Exercise 3: steer, and the identity
# *Difficulty 🔴🔴🔴⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 10 minutes*
#
# Add `amount × direction[step]` to the mid block's output while drawing. The step is counted by *you*, from 0 for every image: a hook that counts across images is a classic mistake.


# %% tags=["exercise"]
def steered(prompt, seeds, amount):
    """Images with the direction added at every step."""
    # <solution>
    images = []
    for seed in seeds:
        step = 0

        def add(module, inputs, output):
            nonlocal step
            change = amount * direction[step].to(output)
            step += 1
            return output + change

        handle = pipe.unet.mid_block.register_forward_hook(add)
        try:
            images += draw(prompt, [seed])
        finally:
            handle.remove()
    return images
    # </solution>


# %% tags=["check"]
_none = steered("a portrait of a doctor", [0, 1], 0.0)
assert np.array_equal(row(_none), row(draw("a portrait of a doctor", [0, 1]))), (
    "An amount of 0 has to give the plain images, bit by bit."
)
_more = steered("a portrait of a doctor", [0, 1], 1.0)
assert not np.array_equal(row(_more), row(_none)), (
    "An amount of 1 changed nothing: does the hook return the new output?"
)
assert np.array_equal(np.asarray(steered("a portrait of a doctor", [1], 1.0)[0]), np.asarray(_more[1])), (
    "An image depends on the one drawn before it: start the step at 0 for every image."
)
assert not pipe.unet.mid_block._forward_hooks, "A hook is left behind."
print("steered is right")

# %%
rows = [plain] + [
    steered("a portrait of a doctor", SEEDS, amount) for amount in ((1.0,) if SMALL else (1.0, 2.0, -1.0))
]
print("plain, then the direction added by", "1" if SMALL else "1, 2 and −1")
Image.fromarray(np.concatenate([row(images) for images in rows], axis=0))

# %% [markdown]
# ## What may be concluded
#
# You have seen six images. To say how *often* something changes you need many seeds, a classifier with a known error on *this* kind of image, an interval and a random direction of the same length beside it: notebook 4. A whole lens with features, probes and stored measurements is made by `diffusion-lens fit`; `docs/fit-sd15.md` walks through it.
#
# ## An open question
#
# The direction came from prompts that *name* what we look for. It may be a direction of the words rather than of the images. Draw a control that could tell the two apart, and say what each outcome would mean.
