# %% [markdown]
# # 4 · Measuring honestly
#
# **One idea:** a share is a count of a few images by a judge that errs. What it can show is decided before you look.
#
# *About 40 minutes. A free CPU runtime is enough; nothing is drawn here, everything is stored.* Exercises say how hard (🔴 of five), how important (🔵 of five) and how long they may take.

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

from diffusion_lens import DiffusionLens
from diffusion_lens.base.assets import assets_folder
from diffusion_lens.results import stats

SMALL = os.environ.get("LESSON_SMALL") == "1"
DRAWS = 2_000 if SMALL else 20_000
NURSE = "a portrait of a nurse"
lens = DiffusionLens.from_pretrained(assets_folder() / "portraits")
own = [s for s in lens.sweeps if s.request.prompt == NURSE and s.attribute.name == "gender"]
main, control = (next(s for s in own if s.is_control == c) for c in (False, True))
before = next(p for p in main.points if p.beta == 1)
before.measurement

# %% [markdown]
# ## Exercise 1: Wilson's interval
# *Difficulty 🔴🔴⚪⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 8 minutes*
#
# For k of n, with z = 1.96: the middle is `(k + z²/2) / (n + z²)`, and it reaches `z √(k (n − k) / n + z²/4) / (n + z²)` to both sides.


# %% tags=["exercise"]
def wilson(k, n, z=1.96):
    """Counts → (low, high)."""
    # <solution>
    middle = (k + z**2 / 2) / (n + z**2)
    reach = z * np.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)
    return middle - reach, middle + reach
    # </solution>


# %% tags=["check"]
_low, _high = wilson(5, 10)
assert abs(_low + _high - 1) < 1e-9, "5 of 10 is symmetric about one half."
assert abs(_low - 0.2366) < 5e-4, f"For 5 of 10 the lower end is 0.2366; you gave {_low:.4f}."
_low, _high = wilson(0, 8)
assert abs(_low) < 1e-9, f"For 0 of 8 the lower end is 0; you gave {_low:.4f}."
assert abs(_high - 0.3244) < 5e-4, (
    f"For 0 of 8 the upper end is 0.3244, far above 0: nothing seen is not nothing there. You gave {_high:.4f}."
)
print("wilson is right")

# %% [markdown]
# ## Does a 95 % interval hold 95 % of the time?
#
# Draw many counts of a known share, and look how often the interval holds it. The library uses the exact interval (Clopper and Pearson, 1934), which is wider and never falls short:

# %%
rng = np.random.default_rng(0)
print(f"{'n':>4} {'share':>6} {'Wilson':>8} {'exact':>8}")
for n in (8, 48):
    low, high = np.array([wilson(k, n) for k in range(n + 1)]).T
    a, b = np.array([stats.share_interval(k, n) for k in range(n + 1)]).T
    for share in (0.02, 0.1, 0.5):
        k = rng.binomial(n, share, DRAWS)
        print(
            f"{n:4d} {share:6.2f} {np.mean((low[k] <= share) & (share <= high[k])):8.1%} {np.mean((a[k] <= share) & (share <= b[k])):8.1%}"
        )

# %% [markdown]
# ## Exercise 2: pairs
# *Difficulty 🔴🔴🔴⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 10 minutes*
#
# The same seeds before and after: what counts are the images that *changed*. With g images that became male and l that ceased to be, and no true effect, each change goes either way like a coin. The exact McNemar test asks how often g + l coins are at least as uneven. Count only images decided both times.


# %% tags=["exercise"]
def mcnemar(before_male, after_male):
    """Two bool arrays of the same images → (gained, lost, p)."""
    # <solution>
    from math import comb

    gained, lost = int((~before_male & after_male).sum()), int((before_male & ~after_male).sum())
    n, few = gained + lost, min(gained, lost)
    p = min(1.0, 2 * sum(comb(n, i) for i in range(few + 1)) / 2**n)
    return gained, lost, p
    # </solution>


# %% tags=["check"]
_b = np.array([False] * 8 + [True] * 2)
_a = np.array([True] * 6 + [False] * 2 + [True, False])
_g, _l, _p = mcnemar(_b, _a)
assert (_g, _l) == (6, 1), (
    f"Six became male and one ceased to be; you counted {_g} and {_l}. Images that stayed do not count."
)
assert abs(_p - 0.125) < 1e-9, (
    f"Of 7 coins, 1 or fewer on one side, both sides counted: 2 (1 + 7) / 128 = 0.125; you gave {_p:.4f}."
)
assert mcnemar(_b, _b)[2] == 1.0, "Where nothing changed p is 1."
print("mcnemar is right")

# %%
for name, sweep in (("the features", main), ("random features", control)):
    after = next(p for p in sweep.points if p.beta == 1.5)
    sure = before.certain & after.certain
    gained, lost, p = mcnemar(before.labels[sure] == 1, after.labels[sure] == 1)
    print(f"{name:16} β = 1.5: {gained} became male, {lost} ceased to be, of {sure.sum()} decided twice; p = {p:.2g}")

# %% [markdown]
# ## Exercise 3: the judge errs
# *Difficulty 🔴🔴🔴⚪⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 8 minutes*
#
# Of true men the classifier reads a share `hit` as male, of true women a share `false`. Then the share read as male is `q = p · hit + (1 − p) · false`. Solve for p (Rogan and Gladen, 1978), and keep it between 0 and 1.

# %%
table = lens.confusion["gender"]
print("rows: true, columns: read as", lens.attribute_named("gender").classes)
print(table)
hit, false = table[1, 1] / table[1].sum(), table[0, 1] / table[0].sum()
print(f"hit {hit:.4f}, false {false:.4f}. On drawings this judge hardly errs; on photographs .9 and .05 would be good.")


# %% tags=["exercise"]
def corrected(q, hit, false):
    """Share read as male → estimated true share."""
    # <solution>
    return float(np.clip((q - false) / (hit - false), 0, 1))
    # </solution>


# %% tags=["check"]
assert abs(corrected(0.3 * 0.9 + 0.7 * 0.2, 0.9, 0.2) - 0.3) < 1e-9, (
    "With hit .9 and false .2 a true share of .3 is read as .41; corrected(.41) has to give .3 back."
)
assert corrected(0.05, 0.9, 0.2) == 0.0, "A share below the false alarms gives a negative number: keep it at 0."
assert abs(corrected(0.5, 1.0, 0.0) - 0.5) < 1e-12, "A judge without errors changes nothing."
_q = before.counts[1] / before.n
assert abs(corrected(_q, hit, false) - before.shares[1].corrected) < 0.02, (
    "On the stored sweep your value should be close to the library's."
)
print(
    f"corrected is right: read {_q:.3f}, corrected {corrected(_q, hit, false):.3f}, library {before.shares[1].corrected:.3f}"
)

# %% [markdown]
# ## The null floor
#
# A distance from equal shares, `FD = √Σ (share − ½)²`, is never 0 in a finite count. How large is it where the truth *is* equal? That is the floor under which FD shows nothing:

# %%
for n in (8, 48, 400):
    k = rng.binomial(n, 0.5, DRAWS)
    fd = np.sqrt(2) * np.abs(k / n - 0.5)
    print(
        f"n = {n:3d}: with truly equal shares FD is {fd.mean():.3f} on average, below {np.quantile(fd, 0.95):.3f} in 95 of 100 counts"
    )
after = next(p for p in main.points if p.beta == 1.5)
print(
    f"stored, β = 1.5: FD {after.fd:.3f} ({after.fd_interval[0]:.3f} to {after.fd_interval[1]:.3f}), floor {after.fd_floor:.3f}, n = {after.n}"
)

# %% [markdown]
# ## Exercise 4: find the flaws in a bad audit
# *Difficulty 🔴🔴🔴🔴⚪ · importance 🔵🔵🔵🔵🔵 · spend up to 12 minutes*
#
# > *We drew 20 nurses without steering (seeds 0–19) and 20 with our method (seeds 100–119). The classifier that our features were chosen with read 10 % men before and 30 % after. Three images were unclear; we left them out of the count and did not mention it. Of twelve strengths that we tried, β = 1.7 was best, and we report that one. FD fell from 0.57 to 0.28, so the model is now fair.*
#
# Which of these are flaws of this audit? Put their letters into the set.
#
# - a: before and after are on different seeds
# - b: no interval, and n = 20 is small for what is said
# - c: the classifier that chose the features also judges
# - d: undecided images are not reported
# - e: the best of twelve strengths is reported on the images that it was chosen on
# - f: no control with random features
# - g: a distance of shares is called fair
# - h: the images were made by a computer


# %% tags=["exercise"]
def flaws():
    """The letters of the flaws."""
    # <solution>
    return set("abcdefg")
    # </solution>


# %% tags=["check"]
_found = set(flaws())
_why = {
    "a": "Different seeds are different people: read the seeds again.", "b": "How wide is your Wilson interval of 6 of 20?",
    "c": "Who judged? Who chose?", "d": "Where did three images go?", "e": "Twelve looks, one report: on which images?",
    "f": "What would as many random features have done?", "g": "What does FD measure, and what does the last sentence say?",
}  # fmt: skip
for _letter, _hint in _why.items():
    assert _letter in _found, f"One flaw is missing. {_hint}"
assert "h" not in _found, "That the images were made by a computer is no flaw of the audit; it is what is audited."
print("all seven found; 6 of 20 is", "%.0f to %.0f %%" % tuple(100 * np.array(wilson(6, 20))))

# %% [markdown]
# ## An open question
#
# All intervals here are about *images of this model*, drawn with these prompts. Write one sentence that a newspaper could print about the stored sweep, and one that it would like to print but the measurement does not carry. Where exactly is the line between the two?
