"""Shares looked at while images are still being drawn: an interval that holds however often one looks, and stops.

A 95 % interval for a fixed number of images does not hold if one stops as soon as it pleases. A confidence sequence
does: with 95 % probability it holds the share at all numbers of images at once (Robbins 1970). It is wider for it, as
3.0 is to 1.96 at the number of images that it is made for.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy

from diffusion_lens.base.types import LensError
from diffusion_lens.results.stats import Interval

MADE_FOR = 500
"""Images at which a sequence is narrowest, unless told otherwise; it holds at every other number too."""

MOST_IMAGES = 10_000_000


def sequence_interval(k: int, n: int, *, made_for: int = MADE_FOR, level: float = 0.95) -> Interval:
    """The confidence sequence of a share at ``k`` of ``n`` images: may be looked at after every image.

    Holds the shares against which the images' evidence has never been ``1 / (1 - level)`` (``log_evidence``), which by
    Ville's inequality leaves out the true share, ever, with at most the probability ``1 - level`` (Robbins 1970;
    Howard, Ramdas, McAuliffe and Sekhon 2021). For several classes at once, divide ``1 - level`` by their number.

    Args:
        made_for: the number of images at which it is to be narrowest; to be chosen before the first look.
    """
    if n < 0 or not 0 <= k <= n:
        raise LensError(f"A count lies between 0 and n; they are {k} and {n}.")
    if not 0 < level < 1 or made_for < 1:
        raise LensError(f"A level lies between 0 and 1, and made_for is >= 1; they are {level} and {made_for}.")
    return _least_share(k, n, made_for, level), 1 - _least_share(n - k, n, made_for, level)


def _least_share(k: int, n: int, made_for: int, level: float) -> float:
    bound = -float(np.log1p(-level))

    def excess(p: float) -> float:
        return float(log_evidence(k, n, p, made_for=made_for, level=level)) - bound

    tiny = float(np.finfo(np.float64).tiny)
    if k == 0 or excess(tiny) <= 0:
        return 0.0
    return float(brentq(excess, tiny, k / n)) if k < n else float(brentq(excess, tiny, 1 - 1e-12))


def log_evidence(
    k: int | np.ndarray, n: int | np.ndarray, share: float, *, made_for: int = MADE_FOR, level: float = 0.95
) -> np.ndarray:
    """Log of the evidence against ``share`` in ``k`` of ``n`` images; elementwise for arrays.

    The likelihood ratio of a Beta mixture of shares around ``share`` to it, ``B(a + k, b + n - k) / B(a, b) / (p^k
    (1 - p)^(n - k))`` with ``a = c p, b = c (1 - p)``: a martingale that starts at 1 if ``share`` is true. ``c`` makes
    it narrowest at ``made_for`` images, as Howard et al. (2021) tune a normal mixture.
    """
    p = float(np.clip(share, np.finfo(np.float64).tiny, 1 - 1e-16))
    spread = made_for / _ratio(level)
    a, b = spread * p, spread * (1 - p)
    misses = np.subtract(n, k)
    return betaln(a + k, b + misses) - betaln(a, b) - xlogy(k, p) - xlog1py(misses, -p)


def _ratio(level: float) -> float:
    """Images over the mixture's spread at which a sequence is narrowest (an approximation; close for small levels)."""
    doubt = -2 * np.log1p(-level)
    return float(doubt + np.log(doubt) + 1) if doubt > 1 else 2.0


def narrow_enough(k: int, n: int, half_width: float, *, level: float = 0.95) -> bool:
    """Whether drawing may stop: the sequence made for this is at most ``2 · half_width`` wide."""
    low, high = sequence_interval(k, n, made_for=images_for(half_width, level=level), level=level)
    return high - low <= 2 * half_width


def images_for(half_width: float, *, level: float = 0.95) -> int:
    """About how many images it takes at most until ``narrow_enough``: those of an even share, by the normal form."""
    if not 0 < half_width < 0.5:
        raise LensError(f"A half width is a share between 0 and .5, such as .04 for ± 4 points; it is {half_width}.")
    ratio = _ratio(level)
    errors = (1 + 1 / ratio) * (np.log1p(ratio) - 2 * np.log1p(-level))
    n = int(np.ceil(errors / (2 * half_width) ** 2))
    if n > MOST_IMAGES:
        raise LensError(f"An interval of ± {100 * half_width:g} points would take more than {MOST_IMAGES:,} images.")
    return n
